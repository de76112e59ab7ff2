"""Names of the axes that can be pruned (docs/graph.md)."""

#: Axes of units: tensors get smaller.
AXES = {
    *("state", "head", "head_dim", "group", "channel", "dt_rank"),  # in a mixer
    *("attn_head", "mlp", "hidden", "block", "mixer"),  # around it
    *("expert", "expert_mlp", "latent"),  # in mixtures of experts
}

#: Axes of single elements: zeros in tensors that keep their size.
ELEMENT_AXES = {"weight", "decay"}

#: Axes with one dependency group for all layers.
WHOLE_MODEL = ("hidden", "block", "mixer")

#: On the axes of single elements: the scope within which elements compete.
GRANULARITIES = ("row", "tensor", "global")


def axis_of(name: str) -> str:
    """Return the axis of the dependency group `<module path>:<axis>`."""
    return name.rpartition(":")[2]
