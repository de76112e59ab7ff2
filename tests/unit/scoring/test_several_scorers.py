"""Several scorers in one pass: each gives what it gives alone, and what they look at is computed once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.calibrate import state
from sspruner.calibrate.replay import Replay
from sspruner.graph.families.mamba1_type import Mamba1Type
from sspruner.graph.families.mamba2_type import Mamba2Type
from sspruner.scoring.known import find_scorer
from support.command import TEXT, done, refused, run, saved_model
from support.examples import examples
from support.scoring import batches_of, calibrated
from support.tiny import tiny_model, tokens
from support.zoo import zoo

DATA = calibrated(tokens(4, 19), torch.arange(19) < torch.tensor([19, 12, 19, 7])[:, None])

# (family, axes, scorers): between them every kind of need, and scorers that change weights
TOGETHER = [
    ("mamba2", ["state"], ["ghost", "wanda", "taylor", "magnitude", "random", "last", "rrqr", "snip"]),
    ("mamba2", ["head", "head_dim"], ["ghost", "wanda", "flap", "taylor"]),
    ("mamba2", ["weight"], ["wanda", "sparsegpt", "gradmag", "magnitude"]),
    ("mamba", ["state", "weight", "decay"], ["taylor", "magnitude", "snip"]),
    ("mamba", ["state"], ["sparsessm", "ghost", "last", "taylor"]),
    ("zamba2", ["mlp", "hidden"], ["wanda", "taylor", "magnitude"]),
    ("bamba", ["block"], ["block-influence", "perplexity-drop", "magnitude"]),
]


def score(model: torch.nn.Module, scorers: Any, **kwargs: Any) -> Any:
    return sspruner.score(model, scorers, **{"calibration": DATA, **kwargs})


def same(one: sspruner.Scores, other: sspruner.Scores) -> bool:
    return (
        list(one.importance) == list(other.importance)
        and one.metadata == other.metadata
        and all(torch.equal(values, other.importance[name]) for name, values in one.importance.items())
    )


@pytest.mark.slow
@pytest.mark.cover(most=3)
@pytest.mark.parametrize(("family", "axes", "scorers"), TOGETHER, ids=str)
def test_together_as_alone(family: str, axes: list[str], scorers: list[str]) -> None:
    """Bit for bit; in the order in which they were asked for."""
    model = zoo(family)
    with batches_of(2 * 19):
        together = score(model, scorers, axis=axes)
        assert list(together) == scorers
        for name in scorers:
            assert same(together[name], score(model, name, axis=axes)), name
        turned = score(model, scorers[::-1], axis=axes[::-1])
        assert list(turned) == scorers[::-1]
        for name in scorers:
            for group, values in together[name].importance.items():
                assert torch.equal(turned[name].importance[group], values)


@examples(10)
@given(st.data())
def test_any_of_them_together_as_alone(data: st.DataObject) -> None:
    offered = ["ghost", "wanda", "last", "rrqr", "taylor", "snip", "magnitude", "random"]
    names = data.draw(st.lists(st.sampled_from(offered), min_size=1, unique=True))
    model = tiny_model(groups=2, seed=data.draw(st.integers(0, 99)))
    for name, scores in score(model, names).items():
        assert same(scores, score(model, name))


def test_a_list_of_one_and_a_tuple() -> None:
    model = tiny_model()
    (alone,) = score(model, ["ghost"]).values()
    assert same(alone, score(model, "ghost"))
    assert list(score(model, ("ghost", "random"))) == ["ghost", "random"]


@pytest.mark.slow
def test_classes_and_one_scorer_for_each_axis() -> None:
    model, axes = zoo("zamba2"), ["head", "mlp"]
    cls, _ = find_scorer("wanda")
    by_axis = {"head": "ghost", "mlp": "magnitude"}
    found = score(model, [cls, by_axis, "flap"], axis=axes)
    assert list(found) == ["wanda", "ghost, magnitude", "flap"]
    for asked, scores in zip([cls, by_axis, "flap"], found.values(), strict=True):
        assert same(scores, score(model, asked, axis=axes))


@contextmanager
def counted(owner: Any, name: str, key: Callable[..., Any]) -> Iterator[Counter[Any]]:
    """How often a function is called, by `key` of its arguments."""
    right, calls = getattr(owner, name), Counter()

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[key(*args, **kwargs)] += 1
        return right(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counting)
        yield calls


@pytest.mark.parametrize(
    ("family", "axes", "scorers"),
    [
        ("mamba2", ["state"], ["ghost"]),
        ("mamba2", ["state"], ["ghost", "last", "rrqr"]),
        ("mamba2", ["state", "head", "head_dim", "group"], ["ghost"]),
        ("mamba2", ["state", "head", "head_dim"], ["ghost", "wanda"]),
        ("mamba", ["state", "channel"], ["ghost", "wanda"]),
    ],
    ids=str,
)
def test_what_a_mixer_feeds_to_its_scan_is_computed_once(family: str, axes: list[str], scorers: list[str]) -> None:
    """For each layer and batch: however many scorers and axes look at it; the scan's sums as well."""
    model = zoo(family)
    layers = [site.path for site in sspruner.trace(model).layers]
    owner = Mamba2Type if family == "mamba2" else Mamba1Type
    by_mixer = lambda self, mixer, hidden, mask: (id(mixer), len(hidden))  # noqa: E731
    with (
        batches_of(2 * 19),
        counted(owner, "project", by_mixer) as projected,
        counted(state, "ghost_sum", lambda p, mask: "ghost") as sums,
        counted(state, "scan_output", lambda p: "y") as scans,
    ):
        score(model, scorers, axis=axes)
    assert projected == {(id(model.get_submodule(path)), 2): 2 for path in layers}
    if family == "mamba2":
        assert sums["ghost"] == 2 * len(layers)
        assert scans["y"] == (2 * len(layers) if "head" in axes else 0)


