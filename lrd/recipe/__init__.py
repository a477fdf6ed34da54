"""The typed recipe: `schema` declares its keys, `loader` reads it from YAML and overrides."""

from lrd.recipe.loader import load, parse
from lrd.recipe.schema import (
    Checkpoint,
    Data,
    LRDropout,
    Model,
    Optimizer,
    OptimizerGroup,
    Recipe,
    Schedule,
    Tracking,
    Trainer,
)

__all__ = [
    "Checkpoint",
    "Data",
    "LRDropout",
    "Model",
    "Optimizer",
    "OptimizerGroup",
    "Recipe",
    "Schedule",
    "Tracking",
    "Trainer",
    "load",
    "parse",
]
