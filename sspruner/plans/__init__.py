"""Plans: which units and elements to remove, as data.

Main names: `plan.Plan`, `reduction.Selection`, `reduction.Projection`.
"""
