"""Plans: the decision what to remove, as data."""
