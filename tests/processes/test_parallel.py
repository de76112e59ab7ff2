"""Several processes: any number of them, and any split of the calibration, score and cut like one alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import sspruner
from sspruner.calibrate import sources
from sspruner.calibrate.shards import summed
from sspruner.calibrate.sources import Calibration
from sspruner.compute.processes import rank
from sspruner.recipes.parts import Reconstruction
from sspruner.scoring.known import find_scorer, installed_scorers
from sspruner.scoring.run import Run
from sspruner.scoring.scorer import make_scorer
from sspruner.scoring.walk import walk
from sspruner.testing.cases import axes_of, windows
from sspruner.testing.plans import selection
from support.examples import examples
from support.tiny import logits, tiny_model, tokens
from support.together import Together
from support.zoo import zoo

LENGTHS = (13, 9, 24, 2, 17)  # tokens of sequences: 5 are an uneven split for 2 and for 4
OPTIONS: dict[str, list[dict[str, Any]]] = {  # beside the default ones
    "ghost": [{"variant": "output"}, {"variant": "means"}],
    "balanced": [{"weights": "none"}],
    "taylor": [{"order": "second"}],
}
# Families with a delta rule: tiny models of them; experts do not run in fp64.
DELTA_RULES: dict[str, dict[str, Any]] = {"qwen3_next": {}, "kimi_linear": {"experts": 0}}

Importance = dict[str, torch.Tensor]


def data(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Calibration:
    """Sequences of different lengths, padded on the right."""
    rows = torch.randint(31, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    return windows(rows, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


def made(name: str, options: dict[str, Any]) -> sspruner.Scorer:
    return make_scorer(find_scorer(name)[0], axis="", seed=0, options=options)


def observing() -> list[tuple[str, dict[str, Any]]]:
    """Every installed scorer that needs more than weights, with its default options and some others."""
    every = [(name, options) for name in sorted(installed_scorers()) for options in ({}, *OPTIONS.get(name, []))]
    return [(name, options) for name, options in every if made(name, options).needs != "weights"]


def model_for(family: str, name: str, options: dict[str, Any]) -> Any:
    """In fp64 for gradients: in fp32 those of one process change by some 1e-6, too, with the size of its batches."""
    backward = made(name, options).needs in ("gradients", "fisher")
    sizes = DELTA_RULES.get(family, {})
    return zoo(family, dtype=torch.float64 if backward else torch.float32, **sizes)


def scores(family: str, name: str, options: dict[str, Any], seen: Calibration, per_batch: int = 4096) -> Importance:
    """On all axes that the scorer and the model have. per_batch: tokens in one forward."""
    model, before = model_for(family, name, options), sources.TOKENS_PER_BATCH
    axes = [axis for axis in axes_of(model) if axis in find_scorer(name)[0].axes]
    sources.TOKENS_PER_BATCH = per_batch
    try:
        return sspruner.score(model, name, axis=axes, options=options, calibration=seen, device="cpu").importance
    finally:
        sources.TOKENS_PER_BATCH = before


def same(every: list[Any], alone: Importance, tolerance: float = 1e-6) -> None:
    """Of every process to the bit; of one alone to a part of each group's largest score."""
    for found in every:
        assert not isinstance(found, Exception), found
        assert found.keys() == alone.keys()
        for group, expected in alone.items():
            assert torch.equal(found[group], every[0][group]), group
            assert (found[group] - expected).abs().max() <= tolerance * expected.abs().max(), group


@pytest.mark.ci_cover(most=2)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "count"),
    [(name, options, count) for name, options in observing() for count in ([3] if options else [2, 4])],
)
def test_scores_are_those_of_one_process(name: str, options: dict[str, Any], count: int, together: Together) -> None:
    able = 0
    of_experts = find_scorer(name)[0].axes == {"expert"}
    for family in ("granitemoehybrid", "nemotron_h") if of_experts else ("mamba2", "mamba"):
        try:
            alone = scores(family, name, options, data())
        except sspruner.InputError:
            continue
        able += 1
        same(together(count, scores, family, name, options, data()), alone)
    assert able


@pytest.mark.ci_cover(most=3)
@pytest.mark.slow
@pytest.mark.parametrize("family", DELTA_RULES)
@pytest.mark.parametrize(("name", "options"), [(n, o) for n, o in observing() if find_scorer(n)[0].axes != {"expert"}])
def test_scores_of_delta_rules(family: str, name: str, options: dict[str, Any], together: Together) -> None:
    """Their kernels compute in fp32 whatever the dtype, so that gradients have its roundings."""
    try:
        alone = scores(family, name, options, data())
    except sspruner.InputError as error:
        pytest.skip(str(error))
    backward = made(name, options).needs in ("gradients", "fisher")
    same(together(3, scores, family, name, options, data()), alone, 1e-5 if backward else 1e-6)


