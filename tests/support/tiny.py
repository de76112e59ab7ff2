"""Random tiny Mamba2 models, plans and token batches for property tests."""

from __future__ import annotations

import torch
from hypothesis import assume, currently_in_test_context
from hypothesis import strategies as st
from transformers import Mamba2Config, Mamba2ForCausalLM

import sspruner
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.testing.plans import plans, selection
from support.zoo import rounding

__all__ = [
    "VOCABULARY", "close", "everything", "half", "logits", "models", "plans", "selection", "selections", "tiny_model",
    "tokens",
]  # fmt: skip

VOCABULARY = 31


def tiny_model(
    *,
    layers: int = 2,
    groups: int = 1,
    heads_per_group: int = 2,
    head_dim: int = 4,
    state: int = 6,
    conv: int = 4,
    bias: bool = False,
    conv_bias: bool = True,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Mamba2ForCausalLM:
    """Return a Mamba2 whose every parameter is random, including biases and gains."""
    config = Mamba2Config(
        num_hidden_layers=layers,
        n_groups=groups,
        num_heads=groups * heads_per_group,
        head_dim=head_dim,
        hidden_size=groups * heads_per_group * head_dim // 2,
        expand=2,
        state_size=state,
        conv_kernel=conv,
        use_bias=bias,
        use_conv_bias=conv_bias,
        tie_word_embeddings=tied,
        vocab_size=VOCABULARY,
        chunk_size=8,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Mamba2ForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("A_log", "dt_bias")):
                    parameter.copy_(torch.randn(parameter.shape))
                elif parameter.ndim == 1:
                    parameter.copy_(torch.rand(parameter.shape) + 0.5)
                else:
                    parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return model.to(dtype).eval()


@st.composite
def models(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16), least_state: int = 1
) -> Mamba2ForCausalLM:
    """Draw models with 1-4 layers, 1-4 groups, any widths, with or without biases and tying. Shrinks to one small
    layer.

    least_state: 2 if the states will be cut.
    """
    return tiny_model(
        layers=draw(st.integers(1, 4)),
        groups=draw(st.integers(1, 4)),
        heads_per_group=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([4, 6, 8])),
        state=draw(st.integers(least_state, 12)),
        conv=draw(st.integers(2, 4)),
        bias=draw(st.booleans()),
        conv_bias=draw(st.booleans()),
        tied=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def selections(draw: st.DrawFn, groups: int, units: int, exactly: int | None = None) -> Selection:
    """Draw selections with the same number of units in every group, at least one or `exactly` as given."""
    after = draw(st.integers(1, units)) if exactly is None else exactly
    return selection(groups, units, after, draw(st.integers(0, 2**16)))


def half(graph: sspruner.SSMGraph, axis: str = "state") -> Plan:
    """Return a plan that keeps every other unit of one axis, or as many of those as the layers' code supports."""
    groups = graph.on_axis(axis)
    keep = {n: range(0, g.units, 2)[: (g.units + 1) // 2 // g.multiple_of * g.multiple_of] for n, g in groups.items()}
    keep = {n: range(groups[n].least) if len(k) < groups[n].least > 1 else k for n, k in keep.items()}
    return Plan({n: Selection(g.units, (tuple(keep[n]),) * g.groups) for n, g in groups.items()})


def everything(graph: sspruner.SSMGraph) -> Plan:
    """Return a plan that keeps every unit of every axis; only functions below `apply` accept it."""
    return Plan({n: Selection(g.units, (tuple(range(g.units)),) * g.groups) for n, g in graph.groups.items()})


def tokens(batch: int = 2, length: int = 19, seed: int = 0) -> torch.Tensor:
    """Draw int64 tokens (batch, length), longer than two chunks and not a multiple of one."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    """Return fp32 logits without a cache: (b, T, vocabulary)."""
    return model(input_ids=ids, use_cache=False, **kwargs).logits.float()


def close(actual: torch.Tensor, expected: torch.Tensor, model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Check equality to 1e-5 of the largest logit, or to the model's own amplification of rounding if that is more.

    A gated norm over few channels, as in random tiny models, can amplify one rounding to 1e-4. In a property test, a
    model that cannot distinguish a right cut from a wrong one is drawn again.
    """
    tolerance = max(1e-5, 32 * rounding(model, ids))
    if currently_in_test_context():
        assume(tolerance < 1e-2)
    assert tolerance < 1e-2, "this model cannot tell a right cut from a wrong one"
    assert actual.isfinite().all()
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
