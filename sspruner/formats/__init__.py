"""Checkpoint formats, and the sizes that runtimes (targets) support.

Main names: `native` (mamba_ssm), `stock` and `remote` (transformers), `targets.Target`, `fitting.check_cut`.
"""
