"""On other devices: what is moved there comes back, and a pipeline over several of them computes the same.

The devices are made of the CPU (elsewhere.py), and these tests share a process that has them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sspruner
from sspruner.calibrate.replay import Replay
from sspruner.compute.device import offloaded
from support.elsewhere import devices
from support.offloaded import Interrupted, interrupted
from support.paths import TESTS
from support.tiny import logits, tiny_model, tokens
from support.zoo import FAMILIES, zoo

SHORT = tokens(4, 7)  # every operation goes through Python here
ANSWER = "answer: "


def pruned(load: Callable[[], Any], **arguments: Any) -> Any:
    arguments = {"scorer": "ghost", "sparsity": 0.5, "calibration": SHORT, "samples": 4, "cache": False, **arguments}
    return sspruner.prune(load(), **arguments)


def check_close(ours: Any, theirs: Any) -> None:
    """The same plan, and the same numbers but for rounding: the steps of attention differ from device to device."""
    assert ours.plan == theirs.plan
    for name, scores in theirs.scores.importance.items():
        assert torch.allclose(ours.scores.importance[name].cpu(), scores, rtol=1e-5, atol=1e-6 * float(scores.max()))
    for what in ("dense", "pruned"):
        sizes, expected = getattr(ours.report, what), getattr(theirs.report, what)
        assert {
            k: pytest.approx(v, rel=1e-4, abs=1e-6) if isinstance(v, float) else v for k, v in expected.items()
        } == sizes


def through_a_pipeline(family: str) -> None:
    """Blocks on two devices, in memory and on disk: the cut of a model that is whole."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sspruner.save(zoo(family), root / "model")
        whole, _ = sspruner.load(root / "model")
        path = sspruner.trace(whole).blocks
        count = len(whole.get_submodule(path))
        theirs = pruned(lambda: whole)
        with devices():
            places = ["other:0", "disk", "other:1", "cpu"]
            device_map = {f"{path}.{i}": places[i % 4] for i in range(count)}
            model, _ = sspruner.load(root / "model", device_map=device_map, offload=root / "w")
            homes = offloaded(model).homes
            assert str(homes[f"{path}.0"]) == "other:0"
            mixer = model.get_submodule(sspruner.trace(model).layers[0].path)
            assert on(mixer) == {"other:0"}
            dense = logits(sspruner.load(root / "model")[0], SHORT)
            assert torch.allclose(logits(model, SHORT), dense, rtol=1e-4, atol=1e-5)
            ours = pruned(lambda: model)
            check_close(ours, theirs)
            sspruner.save(ours.model, root / "out", result=ours)
        saved, _ = sspruner.load(root / "out")
        expected = whole.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in saved.state_dict().items())


def auto() -> None:
    """Devices evenly, each with room for a block that comes; then memory, with the same; the rest is on disk."""
    with tempfile.TemporaryDirectory() as name:
        sspruner.save(tiny_model(layers=8), name)
        whole, _ = sspruner.load(name)
        sizes = {name: p.numel() * p.element_size() for name, p in whole.named_parameters()}
        one = sum(size for name, size in sizes.items() if name.startswith("backbone.layers.0."))
        outside = sum(size for name, size in sizes.items() if ".layers." not in name)
        with devices():
            for limits, expected in (
                ({0: 3 * one, 1: 2 * one}, "00 11 -- --"),
                ({0: 3 * one, 1: one, "cpu": outside + 3 * one}, "00 1c c- --"),
                ({0: 20 * one, 1: 20 * one}, "00 00 11 11"),
                ({0: 20 * one}, "whole"),
            ):
                model, _ = sspruner.load(name, device_map="auto", max_memory=limits)
                if expected == "whole":
                    assert offloaded(model) is None
                    continue
                homes = offloaded(model).homes
                short = {"other:0": "0", "other:1": "1", "cpu": "c", "None": "-"}
                found = "".join(short[str(homes.get(f"backbone.layers.{i}"))] for i in range(8))
                assert found == expected.replace(" ", ""), (limits, found)


def on_another_device(family: str) -> None:
    """`--device`: the whole model goes there and comes back; no tensor is forgotten on the way.

    No model with shared tensors: `to` gives every holder one of its own here, which it does not on a GPU.
    """
    more: list[dict[str, Any]] = [
        {"scorer": "balanced"}, {"scorer": "flap", "axis": "head"}, {"scorer": "sparsegpt", "axis": "weight"},
    ]  # fmt: skip
    for arguments in ({}, {"scorer": "wanda", "one_shot": True}, *(more if family == "mamba2" else [])):
        theirs = pruned(lambda: zoo(family), **arguments)
        with devices():
            ours = pruned(lambda: zoo(family), device="other:1", **arguments)
            assert on(ours.model) == {"cpu"}
        check_close(ours, theirs)
        assert torch.allclose(logits(ours.model, SHORT), logits(theirs.model, SHORT), rtol=1e-4, atol=1e-5)


def one_block_at_a_time() -> None:
    """Every block goes to the device before it runs and home after it, and no two are there at once."""
    model, seen = tiny_model(layers=3), []
    ids = tokens(2, 9)
    with devices():
        replay = Replay(model, sspruner.trace(model), [(ids, torch.ones_like(ids, dtype=torch.bool))], "other:0")

        def there(*_: Any) -> None:
            seen.append([i for i, block in enumerate(model.backbone.layers) if on(block) == {"other:0"}])

        for block in model.backbone.layers:
            block.mixer.register_forward_pre_hook(there)
        for block in replay.blocks:
            before = model.get_submodule(block).state_dict(keep_vars=True)
            replay.observe(block, [f"{block}.mixer"], there)
            replay.advance(block)
            after = model.get_submodule(block).state_dict(keep_vars=True)
            assert all(value is after[name] for name, value in before.items())  # the very tensors, not copies
        assert seen == [[0]] * 3 + [[1]] * 3 + [[2]] * 3  # to be observed (the mixer, then the observer), to go on
        assert on(model) == {"cpu"}


