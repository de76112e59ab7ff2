"""lm-eval's tasks on models in memory: a local task, without network, on cuts that stock code cannot build."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import sspruner
from sspruner.evaluation.harness import _metric, run_tasks
from sspruner.plans.reduction import Selection
from support.tiny import tokens

DOCS = [("The man went to the", [" house", " sea"], 0), ("She saw the", [" dog", " sea", " sky"], 2),
        ("It was a", [" day", " night"], 1), ("He said", [" yes", " no"], 0)]  # fmt: skip
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
metric_list:
"""
METRIC = "  - {{metric: {}, aggregation: {}, higher_is_better: true}}\n"


def test_metrics_are_taken_apart_by_what_they_report() -> None:
    mean = _metric("a", 0.5, [1.0, 0.0], "N/A")
    assert (mean.part.tolist(), mean.is_perplexity) == ([1, 0], False)
    ppl = _metric("b", math.exp(6 / 3), [(-4.0, 2), (-2.0, 1)], "N/A")
    assert (ppl.part.tolist(), ppl.count.tolist(), ppl.is_perplexity) == ([4, 2], [2, 1], True)
    bits = _metric("c", 2 / math.log(2), [(-4.0, 2), (-2.0, 1)], "N/A")
    assert float(bits.part.sum() / bits.count.sum()) == pytest.approx(bits.value)
    words = _metric("d", math.exp(1.5), [-1.0, -2.0], "N/A")
    assert (words.part.tolist(), words.is_perplexity) == ([1, 2], True)
    other = _metric("f1", 0.3, [(1, 0), (0, 0)], 0.1)
    assert (other.part, other.stderr) == (None, 0.1)
    assert _metric("x", 0.3, [[1, 2, 3]], None).part is None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval", reason="needs the extra sspruner[eval]")
    pytest.importorskip("accelerate", reason="needs the extra sspruner[eval]")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps({"q": q, "c": c, "a": a}) + "\n" for q, c, a in DOCS))
    choice = TASK.format(name="choices", file=data, kind="multiple_choice", text="{{q}}", target="{{a}}",
                         more='doc_to_choice: "{{c}}"\ntarget_delimiter: ""')  # fmt: skip
    rolling = TASK.format(name="rolling", file=data, kind="loglikelihood_rolling", text="", target="{{q}}", more="")
    (tmp_path / "choices.yaml").write_text(choice + METRIC.format("acc", "mean"))
    (tmp_path / "rolling.yaml").write_text(rolling + METRIC.format("word_perplexity", "weighted_perplexity"))
    return tmp_path


def cuts(dense: Any) -> dict[str, Any]:
    """The dense model, one whose layers differ in size, and one with a projected state."""
    different = copy.deepcopy(dense)
    name = next(iter(sspruner.trace(dense).on_axis("state")))
    sspruner.apply(different, sspruner.Plan({name: Selection(6, ((1, 3),))}))
    balanced = copy.deepcopy(dense)
    sspruner.prune(balanced, "balanced", keep=2, calibration=tokens(4, 16))
    return {"dense": dense, "heterogeneous": different, "balanced": balanced}


@pytest.mark.filterwarnings("ignore")
def test_a_local_task_is_what_plain_code_says(folder: Path, pair: tuple) -> None:
    _, dense, tokenizer = pair
    for label, model in cuts(dense).items():
        found = {m.name: m for m in run_tasks(model, tokenizer, ["choices", "rolling"], include_path=folder)}
        right = []
        for question, choices, answer in DOCS:
            own = []
            for choice in choices:
                read, said = (tokenizer(text)["input_ids"] for text in (question, choice))
                with torch.no_grad():
                    logp = model(input_ids=torch.tensor([read + said])).logits[0].log_softmax(-1)
                own.append(sum(float(logp[len(read) - 1 + i, token]) for i, token in enumerate(said)))
            right.append(float(max(range(len(own)), key=own.__getitem__) == answer))
        assert found["choices/acc"].part.tolist() == right, label
        assert found["choices/acc"].value == pytest.approx(sum(right) / len(right))
        assert found["rolling/word_perplexity"].is_perplexity
        some = run_tasks(model, tokenizer, ["choices"], include_path=folder, limit=2)
        assert [m.items for m in some] == [2]


@pytest.mark.filterwarnings("ignore")
def test_tasks_are_rows_beside_the_dense_model(folder: Path, pair: tuple) -> None:
    _, dense, tokenizer = pair
    models = cuts(dense)
    found = sspruner.evaluate(
        models["balanced"], tokenizer, against=dense, metrics=(), tasks=["choices", "rolling"], include_path=folder
    )
    acc, ppl = found["choices/acc"], found["rolling/word_perplexity"]
    assert acc.change.value == pytest.approx(acc.value.value - acc.against.value)
    assert (ppl.kind, ppl.items) == ("ratio", 4)
    assert ppl.change.value == pytest.approx(ppl.value.value / ppl.against.value)
    (folder / "docs.jsonl").rename(folder / "elsewhere.jsonl")
    with pytest.raises(sspruner.InputError, match="tasks rolling: lm-eval cannot run them"):
        run_tasks(dense, tokenizer, ["rolling"], include_path=folder)
