"""The tiny random models of the conformance kit, for tests."""

from sspruner.testing.models import FAMILIES, SHAPE, SHAPES, TYPES, VOCABULARY, randomise, rounding, zoo
from sspruner.testing.structures import zoo_models

__all__ = ["FAMILIES", "SHAPE", "SHAPES", "TYPES", "VOCABULARY", "randomise", "rounding", "zoo", "zoo_models"]
