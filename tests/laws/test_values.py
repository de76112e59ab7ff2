"""Models that read no tokens: scored on what their blocks see, cut as masked, saved with their own code; refusals."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from transformers import MambaModel

import sspruner
from sspruner.calibrate.replay import Replay
from sspruner.compute.inputs import input_name, reads_tokens
from sspruner.errors import InputError, ModelError
from sspruner.evaluation.output_error import _counted
from sspruner.pruning.report import Report
from sspruner.reporting.card import model_card
from sspruner.units import error_text
from support.command import done, refused
from support.examples import examples
from support.series import CHANNELS, STEPS, Classifier, Forecaster, config
from support.zoo import FAMILIES, randomise, zoo

AXES = ("state", "channel", "weight")


def windows(seed: int = 0, count: int = 20, steps: int = STEPS) -> torch.Tensor:
    return torch.randn(count, steps, CHANNELS, generator=torch.Generator().manual_seed(seed))


def forecaster(seed: int = 0, kind: Any = Forecaster) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config())
        randomise(model)
    return model.eval()


def classifier() -> Any:
    return forecaster(kind=Classifier)


class Patches(Forecaster):
    """Two steps of the series are one of the model."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.enter = nn.Linear(2 * CHANNELS, config.hidden_size)

    def forward(self, values: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        return super().forward(values.unflatten(1, (-1, 2)).flatten(2), labels)


class Wide(nn.Module):
    """A forecaster whose head needs all steps at once, and that is no model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = forecaster()
        self.dummy_inputs = {"series": torch.zeros(1, STEPS, CHANNELS)}
        self.head = nn.Linear(STEPS * self.inside.config.hidden_size, 2)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        hidden = self.inside.backbone(inputs_embeds=self.inside.enter(series)).last_hidden_state
        return self.head(hidden.flatten(1))


def put_out(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(inputs)
    return out["logits"] if isinstance(out, dict) else out


@example(kind=Wide, axis="state", sparsity=0.5, by_weights=False)
@example(kind=Patches, axis="channel", sparsity=0.5, by_weights=False)
@given(
    kind=st.sampled_from([Forecaster, Patches, Wide, Classifier]),
    axis=st.sampled_from(AXES),
    sparsity=st.sampled_from([0.25, 0.5, 0.75]),
    by_weights=st.booleans(),
)
@examples(12)
def test_sliced_equals_masked(kind: Any, axis: str, sparsity: float, by_weights: bool) -> None:
    model = Wide().eval() if kind is Wide else forecaster(kind=kind)
    inputs = torch.arange(60).view(5, 12) % 11 if kind is Classifier else windows(count=5)
    cut, scorer = copy.deepcopy(model), "magnitude" if by_weights else "ghost" if axis != "weight" else "wanda"
    result = sspruner.prune(cut, scorer, axis=axis, sparsity=sparsity, calibration=inputs)
    assert result.report.left_out
    sspruner.apply(model, result.plan, mode="mask")
    expected = put_out(model, inputs)
    torch.testing.assert_close(put_out(cut, inputs), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    sspruner.unmask(model)
    assert not torch.allclose(put_out(model, inputs), expected)  # the cut is no empty one


@example(kind=Wide, refit=None, held_out=3)
@given(kind=st.sampled_from([Forecaster, Classifier]), refit=st.sampled_from([None, "output"]), held_out=st.just(5))
@examples(4)
def test_the_report_says_how_far_the_outputs_are(kind: Any, refit: str | None, held_out: int) -> None:
    """Of both models on the windows that were held out: by hand, one by one; intervals hold it."""
    model = Wide().eval() if kind is Wide else forecaster(kind=kind)
    inputs = torch.arange(240).view(20, 12) % 11 if kind is Classifier else windows()
    data = sspruner.calibration(inputs, model, samples=12, held_out=held_out)
    dense = torch.cat([put_out(model, one[None]) for one in data.held_out]).double()
    result = sspruner.prune(copy.deepcopy(model), "ghost", sparsity=0.5, calibration=data, refit=refit or "none")
    cut = torch.cat([put_out(result.model, one[None]) for one in data.held_out]).double()
    value, low, high = result.report.pruned["output_error"]
    assert value == pytest.approx(float((cut - dense).square().sum() / dense.square().sum()), rel=1e-3)
    assert 0 < low <= value <= high
    assert Report.from_json(result.report.to_json()).pruned["output_error"] == [value, low, high]
    if refit:
        without = result.report.refit["without"]["output_error"][0]
        assert without != value
    unit = "tokens" if kind is Classifier else "steps"
    card = "" if kind is Wide else model_card(result.model, "sspruner", result.report)  # no folder could describe it
    for text in (card, str(result)) if card else (str(result),):
        assert "output error" in text
        assert error_text([value, low, high]).split(" (")[0] in text
        assert f"{12 * 12} {unit}" in text
    assert not card or f"The output error was evaluated on {held_out * 12} {unit}" in card


@given(seed=st.integers(0, 99), width=st.sampled_from([0, 3]))
@examples(5)
def test_padding_does_not_count_in_an_output_error(seed: int, width: int) -> None:
    """A model with an output for each position: what it puts out at padding changes nothing."""
    out, mask = torch.randn(2, 5, *[width] * bool(width)), torch.rand(2, 5) < 0.6
    other = torch.where(mask.view(2, 5, *[1] * bool(width)), out, torch.randn_like(out))
    assert torch.equal(_counted(out, mask), _counted(other, mask))
    assert torch.equal(_counted(out, torch.ones_like(mask)), out.double().flatten(1))


@pytest.mark.parametrize("kind", [Forecaster, Patches])
def test_scores_are_those_of_the_backbone_on_what_it_sees(kind: Any) -> None:
    """Against the bare backbone with a token for every position, whose embedding is what enters there."""
    model, values = forecaster(kind=kind), windows(count=6)
    with torch.no_grad():
        steps = values.unflatten(1, (-1, 2)).flatten(2) if kind is Patches else values
        entered = model.enter(steps)  # (6, T, D)
    tokens = torch.arange(entered[..., 0].numel()).view(entered.shape[:2])
    backbone = MambaModel(config(vocab_size=tokens.numel())).eval()
    weights = {name: value for name, value in model.backbone.state_dict().items() if "embeddings" not in name}
    backbone.load_state_dict(weights | {"embeddings.weight": entered.flatten(0, 1)})
    ours = sspruner.score(model, "ghost", calibration=values).importance
    theirs = sspruner.score(backbone, "ghost", calibration=tokens).importance
    assert list(ours) == [f"backbone.{name}" for name in theirs]
    for name, importance in theirs.items():
        torch.testing.assert_close(ours[f"backbone.{name}"], importance)


def test_arrays_in_a_file_are_the_tensor(tmp_path: Path) -> None:
    for model, values in ((forecaster(), windows()), (classifier(), torch.arange(60).view(5, 12) % 11)):
        file = tmp_path / "some.npz"
        np.savez(file, other=np.zeros(3), **{input_name(model): values.numpy()})
        data, same = (sspruner.calibration(source, model, samples=3, held_out=1) for source in (str(file), values))
        assert data.source == str(file)
        assert torch.equal(data.tokens, same.tokens)
        assert torch.equal(data.held_out, same.held_out)
        assert data.tokens.dtype == (torch.int64 if reads_tokens(model) else torch.float32)


def test_an_array_of_numpy_is_a_tensor() -> None:
    data = sspruner.calibration(windows().double().numpy(), forecaster(), samples=4)
    assert torch.equal(data.tokens, windows()[:4])


def test_weights_alone_need_no_calibration() -> None:
    result = sspruner.prune(forecaster(), "magnitude", sparsity=0.5)
    assert (result.report.calibration["source"], result.report.calibration["tokens"]) == ("none", 0)
    assert "left out" in str(result)
    with pytest.raises(InputError, match="reads 'values', which are no token ids"):
        sspruner.prune(forecaster(), "ghost", sparsity=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_tokens(family: str) -> None:
    assert input_name(zoo(family)) == "input_ids"


class Hidden(nn.Module):
    """A module that does not say the shape of what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = forecaster()

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        return put_out(self.inside, series)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (windows()[..., :2], r"has the shape \(20, 12, 2\); Forecaster reads \(windows, steps, 3\)"),
        (windows()[0], r"has the shape \(12, 3\)"),
        (windows() / 0, "720 values are NaN or infinite"),
        ("self", "reads 'values', which are no token ids; give them as a tensor"),
        ("text.txt", "reads 'values', which are no token ids"),
        (["a text"], "reads 'values', which are no token ids"),
        ("nothing.npz", "nothing.npz: no such file"),
        ("damaged.npz", "damaged.npz: cannot be read as arrays"),
        ("pickled.npz", "pickled.npz: cannot be read as arrays"),
        ("texts.npz", "texts.npz: the array 'values' is of type <U1, not of numbers"),
        ("others.npz", "has the arrays a, b; Forecaster reads 'values'"),
        ("empty.npz", "empty.npz: empty"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_what_is_no_such_input_is_refused(
    source: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("damaged.npz").write_bytes(b"PK\x03\x04 no archive")
    np.savez("pickled.npz", values=np.array([{"a": 1}], dtype=object))
    np.savez("texts.npz", values=np.array(["a"]))
    np.savez("others.npz", a=np.zeros(2), b=np.zeros(2))
    np.savez("empty.npz")
    with pytest.raises(InputError, match=message):
        sspruner.prune(forecaster(), "ghost", sparsity=0.5, calibration=source)


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Hidden: reads 'series'.*give its class dummy_inputs"):
        sspruner.prune(Hidden(), "magnitude", sparsity=0.5)
    with pytest.raises(InputError, match="token ids are whole numbers"):
        sspruner.prune(classifier(), "ghost", sparsity=0.5, calibration=torch.rand(4, 12))
    with pytest.raises(InputError, match="scorer 'taylor' needs the loss of a language model, and Forecaster"):
        sspruner.prune(forecaster(), "taylor", sparsity=0.5, calibration=windows())
    with pytest.raises(ModelError, match=r"Patches: the folder would lack its code.*register_for_auto_class"):
        sspruner.save(forecaster(kind=Patches), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a forecaster and its code, arrays beside it, and the modules that transformers copies."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(Forecaster, "_auto_class", "AutoModel")
    monkeypatch.chdir(tmp_path)
    values, labels = windows(count=24).numpy(), windows(1, 24, 4).numpy()
    np.savez("windows.npz", values=values, labels=labels)
    return sspruner.save(forecaster(), tmp_path / "own")


@pytest.mark.parametrize("axis", ["state", "weight", "channel"])
def test_saved_with_its_code_and_loaded(axis: str, own: Path) -> None:
    with pytest.raises(ModelError, match="needs code of its own"):
        sspruner.load(own)
    model, _ = sspruner.load(own, trust_remote_code=True)
    assert torch.equal(put_out(model, windows()), put_out(forecaster(), windows()))
    scorer = "magnitude" if axis == "weight" else "ghost"
    uneven = {"ignore": ["*layers.0*"]} if axis == "state" else {}  # no size that a config could say
    result = sspruner.prune(model, scorer, axis=axis, sparsity=0.5, calibration=windows(), **uneven)
    sspruner.save(model, "cut", result=result)
    again, _ = sspruner.load("cut", trust_remote_code=True)
    assert type(again).__name__ == "Forecaster"
    assert torch.equal(put_out(again, windows()), put_out(model, windows()))
    sspruner.save(again, "twice")  # the code goes with it
    twice, _ = sspruner.load("twice", trust_remote_code=True)
    assert torch.equal(put_out(twice, windows()), put_out(model, windows()))
    assert "trust_remote_code=True" in Path("cut/README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_on_the_command_line(own: Path, tmp_path: Path) -> None:
    trusted, few = ("--trust-remote-code",), ("--calibration", "windows.npz", "--samples", 8)
    refused(tmp_path, ("needs code of its own", "--trust-remote-code"), "prune", own, *few, "--out", "cut")
    said = done("prune", own, *trusted, *few, "--sparsity", 0.5, "--out", "cut")
    assert "trust_remote_code=True" in said.stdout
    assert "sspruner evaluate" not in said.stdout
    done("score", own, *trusted, *few, "--out", "s.safetensors")
    done("plan", own, *trusted, "--scores", "s.safetensors", "--sparsity", 0.5, "--out", "p.json")
    done("apply", own, *trusted, "--plan", "p.json", "--out", "applied")
    done("inspect", "cut", *trusted)
    for_engine = ("--target vllm: needs a language model, and Forecaster puts out no logits",)
    refused(tmp_path, for_engine, "inspect", "cut", *trusted, "--target", "vllm")
    cut, applied = (sspruner.load(folder, trust_remote_code=True)[0] for folder in ("cut", "applied"))
    assert sspruner.trace(cut).state_bytes == sspruner.trace(applied).state_bytes
    assert sspruner.trace(cut).state_bytes * 2 == sspruner.trace(forecaster()).state_bytes
    how = ("--held-out", 8, "--max-tokens", 32, "--batch", 8, "--mask-every", 1, "--sparsity", 0.7)
    said = done("train", "gradual", own, *trusted, "--examples", "windows.npz", *how, "--out", "run")
    assert "4 steps, 32 examples" in said.stdout
    sparse = sspruner.load("run/model", trust_remote_code=True)[0]
    linear = [m.weight for m in sparse.backbone.layers.modules() if isinstance(m, nn.Linear)]
    assert sum(int((w == 0).sum()) for w in linear) == round(0.7 * sum(w.numel() for w in linear))
    both = ("--text", "a.txt", "--examples", "windows.npz")
    refused(tmp_path, ("--text and --examples",), "train", "gradual", own, *both, "--out", "x")


def test_a_model_inside_makes_no_cache() -> None:
    """It would be an argument of the blocks, and carry the state of one run of them into the next."""
    model, tokens = classifier(), torch.arange(24).view(2, 12) % 11
    replay = Replay(model, sspruner.trace(model), [(tokens, torch.ones_like(tokens, dtype=torch.bool))], "cpu")
    for block in replay.blocks:
        assert replay.inputs[0][block][1].get("cache_params") is None
    assert model.config.use_cache
