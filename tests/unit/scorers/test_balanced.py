"""The balanced basis: exact Gramians, the best projector of its rank, and a state that means the same in any basis."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.calibrate import state
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Projection
from sspruner.plans.reduction import projections as projections_of
from sspruner.runtime.projected_state import project_state
from sspruner.scoring.scorer import Scorer, check_scorer_class
from sspruner_plugins.balanced import balance
from support import oracle
from support.command import run as cli
from support.examples import examples
from support.ghost_weights import weights
from support.mamba2_state import close as near
from support.mamba2_state import projections
from support.tiny import close, logits, models, tiny_model, tokens
from support.zoo import zoo

PROJECTED = ("mamba2", "zamba2", "bamba", "granitemoehybrid", "falcon_h1", "nemotron_h")
WEIGHTS = ({"weights": "none"}, {"weights": "output"})
SIZES = st.sampled_from([1, 3, 32, 64])


def slow_gramian(p: Any, w: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """sum w h h^T, every state written down: fp64 (G, N, N)."""
    b, T, H, P = p.x.shape
    G, N = p.B.shape[2:]
    h = oracle.states(p).view(b, T, G, H // G, P, N)
    w = (w.double() * mask[..., None, None]).view(b, T, G, H // G, P)
    return torch.einsum("btgkp,btgkpn,btgkpm->gnm", w, h, h)


def gramians(sets: int, units: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random Gramians over six orders of magnitude, of so many directions at most: fp64 (sets, N, N)."""
    generator = torch.Generator().manual_seed(seed)

    def one() -> torch.Tensor:
        rows = torch.randn(sets, rank, units, generator=generator, dtype=torch.float64)
        return rows.mT @ (rows * 10 ** (6 * torch.rand(sets, rank, 1, generator=generator, dtype=torch.float64) - 3))

    return one(), one()


def objective(reached: torch.Tensor, read: torch.Tensor, projector: torch.Tensor) -> torch.Tensor:
    """|| L_o^T (I - Pi) L_c ||^2 = tr (I - Pi)^T W_o (I - Pi) W_c, by set."""
    lost = torch.eye(reached.shape[-1], dtype=torch.float64) - projector
    return (lost.mT @ read @ lost @ reached).diagonal(dim1=-2, dim2=-1).sum(-1)


@given(projections(), SIZES, st.integers(0, 99))
def test_the_weighted_gramian_is_that_of_the_recurrence(drawn: tuple, size: int, seed: int) -> None:
    p, mask = drawn
    w = weights(p.x, seed)
    near(state.weighted_gramian(p, w, mask, size), slow_gramian(p, w, mask))


@given(projections(torch.float64), SIZES, st.integers(0, 99))
def test_its_algorithm_is_exact_and_without_weights_it_is_the_gramian(drawn: tuple, size: int, seed: int) -> None:
    p, mask = drawn
    w = weights(p.x, seed)
    near(state.weighted_gramian(p, w, mask, size), slow_gramian(p, w, mask), 1e-10)
    near(state.weighted_gramian(p, torch.ones_like(w), mask, size), state.gramian(p, mask), 1e-10)
    C = p.C * mask[..., None, None]
    near(state.observability(p.C, mask), torch.einsum("btgn,btgm->gnm", C, C), 1e-12)


@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 14), st.integers(0, 999))
def test_balancing_any_two_gramians(sets: int, units: int, rank: int, seed: int) -> None:
    """Of any rank, 0 too: sorted and finite values, an inverse pair, and both Gramians equal and diagonal in it."""
    reached, read = gramians(sets, units, rank, seed)
    encode, decode, values = balance(reached, read)
    assert encode.isfinite().all()
    assert decode.isfinite().all()
    assert (values[:, 1:] <= values[:, :-1]).all()
    assert (values > 0).all()
    identity = torch.eye(units, dtype=torch.float64).expand(sets, -1, -1)
    torch.testing.assert_close(encode @ decode, identity, rtol=0, atol=1e-5)
    largest = values[:, :1, None]
    for balanced in (encode @ reached @ encode.mT, decode.mT @ read @ decode):
        assert (balanced - torch.diag_embed(values)).abs().div(largest).max() < 1e-3 or rank < units
    products = torch.linalg.eigvals(reached @ read).abs().sqrt().sort(descending=True).values  # an independent way
    if rank >= units:
        assert (products - values).abs().max() <= 1e-3 * values.max()


