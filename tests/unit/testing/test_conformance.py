"""The conformance kit: what ships passes it, and it finds every fault that we could think of."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sspruner
from sspruner.calibrate.sources import Calibration
from sspruner.plugins import manager
from sspruner.scoring.known import installed_scorers
from sspruner.testing import check_scorer
from sspruner.testing.watch import Touched
from support.examples import scaled

FEW = scaled(2)

# Scorers that are not meant to have a property, and why.
NOT_MEANT = {
    "random": {"permutation"},  # a unit's number is all that there is
    "head-merge": {"permutation"},  # of two heads that are nearest to each other either may stay: the seed decides
}


@pytest.mark.exhaustive
@pytest.mark.slow
def test_ghost_conforms() -> None:
    check_scorer("ghost", max_examples=FEW)


@pytest.mark.ci_cover(most=2)
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(installed_scorers()) - {"ghost"}))
def test_every_scorer_conforms(name: str) -> None:
    check_scorer(name, max_examples=FEW, skip=NOT_MEANT.get(name, ()))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"variant": "means"}], ids=str)
def test_options_reach_the_scorer(options: dict) -> None:
    check_scorer("ghost", options=options, max_examples=FEW)


# Scorers with one fault each


class Good(sspruner.Scorer):
    """The mean square of C over tokens that count: what the others below break."""

    name, axes = "mine", {"state"}

    def __init__(self) -> None:
        self.tokens = 0
        self.total: Any = 0.0

    def observe(self, view: sspruner.SSMView) -> None:
        self.shape = view.group.groups, view.group.units
        self.tokens += view.tokens
        self.total = self.total + (view.C.double().square() * view.mask[..., None, None]).sum((0, 1))  # (G, N)

    def importance(self) -> torch.Tensor:
        return self.total / self.tokens


class Together(Good):
    token_sums = ("tokens", "total")


class Uncounted(Good):
    token_sums = ("total",)


class Absent(Good):
    token_sums = ("tokens", "totals")


class Unshaped(Good):
    """Takes it that every process has observed something."""

    def combine(self, total: Callable[[Any], Any]) -> None:
        self.tokens, self.total = total(self.tokens), total(self.total.clone())


class Flat(Good):
    def importance(self) -> torch.Tensor:
        return super().importance().flatten()


class Whole(Good):
    def importance(self) -> torch.Tensor:
        return super().importance().argsort(-1)


class Nothing(Good):
    def importance(self) -> Any:
        return super().importance().tolist()


class NotANumber(Good):
    def importance(self) -> torch.Tensor:
        return super().importance().log().sqrt()


class Standardised(Good):
    """0 / 0 where all units are the same."""

    def importance(self) -> torch.Tensor:
        score = super().importance()
        return score / score.amax()


class Unseeded(Good):
    def importance(self) -> torch.Tensor:
        return torch.rand(self.shape)


class Counting(Good):
    runs = 0

    def importance(self) -> torch.Tensor:
        Counting.runs += 1
        return super().importance() + Counting.runs


class Entropy(Good):
    def importance(self) -> torch.Tensor:
        generator = torch.Generator()
        generator.seed()
        return torch.rand(self.shape, generator=generator)


class Reseeding(Good):
    def importance(self) -> torch.Tensor:
        torch.manual_seed(self.seed)
        return torch.rand(self.shape)


class Largest(Good):
    """Scaled by the largest score ever seen, in any model."""

    largest = torch.zeros(())

    def importance(self) -> torch.Tensor:
        score = super().importance()
        Largest.largest = torch.maximum(Largest.largest, score.max())
        return score / Largest.largest


class Writing(Good):
    def observe(self, view: sspruner.SSMView) -> None:
        super().observe(view)
        view.D.data.mul_(1.01)


class Freezing(Good):
    def observe(self, view: sspruner.SSMView) -> None:
        super().observe(view)
        view.D.requires_grad_(False)


class Scaling(Good):
    def observe(self, view: sspruner.SSMView) -> None:
        super().observe(view)
        view.hidden.mul_(0.5)


class Position(Good):
    def importance(self) -> torch.Tensor:
        return super().importance() + torch.arange(self.shape[1])


class Padding(Good):
    def observe(self, view: sspruner.SSMView) -> None:
        self.shape = view.group.groups, view.group.units
        self.tokens += view.mask.numel()
        self.total = self.total + view.y.double().square().mean() + view.C.double().square().sum((0, 1))


class Places(Good):
    """The padding adds nothing, but it is counted."""

    def observe(self, view: sspruner.SSMView) -> None:
        super().observe(view)
        self.tokens += view.mask.numel() - view.tokens


class Running(Good):
    """The mean of the batches' means: rows of different lengths count alike."""

    def observe(self, view: sspruner.SSMView) -> None:
        super().observe(view)
        self.means = [*getattr(self, "means", []), self.total / self.tokens]
        self.tokens, self.total = 0, 0.0

    def importance(self) -> torch.Tensor:
        return torch.stack(self.means).mean(0)


