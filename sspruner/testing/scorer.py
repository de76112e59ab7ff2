"""check_scorer: test on random tiny models the properties that every scorer must have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

import sspruner
from sspruner.calibrate.sources import Calibration
from sspruner.errors import InputError, PluginError, SSPrunerError
from sspruner.graph.trace import trace
from sspruner.plans.reduction import INVERSE
from sspruner.scoring.known import find_scorer
from sspruner.scoring.scorer import SELECT, Scorer, check_scorer_class, checked_coordinates, make_scorer
from sspruner.testing.cases import Case, OneByOne, Trimmed, axes_of, cases, families_by_axis, windows
from sspruner.testing.disturbances import DEGENERATE, disturb_random_state, one_thread, perturbed
from sspruner.testing.examples import try_examples
from sspruner.testing.plans import compatible_axes, permute, permute_rows
from sspruner.testing.watch import Touched, Watch, broken_update, chooser, combine_all

PROPERTIES = (
    *("determinism", "memory", "needs", "permutation", "batches", "processes", "padding", "bfloat16", "basis"),
    *("reduce", "degenerate"),
)
ROUNDING = 2.0**-22  # about one rounding of fp32
NARROW = 2.0**-7  # accumulated roundings of bf16
WHOLE = ("block", "mixer")  # axes of whole modules, which cannot be permuted

Importance = dict[str, torch.Tensor]


class _Refused(Exception):
    """Raised when the scorer refuses this model or calibration with an InputError."""


def check_scorer(
    scorer: type[Scorer] | str,
    *,
    axes: Collection[str] | None = None,
    options: Mapping[str, Any] | None = None,
    families: Collection[str] | None = None,
    max_examples: int = 5,
    tokens: tuple[int, int] = (6, 24),
    skip: Collection[str] = (),
) -> None:
    """Check a scorer on random tiny models of every family that has its axes. Call it in a test of your own.

    scorer        the class, or the name of an installed one
    axes          by default all axes of the scorer
    options       arguments of its constructor
    families      families of the models; by default all that have the axes
    max_examples  number of models for each set of axes that occur together
    tokens        number of calibration sequences, and their length
    skip          names in PROPERTIES that this scorer is not meant to have; a class with `positional = True` has no
                  "permutation"

    Raises AssertionError: one sentence that says what broke, in which dependency group, of which model.
    """
    cls = find_scorer(scorer)[0] if isinstance(scorer, str) else scorer
    try:
        check_scorer_class(cls, getattr(cls, "__module__", "?"))
    except PluginError as error:
        raise AssertionError(str(error)) from error
    checked_axes = sorted(cls.axes if axes is None else axes)
    known = families_by_axis()
    for axis in checked_axes:
        if axis not in known:
            raise AssertionError(f"scorer {cls.name!r}: {axis!r} is no axis; these are: {', '.join(sorted(known))}")
    for name in skip:
        if name not in PROPERTIES:
            raise InputError(f"skip {name!r}: no such property; known: {', '.join(PROPERTIES)}")
    check = _Check(cls, dict(options or {}), {*skip, *(["permutation"] if getattr(cls, "positional", False) else [])})
    families_of = {axis: tuple(f for f in known[axis] if families is None or f in families) for axis in checked_axes}
    if checked_axes and not any(families_of.values()):
        check.fail(f"none of its axes is in the models of {', '.join(sorted(families or known))}")
    for axis in sorted(checked_axes, key=lambda a: (len(known[a]), a)):  # rare ones first: the others come with them
        if families_of[axis] and axis not in check.seen:
            try_examples(lambda case: check.case(case, checked_axes), max_examples, cases(families_of[axis], *tokens))
    for axis in checked_axes:
        if families_of[axis]:
            check.require(axis)


class _Check:
    """Checks of one scorer with its options. `seen`: axis -> for each checked group, whether its scores were stable."""

    def __init__(self, cls: type[Scorer], options: dict[str, Any], skip: set[str]) -> None:
        self.cls, self.options, self.skip = cls, options, skip
        self.seen: dict[str, list[bool]] = {}
        self.watch = Watch(cls)
        self.refusal = self.where = ""
        self.shaken: Callable[[float, int], Importance] = lambda size, seed: {}
        self.unstable: dict[str, str] = {}  # axis -> where rounding decided

    def require(self, axis: str) -> None:
        """Fail if no model could be checked on an axis, or if most of its scores were dominated by rounding."""
        stable = self.seen.get(axis, [])
        if not stable:
            reason = f": {self.refusal}" if self.refusal else "; name other families"
            self.fail(f"no model could be checked on axis {axis}{reason}")
        if 2 * sum(stable) < len(stable):
            self.fail(f"scores on axis {axis} are made of rounding: they change by more than a tenth of the largest "
                      f"when every weight changes by one part in 4 million; on {self.unstable[axis]}")  # fmt: skip

    def fail(self, what: str) -> None:
        """Raise AssertionError with the scorer, its options and the fault."""
        options = "".join(f", {k}={v!r}" for k, v in self.options.items())
        raise AssertionError(f"scorer {self.cls.name!r}{options}: {what}")

    def case(self, case: Case, checked_axes: Collection[str]) -> None:
        """Check every property on one model."""
        with one_thread():
            self._case(case, checked_axes)

    def _case(self, case: Case, checked_axes: Collection[str]) -> None:
        model, data = case.model(), case.data()
        axes = [axis for axis in axes_of(model) if axis in checked_axes]
        self.where = str(case)
        if not axes:
            return
        try:
            first = self.untouched(model, data, axes)
            self.determinism(case, first, axes)
            tolerance = self.tolerance(case, first, axes)
            for name in PROPERTIES[1:]:
                if name not in self.skip:
                    getattr(self, name)(case, first, tolerance, axes)
        except _Refused as refused:
            self.refusal = str(refused)
            for axis in axes if len(axes) > 1 else ():
                self._case(case, [axis])
            return
        for name in first:
            self.seen.setdefault(name.rpartition(":")[2], []).append(tolerance[name] < torch.inf)

    def score(self, model: Any, data: Calibration, axes: list[str], how: str = "", seed: int = 0) -> Importance:
        """Call sspruner.score; report errors as one sentence. how: describes what is special about the model."""
        self.watch.start()
        try:
            importance: Importance = sspruner.score(
                model, self.watch.cls, axis=axes, options=self.options, calibration=data, seed=seed, device="cpu"
            ).importance
            return importance
        except InputError as error:
            raise _Refused(str(error)) from error
        except SSPrunerError as error:
            if self.watch.problem:
                what = self.watch.problem
            else:
                what = str(error).partition(f"scorer {self.cls.name!r} ")[2] or str(error)
                fault = "reads what it did not declare" if "set needs=" in what else "fails"
                what = f"{fault}: {what}"
            self.fail(f"{what}{how and f', {how}'}; on {self.where}")
            raise
        finally:
            if self.watch.problem:
                self.fail(f"{self.watch.problem}{how and f', {how}'}; on {self.where}")

    def untouched(self, model: Any, data: Calibration, axes: list[str]) -> Importance:
        """Check that no bit, gradient or flag of the model changes, nor torch's global state."""
        before = Touched(model)
        scores = self.score(model, data, axes)
        change = before.change(model)
        if change:
            self.fail(f"changes the model: {change}; on {self.where}")
        return scores

    def determinism(self, case: Case, first: Importance, axes: list[str]) -> None:
        """Check that scores do not depend on earlier runs or on global random numbers."""
        for seed, why in (
            (0, "two runs of one model with one seed differ: it remembers the first, or draws numbers without a seed"),
            (1, "draws from the global random numbers: make a torch.Generator and seed it with self.seed"),
        ):
            if "determinism" not in self.skip:
                disturb_random_state(seed)
                self.same(first, self.score(case.model(), case.data(), axes), why)

    def memory(self, case: Case, first: Importance, tolerance: Mapping[str, float], axes: list[str]) -> None:
        """Check that scoring another model in between changes nothing."""
        for factor in (2.0, 0.5):
            other = case.other().model()
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.mul_(factor if parameter.ndim > 1 else 1)
            self.score(other, case.other().data(), [axis for axis in axes_of(other) if axis in axes])
        disturb_random_state(0)
        again = self.score(case.model(), case.data(), axes)
        self.same(first, again, "remembers another model that was scored in between")

    def tolerance(self, case: Case, first: Importance, axes: list[str]) -> dict[str, float]:
        """Return the tolerance of each group: 1e-4 of its largest score, or 32 times the effect of rounding weights.

        Infinite if that is more than a tenth of the largest score: then nothing can be compared.
        """
        self.shaken = lambda size, seed: self.score(perturbed(case.model(), size, seed), case.data(), axes)
        tolerances = {}
        for name, scores in self.shaken(ROUNDING, case.seed).items():
            largest = float(first[name].abs().max())
            change = 32 * float((scores - first[name]).abs().max())
            tolerances[name] = max(1e-4 * largest, change, 1e-30) if change <= 0.1 * largest else torch.inf
            if tolerances[name] == torch.inf:
                self.unstable[name.rpartition(":")[2]] = f"{name} of {case}"
        return tolerances

    def decided_by(self, size: float, name: str) -> bool:
        """Return whether changes of the weights by `size` move scores by a tenth, so that ties are arbitrary."""
        one, *more = (self.shaken(size, seed)[name] for seed in range(4))
        return any(bool((scores - one).abs().max() > 0.1 * one.abs().max()) for scores in more)

    def permutation(self, case: Case, first: Importance, tolerance: Mapping[str, float], axes: list[str]) -> None:
        """Check that permuting the units of an axis permutes their scores."""
        graph, generator = trace(case.model()), torch.Generator().manual_seed(case.seed)
        elements = [axis for axis in axes if axis in sspruner.ELEMENT_AXES]
        scored = {group.tensor: name for name, group in graph.elements.items()}
        for moving in compatible_axes(
            [axis for axis in graph.axes if axis not in WHOLE and (axis in axes or elements)], graph
        ):
            model, expected = case.model(), {}
            groups = [group for axis in moving for group in graph.on_axis(axis).values()]
            for group in groups:
                orders = torch.stack([torch.randperm(group.units, generator=generator) for _ in range(group.groups)])
                if group.gain:  # shared factors stay what they are where all sets are permuted alike
                    orders = orders[:1].expand_as(orders)
                permute(model, group, orders)
                if group.name in first:  # directions of the state are where they were: only their coordinates move
                    keeps_basis = self.cls.basis != SELECT
                    expected[group.name] = first[group.name] if keeps_basis else first[group.name].gather(1, orders)
                for member in group.members:
                    name = scored.get(member.tensor, "")
                    if name in first:
                        permute_rows(expected.setdefault(name, first[name].clone()), member, orders)
            scores = self.score(model, case.data(), [axis for axis in (*moving, *elements) if axis in axes])
            why = f"scores depend on where a unit stands: they differ after units changed places on {', '.join(moving)}"
            self.close(expected, {name: scores[name] for name in expected}, tolerance, why)

    def batches(self, case: Case, first: Importance, tolerance: Mapping[str, float], axes: list[str]) -> None:
        """Check that scores do not depend on the split of the calibration into batches."""
        alone = self.score(case.model(), OneByOne(**vars(case.data())), axes)
        why = "scores depend on how the calibration is split into batches"
        self.close(first, alone, tolerance, why)

    def processes(self, case: Case, first: Importance, tolerance: Mapping[str, float], axes: list[str]) -> None:
        """Check that instances with half the data each, and one with none, combine to the same scores."""
        blank = make_scorer(self.cls, axis=axes[0], seed=0, options=self.options)
        combines = blank.token_sums or self.cls.combine is not Scorer.combine
        if len(case.lengths) < 2 or blank.needs != "activations" or not combines:
            return
        halves = []
        for part in (slice(0, None, 2), slice(1, None, 2)):
            data = case.data()
            half = replace(data, tokens=data.tokens[part], mask=data.mask[part])
            with self.watch.only_observing():
                self.score(case.model(), half, axes)
            halves.append(self.watch.instances)
        combined = {}
        for name, instance in halves[0].items():
            blank = make_scorer(self.cls, axis=instance.axis, seed=0, options=self.options)
            try:
                combine_all([instance, halves[1][name], blank])
                combined[name] = instance.importance().detach().float().cpu()
            except InputError:
                continue
            except Exception as error:
                self.fail(f"combine fails: {type(error).__name__}: {error}; on {name} of {self.where}")
        why = "scores differ where several processes observe a part each, and are combined"
        self.close(first, combined, tolerance, why)

    def padding(self, case: Case, first: Importance, tolerance: Mapping[str, float], axes: list[str]) -> None:
        """Check that the tokens in the padding, and the padding itself, do not change scores."""
        lengths = f"(sequences of {', '.join(map(str, case.lengths))} tokens)"
        garbage = self.score(case.model(), case.data(garbage=1), axes)
        self.close(first, garbage, tolerance, f"scores depend on which tokens stand in the padding {lengths}")
        trimmed = self.score(case.model(), Trimmed(**vars(case.data())), axes)
        self.close(first, trimmed, tolerance, f"scores count padding {lengths}: without it they differ")

    def bfloat16(self, case: Case, first: Importance, tolerance: Mapping[str, float], axes: list[str]) -> None:
        """Check that bf16 scores are near the fp32 scores of the same weights.

        Scorers without activations must agree to 1e-3, the others on average.
        """
        narrow, wide = case.model(torch.bfloat16), case.model()
        with torch.no_grad():
            for ours, theirs in zip(wide.state_dict().values(), narrow.state_dict().values(), strict=True):
                ours.copy_(theirs)
        expected = self.score(wide, case.data(), axes)
        bf16_scores = self.score(narrow, case.data(), axes, "in bfloat16")
        for name, scores in bf16_scores.items():
            needs = make_scorer(self.cls, axis=name.rpartition(":")[2], seed=0, options=self.options).needs
            largest = float(expected[name].abs().mean())
            difference = float((scores - expected[name]).abs().mean())
            allowed = (1e-3 if needs == "weights" else 0.5) * largest
            if difference > allowed and tolerance[name] < torch.inf and not self.decided_by(NARROW, name):
                self.fail(
                    f"scores in bfloat16 are far from those of the same weights in float32: they differ by "
                    f"{difference:.3g} on average, and are {largest:.3g}; on {name} of {self.where}"
                )

    def needs(self, case: Case, first: Importance, tolerance: Mapping[str, float], axes: list[str]) -> None:
        """Check that a scorer of weights does not depend on the calibration."""
        blind = [a for a in axes if make_scorer(self.cls, axis=a, seed=0, options=self.options).needs == "weights"]
        if blind:
            scores = self.score(case.model(), case.other().data(), blind)
            self.same(
                {n: first[n] for n in scores}, scores, "says needs='weights', but other calibration changes scores"
            )

    def basis(self, case: Case, first: Importance, tolerance: Mapping[str, float], axes: list[str]) -> None:
        """Check that coordinates have the right shape and that decode is the inverse of encode."""
        if self.cls.basis == SELECT:
            return
        self.score(case.model(), case.data(), axes)
        for name, instance in self.watch.instances.items():
            try:
                encode, decode = checked_coordinates(instance, trace(case.model()).groups[name], "?")
            except PluginError as error:
                self.fail(f"{str(error).partition(': ')[2]}; on {name} of {self.where}")
            off = float((encode.double() @ decode.double() - torch.eye(encode.shape[1])).abs().max())
            if not off <= INVERSE:
                self.fail(f"encode @ decode is not the identity (off by {off:.1e}); on {name} of {self.where}")

    def reduce(self, case: Case, first: Importance, tolerance: Mapping[str, float], axes: list[str]) -> None:
        """Check that `keep` has the right shape and count, and that updates are finite and fit existing tensors."""
        if self.cls.reduce is Scorer.reduce:
            return
        model = case.model()
        groups = {g.name: g for axis in axes for g in trace(model).on_axis(axis).values()}
        self.score(model, case.data(), axes)
        for name, group in groups.items():
            instance, before = self.watch.instances[name], Touched(model)
            choose = chooser(group, pattern=case.seed % 2 == 1)
            try:
                keep, updates = instance.reduce(choose)
            except InputError:
                continue
            except Exception as error:
                what = f"reduce fails: {type(error).__name__}: {error}; on {name} of {self.where}"
                raise AssertionError(f"scorer {self.cls.name!r}: {what}") from error
            shape = (group.groups, group.units)
            if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool or tuple(keep.shape) != shape:
                self.fail(f"reduce returns no bool tensor of shape {shape}; on {name} of {self.where}")
            expected_counts = choose(first[name]).sum(-1)
            if not group.tensor and not torch.equal(keep.sum(-1).cpu(), expected_counts):
                self.fail(
                    f"reduce keeps {keep.sum(-1).tolist()} units in its sets, not {expected_counts.tolist()}; "
                    f"on {name} of {self.where}"
                )
            for key, value in updates.items():
                wrong = broken_update(model, group, key, value)
                if wrong:
                    self.fail(f"reduce's update of {key} {wrong}; on {name} of {self.where}")
            change = before.change(model)
            if change:
                self.fail(f"reduce changes the model: {change}; on {name} of {self.where}")

    def degenerate(self, case: Case, first: Importance, tolerance: Mapping[str, float], axes: list[str]) -> None:
        """Check that degenerate models and calibration give finite scores, which the watch checks, or are refused."""
        for how, spoil in DEGENERATE.items():
            model = case.model()
            with torch.no_grad():
                spoil(model, axes)
            try:
                self.score(model, case.data(), axes, how)
            except _Refused:
                continue
        try:
            self.score(case.model(), windows(case.data().tokens[:1, :2], torch.ones(1, 2, dtype=torch.bool)), axes,
                       "with a calibration of two tokens")  # fmt: skip
        except _Refused:
            return

    def same(self, first: Importance, second: Importance, why: str) -> None:
        """Fail unless scores are equal to the bit."""
        self.close(first, second, dict.fromkeys(first, 0.0), why)

    def close(self, first: Importance, second: Importance, tolerance: Mapping[str, float], why: str) -> None:
        """Fail unless scores are equal up to the tolerance of their group."""
        for name, scores in second.items():
            difference = (scores - first[name]).abs()
            if difference.max() > tolerance[name] and not (tolerance[name] and self.decided_by(ROUNDING, name)):
                at = divmod(int(difference.argmax()), difference.shape[1])
                self.fail(
                    f"{why}; unit {at[1]} of set {at[0]} of {name} has {float(first[name][at]):.6g} and "
                    f"{float(scores[at]):.6g}; on {self.where}"
                )
