"""Describe which parts of a model can be pruned together: dependency groups, module layouts, model families.

Main names: `trace.trace`, `ssm_graph.SSMGraph`, `group.DependencyGroup`, `family.Family`.
"""