class Undeclared(Good):
    needs = "weights"


class Gradients(Good):
    def observe(self, view: sspruner.SSMView) -> None:
        self.total, self.tokens = sum(g.square().sum(-1) for g in view.gradients.values()), 1


class Spying(Good):
    """Says that weights are enough, and finds the calibration on the stack."""

    needs = "weights"

    def observe(self, view: sspruner.SSMView) -> None:
        frame = sys._getframe()
        while not isinstance(frame.f_locals.get("calibration"), Calibration):
            frame = frame.f_back
        self.tokens = int(frame.f_locals["calibration"].tokens.sum())
        self.total = view.norms


class Narrow(Good):
    """numpy has no bfloat16."""

    def observe(self, view: sspruner.SSMView) -> None:
        super().observe(view)
        view.C.detach().numpy()


class Coarse(Good):
    """Fine in float32; in bfloat16 4096 + x is 4096."""

    def observe(self, view: sspruner.SSMView) -> None:
        self.shape = view.group.groups, view.group.units
        self.tokens += view.tokens
        square = (view.C * view.mask[..., None, None]).square()
        self.total = self.total + (4096 + square - 4096).sum((0, 1), dtype=torch.float64)


class Refusing(Good):
    def observe(self, view: sspruner.SSMView) -> None:
        raise sspruner.InputError("too few calibration tokens")


class Crashing(Good):
    def observe(self, view: sspruner.SSMView) -> None:
        raise KeyError("in_proj")


class Chaotic(Good):
    needs = "weights"

    def observe(self, view: sspruner.SSMView) -> None:
        first = next(iter(view.weights.values()))[..., 0]  # (groups, units)
        self.total, self.tokens = torch.sin(first.double() * 1e9), 1


class Dead(Good):
    """Minus infinity for a unit that owns nothing."""

    needs = "weights"

    def observe(self, view: sspruner.SSMView) -> None:
        self.total, self.tokens = view.norms.log(), 1


class TooMany(Good):
    def reduce(self, choose: Callable) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.ones(self.shape, dtype=torch.bool), {}


class Floating(Good):
    def reduce(self, choose: Callable) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return choose(self.importance()).float(), {}


class Misshapen(Good):
    update = ("D", torch.zeros(77))

    def reduce(self, choose: Callable) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        key, value = self.update
        return choose(self.importance()), {key: value}


class Unknown(Misshapen):
    update = ("nowhere.weight", torch.zeros(1))


class Infinite(Good):
    def observe(self, view: sspruner.SSMView) -> None:
        super().observe(view)
        self.D = view.D

    def reduce(self, choose: Callable) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return choose(self.importance()), {"D": torch.full_like(self.D, torch.inf)}


class Merging(Infinite):
    def reduce(self, choose: Callable) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.D.data.zero_()
        return choose(self.importance()), {}


class Columns(sspruner.Scorer):
    name, axes, needs = "mine", {"weight"}, "weights"

    def observe(self, view: sspruner.SSMView) -> None:
        (weight,) = view.weights.values()  # (rows, columns, 1)
        self.score = weight[..., 0].abs() + torch.arange(weight.shape[1])

    def importance(self) -> torch.Tensor:
        return self.score


class Rates(Columns):
    axes = {"decay"}


