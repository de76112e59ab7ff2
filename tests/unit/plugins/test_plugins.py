"""The plugin manager: one clear error for each way in which a plugin can be wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sspruner
from sspruner.graph.families.mamba2 import Mamba2
from sspruner.graph.known import installed_families
from sspruner.plugins import manager
from sspruner.scoring.known import installed_scorers
from sspruner.scoring.scorer import make_scorer
from support.tiny import tiny_model, tokens
from support.zoo import FAMILIES


@pytest.fixture
def register() -> Iterator:
    """Register objects as plugins for one test."""
    added = []

    def add(name: str, **hooks: object) -> None:
        plugin = SimpleNamespace(**{hook: sspruner.hookimpl(function) for hook, function in hooks.items()})
        manager._register(manager.plugin_manager(), plugin, name)
        added.append(plugin)

    yield add
    for plugin in added:
        manager.plugin_manager().unregister(plugin)


class Fine(sspruner.Scorer):
    name, axes, needs = "fine", {"state"}, "weights"

    def __init__(self, power: float, scale: float = 1.0) -> None:
        if power < 0:
            raise ZeroDivisionError("no")
        self.power = power

    def observe(self, view: sspruner.SSMView) -> None:
        self.shape = (view.group.groups, view.group.units)

    def importance(self) -> torch.Tensor:
        return torch.arange(self.shape[1]).expand(self.shape) ** self.power


def test_built_ins_come_by_entry_point_like_anyone(register) -> None:
    register("third party", sspruner_scorers=lambda: [Fine])
    origins = {name: plugin for name, (_, plugin) in installed_scorers().items() if not name.startswith("tp:")}
    assert {"ghost", "block-influence", "magnitude", "random"} <= set(origins)
    assert origins.pop("fine") == "third party"
    companions = dict.fromkeys(("ean", "router-weight", "expert-frequency"), "reap")
    assert origins == {name: companions.get(name, name.replace("-", "_")) for name in origins}
    homes = {name: type(family).__module__ for name, family in installed_families().items()}
    assert all(name.startswith(homes[name].removeprefix("sspruner.graph.families.")) for name in FAMILIES)
    assert all(home.startswith("sspruner.graph.families.") for home in homes.values())


def test_a_shipped_scorer_scores_known_axes_only() -> None:
    for name, (cls, _) in installed_scorers().items():
        assert cls.axes <= sspruner.AXES | sspruner.ELEMENT_AXES, name
    scored = set().union(*(cls.axes for cls, _ in installed_scorers().values()))
    assert scored == sspruner.AXES | sspruner.ELEMENT_AXES


def test_a_family_by_plugin_is_cut_like_any_other(register) -> None:
    """A mixer class that nobody knows, in a model that nobody knows, with one hook and one description."""
    model = tiny_model(groups=2)
    for block in model.backbone.layers:
        block.mixer.__class__ = type("NewMixer", (type(block.mixer),), {})
    with pytest.raises(sspruner.ModelError, match="no state-space layer found"):
        sspruner.trace(model)

    class New(Mamba2):
        name, mixer_class = "new", "NewMixer"

    register("mine", sspruner_families=lambda: [New()])
    assert [site.kind for site in sspruner.trace(model).layers] == ["new", "new"]
    result = sspruner.prune(model, "ghost", axis={"state": 0.5, "head": 0.5}, calibration=tokens(6, 9))
    assert {(b.mixer.ssm_state_size, b.mixer.num_heads) for b in model.backbone.layers} == {(3, 2)}
    assert result.report.proof.error <= result.report.proof.tolerance


def test_options_reach_the_constructor(register) -> None:
    register("third party", sspruner_scorers=lambda: [Fine])
    scores = sspruner.score(tiny_model(), "fine", options={"power": 2})
    assert scores.importance["backbone.layers.0.mixer:state"].tolist() == [[0, 1, 4, 9, 16, 25]]
    assert scores.metadata["options"] == '{"power": 2}'


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, sspruner.InputError, "option 'power' is required; give --option power=VALUE"),
        ({"power": 1, "pwer": 1}, sspruner.InputError, "unknown option 'pwer'; it takes power, scale"),
        ({"power": -1}, sspruner.PluginError, "scorer 'fine' could not be made: ZeroDivisionError: no"),
    ],
)
def test_wrong_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_scorer(Fine, axis="state", seed=0, options=options)


class OtherMamba2(Mamba2):
    mixer_class = "OtherMixer"


class SameMixer(Mamba2):
    name = "another name"


@pytest.mark.parametrize(
    ("families", "message"),
    [
        (lambda: [OtherMamba2()], r"family 'mamba2': described by plugin '\w+' and by '\w+'; remove one"),
        (lambda: [SameMixer()], r"mixer class 'Mamba2Mixer': described by plugin '\w+' and by '\w+'"),
        (lambda: [int], r"plugin 'mine': sspruner_families returned <class 'int'>, not an object of"),
        (lambda: 1 / 0, r"plugin 'mine': sspruner_families failed: ZeroDivisionError"),
    ],
)
def test_families_that_are_refused(families, message: str, register) -> None:
    register("mine", sspruner_families=families)
    with pytest.raises(sspruner.PluginError, match=message):
        sspruner.trace(tiny_model())


def scorer_class(**attributes: object) -> type:
    return type("Wrong", (Fine,), attributes)


@pytest.mark.parametrize(
    ("offered", "message"),
    [
        (scorer_class(name=3), r"scorer Wrong needs a name \(a string\) and axes \(a set of strings\)"),
        (scorer_class(axes="state"), r"needs a name .* and axes \(a set of strings\)"),
        (scorer_class(axes=None), r"axes \(a set of strings\)"),
        (scorer_class(needs="luck"), r"needs='luck'; known: weights, activations, gradients"),
        (scorer_class(name="ghost"), r"scorer 'ghost': offered by plugin '\w+' and by plugin '\w+'; rename one"),
        (sspruner.Scorer, r"does not define name, axes, importance, observe"),
        (int, r"plugin 'mine': sspruner_scorers returned <class 'int'>, not a subclass of sspruner.Scorer"),
    ],
)
def test_scorers_that_are_refused(offered: type, message: str, register) -> None:
    register("mine", sspruner_scorers=lambda: [offered])
    with pytest.raises(sspruner.PluginError, match=message):
        installed_scorers()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(3)", "import failed: SystemExit: 3"),
        ("import nothing_of_this_name", "import failed: ModuleNotFoundError"),
        ("x = 1", "implements no hook; decorate one of sspruner_scorers, sspruner_families"),
        ("import sspruner\n@sspruner.hookimpl\ndef sspruner_scorer():\n    return []", "no hook 'sspruner_scorer'"),
        (
            "import sspruner\n@sspruner.hookimpl\ndef sspruner_scorers(x):\n    return []",
            r"(?s)mine.py.*can not be found",
        ),
    ],
)
def test_plugin_files_that_are_refused(code: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(sspruner.PluginError, match=message) as caught:
        manager.load_file(tmp_path / "mine.py")
    assert "mine.py" in str(caught.value)
    assert not manager.plugin_manager().has_plugin(str(tmp_path / "mine.py"))


def test_a_scorer_class_works_without_registration() -> None:
    class Mine(sspruner.Scorer):
        name, axes = "mine", {"state"}
        total = 0.0

        def observe(self, view: sspruner.SSMView) -> None:
            self.total = self.total + view.C.float().abs().sum((0, 1))

        def importance(self) -> torch.Tensor:
            return self.total

    model = tiny_model(groups=2)
    result = sspruner.prune(model, Mine, keep=2, calibration=tokens(6, 9))
    assert {m.ssm_state_size for m in (b.mixer for b in model.backbone.layers)} == {2}
    assert result.report.scorer == "mine"


def test_a_model_whose_forward_returns_no_cache() -> None:
    from sspruner.surgery.proof import measured_state_bytes

    class Cacheless(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> dict:
            return {}

    with pytest.raises(sspruner.ModelError, match="Cacheless: forward returns no cache"):
        measured_state_bytes(Cacheless(), tokens())


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3), torch.zeros(1, 3, dtype=torch.int64), torch.full((1, 3), float("nan"))]
)
def test_score_files_that_are_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    sspruner.Scores({"a:state": tensor}).save(tmp_path / "s.safetensors")
    with pytest.raises(sspruner.InputError, match=r"a:state is not a finite \(groups, units\) tensor; score again"):
        sspruner.Scores.load(tmp_path / "s.safetensors")


def test_a_device_that_holds_no_values() -> None:
    with pytest.raises(sspruner.InputError, match="device 'meta': not available here"):
        sspruner.score(tiny_model(), "magnitude", device="meta")


def test_saved_files_follow_the_umask(tmp_path: Path) -> None:
    folder = sspruner.save(tiny_model(), tmp_path / "model")
    (tmp_path / "plain").write_text("")
    assert {p.stat().st_mode for p in folder.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_masked_checks_the_plan() -> None:
    plan = sspruner.plan(sspruner.trace(one := tiny_model(seed=1)), sspruner.score(one, "magnitude"), sparsity=0.5)
    with pytest.raises(sspruner.PlanError, match="made for another model"), sspruner.masked(tiny_model(seed=2), plan):
        pass
