"""rrqr, last and sparsessm against their definitions, by plain loops in fp64; symmetries, invariances, dead input."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

import sspruner
from sspruner.calibrate.selective import energy_by_channel, energy_sum
from sspruner.graph.family import SelectiveProjected
from sspruner.graph.group import as_rows
from sspruner.scoring.known import find_scorer
from sspruner_plugins.last import Last, share
from sspruner_plugins.rrqr import RRQR, pivoted
from sspruner_plugins.sparsessm import SparseSSM
from support.examples import examples
from support.mamba1_state import close, projections, rows, slow_energy, states
from support.scoring import batches_of, importance, loose, shown
from support.tiny import models, tiny_model, tokens
from support.zoo import zoo, zoo_models

FP32 = (torch.float32,)
MAMBA1 = ("mamba", "falcon_mamba", "jamba", "zamba")
STATES = ("mamba2", "zamba2", *MAMBA1)
SCORERS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("rrqr", {}, STATES),
    ("last", {}, STATES),
    ("last", {"input": "weights"}, STATES),
    ("sparsessm", {}, MAMBA1),
]
every_scorer = pytest.mark.parametrize(("name", "options", "families"), SCORERS)


# rrqr


def test_the_energy_of_keys_is_a_root_mean_square() -> None:
    model, mask = zoo("qwen3_5_text"), torch.ones(2, 19, dtype=torch.bool)
    mask[1, 7:] = False
    with batches_of(19):
        scores = importance(model, tokens(2, 19), "rrqr", mask=mask, options={"variant": "energy"})
        views = shown(model, tokens(2, 19), "state", mask=mask)
    for name, found in scores.items():
        B = torch.cat([view.B[view.mask] for view in views if view.group.name == name]).double()  # (tokens, G, N)
        torch.testing.assert_close(found.double(), B.square().mean(0).sqrt(), rtol=1e-5, atol=0)


def slow_qrcp(X: torch.Tensor) -> tuple[list[int], list[float]]:
    """Gram-Schmidt by hand: the pivots in their order, and what is left of each outside the span of those before it."""
    left, order, norms = X.double().clone(), list[int](), list[float]()
    for _ in range(X.shape[1]):
        length = [-1.0 if n in order else float(left[:, n].norm()) for n in range(X.shape[1])]
        best = max(range(X.shape[1]), key=lambda n: length[n])
        order.append(best)
        norms.append(length[best])
        if length[best] > 0:
            q = left[:, best] / length[best]
            for _ in range(2):  # twice is enough (Kahan)
                left = left - q[:, None] * (q @ left)
    return order, norms


@st.composite
def stacks(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """(X, its rank): columns of very different sizes, the last ones combinations of the others, in any order."""
    rank, extra = draw(st.integers(1, 7)), draw(st.integers(0, 4))
    length = draw(st.integers(rank, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    free = torch.randn(length, rank, generator=generator, dtype=torch.float64)
    free = free * 10 ** (2 * torch.rand(rank, generator=generator, dtype=torch.float64) - 1)
    bound = free @ torch.randn(rank, extra, generator=generator, dtype=torch.float64)
    return torch.cat([free, bound], 1)[:, torch.randperm(rank + extra, generator=generator)], rank


@given(stacks())
def test_rrqr_takes_the_pivots_of_a_qr_of_the_stack(drawn: tuple[torch.Tensor, int]) -> None:
    X, rank = drawn
    order, norms = slow_qrcp(X)
    assume(norms[rank - 1] > 1e-5 * norms[0])  # nearer to dependent than that, squares cannot tell
    score = pivoted(X.T @ X)
    found = score.argsort(descending=True)
    assert found[:rank].tolist() == order[:rank]
    torch.testing.assert_close(score[found[:rank]], torch.tensor(norms[:rank]).double(), rtol=1e-5, atol=0)
    assert (score[found[rank:]] < 1e-6 * norms[0]).all()  # what depends on the others comes last,
    energy = X.square().sum(0)[found[rank:]]
    assert torch.equal(energy, energy.sort(descending=True).values)  # by its own energy


def test_rrqr_falls_strictly_from_pivot_to_pivot() -> None:
    """Equal and orthogonal columns: an order all the same, the first first."""
    score = pivoted(torch.eye(200, dtype=torch.float64)).float()
    assert (score.diff() < 0).all()
    assert float(score[-1]) == pytest.approx(1, rel=1e-3)


def test_rrqr_drops_the_copy_and_keeps_the_small_one() -> None:
    """The reason for it: a loud state that says what another says goes before a quiet one that is alone."""
    loud, quiet = torch.randn(50, dtype=torch.float64), 0.1 * torch.randn(50, dtype=torch.float64)
    X = torch.stack([0.9 * loud, quiet, loud], 1)
    assert pivoted(X.T @ X).argsort(descending=True).tolist() == [2, 1, 0]


@pytest.mark.slow
@examples(15)
@given(zoo_models(STATES), st.integers(1, 19))
def test_rrqr_on_a_model_is_the_qr_of_its_stacked_b(model: torch.nn.Module, length: int) -> None:
    mask = torch.arange(19) < torch.tensor([19, length])[:, None]
    with batches_of(19):
        scores = importance(model, tokens(2, 19), "rrqr", mask=mask)
        views = shown(model, tokens(2, 19), "state", mask=mask)
    for name, found in scores.items():
        X = torch.cat([view.B[view.mask] for view in views if view.group.name == name]).double()  # (tokens, G, N)
        assert len(X) == 19 + length
        for g, score in enumerate(found):
            _, norms = slow_qrcp(X[:, g])
            rank = sum(norm > 1e-4 * norms[0] for norm in norms)
            expected = torch.tensor(norms[:rank]) / len(X) ** 0.5
            # S belongs to the place, not to the state: near-equal residuals may change places in fp32
            best = score.sort(descending=True).values[:rank]
            torch.testing.assert_close(best, expected.float(), rtol=1e-3, atol=1e-5 * float(expected[0]))


# last


def slow_energy_of_last(views: list[sspruner.SSMView]) -> torch.Tensor:
    """e of every state, one token, head or channel and state at a time: fp64 (G, N)."""
    G, N = views[0].group.groups, views[0].group.units
    K = views[0].dt[0, 0].numel() // G
    b2, c2, decay = (torch.zeros(G, K, N, dtype=torch.float64) for _ in range(3))
    count = 0
    for view in views:
        A = view.A.double().reshape(G, K, -1).expand(G, K, N)
        for row, t in view.mask.nonzero().tolist():
            count += 1
            dt = view.dt[row, t].double().view(G, K)
            for g in range(G):
                for k in range(K):
                    for n in range(N):
                        b2[g, k, n] += (dt[g, k] * view.B[row, t, g, n].double()) ** 2
                        c2[g, k, n] += view.C[row, t, g, n].double() ** 2
                        decay[g, k, n] += torch.exp(dt[g, k] * A[g, k, n])
    return ((b2 / count) * (c2 / count) / (1 - decay / count) ** 2).sum(1)


def slow_share(energy: torch.Tensor) -> torch.Tensor:
    """The states sorted, the strongest first, and each one's part of the sum so far."""
    order = energy.flatten().argsort(descending=True).tolist()
    result, so_far = torch.zeros(energy.numel(), dtype=torch.float64), 0.0
    for i in order:
        so_far += float(energy.flatten()[i])
        result[i] = float(energy.flatten()[i]) / so_far if so_far else 0.0
    return result.view(energy.shape)


