"""Training-time methods: distillation, gradual pruning, TwIST."""
