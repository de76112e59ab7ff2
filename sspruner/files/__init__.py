"""Atomic output files and folders, the journal of a long run, and provenance."""
