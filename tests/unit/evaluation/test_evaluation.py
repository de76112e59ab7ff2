"""`evaluate`: what it measures is what its parts say, both models see the same, and gates let through what they may."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import sspruner
from sspruner.evaluation import paired
from sspruner.evaluation.last_word import last_word_accuracy
from sspruner.evaluation.paired import Interval
from sspruner.evaluation.result import Row
from sspruner.reporting.evaluation import evaluation_table
from support.command import run, saved_model
from support.tiny import tiny_model, tokens

PASSAGES = ["The dog saw the cat and the cat saw the dog", "One and one is two", "He went to the sea to see the sea"]


@pytest.fixture(scope="module")
def passages_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lambada") / "some.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES), encoding="utf-8")
    return path


@pytest.mark.slow
def test_rows_are_what_their_parts_say(pair: tuple, passages_file: Path) -> None:
    cut, dense, tokenizer = pair
    text = tokens(3, 200)
    before = {n: p.clone() for n, p in cut.named_parameters()}
    found = sspruner.evaluate(
        cut, tokenizer, against=dense, text=text, tokens=350, max_length=160, stride=40, lambada=passages_file
    )
    assert all(torch.equal(p, before[n]) for n, p in cut.named_parameters())
    names = [row.metric for row in found.rows]
    assert names == ["perplexity", "kl_to_dense", "top1_agreement", "lambada_accuracy", "lambada_nll",
                     "lambada_perplexity", "recall_accuracy", "recall_nll", "passkey_accuracy",
                     "passkey_nll"]  # fmt: skip
    for model, which in ((cut, "value"), (dense, "against")):
        own = last_word_accuracy(model, tokenizer, PASSAGES)
        assert getattr(found["lambada_accuracy"], which).value == own.accuracy
        assert getattr(found["lambada_nll"], which).value == pytest.approx(own.nll)
        assert getattr(found["lambada_perplexity"], which).value == pytest.approx(math.exp(own.nll))
        nll, count = 0.0, 0
        with torch.no_grad():
            for row in (text[0], text[1, :150]):  # the first 350 tokens
                for t in range(1, len(row)):
                    start = 0 if t <= 160 else 40  # one window of 160, the next one 40 later
                    nll -= float(model(input_ids=row[None, start:t]).logits[0, -1].log_softmax(-1)[row[t]])
                    count += 1
        assert getattr(found["perplexity"], which).value == pytest.approx(math.exp(nll / count), rel=1e-3)
    for row in [*found.rows, *found.by_position.values(), *found.by_length.values()]:
        if row.change is not None:
            made = row.value.value / row.against.value if row.kind == "ratio" else row.value.value - row.against.value
            assert row.change.value == pytest.approx(made, rel=1e-9, abs=1e-9)
            assert row.change.low <= row.change.value <= row.change.high
    assert list(found.by_position) == ["0-127", "128-159"]
    assert list(found.by_length) == ["128", "160"]
    positions = [math.log(row.value.value) for row in found.by_position.values()]
    whole = math.log(found.by_length["160"].value.value)
    counts = 2 * 128 + (39 + 0), 32 + 22 - 1 + 0  # tokens in windows of 160 after 0-127 and 128-159 others
    assert sum(counts) == 348
    assert sum(p * n for p, n in zip(positions, counts, strict=True)) / 348 == pytest.approx(whole, rel=1e-9)


def test_a_model_against_itself(pair: tuple, passages_file: Path) -> None:
    _, dense, tokenizer = pair
    found = sspruner.evaluate(
        dense, tokenizer, against=dense, text=tokens(4, 60), max_length=32, lambada=passages_file,
        metrics=("perplexity", "position", "length", "recall"),
    )  # fmt: skip
    for row in [*found.rows, *found.by_position.values(), *found.by_length.values()]:
        if row.change is not None:
            assert row.change == ((1, 1, 1) if row.kind == "ratio" else (0, 0, 0)), row.metric
    assert found["kl_to_dense"].value == (0, 0, 0)
    assert found["top1_agreement"].value == (1, 1, 1)
    assert found.failed(max_ppl_increase=0.0, max_lambada_drop=0) == []


def test_text_of_the_model_itself_and_a_model_alone() -> None:
    model = tiny_model()
    found = sspruner.evaluate(model, tokens=64, max_length=16)
    assert found["perplexity"].items == 4
    assert found["perplexity"].against is None
    assert found.protocol["text_from"] == "model"
    assert any("passkey: needs a tokenizer" in note for note in found.notes)
    again = sspruner.evaluate(model, tokens=64, max_length=16)
    assert again.to_json() == found.to_json()
    other = sspruner.evaluate(tiny_model(seed=1), against=model, tokens=64, max_length=16, metrics=["perplexity"])
    assert other["perplexity"].against == found["perplexity"].value  # the text is the dense model's own
    assert other["kl_to_dense"].value.low > 0


def test_json_is_json_and_has_the_agreed_keys(pair: tuple) -> None:
    found = sspruner.evaluate(pair[0], against=pair[1], text=tokens(4, 60), max_length=32)
    endless = replace(found.rows[0], value=Interval(math.inf, math.nan, 2.0))
    data = json.loads(replace(found, rows=(endless, *found.rows[1:])).to_json(), parse_constant=pytest.fail)
    assert data["rows"][0]["value"] == [None, None, 2.0]
    assert {"version", "model", "against", "protocol", "rows", "perplexity_by_position"} <= set(data)
    assert data["version"] == 1
    assert set(data["rows"][0]) == {"metric", "value", "against", "ratio", "difference", "items"}
    ratio = data["perplexity_by_length"]["32"]["ratio"]
    assert ratio == list(found.by_length["32"].change)


def gate(metric: str, change: float) -> sspruner.Evaluation:
    kind = "ratio" if metric == "perplexity" else "difference"
    one = Interval(1.0, 1.0, 1.0)
    row = Row(metric, one, one, Interval(change, change, change), kind, 9)
    return sspruner.Evaluation("", "", {}, (row,), {}, {}, ())


def test_gates_at_their_edges() -> None:
    for limit in (0.02, 0.07, 0.29, 1.0):
        assert gate("perplexity", 1 + limit).failed(max_ppl_increase=limit) == []
        assert gate("perplexity", 1 - limit).failed(max_ppl_increase=limit) == []
        (why,) = gate("perplexity", 1 + limit + 1e-6).failed(max_ppl_increase=limit)
        assert f"at most {100 * limit:g} % are allowed" in why
    for points in (0, 1, 7, 29):
        assert gate("lambada_accuracy", -points / 100).failed(max_lambada_drop=points) == []
        assert gate("lambada_accuracy", 0.5).failed(max_lambada_drop=points) == []
        (why,) = gate("lambada_accuracy", -points / 100 - 1e-6).failed(max_lambada_drop=points)
        assert why.startswith("lambada_accuracy drops by")
    assert gate("perplexity", math.nan).failed(max_ppl_increase=9)
    assert gate("lambada_accuracy", math.nan).failed(max_lambada_drop=9)
    with pytest.raises(sspruner.InputError, match="a limit on perplexity needs this row"):
        gate("lambada_accuracy", 0).failed(max_ppl_increase=0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metrics": ["ppl"]}, "metric 'ppl': must be one of perplexity"),
        ({"metrics": []}, "nothing to measure: name metrics"),
        ({"stride": 33}, "stride 33: must be at least 1 and at most the window, 32"),
        ({"max_length": 0, "stride": 1}, "max-length 0"),
        ({"limit": 0}, "limit 0: must be at least 1"),
        ({"lambada": "no.jsonl"}, "lambada: needs a tokenizer"),
        ({"tasks": ["x"]}, "tasks: needs a tokenizer"),
        ({"metrics": ["passkey"]}, "passkey: needs a tokenizer"),
        ({"text": torch.tensor([[1, 31]])}, "token id 31 outside the vocabulary"),
        ({"text": torch.zeros(3, 1, dtype=torch.long)}, r"tokens of shape \(3, 1\)"),
        ({"text": "text.txt"}, "needs a tokenizer"),
        ({"against": "wide"}, "its vocabulary has 32 tokens, the model's 31: not comparable"),
    ],
)
def test_bad_arguments_are_one_line(given: dict[str, Any], message: str) -> None:
    if given.get("against"):
        wide = tiny_model()
        wide.resize_token_embeddings(32, mean_resizing=False)
        given = {"against": wide}
    with pytest.raises(sspruner.InputError, match=message):
        sspruner.evaluate(tiny_model(), **{"text": tokens(2, 40), "max_length": 32, **given})


@pytest.mark.slow
def test_the_command_line(tmp_path: Path, passages_file: Path) -> None:
    cut, dense = saved_model(tmp_path / "cut", layers=1), saved_model(tmp_path / "dense", layers=1, seed=1)
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April. " * 20, encoding="utf-8")
    args: list[object] = ["evaluate", cut, "--text", text, "--max-length", 64, "--metrics", "perplexity,length"]
    alone = run(*args, "--json", "-")
    assert alone.exit_code == 0, alone.stderr
    data = json.loads(alone.stdout)
    assert [row["metric"] for row in data["rows"]] == ["perplexity"]
    assert data["protocol"]["window"] == 64
    assert data["command"].startswith("sspruner ")
    against: list[object] = [*args, "--against", dense, "--lambada", passages_file]
    shown = run(*against, "--limit", 2, "--json", tmp_path / "e.json")
    assert shown.exit_code == 0, shown.stderr
    assert "kl_to_dense" in shown.stdout
    assert "perplexity by length" in shown.stdout
    written = json.loads((tmp_path / "e.json").read_text())
    assert written["against"] == str(dense)
    rows = {row["metric"]: row for row in written["rows"]}
    assert rows["lambada_nll"]["items"] == 2
    rise = rows["perplexity"]["ratio"][0] - 1
    for limit, code in ((abs(rise) + 0.01, 0), (1e-9, 1 if rise > 1e-9 else 0)):
        limits = ("--max-ppl-increase", f"{100 * limit:.9f}%", "--max-lambada-drop", 100)
        done = run(*against, "--metrics", "perplexity", *limits)
        assert done.exit_code == code, done.stderr
        assert ("perplexity rises by" in done.stderr) == bool(code)
    swapped = [dense if a is cut else cut if a is dense else a for a in against]
    both = [run(*which, "--max-ppl-increase", "0.000001%") for which in (against, swapped)]
    assert sorted(done.exit_code for done in both) == [0, 1]  # one of two different models is the worse one
    for more, why in (
        (["--max-ppl-increase", "2%"], "give --against DENSE"),
        (["--max-lambada-drop", "1", "--against", dense], "and --lambada"),
        (["--against", dense, "--metrics", "recall", "--max-ppl-increase", "2%"], "perplexity among --metrics"),
        (["--against", dense, "--max-ppl-increase", "2 %%"], "--max-ppl-increase"),
        (["--lambada", text], "plain text has no passages; give .jsonl"),
        (["--lambada", tmp_path / "none.jsonl"], "lambada file"),
        (["--text", tmp_path / "none.txt"], "text file"),
    ):
        wrong = run(*args, *more)
        assert wrong.exit_code == 2, (more, wrong.stdout)
        assert why in wrong.stderr
        assert wrong.stderr.count("\n") == 1


def test_tasks_without_lm_eval_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = run("evaluate", saved_model(tmp_path / "m", layers=1), "--metrics", "none", "--tasks", "x", "--limit", 1)
    assert done.exit_code == 2
    assert "in a clone of sspruner, pip install '.[eval]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_intervals_of_the_table_are_those_of_the_parts(pair: tuple) -> None:
    """The bootstrap is over windows: the same sums give the same interval."""
    from sspruner.evaluation.windows import measure, windows

    text = tokens(6, 33)
    found = sspruner.evaluate(pair[0], against=pair[1], text=text, max_length=32, metrics=["perplexity"], seed=3)
    own, theirs = measure(pair[0], windows(list(text), 32), 3, pair[1])
    assert theirs is not None
    assert found["perplexity"].change == pytest.approx(paired.perplexity_ratio(own.nll, theirs.nll, own.tokens, 3))
    assert found["kl_to_dense"].value == pytest.approx(paired.rate(own.kl, own.tokens, 3))


def test_recall_at_chance_is_said_beside_it() -> None:
    """A model that was not trained on the task names hardly one of the values that it read: chance, not damage."""
    found = sspruner.evaluate(tiny_model(), text=tokens(2, 40), metrics=("recall",))
    console = Console(file=io.StringIO(), width=160)
    console.print(evaluation_table(found))
    accuracy, nll = console.file.getvalue().split("recall_accuracy")[1].split("recall_nll")
    assert "at chance" in accuracy
    assert "chance" not in nll
    better = replace(found, rows=(replace(found["recall_accuracy"], value=Interval(0.9, 0.8, 1.0)),))
    console.print(evaluation_table(better))
    assert console.file.getvalue().count("at chance") == 1
