"""A small synthetic data set for the tests: 100 training images of 8 x 8 pixels."""

from __future__ import annotations

from typing import Any

from lrd import recipe as recipes

SIZE = 8  # pixels a side


def data_section(**values: Any) -> recipes.Data:
    """The `data` section of a recipe; `values` replace its settings."""
    settings = {
        "dataset": "synthetic",
        "image_size": SIZE,
        "num_samples": 100,
        "batch_size": 48,
        **values,
    }
    return recipes.Data(**settings)
