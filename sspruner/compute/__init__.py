"""Run models: devices, forward passes, precision, several processes."""
