"""The CUDA step: the mask's bits, torch's rounding, old bits where dropped.

Without a device the kernels run in Triton's interpreter, and are compiled for one.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import re
import subprocess
import sys
import weakref
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrd import LRDropout
from lrd.optim import mask
from lrd.optim.fused import dispatch, selftest

triton = pytest.importorskip("triton", reason="triton cannot be imported", exc_type=ImportError)

MAX_SEED = 2**64 - 1
KEEP_EVERYTHING = 1 << 16  # the threshold that masks nothing
CHANNELS_LAST = torch.channels_last
SHAPES = [(1,), (63,), (255,), (257,), (1024,), (3, 341), (2500,), (0,), ()]
IMAGE_SHAPES = [(5, 3, 3, 3), (40, 16, 3, 3), (7, 5, 1, 2), (8, 4, 1, 1), (6, 1, 3, 3)]

SGD_OPTIONS = {
    "lr": 0.1,
    "momentum": 0.9,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
    "is_first_step": False,
}
ADAM_OPTIONS = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.0,
    "eps": 1e-8,
    "decoupled": False,
    "maximize": False,
    "step": 3,
}
UNMASKED = {"seed": 5, "mask_step": 7, "threshold": KEEP_EVERYTHING, "update_divisor": 0.0}
KEEP_HALF = UNMASKED | {"threshold": 1 << 15}
KEEP_AND_RESCALE = UNMASKED | {"threshold": mask.threshold(0.75), "update_divisor": 0.75}
WITHOUT_MOMENTUM = SGD_OPTIONS | {"momentum": 0.0}


@pytest.fixture(scope="module")
def cuda_step():
    """`lrd.optim.fused.cuda_step` with kernels that Triton interprets on the CPU.

    The modules are loaded anew, so that other tests' modules stay as they are.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    if not hasattr(interpreter._interpreter, "fma_fp32"):
        pytest.skip("this Triton's interpreter rounds a multiply-add twice")

    convert = interpreter._implicit_cvt

    def float32_tensor(values):
        handle = interpreter.TensorHandle(values.astype(np.float32), language.float32)
        return language.tensor(handle, language.float32)

    def convert_argument(argument):
        # A kernel on a device gets float32; the interpreter would leave it a Python float.
        if isinstance(argument, float):
            return float32_tensor(np.array([argument]))
        return convert(argument)

    def power(base, exponent):
        float64_base = base.handle.data.astype(np.float64)
        float64_exponent = exponent.handle.data.astype(np.float64)
        return float32_tensor(np.power(float64_base, float64_exponent))

    with pytest.MonkeyPatch.context() as importing:
        importing.setenv("TRITON_INTERPRET", "1")
        kernels = load_anew("lrd.optim.fused.cuda_kernels")
        importing.setitem(sys.modules, "lrd.optim.fused.cuda_kernels", kernels)
        module = load_anew("lrd.optim.fused.cuda_step")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", convert_argument)
        patch.setattr(kernels, "libdevice", SimpleNamespace(pow=power))
        yield module


def load_anew(name: str) -> ModuleType:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_tensors(seed: int, device: str = "cpu") -> list[Tensor]:
    """Normal values in tensors of all shapes; images both contiguous and in channels_last."""
    generator = torch.Generator().manual_seed(seed)
    flat = [torch.randn(shape, generator=generator) for shape in SHAPES]
    images = [torch.randn(shape, generator=generator) for shape in IMAGE_SHAPES]
    channels_last_images = [image.to(memory_format=CHANNELS_LAST) for image in images]
    return [tensor.to(device) for tensor in flat + images + channels_last_images]


def make_squares(seed: int) -> list[Tensor]:
    """What can be second moments."""
    return [tensor.square_() for tensor in make_tensors(seed)]


def indices_of(params: list[Tensor]) -> list[int]:
    return list(range(len(params)))


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.int32)


def assert_same_bits(tensors: list[Tensor], expected_tensors: list[Tensor]) -> None:
    for tensor, expected in zip(tensors, expected_tensors, strict=True):
        n_different = (bits(tensor) != bits(expected)).sum()
        assert torch.equal(bits(tensor), bits(expected)), (tensor.shape, n_different)


# The mask


def draw_by_step(
    cuda_step: Any,
    device: str,
    *,
    keep_prob: float,
    seed: int,
    mask_step: int | Tensor,
    first_index: int,
) -> list[tuple[Tensor, Tensor]]:
    """For each tensor, what moved in a step from 0 by -1, and the mask that should be drawn."""
    params = [torch.zeros_like(tensor) for tensor in make_tensors(0, device)]
    grads = [torch.ones_like(tensor) for tensor in make_tensors(0, device)]
    indices = list(range(first_index, first_index + len(params)))

    position = {"seed": seed, "mask_step": mask_step, "threshold": mask.threshold(keep_prob)}
    options = WITHOUT_MOMENTUM | {"lr": 1.0}
    cuda_step.sgd(params, grads, [], indices, **position, update_divisor=0.0, **options)

    pairs = []
    for param, index in zip(params, indices, strict=True):
        expected = mask.keep_mask(
            tuple(param.shape), seed=seed, step=int(mask_step), index=index, keep_prob=keep_prob
        )
        pairs.append((param.cpu() == -1, expected))
    return pairs


