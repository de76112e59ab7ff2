"""llama.cpp reads what `--to gguf` writes: logits, greedy tokens and tokens of texts as transformers has them.

The environment is optional (`make .venv-llama/installed`). One process of it computes all models of a fixture. What is
not marked slow is the part that CI could run.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sspruner
from sspruner.formats.gguf_blocks import parts
from sspruner.formats.gguf_epsilon import _as_llama, epsilons
from sspruner.formats.gguf_options import GGUF
from sspruner.plans.plan import Plan
from sspruner.testing.plans import selection
from support.engines import needs, run
from support.gguf_cases import HOSTILE, VARIANTS, axes_of, by_pre, cut, sentencepiece_bpe, unigram, variant
from support.zoo import zoo

pytestmark = needs("llama")

CLOSE = 1e-4  # of the largest logit
NEW = 8  # greedy tokens
KEPT = (96, 64, 32, 20, 13)  # states of the reference model's 128
OTHERS = (
    "head 4", "head_dim 32", "hidden 128", "block 4", "head, head_dim and hidden", "padded states", "padded heads",
    "refit",
)  # fmt: skip
PRES = ("gpt-2", "starcoder", "falcon", "llama-bpe", "dbrx", "qwen2", "qwen35", "tekken", "gpt-4o")
MARKS = [text for text in HOSTILE if any("\u0300" <= c <= "\u036f" or "\u0900" <= c <= "\u097f" for c in text)]


@dataclass
class Bench:
    """Models as GGUF files, and what transformers and llama.cpp make of them."""

    folder: Path
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    expected: dict[str, tuple[np.ndarray, list[list[int]]]] = field(default_factory=dict)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, model: Any, to: Any = "gguf", new: int = NEW, one_epsilon: bool = False) -> None:
        """Export a model. Its prompts are of different lengths, and run as one batch.

        one_epsilon: transformers computes with the one epsilon of the file, too; what that costs is measured and said.
        """
        folder = self.folder / str(len(self.jobs))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="llama.cpp has one epsilon")
            sspruner.export(model, folder, to=to)
        prompts = random_prompts(model.config.vocab_size)
        self.jobs[name] = {"file": str(folder / "model.gguf"), "prompts": prompts, "new": new}
        described = parts(model)
        with _as_llama(described, epsilons(described)) if one_epsilon else nullcontext():
            self.expected[name] = by_transformers(model.float(), prompts, new)

    def run(self) -> Bench:
        """Let llama.cpp compute all models."""
        request, out = self.folder / "jobs.json", self.folder / "logits.npz"
        request.write_text(json.dumps(list(self.jobs.values())))
        answers = json.loads(run("llama", "llama_run.py", str(request), str(out)))
        logits = np.load(out)
        for i, (name, answer) in enumerate(zip(self.jobs, answers, strict=True)):
            rows = [logits[key] for key in logits.files if key.startswith(f"{i}.")]
            self.found[name] = answer | {"logits": rows}
        return self

    def check(self, name: str, close: float = CLOSE) -> float:
        """Assert that llama.cpp's logits and greedy tokens are transformers'. Returns the difference of logits."""
        answer, (logits, made) = self.found[name], self.expected[name]
        assert not answer["error"], answer["error"]
        difference = max(
            np.abs(ours - theirs).max() for ours, theirs in zip(logits, answer["logits"], strict=True)
        ) / max(np.abs(rows).max() for rows in logits)
        assert difference < close
        assert answer["made"] == made
        return float(difference)


def random_prompts(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (12, 7, 9)]


@torch.no_grad()
def by_transformers(model: Any, prompts: list[list[int]], new: int = NEW) -> tuple[list[np.ndarray], list[list[int]]]:
    """Return logits and greedy tokens, prompt by prompt."""
    logits, made = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        logits.append(model(input_ids=ids, use_cache=False).logits[0].float().numpy())
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options) if new else ids
        made.append(tokens[0, len(prompt) :].tolist())
    return logits, made


@pytest.fixture(scope="module")
def books() -> Callable[[], Any]:
    """Return a function that gives copies of the reference model in fp32."""
    model, _ = sspruner.load(dtype="float32")
    return lambda: copy.deepcopy(model)


def smaller(model: Any, axis: str, keep: int) -> Any:
    groups = sspruner.trace(model).on_axis(axis)
    return sspruner.apply(model, Plan({n: selection(g.groups, g.units, keep, 5) for n, g in groups.items()}))


def uneven(model: Any, axis: str) -> Any:
    """Cut one axis to another size in every layer."""
    groups = sspruner.trace(model).on_axis(axis)
    sizes = {name: max(1, g.units - 1 - i % 3) for i, (name, g) in enumerate(groups.items())}
    return sspruner.apply(model, Plan({n: selection(g.groups, g.units, sizes[n], 5) for n, g in groups.items()}))


@pytest.fixture(scope="module")
def reference(books: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("reference"))
    bench.add("dense", books())
    for keep in KEPT:
        bench.add(f"state {keep}", smaller(books(), "state", keep))
    for axis, keep in (("head", 4), ("head_dim", 32), ("hidden", 128), ("block", 4)):
        bench.add(f"{axis} {keep}", smaller(books(), axis, keep))
    bench.add("head, head_dim and hidden", cut(books(), "head", "head_dim", "hidden"))
    bench.add("padded states", uneven(books(), "state"), to="gguf-padded")
    bench.add("padded heads", uneven(books(), "head"), to="gguf-padded")
    calibration = torch.randint(4096, (12, 96), generator=torch.Generator().manual_seed(0))
    refit = sspruner.prune(books(), "magnitude", keep=32, refit="output", calibration=calibration)
    bench.add("refit", refit.model)
    return bench.run()


@pytest.mark.parametrize("name", ["dense", *(f"state {keep}" for keep in KEPT)])
def test_cut_states_of_the_reference_model(reference: Bench, name: str) -> None:
    reference.check(name)


@pytest.mark.parametrize("name", OTHERS)
def test_other_cuts_of_the_reference_model(reference: Bench, name: str) -> None:
    """Also those that stock configs cannot say; epsilons that a cut has changed cost nothing."""
    reference.check(name)


GDN: dict[str, dict[str, int]] = {  # axis -> what stays of it
    "dense": {},
    "channels of a head": {"state": 32, "head_dim": 32},
    "key heads": {"group": 1},
    "value heads": {"head": 1},
    "the rest": {"attn_head": 1, "mlp": 200, "hidden": 128, "block": 4},
}


@pytest.fixture(scope="module")
def gdn(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("gdn"))
    for name, axes in GDN.items():
        model, _ = sspruner.load("gdn-books", dtype="float32")
        for axis, keep in axes.items():
            model = smaller(model, axis, keep)
        bench.add(name, model)
    model, _ = sspruner.load("gdn-books", dtype="float32")
    bench.add("q8_0", model, to=GGUF("q8_0"), new=0)
    return bench.run()


@pytest.mark.parametrize("name", GDN)
def test_the_reference_model_of_delta_rules(gdn: Bench, name: str) -> None:
    gdn.check(name)


def test_an_element_type_of_delta_rules(gdn: Bench) -> None:
    gdn.check("q8_0", 3e-2)


CASES = [(name, axis) for name in VARIANTS for axis in ("dense", *axes_of(name))]
BOTH = {  # channels and hidden size together
    "mamba": ("channel", "hidden"),
    "falcon_mamba": ("channel", "hidden"),
    "jamba, tied": ("state", "dt_rank", "mlp"),
    "jamba, experts": ("expert", "expert_mlp", "mlp"),
    "bamba, partial rotary": ("head", "hidden", "state", "mlp", "attn_head"),
    "granite, no rope": ("head_dim", "hidden", "state", "mlp"),
    "falcon_h1, norm": ("head", "head_dim", "hidden", "state", "mlp"),
    "nemotron_h, experts": ("head", "state", "group", "attn_head", "expert", "expert_mlp"),
    "qwen3_5": ("state", "head_dim"),
    "qwen3_5, tied": ("state", "head_dim", "group", "mlp", "hidden"),
    "qwen3_5, experts": ("state", "head_dim", "head", "expert", "expert_mlp", "mlp", "hidden"),
    "qwen3_next, experts": ("state", "head_dim", "head", "group", "attn_head", "expert", "expert_mlp", "hidden"),
    "kimi_linear, experts": ("head", "attn_head", "expert", "expert_mlp", "mlp", "hidden"),
    "bailing_hybrid, experts": ("state", "head_dim", "head", "attn_head", "expert", "expert_mlp", "mlp", "hidden"),
}
PADDED = [
    ("mamba", "channel"), ("falcon_mamba", "state"), ("jamba, experts", "channel"), ("bamba, partial rotary", "head"),
    ("granite, rope and experts", "state"), ("granite, no rope", "mlp"), ("falcon_h1, norm", "head_dim"),
    ("nemotron_h", "state"), ("qwen3_5", "state"), ("qwen3_next, experts", "head_dim"),
    ("kimi_linear, experts", "head"), ("bailing_hybrid, experts", "state"),
]  # fmt: skip


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("families"))
    for name, axis in CASES:
        bench.add(f"{name}: {axis}", variant(name) if axis == "dense" else cut(variant(name), axis))
    for name, axes in BOTH.items():
        bench.add(f"{name}: {axes}", cut(variant(name), *axes), one_epsilon="head_dim" in axes and "state" in axes)
    kimi = zoo("kimi_linear", bias=False, heads=4, q_lora_rank=None)
    bench.add("kimi_linear, its own epsilon", kimi, one_epsilon=True)
    for name, axis in PADDED:
        bench.add(f"{name}: padded {axis}", uneven(variant(name), axis), to="gguf-padded")
    return bench.run()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "axis"), CASES)
def test_every_family_and_axis(families: Bench, name: str, axis: str) -> None:
    families.check(f"{name}: {axis}")


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_several_axes(families: Bench, name: str) -> None:
    families.check(f"{name}: {BOTH[name]}")


@pytest.mark.slow
def test_queries_and_keys_have_the_one_epsilon(families: Bench) -> None:
    """llama.cpp normalises them as the writer says when it measures the difference."""
    families.check("kimi_linear, its own epsilon")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "axis"), PADDED)
def test_layers_of_different_sizes_padded(families: Bench, name: str, axis: str) -> None:
    families.check(f"{name}: padded {axis}")


@pytest.fixture(scope="module")
def types(books: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("types"))
    for kind in ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"):
        bench.add(kind, smaller(books(), "state", 64), to=GGUF(kind), new=0)
    return bench.run()


@pytest.mark.parametrize(
    ("kind", "close"),
    [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 3e-2), ("q5_1", 0.15), ("q5_0", 0.15), ("q4_1", 0.3), ("q4_0", 0.3)],
)
def test_element_types(types: Bench, kind: str, close: float) -> None:
    """The fewer bits, the larger the difference; the largest logit is the measure."""
    difference = types.check(kind, close)
    assert difference > close / 100, "not stored in that type"


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, list[list[int]]]]:
    folder, jobs = tmp_path_factory.mktemp("tokenizers"), []
    tokenizers: dict[str, Any] = {name: by_pre(name) for name in PRES}
    tokenizers |= {"llama": sentencepiece_bpe(), "llama, no prefix": sentencepiece_bpe(False, False), "t5": unigram()}
    for i, tokenizer in enumerate(tokenizers.values()):
        model = zoo("mamba", bias=False, vocab_size=len(tokenizer) + 3)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="llama.cpp")
            sspruner.export(model, folder / str(i), tokenizer, to="gguf")
        jobs.append({"file": str(folder / str(i) / "model.gguf"), "prompts": [], "texts": HOSTILE})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    answers = json.loads(run("llama", "llama_run.py", str(folder / "jobs.json"), str(folder / "none.npz")))
    assert not [answer["error"] for answer in answers if answer["error"]]
    return {name: (tokenizers[name], answer["texts"]) for name, answer in zip(tokenizers, answers, strict=True)}


@pytest.mark.parametrize("name", [*PRES, "llama", "llama, no prefix", "t5"])
def test_tokens_of_texts(tokenized: Any, name: str) -> None:
    """Hostile texts get the same tokens, special tokens included; with the exceptions that the writer warns of."""
    tokenizer, found = tokenized[name]
    left_out = MARKS if name in ("tekken", "gpt-4o") else [t for t in HOSTILE if name == "t5" and t.startswith(" ")]
    for text, tokens in zip(HOSTILE, found, strict=True):
        assert text in left_out or tokens == tokenizer(text)["input_ids"], text
    assert len(left_out) < len(HOSTILE) / 2


@pytest.mark.parametrize(("name", "keep"), [("mamba2-books-4m", 128), ("mamba2-books-4m", 32), ("gdn-books", 64)])
def test_the_server_speaks_openai(tmp_path: Path, name: str, keep: int) -> None:
    """Two requests at once: texts go in, and the tokens of transformers come out, with their log-probabilities."""
    model, tokenizer = sspruner.load(name, dtype="float32")
    model = smaller(model, "state", keep) if keep == 32 else model
    prompts = ["The old man", "She said that the"]
    file = sspruner.export(model, tmp_path / "out", tokenizer, to="gguf") / "model.gguf"
    answers = json.loads(run("llama", "llama_server.py", str(file), str(NEW), *prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        _, made = by_transformers(model, [ids])
        content = answer["choices"][0]["logprobs"]["content"]
        assert [token["id"] for token in content] == made[0]
        assert answer["choices"][0]["text"] == tokenizer.decode(made[0])
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([ids + made[0]])).logits[0].log_softmax(-1)
        expected = [float(rows[len(ids) - 1 + i, token]) for i, token in enumerate(made[0])]
        assert [token["logprob"] for token in content] == pytest.approx(expected, abs=1e-3)