@pytest.mark.ci_cover(most=2)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name"),
    [("zamba2", "wanda"), ("zamba2", "taylor"), ("granitemoehybrid", "wanda"), ("granitemoehybrid", "flap")],
)
def test_shared_blocks_and_experts(family: str, name: str, together: Together) -> None:
    """A block that is called several times, and experts of which a process's tokens may not reach all."""
    same(together(3, scores, family, name, {}, data()), scores(family, name, {}, data()))


@pytest.mark.slow
@examples(8)
@example(lengths=[0, 0, 0, 4], count=2, per_batch=1, name="last", order="first")  # batches of padding alone
@example(lengths=[9, 0, 7, 1], count=2, per_batch=4096, name="taylor", order="second")  # one has nothing to predict
@given(
    lengths=st.lists(st.integers(0, 20), min_size=4, max_size=9).filter(lambda found: max(found) > 3),
    count=st.integers(2, 4),
    per_batch=st.sampled_from([1, 40, 4096]),
    name=st.sampled_from(["ghost", "flap", "last", "taylor", "perplexity-drop"]),
    order=st.sampled_from(["first", "second"]),
)
def test_any_split(lengths: list[int], count: int, per_batch: int, name: str, order: str, together: Together) -> None:
    """Sequences of any lengths, of nothing but padding too; any number of tokens at once in every process."""
    options = {"order": order} if name == "taylor" else {}
    alone = scores("mamba2", name, options, data(tuple(lengths)))
    same(together(count, scores, "mamba2", name, options, data(tuple(lengths)), per_batch), alone)


def cut(family: str, name: str, options: dict[str, Any], more: dict[str, Any], own: bool = False) -> dict[str, Any]:
    """What `prune` makes of a model: units that stay, new values, scores, logits. own: calibrations that differ."""
    model = model_for(family, name, options)
    able = [axis for axis in axes_of(model) if axis in find_scorer(name)[0].axes]
    axis = "state" if "state" in able else sorted(able)[0]
    seen = data(seed=rank() if own else 0)
    part = 0.34 if axis == "expert" else 0.5  # a token takes two of three experts
    result = sspruner.prune(
        model, name, axis=axis, sparsity=part, options=options, calibration=seen, device="cpu", **more
    )
    ids = torch.arange(20)[None] % 31
    return {
        "plan": {name: getattr(group, "keep", group.after) for name, group in result.plan.groups.items()},
        "updates": result.plan.updates,
        "importance": result.scores.importance,
        "logits": logits(result.model, ids),
    }


def same_cut(every: list[Any], alone: dict[str, Any]) -> None:
    for found in every:
        assert not isinstance(found, Exception), found
        assert found["plan"] == alone["plan"]
        assert found["updates"].keys() == alone["updates"].keys()
        for key, value in found["updates"].items():
            assert torch.equal(value, every[0]["updates"][key]), key
            torch.testing.assert_close(value, alone["updates"][key], rtol=1e-4, atol=1e-5)
        assert torch.equal(found["logits"], every[0]["logits"])
        torch.testing.assert_close(found["logits"], alone["logits"], rtol=1e-3, atol=1e-3)
    same([found["importance"] for found in every], alone["importance"], 1e-5)  # behind cut blocks roundings add up


@pytest.mark.slow
@pytest.mark.ci_cover(most=3)
@pytest.mark.cover(most=1)
@pytest.mark.parametrize(("name", "options"), [(name, options) for name, options in observing() if not options])
def test_layers_are_cut_like_in_one_process(name: str, options: dict[str, Any], together: Together) -> None:
    """Sequential: each layer on what the cut ones before it make. Every process cuts the same, to the bit."""
    family = "mamba" if name == "sparsessm" else "mamba2"
    if find_scorer(name)[0].axes == {"expert"}:
        family = "granitemoehybrid"
    same_cut(together(2, cut, family, name, options, {}), cut(family, name, options, {}))


@pytest.mark.slow
@pytest.mark.ci_cover(most=2)
@pytest.mark.cover(most=1)
@pytest.mark.parametrize(
    ("name", "options", "more"),
    [
        ("taylor", {"order": "second"}, {}),
        ("ghost", {}, {"one_shot": True, "allocation": "adaptive"}),
        ("flap", {}, {"one_shot": True, "allocation": "global"}),
        ("ghost", {}, {"refit": "output"}),
    ],
)
def test_other_ways_to_cut(name: str, options: dict[str, Any], more: dict[str, Any], together: Together) -> None:
    same_cut(together(3, cut, "mamba2", name, options, more), cut("mamba2", name, options, more))


