"""Prune an offloaded model block by block: measure the damage, cut, prove and store each block.

The results equal those of `damages` and `slice_with_proof` on a model in memory. Five streams of hidden states pass
through the blocks side by side, and each block is read once for all of them:

    dense, cut                  the held-out text, through the dense block and through the masked one
    masked, rounded, sliced     the random tokens of the proof, in fp32
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sspruner.axes import ELEMENT_AXES, WHOLE_MODEL
from sspruner.budgets.budget import ResolvedBudget
from sspruner.calibrate.replay import Replay
from sspruner.calibrate.sources import Calibration, Progress
from sspruner.compute.device import offloaded, resident
from sspruner.compute.forward import check_predicts_tokens, embedding
from sspruner.compute.precision import in_fp32
from sspruner.errors import InputError, ProofError
from sspruner.evaluation.damage import Damage, damages_of
from sspruner.evaluation.windows import Logits, alone
from sspruner.files.journal import Journal
from sspruner.files.provenance import versions
from sspruner.graph.fingerprint import fingerprint
from sspruner.graph.site import within
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan, part_of
from sspruner.recipes.parts import Limits
from sspruner.scoring.run import Run
from sspruner.surgery.mask import masked
from sspruner.surgery.predict import added_parameters, removed_parameters, removed_state_bytes
from sspruner.surgery.project import project_states
from sspruner.surgery.proof import PROBE_SHAPE, Proof, relative, roundings, tolerance
from sspruner.surgery.record import fields, record
from sspruner.surgery.slice import slice_model
from sspruner.surgery.tensors import write_for_good

PHASE = "cut"  # name of this phase in the journal


def check_offloaded(
    run: Run, budget: ResolvedBudget, limits: Limits | None, mode: str, refit: str, calibration: Any
) -> None:
    """Raise InputError for options that need more of the model than one block at a time."""
    shared = {site.path for site in run.graph.sites if site.aliases}
    check_predicts_tokens(run.model, "--offload or --device-map")
    why = {
        "cut blocks are written on the way: load it with offload=FOLDER, too": offloaded(run.model).folder is None,
        "the model was cut already: save it, and load that": bool(offloaded(run.model).kept),
        "mode mask leaves nothing on disk to save": mode == "mask",
        f"refit {refit} runs dense blocks beside cut ones; refit reconstruct does not": refit in ("bias", "output"),
        "scorers are compared on the whole model": len(run.jobs) > 1,
        "limits of damage are searched for on the whole model": limits is not None and limits.of_damage,
        "allocation adaptive measures the whole model": budget.allocation == "adaptive",
        "gradients and losses are of the whole model": not run.needs <= {"weights", "activations"},
        "the scorer changes weights, too, and these are as large as the model": bool(run.jobs[0].changes_weights),
        "units of the whole model cannot be cut block by block": any(axis in WHOLE_MODEL for axis in run.axes),
        "masks of single elements are as large as the model": any(axis in ELEMENT_AXES for axis in run.axes),
        "several layers share what is cut": any(group.layer in shared for group in run.groups.values()),
        "sampling from the model reads all of it for every token: give a text file": calibration == "self",
    }
    if reasons := [reason for reason, holds in why.items() if holds]:
        raise InputError(f"not with --offload or --device-map: {reasons[0]}")


def journal_for(
    run: Run, budget: ResolvedBudget, texts: Sequence[Calibration], refit: Any, one_shot: bool, resume: bool
) -> Journal:
    """Return the journal in the folder of an offloaded model, tied to the settings of this run.

    texts: what is scored, and what is refitted on. refit: its settings.
    """
    job = run.jobs[0]
    settings = {
        "model": fingerprint(run.model), "scorers": {axis: cls.name for axis, (cls, _) in job.scorers.items()},
        "options": job.options, "budget": budget.to_json(), "one_shot": one_shot, "seed": run.seed,
        "refit": refit, "device": run.device.type, "dtype": str(run.model.dtype), "versions": versions(),
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for text in texts:
        for tensor in (text.tokens, text.mask, text.held_out, text.held_out_mask):
            digest.update(tensor.numpy().tobytes())
    return Journal(offloaded(run.model).folder, digest.hexdigest(), resume=resume)


@torch.no_grad()
def cut_by_blocks(
    model: Any,
    plan: Plan,
    graph: SSMGraph,
    data: Calibration,
    *,
    device: torch.device,
    seed: int,
    journal: Journal,
    progress: Progress | None = None,
) -> tuple[Damage, Proof]:
    """Cut an offloaded model by a plan, each block once. The cut blocks are then in the journal's folder.

    Raises ProofError as `slice_with_proof` does. State bytes are computed from the sizes of the cut model, since its
    cache cannot be measured without the whole model.
    """
    blocks, config = offloaded(model), model.config
    added, state = added_parameters(model, plan, graph), removed_state_bytes(plan, graph)
    before, fields_before = sum(p.numel() for p in model.parameters()), fields(config)
    generator = torch.Generator().manual_seed(seed)
    streams = _streams(model, graph, data, device, generator)
    done, saved = journal.read(PHASE)
    if done:
        _restore(streams, saved, generator)
    removed = 0
    for number, block in enumerate(blocks.blocks):
        part = part_of(plan, graph, block)
        if progress:
            progress(f"cutting {block}", number, len(blocks.blocks))
        if number < done:
            removed += _cut(model, part, graph)  # sizes only: the values are in the folder
            blocks.take_kept(block)
            continue
        with resident(model, block):
            mixers = [model.get_submodule(site.path) for site in graph.layers if within(site.path, block)]
            module = model.get_submodule(block)
            streams["dense"].advance(block)
            with masked(model, part, graph):
                streams["cut"].advance(block)
                with in_fp32(module):
                    streams["masked"].advance(block)
                    with roundings(mixers, generator):
                        streams["rounded"].advance(block)
            with in_fp32(module):
                try:
                    removed += _cut(model, part, graph)
                    streams["sliced"].advance(block)
                except (RuntimeError, ValueError, IndexError, KeyError, AttributeError) as fault:
                    why = f"{type(fault).__name__}: {fault}"
                    raise ProofError(f"proof failed: {block} does not run once it is cut ({why})") from fault
            blocks.keep(block)
        journal.write(PHASE, number + 1, _positions(streams, generator))
    if progress:
        progress("cutting", len(blocks.blocks), len(blocks.blocks))
    record(config, fields_before, plan, graph)
    cost, (error, limit) = _damage(streams), _error(model, streams)
    if not error <= limit:  # also catches NaN
        raise ProofError(f"proof failed: sliced and masked logits differ by {error:.1e}, more than {limit:.0e}")
    left = graph.state_bytes - trace(model).state_bytes
    if left != state:
        raise ProofError(f"proof failed: {left:,} state bytes per sequence are gone, the plan predicts {state:,}")
    missing = before + added - sum(p.numel() for p in model.parameters())
    if missing != removed:
        raise ProofError(f"proof failed: {missing:,} parameters are gone, the plan predicts {removed:,}")
    return cost, Proof(error, limit, removed, state, added)


def _streams(
    model: Any, graph: SSMGraph, data: Calibration, device: torch.device, generator: torch.Generator
) -> dict[str, Replay]:
    """Return the five streams in front of the first block."""
    dense = Replay(model, graph, data.held_out_batches(), device)
    probe = torch.randint(embedding(model).num_embeddings, PROBE_SHAPE, generator=generator)
    batch = [(probe, torch.ones_like(probe, dtype=torch.bool))]
    with in_fp32(model):
        reference = dense.over(batch)
        with roundings([embedding(model)], generator):
            rounded = dense.over(batch)
    return {
        "dense": dense, "cut": dense.beside(), "masked": reference, "rounded": rounded, "sliced": reference.beside(),
    }  # fmt: skip


def _cut(model: nn.Module, part: Plan, graph: SSMGraph) -> int:
    """Write a plan's new values into one block and slice it. Return the number of parameters that the plan removes."""
    graph = write_for_good(model, part, graph)
    rest, projected = project_states(model, part, graph)
    predicted = removed_parameters(model, rest, projected)
    slice_model(model, rest, projected)
    return predicted


