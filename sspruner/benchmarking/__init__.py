"""Benchmarks: speed and memory of decoding and prefill, and their theoretical limit."""