@pytest.mark.slow
@pytest.mark.ci_cover(most=3)
@pytest.mark.cover(most=1)
@pytest.mark.parametrize("family", DELTA_RULES)
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("ghost", {}),
        ("balanced", {"basis": "balanced"}),
        ("ghost", {"refit": "output"}),
        ("ghost", {"refit": "reconstruct", "refit_steps": 4, "refit_windows": 5}),
    ],
)
def test_delta_rules_are_cut_alike(family: str, name: str, more: dict[str, Any], together: Together) -> None:
    try:
        alone = cut(family, name, {}, more)
    except sspruner.InputError as error:
        pytest.skip(str(error))
    same_cut(together(2, cut, family, name, {}, more), alone)


@pytest.mark.slow
def test_the_first_process_says_what_the_calibration_is(together: Together) -> None:
    same_cut(together(2, cut, "mamba2", "ghost", {}, {}, True), cut("mamba2", "ghost", {}, {}))


def sampled(seed: int) -> str | Importance:
    """Scores on text that the model makes itself; the seed counts in the first process alone."""
    return sspruner.score(
        tiny_model(), calibration="self", samples=3, seq_len=8, seed=seed if rank() == 0 else 99, device="cpu"
    ).importance


@pytest.mark.slow
def test_text_of_the_model_itself_is_the_same_everywhere(together: Together) -> None:
    same(together(2, sampled, 5), sampled(5))


class Plain(sspruner.Scorer):
    """Reads activations, and says nothing of sums."""

    name, axes, needs = "plain", {"state"}, "activations"

    def observe(self, view: sspruner.SSMView) -> None:
        self.found = view.C.square().sum((0, 1))

    def importance(self) -> torch.Tensor:
        return self.found


class Picky(Plain):
    """Refuses in the last of two processes."""

    name, token_sums = "picky", ("found",)

    def observe(self, view: sspruner.SSMView) -> None:
        if rank() == 1:
            raise sspruner.InputError("not here")
        super().observe(view)


class Differs(Plain):
    """Its statistic has another shape in each process."""

    name, token_sums = "differs", ("found",)

    def observe(self, view: sspruner.SSMView) -> None:
        super().observe(view)
        self.found = self.found[:, : 1 + rank()]


class Own(Plain):
    """Has an opinion of its own in each process."""

    name, token_sums = "own", ("found",)

    def importance(self) -> torch.Tensor:
        return super().importance() * (-1) ** rank()

    def reduce(self, choose: sspruner.Choose) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return choose(self.importance()), {"D": torch.full((2,), 1.0 + rank())}


def cut_by_own() -> tuple[list[Any], list[torch.Tensor], list[torch.Tensor]]:
    found = sspruner.prune(tiny_model(), Own, sparsity=0.5, calibration=data(), device="cpu")
    return (
        [group.keep for group in found.plan.groups.values()],
        [*found.plan.updates.values()],
        [*found.scores.importance.values()],
    )


@pytest.mark.slow
def test_one_process_says_what_is_cut(together: Together) -> None:
    first, second = together(2, cut_by_own)
    assert first[0] == second[0]
    for a, b in zip(first[1] + first[2], second[1] + second[2], strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(value, torch.ones(2)) for value in first[1])
    assert all(bool((value >= 0).all()) for value in first[2])


