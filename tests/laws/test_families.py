"""Every family x every axis: masked = sliced, exact counts, composition, save and load, equivariance."""

from __future__ import annotations

import copy
import random
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from hypothesis import event, given, reject
from hypothesis import strategies as st
from transformers import PreTrainedModel

import sspruner
from sspruner.graph.group import DependencyGroup, as_rows
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.surgery.mask import mask
from sspruner.surgery.predict import removed_parameters, removed_state_bytes
from sspruner.surgery.proof import measured_state_bytes, slice_with_proof
from sspruner.surgery.slice import move_gain, slice_model
from support.family_plans import AXES, draw_plan, each_family, few, is_mixer, logits
from support.tiny import tokens
from support.zoo import rounding, zoo, zoo_models

WHOLE = ("block", "mixer")  # axes of whole modules

each_axis = pytest.mark.parametrize(("family", "axis"), [(f, axis) for f, axes in AXES.items() for axis in axes])
each_unit_axis = pytest.mark.parametrize(
    ("family", "axis"), [(f, axis) for f, axes in AXES.items() for axis in axes if axis not in WHOLE]
)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def assert_equal_logits(
    actual: PreTrainedModel, expected: PreTrainedModel, ids: torch.Tensor, floor: float = 1e-4
) -> None:
    """Equal up to 8 times what one rounding does to either model; one that amplifies rounding to 1% is no example."""
    tolerance = max(floor, *(8 * rounding(model, ids) for model in (actual, expected)))
    if not tolerance < 1e-2:
        reject()
    difference, reference = logits(actual, ids) - logits(expected, ids), logits(expected, ids)
    assert difference.abs().max() <= tolerance * reference.abs().max()  # also fails on NaN


def narrow(model: PreTrainedModel) -> PreTrainedModel:
    """The model as transformers makes it in bf16."""
    made = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.bfloat16).eval()
    made.load_state_dict(model.state_dict())
    return made


def sharing(model: PreTrainedModel) -> set[frozenset[str]]:
    """The groups of names that are one Parameter; asserts that those are the names that share storage."""
    by_id, by_storage = defaultdict(set), defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id[id(parameter)].add(name)
        by_storage[parameter.untyped_storage().data_ptr()].add(name)
    groups = [{frozenset(names) for names in by.values() if len(names) > 1} for by in (by_id, by_storage)]
    assert groups[0] == groups[1]
    return groups[0]


@each_family
def test_a_family_has_exactly_the_axes_of_the_table(family):
    assert sorted(sspruner.trace(zoo(family)).axes) == sorted(AXES[family])


# 1. masked = sliced


FOLDED = [
    ("mamba2", "head"),
    ("bamba", "head_dim"),
    ("falcon_h1", "hidden"),
    ("qwen3_next", "state"),
    ("falcon_mamba", "state"),
]


@pytest.mark.cover(families=10, least=30)
@each_axis
@few(2)
@given(st.data())
def test_masked_equals_sliced(family, axis, data):
    masked_is_sliced(family, axis, data)


@pytest.mark.parametrize(("family", "axis"), FOLDED)
@few(2)
@given(st.data())
def test_masked_equals_sliced_where_a_norm_is_folded(family, axis, data):
    """Cases that every run has, whatever the cover above takes: each kind of fold once."""
    masked_is_sliced(family, axis, data)


def masked_is_sliced(family, axis, data):
    """The engine's two modes, without its own proof. A bf16 cut is the fp32 cut of the same values, rounded."""
    model, ids = data.draw(zoo_models((family,))), tokens()
    half = narrow(model) if data.draw(st.booleans(), "bf16") else None
    model = model if half is None else copy.deepcopy(half).float()
    graph = sspruner.trace(model)
    plan = draw_plan(data, graph, (axis,))
    masked, sliced = copy.deepcopy(model), model
    mask(masked, plan, graph)
    slice_model(sliced, plan, graph)
    assert_equal_logits(sliced, masked, ids)
    if half is not None:
        slice_with_proof(half, plan, graph)
        wide = dict(sliced.named_parameters())
        for name, parameter in half.named_parameters():
            assert torch.equal(parameter, wide[name].to(parameter.dtype)), name


# 2. several axes in one plan, and what leaves the model