@pytest.mark.parametrize(
    ("keep_prob", "seed", "mask_step", "first_index"),
    [
        (0.5, 0, 0, 0),
        (0.5, MAX_SEED, 2**33 + 5, 2**40),
        (0.75, 1, 1, 16),
        (0.9, 2**63, 2**64 - 1, 3),
        (2**-16, 2**32, 2**31, 2**31),
        (1 - 2**-16, 7, 16, 1),
        (1.0, 3, 4, 5),
    ],
)
def test_the_kernel_draws_the_bits_of_the_mask(cuda_step, keep_prob, seed, mask_step, first_index):
    pairs = draw_by_step(
        cuda_step,
        "cpu",
        keep_prob=keep_prob,
        seed=seed,
        mask_step=mask_step,
        first_index=first_index,
    )
    for moved, expected in pairs:
        assert torch.equal(moved, expected)


@pytest.mark.parametrize("first_mask_step", [0, 2**33])
def test_the_mask_step_may_be_a_tensor(cuda_step, first_mask_step):
    mask_step = torch.tensor(first_mask_step)
    for _ in range(2):
        pairs = draw_by_step(
            cuda_step, "cpu", keep_prob=0.5, seed=1, mask_step=mask_step, first_index=2
        )
        for moved, expected in pairs:
            assert torch.equal(moved, expected)
        mask_step += 1


# Rounding: torch's sources, and where its machine code for sm_90 contracts a multiply-add


def fma(x: Any, y: Any, z: Any) -> np.ndarray:
    """x * y + z of float32, rounded once.

    The product is exact in float64, and the sum is rounded to odd there.
    """
    product = np.float64(x) * np.float64(y)
    z = np.float64(z)
    total = np.asarray(product + z)

    rounded_z = total - product
    error = (product - (total - rounded_z)) + (z - rounded_z)

    as_int = total.view(np.int64)
    towards_error = np.where((error > 0) == (total > 0), 1, -1)
    is_even_and_inexact = (error != 0) & (as_int & 1 == 0)
    odd = np.where(is_even_and_inexact, as_int + towards_error, as_int)
    return odd.view(np.float64).astype(np.float32)


def test_the_fma_of_these_tests_rounds_once():
    x = np.float32(1 + 2**-12)
    # x * x alone rounds to 1 + 2**-11.
    assert fma(x, x, np.float32(-1 - 2**-11)) == np.float32(2**-24)
    assert fma(np.float32(3), np.float32(5), np.float32(-7)) == 8


def to_arrays(tensors: list[Tensor]) -> list[np.ndarray]:
    return [tensor.detach().cpu().contiguous().numpy().copy() for tensor in tensors]


def assert_same_bits_as_arrays(tensors: list[Tensor], arrays: list[np.ndarray]) -> None:
    assert_same_bits(tensors, [torch.from_numpy(array) for array in arrays])


def select(
    old: np.ndarray, new: np.ndarray, index: int, mask_options: dict[str, Any]
) -> np.ndarray:
    if mask_options["update_divisor"]:
        new = old + (new - old) / np.float32(mask_options["update_divisor"])
    keep = mask.keep_mask(
        old.shape,
        seed=mask_options["seed"],
        step=mask_options["mask_step"],
        index=index,
        keep_prob=mask_options["threshold"] / KEEP_EVERYTHING,
    )
    return np.where(keep.numpy(), new, old)


def sgd_reference(params, grads, buffers, mask_options, options) -> None:
    """A step on lists of float32 arrays, in place."""
    f32 = {key: np.float32(value) for key, value in options.items()}

    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        update = -grad if options["maximize"] else grad
        if options["weight_decay"]:
            update = fma(param, f32["weight_decay"], update)

        if options["momentum"]:
            buffer = buffers[index]
            average = update
            if not options["is_first_step"]:
                undamped = np.float32(1) - f32["dampening"]
                average = fma(update, undamped, buffer * f32["momentum"])
            buffer[...] = average
            update = fma(average, f32["momentum"], update) if options["nesterov"] else average

        new = fma(update, -f32["lr"], param)
        param[...] = select(param, new, index, mask_options)


def adam_reference(params, grads, exp_avgs, exp_avg_sqs, mask_options, options) -> None:
    """A step on lists of float32 arrays, in place."""
    f32 = {key: np.float32(value) for key, value in options.items()}
    step = float(options["step"])
    bias_correction1 = np.float32(1) - np.float32(float(f32["beta1"]) ** step)
    bias_correction2 = np.float32(1) - np.float32(float(f32["beta2"]) ** step)
    step_size = f32["lr"] / bias_correction1
    bias_correction2_sqrt = np.sqrt(bias_correction2)

    for index, (param, grad, exp_avg, exp_avg_sq) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)
    ):
        new = param
        if options["maximize"]:
            grad = -grad
        if options["weight_decay"] and options["decoupled"]:
            new = fma(param, -(f32["lr"] * f32["weight_decay"]), param)
        elif options["weight_decay"]:
            grad = fma(param, f32["weight_decay"], grad)

        square = grad * grad
        exp_avg[...] = fma(exp_avg, f32["beta1"], fma(grad, -f32["beta1"], grad))
        exp_avg_sq[...] = fma(exp_avg_sq, f32["beta2"], fma(square, -f32["beta2"], square))

        denominator = np.sqrt(exp_avg_sq) / bias_correction2_sqrt + f32["eps"]
        new = new - (exp_avg * step_size) / denominator
        param[...] = select(param, new, index, mask_options)


