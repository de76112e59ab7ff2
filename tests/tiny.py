"""Random tiny Mamba2 models, plans and token batches: the breadth that property tests draw from."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from transformers import Mamba2Config, Mamba2ForCausalLM

import sspruner
from sspruner.planning.plan import Plan, Selection

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
    """A random Mamba2 whose every parameter is random, biases and gains too: nothing hides in a 0 or a 1."""
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
def models(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> Mamba2ForCausalLM:
    """Layers 1-4, groups 1-4, any widths, biases on or off, tied or not. Shrinks to one small layer."""
    return tiny_model(
        layers=draw(st.integers(1, 4)),
        groups=draw(st.integers(1, 4)),
        heads_per_group=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([4, 6, 8])),
        state=draw(st.integers(1, 12)),
        conv=draw(st.integers(2, 4)),
        bias=draw(st.booleans()),
        conv_bias=draw(st.booleans()),
        tied=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def selections(draw: st.DrawFn, groups: int, units: int) -> Selection:
    """The same number of units, at least one, in every group; which ones is free."""
    after = draw(st.integers(1, units))
    keep = [sorted(draw(st.permutations(range(units)))[:after]) for _ in range(groups)]
    return Selection(units, tuple(map(tuple, keep)))


@st.composite
def plans(draw: st.DrawFn, graph: sspruner.SSMGraph) -> Plan:
    """A plan on the axis `state` that cuts some of the layers, each to its own size."""
    every = graph.on_axis("state")
    names = draw(st.lists(st.sampled_from(list(every)), min_size=1, unique=True))
    return Plan("state", {n: draw(selections(every[n].groups, every[n].units)) for n in every if n in names})


def tokens(batch: int = 2, length: int = 19, seed: int = 0) -> torch.Tensor:
    """int64 (batch, length), longer than two chunks and not a multiple of one."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    """fp32 logits without a cache: (b, T, vocabulary)."""
    return model(input_ids=ids, use_cache=False, **kwargs).logits.float()


def close(actual: torch.Tensor, expected: torch.Tensor, model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest logit; a model that amplifies rounding more than that is allowed what it amplifies.

    A gated norm over a handful of channels, as random tiny models have, can turn one rounding into 1e-4.
    """
    embeddings = model.get_input_embeddings()(ids).detach()
    with torch.random.fork_rng():
        noise = 1 + 2.0**-22 * torch.randn(embeddings.shape)
    with torch.no_grad():
        rounded = model(inputs_embeds=embeddings * noise, use_cache=False).logits - logits(model, ids)
    largest = expected.abs().max()
    tolerance = max(1e-5, 8 * float(rounded.abs().max() / largest))
    assert tolerance < 1e-2, "this model cannot tell a right cut from a wrong one"
    assert actual.isfinite().all()
    assert (actual - expected).abs().max() <= tolerance * largest
