"""Refit: least squares against oracles, no block's error ever raised, and what it is worth on a trained model."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import sspruner
from sspruner.calibrate.regression import RIDGES, Moments, ridge
from sspruner.evaluation.damage import damages
from sspruner.pruning import refit as refitting
from sspruner.testing.plans import directions, plans, random_plan
from support.command import complaints
from support.command import run as cli
from support.examples import examples
from support.scoring import calibrated
from support.tiny import tiny_model, tokens
from support.zoo import FAMILIES, zoo, zoo_models

ROUNDING = 1e-9


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dataset(count: int = 8, length: int = 16, seed: int = 0) -> sspruner.Calibration:
    return calibrated(tokens(count, length, seed=seed))


def refitted(model: Any, plan: sspruner.Plan, kind: str, data: sspruner.Calibration) -> sspruner.Refit | None:
    """None where nothing is left to solve for: the last of the modules that write, or experts alone, are cut."""
    try:
        return sspruner.refit(model, plan, kind, calibration=data)
    except sspruner.InputError as error:
        if "nothing to solve for" not in str(error):
            raise
        return None


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@given(seed=st.integers(0, 999), tokens=st.integers(1, 40), inputs=st.integers(1, 8), dead=st.integers(0, 3))
def test_ridge_is_the_best_of_its_candidates_and_never_raises_the_error(seed, tokens, inputs, dead):
    u, e = normal(seed, 2 * tokens, inputs + dead), normal(seed + 1, 2 * tokens, 3)
    u[:, inputs:] = 0
    e += u @ normal(seed + 2, inputs + dead, 3)
    fitted, other = Moments.of(u[:tokens], e[:tokens]), Moments.of(u[tokens:], e[tokens:])
    change = ridge(fitted, other)
    lam = [scale * fitted.inputs.trace() / inputs for scale in RIDGES]
    eye = torch.eye(inputs + dead, dtype=torch.float64)

    def solved(m: Moments, penalty: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(m.inputs + penalty * eye, m.cross)

    left = [float((e[tokens:] - u[tokens:] @ solved(fitted, penalty)).square().sum()) for penalty in lam]
    if min(left) >= float(e[tokens:].square().sum()):
        assert not change.any()
    else:
        best = RIDGES[left.index(min(left))]
        both = fitted + other
        expected = solved(both, best * both.inputs.trace() / inputs)
        assert torch.allclose(change, expected, rtol=1e-5, atol=1e-8 * float(expected.abs().max() + 1))
    assert not change[inputs:].any()  # what is gone gets no weight
    assert (e - u @ change).square().sum() <= e.square().sum() * (1 + ROUNDING)


@given(seed=st.integers(0, 999), first=st.integers(1, 20), second=st.integers(0, 20))
def test_moments_add_up_and_tell_the_error(seed, first, second):
    u, e, change = normal(seed, first + second, 4), normal(seed + 1, first + second, 3), normal(seed + 2, 4, 3)
    whole = Moments.of(u, e)
    parts = Moments.of(u[:first], e[:first]) + Moments.of(u[first:], e[first:])
    for name in ("inputs", "cross", "lack_sum", "lack"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name))
    assert whole.tokens == parts.tokens == first + second
    assert parts.error(change) == pytest.approx(float((e - u @ change).square().sum()))


def test_a_ridge_that_only_fits_noise_is_not_taken():
    u = normal(0, 24, 12)
    e = normal(1, 24, 5)
    unlike = Moments.of(normal(2, 200, 12), 3 * normal(3, 200, 5))
    fitted = Moments.of(u, e)
    change = ridge(fitted, unlike)
    bold = torch.linalg.lstsq(u, e).solution
    assert unlike.error(bold) > float(unlike.lack)
    assert change.abs().max() < 0.2 * bold.abs().max()


class Blocks:
    """A model's blocks run by hand: what each puts out, dense and cut, on what the cut ones before it made."""

    def __init__(self, model: Any, plan: sspruner.Plan, ids: torch.Tensor) -> None:
        self.entering, self.cut = self._run(model, plan, ids)
        self.dense = [self._alone(model, i, flow) for i, flow in enumerate(self.entering)]

    @staticmethod
    def _blocks(model: Any) -> Any:
        return model.get_submodule(sspruner.trace(model).blocks)

    def _run(self, model: Any, plan: sspruner.Plan, ids: torch.Tensor) -> tuple[list[Any], list[torch.Tensor]]:
        entering, out = [], []

        def note(module: Any, args: Any, kwargs: Any, result: Any) -> None:
            entering.append((args, kwargs))
            out.append(result[0] if isinstance(result, tuple) else result)

        with sspruner.masked(model, plan), torch.no_grad():
            hooks = [b.register_forward_hook(note, with_kwargs=True) for b in self._blocks(model)]
            model(input_ids=ids, use_cache=False)
            for hook in hooks:
                hook.remove()
        return entering, out

    @torch.no_grad()
    def _alone(self, model: Any, number: int, given: Any) -> torch.Tensor:
        args, kwargs = given
        result = self._blocks(model)[number](*args, **kwargs)
        return result[0] if isinstance(result, tuple) else result

    def errors(self) -> list[float]:
        stream = [args[0] if args else kwargs["hidden_states"] for args, kwargs in self.entering]
        return [
            float((cut - dense).double().square().sum() / (dense - h).double().square().sum())
            for cut, dense, h in zip(self.cut, self.dense, stream, strict=True)
        ]


