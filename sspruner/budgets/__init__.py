"""Budgets: how much to remove, and where, becomes a plan."""