@pytest.mark.cover
@each_family
@few(3)
@given(st.data())
def test_mixed_axes_in_one_pass(family, data):
    model, ids = data.draw(zoo_models((family,))), tokens()
    graph = sspruner.trace(model)
    axes = data.draw(st.lists(st.sampled_from(AXES[family]), min_size=2, unique=True), "axes")
    plan = draw_plan(data, graph, tuple(axes))
    masked, before = copy.deepcopy(model), count(model)
    mask(masked, plan, graph)
    parameters, state = removed_parameters(model, plan, graph), removed_state_bytes(plan, graph)
    state_before = measured_state_bytes(model, ids)
    expected_parameters, expected_state, expected_mixers = by_hand(model, masked, plan)
    proof = slice_with_proof(model, plan, graph)
    assert_equal_logits(model, masked, ids)
    assert (proof.parameters_removed, proof.state_bytes_removed) == (parameters, state)
    assert count(model) == before - parameters == expected_parameters
    assert measured_state_bytes(model, ids) == state_before - state == expected_state
    assert [count(m) for m in model.modules() if is_mixer(m)] == expected_mixers
    after = sspruner.trace(model)
    assert (after.parameters, after.state_bytes) == (expected_parameters, expected_state)
    assert {a: s.after for a, s in plan.groups.items() if a in after.groups and axis_stays(a, plan)} == {
        a: after.groups[a].units for a in plan.groups if a in after.groups and axis_stays(a, plan)
    }


def axis_stays(name: str, plan: Plan) -> bool:
    """Whether a group of the plan is found under the same name after the cut: no block moved."""
    return not any(other.endswith(":block") for other in plan.groups) and not name.endswith(":mixer")


def count(module: torch.nn.Module) -> int:
    """Number of parameters, those shared once."""
    return sum(p.numel() for p in module.parameters())


def by_hand(model: PreTrainedModel, masked: PreTrainedModel, plan: Plan) -> tuple[int, int, list[int]]:
    """What the cut model must have: parameters, bytes of state, parameters of each mixer. No engine code is used.

    Parameters: those that are not 0 in the masked model, for the zoo has none, and are not in a module that goes; the
    weight of a norm that all heads of a delta rule share has as many as one head, and no mask. State and mixers: from
    the sizes of each mixer and the plan.
    """
    gone = dropped_paths(model, plan)
    names = defaultdict(list)
    for name, parameter in masked.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    left = {p for p, held in names.items() if not all(any(f"{n}.".startswith(g) for g in gone) for n in held)}
    mixers = [
        mixer_by_hand(path, mixer, plan)
        for path, mixer in model.named_modules()
        if is_mixer(mixer) and not any(f"{path}.".startswith(g) for g in gone)
    ]
    mixer_sizes = [size for size, _ in mixers]
    shared = sum(
        plan.groups[f"{path}:head_dim"].before - plan.groups[f"{path}:head_dim"].after
        for path, mixer in model.named_modules()
        if is_mixer(mixer) and (hasattr(mixer, "forget_gate") or hasattr(mixer, "head_k_dim"))
        if f"{path}:head_dim" in plan.groups and not any(f"{path}.".startswith(g) for g in gone)
    )
    return sum(int(p.count_nonzero()) for p in left) - shared, sum(state for _, state in mixers), mixer_sizes


def dropped_paths(model: PreTrainedModel, plan: Plan) -> list[str]:
    """Prefixes of everything that goes as a whole: blocks, mixers, and Zamba2's adapters of hybrid layers that go."""
    gone = []
    mixers = [path for path, module in model.named_modules() if is_mixer(module)]
    for name, selection in plan.groups.items():
        layer, _, axis = name.rpartition(":")
        if axis == "mixer":
            gone += [f"{mixers[i]}." for i in selection.dropped(0)]
        if axis == "block":
            gone += [f"{layer}.{i}." for i in selection.dropped(0)]
            if model.config.model_type == "zamba2":
                hybrid = [i for i, kind in enumerate(model.config.layers_block_type) if kind == "hybrid"]
                slots = {str(hybrid.index(i)) for i in selection.dropped(0) if i in hybrid}
                names = [n for n, _ in model.named_parameters(remove_duplicate=False)]  # under every layer that shares
                adapters = [re.match(r".*_adapter_list\.(\d+)\.", n) for n in names]
                gone += [found[0] for found in adapters if found and found[1] in slots]
    return gone


