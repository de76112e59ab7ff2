"""The command line when all is well, when it is interrupted, and when a proof fails."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Mamba2ForCausalLM

import sspruner
from sspruner.benchmarking.footprint import footprint
from sspruner.formats.fitting import offers
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.scoring.scores import Scores
from sspruner.surgery import mask
from sspruner.surgery import slice as slicing
from support.command import STATE, TEXT, done, refused, run, saved_model, saved_zoo, tree
from support.tiny import logits

FOREIGN = "naïve “quotes” — 日本語 🙂 [bold]not markup[/bold]"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 100, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Zamba2 with two shared blocks: every axis but channel and dt_rank."""
    return saved_zoo(tmp_path_factory.mktemp("saved") / "zamba2", "zamba2")


@pytest.fixture
def cheap(text: Path) -> list[object]:
    """Options that make a run short."""
    return ["--samples", 2, "--seq-len", 32, "--calibration", text]


def test_prune_writes_a_model_that_loads(model: Path, cheap: list[object], tmp_path: Path) -> None:
    out = tmp_path / "modèle 日本"
    result = done("prune", model, *cheap, "--keep", 5, "--out", out, "--json", tmp_path / "r.json")
    written = {"config.json", "model.safetensors", "plan.json", "report.json", "sspruner/scores.safetensors"}
    assert written <= set(tree(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([out.name, "r.json"])
    assert f"saved to {out}" in result.stdout
    assert "perplexity" in result.stdout
    assert (out / "report.json").read_bytes() == (tmp_path / "r.json").read_bytes()

    dense, tokenizer = sspruner.load(model)
    pruned, _ = sspruner.load(out)
    assert {g.units for g in sspruner.trace(pruned).on_axis("state").values()} == {5}
    ids = torch.tensor(tokenizer([TEXT])["input_ids"])
    with sspruner.masked(dense, Plan.load(out / "plan.json"), sspruner.trace(dense)):
        expected = logits(dense, ids)
    torch.testing.assert_close(logits(pruned, ids), expected, rtol=1e-4, atol=1e-4)


def test_report_has_every_number(model: Path, cheap: list[object], tmp_path: Path) -> None:
    done("prune", model, *cheap, "--sparsity", 0.25, "--seed", 7, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert not (tmp_path / "out").exists()
    for which in ("dense", "pruned"):
        assert {"perplexity", "parameters", "weight_bytes", "state_bytes"} <= set(report[which])
        assert all(report[which][k] > 0 for k in ("perplexity", "parameters", "weight_bytes", "state_bytes"))
    assert report["pruned"]["kl_to_dense"] >= 0
    assert report["pruned"]["state_bytes"] * 4 == report["dense"]["state_bytes"] * 3
    assert report["dense"]["weight_bytes"] == 4 * report["dense"]["parameters"]  # fp32
    assert {"calibration", "scoring", "evaluation", "proof"} <= set(report["seconds"])
    assert all(s >= 0 for s in report["seconds"].values())
    assert report["peak_memory_bytes"] > 2**20
    assert (report["seed"], report["model"]) == (7, str(model))
    assert {"python", "sspruner", "torch", "transformers"} <= set(report["versions"])
    assert report["command"].startswith("sspruner ")
    assert report["proof"]["error"] <= report["proof"]["tolerance"]
    assert report["calibration"]["tokens"] == 64


def test_json_on_standard_output_is_only_json(model: Path, cheap: list[object]) -> None:
    report = json.loads(done("prune", model, *cheap, "--json", "-").stdout)
    assert report["layers"]["backbone.layers.0.mixer:state"] == {"before": STATE, "after": STATE // 2}


def test_progress_goes_to_standard_error(model: Path, cheap: list[object]) -> None:
    result = run("prune", model, *cheap, "--json", "-", FORCE_COLOR="1")  # standard error as a terminal
    assert result.exit_code == 0
    assert "scoring" in result.stderr
    assert "100%" in result.stderr
    json.loads(result.stdout)


@pytest.mark.slow
def test_three_steps_equal_one_shot(model: Path, cheap: list[object], tmp_path: Path) -> None:
    scores, plan = tmp_path / "s.safetensors", tmp_path / "p.json"
    done("score", model, *cheap, "--seed", 3, "--out", scores)
    assert "16 -> 4" in done("plan", model, "--scores", scores, "--sparsity", 0.75, "--out", plan).stdout
    done("apply", model, "--plan", plan, "--out", tmp_path / "steps")
    done("prune", model, *cheap, "--seed", 3, "--one-shot", "--sparsity", 0.75, "--out", tmp_path / "once")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "steps" / name).read_bytes() == (tmp_path / "once" / name).read_bytes(), name
    assert json.loads(plan.read_text()) == json.loads((tmp_path / "once" / "plan.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("calibration", ["self", "text"])
def test_same_seed_same_bytes(calibration: str, model: Path, cheap: list[object], tmp_path: Path) -> None:
    options = [*cheap, *(["--calibration", "self", "--seq-len", 8] if calibration == "self" else [])]
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        done("prune", model, *options, "--sparsity", 0.5, "--seed", seed, "--out", tmp_path / out)
    a, b = (tree(tmp_path / out) for out in "ab")
    for out, files in (("a", a), ("b", b)):  # the report holds seconds; the scores' metadata has no order
        del files["report.json"], files["sspruner/scores.safetensors"]
        files["README.md"] = files["README.md"].replace(str(tmp_path / out).encode(), b"OUT")  # in the command
    assert a == b
    first, again, other = (Scores.load(tmp_path / out / "sspruner" / "scores.safetensors") for out in "abc")
    assert first.metadata == again.metadata
    for name, importance in first.importance.items():
        assert torch.equal(importance, again.importance[name])
        assert not torch.equal(importance, other.importance[name])


def same_as_masked(dense: Path, out: Path) -> None:
    """The saved model loads and gives the logits of the dense one under the saved plan's mask."""
    model, _ = sspruner.load(dense)
    pruned, _ = sspruner.load(out)
    ids = torch.randint(31, (2, 23), generator=torch.Generator().manual_seed(5))
    with sspruner.masked(model, Plan.load(out / "plan.json"), sspruner.trace(model)):
        expected = logits(model, ids)
    assert not torch.allclose(expected, logits(model, ids), atol=1e-2)
    torch.testing.assert_close(logits(pruned, ids), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_several_axes_with_ratios_and_layers_left_alone(hybrid: Path, cheap: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ["--axis", "state=0.5,head=0.5,mlp=0.2", "--scorer", "state=ghost, head=ghost, mlp=magnitude"]
    args += ["--ratio", "layers.0.*:state=0.8", "--ratio", "*:mlp=0.4", "--ratio", "layers.3.*:mlp=0.1"]
    args += ["--ignore", "layers.2.*", "--ignore", "layers.4.*:head"]
    shown = done("prune", hybrid, *cheap, *args, "--out", out, "--json", tmp_path / "r.json").stdout
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert report == json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert (report["axis"], report["scorer"]) == ("state, head, mlp", "ghost, magnitude")
    assert report["budget"] == {
        "sparsity": {"state": 0.5, "head": 0.5, "mlp": 0.2},
        "allocation": "uniform",
        "multiple_of": 1,
        "ratios": {"layers.0.*:state": 0.8, "*:mlp": 0.4, "layers.3.*:mlp": 0.1},
        "ignore": ["layers.2.*", "layers.4.*:head"],
    }
    L = "model.layers"
    sizes = {name: (s["before"], s["after"]) for name, s in report["layers"].items()}
    alone = {name: size for name, size in sizes.items() if size[0] == size[1]}
    assert alone == {
        f"{L}.2.mamba:state": (6, 6),
        f"{L}.2.mamba:head": (2, 2),
        f"{L}.4.mamba_decoder.mamba:head": (2, 2),
    }
    assert {name: size for name, size in sizes.items() if name not in alone} == {
        f"{L}.0.mamba:state": (6, 1),
        f"{L}.1.mamba_decoder.mamba:state": (6, 3),
        f"{L}.3.mamba_decoder.mamba:state": (6, 3),
        f"{L}.4.mamba_decoder.mamba:state": (6, 3),
        f"{L}.0.mamba:head": (2, 1),
        f"{L}.1.mamba_decoder.mamba:head": (2, 1),
        f"{L}.3.mamba_decoder.mamba:head": (2, 1),
        f"{L}.1.shared_transformer.feed_forward:mlp": (10, 6),
        f"{L}.3.shared_transformer.feed_forward:mlp": (10, 9),
    }
    for row in ("on axis state, head, mlp", "state size", "head units", "mlp units"):
        assert row in shown
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    assert set(plan["groups"]) == set(sizes) - set(alone)
    assert plan["axis"].split(",") == ["state", "head", "mlp"]
    assert plan["made_by"]["ratios"] == report["budget"]["ratios"]
    assert plan["made_by"]["ignore"] == report["budget"]["ignore"]
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))["sspruner"]
    assert set(config) == {"version", "cuts", "stock", "weights"}
    assert (out / config["weights"] / "model.safetensors").is_file()
    assert [cut["groups"].keys() for cut in config["cuts"]] == [plan["groups"].keys()]
    same_as_masked(hybrid, out)


@pytest.mark.slow
def test_a_family_without_a_tokenizer(tmp_path: Path) -> None:
    """Mamba1, text sampled from the model itself, two axes; then a second cut on a third."""
    dense = saved_zoo(tmp_path / "mamba", "mamba", tokenizer=False)
    cheap = ["--samples", 4, "--seq-len", 16]
    args = ["--axis", "state=0.5,channel=0.25", "--out", tmp_path / "once"]
    report = json.loads(done("prune", dense, *cheap, *args, "--json", "-").stdout)
    assert report["continuation"] is None
    assert report["calibration"]["source"] == "self"
    assert report["pruned"]["state_bytes"] == 3 * 12 * 3 * 4
    assert report["dense"]["state_bytes"] == 3 * 16 * 6 * 4
    same_as_masked(dense, tmp_path / "once")
    args = ["--axis", "dt_rank", "--scorer", "magnitude", "--keep", 2, "--out", tmp_path / "twice"]
    done("prune", tmp_path / "once", *cheap, *args)
    same_as_masked(tmp_path / "once", tmp_path / "twice")
    cut = sspruner.trace(sspruner.load(tmp_path / "twice")[0])
    assert {(g.axis, g.units) for g in cut.groups.values() if g.axis in ("state", "channel", "dt_rank")} == {
        ("state", 3),
        ("channel", 12),
        ("dt_rank", 2),
    }


@pytest.mark.slow
def test_whole_layers_go_by_their_influence(hybrid: Path, cheap: list[object], tmp_path: Path) -> None:
    args = [
        "--axis",
        "block",
        "--scorer",
        "block-influence",
        "--sparsity",
        0.4,
        "--ignore",
        "layers.0",
        "--ignore",
        "layers.3",
    ]
    report = json.loads(done("prune", hybrid, *cheap, *args, "--out", tmp_path / "out", "--json", "-").stdout)
    assert report["layers"] == {"model.layers:block": {"before": 5, "after": 3}}
    assert report["budget"]["ignore"] == ["layers.0", "layers.3"]
    (kept,) = Plan.load(tmp_path / "out" / "plan.json").groups["model.layers:block"].keep
    assert {0, 3} < set(kept)
    pruned = sspruner.load(tmp_path / "out")[0]
    assert pruned.config.num_hidden_layers == len(pruned.model.layers) == 3
    same_as_masked(hybrid, tmp_path / "out")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_three_steps_on_several_axes_equal_one_shot(hybrid: Path, cheap: list[object], tmp_path: Path) -> None:
    scores, plan = tmp_path / "s.safetensors", tmp_path / "p.json"
    scorers, axes = ["--scorer", "state=ghost,head=ghost,hidden=magnitude"], "state=0.5,head=0.5,hidden=0.25"
    fewer = ["--ratio", "layers.1.*:state=0.25", "--ignore", "layers.2.*"]
    said = done("score", hybrid, *cheap, *scorers, "--axis", "state, head,hidden", "--out", scores).stdout
    assert said.startswith("11 dependency groups scored by ")  # five layers twice, and one width
    said = done("plan", hybrid, "--scores", scores, "--axis", axes, *fewer, "--out", plan).stdout
    assert "plan on state, head, hidden" in said
    assert "model.layers.2" not in said
    assert "model:hidden" in said
    done("apply", hybrid, "--plan", plan, "--out", tmp_path / "steps")
    done("prune", hybrid, *cheap, *scorers, "--axis", axes, *fewer, "--one-shot", "--out", tmp_path / "once")
    steps, once = (tree(tmp_path / name) for name in ("steps", "once"))
    for name in ("plan.json", "report.json", "recipe.yaml", "sspruner", "sspruner/scores.safetensors"):
        del once[name]
    del steps["README.md"], once["README.md"]  # what it cost: only prune measures it
    assert steps == once
    made, found = (json.loads(path.read_text()) for path in (plan, tmp_path / "once" / "plan.json"))
    assert made == found
    same_as_masked(hybrid, tmp_path / "once")


@pytest.mark.slow
def test_one_fraction_for_all_scored_axes(hybrid: Path, cheap: list[object], tmp_path: Path) -> None:
    scores, plan = tmp_path / "s.safetensors", tmp_path / "p.json"
    done("score", hybrid, *cheap, "--axis", "head,head_dim", "--out", scores)
    done("plan", hybrid, "--scores", scores, "--out", plan)
    found = Plan.load(plan)
    assert found.axes == ("head", "head_dim")
    assert {(s.before, s.after) for n, s in found.groups.items() if n.endswith(":head")} == {(2, 1)}
    assert {(s.before, s.after) for n, s in found.groups.items() if n.endswith(":head_dim")} == {(4, 2)}


@pytest.mark.exhaustive
@pytest.mark.slow
def test_three_steps_on_single_weights_equal_one_shot(model: Path, cheap: list[object], tmp_path: Path) -> None:
    """With a threshold over all tensors, which the scorer asks for; N:M; and named rows."""
    scores, plan = tmp_path / "s.safetensors", tmp_path / "p.json"
    scorer = ["--axis", "weight", "--scorer", "gradmag"]
    done("score", model, *cheap, *scorer, "--out", scores)
    budgets = [["--sparsity", 0.6], ["--pattern", "2:4"], ["--granularity", "row", "--rows", "B", "--rows", "C"], []]
    for i, budget in enumerate(budgets):
        shown = done("plan", model, "--scores", scores, *budget, "--out", plan).stdout
        assert "in_proj:weight" in shown
        done("apply", model, "--plan", plan, "--out", tmp_path / f"steps{i}")
        done("prune", model, *cheap, *scorer, *budget, "--one-shot", "--out", tmp_path / f"once{i}")
        for name in ("model.safetensors", "config.json"):
            steps, once = (tmp_path / f"{kind}{i}" / name for kind in ("steps", "once"))
            assert steps.read_bytes() == once.read_bytes(), name
        assert Plan.load(plan) == Plan.load(tmp_path / f"once{i}" / "plan.json")
        same_as_masked(model, tmp_path / f"once{i}")
    kept = [Plan.load(tmp_path / f"once{i}" / "plan.json").elements for i in range(4)]
    assert sum(int((~k).sum()) for k in kept[0].values()) == round(0.6 * sum(k.numel() for k in kept[0].values()))
    assert all((k.unflatten(1, (-1, 4)).sum(-1) == 2).all() for k in kept[1].values())
    assert {name.rpartition(".")[2] for name in kept[2]} == {"in_proj:weight"}
    assert all((~k).sum(1).tolist() == [0] * 64 + [8] * 64 + [0] * 4 for k in kept[2].values())
    assert len(kept[3]) == 4


@pytest.mark.slow
def test_states_and_single_weights_at_once(model: Path, cheap: list[object], tmp_path: Path) -> None:
    """Layer by layer, the weights with new values; the saved model is the masked one."""
    args = ["--axis", "state=0.5,weight=0.5", "--scorer", "state=ghost,weight=sparsegpt", "--out", tmp_path / "out"]
    report = json.loads(done("prune", model, *cheap, *args, "--json", "-").stdout)
    assert not report["one_shot"]
    plan = Plan.load(tmp_path / "out" / "plan.json")
    assert plan.axes == ("state", "weight")
    assert set(plan.updates) == {name.replace(":", ".") for name in plan.elements}
    same_as_masked(model, tmp_path / "out")


@pytest.mark.slow
def test_layers_compete(model: Path, cheap: list[object], tmp_path: Path) -> None:
    """By scores over all layers: as many units in all as with the same fraction everywhere."""
    scores, plan = tmp_path / "s.safetensors", tmp_path / "p.json"
    fraction = ["--sparsity", 0.3, "--allocation", "global", "--multiple-of", 2]
    report = json.loads(done("prune", model, *cheap, *fraction, "--out", tmp_path / "out", "--json", "-").stdout)
    assert report["one_shot"]
    assert report["budget"] == {"sparsity": 0.3, "allocation": "global", "multiple_of": 2}
    after = [size["after"] for size in report["layers"].values()]
    assert sum(after) == 22  # of 32; the nearest even number to 22.4
    done("score", model, *cheap, "--out", scores)
    done("plan", model, "--scores", scores, *fraction, "--out", plan)
    assert Plan.load(plan) == Plan.load(tmp_path / "out" / "plan.json")
    same_as_masked(model, tmp_path / "out")


@pytest.mark.slow
def test_mask_mode_saves_zeros_at_stock_sizes(model: Path, cheap: list[object], tmp_path: Path) -> None:
    done("prune", model, *cheap, "--mode", "mask", "--keep", 6, "--out", tmp_path / "out")
    stock, info = Mamba2ForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert stock.config.state_size == STATE
    assert getattr(stock.config, "sspruner", None) is None
    dense = load_file(model / "model.safetensors")
    plan = Plan.load(tmp_path / "out" / "plan.json")
    graph = sspruner.trace(stock)
    dropped = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in stock.named_parameters()}
    for name, selection in plan.groups.items():
        assert selection.after == 6
        for member in graph.groups[name].members:
            (dim,) = member.dims
            dropped[member.tensor].index_fill_(dim, mask.dropped_rows(member, selection), True)
    for name, parameter in stock.named_parameters():
        assert torch.equal(parameter, dense[name].masked_fill(dropped[name], 0)), name


@pytest.mark.slow
def test_overwrite_replaces_an_earlier_model(model: Path, cheap: list[object], tmp_path: Path) -> None:
    for keep in (6, 3):
        done("prune", model, *cheap, "--keep", keep, "--out", tmp_path / "out", "--overwrite")
    assert sspruner.load(tmp_path / "out")[0].config.state_size == 3
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_dataset_with_a_text_column(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"text": TEXT}, {"text": None}, {"text": TEXT * 50}]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    name = f"{tmp_path / 'data'}::train"
    result = done("prune", model, "--samples", 3, "--seq-len", 32, "--calibration", name, "--json", "-")
    assert json.loads(result.stdout)["calibration"]["source"] == name
    assert json.loads(result.stdout)["calibration"]["sequences"] == 3


@pytest.mark.slow
def test_the_reference_model_is_the_default(tmp_path: Path) -> None:
    result = done("prune", "--samples", 2, "--seq-len", 32, "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert "mamba2-books-4m (reference)" in result.stdout
    assert report["pruned"]["state_bytes"] * 2 == report["dense"]["state_bytes"]
    assert report["pruned"]["dtype"] == "bfloat16"
    assert report["continuation"]["pruned"]
    assert sspruner.load(tmp_path / "out")[0].config.state_size == 64


def test_no_model_is_said_first_and_what_to_do_next_last(tmp_path: Path) -> None:
    options = ["--scorer", "magnitude", "--calibration", "page", "--seq-len", 32, "--samples", 2]
    result = done("prune", *options, "--out", tmp_path / "out")
    assert result.stderr.startswith("no MODEL given: mamba2-books-4m, the small reference model that ships")
    *_, own, measured, seen, served = result.stdout.splitlines()
    assert own.startswith("  your model: sspruner prune path/to/model ")
    assert measured == (
        f"  measure it: sspruner evaluate {tmp_path / 'out'} --against mamba2-books-4m --text held-out.txt"
    )
    assert (seen, served[:12]) == (f"  see it:     sspruner report {tmp_path / 'out'}", "  serve it: ")
    named = done("prune", "mamba2-books-4m", *options, "--out", tmp_path / "with a space")
    assert named.stderr == ""
    assert "your model" not in named.stdout
    assert f"sspruner report '{tmp_path / 'with a space'}'" in named.stdout  # as a shell reads it


@pytest.mark.exhaustive
@pytest.mark.slow
def test_several_axes_of_the_reference_model(tmp_path: Path) -> None:
    args = ["--axis", "state=0.5,head=0.25", "--ignore", "layers.0.*", "--samples", 2, "--seq-len", 32]
    result = done("prune", *args, "--out", tmp_path / "out", "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert "ghost on axis state, head" in result.stdout
    layer = 64 * 4  # bytes of one head with one state
    assert report["dense"]["state_bytes"] == 6 * 8 * 128 * layer
    assert report["pruned"]["state_bytes"] == (8 * 128 + 5 * 6 * 64) * layer
    sizes = {(name.partition(":")[2], s["before"], s["after"]) for name, s in report["layers"].items()}
    assert sizes == {("state", 128, 64), ("head", 8, 6), ("state", 128, 128), ("head", 8, 8)}
    pruned, _ = sspruner.load(tmp_path / "out")
    assert [b.mixer.num_heads for b in pruned.backbone.layers] == [8] + [6] * 5


def test_inspect(model: Path, tmp_path: Path) -> None:
    shown = done("inspect", model).stdout
    assert "backbone.layers.{0, 1}.mixer" in shown
    assert "state: 2 groups x 16 units" in shown
    loaded, _ = sspruner.load(model)
    graph = sspruner.trace(loaded)
    targets = {offer.target.name: offer.to_json() for offer in offers(loaded)}
    expected = graph.to_json() | {"footprint": footprint(loaded, graph).to_json(), "targets": targets}
    found = json.loads(done("inspect", model, "--json", "-").stdout)
    expected["when_it_pays"] = found["when_it_pays"]  # tests/unit/benchmarking/test_when_it_pays.py
    assert found["when_it_pays"]["text"] in " ".join(shown.split())
    assert found == expected
    done("inspect", model, "--json", tmp_path / "graph.json")
    assert json.loads((tmp_path / "graph.json").read_text(encoding="utf-8")) == expected


@pytest.mark.slow
def test_inspect_shows_every_axis(hybrid: Path) -> None:
    shown = done("inspect", hybrid).stdout
    for line in (
        "model.layers.{0, 2}.mamba (zamba2): ",
        "state: 2 groups x 6 units, ",
        "head: 2 groups x 2 units, ",
        "head_dim: 4 groups x 4 units, ",
        "group: 2 units, ",
        "attn_head: 4 units, ",
        "mlp: 10 units, ",
        "model:hidden: 8 units, ",
        "model.layers:block: 5 units, whole modules",
        "model.layers.1.shared_transformer.feed_forward (mlp): ",
        ", shared by 2 layers",
    ):
        assert line in shown
    graph = json.loads(done("inspect", hybrid, "--json", "-").stdout)
    assert graph.items() >= sspruner.trace(sspruner.load(hybrid)[0]).to_json().items()
    axes = {axis for layer in graph["layers"] for axis in layer["axes"]}
    assert axes == {"state", "head", "head_dim", "group", "attn_head", "mlp"}
    assert {name: whole["units"] for name, whole in graph["model"].items()} == {
        "model:hidden": 8,
        "model.layers:block": 5,
    }


def test_scorers_lists_where_each_comes_from() -> None:
    name, rows = "", dict[str, list[str]]()
    for line in done("scorers").stdout.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if len(cells) == 4:  # what is too long for one line goes on in the next, without a name
            name = cells[0] or name
            rows[name] = [f"{row} {cell}".strip() for row, cell in zip(rows.get(name, [""] * 4), cells, strict=True)]
    for scorer, axes, needs in (
        ("ghost", "channel, group, head, head_dim, state", "activations"),
        ("block-influence", "block", "activations"),
        ("magnitude", ", ".join(sorted(sspruner.AXES | sspruner.ELEMENT_AXES)), "weights"),
        ("random", ", ".join(sorted(sspruner.AXES | sspruner.ELEMENT_AXES)), "weights"),
    ):
        assert rows[scorer] == [scorer, axes, needs, scorer.replace("-", "_")]  # the last is its plugin


@pytest.mark.slow
@pytest.mark.parametrize("charset", ["utf-8", "latin-1", "ascii"])
def test_any_character_can_be_printed(
    charset: str, model: Path, cheap: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sspruner.pruning.cutter.continuation", lambda *args: FOREIGN)
    result = done("prune", model, *cheap, "--json", tmp_path / "r.json", charset=charset)
    assert FOREIGN.encode(charset, "replace").decode(charset) in " ".join(result.stdout.split())
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["continuation"]["pruned"] == FOREIGN


def test_a_traceback_on_demand() -> None:
    assert isinstance(run("prune", "--sparsity", 2, SSPRUNER_DEBUG="1").exception, sspruner.InputError)


def test_a_failed_proof_writes_nothing(
    model: Path, cheap: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_rows(member: Any, selection: Selection) -> torch.Tensor:
        shifted = tuple(tuple(sorted((u + 1) % selection.before for u in keep)) for keep in selection.keep)
        return mask.dropped_rows(member, Selection(selection.before, shifted))

    done("score", model, *cheap, "--out", tmp_path / "s.safetensors")
    done("plan", model, "--scores", tmp_path / "s.safetensors", "--out", tmp_path / "p.json")
    monkeypatch.setattr(slicing, "dropped_rows", other_rows)
    for args in (["prune", model, *cheap], ["apply", model, "--plan", tmp_path / "p.json"]):
        says = ("proof failed: sliced and masked logits differ by ",)
        refused(tmp_path, says, *args, "--out", tmp_path / "out", code=1)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.cover(most=1)
@pytest.mark.parametrize("earlier", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize(
    ("owner", "method", "error", "code", "says"),
    [
        (Mamba2ForCausalLM, "save_pretrained", KeyboardInterrupt(), 130, "interrupted; nothing written"),
        (Mamba2ForCausalLM, "save_pretrained", FULL, 2, "No space left on device"),
        (Scores, "save", SafetensorError("I/O error: No space left on device (os error 28)"), 2, "No space left"),
        (Plan, "save", KeyboardInterrupt(), 130, "interrupted; nothing written"),
    ],
    ids=["interrupt", "full", "full-in-safetensors", "interrupt-late"],
)
def test_a_failed_save_leaves_nothing(
    owner: type,
    method: str,
    error: BaseException,
    code: int,
    says: str,
    earlier: bool,
    model: Path,
    cheap: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "deep" / "out"
    if earlier:
        saved_model(out)
    save = getattr(owner, method)

    def save_and_fail(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        raise error

    monkeypatch.setattr(owner, method, save_and_fail)
    refused(tmp_path, (says,), "prune", model, *cheap, "--out", out, *["--overwrite"] * earlier, code=code)


@pytest.mark.ci_cover(most=1)
@pytest.mark.slow
@pytest.mark.parametrize("moment", [" torch.", "sampling calibration text", "scoring backbone.layers"])
def test_interrupt(moment: str, tmp_path: Path) -> None:
    """Ctrl-C while torch is imported, while text is sampled, while layers are scored."""
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from sspruner.cli.main import main; main()"
    )
    verbose = ["-X", "importtime"] if "torch" in moment else []  # one line on standard error for each import
    source = ["--calibration", "long.txt", "--samples", "999"] if "scoring" in moment else []
    (tmp_path / "long.txt").write_text(TEXT * 2000, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, *verbose, "-c", program, "prune", "--out", "out", *source],
        cwd=tmp_path,
        env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr
    seen = b""
    with process:
        while moment.encode() not in seen:
            chunk = os.read(process.stderr.fileno(), 65536)
            assert chunk, f"ended before {moment!r}: {seen!r}"
            seen += chunk
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode in (130, -signal.SIGINT)  # a shell calls both 130
    assert stderr.decode().splitlines()[-1].endswith("sspruner: interrupted; nothing written")
    assert b"Traceback" not in seen + stderr
    assert stdout == b""
    assert list(tree(tmp_path)) == ["long.txt"]
