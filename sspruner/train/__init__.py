"""Training that keeps what was pruned pruned: one loop, and what each method adds to it."""
