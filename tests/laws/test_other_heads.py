"""Models that are no language models: bare backbones, classifiers, a user's own module. Cut, proved, saved as such."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

import sspruner
from sspruner.errors import InputError, ModelError
from support.command import done, saved_zoo
from support.tiny import tokens
from support.zoo import FAMILIES, zoo

DATA = tokens(8, 24)


class Classifier(nn.Module):
    """A head of the user's own on a backbone: classes from the last position, or a number for each."""

    def __init__(self, backbone: Any, each: bool = False) -> None:
        super().__init__()
        self.backbone, self.each = backbone, each
        self.head = nn.Linear(backbone.config.hidden_size, 1 if each else 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.backbone(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(hidden if self.each else hidden[:, -1])


def backbone(family: str) -> Any:
    return zoo(family).base_model


def classifier(family: str) -> Any:
    """A random classifier of sequences, of transformers, with the backbone of `zoo`."""
    inside = backbone(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, CLASSIFIERS[family])(copy.deepcopy(inside.config))
    model.base_model.load_state_dict(inside.state_dict())
    return model.eval()


def put_out(model: Any) -> torch.Tensor:
    with torch.no_grad():
        rows = [model(input_ids=row[None]) for row in DATA[:3]]
    found = [getattr(row, "logits", getattr(row, "last_hidden_state", row)) for row in rows]
    return torch.cat(found)


def assert_cut_as_masked(model: Any, **options: Any) -> Any:
    """Prune; what the sliced model puts out is what the masked one does, and perplexity is left out."""
    masked = copy.deepcopy(model)
    result = sspruner.prune(model, sparsity=0.5, calibration=DATA, **options)
    assert result.report.proof
    assert result.report.proof.state_bytes_removed > 0
    assert "perplexity" not in result.report.pruned
    assert "puts out no logits over its vocabulary" in result.report.left_out
    assert "left out" in str(result)
    sspruner.apply(masked, result.plan, mode="mask")
    expected = put_out(masked)
    torch.testing.assert_close(put_out(model), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    return result


@pytest.mark.slow
@pytest.mark.cover(most=1)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_backbone(family: str, tmp_path: Path) -> None:
    model = backbone(family)
    result = assert_cut_as_masked(model, scorer="ghost")
    sspruner.save(model, tmp_path / "cut", result=result)
    again, _ = sspruner.load(tmp_path / "cut")
    assert type(again) is type(model)
    assert torch.equal(put_out(again), put_out(model))


@pytest.mark.slow
@pytest.mark.cover(most=1)
@pytest.mark.parametrize("family", sorted(set(CLASSIFIERS) & set(FAMILIES)))
def test_a_classifier(family: str, tmp_path: Path) -> None:
    model = classifier(family)
    assert_cut_as_masked(model, scorer="ghost")
    sspruner.save(model, tmp_path / "cut")
    again, _ = sspruner.load(tmp_path / "cut")
    assert type(again) is type(model)
    assert torch.equal(put_out(again), put_out(model))


@pytest.mark.slow
@pytest.mark.cover(most=2)
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_module_of_the_users_own(family: str, each: bool, tmp_path: Path) -> None:
    model = Classifier(backbone(family), each).eval()
    assert_cut_as_masked(model, scorer="ghost")
    with pytest.raises(ModelError, match=r"Classifier is no model of transformers.*: keep it whole with torch.save"):
        sspruner.save(model, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    torch.save(model, tmp_path / "whole.pt")
    assert torch.equal(put_out(torch.load(tmp_path / "whole.pt", weights_only=False)), put_out(model))


def test_a_classifier_as_stock_saves_it(tmp_path: Path) -> None:
    model = classifier("zamba2")
    model.save_pretrained(tmp_path / "stock")
    loaded, _ = sspruner.load(tmp_path / "stock")
    assert type(loaded) is type(model)
    assert torch.equal(put_out(loaded), put_out(model))


@pytest.mark.slow
def test_on_the_command_line(tmp_path: Path) -> None:
    model = backbone("mamba2")
    folder = saved_zoo(tmp_path / "lm", "mamba2")
    whole, tokenizer = sspruner.load(folder)
    whole.base_model.save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    (tmp_path / "text.txt").write_text("It was a bright cold day in April. " * 300)
    out = tmp_path / "cut"
    args = ("--sparsity", 0.5, "--samples", 4, "--seq-len", 32, "--calibration", tmp_path / "text.txt", "--out", out)
    said = done("prune", tmp_path / "bare", *args)
    assert "left out: perplexity and KL: Mamba2Model puts out no logits" in " ".join(said.stdout.split())
    assert type(sspruner.load(out)[0]) is type(model)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "Left out: " in card
    assert "perplexity and KL: Mamba2Model puts out no logits" in card
    assert "text-generation" not in card.partition("---\n\n")[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"scorer": "taylor"},
            "scorer 'taylor' needs the loss of a language model, and Mamba2Model puts out no logits",
        ),
        ({"scorer": "gradmag", "axis": "weight"}, "scorer 'gradmag' needs the loss"),
        ({"scorer": "ghost", "perplexity_increase": 0.01}, "a limit of damage measures perplexity, and Mamba2Model"),
        ({"scorer": "ghost", "kl": 0.01}, "a limit of damage measures perplexity"),
        ({"scorer": "auto:ghost,magnitude", "sparsity": 0.5}, "a choice between scorers measures perplexity"),
        ({"scorer": "ghost", "allocation": "adaptive", "sparsity": 0.5}, "allocation adaptive measures perplexity"),
        ({"scorer": "ghost", "sparsity": 0.5, "calibration": "self"}, "'self': Mamba2Model puts out no logits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_needs_logits_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sspruner.prune(backbone("mamba2"), **{"calibration": DATA, **options})


def test_what_measures_or_trains_language_models(tmp_path: Path) -> None:
    model = backbone("mamba2")
    scores = sspruner.score(model, "ghost", calibration=DATA)
    data = sspruner.calibration(DATA, model)
    sspruner.save(model, tmp_path / "bare")
    apart, _ = sspruner.load(tmp_path / "bare", offload=tmp_path / "work")
    for what, call in (
        ("evaluate", lambda: sspruner.evaluate(model, text=DATA)),
        ("compare", lambda: sspruner.compare(model, ["ghost"], sparsities=(0.5,), calibration=DATA)),
        ("sensitivity", lambda: sspruner.sensitivity(model, scores, data)),
        ("export --to hf-remote", lambda: sspruner.export(model, tmp_path / "out", to="hf-remote")),
        ("--offload", lambda: sspruner.prune(apart, "ghost", sparsity=0.5, calibration=DATA)),
    ):
        with pytest.raises(InputError, match=f"{what}.*: needs a language model, and Mamba2Model puts out no logits"):
            call()
    assert not (tmp_path / "out").exists()