@pytest.mark.cover
@pytest.mark.parametrize("family", ["mamba2", "mamba", "falcon_mamba", "bamba", "granitemoehybrid", "falcon_h1"])
@pytest.mark.parametrize("kind", ["bias", "output"])
def test_errors_are_those_of_the_models_own_blocks_and_only_fall(family, kind):
    # A block that new values do not help keeps its own; of three random cuts they help one at least.
    model = zoo(family, **({"intermediate_size": 8} if family == "granitemoehybrid" else {}))
    axis = "channel" if family in ("mamba", "falcon_mamba") else "head"
    data, before, held = dataset(), weights(model), dataset()
    blocks = [f"{sspruner.trace(model).blocks}.{i}" for i in range(len(Blocks._blocks(model)))]
    helped = 0
    for seed in (1, 2, 3):
        plan = random_plan(sspruner.trace(model), (axis,), seed=seed, most=1)
        found = sspruner.refit(model, plan, kind, calibration=data)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert set(model.state_dict()) == set(before)
        assert found.plan.groups == plan.groups
        assert found.plan.made_by["refit"] == kind
        without, with_new = (Blocks(model, p, held.tokens).errors() for p in (plan, found.plan))
        cut = next(i for i, block in enumerate(blocks) if next(iter(plan.groups)).startswith(f"{block}."))
        first = found.errors[blocks[cut]]
        assert first[1] <= first[0]
        assert first == pytest.approx((without[cut], with_new[cut]), rel=1e-3)
        helped += first[1] < first[0]
    assert helped


@pytest.mark.slow
@examples(10)
@given(data=st.data(), kind=st.sampled_from(["bias", "output"]))
def test_no_blocks_error_rises_and_masked_is_sliced(data, kind):
    model = data.draw(zoo_models())
    graph = sspruner.trace(model)
    plan = data.draw(plans(graph))
    if data.draw(st.booleans()):
        plan = directions(plan, graph, seed=data.draw(st.integers(0, 99)))
    found = refitted(model, plan, kind, dataset(8, 24))
    assume(found is not None)
    assert all(after <= before for before, after in found.errors.values())
    if kind == "output":
        assert set(found.plan.updates) <= set(dict(model.named_parameters(remove_duplicate=False)))  # nothing is added
    sspruner.apply(model, found.plan)  # raises ProofError unless masked = sliced


def doubled(model: Any) -> None:
    """MLP neurons 2i and 2i + 1 alike, but for what reads them."""
    with torch.no_grad():
        for site in sspruner.trace(model).sites:
            if site.kind == "mlp":
                module = model.get_submodule(site.path)
                for layer in (module.gate_proj, module.up_proj):
                    layer.weight[1::2] = layer.weight[::2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["output", "bias"])