def mixer_by_hand(path: str, mixer: torch.nn.Module, plan: Plan) -> tuple[int, int]:
    """(parameters, bytes of state) of a mixer after the cut, from its sizes before it."""

    def after(axis: str, before: int) -> int:
        return plan.groups[f"{path}:{axis}"].after if f"{path}:{axis}" in plan.groups else before

    hidden = (getattr(mixer, "o_proj", None) or mixer.out_proj).weight.shape[0]
    for name, selection in plan.groups.items():
        hidden = selection.after if name.endswith(":hidden") else hidden
    if hasattr(mixer, "forget_gate"):
        H, K, V = (
            after(axis, size) for axis, size in zip(("head", "state", "head_dim"), kda_sizes(mixer), strict=True)
        )
        narrow = "g_a_proj" in dict(
            mixer.named_children()
        )  # decay and gate come through R numbers, else from the input
        R = mixer.g_a_proj.weight.shape[0] if narrow else hidden
        size = (2 * H * K + H * V) * (hidden + 4) + H * hidden  # q, k, v and their convolution, b
        size += H * (K + V) * R + 2 * R * hidden * narrow + H * K + H  # decay, gate, dt_bias, A_log
        return size + V + hidden * H * V, 4 * H * K * V
    if hasattr(mixer, "head_k_dim"):  # a gated delta net
        G, K, V = (
            after("group", mixer.num_k_heads),
            after("state", mixer.head_k_dim),
            after("head_dim", mixer.head_v_dim),
        )
        H = G * after("head", mixer.num_v_heads // mixer.num_k_heads)
        size = 2 * (G * K + H * V + H) * hidden + (2 * G * K + H * V) * 4  # q, k, v, z, b, a, the convolution
        return size + 2 * H + V + hidden * H * V, 4 * H * K * V  # dt_bias, A_log, norm, output
    bias, conv = int(mixer.in_proj.bias is not None), mixer.conv1d.kernel_size[0] + int(mixer.conv1d.bias is not None)
    N = after("state", mixer.ssm_state_size)
    if hasattr(mixer, "dt_bias"):  # Mamba2
        G, P = after("group", mixer.n_groups), after("head_dim", mixer.head_dim)
        H = G * after("head", mixer.num_heads // mixer.n_groups)
        D, norm = H * P, int(hasattr(getattr(mixer, "norm", None), "weight"))
        size = (2 * D + 2 * G * N + H) * (hidden + bias) + (D + 2 * G * N) * conv + 3 * H + norm * D
        return size + hidden * (D + bias), 4 * D * N
    R = after("dt_rank", mixer.time_step_rank)
    if hasattr(mixer, "n_mamba_heads"):  # zamba
        H, P = after("head", mixer.n_mamba_heads), after("head_dim", mixer.mamba_head_dim)
    else:
        H, P = 1, after("channel", mixer.intermediate_size)
    D = H * P
    norms = sum(p.numel() for n, p in mixer.named_parameters() if "layernorm" in n) and R + 2 * N  # jamba
    scan = H * (R + 2 * N) * P + D * R + D + D * N + D  # x_proj, dt_proj and its bias, A_log, D
    return 2 * D * (hidden + bias) + D * conv + scan + norms + hidden * (D + bias), 4 * D * N


def kda_sizes(mixer: torch.nn.Module) -> tuple[int, int, int]:
    """Heads, and key and value channels of each."""
    heads = mixer.forget_gate.A_log.numel()
    return heads, len(mixer.forget_gate.dt_bias) // heads, len(mixer.o_norm.weight)


# 3. composition, save and load


@pytest.mark.slow
@pytest.mark.cover(families=3)
@each_family
@few(2)
@given(st.data())
def test_cut_cut_save_load(family, tmp_path_factory, data):
    """Two cuts, each equal to its mask; then the folder gives the same model: logits, tokens, config, sharing."""
    model, ids = data.draw(zoo_models((family,))), tokens()
    for _ in range(2):
        graph = sspruner.trace(model)
        plan = draw_plan(data, graph, AXES[family])
        masked, shared = copy.deepcopy(model), sharing(model)
        mask(masked, plan, graph)
        slice_with_proof(model, plan, graph)
        assert_equal_logits(model, masked, ids)
        assert sharing(model) == renamed(shared, plan)
    folder = tmp_path_factory.mktemp("cut")
    sspruner.save(model, folder / "model")
    loaded, _ = sspruner.load(folder / "model")
    assert {n: p.tolist() for n, p in tensors(loaded)} == {n: p.tolist() for n, p in tensors(model)}
    loaded = copy.deepcopy(loaded)  # weights mapped from a file lie unaligned, where BLAS may round differently
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert sharing(loaded) == sharing(model)
    assert config_fields(loaded) == config_fields(model)
    assert {n: (type(m), vars_of(m)) for n, m in loaded.named_modules()} == {
        n: (type(m), vars_of(m)) for n, m in model.named_modules()
    }
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **how), model.generate(ids, **how))
    sspruner.save(loaded, folder / "again")
    first, again = ({p.relative_to(folder / n): p for p in (folder / n).rglob("*.*")} for n in ("model", "again"))
    assert first.keys() == again.keys()
    for file, path in first.items():
        assert path.read_bytes() == again[file].read_bytes(), file