FAULTS = {
    Flat: r"importance has shape \(12,\), not \(groups, units\) = \(2, 6\), in backbone\.layers\.0\.mixer:state",
    Whole: r"importance is torch\.int64, not a floating type",
    Nothing: r"importance returns list, not a tensor",
    NotANumber: r"importance has \d+ of 12 values that are NaN or infinite",
    Standardised: r"importance has 12 of 12 values that are NaN or infinite.*, where all weights of the blocks are 0",
    Unseeded: r"changes the model: torch's global random state differs afterwards",
    Reseeding: r"changes the model: torch's global random state differs afterwards",
    Counting: r"two runs of one model with one seed differ: it remembers the first, or draws numbers without a seed",
    Entropy: r"two runs of one model with one seed differ: it remembers the first, or draws numbers without a seed",
    Largest: r"remembers another model that was scored in between; unit",
    Writing: r"changes the model: backbone\.layers\.0\.mixer\.D has other values",
    Freezing: r"changes the model: backbone\.layers\.0\.mixer\.D has requires_grad=False, it had True",
    Scaling: r"writes to view\.hidden, which is shared, in backbone\.layers\.0\.mixer",
    Position: r"depend on where a unit stands: they differ after units changed places on state; unit \d of set \d of",
    Padding: r"depend on how the calibration is split into batches|on which tokens stand in the padding",
    Places: r"scores count padding \(sequences of 24, 3, 3, 3, 3, 3 tokens\): without it they differ",
    Running: r"scores depend on how the calibration is split into batches; unit",
    Undeclared: r"reads what it did not declare: on backbone.*set needs='activations'",
    Gradients: r"reads what it did not declare: on backbone.*set needs='gradients'",
    Spying: r"says needs='weights', but other calibration changes scores",
    Narrow: r"fails: on backbone.*TypeError.*, in bfloat16; on zoo\('mamba2'",
    Coarse: r"scores in bfloat16 are far from those of the same weights in float32: they differ by .* on average",
    Refusing: r"no model could be checked on axis state: .*too few calibration tokens",
    Crashing: r"fails: on backbone\.layers\.0\.mixer:state failed: KeyError: 'in_proj'",
    Chaotic: r"scores on axis state are made of rounding",
    Dead: r"values that are NaN or infinite.*, where one unit of every set is dead",
    TooMany: r"reduce keeps \[6, 6\] units in its sets, not \[3, 3\]",
    Floating: r"reduce returns no bool tensor of shape \(2, 6\)",
    Misshapen: r"reduce's update of D is \(77,\), not a tensor of shape \(4,\)",
    Unknown: r"reduce's update of nowhere\.weight names backbone\.layers\.0\.mixer\.nowhere\.weight, which the",
    Infinite: r"reduce's update of D is not finite",
    Merging: r"reduce changes the model: backbone\.layers\.0\.mixer\.D has other values",
    Uncounted: r"scores differ where several processes observe a part each, and are combined; unit \d of set \d of",
    Absent: r"combine fails: AttributeError: 'Absent' object has no attribute 'totals'; on backbone",
    Unshaped: r"combine fails: AttributeError: 'float' object has no attribute 'clone'; on backbone",
    Columns: r"depend on where a unit stands: they differ after .*; unit \d+ of set \d+ of .*:weight has",
    Rates: r"depend on where a unit stands: they differ after .*; unit \d+ of set \d+ of .*:decay has",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.ci_cover(most=24)
@pytest.mark.cover(most=12)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda cls: cls.__name__)
def test_the_kit_catches(fault: type[sspruner.Scorer]) -> None:
    Counting.runs, Largest.largest = 0, torch.zeros(())
    families = ["mamba"] if fault is Rates else ["mamba2"]
    with pytest.raises(AssertionError) as caught:
        check_scorer(fault, families=families, max_examples=3)
    text = str(caught.value)
    assert re.search(FAULTS[fault], text), text
    assert text.startswith("scorer 'mine': ")
    assert "\n" not in text


def test_any_draw_of_random_numbers_is_seen() -> None:
    """Wherever the generator stands: a draw moves two counters in its state in opposite directions."""
    model = torch.nn.Linear(1, 1)
    with torch.random.fork_rng(devices=[]):
        for drawn in range(0, 700, 7):
            torch.manual_seed(0)
            torch.rand(drawn)
            before = Touched(model)
            assert not before.change(model)
            torch.rand(12)
            assert before.change(model) == "torch's global random state differs afterwards"


