"""CacheLayers: sizes of the layers of a model that keep a cache while it generates, as plain numbers.

The formulas of the engines (`vllm_cache`, `sglang_cache`, `llama_cache`) take these numbers and no model.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sspruner.errors import ModelError
from sspruner.graph.layout import Layout
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.text_model import text_config
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Projection
from sspruner.surgery.predict import dropped_modules

CONV = "conv1d.weight"


@dataclass(frozen=True)
class RecurrentLayer:
    """Sizes of the caches of one recurrent layer.

    channels     convolution channels without those of B and C: heads x head_dim (Mamba1: channels)
    state        numbers in the recurrent state of one sequence
    kernel       taps of the convolution
    heads        heads of Mamba2, value heads of delta rules, 0 for other layers
    groups       B/C groups of Mamba2, key heads of gated delta nets, 0 for other layers
    bc_channels  convolution channels of B and C, over all groups: 2 x groups x state size; of q and k in delta nets. In
                 KDA every head has its own, and they are among `channels`
    delta        True for a delta rule
    """

    channels: int
    state: int
    kernel: int = 4
    heads: int = 0
    groups: int = 0
    bc_channels: int = 0
    delta: bool = False

    def conv_channels(self, tp: int = 1) -> int:
        """Return the convolution channels on one of `tp` GPUs. B/C groups that `tp` does not divide are replicated.

        vllm/model_executor/layers/mamba/mamba_utils.py, `mamba2_state_shape` and `extra_groups_for_head_shards` @ 0.33.
        """
        groups = self.groups if self.groups % tp == 0 else tp
        each = self.bc_channels // self.groups if self.groups else 0
        return (self.channels + each * groups) // tp


@dataclass(frozen=True)
class CacheLayers:
    """Layers of a model that keep a cache. Engines build all layers of a kind in one size, from one config.

    recurrent     number of recurrent layers, each of the size `layer`
    attention     number of attention layers, with `kv_heads` key/value heads of `head_dim`. A block that several layers
                  share counts in each
    latent        numbers that latent attention (MLA) keeps of a token instead: one vector for all heads, 0 without
    dtype         of the weights
    family        the config's model_type, "" if unknown
    state_dtypes  fields of the config that name a dtype of the state -> that dtype
    uneven        True if layers differ: then the largest size on every dimension counts, to which `hf-padded` pads them
    """

    recurrent: int
    layer: RecurrentLayer
    attention: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    dtype: str = "bfloat16"
    family: str = ""
    state_dtypes: tuple[tuple[str, str], ...] = ()
    uneven: bool = False
    latent: int = 0

    def kept(self, tp: int = 1) -> int:
        """Return how many numbers an attention layer keeps of each token on one of `tp` GPUs; all of a latent one."""
        return self.latent or 2 * max(1, self.kv_heads // tp) * self.head_dim

    def state_dtype(self, field: str) -> str | None:
        """Return the dtype of the state that a field of the config names, None without one."""
        return dict(self.state_dtypes).get(field)

    def check_tp(self, tp: int) -> None:
        """Raise ModelError if `tp` GPUs cannot share the layers evenly."""
        counts = {"heads": self.layer.heads, "channels": self.layer.channels}
        counts |= {"key heads": self.layer.groups} if self.layer.delta else {}
        for name, count in counts.items():
            if count % tp:
                raise ModelError(f"tp {tp}: the {count} {name} of a layer cannot be split evenly over so many GPUs")


STATE_FIELDS = ("mamba_ssm_cache_dtype", "mamba_ssm_dtype")


def cache_layers(model: Any, graph: SSMGraph, plan: Plan | None = None) -> CacheLayers:
    """Return the layers of a model that keep a cache, or those that a plan would leave, without cutting.

    The model may be on the meta device. Raises ModelError if the plan leaves no recurrent layer, or the model has
    none with a convolution.
    """
    dropped = dropped_modules(plan, graph) if plan else []
    recurrent, attention, kinds, heads = 0, 0, [], []
    for site in graph.sites:
        stay = sum(not _inside(path, dropped) for path in (site.path, *site.aliases))
        if not stay or not (site.family or site.kind == "attention"):
            continue
        layout = _after(site.path, site.layout, plan)
        if site.family:
            recurrent += stay
            kinds.append(_recurrent_layer(layout, model.get_submodule(site.path)))
        else:
            attention += stay
            heads.append(_attention(site.path, layout, model.get_submodule(site.path)))
    if not kinds:
        raise ModelError("the plan leaves no recurrent layer")
    config = text_config(model.config)
    named = [(name, str(getattr(config, name, None) or "").removeprefix("torch.")) for name in STATE_FIELDS]
    return CacheLayers(
        recurrent=recurrent,
        layer=RecurrentLayer(*(max(getattr(kind, f.name) for kind in kinds) for f in fields(RecurrentLayer))),
        attention=attention,
        **{name: max((one[name] for one in heads), default=0) for name in ("kv_heads", "head_dim", "latent")},
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        family=graph.family.name if graph.family else "",
        state_dtypes=tuple((name, dtype) for name, dtype in named if dtype),
        uneven=len(set(kinds)) > 1 or any(one != heads[0] for one in heads),
    )


def _after(path: str, layout: Layout, plan: Plan | None) -> Layout:
    """Return the layout of a module after a plan."""
    sizes = {}
    for axis in layout.axes if plan else ():
        reduction = plan.groups.get(f"{path}:{axis}") if plan else None
        if isinstance(reduction, Projection):
            layout = layout.projected(reduction.after)
        elif reduction is not None:
            sizes[axis] = reduction.after
    return layout.resized(sizes)


def _recurrent_layer(layout: Layout, mixer: Any) -> RecurrentLayer:
    """Return the cache sizes of a mixer with this layout. Its weight gives the taps of the convolution alone."""
    (conv,) = (slot for slot in layout.slots if slot.tensor == CONV)
    shared = sum(layout.count(rows.dims) for rows in conv.rows if set(rows.dims) & {"state", "row"})
    channels = sum(layout.count(rows.dims) for rows in conv.rows) - shared
    delta, grouped = conv.rows[0].name == "q", "group" in layout.sizes
    heads = [dim for dim in ("group", "head") if dim in layout.sizes] if grouped or delta else []
    return RecurrentLayer(
        channels=channels if grouped else channels + shared,
        state=layout.count(layout.state),
        kernel=mixer.conv1d.weight.shape[-1],
        heads=layout.count(tuple(heads)) if heads else 0,
        groups=layout.sizes["group"] if grouped else 0,
        bc_channels=shared if grouped else 0,
        delta=delta,
    )


def _attention(path: str, layout: Layout, module: Any) -> dict[str, int]:
    """Return the cache sizes of an attention module. Raises ModelError for keys that an indexer keeps beside them."""
    if hasattr(module, "indexer"):
        raise ModelError(f"{path}: engines keep keys of its indexer beside the others, which are not counted here")
    if "narrow" in layout.sizes:
        return {"kv_heads": 0, "head_dim": 0, "latent": layout.sizes["narrow"]}
    return {"kv_heads": layout.sizes["attn_head"], "head_dim": layout.sizes["attn_dim"], "latent": 0}


def _inside(path: str, modules: list[str]) -> bool:
    return any(f"{path}.".startswith(f"{module}.") for module in modules)
