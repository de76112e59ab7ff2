"""Budgets: from how much to remove, and where, to a plan.

Main names: `budget.ResolvedBudget`, `allocate.allocate`, `decide.plan`.
"""
