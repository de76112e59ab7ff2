"""Where and how a model runs: devices, forwards, precision, several processes."""