SGD_CASES = [
    ({"momentum": 0.0}, UNMASKED),
    ({"momentum": 0.0, "weight_decay": 0.1, "maximize": True}, KEEP_AND_RESCALE),
    ({"is_first_step": True, "dampening": 0.1}, UNMASKED),
    ({"dampening": 0.1, "weight_decay": 1e-2}, KEEP_HALF),
    ({"nesterov": True, "weight_decay": 1e-4}, KEEP_AND_RESCALE),
    ({"nesterov": True, "maximize": True}, UNMASKED),
]
ADAM_CASES = [
    ({"step": 1}, UNMASKED),
    ({"weight_decay": 0.1}, KEEP_HALF),
    ({"weight_decay": 0.1, "decoupled": True, "step": 2000}, KEEP_AND_RESCALE),
    ({"maximize": True, "weight_decay": 0.1, "decoupled": True}, UNMASKED),
]


def check_sgd(
    cuda_step: Any, device: str, changes: dict[str, Any], mask_options: dict[str, Any]
) -> None:
    options = SGD_OPTIONS | changes
    params = make_tensors(1, device)
    grads = make_tensors(2, device)
    buffers = make_tensors(3, device)
    expected_params = to_arrays(params)
    expected_grads = to_arrays(grads)
    expected_buffers = to_arrays(buffers)

    used_buffers = buffers if options["momentum"] else []
    cuda_step.sgd(params, grads, used_buffers, indices_of(params), **mask_options, **options)
    sgd_reference(expected_params, expected_grads, expected_buffers, mask_options, options)

    assert_same_bits_as_arrays(params, expected_params)
    assert_same_bits_as_arrays(grads, expected_grads)
    assert_same_bits_as_arrays(buffers, expected_buffers)


@pytest.mark.parametrize(("changes", "mask_options"), SGD_CASES, ids=str)
def test_sgd_rounds_as_torchs_fused_kernel(cuda_step, changes, mask_options):
    check_sgd(cuda_step, "cpu", changes, mask_options)


@pytest.mark.parametrize(("changes", "mask_options"), ADAM_CASES, ids=str)
def test_adam_rounds_as_torchs_fused_kernel(cuda_step, changes, mask_options):
    options = ADAM_OPTIONS | changes
    params = make_tensors(1)
    grads = make_tensors(2)
    exp_avgs = make_tensors(3)
    exp_avg_sqs = make_squares(4)
    expected_params = to_arrays(params)
    expected_grads = to_arrays(grads)
    expected_exp_avgs = to_arrays(exp_avgs)
    expected_exp_avg_sqs = to_arrays(exp_avg_sqs)

    cuda_step.adam(
        params, grads, exp_avgs, exp_avg_sqs, indices_of(params), **mask_options, **options
    )
    adam_reference(
        expected_params,
        expected_grads,
        expected_exp_avgs,
        expected_exp_avg_sqs,
        mask_options,
        options,
    )

    assert_same_bits_as_arrays(params, expected_params)
    assert_same_bits_as_arrays(grads, expected_grads)
    assert_same_bits_as_arrays(exp_avgs, expected_exp_avgs)
    assert_same_bits_as_arrays(exp_avg_sqs, expected_exp_avg_sqs)


