"""Save a model, load it again, and compare tensors, logits and generated text."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

import sspruner
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from support.tiny import logits, tokens
from support.zoo_variants import sharing

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def uniform(model: torch.nn.Module, keep: tuple[int, ...]) -> Plan:
    groups = sspruner.trace(model).on_axis("state")
    return Plan({n: Selection(g.units, (keep,) * g.groups) for n, g in groups.items()})


def check_round_trip(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Check that a loaded model equals the saved one: every bit, buffer, attribute, field and generated token."""
    loaded, tokenizer = sspruner.load(sspruner.save(model, folder))
    assert tokenizer is None
    assert type(loaded) is type(model)
    assert loaded.config.dtype == loaded.dtype
    saved, found = (
        dict(model.named_parameters(remove_duplicate=False)),
        dict(loaded.named_parameters(remove_duplicate=False)),
    )
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in saved.items()}
    assert all(torch.equal(t, found[n]) for n, t in saved.items())
    saved, found = dict(model.named_buffers()), dict(loaded.named_buffers())
    assert saved.keys() == found.keys()
    assert all(torch.equal(t, found[n].to(t.dtype)) for n, t in saved.items())  # stock may widen: nemotron_h's router
    assert sharing(loaded) == sharing(model)
    # Copies: weights that are mapped from a file may lie unaligned, and BLAS then rounds otherwise.
    model, loaded = copy.deepcopy(model), copy.deepcopy(loaded)
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    ids = tokens(2, 9)
    for beams in (1, 2):
        args = {**GREEDY, "num_beams": beams, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(loaded.generate(ids, **args), model.generate(ids, **args))
    assert str(sspruner.trace(loaded)) == str(sspruner.trace(model))
    assert getattr(loaded.config, "sspruner", None) == getattr(model.config, "sspruner", None)
    return loaded


STOCK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
with torch.no_grad():
    logits = model(input_ids=ids, use_cache=False).logits
made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False,
                      pad_token_id=0)
print(json.dumps({"logits": logits.double().tolist(), "made": made.tolist(), "state": model.config.state_size}))
"""
