"""Files that appear whole or not at all, the journal of a long run, and provenance."""