def torch_step(optimizer: torch.optim.Optimizer, params: list[Tensor], grads: list[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer.step()


def assert_follows_torch(
    params: list[Tensor], old_params: list[Tensor], torch_params: list[Tensor], mask_step: int
) -> None:
    """Dropped elements have their old bits, kept ones are torch's within rounding."""
    for index, (param, old, torch_param) in enumerate(
        zip(params, old_params, torch_params, strict=True)
    ):
        keep = mask.keep_mask(
            tuple(param.shape), seed=5, step=mask_step, index=index, keep_prob=0.5
        )
        assert torch.equal(bits(param)[~keep], bits(old)[~keep])
        torch.testing.assert_close(param[keep], torch_param[keep], rtol=1e-6, atol=2e-7)


def assert_states_follow_torch(
    optimizer: torch.optim.Optimizer, torch_params: list[Tensor], name: str, states: list[Tensor]
) -> None:
    """State tensors are torch's within rounding, whether their elements are kept or dropped.

    torch's kernels round beta to float32 first: 1 - 0.999 is 1.3e-5 off what its for-loop takes.
    """
    for torch_param, state in zip(torch_params, states, strict=True):
        expected = optimizer.state[torch_param][name]
        torch.testing.assert_close(state, expected, rtol=3e-5, atol=1e-7)


def test_masked_sgd_follows_torchs_for_loop(cuda_step):
    params = make_tensors(1)
    buffers = [torch.zeros_like(param) for param in params]

    for step in range(3):
        old_params = copies(params)
        torch_params = copies(params)
        grads = make_tensors(10 + step)

        optimizer = torch.optim.SGD(
            torch_params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2, foreach=False
        )
        for torch_param, buffer in zip(torch_params, buffers, strict=True):
            torch_buffer = None if step == 0 else buffer.clone()
            optimizer.state[torch_param]["momentum_buffer"] = torch_buffer
        torch_step(optimizer, torch_params, grads)

        mask_options = KEEP_HALF | {"mask_step": step}
        options = SGD_OPTIONS | {"nesterov": True, "weight_decay": 1e-2}
        options |= {"is_first_step": step == 0}
        cuda_step.sgd(params, grads, buffers, indices_of(params), **mask_options, **options)

        assert_follows_torch(params, old_params, torch_params, mask_step=step)
        assert_states_follow_torch(optimizer, torch_params, "momentum_buffer", buffers)


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW])
def test_masked_adam_follows_torchs_for_loop(cuda_step, optimizer_class):
    params = make_tensors(1)
    exp_avgs = [torch.zeros_like(param) for param in params]
    exp_avg_sqs = [torch.zeros_like(param) for param in params]

    for step in range(3):
        old_params = copies(params)
        torch_params = copies(params)
        grads = make_tensors(10 + step)

        optimizer = optimizer_class(torch_params, lr=1e-3, weight_decay=0.1, foreach=False)
        for number, torch_param in enumerate(torch_params):
            optimizer.state[torch_param] = {
                "step": torch.tensor(float(step)),
                "exp_avg": exp_avgs[number].clone(),
                "exp_avg_sq": exp_avg_sqs[number].clone(),
            }
        torch_step(optimizer, torch_params, grads)

        mask_options = KEEP_HALF | {"mask_step": step}
        options = ADAM_OPTIONS | {"weight_decay": 0.1, "step": step + 1}
        options |= {"decoupled": optimizer_class is torch.optim.AdamW}
        cuda_step.adam(
            params, grads, exp_avgs, exp_avg_sqs, indices_of(params), **mask_options, **options
        )

        assert_follows_torch(params, old_params, torch_params, mask_step=step)
        assert_states_follow_torch(optimizer, torch_params, "exp_avg", exp_avgs)
        assert_states_follow_torch(optimizer, torch_params, "exp_avg_sq", exp_avg_sqs)


def test_numbers_may_be_tensors(cuda_step):
    results = []
    for as_tensors in (False, True):
        params = make_tensors(1)
        exp_avgs = make_tensors(2)
        exp_avg_sqs = make_squares(3)
        grads = make_tensors(4)
        indices = indices_of(params)

        adam_options = ADAM_OPTIONS | {"lr": 1e-3, "step": 4, "weight_decay": 0.1}
        sgd_options = WITHOUT_MOMENTUM | {"lr": 0.1}
        if as_tensors:
            adam_options |= {"lr": torch.tensor(1e-3), "step": torch.tensor(4.0)}
            sgd_options |= {"lr": torch.tensor(0.1)}

        cuda_step.adam(params, grads, exp_avgs, exp_avg_sqs, indices, **UNMASKED, **adam_options)
        cuda_step.sgd(params, grads, [], indices, **UNMASKED, **sgd_options)
        results.append(params + exp_avgs + exp_avg_sqs)
    assert_same_bits(*results)


def test_each_tensor_may_count_its_own_steps(cuda_step):
    params = make_tensors(1)
    exp_avgs = make_tensors(3)
    exp_avg_sqs = make_squares(4)
    grads = make_tensors(2)
    counts = [float(1 + number % 3) for number in range(len(params))]

    # The same tensors, each in a call of its own
    single_params = copies(params)
    single_exp_avgs = copies(exp_avgs)
    single_exp_avg_sqs = copies(exp_avg_sqs)

    options = {key: value for key, value in ADAM_OPTIONS.items() if key != "step"}
    options |= KEEP_AND_RESCALE
    steps = [torch.tensor(count) for count in counts]
    cuda_step.adam(params, grads, exp_avgs, exp_avg_sqs, indices_of(params), step=steps, **options)
    for number, count in enumerate(counts):
        cuda_step.adam(
            [single_params[number]],
            [grads[number]],
            [single_exp_avgs[number]],
            [single_exp_avg_sqs[number]],
            [number],
            step=int(count),
            **options,
        )

    assert_same_bits(params, single_params)
    assert_same_bits(exp_avgs, single_exp_avgs)
    assert_same_bits(exp_avg_sqs, single_exp_avg_sqs)


DISPATCH_CASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "sgd without momentum": (torch.optim.SGD, {}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "adam, steps on the device": (torch.optim.Adam, {"fused": True}),
}