def block_runs(model: torch.nn.Module, scorers: Any, axes: list[str]) -> Counter[str]:
    with batches_of(2 * 19), counted(Replay, "run", lambda self, block, *_, **__: block) as runs:
        score(model, scorers, axis=axes)
    return runs


@pytest.mark.ci_cover(most=2)
@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba2", "zamba2", "jamba"])
def test_blocks_run_for_all_as_often_as_for_one(family: str) -> None:
    """Once to be observed, once for the inputs of the linear layers if anyone wants them, once to go on."""
    model = zoo(family)
    blocks = [f"{sspruner.trace(model).blocks}.{i}" for i in range(model.config.num_hidden_layers)]
    have = sspruner.trace(model).axes
    axes = [axis for axis in ("state", "head", "head_dim", "channel") if axis in have]
    plain = block_runs(model, "ghost", axes)
    assert set(plain) <= set(blocks)
    assert max(plain.values()) <= 2 * 2  # two batches
    wanda = block_runs(model, "wanda", axes)
    assert max(wanda.values()) <= 3 * 2
    others = ["ghost", "wanda", "magnitude", "random"]
    assert block_runs(model, others, axes) == wanda
    assert block_runs(model, [*others, "taylor"], axes) == wanda  # whose backward pass is of the whole model
    assert block_runs(model, ["magnitude", "random", "taylor"], axes) == {}


def test_linear_layers_are_seen_in_one_run_of_their_block() -> None:
    """On the axis weight: one run to see all of them, one to go on."""
    model = zoo("zamba2")
    alone = block_runs(model, "wanda", ["weight"])
    assert set(alone.values()) <= {2, 4}
    assert block_runs(model, ["wanda", "sparsegpt"], ["weight"]) == alone


def test_one_backward_pass_serves_all() -> None:
    model = tiny_model()
    with batches_of(2 * 19), counted(torch.autograd, "_engine_run_backward", lambda *_, **__: "backward") as passes:
        score(model, ["taylor", "snip"])
        assert passes["backward"] == 2
        score(model, ["taylor", "snip"], options={"taylor.order": "fisher"})
        assert passes["backward"] == 2 + 4  # one for each sequence


# Options


