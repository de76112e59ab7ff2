"""The result of a prune, as a table and as JSON."""