@pytest.mark.exhaustive
@pytest.mark.slow
def test_what_they_break_is_sound() -> None:
    check_scorer(Good, families=["mamba2", "mamba"], max_examples=3)
    check_scorer(Together, families=["mamba2", "mamba"], max_examples=3)


def test_a_class_that_is_no_scorer_is_named() -> None:
    for attributes, says in (
        ({"axes": {"nope"}}, r"'nope' is no axis; these are: attn_head, block"),
        ({"axes": "state"}, r"needs a name \(a string\) and axes \(a set of strings\)"),
        ({"needs": "luck"}, r"has needs='luck'"),
        ({"token_sums": "tokens"}, r"has token_sums='tokens', not a tuple of names"),
    ):
        with pytest.raises(AssertionError, match=says):
            check_scorer(type("Wrong", (Good,), attributes))
    with pytest.raises(AssertionError, match="scorer 'mine': none of its axes is in the models of mamba2"):
        check_scorer(Rates, families=["mamba2"])
    with pytest.raises(sspruner.InputError, match="unknown scorer 'ghosts'"):
        check_scorer("ghosts")
    with pytest.raises(sspruner.InputError, match="skip 'dtype': no such property; known: determinism, memory"):
        check_scorer(Good, skip=["dtype"])


@pytest.mark.slow
def test_properties_can_be_left_out() -> None:
    check_scorer(Position, families=["mamba2"], max_examples=1, skip=["permutation"])
    check_scorer(type("Says", (Position,), {"positional": True}), families=["mamba2"], max_examples=1)
    check_scorer(Unseeded, families=["mamba2"], max_examples=1, axes=[])  # nothing asked


@pytest.mark.slow
def test_the_kit_leaves_no_trace() -> None:
    state, threads, grad = torch.random.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
    names = {name for name, _ in manager.plugin_manager().list_name_plugin()}
    check_scorer(Good, families=["mamba2"], max_examples=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, grad)
    assert {name for name, _ in manager.plugin_manager().list_name_plugin()} == names


@pytest.mark.exhaustive
@pytest.mark.slow
def test_only_the_kit_imports_hypothesis() -> None:
    code = "import sys, sspruner.cli.main, sspruner.pruning.prune, sspruner.testing; print('hypothesis' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False"
    code = "import sys; sys.modules['hypothesis'] = None; from sspruner.testing import check_scorer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    says = "needs hypothesis, which is not installed: in a clone of sspruner, pip install '.[testing]'"
    assert f"ImportError: sspruner.testing {says}" in done.stderr


class Principal(Good):
    """A basis of its own: principal components of what is read from the state."""

    basis = "principal"

    def observe(self, view: sspruner.SSMView) -> None:
        self.tokens += view.tokens
        self.total = self.total + view.observability

    def importance(self) -> torch.Tensor:
        values, self.vectors = torch.linalg.eigh(self.total)
        return values / self.tokens

    def coordinates(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.vectors.mT, self.vectors


class Doubled(Principal):
    def coordinates(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.vectors.mT, 2 * self.vectors


class Clipped(Principal):
    def coordinates(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.vectors.mT[:, :, 1:], self.vectors


class Firsts(Principal):
    """Scores that are those of coordinates, not of its directions: they move where states change places."""

    def importance(self) -> torch.Tensor:
        super().importance()
        return self.total.diagonal(dim1=-2, dim2=-1) / self.tokens


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_basis_of_its_own_is_checked_too() -> None:
    check_scorer(Principal, families=["mamba2"], max_examples=2)
    for fault, says in (
        (Doubled, r"encode @ decode is not the identity \(off by 1.0e\+00\)"),
        (Clipped, r"coordinates of \(2, \d+, \d+\) and .*, not \(2, \d+, \d+\) twice"),
        (Firsts, "scores depend on where a unit stands"),
    ):
        with pytest.raises(AssertionError, match=says):
            check_scorer(fault, families=["mamba2"], max_examples=3)
