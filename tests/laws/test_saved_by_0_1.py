"""Every kind of file that version 0.1.0 saved is read as it read it; tests/saved_by_0_1/make.py wrote them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sspruner
from sspruner.benchmarking.record import Bench
from sspruner.comparison.record import Comparison, row_from_json
from sspruner.evaluation.result import Evaluation
from sspruner.files import strict_json
from sspruner.plans.plan import Plan
from sspruner.pruning.report import Report
from sspruner.scoring.scores import Scores
from sspruner.testing.models import rounding, zoo
from sspruner.training.distil import distil
from sspruner.training.gradual import gradual
from sspruner.training.loop import Settings, Trained
from sspruner.training.text import Text

FILES = Path(__file__).parents[1] / "saved_by_0_1" / "files"
RESULTS = FILES / "results"
LOGITS = load_file(FILES / "logits.safetensors")
CHECKPOINTS = sorted(path.parent.name for path in FILES.glob("*/config.json"))
BY_TRANSFORMERS = ("export-hf-remote", "export-hf-padded")  # read without sspruner


@pytest.fixture(autouse=True)
def _code_of_models_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def digest(model: torch.nn.Module) -> str:
    """Of all weights: names, shapes, types and bits, as make.py takes it."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def says_the_same(model: Any, name: str) -> None:
    """Logits as they were, but for roundings of another machine."""
    with torch.no_grad():
        logits = model(input_ids=LOGITS["ids"], use_cache=False).logits.float()
    tolerance = max(1e-6, 4 * rounding(model, LOGITS["ids"]))
    assert (logits - LOGITS[name]).abs().max() <= tolerance * LOGITS[name].abs().max()


def test_the_files_are_all_there() -> None:
    assert set(CHECKPOINTS) | {"ids"} == set(LOGITS)
    assert len(CHECKPOINTS) == 17
    assert sum(path.stat().st_size for path in FILES.rglob("*") if path.is_file()) < 1.5e6


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_has_the_same_weights_and_says_the_same(name: str) -> None:
    if name in BY_TRANSFORMERS:
        model = AutoModelForCausalLM.from_pretrained(FILES / name, trust_remote_code=True).eval()
    else:
        model = sspruner.load(FILES / name)[0].eval()
    assert digest(model) == json.loads((FILES / "weights.json").read_text())[name]
    says_the_same(model, name)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in FILES.glob("*/plan.json")))
def test_a_plan_is_written_again_as_it_was(name: str, tmp_path: Path) -> None:
    plan = Plan.load(FILES / name / "plan.json")
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == (FILES / name / "plan.json").read_bytes()
    beside = FILES / name / "sspruner" / "plan.safetensors"
    assert (tmp_path / "plan.safetensors").exists() == beside.exists()
    if beside.exists():
        was, now = load_file(beside), load_file(tmp_path / "plan.safetensors")
        assert was.keys() == now.keys()
        assert all(torch.equal(was[key], now[key]) for key in was)


@pytest.mark.parametrize("name", ["selection", "balanced", "elements", "refit-biases", "refit-output", "several-axes"])
def test_a_plan_cuts_as_it_did(name: str) -> None:
    small: dict[str, Any] = {"layers": "MM", "groups": 1, "heads": 2, "channels": 4, "state": 8}
    others = {"refit-biases": lambda: zoo("mamba2", **small, bias=False), "several-axes": lambda: zoo("zamba2")}
    dense = others[name]() if name in others else sspruner.load(FILES / "dense")[0]
    says_the_same(sspruner.apply(dense, Plan.load(FILES / name / "plan.json")).eval(), name)


SCORES = sorted([*FILES.rglob("scores/*.safetensors"), *FILES.rglob("scores.safetensors")])


@pytest.mark.parametrize("path", SCORES, ids=lambda path: path.relative_to(FILES).as_posix())
def test_scores_are_read_and_written_again(path: Path, tmp_path: Path) -> None:
    """The order of a file's metadata is not defined."""
    Scores.load(path).save(tmp_path / "scores.safetensors")
    with safe_open(path, "pt") as was, safe_open(tmp_path / "scores.safetensors", "pt") as now:
        assert was.metadata() == now.metadata()
        assert set(was.keys()) == set(now.keys())
        assert all(torch.equal(was.get_tensor(name), now.get_tensor(name)) for name in was.keys())  # noqa: SIM118


def test_scores_make_the_plan_that_they_made() -> None:
    dense = sspruner.load(FILES / "dense")[0]
    scores = Scores.load(RESULTS / "scores.safetensors")
    assert sspruner.plan(sspruner.trace(dense), scores, sparsity=0.5) == Plan.load(RESULTS / "plan.json")


