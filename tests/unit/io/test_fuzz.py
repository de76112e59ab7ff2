"""Malformed files: a result or one clear error, in bounded time and memory; nothing else, whatever lies in a folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.io.skeleton import skeleton
from sspruner.plans.plan import Plan
from support.bounded import survives
from support.examples import examples
from support.native import native_model
from support.native_files import MIXERS, write
from support.tiny import half, tiny_model
from support.zoo import zoo

HUGE = [2**31, 2**63, 10**18, 10**400, 20_000_000, 2000]
VALUES = [
    *HUGE, -1, 0, 1, 0.5, 1e308, float("nan"), float("-inf"), None, True, "x", "x" * 100_000, "torch.float33", "../x",
    [], [1], [[[]]], [2**40] * 3, {}, {"a": 1}, {"weights": "../.."},
]  # fmt: skip
MORE_FIELDS = [  # that no folder here has, and that transformers or sspruner would read
    "sspruner", "num_labels", "id2label", "label2id", "auto_map", "quantization_config", "attn_implementation",
    "dtype", "tokenizer_class", "rope_parameters", "architectures", "tie_word_embeddings", "chunk_size", "text_config",
    "max_length", "is_encoder_decoder", "pruned_heads", "to_dict", "use_kernels", "hidden_act", "time_step_limit",
]  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good folders of every kind; and p.json with p.safetensors, s.safetensors, c.json for the folder plain."""
    base = tmp_path_factory.mktemp("good")
    (base / "models").mkdir()
    models = base / "models"
    model = tiny_model()
    sspruner.save(model, models / "plain", sspruner.load()[1])
    hybrid = zoo("zamba2")
    sspruner.apply(hybrid, half(sspruner.trace(hybrid)))
    sspruner.save(hybrid, models / "stock cut")
    mamba = zoo("mamba")
    name, selection = next(iter(half(sspruner.trace(mamba), "channel").groups.items()))
    sspruner.apply(mamba, Plan({name: selection}))
    sspruner.save(mamba, models / "cut")
    model.save_pretrained(models / "shards", max_shard_size="1KB")
    write(native_model(**MIXERS[0]), models / "native", "model.safetensors")
    write(native_model(**MIXERS[2]), models / "pickle")
    write(native_model(**MIXERS[0]), models / "native shards", "shards")
    scores = sspruner.score(model, "magnitude")
    scores.save(base / "s.safetensors")
    weights = sspruner.score(model, "magnitude", axis="weight")
    sspruner.plan(sspruner.trace(model), weights, sparsity=0.5).save(base / "p.json")
    curve = {str(k): 0.5 for k in range(1, 6)}
    data = {"version": 1, "tokens": 9, "made_with": {}, "curves": dict.fromkeys(scores.importance, curve)}
    (base / "c.json").write_text(json.dumps(data))
    return base


KINDS = ["plain", "stock cut", "cut", "shards", "native", "pickle", "native shards"]
WEIGHTS = {"cut": "weights/model.safetensors", "pickle": "pytorch_model.bin"}


