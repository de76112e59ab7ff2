"""The packages whose fused kernels transformers binds where they are importable, whatever the device."""

KERNELS = ("mamba_ssm", "causal_conv1d")
