"""LRDropout in training loops that somebody else has written for a stock optimizer."""

import copy
import hashlib

import pytest
import torch
from torch.optim import lr_scheduler

import lrd
from lrd import LRDropout
from tests.clients import reference
from tests.clients.reference import assert_same_bits, masked_by_hand, values
from tests.clients.small_training import loss_of, make_model, train

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01}),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def make_pair(name, *, keep_prob=0.5, seed=0, **arguments):
    """Two models with their optimizers: one with LRDropout, one masked by hand."""
    cls, stock_arguments = OPTIMIZERS[name]
    arguments = {**stock_arguments, **arguments}
    model = make_model()
    optimizer = cls(model.parameters(), **copy.deepcopy(arguments))
    LRDropout(optimizer, keep_prob=keep_prob, seed=seed)

    by_hand_cls = masked_by_hand(cls, keep_prob=keep_prob, seed=seed)
    by_hand_model = make_model()
    by_hand = by_hand_cls(by_hand_model.parameters(), **copy.deepcopy(arguments))
    return (model, optimizer), (by_hand_model, by_hand)


@pytest.mark.parametrize("keep_prob", [0.5, 0.9])
@every_optimizer
def test_a_plain_loop(name, keep_prob):
    some, others = make_pair(name, keep_prob=keep_prob, seed=11)
    assert_same_bits(train(*some, range(5)), train(*others, range(5)))


@pytest.mark.parametrize("use_kernels", ["0", "1"])
@every_optimizer
def test_a_closure_that_computes_the_gradients(name, use_kernels, monkeypatch):
    """Lightning passes one in every step."""
    monkeypatch.setenv("LRD_FUSED", use_kernels)

    def train_with_closures(model, optimizer):
        losses = []
        for step in range(4):

            def closure(step=step):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
        return losses, values(list(model.parameters()))

    some, others = make_pair(name)
    losses, params = train_with_closures(*some)
    other_losses, other_params = train_with_closures(*others)
    assert losses == other_losses
    assert_same_bits(params, other_params)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_step_with_a_closure_is_taken_in_one_pass(name, monkeypatch):
    monkeypatch.setenv("LRD_FUSED", "1")
    cls, arguments = OPTIMIZERS[name]
    model = make_model()
    optimizer = cls(model.parameters(), **arguments)
    dropout = LRDropout(optimizer)
    n_calls = 0

    def closure():
        nonlocal n_calls
        n_calls += 1
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert dropout.is_fused
    assert n_calls == 1


def test_an_lr_that_is_a_tensor_and_is_changed_in_place():
    (model, optimizer), (by_hand_model, by_hand) = make_pair(
        "AdamW", lr=torch.tensor(0.01), foreach=False
    )

    def halve(stepping):
        def take_step(_):
            stepping.step()
            stepping.param_groups[0]["lr"].mul_(0.5)

        return take_step

    params = train(model, optimizer, range(4), halve(optimizer))
    assert_same_bits(params, train(by_hand_model, by_hand, range(4), halve(by_hand)))


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8),
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3)),
    ],
    ids=["OneCycleLR", "warm-up from lr 0"],
)
def test_schedulers(make_scheduler):
    some, others = make_pair("SGD")
    results = []
    for model, optimizer in (some, others):
        scheduler = make_scheduler(optimizer)

        def take_step(_, optimizer=optimizer, scheduler=scheduler):
            optimizer.step()
            scheduler.step()

        results.append(train(model, optimizer, range(6), take_step))
    assert_same_bits(*results)


def test_a_grad_scaler_that_skips_a_step():
    """The scale begins so high that the first gradients overflow."""
    some, others = make_pair("SGD")
    results = []
    for model, optimizer in (some, others):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
        scales = []
        for step in range(6):
            optimizer.zero_grad()
            scaler.scale(16 * loss_of(model, step)).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())

        assert scales[0] < 2.0**127, "the first step is to be skipped"
        results.append(values(list(model.parameters())))

    assert_same_bits(*results)
    assert some[1].param_groups[0]["mask_step"] == others[1].updates_done < 6


def test_gradients_that_are_accumulated_over_two_batches():
    some, others = make_pair("AdamW")
    results = []
    for model, optimizer in (some, others):
        for step in range(6):
            (loss_of(model, step) / 2).backward()
            if step % 2 == 1:
                optimizer.step()
                optimizer.zero_grad()
        results.append(values(list(model.parameters())))
    assert_same_bits(*results)


def test_an_average_of_the_weights():
    some, others = make_pair("SGD")
    results = []
    for model, optimizer in (some, others):
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )

        def take_step(_, model=model, optimizer=optimizer, average=average):
            optimizer.step()
            average.update_parameters(model)

        train(model, optimizer, range(4), take_step)
        results.append(values(list(average.parameters())))
    assert_same_bits(*results)


class AdamWOfAUser(torch.optim.AdamW):
    """A class whose step does something before torch's."""

    fails = False

    def step(self, closure=None):
        if self.fails:
            raise OSError("the step fails")
        return super().step(closure)


@pytest.mark.parametrize("use_kernels", ["0", "1"])
def test_a_class_whose_step_calls_torchs(use_kernels, monkeypatch):
    """torch makes `step` run the hooks in each class that has an instance: here in both classes."""
    monkeypatch.setenv("LRD_FUSED", use_kernels)
    torch.optim.AdamW(make_model().parameters())
    monkeypatch.setitem(OPTIMIZERS, "a user's", (AdamWOfAUser, {"lr": 0.01}))
    some, others = make_pair("a user's")
    assert_same_bits(train(*some, range(3)), train(*others, range(3)))
    assert some[1].param_groups[0]["mask_step"] == 3


