"""Apply a plan to a model as a mask or as a slice. Everything is checked before anything is changed."""

from __future__ import annotations

from torch import nn

from sspruner.calibrate.seen import remember, seen_by
from sspruner.compute.device import offloaded
from sspruner.compute.settings import undisturbed
from sspruner.errors import PlanError
from sspruner.graph.fingerprint import fingerprint
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.trace import trace
from sspruner.graph.usable import check_present, check_vocabulary
from sspruner.plans.plan import Plan, check_plan
from sspruner.recipes.parts import check_mode
from sspruner.surgery.mask import is_masked, mask
from sspruner.surgery.proof import slice_with_proof
from sspruner.surgery.slice import slice_model
from sspruner.surgery.tensors import add_bias, new_biases


@undisturbed
def apply(model: nn.Module, plan: Plan, mode: str = "slice") -> nn.Module:
    """Apply `plan` to `model`, in place, and return it.

    mode "slice" makes the tensors smaller and proves the cut; mode "mask" zeroes the same units and can be undone with
    `sspruner.unmask`. Both write the plan's new values first and zero single elements. Raises InputError for another
    mode, PlanError if the plan does not fit this model, ProofError if the slice is not equal to the mask.
    """
    check_mode(mode)
    if is_masked(model):
        raise PlanError("the model is masked; call sspruner.unmask(model) first")
    if offloaded(model):
        raise PlanError("an offloaded model can be cut by sspruner.prune alone")
    graph = trace(model)
    check_present(model)
    check_vocabulary(model)
    check_plan(plan, graph, fingerprint(model), model)
    if mode == "mask":
        mask(model, plan, graph)
    else:
        slice_with_proof(model, plan, graph)
    remember(model, seen_by(plan.made_by))
    return model


def apply_sizes(model: nn.Module, plan: Plan) -> SSMGraph:
    """Cut the sizes of `model`, which may be on the meta device, as `plan` defines. Returns the graph after the cut.

    The plan's values are not written, nothing is proved or recorded, and the fingerprint is not compared, since there
    are no weights. Raises PlanError if the plan does not fit this model.
    """
    graph = trace(model)
    check_plan(plan, graph, model=model)
    biases = new_biases(model, plan.updates)
    for name in biases:
        add_bias(model, name)
    slice_model(model, plan, trace(model) if biases else graph)
    return trace(model)
