"""The model card: whatever names, commands and numbers it has, it is Markdown that says them, and its code loads."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import sspruner
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.pruning.report import Report
from sspruner.pruning.result import Result
from sspruner.reporting.card import FOLDER, READERS, model_card
from support.command import run as cli
from support.examples import examples
from support.projected import every_state
from support.tiny import half, logits, tiny_model, tokens
from support.zoo import zoo

MARKDOWN = MarkdownIt("commonmark").enable("table")
HEADS = ["What was removed", "What it cost", "How to load it", "How to make it again"]


class Card:
    """A card as a reader of Markdown sees it."""

    def __init__(self, text: str) -> None:
        front, body = text.removeprefix("---\n").split("\n---\n", 1)
        self.front = yaml.safe_load(front)
        self.parsed = MARKDOWN.parse(body)
        self.title = self._inline("h1")[0]
        self.heads = [heading[0].content for heading in self._inline("h2")]
        self.code = [(token.info, token.content) for token in self.parsed if token.type == "fence"]
        self.tables = self._tables()
        self.text = "\n".join(self._said(token.children) for token in self.parsed if token.type == "inline")

    def _inline(self, tag: str) -> list[list[Any]]:
        opened = [i for i, token in enumerate(self.parsed) if token.type == "heading_open" and token.tag == tag]
        return [self.parsed[i + 1].children for i in opened]

    @staticmethod
    def _said(children: list[Any]) -> str:
        return "".join(child.content for child in children)

    def _tables(self) -> list[list[list[str]]]:
        tables: list[list[list[str]]] = []
        for i, token in enumerate(self.parsed):
            if token.type == "table_open":
                tables.append([])
            elif token.type == "tr_open":
                tables[-1].append([])
            elif token.type in ("td_open", "th_open"):
                tables[-1][-1].append(self._said(self.parsed[i + 1].children))
        return tables

    def row(self, label: str) -> list[str]:
        (found,) = [row[1:] for table in self.tables for row in table if row[0] == label]
        return found


def pruned(model: Any = None, **arguments: Any) -> Result:
    model = tiny_model(layers=2) if model is None else model
    if "axis" not in arguments:
        arguments = {"keep": 3} | arguments
    return sspruner.prune(model, "magnitude", calibration=tokens(8, 12), **arguments)


@pytest.fixture(scope="module")
def result() -> Result:
    return pruned()


def one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20) | st.text("`|\\ #*_[]<>~$\n-a", min_size=1)


@pytest.mark.slow
@examples(40)
@example(name="a `b` | c", command="sspruner prune 'a\n```\n# b'", source="``|", options={"`": "|"})
@given(name=names, command=names, source=names, options=st.dictionaries(names, names, max_size=2))
def test_any_name_and_command_are_said_as_they_are(
    name: str, command: str, source: str, options: dict[str, str], result: Result
) -> None:
    """Nothing that a user names can end a code span, a cell or a block, or add one."""
    report = replace(
        result.named(name, command).report,
        scorer=name,
        options=options,
        calibration=result.report.calibration | {"source": source},
    )
    card = Card(model_card(result.model, "stock", report))
    assert card.title[0].type == "code_inline"
    assert card.title[0].content == (one_line(name) or "-")
    assert len([child for child in card.title if child.content]) == 2
    assert card.heads == HEADS
    (language, shown) = card.code[-1]
    assert language == "bash"
    assert shown == command.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "\ufffd") + "\n"
    how, cost = card.tables
    assert {len(row) for row in how} == {2}
    assert {len(row) for row in cost} == {4}
    expected = (one_line(name) or "-") + (f" with {one_line(json.dumps(options))}" if options else "")
    assert card.row("scorer") == [expected]
    assert card.row("calibration")[0].startswith(one_line(source) or "-")


def test_numbers_are_those_of_the_report_and_of_the_model(tmp_path: Path) -> None:
    model = tiny_model(layers=3, state=6)
    before = sum(p.numel() for p in model.parameters())
    result = pruned(model, refit="output")
    card = Card((sspruner.save(model, tmp_path / "out", result=result) / "README.md").read_text())
    report = result.report
    after = sum(p.numel() for p in model.parameters())
    assert [int(n.replace(",", "")) for n in card.row("parameters")[:2]] == [before, after]
    for label, said in (
        ("perplexity", [report.dense["perplexity"], report.pruned["perplexity"]]),
        ("KL to the model before, nats per token", [report.pruned["kl_to_dense"]]),
        ("without the refit: perplexity", [report.refit["without"]["perplexity"]]),
        ("without the refit: KL", [report.refit["without"]["kl_to_dense"]]),
    ):
        assert [float(n) for n in card.row(label)[:2] if n] == pytest.approx(said, rel=5e-4), label
    assert card.row("recurrent state per sequence, fp32")[:2] == ["576 B", "288 B"]  # 3 layers, 8 channels, state, 4 B
    assert card.row("refit") == ["output"]
    assert "state: 6 → 3 units in each of 3 layers" in card.text
    held_out = report.calibration["held_out_tokens"]
    assert f"evaluated on {held_out} tokens of tokens, held out from calibration" in card.text
    assert f"predicted {report.proof.parameters_removed:,} parameters and 288 B of state" in card.text
    assert "In this folder" not in card.heads
    assert card.front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sspruner", "pruned", "mamba2"],
    }


def test_layers_that_differ_are_listed(tmp_path: Path) -> None:
    model = zoo("zamba2", hidden=16)
    result = pruned(model, axis={"state": 0.5, "mlp": 0.5}, ratios={"layers.0.*": 0.25})
    card = Card((sspruner.save(model, tmp_path / "out", result=result) / "README.md").read_text())
    state = {n.rpartition(":")[0]: s for n, s in result.report.layers.items() if n.endswith(":state")}
    assert len({tuple(size.values()) for size in state.values()}) > 1
    head, *rows = card.tables[0]
    assert head == ["layer", "axis", "units before", "after"]
    assert rows == [[path, "state", str(size["before"]), str(size["after"])] for path, size in state.items()]
    assert card.text.count("mlp: ") == 1  # one block, that several layers share
    assert card.front["library_name"] == "sspruner"


def test_a_single_sequence_is_not_called_held_out(result: Result) -> None:
    data = result.report.calibration | {"held_out_is_separate": False}
    card = Card(model_card(result.model, "stock", replace(result.report, calibration=data)))
    assert "NOT held out from calibration" in card.text
    assert ", held out from calibration" not in card.text


def test_text_of_the_model_itself_is_called_so(result: Result) -> None:
    told = "The model itself wrote that text"
    data = result.report.calibration | {"source": "self"}
    assert told in Card(model_card(result.model, "stock", replace(result.report, calibration=data))).text
    assert told not in Card(model_card(result.model, "stock", result.report)).text


def test_zeros_and_masks_are_called_so(tmp_path: Path) -> None:
    result = pruned(axis={"weight": 0.5})
    card = Card((sspruner.save(result.model, tmp_path / "zeros", result=result) / "README.md").read_text())
    assert f"{result.report.sparsity['zeros']:,} of {result.report.sparsity['elements']:,} elements" in card.text
    result = pruned(mode="mask")
    card = Card((sspruner.save(result.model, tmp_path / "mask", result=result) / "README.md").read_text())
    assert "The cut is a mask: zeros" in card.text
    assert "Proof" not in card.text
    assert card.row("parameters")[0] == card.row("parameters")[1]


def test_without_a_name_and_a_command(result: Result) -> None:
    """As from Python, where nobody says how the model is called."""
    card = Card(model_card(result.model, "stock", result.report))
    assert card.title[0].content == "Mamba2ForCausalLM"
    assert "no command was recorded" in card.text
    assert [language for language, _ in card.code] == ["python"]


def test_the_model_on_the_hub_is_the_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the hub with one model; a folder of the same name in the working directory is no hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    repository, revision = tmp_path / "hub" / "models--someone--tiny", "0123456789" * 4
    sspruner.save(tiny_model(layers=1), repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    model, _ = sspruner.load("someone/tiny")
    report = pruned(model).report
    assert report.base_model == "someone/tiny"
    assert Card(model_card(model, "stock", report)).front["base_model"] == "someone/tiny"
    assert Card(model_card(sspruner.load("someone/tiny")[0], "stock", None)).front["base_model"] == "someone/tiny"
    shutil.copytree(repository / "snapshots" / revision, "someone/tiny")
    model, _ = sspruner.load("someone/tiny")
    report = pruned(model).report
    assert report.base_model == ""
    assert "base_model" not in Card(model_card(model, "stock", report)).front


@pytest.mark.cover(most=2)
@pytest.mark.parametrize("to", ["sspruner", "hf", "hf-remote", "hf-padded", "mamba-ssm", "save"])
def test_its_code_loads_the_model(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: tuple) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, tokenizer = tiny_model(layers=2), reference[1]
    result = pruned(model)
    if to == "save":
        folder = sspruner.save(model, tmp_path / "out", tokenizer, result=result)
    else:
        folder = sspruner.export(model, tmp_path / "out", tokenizer, to=to, report=result.report)
    if to == "mamba-ssm":
        theirs = ModuleType("mamba_ssm.models.mixer_seq_simple")
        theirs.MambaLMHeadModel = Native  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, theirs.__name__, theirs)
    card = Card((folder / "README.md").read_text())
    assert card.front["library_name"] == READERS["stock" if to in ("sspruner", "save") else to][0]
    assert all(card.row(label) for label in ("perplexity", "KL to the model before, nats per token"))
    space: dict[str, Any] = {}
    for language, code in card.code:
        assert language == "python"
        assert FOLDER in code
        exec(code.replace(FOLDER, str(folder)), space)
    assert space["tokenizer"]("Once upon")["input_ids"] == tokenizer("Once upon")["input_ids"]
    assert torch.equal(logits(space["model"].eval(), tokens()), logits(model, tokens()))


class Native:
    """Stands for the class of mamba_ssm, and reads as `sspruner.load` does."""

    @staticmethod
    def from_pretrained(folder: str, device: str) -> Any:
        assert device == "cuda"
        return sspruner.load(folder)[0]


def test_an_export_says_what_the_prune_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line finds the report beside the model; padding makes the folder larger than that says."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model(layers=2)
    result = pruned(model, axis={"state": 0.5}, ratios={"layers.0.*": 0.8}).named("tiny", "sspruner prune tiny")
    sspruner.save(model, "cut", result=result)
    for to in ("sspruner", "hf-remote", "hf-padded"):
        done = cli("export", "cut", "--to", to, "--out", to)
        assert done.exit_code == 0, done.output
        card = Card(Path(to, "README.md").read_text())
        assert card.title[0].content == "tiny"
        assert card.code[-1] == ("bash", "sspruner prune tiny\n")
        assert float(card.row("perplexity")[1]) == pytest.approx(result.report.pruned["perplexity"], rel=5e-4)
        if to == "hf-padded":
            padded, _ = sspruner.load(to)
            size = sspruner.trace(padded)
            assert "In this folder" in card.heads
            assert f"{size.parameters:,} parameters" in card.text
            assert f"and {size.state_bytes} B of recurrent state" in card.text
            assert size.parameters > result.report.pruned["parameters"]
        else:
            assert "In this folder" not in card.heads


@pytest.mark.cover
@pytest.mark.parametrize("spoil", ["absent", "other", "text", "old", "[]", "nothing", "foreign"])
def test_a_report_that_is_not_of_this_model_is_left_out(spoil: str, tmp_path: Path) -> None:
    model = tiny_model(layers=2)
    folder = sspruner.save(model, tmp_path / "cut", result=pruned(model))
    path = folder / "report.json"
    report = json.loads(path.read_text())
    if spoil == "absent":
        path.unlink()
    elif spoil == "text":
        path.write_bytes(b"\xff not JSON")
    elif spoil == "other":
        path.write_text(json.dumps(report | {"pruned": report["pruned"] | {"parameters": 7}}))
    else:
        changed = {"old": report | {"version": 0}, "[]": [], "nothing": report | {"pruned": {}}, "foreign": {"a": 1}}
        path.write_text(json.dumps(changed[spoil]))
    done = cli("export", str(folder), "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    card = Card((tmp_path / "out" / "README.md").read_text())
    assert card.heads == ["What was removed", "In this folder", "How to load it"]
    assert "What it cost is not recorded here" in card.text
    assert "state: 6 → 3 units in each of 2 layers" in card.text


def test_reports_are_read_back(tmp_path: Path, reference: tuple) -> None:
    """Also one with a proof, without one, with errors of a refit, and with bytes in a name that are no text."""
    for i, result in enumerate((pruned(refit="output"), pruned(mode="mask"), pruned(axis={"weight": 0.5}))):
        named = result.named("caf\udce9", "sspruner prune 'caf\udce9'").report
        named.save(tmp_path / f"{i}.json")
        assert json.loads(Report.load(tmp_path / f"{i}.json").to_json()) == json.loads(named.to_json())
        assert type(Report.load(tmp_path / f"{i}.json").proof) is type(named.proof)
    with pytest.raises(sspruner.InputError, match=r"none\.json: not a report that sspruner wrote"):
        Report.load(tmp_path / "none.json")


def test_without_a_report_it_says_what_the_config_records(tmp_path: Path) -> None:
    model = tiny_model(layers=2)

    def card() -> Card:
        return Card((sspruner.save(model, tmp_path / "out", overwrite=True) / "README.md").read_text())

    dense = card()
    assert dense.front["tags"] == ["sspruner", "mamba2"]
    assert "sspruner cut no units from it" in dense.text
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in dense.text
    first = "backbone.layers.0.mixer:state"
    sspruner.apply(model, Plan({first: Selection(6, ((0, 2, 3, 5),))}))
    once = card()
    assert once.front["tags"] == ["sspruner", "pruned", "mamba2"]
    assert once.front["library_name"] == "sspruner"
    assert "state: 6 → 4 units in backbone.layers.0.mixer" in once.text
    sspruner.apply(model, every_state(sspruner.trace(model)))
    twice = card()
    assert twice.heads[:2] == ["What was removed, cut 1", "What was removed, cut 2"]
    assert "state: 6 → 4 units in backbone.layers.0.mixer" in twice.text
    masked = tiny_model(layers=1)
    sspruner.apply(masked, half(sspruner.trace(masked)), mode="mask")
    assert "The model is masked" in Card(model_card(masked, "stock", None)).text


def test_stock_classes_are_named_only_where_they_compute_the_same(tmp_path: Path) -> None:
    """They load a cut of heads, with another epsilon: the card does not send anyone there."""
    model = zoo("nemotron_h", hidden=16)
    sspruner.apply(model, half(sspruner.trace(model), "head"))
    folder = sspruner.save(model, tmp_path / "out")
    assert (folder / "model.safetensors").is_file()  # nothing keeps stock classes from it
    assert Card((folder / "README.md").read_text()).front["library_name"] == "sspruner"


def test_prune_writes_the_card_and_replaces_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = sspruner.save(tiny_model(layers=1), tmp_path / "a `model` | x"), tmp_path / "out"
    sspruner.save(tiny_model(layers=1), out)
    (out / "README.md").write_text("of a user")
    arguments = ["prune", str(model), "--scorer", "magnitude", "--keep", "3", "--out", str(out), "--overwrite"]
    arguments += ["--samples", "2", "--seq-len", "8"]
    monkeypatch.setattr(sys, "argv", ["sspruner", *arguments])
    done = cli(*arguments)
    assert done.exit_code == 0, done.output
    card = Card((out / "README.md").read_text())
    report = json.loads((out / "report.json").read_text())
    assert card.title[0].content == str(model)
    assert card.code[-1] == ("bash", report["command"] + "\n")
    versions = re.search(r"^Versions: (.*)\. Seed 0\.$", card.text, re.M)
    assert versions
    assert versions[1].split(", ") == [f"{name} {version}" for name, version in report["versions"].items()]