def test_options_for_one_of_several() -> None:
    model = tiny_model(groups=2)
    found = score(model, ["ghost", "last"], options={"ghost.variant": "means", "last.input": "weights"})
    assert same_values(found["ghost"], score(model, "ghost", options={"variant": "means"}))
    assert same_values(found["last"], score(model, "last", options={"input": "weights"}))
    assert json.loads(found["ghost"].metadata["options"]) == {"ghost.variant": "means"}
    assert json.loads(found["last"].metadata["options"]) == {"last.input": "weights"}
    plain = score(model, ["ghost", "last"], options={"ghost.variant": "means"})
    assert same_values(plain["last"], score(model, "last"))


def same_values(one: sspruner.Scores, other: sspruner.Scores) -> bool:
    return all(torch.equal(values, other.importance[name]) for name, values in one.importance.items())


@pytest.mark.parametrize("turned", [False, True])
def test_the_option_of_one_scorer_wins_over_that_of_all(turned: bool) -> None:
    pairs = [("reduction", "max"), ("wanda.reduction", "mean")]
    options = dict(reversed(pairs) if turned else pairs)
    model = tiny_model(groups=2)
    assert same_values(score(model, "wanda", options=options), score(model, "wanda", options={"reduction": "mean"}))


def test_an_option_that_all_of_them_take() -> None:
    class Scaled(sspruner.Scorer):
        name, axes, needs = "scaled", {"state"}, "weights"

        def __init__(self, factor: float = 1.0) -> None:
            self.factor = factor

        def observe(self, view: sspruner.SSMView) -> None:
            self.score = view.norms * self.factor

        def importance(self) -> torch.Tensor:
            return self.score

    class Twice(Scaled):
        name = "twice"

        def importance(self) -> torch.Tensor:
            return self.score * 2

    model = tiny_model()
    plain = score(model, Scaled).importance
    found = score(model, [Scaled, Twice], options={"factor": 3.0, "twice.factor": 5.0})
    for name, values in plain.items():
        torch.testing.assert_close(found["scaled"].importance[name], values * 3)
        torch.testing.assert_close(found["twice"].importance[name], values * 10)


