"""What a cut model needs while it runs, where stock code is not enough. Knows nothing of sspruner."""
