"""Pruning: score, decide, refit, cut, prove, report (`prune.prune`)."""