@pytest.mark.parametrize("path", sorted(FILES.glob("*/report.json")), ids=lambda path: path.parent.name)
def test_a_report_is_written_again_as_it_was(path: Path) -> None:
    report = Report.load(path)
    assert (report.model, report.seed, report.proof is None) == ("tiny", 3, report.mode == "mask")
    was, now = json.loads(path.read_text(encoding="utf-8")), json.loads(report.to_json())
    assert now | was == now  # a later version may say more
    assert Report.from_json(report.to_json()) == report


def test_results_are_written_again_as_they_were(tmp_path: Path) -> None:
    found = Comparison.load(RESULTS)
    found.save(tmp_path)
    for name in ("compare.json", "compare.csv"):  # compare.md is for people, and shows intervals since
        assert (tmp_path / name).read_bytes() == (RESULTS / name).read_bytes()
    for name in ("evaluation.json", "evaluation-alone.json"):
        assert Evaluation.load(RESULTS / name).to_json() == (RESULTS / name).read_text(encoding="utf-8")
    assert Bench.load(RESULTS / "bench.json").to_json() == (RESULTS / "bench.json").read_text(encoding="utf-8")
    sspruner.Sensitivity.load(RESULTS / "curves.json").save(tmp_path / "curves.json")
    assert (tmp_path / "curves.json").read_bytes() == (RESULTS / "curves.json").read_bytes()


def test_finished_rows_of_a_comparison_are_read() -> None:
    found = Comparison.load(RESULTS)
    for label, cells in found.cells.items():
        text = (RESULTS / ".rows" / f"{label}.json").read_text(encoding="utf-8")
        assert row_from_json(strict_json.loads(text)["cells"]) == cells


def test_speedups_want_the_repeats_that_these_files_lack() -> None:
    bench = Bench.load(RESULTS / "bench.json")
    with pytest.raises(sspruner.InputError, match="no seconds of single repeats"):
        bench.row("cut", 1).speedup(bench.row("dense", 1))


class Letters:
    """The tokenizer of make.py."""

    eos_token_id = None

    def __call__(self, text: Any, add_special_tokens: bool = False) -> dict[str, Any]:
        texts = [text] if isinstance(text, str) else text
        ids = [[1 + ord(c) % 29 for c in one] for one in texts]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs that were interrupted after their second step of four, beside their text."""
    for name in ("distil", "gradual"):
        shutil.copytree(FILES / name, tmp_path / name)
    shutil.copy(FILES / "text.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SETTINGS = Settings(max_tokens=16 * 4 * 4, batch=4, at_once=2, seq_len=16, every=2, seed=1)


def goes_on(run: Path, model: Any, found: Trained, trained: str) -> None:
    """From the second step, to the weights that the run had come to when it was not interrupted."""
    was = [json.loads(line) for line in (FILES / run.name / "metrics.jsonl").read_text().splitlines()]
    now = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert now[:3] == was[:3]  # before the first step, and the two that are not taken again
    assert [line["step"] for line in now] == [line["step"] for line in was]
    assert (found.steps, found.finished, found.perplexity[0]) == (4, True, was[0]["held_out_perplexity"])
    assert found.perplexity[1] == pytest.approx(was[-1]["held_out_perplexity"], rel=1e-6)
    for name, value in load_file(FILES / trained / "model.safetensors").items():
        assert torch.allclose(model.state_dict()[name], value, rtol=1e-5, atol=1e-6), name


def test_an_interrupted_distillation_goes_on(run: Path) -> None:
    student, dense = (sspruner.load(FILES / name)[0] for name in ("selection", "dense"))
    text = Text(("text.txt",), Letters(), seq_len=16, held_out=4, seed=1)
    student, found = distil(student, dense, text, run / "distil", settings=SETTINGS)
    goes_on(run / "distil", student, found, "distilled")


def test_an_interrupted_gradual_run_goes_on(run: Path) -> None:
    text = Text(("text.txt",), Letters(), seq_len=16, held_out=4, seed=1)
    how: dict[str, Any] = {"axis": "state", "sparsity": 0.5, "every": 1, "settings": SETTINGS}
    model, plan, found = gradual(sspruner.load(FILES / "dense")[0], text, run / "gradual", **how)
    goes_on(run / "gradual", model, found, "gradually")
    assert plan.groups == Plan.load(FILES / "gradual" / "plan.json").groups


LONG = [pytest.mark.slow, pytest.mark.exhaustive]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("results", marks=LONG), "selection"])
def test_a_folder_is_drawn(name: str, tmp_path: Path) -> None:
    shutil.copytree(FILES / name, tmp_path / name)
    text = sspruner.report(tmp_path / name).read_text(encoding="utf-8")
    titles = {"results": ["Damage of cuts", "Speed in transformers", "Quality", "Scores"]}.get(name, ["What was cut"])
    assert all(f"<h2>{title}</h2>" in re.sub(r"<h2[^>]*>", "<h2>", text) for title in titles)
    assert "0.1.0" in text
