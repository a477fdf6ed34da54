"""docs/time-machine.md: what it says of examples/one_bad_sample.py."""

from __future__ import annotations

from pathlib import Path

from examples import one_bad_sample
from lrd import recipe as recipes
from lrd.data.positions import BatchOrder

ROOT = Path(__file__).parents[2]


def test_the_damaged_image_comes_at_step_812():
    recipe = recipes.load(ROOT / "examples" / "one_bad_sample.yaml")
    order = BatchOrder(
        one_bad_sample.NUM_TRAIN, recipe.data.batch_size, recipe.seed, 0, 1, accumulation_steps=1
    )
    assert order.steps_per_epoch == 1024
    assert one_bad_sample.DAMAGED in order.indices(811).tolist()
    page = (ROOT / "docs" / "time-machine.md").read_text(encoding="utf-8")
    assert f"Image {one_bad_sample.DAMAGED} is the one" in page


def test_only_that_image_is_damaged():
    (damaged, labels), (test, _), _ = one_bad_sample.digits()
    (whole, whole_labels), (whole_test, _), _ = one_bad_sample.digits(is_damaged=False)
    differs = (damaged != whole).any((1, 2))
    assert differs.nonzero()[0].tolist() == [one_bad_sample.DAMAGED]
    assert (labels == whole_labels).all()
    assert (test == whole_test).all()
