"""EngineLimit: whether the sequences of `max-batch` run at once in the target's engine, by the engine's own count."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sspruner.benchmarking.cache_layers import cache_layers
from sspruner.benchmarking.engine_memory import EngineCache, engine_cache
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan
from sspruner.recipes.parts import Limits
from sspruner.recipes.serving import engine_of
from sspruner.surgery.sizes import sizes
from sspruner.units import as_bytes

if TYPE_CHECKING:
    from sspruner.recipes.recipe import Recipe

LAYERS = {"block", "mixer"}  # axes that remove whole layers


@dataclass(frozen=True)
class EngineLimit:
    """A number of sequences that an engine must run at once, with a pool of memory for its caches.

    The pool is `state_memory`, or `memory` without the weights: then an upper bound, since an engine also keeps
    activations there. With several GPUs, memory is that of each, and weights are split evenly.
    """

    model: Any
    graph: SSMGraph
    recipe: Recipe

    @property
    def engine(self) -> str:
        """Name of the engine."""
        return engine_of(self.recipe.target.runtime)

    def on_paper(self, limits: Limits) -> Limits:
        """Return the limits without those that the engine counts."""
        return Limits(**{**vars(limits), "max_batch": None, "memory": None, "state_memory": None})

    def cache(self, plan: Plan | None = None) -> EngineCache:
        """Return the caches in the engine, before or after a plan."""
        layers = cache_layers(self.model, self.graph, plan)
        return engine_cache(self.engine, layers, self.recipe.serving, self.recipe.target.tp)

    def pool(self, plan: Plan | None = None) -> float:
        """Return the bytes for caches on each GPU, before or after a plan."""
        limits, tp = self.recipe.limits, self.recipe.target.tp
        weights = sizes(self.model, self.graph, plan).weight_bytes / tp
        rooms = [limits.state_memory, None if limits.memory is None else limits.memory - weights]
        return max(0.0, min(float(room) for room in rooms if room is not None))

    def sequences(self, plan: Plan | None = None) -> int:
        """Return the sequences that run at once."""
        return self.cache(plan).sequences(self.pool(plan), self.recipe.serving.context)

    def exceeds(self, plan: Plan | None = None) -> str:
        """Return why the sequences do not fit, with the numbers; "" if they do."""
        fit, wanted = self.sequences(plan), self.recipe.limits.max_batch or 0
        return f"max-batch {wanted}: {self._said(fit, plan)}" if fit < wanted else ""

    def used(self, plan: Plan | None = None) -> str:
        """Describe how many sequences fit, and in what."""
        return self._said(self.sequences(plan), plan)

    def _said(self, fit: int, plan: Plan | None) -> str:
        context = self.recipe.serving.context
        return f"{self.engine} runs {fit:,} sequences of {context:,} tokens in {as_bytes(self.pool(plan))} for caches"

    def to_json(self, plan: Plan | None = None) -> dict[str, Any]:
        """Return what is recorded of a cut: the pool, the context, the sequences before and after, and notes."""
        context, pool = self.recipe.serving.context, self.pool(plan)
        return {
            "name": self.engine,
            "context": context,
            "pool_bytes": pool,
            "sequences": {"dense": self.sequences(), "pruned": self.sequences(plan)},
            "notes": self.cache(plan).notes(pool, (context,)),
        }


def layer_notes(model: Any, graph: SSMGraph, axes: Iterable[str], recipe: Recipe) -> list[str]:
    """Describe, before a plan is made, how many layers a cut must remove to free memory in the target's engine.

    Empty if no whole layers are cut, or the target is no engine. Raises InputError for options that it does not have.
    """
    engine = engine_of(recipe.target.runtime)
    if not engine or not set(axes) & LAYERS:
        return []
    cache = engine_cache(engine, cache_layers(model, graph), recipe.serving, recipe.target.tp)
    return [f"{engine} counts layers in groups: {line}" for line in cache.layer_steps(recipe.serving.context)]


def engine_limit(model: Any, graph: SSMGraph, recipe: Recipe) -> EngineLimit | None:
    """Return the limit that the target's engine counts; None if the target is no engine, or nothing limits sequences.

    Raises InputError for options that the engine does not have.
    """
    if not engine_of(recipe.target.runtime) or recipe.limits.max_batch is None:
        return None
    limit = EngineLimit(model, graph, recipe)
    limit.cache()
    return limit