@given(st.lists(st.floats(0, 1e6).filter(lambda e: e == 0 or e > 1e-6), min_size=1, max_size=9, unique=True))
def test_share_is_the_part_of_the_stronger_ones(values: list[float]) -> None:
    energy = torch.tensor(values, dtype=torch.float64)
    found = share(energy)
    torch.testing.assert_close(found, slow_share(energy), rtol=1e-12, atol=0)
    assert ((found >= 0) & (found <= 1)).all()
    assert found[energy.argmax()] == (1 if energy.any() else 0)
    order = energy.argsort()
    assert (found[order].diff() >= 0).all()  # within a layer: as the energies
    torch.testing.assert_close(share(energy * 7.0), found)


def test_share_of_equal_states_is_equal() -> None:
    assert share(torch.tensor([2.0, 1.0, 1.0, 0.0])).tolist() == [1.0, 0.25, 0.25, 0.0]
    assert share(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.cover
@pytest.mark.parametrize("family", STATES)
def test_last_is_its_formula(family: str) -> None:
    model = zoo(family, state=3)
    mask = torch.arange(7) < torch.tensor([7, 4])[:, None]
    for size in (7, 4096):
        with batches_of(size):
            scores = importance(model, tokens(2, 7), "last", mask=mask)
            views = shown(model, tokens(2, 7), "state", mask=mask)
        assert scores
        for name, found in scores.items():
            energy = slow_energy_of_last([view for view in views if view.group.name == name])
            torch.testing.assert_close(found, slow_share(energy).float(), rtol=2e-4, atol=1e-6)


def constant(*, dt: float, A: list[float], B: list[float], C: list[float], T: int = 5) -> SimpleNamespace:
    """A view of one Mamba1 channel that does not change with time."""
    return SimpleNamespace(
        B=torch.tensor(B).expand(1, T, 1, -1), C=torch.tensor(C).expand(1, T, 1, -1), dt=torch.full((1, T, 1, 1), dt),
        A=torch.tensor(A).view(1, 1, -1), mask=torch.ones(1, T, dtype=torch.bool), tokens=T,
        group=SimpleNamespace(groups=1, units=len(A)), projected=None,
    )  # fmt: skip


def test_last_of_a_system_that_does_not_change_is_the_paper_s() -> None:
    """The largest gain over all frequencies of h' = lambda h + dt B x, y = C h, for each state alone."""
    dt, A, B, C = 0.2, [-0.3, -2.0, -9.0, -0.01], [0.5, -3.0, 4.0, 0.02], [1.0, 2.0, -1.5, 0.7]
    z = torch.exp(1j * torch.linspace(-torch.pi, torch.pi, 20001, dtype=torch.float64))  # the circle, 1 on it
    gains = [
        (c * dt * b / (z - torch.tensor(dt * a).double().exp())).abs().max() for a, b, c in zip(A, B, C, strict=True)
    ]
    scorer = Last()
    scorer.observe(constant(dt=dt, A=A, B=B, C=C))
    expected = slow_share(torch.stack(gains).square())
    torch.testing.assert_close(scorer.importance()[0], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("dt", "A"), [(0.0, [-1.0, -2.0]), (0.5, [-0.0, -1.0]), (1e-30, [-1e-3, -1.0]), (1e3, [-1e3, -1.0])]
)
def test_last_is_finite_where_nothing_is_forgotten(dt: float, A: list[float]) -> None:
    scorer = Last()
    scorer.observe(constant(dt=dt, A=A, B=[1.0, 1.0], C=[1.0, 1.0]))
    found = scorer.importance()
    assert found.isfinite().all()
    assert ((found >= 0) & (found <= 1)).all()
    if A[0] == 0:
        assert found[0, 0] == 1  # what never forgets has the largest gain


def by_hand(family: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """(model, scores of `last` by weights) from parameters named by hand, in fp64."""
    model, expected = zoo(family), {}
    for name in sspruner.trace(model).on_axis("state"):
        mixer = model.get_submodule(name.rpartition(":")[0])
        w = {key: p.detach().double() for key, p in mixer.named_parameters()}
        energy = torch.zeros(2 if family in ("mamba2", "zamba") else 1, 6, dtype=torch.float64)
        for g in range(len(energy)):
            for n in range(6):
                if family == "mamba2":  # in_proj: z 16, x 16, B 2 x 6, C 2 x 6, dt 4; two heads in a group
                    i = 32 + 6 * g + n
                    write, read = (torch.cat([w["in_proj.weight"][r], w["in_proj.bias"][r, None]]) for r in (i, i + 12))
                    dt, A = F.softplus(w["dt_bias"][2 * g : 2 * g + 2]), -w["A_log"][2 * g : 2 * g + 2].exp()
                elif family == "mamba":  # x_proj: dt 3, B 6, C 6
                    write, read = w["x_proj.weight"][3 + n], w["x_proj.weight"][9 + n]
                    dt, A = F.softplus(w["dt_proj.bias"]), -w["A_log"][:, n].exp()
                else:  # zamba: the same for each head
                    write, read = w["x_proj_weight"][g, 3 + n], w["x_proj_weight"][g, 9 + n]
                    dt, A = F.softplus(w["dt_proj_bias"][g]), -w["A_log"][g, :, n].exp()
                gain = write.norm() * read.norm() * dt / (1 - (dt * A).exp())
                energy[g, n] = gain.square().sum()
        expected[name] = slow_share(energy).float()
    return model, expected


@pytest.mark.parametrize("family", ["mamba2", "mamba", "zamba"])
def test_last_by_weights_is_its_formula(family: str) -> None:
    model, expected = by_hand(family)
    found = sspruner.score(model, "last", options={"input": "weights"}).importance
    assert sorted(found) == sorted(expected)
    for name, scores in found.items():
        torch.testing.assert_close(scores, expected[name], rtol=1e-5, atol=1e-8)


def test_last_by_weights_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    assert sspruner.score(model, "last", options={"input": "weights"}).metadata["tokens"] == "0"
    with pytest.raises(sspruner.InputError, match=r"input='weight'; known: activations, weights"):
        sspruner.score(model, "last", options={"input": "weight"})


# sparsessm


@given(projections(torch.float64), st.integers(1, 9))
def test_the_energy_of_a_channel_is_that_of_the_recurrence(
    drawn: tuple[SelectiveProjected, torch.Tensor], size: int
) -> None:
    p, mask = drawn
    slow = (states(p).square() * mask[..., None, None, None]).sum((0, 1))  # (G, P, N)
    close(energy_by_channel(p, mask, size), slow, 1e-12)
    close(energy_by_channel(p, mask, size).sum(1), slow_energy(p, mask), 1e-12)
    close(energy_by_channel(p).sum(1), energy_sum(p), 1e-12)
    b = p.x.shape[0]
    close(sum(energy_by_channel(rows(p, slice(i, i + 1)), mask[i : i + 1]) for i in range(b)), slow, 1e-12)


@given(projections())
def test_the_energy_of_a_channel_in_narrow_types(drawn: tuple[SelectiveProjected, torch.Tensor]) -> None:
    p, mask = drawn
    close(energy_by_channel(p, mask), (states(p).square() * mask[..., None, None, None]).sum((0, 1)))
    p = replace(p, **{name: getattr(p, name).bfloat16() for name in ("x", "B", "C")})
    close(energy_by_channel(p, mask), (states(p).square() * mask[..., None, None, None]).sum((0, 1)))
    assert energy_by_channel(p).dtype == torch.float64


@pytest.mark.parametrize("family", MAMBA1)
@pytest.mark.parametrize("axis", ["state", "decay"])
def test_sparsessm_is_its_formula(family: str, axis: str) -> None:
    model, mask = zoo(family), torch.arange(19) < torch.tensor([19, 8])[:, None]
    if axis == "decay" and family == "zamba":  # its A_log has three dimensions
        with pytest.raises(sspruner.InputError, match="axis 'decay'"):
            importance(model, tokens(2, 19), "sparsessm", axis=axis)
        return
    views = shown(model, tokens(2, 19), "state", mask=mask)
    for size in (4096, 19):
        with batches_of(size):
            scores = importance(model, tokens(2, 19), "sparsessm", axis=axis, mask=mask)
        assert [name.rpartition(":")[0] for name in scores] == [view.layer for view in views]
        for view, found in zip(views, scores.values(), strict=True):
            a_log = model.get_submodule(view.layer).A_log.detach().double()
            energy = (states(view.projected).square() * mask[..., None, None, None]).sum((0, 1))  # (G, P, N)
            expected = a_log.view(energy.shape).square() * energy
            expected = expected[0] if axis == "decay" else expected.sum(1)
            torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_sparsessm_is_for_mamba1_only() -> None:
    with pytest.raises(sspruner.InputError, match=r"backbone\.layers\.0\.mixer:state.*only Mamba1-type mixers.* ghost"):
        importance(tiny_model(), tokens(), "sparsessm")


def test_a_zeroed_entry_of_a_log_is_a_decay_rate_of_one() -> None:
    """Where it is zero already it costs nothing; nothing gets smaller; the other entries stay to the bit."""
    model, ids = zoo("mamba"), tokens(3, 19)
    with torch.no_grad():
        model.backbone.layers[1].mixer.A_log[:, 2] = 0
    dense = copy.deepcopy(model)
    scores = importance(model, ids, "sparsessm", axis="decay")
    found = scores["backbone.layers.1.mixer:decay"]
    assert torch.equal(found == 0, dense.backbone.layers[1].mixer.A_log == 0)
    result = sspruner.prune(model, "sparsessm", axis="decay", sparsity=0.25, calibration=ids)
    for (name, before), (_, after) in zip(dense.named_parameters(), model.named_parameters(), strict=True):
        assert before.shape == after.shape
        gone = (after == 0) & (before != 0)
        assert torch.equal(after[~gone], before[~gone])
        assert not gone.any() or name.endswith("A_log")
    assert not result.report.proof or result.report.proof.state_bytes_removed == 0
    for layer in range(3):
        mixer = model.backbone.layers[layer].mixer
        assert int((mixer.A_log == 0).sum()) == mixer.A_log.numel() // 4
    view = shown(model, ids, "state")[0]
    assert torch.equal((view.A[0] == -1), model.backbone.layers[0].mixer.A_log == 0)


# all of them


@pytest.mark.slow
@pytest.mark.cover(most=2)
@every_scorer
def test_a_state_keeps_its_score_wherever_it_stands(name: str, options: dict, families: tuple[str, ...]) -> None:
    for family in families:
        model = zoo(family)
        before = importance(model, tokens(), name, options=options)
        permuted = copy.deepcopy(model)
        orders = permute_states(permuted, torch.Generator().manual_seed(5))
        for group, scores in importance(permuted, tokens(), name, options=options).items():
            expected = before[group].gather(1, orders[group])
            torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


def permute_states(model: torch.nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Renumber the states of every group of any family, buffers too; returns the permutations, (G, N) per layer."""
    orders = {}
    for name, group in sspruner.trace(model).on_axis("state").items():
        order = torch.stack([torch.randperm(group.units, generator=generator) for _ in range(group.groups)])
        orders[name] = order
        for member in group.members:
            path, _, leaf = member.tensor.rpartition(".")
            front = tuple(range(len(member.dims)))
            tensor = getattr(model.get_submodule(path), leaf).data.movedim(member.dims, front)
            flat = as_rows(tensor, front).clone()
            for g, places in enumerate(order):
                flat[member.index[g, :, 0]] = flat[member.index[g, places, 0]]
            tensor.copy_(flat.view(tensor.shape))
    return orders


@pytest.mark.slow
@pytest.mark.cover(most=2)
@every_scorer
@examples(10)
@given(data=st.data())
def test_batches_and_padding_change_nothing(
    name: str, options: dict, families: tuple[str, ...], data: st.DataObject
) -> None:
    """One batch, one row at a time, and garbage in the padding."""
    model = data.draw(zoo_models(families))
    lengths = data.draw(st.lists(st.integers(2, 19), min_size=2, max_size=4))
    ids, mask = tokens(len(lengths), 19), torch.arange(19) < torch.tensor(lengths)[:, None]
    together = importance(model, ids, name, options=options, mask=mask)
    tolerance = 10 * loose(model)
    with batches_of(19):
        apart = importance(model, torch.where(mask, ids, 7), name, options=options, mask=mask)
    for group, scores in together.items():
        if name == "rrqr":  # near-equal residuals may change places: the fall of R's diagonal may not
            scores, apart[group] = (s.sort(-1).values for s in (scores, apart[group]))
        torch.testing.assert_close(apart[group], scores, rtol=tolerance, atol=tolerance * float(scores.max()))
    alone = [importance(model, ids[i : i + 1, :n], name, options=options) for i, n in enumerate(lengths)]
    if name == "sparsessm":  # a sum over rows
        for group, scores in together.items():
            total = torch.stack([row[group] for row in alone]).sum(0)
            torch.testing.assert_close(scores, total, rtol=tolerance, atol=tolerance * float(total.max()))


def as_view(p: SelectiveProjected, mask: torch.Tensor) -> SimpleNamespace:
    """What these scorers look at, of a mixer that nothing has masked."""
    group = SimpleNamespace(groups=p.B.shape[2], units=p.B.shape[3])
    a_log, parts = p.A.neg().log(), {name: getattr(p, name) for name in ("A", "B", "C", "dt")}
    return SimpleNamespace(
        **parts, projected=p, mask=mask, tokens=int(mask.sum()), group=group, tensor=lambda key: a_log
    )


@pytest.mark.parametrize("cls", [RRQR, Last, SparseSSM])
@given(projections(torch.float64), st.data())
def test_what_stands_in_the_padding_does_not_count(
    cls: type[sspruner.Scorer], drawn: tuple[SelectiveProjected, torch.Tensor], data: st.DataObject
) -> None:
    """Not every mixer keeps padding at zero: as the rows one by one, each as long as it is."""
    p, _ = drawn
    b, T = p.x.shape[:2]
    lengths = [data.draw(st.integers(1, T)) for _ in range(b)]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    together, apart = cls(), cls()
    together.axis = apart.axis = "state"
    together.observe(as_view(p, mask))
    for i, n in enumerate(lengths):
        apart.observe(as_view(rows(p, slice(i, i + 1), slice(n)), mask[i : i + 1, :n]))
    torch.testing.assert_close(together.importance(), apart.importance(), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.cover(most=2)
@every_scorer
def test_a_dead_layer_has_scores_all_the_same(name: str, options: dict, families: tuple[str, ...]) -> None:
    """B, C and x are 0 for every token, then constant: finite, and no state is better than another."""
    for family in families:
        for bias in (0.0, 0.5):
            model = zoo(family)
            with torch.no_grad():
                for path, p in model.named_parameters():
                    if any(part in path for part in ("in_proj", "x_proj", "conv1d")):
                        p.zero_()
                        if path.endswith("bias"):
                            p.fill_(bias)
            for scores in importance(model, tokens(), name, options=options).values():
                assert scores.isfinite().all()
                assert (scores >= 0).all()
                if not bias:
                    assert (scores == 0).all()


@examples(10)
@given(models(dtypes=(torch.bfloat16,), least_state=2))
def test_a_bfloat16_model_is_scored(model: torch.nn.Module) -> None:
    for name, options, families in SCORERS:
        if "mamba2" in families:
            for scores in importance(model, tokens(), name, options=options).values():
                assert scores.isfinite().all()
                assert scores.max() > 0


def test_one_budget_for_all_layers_gives_each_its_own() -> None:
    """LAST's shares compare between layers: the quiet layer loses more than the busy one."""
    model = zoo("mamba2", groups=1, state=8)
    result = sspruner.prune(model, "last", sparsity=0.5, allocation="global", one_shot=True, calibration=tokens(4, 19))
    kept = [len(s.keep[0]) for s in result.plan.groups.values()]
    assert sum(kept) == 12
    scores = torch.cat([s.flatten() for s in result.scores.importance.values()])
    worst_kept = min(
        float(result.scores.importance[name][0, list(s.keep[0])].min()) for name, s in result.plan.groups.items()
    )
    assert int((scores >= worst_kept).sum()) == 12  # one threshold


def test_the_classes_are_those_that_are_registered() -> None:
    for cls in (RRQR, Last, SparseSSM):
        assert find_scorer(cls.name)[0] is cls
