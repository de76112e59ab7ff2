"""Code that a cut model needs at run time where stock code is not enough. Does not import the rest of sspruner."""