def scored_by(scorer: Any, seed: int = 0, sequences: int = 4, tolerant: bool = False, **more: Any) -> Any:
    run = Run(tiny_model(seed=seed * rank()), [scorer] if not tolerant else [scorer, "ghost"], ["state"],
                   {}, 0, "cpu", tolerant=tolerant)  # fmt: skip
    found = walk(run, windows(tokens(sequences, 8), torch.ones(sequences, 8, dtype=torch.bool)), None, None)
    return [*found], run.refused


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Plain,), r"scorer 'plain' runs in one process.* token_sums, or define combine\(\)"),
        ((Differs,), "scorer 'differs' on backbone.layers.0.mixer:state.*differs between processes"),
        (("ghost", 1), "different models"),
        (("ghost", 0, 1), "1 sequences for 2 processes.*--samples"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_all(arguments: tuple[Any, ...], message: str, together: Together) -> None:
    for found in together(2, scored_by, *arguments):
        assert isinstance(found, sspruner.SSPrunerError)
        assert found.exit_code == 2
        with pytest.raises(type(found), match=message):
            raise found


@pytest.mark.slow
def test_a_scorer_that_one_process_refuses_is_left_out_by_all(together: Together) -> None:
    for found in together(2, scored_by, Picky, 0, 4, True):
        assert found[0] == ["ghost"]
        assert "not here" in found[1]["picky"]


def loaded(folder: str) -> Any:
    return sspruner.load(offload=Path(folder) / str(rank()))


@pytest.mark.slow
def test_models_on_disk_are_for_one_process(tmp_path: Path, together: Together) -> None:
    for found in together(2, loaded, str(tmp_path)):
        assert "offload works in one process, not in 2" in str(found)


def from_cache(folder: str) -> tuple[bool, int]:
    """Each process with a cache of its own: of the second it is never asked."""
    os.environ["SSPRUNER_CACHE"] = f"{folder}/{rank()}"
    found = sspruner.score(tiny_model(), calibration=tokens(4, 8), device="cpu", cache=True)
    return found.from_cache, len(list(Path(folder).rglob("*.safetensors")))


@pytest.mark.slow
def test_the_first_process_keeps_the_cache(tmp_path: Path, together: Together) -> None:
    assert [hit for hit, _ in together(2, from_cache, str(tmp_path))] == [False, False]
    assert together(2, from_cache, str(tmp_path)) == [(True, 1), (True, 1)]
    assert (tmp_path / "0").is_dir()
    assert not (tmp_path / "1").exists()


def sums() -> list[Any]:
    """Of what processes may have: one of them saw nothing."""
    blank = rank() == 1
    ones = torch.ones(2, 3, dtype=torch.float64)
    return [
        summed(0.0 if blank else ones),
        summed(rank() + 1),
        summed({} if blank else {"a": ones, "b": 2}),
        summed({1: 5} if blank else {2: 0.5}),
    ]


@pytest.mark.slow
def test_sums(together: Together) -> None:
    for tensor, number, tensors, numbers in together(3, sums):
        assert tensor.dtype == torch.float64
        assert torch.equal(tensor, torch.full((2, 3), 2.0))
        assert number == 6
        assert list(tensors) == ["a", "b"]
        assert torch.equal(tensors["a"], tensor)
        assert tensors["b"] == 4
        assert numbers == {2: 1.0, 1: 5}


def constant() -> Importance:
    """Every token is the same one, and tells FLAP nothing."""
    rows = torch.full((3, 6), 7)
    model = tiny_model()
    for layer in model.backbone.layers:  # no memory of earlier tokens: all positions are alike
        layer.mixer.conv1d.weight.data[..., :-1] = 0
        layer.mixer.A_log.data.fill_(50.0)
    return sspruner.score(
        model, "flap", axis="head", calibration=windows(rows, torch.ones_like(rows, dtype=torch.bool)), device="cpu"
    ).importance


@pytest.mark.slow
def test_a_constant_has_no_variance(together: Together) -> None:
    for found in [constant(), *together(3, constant)]:
        assert all(not bool(value.any()) for value in found.values())


def trained(family: str, axis: str) -> tuple[dict[str, torch.Tensor], dict[str, tuple[float, float]]]:
    """The new values of a reconstruction, and the errors by layer."""
    model = zoo(family) if family != "mamba2" else tiny_model()
    graph = sspruner.trace(model)
    plan = sspruner.Plan({n: selection(g.groups, g.units, g.units // 2, 0) for n, g in graph.on_axis(axis).items()})
    settings = Reconstruction(refit_steps=8, refit_windows=9)
    found = sspruner.refit(
        model,
        plan,
        "reconstruct",
        calibration=windows(tokens(9, 12), torch.ones(9, 12, dtype=torch.bool)),
        settings=settings,
    )
    return found.plan.updates, found.errors


@pytest.mark.slow
@pytest.mark.ci_cover(most=2)
@pytest.mark.parametrize(
    ("family", "axis", "count"), [("mamba2", "state", 2), ("zamba2", "mlp", 3), ("mamba", "state", 2)]
)
def test_any_number_of_processes_reconstructs_the_same(family: str, axis: str, count: int, together: Together) -> None:
    """To the bit: the process that holds the window of a step computes the gradient of all."""
    alone, errors = trained(family, axis)
    assert alone
    for updates, found in together(count, trained, family, axis):
        assert updates.keys() == alone.keys()
        assert all(torch.equal(value, alone[name]) for name, value in updates.items())
        assert found == errors