def _positions(streams: Mapping[str, Replay], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return the hidden states of the streams and the generator's state, as tensors by name."""
    return {"generator": generator.get_state()} | {
        f"{name}.{batch}.{part}": h
        for name, replay in streams.items()
        for batch, flow in enumerate(replay.hidden)
        for part, h in enumerate(flow)
    }


def _restore(streams: Mapping[str, Replay], saved: Mapping[str, torch.Tensor], generator: torch.Generator) -> None:
    """Set the streams and the generator to what `_positions` returned."""
    generator.set_state(saved["generator"])
    for name, replay in streams.items():
        replay.hidden = [
            tuple(saved[f"{name}.{batch}.{part}"] for part in range(len(flow)))
            for batch, flow in enumerate(replay.hidden)
        ]


def _logits(replay: Replay) -> Iterator[torch.Tensor]:
    """Yield the head's logits of what left the last block: (b, T, V), batch by batch."""
    for batch, flow in enumerate(replay.hidden):
        yield replay.head(batch, flow).logits


def _damage(streams: Mapping[str, Replay]) -> Damage:
    """Return the damage of the cut, from both streams behind the last block."""

    def logits(name: str) -> Logits:
        batches = _logits(streams[name])
        return lambda _batch: next(batches)

    replay = streams["dense"]
    windows = map(alone, replay.tokens, replay.masks)
    (cost,) = damages_of(windows, logits("dense"), [logits("cut")])
    return cost


def _error(model: nn.Module, streams: Mapping[str, Replay]) -> tuple[float, float]:
    """Return the error of the sliced logits relative to the masked ones, and its tolerance."""
    with in_fp32(model):
        reference, rounded, result = (next(_logits(streams[n])).float() for n in ("masked", "rounded", "sliced"))
    return relative(result, reference), tolerance(rounded, reference)