def where_blocks_work() -> None:
    """Those on an accelerator there, those in memory and on disk on the compute device; in a plain forward at home."""
    with tempfile.TemporaryDirectory() as name, devices():
        sspruner.save(tiny_model(layers=3), name)
        places = {"backbone.layers.0": "other:0", "backbone.layers.1": "cpu", "backbone.layers.2": "disk"}
        model, _ = sspruner.load(name, device_map=places)
        ids = tokens(2, 9)
        replay = Replay(model, sspruner.trace(model), [(ids, torch.ones_like(ids, dtype=torch.bool))], "other:1")
        seen: list[set[str]] = []
        for block in model.backbone.layers:
            block.mixer.register_forward_pre_hook(lambda mixer, args: seen.append(on(mixer) | {str(args[0].device)}))
        for block in replay.blocks:
            replay.advance(block)
        assert seen == [{"other:0"}, {"other:1"}, {"other:1"}]
        seen.clear()
        model(input_ids=ids, use_cache=False)
        assert seen == [{"other:0"}, {"cpu"}, {"cpu"}]


def on(module: torch.nn.Module) -> set[str]:
    return {str(p.device) for p in module.parameters()}


def resumed() -> None:
    """What was begun on disk ends on devices, on which the blocks are that were cut before."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sspruner.save(zoo("mamba2").to(torch.bfloat16), root / "model")
        whole, _ = sspruner.load(root / "model")
        theirs = pruned(lambda: whole, scorer="balanced")
        with interrupted(8), suppress(Interrupted):  # one for each of three blocks that are scored, two for a cut one
            pruned(lambda: sspruner.load(root / "model", offload=root / "w")[0], scorer="balanced")
        with devices():
            device_map = {"": "other:1", "backbone.layers.1": "other:0"}
            model, _ = sspruner.load(root / "model", device_map=device_map, offload=root / "w")
            ours = pruned(lambda: model, resume=True, scorer="balanced")
            assert [on(block) for block in model.backbone.layers] == [{"other:1"}, {"other:0"}, {"other:1"}]
            check_close(ours, theirs)
            kept = offloaded(model)
            for block in kept.blocks:
                held = load_file(kept.folder / f"{block}.safetensors")
                assert all(torch.equal(value.cpu(), held[name]) for name, value in kept.tensors(block).items())


Run = Callable[..., None]


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Run]:
    """elsewhere(function, *families): one of the functions above, in a process that has the devices."""
    path = os.pathsep.join([str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    command, environment = [sys.executable, __file__], os.environ | {"PYTHONPATH": path}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:

        def call(function: str, *families: str) -> None:
            print(function, *families, file=process.stdin, flush=True)
            answer = next((line for line in process.stdout if line.startswith(ANSWER)), "")  # type: ignore[union-attr]
            assert answer, "the process has ended"
            assert not (error := json.loads(answer.removeprefix(ANSWER))), error

        yield call
        process.stdin.close()  # type: ignore[union-attr]


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(
    "families",
    [FAMILIES[::10], *(pytest.param(FAMILIES[i::10], marks=pytest.mark.exhaustive) for i in range(1, 10))],
    ids=lambda families: " ".join(families),
)
def test_a_pipeline_over_devices(families: list[str], elsewhere: Run) -> None:
    elsewhere("through_a_pipeline", *families)


@pytest.mark.slow
def test_auto_fills_devices_evenly_then_memory_then_the_disk(elsewhere: Run) -> None:
    elsewhere("auto")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_another_device(elsewhere: Run) -> None:
    elsewhere("on_another_device", "mamba2")


@pytest.mark.slow
def test_a_run_that_was_begun_on_disk(elsewhere: Run) -> None:
    elsewhere("resumed")


@pytest.mark.slow
def test_where_blocks_work(elsewhere: Run) -> None:
    elsewhere("where_blocks_work")


@pytest.mark.slow
def test_one_block_at_a_time_is_there(elsewhere: Run) -> None:
    elsewhere("one_block_at_a_time")


@pytest.mark.slow
def test_what_is_forgotten_is_an_error(elsewhere: Run) -> None:
    """The devices of these tests refuse what a GPU refuses."""
    elsewhere("mixed")


def mixed() -> None:
    with devices():
        one, other, here = torch.ones(3, device="other:0"), torch.ones(3, device="other:1"), torch.ones(3)
        for wrong in (lambda: one + other, lambda: one * here, lambda: torch.stack([here, other]), lambda: one.numpy()):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        assert (one + one.to("other:0") * 2).cpu().tolist() == [3, 3, 3]
        assert str((one + 1).device) == "other:0"
        assert one.to("other:1").device == (other[other > 0] + other).device == other.device


def serve() -> None:
    """Run the functions whose names come in, and answer each with its traceback, or with nothing."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        function, *families = line.split()
        error = ""
        try:
            for arguments in [(family,) for family in families] or [()]:
                globals()[function](*arguments)
        except BaseException:
            error = traceback.format_exc()[-3000:]
        print(ANSWER + json.dumps(error), flush=True)


if __name__ == "__main__":
    serve()