@pytest.mark.parametrize("name", DISPATCH_CASES)
def test_the_dispatch_does_a_step_of_torchs(cuda_step, name, monkeypatch):
    """What a CUDA device would do, with two groups and a parameter that joins later."""
    monkeypatch.setattr(dispatch, "_load_kernels", lambda _: cuda_step)
    optimizer_class, options = DISPATCH_CASES[name]

    optimizers = []
    for _ in range(2):
        params = [nn.Parameter(tensor) for tensor in make_tensors(1)[:6]]
        groups = [{"params": params[:4]}, {"params": params[4:], "lr": 0.1, "keep_prob": 0.9}]
        optimizers.append(optimizer_class(groups, lr=0.01, weight_decay=0.1, **options))

    masked_optimizer, torch_optimizer = optimizers
    dropout = LRDropout(masked_optimizer, keep_prob=0.5, seed=3)
    masked_params = [param for group in masked_optimizer.param_groups for param in group["params"]]
    torch_params = [param for group in torch_optimizer.param_groups for param in group["params"]]

    torch_class = dispatch.stock_class(masked_optimizer)
    one_pass_step = dispatch._STEPS[torch_class, "cuda"]

    for step in range(3):
        # The last parameter has no gradient at the first step.
        grads = make_tensors(step + 2)[: 5 if step == 0 else 6]
        for params in (masked_params, torch_params):
            for param, grad in zip(params, grads, strict=False):
                param.grad = grad.clone()

        old_params = copies(masked_params)
        with torch.no_grad():
            one_pass_step(masked_optimizer, dispatch._list_updates(masked_optimizer, torch_class))
            for torch_param, old in zip(torch_params, old_params, strict=True):
                torch_param.copy_(old)
        torch_optimizer.step()

        for index, (param, torch_param, old) in enumerate(
            zip(masked_params, torch_params, old_params, strict=True)
        ):
            keep_prob = 0.9 if index > 3 else 0.5
            keep = mask.keep_mask(param.shape, seed=3, step=step, index=index, keep_prob=keep_prob)
            expected = old if param.grad is None else torch.where(keep, torch_param, old)
            torch.testing.assert_close(param, expected, rtol=1e-4, atol=1e-6)
            assert torch.equal(bits(param) == bits(old), bits(expected) == bits(old))

        for group in masked_optimizer.param_groups:
            group["mask_step"] += 1

    # The optimizer's own step was not called.
    assert dropout.is_fused is False


def test_nans_and_zeros_that_are_dropped_keep_their_bits(cuda_step):
    pattern = [0x7FC12345, 0x7F812345, -0x80000000, 0x00000001]
    param = torch.tensor(pattern * 300, dtype=torch.int64).to(torch.int32).view(torch.float32)
    before = bits(param).clone()

    cuda_step.sgd([param], [torch.ones(1200)], [], [0], **KEEP_HALF, **WITHOUT_MOMENTUM)
    dropped = ~mask.draw(1200, seed=5, step=7, index=0, keep_prob=0.5)
    assert torch.equal(bits(param)[dropped], before[dropped])


# Tables


def test_tables_are_built_once_and_get_the_addresses_of_new_gradients(cuda_step, monkeypatch):
    built = []
    staged = []
    build = cuda_step._Tables.__init__
    stage = cuda_step._Tables._new_staging

    def count_and_build(self, *arguments):
        built.append(self)
        build(self, *arguments)

    def count_and_stage(self):
        staged.append(self)
        return stage(self)

    monkeypatch.setattr(cuda_step._Tables, "__init__", count_and_build)
    monkeypatch.setattr(cuda_step._Tables, "_new_staging", count_and_stage)

    params = [torch.zeros(300), torch.zeros(5)]
    options = WITHOUT_MOMENTUM | {"lr": 1.0, "table_cache": cuda_step.TableCache()}

    def step(grads):
        cuda_step.sgd(params, grads, [], [0, 1], **UNMASKED, **options)

    grads = [torch.ones(300), torch.ones(5)]
    step(grads)
    n_staged = len(staged)
    step(grads)
    assert (len(built), len(staged)) == (1, n_staged)

    # The first gradients stay alive, so the new ones are at other addresses.
    new_grads = [torch.full((300,), 2.0), torch.full((5,), 2.0)]
    step(new_grads)
    assert (len(built), len(staged)) == (1, n_staged + 1)
    assert [param.unique().tolist() for param in params] == [[-4.0], [-4.0]]

    params[1] = torch.zeros(5)
    step(new_grads)
    assert len(built) == 2


def test_tables_of_many_lists_do_not_stay_for_ever(cuda_step):
    params = [torch.zeros(3) for _ in range(40)]
    table_cache = cuda_step.TableCache()
    options = WITHOUT_MOMENTUM | {"table_cache": table_cache}
    for param in params:
        table_cache.begin_step()
        cuda_step.sgd([param], [torch.ones(3)], [], [0], **UNMASKED, **options)

    assert len(table_cache) <= cuda_step._MAX_IDLE_STEPS + 1
    for param in params:
        assert bool((param == param[0]).all())
        assert param[0] < 0