def test_neurons_that_others_repeat_cost_nothing_after_an_output_refit(kind):
    model = zoo("bamba", bias=False)
    doubled(model)
    graph = sspruner.trace(model)
    name, group = next((n, g) for n, g in graph.groups.items() if g.axis == "mlp")
    keep = torch.arange(group.units)[None] % 2 == 0
    plan = sspruner.Plan({name: sspruner.plans.reduction.reduction(keep)})
    found = sspruner.refit(model, plan, kind, calibration=dataset(64, 24))
    (before, after), *_ = found.errors.values()
    assert before > 1e-3
    assert after < (1e-4 if kind == "output" else 1) * before
    assert (after > 0.05 * before) == (kind == "bias")  # a mean cannot say what varies


def test_the_bias_is_the_mean_of_what_is_lacking():
    model = zoo("mamba2", bias=False)
    data, graph = dataset(), sspruner.trace(model)
    plan = random_plan(graph, ("head",), seed=3, most=1)
    layer = next(iter(plan.groups)).removesuffix(":head")
    out: list[torch.Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda m, a, result: out.append(result))
    with torch.no_grad():
        model(input_ids=data.tokens, use_cache=False)
        with sspruner.masked(model, plan):
            model(input_ids=data.tokens, use_cache=False)
    hook.remove()
    found = sspruner.refit(model, plan, "bias", calibration=data)
    assert list(found.plan.updates) == [f"{layer}.out_proj.bias"]
    mean = (out[0] - out[1]).double().mean((0, 1))
    assert torch.allclose(found.plan.updates[f"{layer}.out_proj.bias"].double(), mean, atol=1e-6)


@pytest.mark.parametrize("kind", ["output", "bias"])  # a bias divides by the number of tokens
@pytest.mark.parametrize(("family", "axis"), [("mamba2", "head"), ("qwen3_5_moe_text", "mlp")])
def test_padding_is_neither_solved_for_nor_counted(family, axis, kind):
    """In a shared expert of Qwen, too, which is given the tokens of all sequences in a row."""
    model = zoo(family)
    plan = random_plan(sspruner.trace(model), (axis,), seed=3)
    ids = tokens(8, 20)
    padded = torch.zeros(8, 20, dtype=torch.bool)
    padded[:, :15] = True
    found = [
        sspruner.refit(model, plan, kind, calibration=calibrated(*given))
        for given in ((ids, padded), (ids[:, :15], None))
    ]
    assert found[0].plan.updates
    for block, errors in found[0].errors.items():
        assert errors == pytest.approx(found[1].errors[block], rel=1e-3)
    for name, value in found[0].plan.updates.items():
        assert torch.allclose(value, found[1].plan.updates[name], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["head", "hidden"])
def test_any_batch_split_gives_the_same(monkeypatch, axis):
    model = zoo("zamba2") if axis == "head" else zoo("mamba2")
    plan, data = random_plan(sspruner.trace(model), (axis,), seed=5), dataset(9, 16)
    whole = sspruner.refit(model, plan, calibration=data)
    monkeypatch.setattr("sspruner.calibrate.sources.TOKENS_PER_BATCH", 32)  # two sequences at a time
    parts = sspruner.refit(model, plan, calibration=data)
    for name, value in whole.plan.updates.items():
        assert torch.allclose(value, parts.plan.updates[name], atol=1e-5 * float(value.abs().max()))


def test_a_block_keeps_its_old_values_where_new_ones_do_harm(monkeypatch):
    model = zoo("mamba2")
    plan = random_plan(sspruner.trace(model), ("head",), seed=3)
    monkeypatch.setattr(refitting, "ridge", lambda fitted, other: 10 + torch.zeros_like(fitted.cross))
    found = sspruner.refit(model, plan, calibration=dataset())
    assert found.plan.updates == {}
    assert all(before == after > 0 for before, after in found.errors.values())


def test_shared_blocks_are_solved_once_over_all_their_calls(monkeypatch):
    model = zoo("zamba2", num_mem_blocks=1)
    solved, solve = [], refitting._solve

    def noting(model: Any, writer: Any, kind: str) -> Any:
        solved.append((writer.weight, writer.fitted.tokens + writer.other.tokens))
        return solve(model, writer, kind)

    monkeypatch.setattr(refitting, "_solve", noting)
    graph = sspruner.trace(model)
    plan = random_plan(graph, ("mlp",), seed=1)
    found = sspruner.refit(model, plan, calibration=dataset())
    assert len(found.plan.updates) <= len(plan.groups)
    site = next(site for site in graph.sites if site.kind == "mlp")
    assert len(found.errors) == 1 + len(site.aliases) > 1
    assert solved == [(f"{site.path}.down_proj.weight", len(found.errors) * dataset().tokens.numel())]
    sspruner.apply(model, found.plan)


