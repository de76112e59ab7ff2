"""The conformance kit on families: what ships passes it, and it finds every fault that we could think of."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sspruner.graph.family import Family
from sspruner.graph.known import installed_families
from sspruner.graph.layout import Fold, Layout, Slot
from sspruner.plugins import manager
from sspruner.testing import check_family
from sspruner.testing.cases import _NAMES
from support.examples import scaled
from support.paths import ROOT
from support.zoo import FAMILIES, randomise, zoo

FEW = scaled(2)


@pytest.mark.ci_cover(most=1)
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_conforms(family: str) -> None:
    check_family(installed_families()[family], lambda seed: zoo(family, seed=seed), max_examples=FEW)


# Families with one fault each: variants of the one on the page


def plain() -> dict[str, Any]:
    """The example of docs/families.md: PlainModel and its family, as they are there."""
    page = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    found = [b for b in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "PlainMixer" in b]
    names: dict[str, Any] = {"__name__": "docs"}
    with torch.random.fork_rng():
        for block in found[:2]:
            exec(block, names)
    return names


PLAIN = plain()


def plain_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = PLAIN["PlainModel"](heads=2, head_dim=4, state=8)
    randomise(model)
    return model.eval()


@pytest.mark.slow
def test_the_family_of_the_page_conforms() -> None:
    names, state = registered(), torch.random.get_rng_state()
    check_family(PLAIN["Plain"](), plain_model, save=False, max_examples=FEW)
    assert registered() == names
    assert torch.equal(torch.random.get_rng_state(), state)

    def scan_to_output(mixer: Any, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return mixer.out(y * torch.nn.functional.silu(z))

    check_family(PLAIN["Plain"](), plain_model, save=False, max_examples=1, scan_to_output=scan_to_output)


def registered() -> set[str]:
    return {name for name, _ in manager.plugin_manager().list_name_plugin()}


def changed(**layout: Any) -> Callable[[], Family]:
    """The page's family with another layout: a value, or a function of the right one's."""

    def make() -> Family:
        class Wrong(PLAIN["Plain"]):  # type: ignore[misc, name-defined]
            def layout(self, mixer: torch.nn.Module) -> Layout:
                right = super().layout(mixer)
                new = {k: v(getattr(right, k)) if callable(v) else v for k, v in layout.items()}
                return Layout(**{**vars(right), **new})

        return Wrong()

    return make


def projecting(change: Callable[[Any, Any], dict[str, Any]], masked: bool = True) -> Callable[[], Family]:
    def make() -> Family:
        class Wrong(PLAIN["Plain"]):  # type: ignore[misc, name-defined]
            def project(self, mixer: Any, hidden: torch.Tensor, mask: torch.Tensor) -> Any:
                right = super().project(mixer, hidden, mask if masked else torch.ones_like(mask))
                return type(right)(**{**vars(right), **change(mixer, right)})

        return Wrong()

    return make


def other(**attributes: Any) -> Callable[[], Family]:
    return lambda: type("Wrong", (PLAIN["Plain"],), attributes)()


def rows(order: str) -> Callable[[tuple[Slot, ...]], tuple[Slot, ...]]:
    """The first slot with its runs in another order."""
    return lambda slots: (
        Slot("rows.weight", 0, tuple(next(r for r in slots[0].rows if r.name == n) for n in order.split())),
        *slots[1:],
    )


class Reads(PLAIN["Plain"]):  # type: ignore[misc, name-defined]
    def layout(self, mixer: Any) -> Layout:
        return Layout(
            **{**vars(super().layout(mixer)), "sizes": {**super().layout(mixer).sizes, "extra": self.n(mixer)}}
        )

    def n(self, mixer: Any) -> int:
        return int(mixer.A_log.sum().item() > -1e9)


FAMILY_FAULTS: dict[str, tuple[Callable[[], Family], str]] = {
    "order": (changed(slots=rows("z B x C dt")), r"axis state are not interchangeable: after they changed places"),
    "missing rows": (changed(slots=rows("z x B C")), r"runs z 8 \+ x 8 \+ B 8 \+ C 8 do not fill dim 0 of blocks\.0"),
    "missing slot": (changed(slots=lambda s: tuple(t for t in s if t.tensor != "out.weight")),
                     r"axis head are not interchangeable"),
    "attribute": (changed(attributes={"heads": (("group", "head"),), "head_dim": (("head_dim",),)}),
                  r"a cut on axis state fails: proof failed: the cut model does not run"),
    "size": (changed(attributes=lambda a: {**a, "heads": (("state",),)}),
             r"blocks\.0\.mixer\.heads is 2, the layout's sizes make it 8"),
    "state": (changed(state=("group", "head", "state")), r"state bytes per sequence are gone, the plan predicts"),
    "fold": (changed(folds=(Fold("D", ("state",), 1.0),)), r"a cut on axis state fails: proof failed: sliced and"),
    "axis": (changed(axes={"state": ("head_group",)}), r"axis state of blocks\.0\.mixer has no size in the layout"),
    "values": (Reads, r"layout reads values: on the meta device it fails"),
    "config": (other(config_sizes={"state": (("group", "head"),)}), r"config\.state is 8, config_sizes make it 2"),
    "class": (other(mixer_class="NoMixer"), r"recognises no module of the model; it has Embedding, LayerNorm"),
    "skip": (projecting(lambda mixer, p: {"D": p.D * 0}), r"project is not what blocks\.0\.mixer computes"),
    "swap": (projecting(lambda mixer, p: {"B": p.C, "C": p.B, "dt": p.dt * 1.1}), r"project is not what blocks\.0"),
    "padding": (projecting(lambda mixer, p: {}, masked=False), r"project does not zero padding in blocks\.0\.mixer"),
    "shape": (projecting(lambda mixer, p: {"z": p.z[..., :2]}), r"project gives shapes that do not fit Projected"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAMILY_FAULTS)
def test_the_kit_catches_a_family(fault: str) -> None:
    make, says = FAMILY_FAULTS[fault]
    with pytest.raises(AssertionError) as caught:
        check_family(make(), plain_model, save=False, max_examples=3)
    text = str(caught.value)
    assert re.search(says, text), text
    assert text.startswith("family 'plain': ")
    assert text.count("make_model(") == 1


@pytest.mark.slow
def test_a_model_that_cannot_be_saved_is_said_so() -> None:
    with pytest.raises(AssertionError, match="family 'plain': a cut model cannot be saved and loaded"):
        check_family(PLAIN["Plain"](), plain_model, max_examples=1)


def test_a_readout_that_is_not_what_out_proj_reads_is_caught() -> None:
    class Wrong(PLAIN["Plain"]):
        def readout(self, mixer: Any, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return y.flatten(2) * z

    with pytest.raises(AssertionError, match=r"readout is not what any linear layer of .* is fed"):
        check_family(Wrong(), plain_model, save=False, max_examples=1)


def test_a_scorer_is_tried_on_every_family() -> None:
    """A family that the cases do not know would end the kit of a stranger's scorer in a KeyError, now and then."""
    assert set(_NAMES) == set(FAMILIES)