def test_a_step_that_fails_does_not_stop_the_masks():
    torch.optim.AdamW(make_model().parameters())
    model = make_model()
    optimizer = AdamWOfAUser(model.parameters(), lr=0.01)
    LRDropout(optimizer)
    optimizer.fails = True
    with pytest.raises(OSError, match="the step fails"):
        train(model, optimizer, range(1))
    optimizer.fails = False
    params = train(model, optimizer, range(3))

    by_hand_model = make_model()
    by_hand = masked_by_hand(torch.optim.AdamW)(by_hand_model.parameters(), lr=0.01)
    assert_same_bits(params, train(by_hand_model, by_hand, range(3)))


# One optimizer for each parameter, and several optimizers


def step_one_optimizer_for_each_parameter(make_optimizers):
    """As one does to step while the backward pass still runs, which saves memory for gradients."""
    model = make_model()
    params = list(model.parameters())
    optimizers = make_optimizers(model)

    def step(param, optimizer):
        def hook(_):
            optimizer.step()
            optimizer.zero_grad()

        param.register_post_accumulate_grad_hook(hook)

    for param, optimizer in zip(params, optimizers, strict=True):
        step(param, optimizer)
    for number in range(4):
        loss_of(model, number).backward()
    return values(params)


def test_one_optimizer_for_each_parameter_with_first_index():
    """The masks are those of one optimizer with all parameters."""

    def make_optimizers(model):
        optimizers = []
        for index, param in enumerate(model.parameters()):
            optimizer = torch.optim.SGD([param], lr=0.1, momentum=0.9)
            LRDropout(optimizer, seed=3, first_index=index)
            optimizers.append(optimizer)
        return optimizers

    params = step_one_optimizer_for_each_parameter(make_optimizers)
    _, (model, by_hand) = make_pair("SGD", seed=3)
    assert_same_bits(params, train(model, by_hand, range(4)))


def test_one_optimizer_for_each_parameter_with_names():
    """The masks are those of one optimizer with all parameters, also counted by name."""

    def make_optimizers(model):
        optimizers = []
        for name, param in model.named_parameters():
            optimizer = torch.optim.SGD([(name, param)], lr=0.1, momentum=0.9)
            LRDropout(optimizer, seed=3, index_by="name")
            optimizers.append(optimizer)
        return optimizers

    params = step_one_optimizer_for_each_parameter(make_optimizers)

    model = make_model()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    LRDropout(optimizer, seed=3, index_by="name")
    assert_same_bits(params, train(model, optimizer, range(4)))


NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_the_index_of_a_name_is_that_of_the_documentation(prefix):
    """The first eight bytes of SHA-256, little-endian, whatever the model is wrapped in."""
    model = make_model()
    names_and_params = [(prefix + name, param) for name, param in model.named_parameters()]
    optimizer = torch.optim.SGD(names_and_params, lr=1.0)
    LRDropout(optimizer, seed=9, index_by="name")

    before = values(list(model.parameters()))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()

    for name, param, old in zip(NAMES, model.parameters(), before, strict=True):
        index = index_of(name)
        keep = reference.keep_mask(param, seed=9, step=0, index=index, keep_prob=0.5)
        assert torch.equal(param != old, keep)


def index_of(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def test_names_are_needed_where_masks_go_by_name():
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="named_parameters"):
        LRDropout(optimizer, index_by="name")
    assert "keep_prob" not in optimizer.param_groups[0]


def test_names_that_are_the_same_without_what_wrappers_put_before_them_are_refused():
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    names = ["module.fc.weight", "fc.weight"]
    optimizer = torch.optim.SGD(list(zip(names, params, strict=True)), lr=0.1)
    with pytest.raises(ValueError, match="same index"):
        LRDropout(optimizer, index_by="name")


def forget_warnings(monkeypatch):
    """As in a new process: warnings are given once in each."""
    monkeypatch.setattr("lrd.optim.step_watch._warnings_given", set())


def test_two_optimizers_that_draw_the_same_masks_are_warned_of_once(monkeypatch, recwarn):
    forget_warnings(monkeypatch)
    models = [make_model(), make_model()]
    optimizers = [lrd.optim.SGD(model.parameters(), lr=0.1, seed=5) for model in models]
    for step in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            loss_of(model, step).backward()
            optimizer.step()
    messages = [str(warning.message) for warning in recwarn if "same masks" in str(warning.message)]
    assert len(messages) == 1
    assert "first_index" in messages[0]


@pytest.mark.parametrize(
    "settings", [[{"seed": 5}, {"seed": 6}], [{"seed": 5}, {"seed": 5, "first_index": 4}]]
)
def test_two_optimizers_with_other_masks_bring_no_warning(settings, monkeypatch, recwarn):
    forget_warnings(monkeypatch)
    models = [make_model(), make_model()]
    optimizers = [
        lrd.optim.SGD(model.parameters(), lr=0.1, **arguments)
        for model, arguments in zip(models, settings, strict=True)
    ]
    for step in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            loss_of(model, step).backward()
            optimizer.step()
    assert not [warning for warning in recwarn if "same masks" in str(warning.message)]


def test_runs_one_after_the_other_bring_no_warning(monkeypatch, recwarn):
    """A sweep over settings trains with one seed again and again."""
    forget_warnings(monkeypatch)
    for _ in range(3):
        model = make_model()
        optimizer = lrd.optim.SGD(model.parameters(), lr=0.1, seed=5)
        train(model, optimizer, range(5))
    assert not [warning for warning in recwarn if "same masks" in str(warning.message)]