def optimizer_with_many_groups(optimizer_class: Any, **options: Any) -> torch.optim.Optimizer:
    """A group for each of 20 parameters, as with a learning rate for each layer."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(20)]
    for param in params:
        param.grad = torch.ones(3)

    groups = [{"params": [param]} for param in params]
    optimizer = optimizer_class(groups, lr=0.1, **options)
    LRDropout(optimizer)
    return optimizer


@torch.no_grad()
def take_one_pass_step(optimizer: torch.optim.Optimizer) -> None:
    """A step as a CUDA device would do it."""
    torch_class = dispatch.stock_class(optimizer)
    dispatch._STEPS[torch_class, "cuda"](optimizer, dispatch._list_updates(optimizer, torch_class))


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_with_many_groups_builds_its_tables_once(
    cuda_step, optimizer_class, monkeypatch
):
    monkeypatch.setattr(dispatch, "_load_kernels", lambda _: cuda_step)
    optimizer = optimizer_with_many_groups(optimizer_class)

    take_one_pass_step(optimizer)
    tables = dict(dispatch._table_caches[optimizer]._tables)
    assert len(tables) == 20

    for _ in range(2):
        take_one_pass_step(optimizer)
    assert dispatch._table_caches[optimizer]._tables == tables


def test_tables_go_with_their_optimizer(cuda_step, monkeypatch):
    monkeypatch.setattr(dispatch, "_load_kernels", lambda _: cuda_step)
    optimizer = optimizer_with_many_groups(torch.optim.SGD)
    take_one_pass_step(optimizer)
    tables = weakref.ref(next(iter(dispatch._table_caches[optimizer]._tables.values())))

    del optimizer
    gc.collect()
    assert tables() is None


def test_another_default_device_changes_nothing(cuda_step):
    params = [torch.ones(300), torch.ones(5)]
    grads = [torch.ones(300), torch.ones(5)]
    expected = copies(params)
    cuda_step.sgd(expected, grads, [], [0, 1], **KEEP_HALF, **WITHOUT_MOMENTUM)

    torch.set_default_device("meta")
    try:
        cuda_step.sgd(params, grads, [], [0, 1], **KEEP_HALF, **WITHOUT_MOMENTUM)
    finally:
        torch.set_default_device(None)
    assert_same_bits(params, expected)


def test_numbers_in_tensors_on_the_host_are_read_there():
    optimizer = optimizer_with_many_groups(torch.optim.SGD)
    group = optimizer.param_groups[0]
    group["lr"] = torch.tensor(0.5)
    group["mask_step"] = torch.tensor(7)

    arguments = dispatch._group_arguments_on_cuda(group)
    assert (type(arguments["lr"]), arguments["lr"]) == (float, 0.5)
    assert (type(arguments["mask_step"]), arguments["mask_step"]) == (int, 7)


@pytest.mark.parametrize(
    ("key", "shape", "dtype", "is_supported"),
    [
        ("mask_step", (), torch.int64, True),
        ("mask_step", (), torch.int32, False),
        ("mask_step", (1,), torch.int64, False),
        ("lr", (), torch.float32, True),
        ("lr", (), torch.float64, False),
        ("lr", (1,), torch.float32, False),
    ],
)
def test_tensors_that_the_kernels_would_misread_are_left_to_torch(key, shape, dtype, is_supported):
    optimizer = optimizer_with_many_groups(torch.optim.SGD)
    group = optimizer.param_groups[0]
    device = torch.device("meta")  # stands for a CUDA device
    group[key] = torch.zeros(shape, dtype=dtype, device=device)
    assert dispatch._is_supported_on_cuda(group, device) == is_supported
    assert not dispatch._is_supported_on_cuda(group, torch.device("cuda", 0))


def test_the_steps_of_all_parameters_are_counted_in_one_call(cuda_step, monkeypatch):
    monkeypatch.setattr(dispatch, "_load_kernels", lambda _: cuda_step)
    optimizer = optimizer_with_many_groups(torch.optim.Adam, fused=True)
    calls = []
    add = torch._foreach_add_

    def count_and_add(*arguments):
        calls.append(arguments)
        add(*arguments)

    monkeypatch.setattr(torch, "_foreach_add_", count_and_add)
    take_one_pass_step(optimizer)
    take_one_pass_step(optimizer)
    assert len(calls) == 2
    assert {state["step"].item() for state in optimizer.state.values()} == {2.0}


# The comparison before the first step


def matches_in_the_interpreter(optimizer_class: Any, monkeypatch: Any) -> bool:
    """The selftest, with the tolerance that it has on a device."""

    def is_close(actual, expected):
        return torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "equal", is_close)
        return selftest.matches(optimizer_class, torch.device("cpu"), take_one_pass_step)


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.SGD, pytest.param(torch.optim.Adam, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("seed", lambda seed: seed + 1),
        ("mask_step", lambda mask_step: mask_step + 1),
        ("threshold", lambda threshold: KEEP_EVERYTHING),
        ("update_divisor", lambda divisor: 0.0),
    ],
)
def test_the_selftest_finds_a_wrong_mask(cuda_step, optimizer_class, argument, change, monkeypatch):
    monkeypatch.setattr(dispatch, "_load_kernels", lambda _: cuda_step)
    assert matches_in_the_interpreter(optimizer_class, monkeypatch)

    get_arguments = dispatch._group_arguments_on_cuda

    def get_wrong_arguments(group):
        arguments = get_arguments(group)
        return arguments | {argument: change(arguments[argument])}

    monkeypatch.setattr(dispatch, "_group_arguments_on_cuda", get_wrong_arguments)
    assert not matches_in_the_interpreter(optimizer_class, monkeypatch)


# Single lists


def test_a_gradient_that_is_not_aligned_is_read_all_the_same(cuda_step):
    param = torch.zeros(2048)
    bucket = torch.arange(2049.0)
    options = WITHOUT_MOMENTUM | {"lr": 1.0}
    cuda_step.sgd([param], [bucket[1:]], [], [0], **UNMASKED, **options)
    assert torch.equal(param, -bucket[1:])


def test_a_list_without_elements_is_no_error(cuda_step):
    empty = torch.zeros(0)
    cuda_step.sgd([empty], [torch.zeros(0)], [], [0], **UNMASKED, **WITHOUT_MOMENTUM)
    cuda_step.sgd([], [], [], [], **UNMASKED, **WITHOUT_MOMENTUM)


@pytest.mark.parametrize(
    ("param", "grad", "message"),
    [
        (torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), "float32"),
        (torch.zeros(4, 4).t()[:2], torch.zeros(4, 4).t()[:2], "contiguous"),
        (
            torch.zeros(2, 2, 2, 2).to(memory_format=CHANNELS_LAST),
            torch.zeros(2, 2, 2, 2),
            "memory format",
        ),
        (torch.zeros(4), torch.zeros(2, 2), "shape"),
    ],
)
def test_what_the_kernels_cannot_read_is_refused(cuda_step, param, grad, message):
    with pytest.raises(ValueError, match=message):
        cuda_step.sgd([param], [grad], [], [0], **UNMASKED, **WITHOUT_MOMENTUM)


# Compiled for sm_90

ARGUMENT_TYPES = {
    "table": "*i64",
    "gradient_addresses": "*i64",
    "tensor_of_chunk": "*i32",
    "keep_bits": "*u8",
    "n_blocks": "i32",
    "seed": "u64",
    "mask_step": "*i64",
    "threshold": "i32",
    "n_planes": "i32",
    "step": "i64",
}
COMMON_CONSTANTS = {
    "WEIGHT_DECAY": True,
    "MAXIMIZE": False,
    "MASKED": True,
    "RESCALE": True,
    "CHUNK": 1024,
}
KERNEL_CONSTANTS = {
    "draw_kernel": {"BLOCKS": 256},
    "sgd_kernel": {"MOMENTUM": True, "NESTEROV": True, "FIRST_STEP": False, **COMMON_CONSTANTS},
    "adam_kernel": {"DECOUPLED": True, "STEP_IN_TABLE": True, **COMMON_CONSTANTS},
}


def compile_kernel(name: str) -> Any:
    from lrd.optim.fused import cuda_kernels

    kernel = getattr(cuda_kernels, name)
    constants = KERNEL_CONSTANTS[name]

    signature = {argument: ARGUMENT_TYPES.get(argument, "fp32") for argument in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    if name == "draw_kernel":
        signature["keep_bits"] = "*u64"
    constants_by_position = {
        (kernel.arg_names.index(argument),): value for argument, value in constants.items()
    }

    ast_source = importlib.import_module("triton.compiler").ASTSource
    gpu_target = importlib.import_module("triton.backends.compiler").GPUTarget
    return triton.compile(
        ast_source(fn=kernel, signature=signature, constexprs=constants_by_position),
        target=gpu_target("cuda", 90, 32),
        options={"num_warps": 8, "enable_fp_fusion": False},
    )


@pytest.fixture
def empty_triton_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("empty_triton_cache")
@pytest.mark.parametrize(
    ("name", "n_tensors_read", "n_tensors_written", "n_wide_products"),
    [
        ("draw_kernel", 0, 0, 20),  # two products for each of Philox's ten rounds
        ("sgd_kernel", 3, 2, 0),
        ("adam_kernel", 4, 3, 0),
    ],
)
def test_the_kernels_compile_without_spills_or_hidden_multiply_adds(
    name, n_tensors_read, n_tensors_written, n_wide_products
):
    binary = compile_kernel(name)
    ptx = binary.asm["ptx"]
    assert len(binary.asm["cubin"]) > 1000
    assert ".local" not in ptx
    assert len(re.findall(r"mul\.hi\.u64", ptx)) == n_wide_products
    assert len(re.findall(r"ld\.global\.v4", ptx)) == n_tensors_read
    assert len(re.findall(r"st\.global\.v4", ptx)) == n_tensors_written

    if name == "sgd_kernel":
        # Four elements a thread, on the two paths: weight decay, momentum, nesterov, lr.
        assert len(re.findall(r"fma\.rn\.f32", ptx)) == 2 * 4 * 4
        # What ptxas may contract has no .rn.
        assert not re.findall(r"\b(mul|add|sub)\.(ftz\.)?f32", ptx)


def test_import_lrd_does_not_import_the_kernels():
    code = (
        "import sys, lrd\n"
        "names = ('cuda_step', 'cuda_kernels', 'cpu_step', 'cpu_kernels')\n"
        "print([name for name in names if f'lrd.optim.fused.{name}' in sys.modules])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert process.stdout.strip() == "[]"


# On a device

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def cuda_step_on_device():
    return importlib.import_module("lrd.optim.fused.cuda_step")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("keep_prob", [0.5, 0.75, 0.9, 2**-16])
def test_a_device_draws_the_bits_of_the_mask(cuda_step_on_device, keep_prob):
    for mask_step in (0, 1, 2**33 + 5):
        pairs = draw_by_step(
            cuda_step_on_device,
            "cuda",
            keep_prob=keep_prob,
            seed=MAX_SEED,
            mask_step=mask_step,
            first_index=2**33,
        )
        for moved, expected in pairs:
            assert torch.equal(moved, expected)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize(("changes", "mask_options"), SGD_CASES, ids=str)
def test_sgd_on_a_device_equals_the_reference(cuda_step_on_device, changes, mask_options):
    check_sgd(cuda_step_on_device, "cuda", changes, mask_options)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize(
    ("nesterov", "weight_decay"), [(False, 0.0), (False, 1e-2), (True, 0.0), (True, 1e-2)]
)
def test_sgd_on_a_device_equals_torchs_fused(cuda_step_on_device, nesterov, weight_decay):
    params = make_tensors(1, "cuda")
    buffers = [torch.zeros_like(param) for param in params]
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay}
    torch_params = make_tensors(1, "cuda")
    optimizer = torch.optim.SGD(torch_params, fused=True, **options)

    for step in range(3):
        grads = make_tensors(10 + step, "cuda")
        torch_step(optimizer, torch_params, grads)
        all_options = SGD_OPTIONS | options | {"is_first_step": step == 0}
        cuda_step_on_device.sgd(
            params, grads, buffers, indices_of(params), **UNMASKED, **all_options
        )
        assert_same_bits(params, torch_params)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_on_a_device_equals_torchs_fused(cuda_step_on_device, weight_decay):
    params = make_tensors(1, "cuda")
    exp_avgs = [torch.zeros_like(param) for param in params]
    exp_avg_sqs = [torch.zeros_like(param) for param in params]
    torch_params = make_tensors(1, "cuda")
    optimizer = torch.optim.AdamW(torch_params, lr=1e-3, weight_decay=weight_decay, fused=True)

    # With powf as CUDA 13.2 has it. Before, 1 - powf(0.999, step) magnifies the last bit of another
    # powf.
    triton_version = tuple(map(int, triton.__version__.split(".")[:2]))
    has_torchs_powf = triton_version >= (3, 9)

    for step in range(3):
        grads = make_tensors(10 + step, "cuda")
        torch_step(optimizer, torch_params, grads)
        options = ADAM_OPTIONS | {"weight_decay": weight_decay, "decoupled": True}
        options |= {"step": step + 1}
        cuda_step_on_device.adam(
            params, grads, exp_avgs, exp_avg_sqs, indices_of(params), **UNMASKED, **options
        )

        states = [optimizer.state[param] for param in torch_params]
        assert_same_bits(exp_avgs, [state["exp_avg"] for state in states])
        assert_same_bits(exp_avg_sqs, [state["exp_avg_sq"] for state in states])
        if has_torchs_powf:
            assert_same_bits(params, torch_params)
        else:
            for param, torch_param in zip(params, torch_params, strict=True):
                torch.testing.assert_close(param, torch_param, rtol=1e-6, atol=1e-7)


@pytest.mark.cuda
@needs_cuda
def test_a_replayed_graph_draws_the_next_mask(cuda_step_on_device):
    params = make_tensors(1, "cuda")
    eager_params = make_tensors(1, "cuda")
    grads = make_tensors(2, "cuda")
    indices = indices_of(params)
    mask_step = torch.tensor(0, device="cuda")
    table_cache = cuda_step_on_device.TableCache()

    def captured_step():
        options = KEEP_HALF | {"mask_step": mask_step, "table_cache": table_cache}
        cuda_step_on_device.sgd(params, grads, [], indices, **options, **WITHOUT_MOMENTUM)
        mask_step.add_(1)

    def step(params, grads, mask_step):
        options = KEEP_HALF | {"mask_step": mask_step, "table_cache": table_cache}
        cuda_step_on_device.sgd(params, grads, [], indices, **options, **WITHOUT_MOMENTUM)

    # One step before the capture, in a stream of its own as torch wants it
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured_step()
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_step()
    for _ in range(3):
        graph.replay()

    for eager_mask_step in range(4):
        step(eager_params, grads, eager_mask_step)
    assert_same_bits(params, eager_params)

    # A step with other gradients in between does not change those of the graph.
    other_grads = make_tensors(3, "cuda")
    step(params, other_grads, 4)
    step(eager_params, other_grads, 4)
    mask_step.fill_(5)
    graph.replay()
    step(eager_params, grads, 5)
    assert_same_bits(params, eager_params)
