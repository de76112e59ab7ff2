"""Training: distillation, gradual pruning, TwIST."""