@given(st.integers(2, 10), st.integers(0, 999), st.data())
def test_no_projector_of_its_rank_is_better(units: int, seed: int, data: st.DataObject) -> None:
    """Not a selection of coordinates, and not a projector drawn at random or near it; its error is that of the rest."""
    reached, read = gramians(2, units, units + 2, seed)
    encode, decode, values = balance(reached, read)
    k = data.draw(st.integers(1, units - 1))
    best = objective(reached, read, decode[:, :, :k] @ encode[:, :k])
    torch.testing.assert_close(best, values[:, k:].square().sum(-1), rtol=1e-3, atol=1e-6 * float(values.max() ** 2))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        keep = torch.randperm(units, generator=generator)[:k]
        selected = torch.zeros(units, units, dtype=torch.float64)
        selected[keep, keep] = 1
        assert (objective(reached, read, selected) >= best * (1 - 1e-6)).all()
        E = encode[:, :k] + 0.1 * encode[:, :k].abs().max() * torch.randn(2, k, units, generator=generator).double()
        T = torch.linalg.pinv(E) if data.draw(st.booleans()) else decode[:, :, :k]
        assert (objective(reached, read, T @ E) >= best * (1 - 1e-6)).all()


def rotated(model: Any, seed: int) -> Any:
    """The same function: every group's state in another, oblique basis."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for site in sspruner.trace(model).layers:
        mixer = other.get_submodule(site.path)
        G, N = site.layout.count(("group",)), site.layout.count(("state",))
        R = torch.linalg.qr(torch.randn(G, N, N, generator=generator, dtype=torch.float64)).Q
        R = R * (0.7 + 0.6 * torch.rand(G, N, 1, generator=generator, dtype=torch.float64))
        project_state(mixer, R.float(), torch.linalg.inv(R).float())
    return other


@pytest.mark.slow
@pytest.mark.cover(most=4)
@pytest.mark.parametrize("options", WEIGHTS, ids=str)
@pytest.mark.parametrize("family", PROJECTED)
def test_scores_do_not_depend_on_the_basis_in_which_the_state_is_held(family: str, options: dict) -> None:
    model = zoo(family)
    other, data = rotated(model, 3), tokens(6, 24)
    close(logits(other, tokens()), logits(model, tokens()), model, tokens())
    first, second = (sspruner.score(m, "balanced", options=options, calibration=data) for m in (model, other))
    for name, values in first.importance.items():
        assert (second.importance[name] - values).abs().max() <= 1e-3 * values.max()
    cut = [sspruner.plan(sspruner.trace(m), s, sparsity=0.5) for m, s in ((model, first), (other, second))]
    outputs = [logits(sspruner.apply(m, plan), tokens()) for m, plan in zip((model, other), cut, strict=True)]
    assert (outputs[0] - outputs[1]).abs().max() <= 0.05 * outputs[0].abs().max()


@given(models(dtypes=(torch.float32,), least_state=2), st.sampled_from(WEIGHTS))
@examples(20)
def test_scores_are_what_the_definition_says(model: Any, options: dict) -> None:
    """From the states of a step-by-step recurrence, and the eigenvalues of W_c W_o."""
    data = sspruner.calibration(tokens(5, 17), model, samples=5, held_out=0)
    found = sspruner.score(model, "balanced", options=options, calibration=data)
    site = sspruner.trace(model).layers[0]
    hidden = model.backbone.layers[0].norm(model.backbone.embeddings(data.tokens))
    mixer = model.get_submodule(site.path)
    with torch.no_grad():
        p = site.family.project(mixer, hidden, data.mask)
        w = torch.ones_like(p.x)
        if options["weights"] == "output":
            y, gate = oracle.output(p).flatten(2), torch.nn.functional.silu(p.z.double())  # (b, T, D)
            squares = (y * gate).square().unflatten(-1, (mixer.n_groups, -1))
            rms = (squares.mean(-1, keepdim=True) + mixer.norm.variance_epsilon).expand_as(squares).flatten(2)
            reading = mixer.out_proj.weight.double().square().sum(0)
            w = (gate.square() / rms * mixer.norm.weight.double().square() * reading).view_as(p.x)
        reached = slow_gramian(p, w, data.mask)
        read = torch.einsum("btgn,btgm->gnm", p.C.double(), p.C.double())
    values = torch.linalg.eigvals(reached @ read).abs().sqrt().sort(descending=True).values / data.mask.sum()
    assert (found.importance[f"{site.path}:state"] - values).abs().max() <= 2e-3 * values.max()


def test_dead_states() -> None:
    model = tiny_model(state=12, layers=1)
    with torch.no_grad():
        group = sspruner.trace(model).groups["backbone.layers.0.mixer:state"]
        for member in group.members:
            model.get_parameter(member.tensor)[member.index[0, :5].flatten()] = 0
    ids = tokens()
    expected = logits(model, ids)
    result = sspruner.prune(model, basis="balanced", keep=7, calibration=tokens(2, 12))
    assert result.report.layers["backbone.layers.0.mixer:state"] == {"before": 12, "after": 7}
    assert (result.scores.importance["backbone.layers.0.mixer:state"][0, 7:] < 1e-6).all()
    close(logits(model, ids), expected, model, ids)  # what was dead is gone, and nothing else


@pytest.mark.parametrize("one_shot", [False, True])
def test_sequential_and_one_shot_keep_the_first_directions(one_shot: bool) -> None:
    model = tiny_model(groups=2, state=6, layers=3)
    result = sspruner.prune(model, "balanced", sparsity=0.5, one_shot=one_shot, calibration=tokens(6, 24))
    assert result.report.basis == "balanced"
    for name, r in result.plan.groups.items():
        encode, decode = result.scores.bases[name]
        assert r == Projection(encode[:, :3], decode[:, :, :3])
    assert result.report.proof is not None
    assert result.report.proof.parameters_added == 3 * 2 * 2 * 3 * 6


def test_score_plan_apply_through_files_is_prune(tmp_path: Path) -> None:
    model, data = tiny_model(groups=2, state=6), tokens(6, 24)
    data = sspruner.calibration(data, model, samples=4)
    scores = sspruner.score(model, "balanced", calibration=data)
    scores.save(tmp_path / "scores.safetensors")
    read = sspruner.Scores.load(tmp_path / "scores.safetensors")
    assert read.importance.keys() == read.bases.keys() == scores.bases.keys()
    sspruner.plan(sspruner.trace(model), read, keep=2).save(tmp_path / "plan.json")
    one = sspruner.apply(copy.deepcopy(model), Plan.load(tmp_path / "plan.json"))
    two = sspruner.prune(model, "balanced", keep=2, one_shot=True, calibration=data).model
    assert torch.equal(logits(one, tokens()), logits(two, tokens()))


def test_scores_whose_basis_is_gone_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny_model()
    path = tmp_path / "scores.safetensors"
    sspruner.score(model, "balanced", calibration=tokens(6, 24)).save(path)
    whole = load_file(path)
    name = "backbone.layers.0.mixer:state"
    for spoilt in (
        {k: v for k, v in whole.items() if k != f"{name}.decode"},
        whole | {f"{name}.encode": whole[f"{name}.encode"] * float("nan")},
        whole | {f"{name}.encode": whole[f"{name}.encode"][:, :2]},
        {k: v for k, v in whole.items() if k != name},
    ):
        save_file(spoilt, path)
        with pytest.raises(sspruner.InputError, match=f"the basis of {name} is not whole; score again"):
            sspruner.Scores.load(path)


def test_scores_from_the_cache_have_their_basis() -> None:
    model = tiny_model()
    data = sspruner.calibration(tokens(6, 24), model, samples=4)
    plans = [
        sspruner.prune(copy.deepcopy(model), "balanced", keep=2, one_shot=True, calibration=data, cache=True)
        for _ in "12"
    ]
    assert [p.scores.from_cache for p in plans] == [False, True]
    assert plans[0].plan.groups == plans[1].plan.groups
    assert len(projections_of(plans[1].plan.groups)) == 2


@pytest.mark.slow
def test_beside_cuts_of_other_axes_and_other_sizes_by_layer() -> None:
    model = zoo("zamba2")
    axis = {"state": 0.5, "head_dim": 0.5, "mlp": 0.5}
    scorers = {"state": "balanced", "head_dim": "ghost", "mlp": "magnitude"}
    other = {"*layers.0.*state": 0.8}
    result = sspruner.prune(model, scorers, axis=axis, ratios=other, calibration=tokens(6, 24))
    sizes = {name: r.after for name, r in projections_of(result.plan.groups).items()}
    assert len(set(sizes.values())) == 2
    assert result.report.basis == "balanced, select"
    assert result.report.proof is not None


def test_a_basis_without_a_scorer_and_a_scorer_without_the_basis() -> None:
    data = tokens(6, 24)
    made = [
        sspruner.prune(tiny_model(), calibration=data, **how) for how in ({"basis": "balanced"}, {"scorer": "balanced"})
    ]
    assert made[0].plan.groups == made[1].plan.groups
    mixed = sspruner.prune(tiny_model(), basis="balanced", axis={"state": 0.5, "head": 0.5}, calibration=data)
    assert mixed.report.scorer == "balanced, ghost"
    for wrong, why in (
        ({"basis": "polar"}, r"unknown basis 'polar'; installed scorers have: balanced, select"),
        ({"basis": "balanced", "scorer": "ghost"}, r"scorer 'ghost' has basis 'select'; leave one of them out"),
        ({"basis": "balanced", "axis": "head"}, r"basis 'balanced': is one of the state; add axis state"),
        ({"basis": "balanced", "axis": "head", "scorer": "ghost"}, r"is one of the state"),
        ({"basis": "select", "scorer": "balanced"}, r"scorer 'balanced' has basis 'balanced'"),
        ({"scorer": "balanced", "options": {"weights": "all"}}, r"weights='all'; known: output, none"),
    ):
        with pytest.raises(sspruner.InputError, match=why):
            sspruner.prune(tiny_model(), calibration=data, **wrong)


def test_a_class_has_a_basis_and_says_it_or_neither() -> None:
    class Half(Scorer):
        name, axes, basis = "half", {"state"}, "polar"

        def observe(self, view: sspruner.SSMView) -> None: ...

        def importance(self) -> torch.Tensor: ...

    with pytest.raises(sspruner.PluginError, match=r"basis='polar' and coordinates\(\) go together"):
        check_scorer_class(Half, "mine")
    Half.coordinates = lambda self: (torch.zeros(1, 2, 2),) * 2
    check_scorer_class(Half, "mine")
    Half.axes = {"state", "head"}
    with pytest.raises(sspruner.PluginError, match="its only axis is 'state'"):
        check_scorer_class(Half, "mine")


def test_the_command_line(tmp_path: Path) -> None:
    source = str(sspruner.save(tiny_model(), tmp_path / "model"))
    text = tmp_path / "ids.txt"
    args = ["prune", source, "--calibration", "self", "--samples", "4", "--seq-len", "24"]
    done = cli(*args, "--basis", "balanced", "--keep", "2", "--out", str(tmp_path / "out"), "--json", str(text))
    assert done.exit_code == 0, done.output
    report = json.loads(text.read_text())
    assert (report["basis"], report["scorer"]) == ("balanced", "balanced")
    loaded, _ = sspruner.load(tmp_path / "out")
    assert loaded.backbone.layers[0].mixer.state_encode.shape == (1, 2, 6)
    wrong = cli(*args, "--basis", "balanced", "--scorer", "ghost")
    assert wrong.exit_code == 2
    assert "scorer 'ghost' has basis 'select'" in wrong.output


@pytest.fixture(scope="module")
def damage() -> Any:
    """Perplexity increases on the reference model by scorer and cut, on text of its own."""
    model, tokenizer = sspruner.load(dtype="float32")
    data = sspruner.calibration("self", model, tokenizer, samples=24, seq_len=128, seed=1)

    def increase(scorer: str, sparsity: float) -> float:
        cut = sspruner.prune(copy.deepcopy(model), scorer, sparsity=sparsity, calibration=data, mode="mask").report
        return cut.pruned["perplexity"] / cut.dense["perplexity"] - 1

    return increase


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("sparsity", [0.75, 0.9, 0.97])
def test_on_the_trained_model_at_most_a_fifth_of_the_damage_of_selection(damage: Any, sparsity: float) -> None:
    assert damage("balanced", sparsity) <= 0.2 * damage("ghost", sparsity)


def test_each_layer_is_scored_behind_the_projections_before_it() -> None:
    model = tiny_model(groups=2, state=6, layers=3)
    data = sspruner.calibration(tokens(6, 24), model, samples=6, held_out=0)
    result = sspruner.prune(copy.deepcopy(model), "balanced", keep=1, calibration=data)
    last = "backbone.layers.2.mixer:state"
    before = Plan({name: r for name, r in result.plan.groups.items() if name != last})
    behind = sspruner.score(sspruner.apply(copy.deepcopy(model), before), "balanced", calibration=data)
    dense = sspruner.score(model, "balanced", calibration=data)
    found, expected = result.scores.importance[last], behind.importance[last]
    change = (dense.importance[last] - expected).abs().max()
    assert change > 1e-3 * expected.max()
    assert (found - expected).abs().max() <= 0.05 * change


def test_too_few_tokens_are_refused() -> None:
    """Gramians of fewer tokens than directions have directions that nothing determines."""
    model = zoo("mamba2")
    size = sspruner.trace(model).layers[0].layout.sizes["state"]
    with pytest.raises(
        sspruner.InputError, match=rf"{size - 1} calibration tokens do not determine Gramians of {size}"
    ):
        sspruner.score(model, "balanced", calibration=tokens(1, size - 1))
    assert sspruner.score(model, "balanced", calibration=tokens(1, size)).importance
