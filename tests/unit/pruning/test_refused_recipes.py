"""Recipes that cannot be met: one line that says what, where and what to do; the model stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
from cyclopts import CycloptsError

import sspruner
from sspruner.cli.main import app
from support.command import STATE
from support.tensors import same, tensors
from support.tiny import tiny_model, tokens
from support.zoo import zoo

LAYER = "backbone.layers.0.mixer"
GROUP = f"{LAYER}:state"
HEADS = f"{LAYER}:head"
IN_PROJ = f"{LAYER}.in_proj:weight"
Says = tuple[str, ...]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(groups=2, head_dim=8, state=STATE)


@pytest.fixture(scope="module")
def hybrids() -> dict[str, Any]:
    return {"zamba2": zoo("zamba2"), "nemotron": zoo("nemotron_h"), "mamba": zoo("mamba")}


def refused(model: Any, says: Says, *args: str) -> None:
    """Check that `prune` refuses the recipe of a command line, with `says` in its message, and changes no weight."""
    before, data = tensors(model), sspruner.calibration(tokens(4, 32), model, samples=2, held_out=2)

    def run() -> None:
        _, bound, _ = app.parse_args(["prune", *args], exit_on_error=False, print_error=False)
        sspruner.prune(model, bound.arguments["recipe"], calibration=data)

    with pytest.raises((sspruner.SSPrunerError, CycloptsError)) as error:
        run()
    message = " ".join(str(error.value).split())
    for words in says:
        assert words in message
    assert same(tensors(model), before)


@pytest.mark.cover(most=36)
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            "--scorer ghots",
            ("unknown scorer 'ghots'", "known: balanced, block-influence, flap, ghost,", "did you mean 'ghost'?"),
        ),
        ("--sparsity -0.1", ("sparsity -0.1: must be at least 0 and below 1",)),
        ("--sparsity 1", ("sparsity 1: must be at least 0 and below 1",)),
        ("--sparsity 1.5", ("sparsity 1.5: must be at least 0 and below 1",)),
        ("--sparsity nan", ("sparsity nan: must be at least 0 and below 1",)),
        ("--keep 17", ("keep 17", LAYER, "only 16 units")),
        ("--keep 0", ("keep 0: must be at least 1",)),
        ("--keep 7 --multiple-of 4", ("keep 7: not a multiple of 4; nearest: 4 or 8",)),
        ("--keep 4 --sparsity 0.5", ("either sparsity", "or keep", "not both")),
        ("--multiple-of 0", ("multiple-of 0: must be at least 1",)),
        ("--allocation globl", ("unknown allocation 'globl'; known: uniform",)),
        ("--sparsity 0", ("the budget removes nothing",)),
        ("--sparsity 0 --ratio layers.1.*=0", ("the budget removes nothing",)),
        ("--keep 16", ("the budget removes nothing",)),
        ("--ignore *", ("the budget removes nothing",)),
        ("--ignore layers.0.* --ignore layers.1.*", ("the budget removes nothing",)),
        ("--axis state=0", ("the budget removes nothing",)),
        ("--sparsity 0.01", (GROUP, "0.01 removes nothing from 2 sets of 16", "nearest", "is 0.0625 (keeps 15)")),
        ("--sparsity 0.99", (GROUP, "0.99 removes everything from 2 sets of 16", "nearest", "is 0.9375 (keeps 1)")),
        ("--sparsity 0.2 --multiple-of 8", (GROUP, "0.2 removes nothing", "in multiples of 8", "is 0.5 (keeps 8)")),
        ("--sparsity 0.9 --multiple-of 8", (GROUP, "0.9 removes everything", "in multiples of 8", "is 0.5 (keeps 8)")),
        ("--sparsity 0.5 --multiple-of 16", (GROUP, "0.5 removes", "multiples of 16", "cannot be cut", "ignore")),
        ("--ratio layers.1.*=0.01", ("layers.1.mixer:state: 0.01 removes nothing", "is 0.0625 (keeps 15)")),
        ("--axis state=0.5,head=0.1", (HEADS, "0.1 removes nothing from 2 sets of 2 units", "is 0.5 (keeps 1)")),
        ("--axis head --sparsity 0.9", (HEADS, "0.9 removes everything from 2 sets of 2", "is 0.5 (keeps 1)")),
        ("--axis group --sparsity 0.1", (f"{LAYER}:group", "0.1 removes nothing from 2 units", "is 0.5 (keeps 1)")),
        ("--axis stat", ("'ghost' does not score axis 'stat'; it scores channel, group, head, head_dim, state",)),
        ("--axis mlp", ("'ghost' does not score axis 'mlp'", "these score mlp: flap, magnitude, random")),
        (
            "--axis state --scorer block-influence",
            (
                "'block-influence' does not score axis 'state'; it scores block;",
                "these score state: balanced, ghost, last, magnitude",
            ),
        ),
        ("--axis state=0.5,mlp=0.2", ("'ghost' does not score axis 'mlp'", "these score mlp: flap, magnitude, random")),
        ("--axis mlp --scorer random", ("axis 'mlp': Mamba2ForCausalLM has none; it has state, head, head_dim,",)),
        (
            "--axis channel",
            ("axis 'channel': Mamba2ForCausalLM has none; it has state, head, head_dim, group, hidden",),
        ),
        ("--axis state=0.5,dt_rank=0.2 --scorer random", ("axis 'dt_rank': Mamba2ForCausalLM has none; it has",)),
        ("--axis state=0.5,head", ("--axis 'state=0.5,head': expected NAME=VALUE",)),
        ("--axis state,head", ("--axis 'state,head': expected NAME=VALUE",)),
        ("--axis state=0.5,", ("--axis 'state=0.5,': expected NAME=VALUE",)),
        ("--axis =0.5", ("--axis '=0.5': expected NAME=VALUE",)),
        ("--axis state=0.5,state=0.2", ("--axis 'state=0.5,state=0.2'", "each name once")),
        ("--axis state=half", ("--axis 'state=half': 'half' is not a number",)),
        ("--axis state=", ("--axis 'state='", "'' is not a number")),
        ("--axis state=1", ("state: sparsity 1: must be at least 0 and below 1",)),
        ("--axis state=nan", ("state: sparsity nan: must be at least 0 and below 1",)),
        ("--axis state=0.5,head=-1", ("head: sparsity -1: must be at least 0 and below 1",)),
        ("--axis state=0.5 --sparsity 0.5", ("every axis has its own fraction", "leave out sparsity and keep")),
        ("--axis state=0.5,head=0.5 --keep 4", ("every axis has its own fraction", "leave out sparsity and keep")),
        ("--ratio layers.0.*", ("--ratio 'layers.0.*': expected NAME=VALUE",)),
        ("--ratio =0.5", ("--ratio '=0.5': expected NAME=VALUE",)),
        ("--ratio layers.0.*=most", ("--ratio layers.0.*=most: 'most' is not a number",)),
        ("--ratio layers.0.*=1", ("layers.0.*: sparsity 1: must be at least 0 and below 1",)),
        ("--ratio layers.9.*=0.5", ("pattern 'layers.9.*': matches nothing that is cut; the nearest name is layers.",)),
        ("--ratio *.mixer:head=0.5", ("pattern '*.mixer:head': matches nothing", "the nearest name is layers.")),
        ("--ignore layer.0.*", ("pattern 'layer.0.*': matches nothing that is cut; the nearest name is layers.0.",)),
        ("--ignore layers.0.mixer:head", ("pattern 'layers.0.mixer:head': matches nothing that is cut",)),
        ("--ignore LAYERS.0.*", ("pattern 'LAYERS.0.*': matches nothing that is cut",)),
        ("--ignore layers.0.* --ignore nose", ("pattern 'nose': matches nothing that is cut",)),
        ("--scorer state=ghots", ("unknown scorer 'ghots'", "did you mean 'ghost'?")),
        ("--scorer head=ghost", ("no scorer for axis 'state': head have one; add state=NAME",)),
        ("--axis state=0.5,head=0.5 --scorer state=ghost", ("no scorer for axis 'head'", "add head=NAME")),
        ("--scorer state=block-influence", ("'block-influence' does not score axis 'state'; it scores block",)),
        ("--scorer state=ghost,magnitude", ("--scorer 'state=ghost,magnitude': expected NAME=VALUE",)),
        ("--scorer state=ghost,state=random", ("--scorer 'state=ghost,state=random'", "each name once")),
        ("--scorer =ghost", ("--scorer '=ghost': expected NAME=VALUE",)),
        ("--scorer state=", ("unknown scorer ''", "known: balanced, block-influence, flap, ghost")),
        ("--mode slim", ("mode 'slim': must be slice or mask",)),
        ("--option depth=3", ("scorer 'ghost': unknown option 'depth'; it takes variant",)),
        ("--option variant=best", ("scorer 'ghost': variant='best'; known: joint, means",)),
        ("--option variant", ("--option 'variant': expected name=value",)),
        ("--option =joint", ("--option '=joint': expected name=value",)),
        ("--seed 99999999999999999999", ("seed 99999999999999999999: must fit in 64 bits",)),
    ],
)
def test_units(args: str, says: Says, model: Any) -> None:
    refused(model, says, *args.split())


@pytest.mark.cover(most=18)
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            "",
            (
                "'ghost' does not score axis 'weight'",
                "these score weight: gradmag, magnitude, random, snip, sparsegpt,",
            ),
        ),
        ("--scorer rrqr", ("'rrqr' does not score axis 'weight'; it scores state; these score weight: gradmag",)),
        (
            "--scorer wanda --axis decay",
            ("'wanda' does not score axis 'decay'", "score decay: magnitude, random, snip"),
        ),
        ("--axis decay --scorer magnitude", ("axis 'decay': Mamba2ForCausalLM has none; it has state,", "weight")),
        ("--axis weights --scorer magnitude", ("'magnitude' does not score axis 'weights'; it scores",)),
        ("--scorer wanda --pattern 4:2", ("pattern '4:2': expected N:M with 0 < N < M; 2:4 keeps 2 of every 4",)),
        ("--scorer wanda --pattern a", ("pattern 'a': expected N:M",)),
        ("--scorer wanda --pattern 2:", ("pattern '2:': expected N:M",)),
        ("--scorer wanda --pattern 0:4", ("pattern '0:4': expected N:M",)),
        ("--scorer wanda --pattern 2:5", (IN_PROJ, "rows of 16 elements; pattern 2:5 needs a multiple of 5", "ignore")),
        ("--scorer wanda --pattern 2:4 --sparsity 0.3", ("pattern 2:4 removes 0.5, not 0.3; leave one out",)),
        (
            "--scorer wanda --pattern 2:4 --ratio *:weight=0.3",
            (
                IN_PROJ,
                "pattern 2:4 removes 0.5, not 0.3",
            ),
        ),
        ("--scorer wanda --pattern 2:4 --granularity row", ("pattern 2:4 compares 4 elements; leave out granularity",)),
        ("--scorer wanda --pattern 2:4 --keep 2", ("keep counts units; of single elements give the fraction",)),
        ("--scorer wanda --granularity column", ("unknown granularity 'column'; known: row, tensor, global",)),
        ("--scorer wanda --granularity pattern", ("unknown granularity 'pattern'; known: row, tensor, global",)),
        ("--scorer wanda --rows E", ("rows 'E': no tensor has such rows; these are known: B, C, dt, out, x, z",)),
        ("--scorer wanda --rows B,C", ("rows 'B,C': no tensor has such rows",)),
        ("--scorer wanda --keep 4", ("keep counts units; of single elements give the fraction to remove, sparsity",)),
        ("--scorer wanda --sparsity 0", ("the budget removes nothing",)),
        ("--scorer wanda --ignore *", ("the budget removes nothing",)),
        (
            "--scorer wanda --granularity global --ignore layers.0.*.inproj",
            ("matches nothing that is cut", "layers.0."),
        ),
        ("--scorer wanda --granularity global --ratio layers.9.*=0.1", ("pattern 'layers.9.*': matches nothing",)),
        ("--scorer sparsegpt --option block=0", ("scorer 'sparsegpt': block=0",)),
        (
            "--scorer sparsegpt --option block=6 --pattern 2:4",
            ("6 columns at once; pattern 2:4 needs a multiple of 4",),
        ),
        ("--scorer sparsegpt --option block=4 --granularity global", ("decides by blocks of columns", "row or tensor")),
        ("--axis state --pattern 2:4", ("pattern, granularity and rows are for single elements: axis weight",)),
        ("--axis state --granularity row", ("pattern, granularity and rows are for single elements: axis weight",)),
        ("--axis state --rows B", ("pattern, granularity and rows are for single elements: axis weight",)),
        ("--axis state --rows B --one-shot", ("pattern, granularity and rows are for single elements: axis weight",)),
        (
            "--axis state --scorer sparsessm",
            (
                GROUP,
                "only Mamba1-type mixers",
            ),
        ),
        ("--axis state --allocation global --keep 4", ("keep says how many units stay in every layer",)),
        ("--axis state=0.5,weight=0.25 --scorer magnitude --pattern 2:4", (IN_PROJ, "removes 0.5, not 0.25")),
        ("--axis head=0.5,head_dim=0.5 --scorer flap", (f"{LAYER}.out_proj.bias: changed by the scorers of two axes",)),
        (
            "--axis head=0.5,head_dim=0.5 --scorer flap --one-shot",
            ("out_proj.bias: changed by the scorers of two axes",),
        ),
        (
            "--axis state=0.5,weight=0.5 --scorer wanda --option state.reduction=max",
            ("no scorer of this run is called",),
        ),
    ],
)
def test_single_elements(args: str, says: Says, model: Any) -> None:
    refused(model, says, "--axis", "weight", *args.split())


HYBRIDS: dict[str, tuple[str, str, Says]] = {  # a model, options, and what the error says
    "an axis of another family": (
        "mamba",
        "--axis head",
        ("axis 'head': MambaForCausalLM has none; it has state, ch",),
    ),
    "one group": ("mamba", "--axis group", ("axis 'group': MambaForCausalLM has none", "it has state, channel, dt_r")),
    "no mixer axis": ("zamba2", "--axis mixer --scorer random", ("axis 'mixer': Zamba2ForCausalLM has none; it has",)),
    "mlp too little": (
        "zamba2",
        "--axis mlp --scorer magnitude --sparsity 0.04",
        ("shared_transformer.feed_forward:mlp: 0.04 removes nothing from 10 units", "is 0.1 (keeps 9)"),
    ),
    "hidden in eights": (
        "nemotron",
        "--axis hidden --scorer magnitude --sparsity 0.1",
        ("model:hidden: 0.1 removes nothing from 24 units in multiples of 8", "is 0.3333 (keeps 16)"),
    ),
    "hidden kept in eights": (
        "nemotron",
        "--axis hidden --scorer magnitude --keep 20",
        ("keep 20: not a multiple of 8; nearest: 16 or 24",),
    ),
    "every attention layer": (
        "nemotron",
        "--axis block --scorer magnitude --keep 3 --ignore layers.0 --ignore layers.1 --ignore layers.4",
        ("the plan drops every attention layer; one has to stay", "ignore 'model.layers.2"),
    ),
    "every mixer": (
        "nemotron",
        "--axis block --scorer magnitude --keep 3 --ignore layers.1 --ignore layers.2 --ignore layers.4",
        ("the plan drops every mixer; one has to stay", "ignore 'model.layers.3"),
    ),
    "every mixer, as a mask": (
        "nemotron",
        "--axis block --scorer magnitude --keep 3 --ignore layers.1 --ignore layers.2 --ignore layers.4 --mode mask",
        ("the plan drops every mixer; one has to stay",),
    ),
    "more protected than kept": (
        "zamba2",
        "--axis block --scorer block-influence --keep 2 --ignore layers.0 --ignore layers.1 --ignore layers.3",
        ("model.layers:block: keeping 2 units is less than the 3 that --ignore protects",),
    ),
    "all blocks": (
        "zamba2",
        "--axis block --scorer block-influence --sparsity 0.95",
        ("0.95 removes everything", "is 0.8 "),
    ),
    "a unit of a block": (
        "zamba2",
        "--axis block --scorer block-influence --ignore layers.5",
        ("pattern 'layers.5'", "layers."),
    ),
    "a ratio for a block": (
        "zamba2",
        "--axis block --scorer block-influence --ratio layers.1=0.5",
        ("'layers.1'", "nothing"),
    ),
}


@pytest.mark.parametrize("case", HYBRIDS)
def test_what_a_family_cannot_meet(case: str, hybrids: dict[str, Any]) -> None:
    name, args, says = HYBRIDS[case]
    refused(hybrids[name], says, *args.split())
