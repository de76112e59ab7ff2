"""Fixtures of the evaluation tests."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import sspruner
from sspruner.io.source import DEFAULT, REFERENCES
from support.tiny import tiny_model, tokens


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any, Any]:
    """(cut, dense, tokenizer), tiny."""
    tokenizer = AutoTokenizer.from_pretrained(REFERENCES / DEFAULT)
    dense = tiny_model(layers=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense.resize_token_embeddings(4096, mean_resizing=False)
    cut = copy.deepcopy(dense)
    sspruner.prune(cut, "random", keep=2, calibration=tokens(4, 16))
    return cut, dense, tokenizer
