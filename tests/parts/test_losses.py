"""A recipe's loss is torch's cross-entropy, or a function of the user's own that is tried out."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from lrd import recipe
from lrd.errors import UserError
from lrd.parts.losses import LossFunction, build_loss, check_loss
from tests.helpers.optimizers import assert_same_bits

OWN = "tests.helpers.own_parts.loss"
CLASSES = 10


def section(**trainer) -> recipe.Trainer:
    return recipe.parse({"trainer": trainer}, "test").trainer


def make_batch(size: int = 6) -> tuple[Tensor, Tensor]:
    """Logits (N, C) that need a gradient, and labels (N,)."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(size, CLASSES, generator=generator).requires_grad_()
    return logits, torch.randint(CLASSES, (size,), generator=generator)


def value_and_gradient(loss_function: LossFunction) -> tuple[Tensor, Tensor]:
    logits, labels = make_batch()
    loss = loss_function(logits, labels)
    loss.backward()
    return loss.detach(), logits.grad


def test_the_default_is_torchs_cross_entropy_bit_for_bit():
    expected = value_and_gradient(nn.functional.cross_entropy)
    assert_same_bits(value_and_gradient(build_loss(section())), expected)


def test_label_smoothing_is_a_mixture_with_the_uniform_distribution():
    loss, _ = value_and_gradient(build_loss(section(label_smoothing=0.2)))
    logits, labels = make_batch()
    log_probs = logits.log_softmax(1)  # (N, C)
    hard = -log_probs[torch.arange(len(labels)), labels].mean()
    uniform = -log_probs.mean()
    torch.testing.assert_close(loss, 0.8 * hard + 0.2 * uniform)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_mixed_labels_is_the_mean_of_the_losses_of_both(smoothing):
    loss_function = build_loss(section(label_smoothing=smoothing))
    logits, labels = make_batch()
    others = labels.roll(1)
    one_hot, other_one_hot = (nn.functional.one_hot(x, CLASSES).float() for x in (labels, others))

    loss = loss_function(logits, 0.7 * one_hot + 0.3 * other_one_hot)
    expected = 0.7 * loss_function(logits, labels) + 0.3 * loss_function(logits, others)
    torch.testing.assert_close(loss, expected)


def test_an_own_function_is_the_loss():
    loss, _ = value_and_gradient(build_loss(section(loss=f"{OWN}:focal_loss")))
    logits, labels = make_batch()
    prob = logits.softmax(1)[torch.arange(len(labels)), labels]
    torch.testing.assert_close(loss, (-((1 - prob) ** 2) * prob.log()).mean())


def test_an_own_module_is_made_and_its_buffers_go_to_the_device():
    weighted = build_loss(section(loss=f"{OWN}:WeightedLoss"), torch.device("meta"))
    assert isinstance(weighted, nn.Module)
    assert weighted.weight.device.type == "meta"


@pytest.mark.parametrize(
    "name",
    [
        "cross_entropy",
        f"{OWN}:focal_loss",
        f"{OWN}:WeightedLoss",
        f"{OWN}:ready_made_loss",
        "torch.nn:CrossEntropyLoss",
        "torch.nn.functional:cross_entropy",
    ],
)
def test_a_sound_loss_passes_the_check_in_silence(name, capsys):
    trainer = section(loss=name)
    check_loss(trainer, build_loss(trainer), CLASSES)
    assert capsys.readouterr().out == ""


def test_a_loss_that_is_no_mean_over_the_batch_gets_a_line(capsys):
    trainer = section(loss=f"{OWN}:sum_loss")
    check_loss(trainer, build_loss(trainer), CLASSES)
    line = capsys.readouterr().out
    assert line.startswith(f"trainer.loss: {OWN}:sum_loss is not a mean over the batch (")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LearnedTemperature", " has a parameter, temperature, which would be neither trained nor"),
        ("NotAModule", " is a class, but not a torch.nn.Module"),
        ("per_sample", r" returns a Tensor of shape \(8,\), not a tensor of shape \(\)"),
        ("number", " returns a float, not a tensor"),
        ("detached", " has no gradient"),
        ("accuracy", " has no gradient"),
        ("infinite", " is -?inf for logits near 0"),
        ("noisy", ": two calls with the same batch differ"),
        ("breaking", r" failed: ValueError: .*batch_size.* \(loss.py, line \d+\)"),
        ("one_argument", " failed: TypeError: .*positional argument"),
        ("focal_los", ": .* has no focal_los .did you mean focal_loss"),
    ],
)
def test_a_fault_of_an_own_loss_is_one_line(name, message):
    trainer = section(loss=f"{OWN}:{name}")
    with pytest.raises(UserError) as error:
        check_loss(trainer, build_loss(trainer), CLASSES)
    assert re.match(f"trainer.loss: {OWN}:{name}{message}", str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["focal_loss", "ready_made_loss"])
@pytest.mark.parametrize("keys", [{"mixup": 0.2}, {"cutmix": 1.0}])
def test_a_loss_that_takes_probabilities_passes_the_check_with_mixing(name, keys, capsys):
    trainer = section(loss=f"{OWN}:{name}")
    check_loss(trainer, build_loss(trainer), CLASSES, data=recipe.Data(**keys))
    assert capsys.readouterr().out == ""


def test_a_loss_of_probabilities_alone_is_tried_with_what_it_gets():
    trainer = section(loss=f"{OWN}:soft_loss")
    check_loss(trainer, build_loss(trainer), CLASSES, data=recipe.Data(mixup=0.2))
    with pytest.raises(UserError, match=r"soft_loss failed: RuntimeError: [^;]*$"):
        check_loss(trainer, build_loss(trainer), CLASSES, data=recipe.Data())


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"mixup": 0.2}, "data.mixup"),
        ({"cutmix": 1.0}, "data.cutmix"),
        ({"mixup": 0.2, "cutmix": 1.0}, "data.mixup and data.cutmix"),
    ],
)
def test_a_loss_that_takes_no_probabilities_is_refused_with_mixing(keys, named):
    trainer = section(loss=f"{OWN}:WeightedLoss")
    with pytest.raises(UserError) as error:
        check_loss(trainer, build_loss(trainer), CLASSES, data=recipe.Data(**keys))
    line = str(error.value)
    assert re.match(rf"trainer.loss: {OWN}:WeightedLoss failed: .* \(loss.py, line \d+\); ", line)
    assert line.endswith(
        f"; with {named} it gets labels as probabilities of the classes, float (N, C)"
    )
    assert "\n" not in line


def test_a_module_that_needs_arguments_is_refused():
    with pytest.raises(UserError, match=rf"^trainer.loss: {OWN}:NeedsArgument .*: 'weight'"):
        build_loss(section(loss=f"{OWN}:NeedsArgument"))