@contextmanager
def copied(source: Path) -> Iterator[Path]:
    """A copy of a good folder, alone in another."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(shutil.copytree(source, Path(name) / "model"))


def read(folder: Path) -> None:
    """What every command does first."""
    model, _ = sspruner.load(folder)
    sspruner.trace(model)
    sspruner.fingerprint(model)


def both(folder: Path) -> None:
    survives(lambda: read(folder))
    survives(lambda: sspruner.trace(skeleton(folder)))
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def weights_of(folder: Path, kind: str) -> Path:
    return folder / WEIGHTS[kind] if kind in WEIGHTS else sorted(folder.glob("*.safetensors"))[0]


def places(data: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in JSON."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from places(value, (*above, key))


def changed(data: Any, place: tuple[Any, ...], value: Any) -> None:
    for key in place[:-1]:
        data = data[key]
    data[place[-1]] = value


@contextmanager
def long_numbers() -> Iterator[None]:
    """JSON with numbers of any length can be written."""
    most = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(most)


def spoil_json(data: st.DataObject, file: Path, more: list[str], times: int = 1) -> None:
    """Other values at one place, or more, or a field that was not there."""
    content = json.loads(file.read_text())
    for _ in range(data.draw(st.integers(1, times))):
        place = data.draw(st.sampled_from([*places(content), *((field,) for field in more)]))
        changed(content, place, data.draw(st.sampled_from(VALUES)))
    with long_numbers():
        file.write_text(json.dumps(content))


@pytest.mark.slow
@given(data=st.data())
def test_any_value_anywhere_in_a_config(data: st.DataObject, good: Path) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    with copied(good / "models" / kind) as folder:
        spoil_json(data, folder / "config.json", MORE_FIELDS, times=2)
        both(folder)


@given(data=st.data())
def test_any_damage_to_weights(data: st.DataObject, good: Path) -> None:
    """Truncated, flipped bits, other header lengths."""
    kind = data.draw(st.sampled_from(KINDS))
    with copied(good / "models" / kind) as folder:
        file = weights_of(folder, kind)
        content = bytearray(file.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else len(content)
        what = data.draw(st.sampled_from(["cut", "flip in header", "flip", "length", "nothing", "long"]))
        if what == "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        elif what in ("flip", "flip in header"):
            for _ in range(data.draw(st.integers(1, 3))):
                at = data.draw(st.integers(0, (len(content) if what == "flip" else header) - 1))
                content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif what == "length":
            content[:8] = data.draw(st.sampled_from([0, 1, header, len(content), 2**31, 2**63, 2**64 - 1])).to_bytes(8, "little")  # fmt: skip  # noqa: E501
        elif what == "long":
            content += b"\0" * 9
        else:
            content.clear()
        file.write_bytes(content)
        both(folder)


@given(data=st.data())
def test_any_header_of_safetensors(data: st.DataObject, good: Path) -> None:
    """Offsets that overlap or lie outside, shapes and types that do not fit."""
    with copied(good / "models" / "plain") as folder:
        file = weights_of(folder, "plain")
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        place = data.draw(st.sampled_from([*places(header), ("__metadata__",), ("more",)]))
        changed(header, place, data.draw(st.sampled_from([*VALUES, "F8_E4M3", "I64", "BOOL", [0, 4], [4, 0]])))
        with long_numbers():
            new = json.dumps(header).encode()
        file.write_bytes(len(new).to_bytes(8, "little") + new + content[end:])
        both(folder)


@pytest.mark.cover(most=12)
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                                  "model.safetensors.index.json", "header"])  # fmt: skip
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "9" * 100_000, "", "null", "[]", "{}", '"x"'])
def test_json_of_any_kind(file: str, content: str, good: Path) -> None:
    """Deep, long, of another type, empty."""
    with copied(good / "models" / "plain") as folder:
        if file == "header":
            data = content.encode()
            (folder / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
        else:
            (folder / file).write_text(content)
        both(folder)


@examples(25)
@given(name=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "generation_config.json"]), data=st.data())
def test_any_value_anywhere_in_small_files(name: str, data: st.DataObject, good: Path) -> None:
    with copied(good / "models" / "plain") as folder:
        content = json.loads((folder / name).read_text())
        if name == "tokenizer.json":  # its 4096 words are one place, not 4096
            shallow = list(places({k: v for k, v in content.items() if k != "model"}))
            shallow += [("model",), *(("model", key) for key in content["model"])]
        else:
            shallow = [*places(content), ("auto_map",), ("tokenizer_class",), ("model_max_length",)]
        changed(content, data.draw(st.sampled_from(shallow)), data.draw(st.sampled_from(VALUES)))
        with long_numbers():
            (folder / name).write_text(json.dumps(content))
        both(folder)


FILES = ["../plain/x.safetensors", "/etc/passwd", "..", ".", "", "a\0b", "a\\b", "x" * 5000, "\ud800", "absent",
         "model.safetensors.index.json", "config.json", 3, None, ["a"]]  # fmt: skip


@pytest.mark.parametrize("kind", ["shards", "native shards"])
@pytest.mark.parametrize("name", FILES, ids=lambda n: str(n)[:20].encode("ascii", "backslashreplace").decode())
def test_an_index_that_names_anything(kind: str, name: object, good: Path) -> None:
    with copied(good / "models" / kind) as folder:
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"][next(iter(content["weight_map"]))] = name
        index.write_text(json.dumps(content))
        error = survives(lambda: read(folder))
        assert isinstance(error, sspruner.ModelError)


def test_a_cycle_of_links(good: Path) -> None:
    with copied(good / "models" / "plain") as folder:
        for name in ("config.json", "model.safetensors"):
            (folder / name).unlink()
            (folder / name).symlink_to(name)
            assert survives(lambda: read(folder)) is not None


@given(data=st.data())
def test_any_plan(data: st.DataObject, good: Path) -> None:
    """plan.json and the tensors beside it: read, shown and applied, or refused; the model is never half cut."""
    with tempfile.TemporaryDirectory() as name:
        for file in good.glob("p.*"):
            shutil.copy(file, name)
        if data.draw(st.booleans()):
            spoil_json(data, Path(name) / "p.json", ["elements", "updates", "tensors"])
        else:
            damage(data, Path(name) / "p.safetensors")
        model = tiny_model()

        def apply() -> None:
            plan = Plan.load(Path(name) / "p.json")
            str(plan)
            sspruner.apply(model, plan)

        before = sspruner.fingerprint(model)
        if survives(apply):
            assert sspruner.fingerprint(model) == before


@given(data=st.data())
def test_any_scores_and_curves(data: st.DataObject, good: Path) -> None:
    graph = sspruner.trace(tiny_model())
    with tempfile.TemporaryDirectory() as name:
        here = Path(shutil.copytree(good, Path(name) / "good", ignore=shutil.ignore_patterns("models")))
        if data.draw(st.booleans()):
            damage(data, here / "s.safetensors")
        else:
            spoil_json(data, here / "c.json", ["tokens"])

        def plan() -> None:
            curves = sspruner.Sensitivity.load(here / "c.json").curves
            scores = sspruner.Scores.load(here / "s.safetensors")
            sspruner.plan(graph, scores, sparsity=0.5, allocation="adaptive", curves=curves)

        survives(plan)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_every_bit_of_the_header_of_scores(tmp_path: Path) -> None:
    """All of them: which fields lie where changes from file to file."""
    model, file = tiny_model(layers=1), tmp_path / "s.safetensors"
    graph = sspruner.trace(model)
    sspruner.score(model, "magnitude").save(file)
    content = file.read_bytes()
    for at in range(8 + int.from_bytes(content[:8], "little")):
        for bit in range(8):
            file.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            with suppress(sspruner.SSPrunerError):
                sspruner.plan(graph, sspruner.Scores.load(file), sparsity=0.5, allocation="global")


def damage(data: st.DataObject, file: Path) -> None:
    """Truncated, or a bit flipped, in half of the cases in the header."""
    content = bytearray(file.read_bytes())
    end = data.draw(st.sampled_from([8 + int.from_bytes(content[:8], "little"), len(content)]))
    at = data.draw(st.integers(0, end - 1))
    if data.draw(st.booleans()):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[at:]
    file.write_bytes(content)


ABSURD = """
import json, resource, sys
from pathlib import Path
import sspruner
from sspruner.io.skeleton import skeleton
sspruner.load(sys.argv[1])
config = Path(sys.argv[1], "config.json")
good = json.loads(config.read_text())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fields = [k for k, v in good.items() if type(v) is int] + ["num_labels"]
for size in (9_000_000, 2**62):
    for field in fields:
        config.write_text(json.dumps(good | {field: size}))
        for call in (sspruner.load, skeleton):
            try:
                call(sys.argv[1])
            except sspruner.SSPrunerError:
                pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.exhaustive
@pytest.mark.ci_cover(families=1)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "native"])
def test_absurd_sizes_are_refused_before_anything_is_allocated(kind: str, good: Path) -> None:
    """Every whole number in a config, in a process of its own: no gigabytes, and no long time."""
    with copied(good / "models" / kind) as folder:
        for file in folder.glob("token*"):
            file.unlink()
        done = subprocess.run(
            [sys.executable, "-c", ABSURD, str(folder)], capture_output=True, text=True, timeout=100, check=False
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 200, "MiB more than a good model takes"


@pytest.mark.parametrize("kind", ["plain", "cut"])
def test_a_config_of_more_than_its_weights_can_hold_is_refused(kind: str, good: Path) -> None:
    """A size that some model has, but not this one; after the cuts that the config records, too."""
    with copied(good / "models" / kind) as folder:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1_000_000}))
        with pytest.raises(sspruner.ModelError, match="its weights lack most of the"):
            sspruner.load(folder)
