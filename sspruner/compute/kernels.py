"""Packages with fused kernels that transformers uses whenever they can be imported, whatever the device."""

KERNELS = ("mamba_ssm", "causal_conv1d")