@pytest.mark.slow
@pytest.mark.cover
@each_family
def test_an_even_cut_then_an_uneven_one_loads(family, tmp_path):
    """The first cut is written into the config's own field, the second one cannot be: the field is as it was."""
    model, ids = zoo(family), tokens()
    original = model.config.to_dict()
    for layers, after in ((None, 3), (1, 2)):
        graph = sspruner.trace(model)
        groups = list(graph.on_axis("state").values())[:layers]
        plan = Plan({g.name: Selection(g.units, (tuple(range(after)),) * g.groups) for g in groups})
        slice_with_proof(model, plan, graph)
    changed = {k for k, v in original.items() if model.config.to_dict()[k] != v}
    assert not changed - {"sspruner", "_name_or_path", "transformers_version"}
    sspruner.save(model, tmp_path / "cut")
    loaded = copy.deepcopy(sspruner.load(tmp_path / "cut")[0])
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def tensors(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """Every parameter and buffer; a module in the place of a dropped mixer keeps buffers that nothing reads."""
    gone = tuple(f"{path}." for path, module in model.named_modules() if type(module).__name__ == "Nothing")
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if not name.startswith(gone)]
    return [*model.named_parameters(remove_duplicate=False), *buffers]


def vars_of(module: torch.nn.Module) -> dict[str, object]:
    """The numbers that a module's forward may read."""
    return {k: v for k, v in vars(module).items() if isinstance(v, int | float | dict) and k[0] != "_"}


def config_fields(model: PreTrainedModel) -> dict[str, object]:
    """The config as written, without what says where it was read."""
    of_the_file = ("_name_or_path", "transformers_version", "architectures", "dtype")
    return {k: v for k, v in model.config.to_dict().items() if k not in of_the_file}


def renamed(shared: set[frozenset[str]], plan: Plan) -> set[frozenset[str]]:
    """Which names share a parameter once blocks have gone and the others have moved up."""
    for name, selection in plan.groups.items():
        path, _, axis = name.rpartition(":")
        if axis == "block":
            new = {f"{path}.{old}.": f"{path}.{i}." for i, old in enumerate(selection.keep[0])}
            cut = re.compile(rf"{re.escape(path)}\.\d+\.")
            shared = {
                frozenset(
                    cut.sub(lambda m, new=new: new[m[0]], n) for n in names if not (m := cut.match(n)) or m[0] in new
                )
                for names in shared
            }
    return {names for names in shared if len(names) > 1}


# 4. permuting the units of an axis changes nothing


@pytest.mark.slow
@pytest.mark.cover(families=10, least=15)
@each_unit_axis
@few(2)
@given(st.data())
def test_permuting_the_units_permutes_the_plan(family, axis, data):
    """The model with shuffled units is the same function, and its permuted plan makes the same cut model."""
    model, ids = data.draw(zoo_models((family,))), tokens()
    graph = sspruner.trace(model)
    plan = draw_plan(data, graph, (axis,))
    pick, permuted, moved = random.Random(data.draw(st.integers(0, 2**16))), copy.deepcopy(model), {}
    for name, selection in plan.groups.items():
        group = graph.groups[name]
        orders = [pick.sample(range(group.units), group.units) for _ in range(group.groups)]
        permute(permuted, group, orders)
        keep = [
            tuple(new for new, old in enumerate(order) if old in kept)
            for order, kept in zip(orders, selection.keep, strict=True)
        ]
        moved[name] = Selection(group.units, tuple(keep))
        if any(order != sorted(order) for order in orders):
            event("shuffled")
    assert_equal_logits(permuted, model, ids)
    slice_model(permuted, Plan(moved), graph)
    slice_model(model, plan, graph)
    assert_equal_logits(permuted, model, ids)


def permute(model: PreTrainedModel, group: DependencyGroup, orders: list[list[int]]) -> None:
    """Put unit orders[g][i] in the place of unit i of set g, in every tensor that the group names."""
    if group.gain:  # factors that all sets share stay behind, as ones
        move_gain(model, group.gain)
    order = torch.tensor(orders)[..., None]
    for member in group.members:
        owner, _, leaf = member.tensor.rpartition(".")
        tensor = getattr(model.get_submodule(owner), leaf)
        source = member.index.gather(1, order.expand_as(member.index))
        front = tensor.data.movedim(member.dims, tuple(range(len(member.dims))))
        to = torch.unravel_index(member.index.flatten(), front.shape[: len(member.dims)])
        front[to] = as_rows(tensor.data, member.dims)[source.flatten()].clone()
