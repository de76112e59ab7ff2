# The public names and where each is defined: the one list (sspruner/__init__.py reads it).

from .axes import AXES as AXES
from .axes import ELEMENT_AXES as ELEMENT_AXES
from .benchmarking.record import Bench as Bench
from .budgets.decide import plan as plan
from .calibrate.sources import Calibration as Calibration
from .calibrate.sources import calibration as calibration
from .calibrate.view import SSMView as SSMView
from .comparison.compare import compare as compare
from .compute.acceleration import accelerate as accelerate
from .compute.acceleration import decelerate as decelerate
from .errors import (
    InputError as InputError,
)
from .errors import (
    ModelError as ModelError,
)
from .errors import (
    PlanError as PlanError,
)
from .errors import (
    PluginError as PluginError,
)
from .errors import (
    ProcessError as ProcessError,
)
from .errors import (
    ProofError as ProofError,
)
from .errors import (
    SSPrunerError as SSPrunerError,
)
from .evaluation.evaluate import evaluate as evaluate
from .evaluation.result import Evaluation as Evaluation
from .graph.causality import not_causal as not_causal
from .graph.family import Family as Family
from .graph.fingerprint import fingerprint as fingerprint
from .graph.ssm_graph import SSMGraph as SSMGraph
from .graph.trace import trace as trace
from .io.bench import bench as bench
from .io.export import export as export
from .io.leaderboard import leaderboard as leaderboard
from .io.load import load as load
from .io.push import push_to_hub as push_to_hub
from .io.save import save as save
from .plans.plan import Plan as Plan
from .plugins.hookspecs import hookimpl as hookimpl
from .pruning.prune import prune as prune
from .pruning.refit import Refit as Refit
from .pruning.refit import refit as refit
from .pruning.result import Result as Result
from .pruning.sensitivity import Sensitivity as Sensitivity
from .pruning.sensitivity import sensitivity as sensitivity
from .recipes.compare import CompareRecipe as CompareRecipe
from .recipes.measure import BenchOptions as BenchOptions
from .recipes.measure import EvaluateOptions as EvaluateOptions
from .recipes.parts import (
    Allocation as Allocation,
)
from .recipes.parts import (
    Budget as Budget,
)
from .recipes.parts import (
    CalibrationText as CalibrationText,
)
from .recipes.parts import (
    Elements as Elements,
)
from .recipes.parts import (
    Limits as Limits,
)
from .recipes.parts import (
    Method as Method,
)
from .recipes.parts import (
    Reconstruction as Reconstruction,
)
from .recipes.parts import (
    Remove as Remove,
)
from .recipes.parts import (
    Scoring as Scoring,
)
from .recipes.parts import (
    Target as Target,
)
from .recipes.recipe import Recipe as Recipe
from .recipes.serving import Serving as Serving
from .recipes.train import DistilRecipe as DistilRecipe
from .recipes.train import GradualRecipe as GradualRecipe
from .recipes.train import Settings as Settings
from .recipes.train import TwistRecipe as TwistRecipe
from .reporting.html import report as report
from .scoring.score import score as score
from .scoring.scorer import Choose as Choose
from .scoring.scorer import Scorer as Scorer
from .scoring.scores import Scores as Scores
from .surgery.apply import apply as apply
from .surgery.mask import masked as masked
from .surgery.mask import unmask as unmask

__version__: str
__all__: list[str]
