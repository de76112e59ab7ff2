"""Held-out text is never calibrated on: overlaps are found at any shift, other text is no alarm, cuts remember."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import sspruner
from sspruner.calibrate.seen import FILE, KEY, RUN, Seen, seen_by, seen_of
from sspruner.calibrate.sources import check_held_out, with_more
from sspruner.recipes.parts import CalibrationText
from support.command import done, refused, saved_model
from support.tiny import tiny_model

LONG = st.integers(RUN, 5 * RUN)


def different(count: int, start: int = 0) -> torch.Tensor:
    """Return tokens no two of which are alike: int64 (count,)."""
    return torch.arange(start, start + count)


def seen_in(*windows: torch.Tensor) -> Seen:
    return Seen.of(torch.stack(windows), torch.ones(len(windows), len(windows[0]), dtype=torch.bool))


@example(calibrated=128, before=7, shift=0, after=40)
@given(calibrated=LONG, before=st.integers(0, 70), shift=st.integers(0, 5 * RUN), after=st.integers(0, 70))
def test_a_shared_run_is_found_at_any_shift(calibrated: int, before: int, shift: int, after: int) -> None:
    window = different(calibrated)
    shared = window[min(shift, calibrated - 1) :]
    for part in (shared, window[: len(shared)]):
        other = torch.cat([different(before, 1000), part, different(after, 2000)])
        enough = max(RUN, min(calibrated // 2, len(other) // 2))
        found = seen_in(different(calibrated, 3000), window).has(other)
        if len(part) >= enough + 2 * (RUN - 1):
            assert found
        if len(part) < enough:
            assert not found
    assert seen_in(window).has(window)


@given(count=LONG, other=LONG, width=st.integers(1, 3), seed=st.integers(0, 99))
def test_text_without_a_common_run_is_no_alarm(count: int, other: int, width: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    calibrated = torch.randint(0, 50, (width, count), generator=draw)
    fresh = torch.randint(50, 100, (other,), generator=draw)
    phrase = calibrated[0, : RUN - 1]  # shorter than a run
    seen = seen_in(*calibrated)
    assert not seen.has(fresh)
    assert not seen.has(torch.cat([fresh, phrase, fresh]))
    assert not Seen().has(calibrated[0])


def test_half_a_window_is_the_limit_and_padding_does_not_count() -> None:
    window, new = different(128), different(128, 500)
    seen = seen_in(window)
    assert not seen.has(torch.cat([window[:48], new[:80]]))  # three runs of 16
    assert seen.has(torch.cat([window[:64], new[:64]]))
    assert seen.has(torch.cat([new, window[:64], new]), length=128)
    assert not seen.has(torch.cat([window[:32], new[:32], window[32:64], new[:32]]))  # half, but not in a run
    mask = torch.zeros(1, 128, dtype=torch.bool)
    mask[0, :20] = True
    assert not Seen.of(window[None], mask).has(window[20:])
    assert not bool(Seen.of(window[None], mask).among(window[None], ~mask).any())


@given(st.lists(st.lists(st.integers(0, 9), min_size=20, max_size=20), min_size=1, max_size=4))
def test_the_record_reads_back_and_joins(rows: list[list[int]]) -> None:
    parts = [seen_in(torch.tensor(row)) for row in rows]
    whole = seen_in(*map(torch.tensor, rows))
    joined = Seen()
    for part in parts:
        joined |= part
    assert joined == whole == Seen.from_json(whole.to_json())
    assert seen_by({KEY: whole.to_json()}) == whole


@pytest.mark.parametrize("damage", [{"run": 8}, {"version": 2}, {"hashes": "AAA"}, {"hashes": "AAAA"}, {"half": "x"}])
def test_a_damaged_record_is_refused_by_load_and_empty_in_a_plan(damage: dict[str, Any], tmp_path: Path) -> None:
    model = cut_model()
    sspruner.save(model, tmp_path / "m")
    file = tmp_path / "m" / FILE
    data = json.loads(file.read_text(encoding="utf-8")) | damage
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(sspruner.InputError, match=FILE):
        sspruner.load(tmp_path / "m")
    assert not seen_by({KEY: json.dumps(data)})
    assert not seen_by({})


def data_of(model: Any, first: int = 0) -> sspruner.Calibration:
    draw = torch.Generator().manual_seed(first)
    tokens = torch.randint(1, model.config.vocab_size, (6, 48), generator=draw)
    return sspruner.calibration(tokens, model, samples=4, held_out=2)


def cut_model() -> Any:
    model = tiny_model(state=6)
    sspruner.prune(model, "ghost", sparsity=0.5, calibration=data_of(model))
    return model


def test_a_cut_model_remembers_what_it_was_calibrated_on_also_from_its_folder(tmp_path: Path) -> None:
    model = cut_model()
    data = data_of(model)
    sspruner.save(model, tmp_path / "m")
    loaded, _ = sspruner.load(tmp_path / "m")
    assert seen_of(loaded) == seen_of(model) == data.seen
    for each in (model, loaded):
        for bad in (data.tokens[:1], data.tokens[1:2, 3:]):
            with pytest.raises(sspruner.InputError, match="calibrated on"):
                sspruner.evaluate(each, text=bad, metrics=["perplexity"])
        sspruner.evaluate(each, text=data.held_out, metrics=["perplexity"])
    with pytest.raises(sspruner.InputError, match="calibrated on"):  # the cut one may be either of the two
        sspruner.evaluate(tiny_model(state=6), against=model, text=data.tokens, metrics=["perplexity"])
    (tmp_path / "m" / FILE).unlink()  # written by an older version
    assert not seen_of(sspruner.load(tmp_path / "m")[0])


def test_plans_hand_it_on_and_second_cuts_add_to_it() -> None:
    model = tiny_model(state=8)
    data = data_of(model)
    graph = sspruner.trace(model)
    plan = sspruner.plan(graph, sspruner.score(model, "ghost", calibration=data), sparsity=0.5)
    refitted = sspruner.refit(model, plan, "output", calibration=data_of(model, 1)).plan
    weights_alone = sspruner.plan(graph, sspruner.score(model, "magnitude"), sparsity=0.5)
    assert seen_by(plan.made_by) == data.seen
    assert not seen_by(weights_alone.made_by)
    sspruner.apply(model, refitted)
    assert seen_of(model) == data.seen | data_of(model, 1).seen
    sspruner.prune(model, "taylor", sparsity=0.5, calibration=data_of(model, 2))
    assert data_of(model, 2).seen.hashes < seen_of(model).hashes
    assert data.seen.hashes < seen_of(model).hashes


def test_a_limit_of_damage_reads_the_calibration_whatever_the_scorer() -> None:
    model = tiny_model(state=6)
    data = data_of(model)
    sspruner.prune(model, "magnitude", kl=10.0, calibration=data)
    assert seen_of(model) == data.seen


@pytest.mark.parametrize("job", ["prune", "compare"])
def test_held_out_windows_that_were_observed_are_refused(job: str) -> None:
    model = tiny_model(state=6)
    data = data_of(model)
    mixed = replace(data, held_out=torch.cat([data.held_out, data.tokens[:1].roll(5, 1)]),
                    held_out_mask=torch.cat([data.held_out_mask, data.mask[:1]]))  # fmt: skip
    with pytest.raises(sspruner.InputError, match="window 3 was calibrated on"):
        getattr(sspruner, job)(model, ["ghost"] if job == "compare" else "ghost", calibration=mixed)


def test_windows_of_a_text_that_repeats_itself_are_not_held_out() -> None:
    model = tiny_model(state=6)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, model.config.vocab_size, (7, 40), generator=draw)
    tokens[5] = tokens[0]
    data = sspruner.calibration(tokens, model, samples=4, held_out=3)
    assert torch.equal(data.held_out, tokens[[4, 6]])
    check_held_out(model, data)
    same = sspruner.calibration(tokens[:1].expand(7, 40), model, samples=4, held_out=3)
    assert (len(same.held_out), same.held_out_is_separate) == (3, False)  # the result says so
    assert not sspruner.calibration(tokens[:1], model).held_out_is_separate  # a single sequence serves for both
    cut = cut_model()
    earlier = data_of(cut).tokens[:1, 8:]
    again = sspruner.calibration(torch.cat([tokens[:4], earlier, tokens[6:]]), cut, samples=4, held_out=2)
    assert torch.equal(again.held_out, tokens[6:])  # the first cut observed the other


def test_more_windows_for_a_refit_repeat_nothing_that_is_held_out() -> None:
    model = tiny_model(state=6)
    tokens = torch.randint(1, model.config.vocab_size, (30, 40), generator=torch.Generator().manual_seed(0))
    tokens[8] = tokens[29]
    few, whole = with_more(tokens, model, None, CalibrationText(samples=4, seq_len=40), 9, 0)
    assert not whole.seen.among(few.held_out, few.held_out_mask).any()
    assert not any(torch.equal(row, tokens[8]) for row in whole.tokens)
    check_held_out(model, few, whole)


def test_the_command_ends_with_one_line(tmp_path: Path) -> None:
    text = tmp_path / "page.txt"
    text.write_text(" ".join(f"{word:04x}" for word in range(2000)), encoding="utf-8")
    model = saved_model(tmp_path / "model")
    small = ["--calibration", text, "--samples", 4, "--seq-len", 64, "--sparsity", 0.5]
    done("prune", model, *small, "--out", tmp_path / "cut")
    refused(tmp_path, ("was calibrated on",), "evaluate", tmp_path / "cut", "--text", text, "--metrics", "perplexity")


def test_steps_of_values_are_found_at_any_shift() -> None:
    values = torch.randn(128, 3, generator=torch.Generator().manual_seed(0))  # (T, channels)
    seen = Seen.of(values[None], torch.ones(1, 128, dtype=torch.bool))
    assert seen.has(torch.cat([values.new_zeros(7, 3), values]))
    assert not seen.has(values + 1e-3)