def test_where_the_stream_shrinks_the_dense_model_runs_beside_the_cut_one():
    model, data = zoo("mamba2"), dataset()
    plan = random_plan(sspruner.trace(model), ("hidden",), seed=2)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [b.register_forward_hook(lambda m, a, out: seen.append((a[0], out))) for b in model.backbone.layers]
    with torch.no_grad():
        model(input_ids=data.tokens, use_cache=False)
        with sspruner.masked(model, plan):
            model(input_ids=data.tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    (before, dense), (_, cut) = seen[0], seen[len(hooks)]
    found = sspruner.refit(model, plan, calibration=data)
    first, *_ = found.errors.values()
    assert first[0] == pytest.approx(float((cut - dense).square().sum() / (dense - before).square().sum()), rel=1e-4)


def test_what_follows_a_dropped_block_makes_up_for_it():
    model, plan = zoo("mamba2"), None
    blocks = sspruner.trace(model).groups["backbone.layers:block"]
    plan = sspruner.Plan({blocks.name: sspruner.plans.reduction.reduction(torch.tensor([[False, True, True]]))})
    data = dataset(32)
    found = sspruner.refit(model, plan, calibration=data)
    first, *_ = found.errors.values()
    assert first[1] < first[0]  # block 1 writes what block 0 would have, as far as its own inputs tell
    assert not any(name.startswith("backbone.layers.0.") for name in found.plan.updates)
    without, with_new = damages(model, [plan, found.plan], sspruner.trace(model), data.batches(8))
    assert with_new.kl < without.kl


def test_the_next_block_adds_what_a_dropped_one_did():
    model = zoo("mamba2", bias=True)
    with torch.no_grad():
        for layer in model.backbone.layers[:2]:
            layer.mixer.out_proj.weight.zero_()  # so each adds its bias alone
    plan = sspruner.Plan(
        {"backbone.layers:block": sspruner.plans.reduction.reduction(torch.tensor([[False, True, True]]))}
    )
    found = sspruner.refit(model, plan, "bias", calibration=dataset())
    both = sum(layer.mixer.out_proj.bias for layer in model.backbone.layers[:2])
    new = found.plan.updates["backbone.layers.1.mixer.out_proj.bias"]
    assert torch.allclose(new, both, atol=1e-6)
    assert found.errors["backbone.layers.1"][1] < 1e-9 < found.errors["backbone.layers.1"][0]


def test_values_of_a_scorer_are_where_a_refit_starts():
    model, data = zoo("mamba2", bias=False), None
    data = dataset()
    plan = random_plan(sspruner.trace(model), ("head",), seed=3, most=1)
    name = f"{next(iter(plan.groups)).removesuffix(':head')}.out_proj.bias"
    given = replace(plan, updates={name: torch.full_like(model.get_submodule(name[:-5]).weight[:, 0], 0.3)})
    found = sspruner.refit(model, given, calibration=data)
    assert torch.equal(found.plan.updates[name], given.updates[name])
    assert name.replace("bias", "weight") in found.plan.updates


@pytest.mark.slow
@pytest.mark.cover
@pytest.mark.parametrize("family", FAMILIES)
def test_a_refitted_plan_goes_through_files(family, tmp_path):
    model = zoo(family)
    plan = random_plan(sspruner.trace(model), (), seed=11)
    found = sspruner.refit(model, plan, calibration=dataset(8, 24)).plan
    found.save(tmp_path / "plan.json")
    read = sspruner.Plan.load(tmp_path / "plan.json")
    assert read == found
    other = copy.deepcopy(model)
    sspruner.apply(model, found)
    sspruner.apply(other, read)
    sspruner.save(model, tmp_path / "cut")
    loaded, _ = sspruner.load(tmp_path / "cut")
    with torch.no_grad():
        ids = tokens()
        expected = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(expected, other(input_ids=ids, use_cache=False).logits)
        assert torch.equal(expected, loaded(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize(
    ("axis", "arguments", "says"),
    [
        ("head", {"kind": "none"}, "must be bias or output"),
        ("head", {"count": 3}, "3 calibration sequences"),
        ("head", {"count": 4, "length": 3}, "12 calibration tokens for 16 unknowns"),
        ("weight", {}, "nothing to solve for on axis weight"),
    ],
)
def test_what_cannot_be_solved_is_refused_with_the_reason(axis, arguments, says):
    model = zoo("mamba2")
    size = {"count": arguments.pop("count", 8), "length": arguments.pop("length", 16)}
    scores = sspruner.score(model, "magnitude", axis=axis)
    plan = sspruner.plan(sspruner.trace(model), scores, sparsity=0.5)
    calibration = sspruner.calibration(tokens(size["count"], size["length"]), model, held_out=0)
    with pytest.raises(sspruner.InputError, match=says):
        sspruner.refit(model, plan, **arguments, calibration=calibration)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"refit": "output", "calibration": calibrated(tokens(4, 3))}, "12 calibration tokens for 16 unknowns"),
        ({"refit": "output", "calibration": calibrated(tokens(3, 16))}, "3 calibration sequences"),
        ({"refit": "bias", "limits": sspruner.Limits(parameters=0.9)}, "refit bias adds parameters"),
    ],
)
def test_prune_refuses_what_cannot_be_refitted_before_it_scores(monkeypatch, arguments, says):
    monkeypatch.setattr("sspruner.pruning.decide.walk", lambda *args, **kwargs: pytest.fail("scored"))
    with pytest.raises(sspruner.InputError, match=says):
        sspruner.prune(zoo("mamba2"), "magnitude", axis="head", **({"calibration": dataset()} | arguments))


