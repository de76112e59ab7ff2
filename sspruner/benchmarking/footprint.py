"""Footprint: a model's memory, the number of sequences that fit beside it, and the memory traffic of a decode step.

All of it follows from shapes, so the model may be on the meta device. docs/footprint.md has the formulas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from torch import nn

from sspruner.compute.forward import embedding
from sspruner.evaluation.state_rounding import FORMATS, SCALE_BYTES
from sspruner.graph.parts import keys_and_values
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.text_model import text_config, text_path
from sspruner.surgery.sizes import sizes

CONTEXT = 4096  # tokens
BATCHES = (1, 16, 64, 256)
FP32 = 4
SHORT = {"bfloat16": "bf16", "float16": "fp16"}  # names of FORMATS


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model and of the caches of one sequence, as in transformers' caches, for every family.

    dtype               of the weights, the convolution states, and keys and values
    parameters          one that several modules share counts once
    weight_bytes        of all parameters
    state_bytes         per sequence: recurrent state, in `state_dtype`
    conv_bytes          per sequence: convolution states
    kv_bytes_per_token  per sequence: keys and values of one token, in every attention layer; a block that several
                        layers share has a cache in each
    context             number of tokens that a sequence already has
    fixed_read_bytes    weights that a decode step reads whatever the batch size: all but those of the next two, each as
                        often as it is used, since a block that six layers share does not stay in a GPU's cache
    row_bytes           weights that it reads for each sequence: one row of the input embedding, 0 if that is tied
                        to the head and so is read anyway
    expert_bytes        weights of all experts
    experts             experts in one layer; a token is sent to experts_per_token of them
    state_rows          rows of the recurrent states of one sequence, along their last dimension: each has an fp32 scale
                        in int8 and fp8
    state_dtype         of the recurrent states: float32, bfloat16, float16, int8 or fp8
    """

    dtype: str
    parameters: int
    weight_bytes: int
    state_bytes: int
    conv_bytes: int
    kv_bytes_per_token: int
    context: int
    fixed_read_bytes: int
    row_bytes: int
    expert_bytes: int = 0
    experts: int = 0
    experts_per_token: int = 0
    state_rows: int = 0
    state_dtype: str = "float32"

    @property
    def state_numbers(self) -> int:
        """Numbers in the recurrent states of one sequence, without scales."""
        itemsize, scales = self._stored_in(self.state_dtype)
        return (self.state_bytes - scales) // itemsize

    def stored(self, dtype: str) -> Footprint:
        """Return the footprint with recurrent states in a dtype: float32, bfloat16, float16, int8 or fp8."""
        itemsize, scales = self._stored_in(dtype)
        return replace(self, state_bytes=self.state_numbers * itemsize + scales, state_dtype=dtype)

    def _stored_in(self, dtype: str) -> tuple[int, int]:
        """Return the bytes of one number of a state, and those of all scales."""
        form = FORMATS.get(SHORT.get(dtype, dtype))
        return (form.itemsize, SCALE_BYTES * self.state_rows * form.scaled) if form else (FP32, 0)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of one sequence, `context` tokens long."""
        return self.kv_bytes_per_token * self.context

    @property
    def sequence_bytes(self) -> int:
        """Bytes of one sequence beside the weights."""
        return self.state_bytes + self.conv_bytes + self.kv_bytes

    def sequences(self, memory: float) -> int:
        """Return how many sequences fit in `memory` bytes beside the weights, without activations."""
        return max(0, int((memory - self.weight_bytes) // self.sequence_bytes))

    def step_bytes(self, batch: int) -> int:
        """Return the minimal bytes that one decode step of `batch` sequences reads and writes."""
        return sum(self.step_parts(batch).values())

    def step_parts(self, batch: int) -> dict[str, int]:
        """Return the bytes of `step_bytes` by what is read and written: weights, states, KV cache.

        Weights are read; recurrent and convolution states are read and written; keys and values are read for `context`
        tokens and written for one. Of the experts, as many as the batch's tokens can be sent to are read, which is an
        upper limit if tokens share experts. Activations and logits are not counted.
        """
        weights = self.fixed_read_bytes + batch * self.row_bytes
        if self.experts:
            weights += self.expert_bytes // self.experts * self.experts_read(batch)
        states = 2 * (self.state_bytes + self.conv_bytes)
        kv = self.kv_bytes_per_token * (self.context + 1)
        return {"weights": weights, "states": batch * states, "KV cache": batch * kv}

    def experts_read(self, batch: int) -> int:
        """Return how many experts of a layer one step reads, if its tokens share as few as they can."""
        return min(self.experts, batch * self.experts_per_token)

    @property
    def sequence_step_bytes(self) -> int:
        """Bytes that one more sequence adds to a step once all experts are read."""
        many = max(1, self.experts)
        return self.step_bytes(many + 1) - self.step_bytes(many)

    def ceiling(self, batch: int, bandwidth: float) -> float:
        """Return the tokens per second, over all sequences, if memory traffic is the only cost. bandwidth: bytes/s."""
        return batch * bandwidth / self.step_bytes(batch)

    def to_json(
        self, batches: Sequence[int] = BATCHES, memory: float | None = None, bandwidth: float | None = None
    ) -> dict[str, Any]:
        """Return all numbers as a JSON object."""
        steps = {batch: self.step_bytes(batch) for batch in batches}
        return {
            **asdict(self),
            "kv_bytes": self.kv_bytes,
            "sequence_bytes": self.sequence_bytes,
            "sequences": None if memory is None else self.sequences(memory),
            "decode": [
                {
                    "batch": batch,
                    "step_bytes": step,
                    "bytes_per_token": step / batch,
                    "tokens_per_second": None if bandwidth is None else self.ceiling(batch, bandwidth),
                }
                for batch, step in steps.items()
            ],
        }


def footprint(model: Any, graph: SSMGraph, context: int = CONTEXT) -> Footprint:
    """Return the footprint of a model with sequences of `context` tokens. The model may be on the meta device.

    For a model of an unknown family, attention and experts are not described and so not counted as such.
    """
    size = sizes(model, graph)
    experts = _experts(model, graph)
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    table = embedding(model).weight
    tied = uses[id(table)] > 1
    fixed, elsewhere = 0, beside_the_text(model)
    for name, p in model.named_parameters():
        if id(p) in experts or id(p) in elsewhere or (p is table and not tied):
            continue
        once = p is table or "_adapter_list." in name  # Zamba2's adapters belong to one of the layers that share
        fixed += _bytes(p) * (1 if once else uses[id(p)])
    return Footprint(
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        parameters=size.parameters,
        weight_bytes=size.weight_bytes,
        state_bytes=size.state_bytes,
        conv_bytes=size.conv_bytes,
        kv_bytes_per_token=_kv_bytes(model, graph),
        context=context,
        fixed_read_bytes=fixed,
        row_bytes=0 if tied else table.shape[1] * table.element_size(),
        expert_bytes=sum(_bytes(p) for p in experts.values()),
        experts=next((p.shape[0] for p in experts.values()), 0),
        experts_per_token=text_config(model.config).num_experts_per_tok if experts else 0,
        state_rows=sum(site.layout.count(site.layout.state[:-1]) for site in graph.layers if site.layout.state),
    )


def _kv_bytes(model: nn.Module, graph: SSMGraph) -> int:
    """Return the bytes of keys and values of one token, over all attention layers."""
    total = 0
    for site in graph.sites:
        if site.kind == "attention":
            itemsize = model.get_parameter(f"{site.path}.o_proj.weight").element_size()
            total += keys_and_values(site.layout) * itemsize * (1 + len(site.aliases))
    return total


def beside_the_text(model: Any) -> set[int]:
    """Return the ids of the parameters that no step of decoding reads: the vision part of a multimodal model."""
    text = text_path(model)
    if not text:
        return set()
    read = {id(p) for module in (model.get_submodule(text), model.get_output_embeddings()) for p in module.parameters()}
    return {id(p) for p in model.parameters()} - read


def _experts(model: nn.Module, graph: SSMGraph) -> dict[int, nn.Parameter]:
    """Return the weights of experts, (experts, out, in) each, by id."""
    sites = [model.get_submodule(site.path) for site in graph.sites if site.kind == "experts"]
    return {id(p): p for site in sites for p in site.parameters() if p.ndim == 3}


def _bytes(p: nn.Parameter) -> int:
    return prod(p.shape) * p.element_size()