@pytest.mark.parametrize(
    ("scorers", "options", "message"),
    [
        (["ghost", "ghost"], {}, "scorer 'ghost' is given twice"),
        (["ghost", "random", {"state": "ghost"}], {}, "scorer 'ghost' is given twice"),
        (["ghost", "ghots"], {}, "unknown scorer 'ghots'; .*did you mean 'ghost'"),
        (["ghost", "random"], {"last.input": "weights"}, "option 'last.input': no scorer of this run is called 'last'"),
        (["ghost", "random"], {"ghost.variants": "means"}, "scorer 'ghost': unknown option 'variants'; it takes"),
        (["ghost", "random"], {"variant": "means"}, "scorer 'random': unknown option 'variant'; it takes none"),
        (["ghost", "last"], {"ghost.variant": "best"}, "variant='best'; known: joint, means, output"),
        (["ghost", "block-influence"], {}, "'block-influence' does not score axis 'state'; it scores block"),
        (["ghost", {"head": "ghost"}], {}, "no scorer for axis 'state': head have one; add state=NAME"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(scorers: list, options: dict, message: str) -> None:
    """Before any work."""
    model = tiny_model()
    with counted(Replay, "run", lambda *_, **__: "run") as runs, pytest.raises(sspruner.InputError, match=message):
        score(model, scorers, options=options)
    assert not runs


def test_an_error_of_one_names_it() -> None:
    class Broken(sspruner.Scorer):
        name, axes = "broken", {"state"}

        def observe(self, view: sspruner.SSMView) -> None:
            raise RuntimeError("no")

        def importance(self) -> torch.Tensor:
            raise AssertionError

    with pytest.raises(sspruner.PluginError, match=r"scorer 'broken' on backbone\.layers\.0\.mixer:state failed: Runt"):
        score(tiny_model(), ["ghost", Broken, "random"])


# The command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def cheap(saved: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "text.txt").write_text(TEXT * 100)
    return [saved, "--samples", 4, "--seq-len", 32, "--calibration", tmp_path / "text.txt"]


@pytest.mark.slow
def test_a_file_for_each_and_a_plan_from_each(cheap: list[object], saved: Path, tmp_path: Path) -> None:
    scorers = ["--scorer", "ghost", "--scorer", "wanda", "--scorer", "state=last,head=magnitude"]
    said = done("score", *cheap, *scorers[:4], "--axis", "state", "--out", tmp_path / "s").stdout.splitlines()
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["ghost.safetensors", "wanda.safetensors"]
    assert [line.partition(" in ")[0] for line in said] == [
        "2 dependency groups scored by ghost", "2 dependency groups scored by wanda",
    ]  # fmt: skip
    for name in ("ghost", "wanda"):
        done("score", *cheap, "--scorer", name, "--no-cache", "--out", tmp_path / "alone.safetensors")
        alone, found = (sspruner.Scores.load(tmp_path / p) for p in ("alone.safetensors", f"s/{name}.safetensors"))
        assert same(found, alone)
        made = done("plan", saved, "--scores", tmp_path / "s" / f"{name}.safetensors", "--out", tmp_path / "p.json")
        assert "16 -> 8" in made.stdout
        assert sspruner.Plan.load(tmp_path / "p.json").made_by["scorer"] == name
    done("score", *cheap, *scorers[-2:], "--scorer", "wanda", "--axis", "state,head", "--out", tmp_path / "s")
    assert {p.name for p in (tmp_path / "s").iterdir()} == {  # into a folder that is there
        "ghost.safetensors", "wanda.safetensors", "state=last-head=magnitude.safetensors",
    }  # fmt: skip


def test_the_folder_without_a_name(cheap: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done("score", *cheap, "--scorer", "ghost", "--scorer", "random")
    assert sorted(p.name for p in (tmp_path / "scores").iterdir()) == ["ghost.safetensors", "random.safetensors"]
    done("score", *cheap, "--scorer", "random")
    done("score", *cheap)
    assert sspruner.Scores.load(tmp_path / "scores.safetensors").metadata["scorer"] == "ghost"


def test_options_on_the_command_line(cheap: list[object], tmp_path: Path) -> None:
    args = [
        "--scorer",
        "ghost",
        "--scorer",
        "last",
        "--option",
        "ghost.variant=means",
        "--option",
        "last.input=weights",
    ]
    done("score", *cheap, *args, "--out", tmp_path / "s")
    found = {path.stem: sspruner.Scores.load(path) for path in (tmp_path / "s").iterdir()}
    options = {name: scores.metadata["options"] for name, scores in found.items()}
    assert options == {"ghost": '{"ghost.variant": "means"}', "last": '{"last.input": "weights"}'}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("--scorer ghost --scorer ghost", ("scorer 'ghost' is given twice",)),
        ("--scorer ghost --scorer ghots", ("unknown scorer 'ghots'", "did you mean 'ghost'?")),
        ("--scorer ghost --scorer random --out model/config.json", ("config.json: is a file", "give a folder")),
        ("--scorer ghost --scorer random --out no/such/folder", ("no folder", "make it first")),
        ("--scorer ghost --scorer random --option last.input=weights", ("no scorer of this run is called 'last'",)),
        ("--scorer ghost --scorer random --option variant=means", ("scorer 'random': unknown option 'variant'",)),
    ],
)
def test_bad_input(args: str, says: tuple[str, ...], cheap: list[object], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(cheap[0])
    refused(tmp_path, says, "score", "model", *cheap[1:], *args.split())


@pytest.mark.slow
@pytest.mark.parametrize(("scorer", "axis", "changes"), [
    ("flap", "head", "flap"), ("sparsegpt", "weight", "sparsegpt"), ("state=ghost,head=flap", "state,head", "flap"),
    ("wanda", "weight", ""), ("ghost", "state", ""),
])  # fmt: skip
def test_a_plan_says_what_it_leaves_out(
    scorer: str, axis: str, changes: str, cheap: list[object], saved: Path, tmp_path: Path
) -> None:
    """A plan selects; what some scorers make of the rest only `prune` does. On standard error, and it is no error."""
    done("score", *cheap, "--scorer", scorer, "--axis", axis, "--out", tmp_path / "s.safetensors")
    result = run("plan", saved, "--scores", tmp_path / "s.safetensors", "--out", tmp_path / "p.json")
    assert result.exit_code == 0
    remark = f"{changes} changes weights, too: only `sspruner prune` does that; this plan selects\n"
    assert result.stderr == (remark if changes else "")
    assert not sspruner.Plan.load(tmp_path / "p.json").updates