def test_a_bias_is_solved_for_where_single_elements_go():
    model = tiny_model(bias=True)
    plan = sspruner.plan(sspruner.trace(model), sspruner.score(model, "magnitude", axis="weight"), sparsity=0.5)
    found = sspruner.refit(model, plan, "bias", calibration=dataset())
    assert {name.rpartition(".")[2] for name in found.plan.updates} == {"bias"}
    assert all(after < before for before, after in found.errors.values())


@pytest.mark.exhaustive
@pytest.mark.slow
def test_prune_refits_and_reports_the_damage_without(reference):
    model, tokenizer = copy.deepcopy(reference[0]), reference[1]
    data = sspruner.calibration("self", model, tokenizer, samples=12, seq_len=128, held_out=4)
    graph = sspruner.trace(model)
    result = sspruner.prune(
        model, axis="head", sparsity=0.25, calibration=data, refit="output", mode="mask", tokenizer=tokenizer
    )
    report = result.report
    assert report.refit["kind"] == "output"
    assert report.pruned["kl_to_dense"] < 0.75 * report.refit["without"]["kl_to_dense"]
    assert len(report.refit["errors"]) == 6
    sspruner.unmask(model)
    without = replace(result.plan, updates={})
    found = damages(model, [without, result.plan], graph, data.held_out_batches(8))
    assert [d.pruned_perplexity for d in found] == pytest.approx(
        [report.refit["without"]["perplexity"], report.pruned["perplexity"]]
    )


@pytest.mark.exhaustive
@pytest.mark.slow
def test_refit_on_the_command_line(tmp_path):
    small = ["--samples", "8", "--seq-len", "64", "--seed", "1"]
    done = cli("prune", "--axis", "head_dim", "--sparsity", "0.25", "--refit", "bias", *small, "--out",
                     str(tmp_path / "cut"), "--json", str(tmp_path / "report.json"))  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "without refit bias: perplexity" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["refit"]["kind"] == "bias"
    assert set(report["refit"]["without"]) == {"perplexity", "perplexity_ratio", "kl_to_dense"}
    fewer = cli("prune", "--axis", "head", "--refit", "output", *small, "--samples", "7")
    assert fewer.exit_code == 2
    assert "448 calibration tokens for 512 unknowns" in fewer.stderr
    assert len(complaints(fewer).strip().splitlines()) == 1
    wrong = cli("prune", "--refit", "all")
    assert wrong.exit_code == 2
    assert "must be one of none, bias, output" in wrong.stderr
