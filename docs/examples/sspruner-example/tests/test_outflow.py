"""The plugin's own tests: the conformance kit, then what only its author knows."""

import pytest
import torch
from sspruner_example.outflow import Outflow

import sspruner
from sspruner.testing import check_scorer, zoo


@pytest.mark.parametrize("gate", [True, False])
def test_conforms(gate: bool) -> None:
    check_scorer(Outflow, options={"gate": gate}, max_examples=2)


def test_a_channel_that_nothing_reads_scores_0() -> None:
    model = zoo("mamba")
    with torch.no_grad():
        model.backbone.layers[0].mixer.out_proj.weight[:, 5] = 0
    tokens = torch.randint(31, (4, 24), generator=torch.Generator().manual_seed(0))
    scores = sspruner.score(model, Outflow, axis="channel", calibration=tokens).importance
    assert (scores["backbone.layers.0.mixer:channel"][0] == 0).nonzero().tolist() == [[5]]
