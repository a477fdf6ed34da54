"""The CUDA step: the mask's bits, torch's rounding, old bits where dropped.

Without a device the kernels run in Triton's interpreter, and are compiled for one.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrd import LRDropout, fused, mask

triton = pytest.importorskip("triton", reason="triton cannot be imported", exc_type=ImportError)

FULL = 2**64 - 1
NOTHING = 1 << 16  # the limit that masks nothing
CHANNELS_LAST = torch.channels_last
SHAPES = [(1,), (63,), (255,), (257,), (1024,), (3, 341), (2500,), (0,), ()]
IMAGES = [(5, 3, 3, 3), (40, 16, 3, 3), (7, 5, 1, 2), (8, 4, 1, 1), (6, 1, 3, 3)]
OPTIONS = {
    "lr": 0.1,
    "momentum": 0.9,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
    "is_first": False,
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
PLACE = {"seed": 5, "mask_step": 7, "limit": NOTHING, "rescale": 0.0}


@pytest.fixture(scope="module")
def step():
    """`lrd.cuda_step` with kernels that Triton interprets on the CPU; other tests' modules stay as they are."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    if not hasattr(interpreter._interpreter, "fma_fp32"):
        pytest.skip("this Triton's interpreter rounds a multiply-add twice")
    convert = interpreter._implicit_cvt

    def as_float32(argument):  # what a kernel on a device gets; the interpreter leaves it a Python float
        if not isinstance(argument, float):
            return convert(argument)
        return language.tensor(
            interpreter.TensorHandle(np.array([argument], np.float32), language.float32), language.float32
        )

    def power(base, exponent):
        raised = np.power(base.handle.data.astype(np.float64), exponent.handle.data.astype(np.float64))
        return language.tensor(interpreter.TensorHandle(raised.astype(np.float32), language.float32), language.float32)

    with pytest.MonkeyPatch.context() as importing:
        importing.setenv("TRITON_INTERPRET", "1")
        kernels = fresh("lrd.cuda_kernels")
        importing.setitem(sys.modules, "lrd.cuda_kernels", kernels)
        module = fresh("lrd.cuda_step")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", as_float32)
        patch.setattr(kernels, "libdevice", SimpleNamespace(pow=power))
        yield module


def fresh(name: str) -> ModuleType:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors(seed: int, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    flat = [torch.randn(shape, generator=generator) for shape in SHAPES]
    images = [torch.randn(shape, generator=generator) for shape in IMAGES]
    both = images + [image.to(memory_format=CHANNELS_LAST) for image in images]
    return [tensor.to(device) for tensor in flat + both]


def copies(originals: list[Tensor]) -> list[Tensor]:
    return [original.clone() for original in originals]


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.int32)


def assert_same_bits(ones: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(bits(one), bits(other)), (one.shape, (bits(one) != bits(other)).sum())


# The mask


def drawn_by(step: Any, device: str, **position: Any) -> list[tuple[Tensor, Tensor]]:
    """What moved in a step from zero by -1, and the mask it ought to be; `keep_prob` and `first_index` are named."""
    keep_prob, first_index = position.pop("keep_prob"), position.pop("first_index")
    params, grads = [[fill(t) for t in tensors(0, device)] for fill in (torch.zeros_like, torch.ones_like)]
    indices = list(range(first_index, first_index + len(params)))
    place = {**PLACE, **position, "limit": mask.threshold(keep_prob)}
    step.sgd(params, grads, [], indices, **place, **{**OPTIONS, "lr": 1.0, "momentum": 0.0})
    seed, at = int(position["seed"]), int(position["mask_step"])
    expected = [
        mask.keep_mask(tuple(param.shape), seed=seed, step=at, index=index, keep_prob=keep_prob)
        for param, index in zip(params, indices, strict=True)
    ]
    return [(param.cpu() == -1, keep) for param, keep in zip(params, expected, strict=True)]


@pytest.mark.parametrize(
    ("keep_prob", "seed", "mask_step", "first_index"),
    [
        (0.5, 0, 0, 0),
        (0.5, FULL, 2**33 + 5, 2**40),
        (0.75, 1, 1, 16),
        (0.9, 2**63, 2**64 - 1, 3),
        (2**-16, 2**32, 2**31, 2**31),
        (1 - 2**-16, 7, 16, 1),
        (1.0, 3, 4, 5),
    ],
)
def test_the_kernel_draws_the_bits_of_the_mask(step, keep_prob, seed, mask_step, first_index):
    drawn = drawn_by(step, "cpu", keep_prob=keep_prob, seed=seed, mask_step=mask_step, first_index=first_index)
    for moved, expected in drawn:
        assert torch.equal(moved, expected)


@pytest.mark.parametrize("mask_step", [0, 2**33])
def test_the_update_count_may_lie_on_the_device(step, mask_step):
    at = torch.tensor(mask_step)
    for _ in range(2):
        for moved, expected in drawn_by(step, "cpu", keep_prob=0.5, seed=1, mask_step=at, first_index=2):
            assert torch.equal(moved, expected)
        at += 1


# Rounding: torch's sources, and where its machine code for sm_90 contracts a multiply-add


def fma(x: Any, y: Any, z: Any) -> np.ndarray:
    """x * y + z of float32, rounded once: the product is exact in float64, the sum rounded to odd there."""
    product, z = np.float64(x) * np.float64(y), np.float64(z)
    total = np.asarray(product + z)
    back = total - product
    error = (product - (total - back)) + (z - back)
    as_int = total.view(np.int64)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where((error != 0) & (as_int & 1 == 0), as_int + towards, as_int)
    return odd.view(np.float64).astype(np.float32)


def test_the_fma_of_these_tests_rounds_once():
    x, y = np.float32(1 + 2**-12), np.float32(1 + 2**-12)
    assert fma(x, y, np.float32(-1 - 2**-11)) == np.float32(2**-24)  # x * y alone rounds to 1 + 2**-11
    assert fma(np.float32(3), np.float32(5), np.float32(-7)) == 8


def arrays(*lists: list[Tensor]) -> list[list[np.ndarray]]:
    return [[tensor.detach().cpu().contiguous().numpy().copy() for tensor in one] for one in lists]


def select(old: np.ndarray, new: np.ndarray, index: int, place: dict[str, Any]) -> np.ndarray:
    if place["rescale"]:
        new = old + (new - old) / np.float32(place["rescale"])
    keep_prob = place["limit"] / NOTHING
    keep = mask.keep_mask(old.shape, seed=place["seed"], step=place["mask_step"], index=index, keep_prob=keep_prob)
    return np.where(keep.numpy(), new, old)


def sgd_reference(params, grads, buffers, place, options) -> None:
    f32 = {key: np.float32(value) for key, value in options.items()}
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        update = -grad if options["maximize"] else grad
        if options["weight_decay"]:
            update = fma(param, f32["weight_decay"], update)
        if options["momentum"]:
            buffer = buffers[index]
            kept = update
            if not options["is_first"]:
                kept = fma(update, np.float32(1) - f32["dampening"], buffer * f32["momentum"])
            buffer[...] = kept
            update = fma(kept, f32["momentum"], update) if options["nesterov"] else kept
        param[...] = select(param, fma(update, -f32["lr"], param), index, place)


def adam_reference(params, grads, means, squares, place, options) -> None:
    f32 = {key: np.float32(value) for key, value in options.items()}
    one, time = np.float32(1), float(options["step"])
    corrections = [one - np.float32(float(f32[beta]) ** time) for beta in ("beta1", "beta2")]
    step_size, root = f32["lr"] / corrections[0], np.sqrt(corrections[1])
    for index, (param, grad, mean, square) in enumerate(zip(params, grads, means, squares, strict=True)):
        grad, new = (-grad if options["maximize"] else grad), param
        if options["weight_decay"] and options["decoupled"]:
            new = fma(param, -(f32["lr"] * f32["weight_decay"]), param)
        elif options["weight_decay"]:
            grad = fma(param, f32["weight_decay"], grad)
        squared = grad * grad
        mean[...] = fma(mean, f32["beta1"], fma(grad, -f32["beta1"], grad))
        square[...] = fma(square, f32["beta2"], fma(squared, -f32["beta2"], squared))
        new = new - (mean * step_size) / (np.sqrt(square) / root + f32["eps"])
        param[...] = select(param, new, index, place)


MASKED = {"limit": mask.threshold(0.75), "rescale": 0.75}
SGD_CASES = [
    ({"momentum": 0.0}, {}),
    ({"momentum": 0.0, "weight_decay": 0.1, "maximize": True}, MASKED),
    ({"is_first": True, "dampening": 0.1}, {}),
    ({"dampening": 0.1, "weight_decay": 1e-2}, {"limit": 1 << 15}),
    ({"nesterov": True, "weight_decay": 1e-4}, MASKED),
    ({"nesterov": True, "maximize": True}, {}),
]
ADAM_CASES = [
    ({"step": 1}, {}),
    ({"weight_decay": 0.1}, {"limit": 1 << 15}),
    ({"weight_decay": 0.1, "decoupled": True, "step": 2000}, MASKED),
    ({"maximize": True, "weight_decay": 0.1, "decoupled": True}, {}),
]


@pytest.mark.parametrize(("changes", "where"), SGD_CASES, ids=str)
def test_sgd_rounds_as_torchs_fused_kernel(step, changes, where):
    options, place = {**OPTIONS, **changes}, {**PLACE, **where}
    params, grads, buffers = (tensors(seed) for seed in (1, 2, 3))
    expected = arrays(params, grads, buffers)
    step.sgd(params, grads, buffers if options["momentum"] else [], list(range(len(params))), **place, **options)
    sgd_reference(*expected, place, options)
    for now, then in zip((params, grads, buffers), expected, strict=True):
        assert_same_bits(now, [torch.from_numpy(array) for array in then])


@pytest.mark.parametrize(("changes", "where"), ADAM_CASES, ids=str)
def test_adam_rounds_as_torchs_fused_kernel(step, changes, where):
    options, place = {**ADAM_OPTIONS, **changes}, {**PLACE, **where}
    params, grads, means, squares = (tensors(seed) for seed in (1, 2, 3, 4))
    squares = [square.square_() for square in squares]
    expected = arrays(params, grads, means, squares)
    step.adam(params, grads, means, squares, list(range(len(params))), **place, **options)
    adam_reference(*expected, place, options)
    for now, then in zip((params, grads, means, squares), expected, strict=True):
        assert_same_bits(now, [torch.from_numpy(array) for array in then])


def torch_step(optimizer: torch.optim.Optimizer, params: list[Tensor], grads: list[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer.step()


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_steps_under_the_mask_follow_torchs_for_loop(step, kind):
    """Within rounding where kept; where dropped, and where a state moves, as the mask alone tells."""
    params, indices = tensors(1), list(range(len(tensors(1))))
    states = [[torch.zeros_like(param) for param in params] for _ in range(2)]
    for t in range(3):
        reference, old, grads = copies(params), copies(params), tensors(10 + t)
        place = {**PLACE, "mask_step": t, "limit": 1 << 15}
        if kind == "sgd":
            optimizer = torch.optim.SGD(
                reference, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2, foreach=False
            )
            for param, buffer in zip(reference, states[0], strict=True):
                optimizer.state[param]["momentum_buffer"] = buffer.clone() if t else None
            options = {**OPTIONS, "nesterov": True, "weight_decay": 1e-2, "is_first": t == 0}
            torch_step(optimizer, reference, grads)
            step.sgd(params, grads, states[0], indices, **place, **options)
            names = ["momentum_buffer"]
        else:
            cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
            optimizer = cls(reference, lr=1e-3, weight_decay=0.1, foreach=False)
            for number, param in enumerate(reference):
                moments = {"exp_avg": states[0][number].clone(), "exp_avg_sq": states[1][number].clone()}
                optimizer.state[param] = {"step": torch.tensor(float(t)), **moments}
            options = {**ADAM_OPTIONS, "weight_decay": 0.1, "decoupled": kind == "adamw", "step": t + 1}
            torch_step(optimizer, reference, grads)
            step.adam(params, grads, *states, indices, **place, **options)
            names = ["exp_avg", "exp_avg_sq"]
        for number, (param, new, before) in enumerate(zip(params, reference, old, strict=True)):
            keep = mask.keep_mask(tuple(param.shape), seed=5, step=t, index=number, keep_prob=0.5)
            assert torch.equal(bits(param)[~keep], bits(before)[~keep])
            torch.testing.assert_close(param[keep], new[keep], rtol=1e-6, atol=2e-7)
            for name, state in zip(names, states, strict=False):
                theirs = optimizer.state[new][name]
                # torch's kernels round beta to float32 first: 1 - 0.999 is 1.3e-5 off what its for-loop takes
                torch.testing.assert_close(state[number], theirs, rtol=3e-5, atol=1e-7)


def test_numbers_may_lie_on_the_device(step):
    runs = []
    for wrap in (lambda value, dtype: value, lambda value, dtype: torch.tensor(value, dtype=dtype)):
        params, means, squares = tensors(1), tensors(2), [square.square_() for square in tensors(3)]
        options = {
            **ADAM_OPTIONS,
            "lr": wrap(1e-3, torch.float32),
            "step": wrap(4, torch.float32),
            "weight_decay": 0.1,
        }
        step.adam(params, tensors(4), means, squares, list(range(len(params))), **PLACE, **options)
        step.sgd(
            params,
            tensors(4),
            [],
            list(range(len(params))),
            **PLACE,
            **{**OPTIONS, "lr": wrap(0.1, torch.float32), "momentum": 0.0},
        )
        runs.append(params + means + squares)
    assert_same_bits(*runs)


def test_each_tensor_may_count_its_own_steps(step):
    together, apart = ([copies(tensors(seed)) for seed in (1, 2, 3, 4)] for _ in range(2))
    for squares in (together[3], apart[3]):
        [square.square_() for square in squares]
    counts = [float(1 + number % 3) for number in range(len(together[0]))]
    indices, options = list(range(len(counts))), {**ADAM_OPTIONS, **MASKED, "seed": 5, "mask_step": 7}
    step.adam(*together, indices, **{**options, "step": [torch.tensor(count) for count in counts]})
    for number, count in enumerate(counts):
        step.adam(*([own[number]] for own in apart), [number], **{**options, "step": int(count)})
    for ours, theirs in zip(together, apart, strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("kind", ["sgd", "sgd without momentum", "adam", "adamw", "adam, steps on the device"])
def test_what_lrdropout_hands_over_is_one_step_of_torchs(step, kind, monkeypatch):
    """The dispatch that a CUDA device would get, with two groups and a parameter that joins later."""
    monkeypatch.setattr(fused, "_module", lambda _: step)
    cls = {"s": torch.optim.SGD, "a": torch.optim.AdamW if kind == "adamw" else torch.optim.Adam}[kind[0]]
    options = {"lr": 0.01, "weight_decay": 0.1} | ({"momentum": 0.9} if kind == "sgd" else {})
    options |= {"fused": True} if "device" in kind else {}
    optimizers = []
    for _ in range(2):
        params = [nn.Parameter(tensor) for tensor in tensors(1)[:6]]
        groups = [{"params": params[:4]}, {"params": params[4:], "lr": 0.1, "keep_prob": 0.9}]
        optimizers.append(cls(groups, **options))
    own, stock = optimizers
    dropout = LRDropout(own, keep_prob=0.5, seed=3)
    fake = [param for group in own.param_groups for param in group["params"]]
    real = [param for group in stock.param_groups for param in group["params"]]
    for count in range(3):
        grads = tensors(count + 2)[: 6 if count else 5]
        before = copies(fake)
        for params in (fake, real):
            for param, grad in zip(params, grads, strict=False):
                param.grad = grad.clone()
        updates = [(i, param, own.param_groups[i > 3]) for i, param in enumerate(fake) if param.grad is not None]
        with torch.no_grad():
            fused._take_on_cuda(fused._kind(own), own, updates)
        with torch.no_grad():
            for one, other in zip(real, before, strict=True):
                one.copy_(other)
        stock.step()
        for index, (ours, theirs, old) in enumerate(zip(fake, real, before, strict=True)):
            place = {"seed": 3, "step": count, "index": index, "keep_prob": 0.9 if index > 3 else 0.5}
            expected = torch.where(mask.keep_mask(ours.shape, **place), theirs, old)
            torch.testing.assert_close(ours, expected if ours.grad is not None else old, rtol=1e-4, atol=1e-6)
            assert torch.equal(bits(ours) == bits(old), bits(expected) == bits(old))
        for group in own.param_groups:
            group["mask_step"] += 1
    assert dropout.is_fused is False  # nobody has stepped the optimizer itself


def test_nans_and_zeros_that_are_dropped_keep_their_bits(step):
    pattern = torch.tensor([0x7FC12345, 0x7F812345, -0x80000000, 0x00000001] * 300, dtype=torch.int64)
    param = pattern.to(torch.int32).view(torch.float32)
    before = bits(param).clone()
    step.sgd([param], [torch.ones(1200)], [], [0], **{**PLACE, "limit": 1 << 15}, **{**OPTIONS, "momentum": 0.0})
    dropped = ~mask.draw(1200, seed=5, step=7, index=0, keep_prob=0.5)
    assert torch.equal(bits(param)[dropped], before[dropped])


# Tables


def test_tables_are_built_once_and_learn_where_new_gradients_are(step, monkeypatch):
    params, grads, built, staged = [torch.zeros(300), torch.zeros(5)], [torch.ones(300), torch.ones(5)], [], []
    make, stage = step._Tables.__init__, step._Tables._stage
    monkeypatch.setattr(step._Tables, "__init__", lambda self, *a: (built.append(1), make(self, *a))[1])
    monkeypatch.setattr(step._Tables, "_stage", lambda self: (staged.append(1), stage(self))[1])

    def go():
        step.sgd(params, grads, [], [0, 1], **PLACE, **{**OPTIONS, "momentum": 0.0, "lr": 1.0})

    go()
    first = len(staged)
    go()
    assert (len(built), len(staged)) == (1, first)
    others = grads
    grads = [torch.full((300,), 2.0), torch.full((5,), 2.0)]
    go()
    assert (len(built), len(staged)) == (1, first + 1)
    assert [param.unique().tolist() for param in params] == [[-4.0], [-4.0]]
    params[1] = torch.zeros(5)
    go()
    assert len(built) == 2
    del others


def test_tables_of_many_lists_are_not_kept_for_ever(step):
    kept = [torch.zeros(3) for _ in range(40)]
    for param in kept:
        step.sgd([param], [torch.ones(3)], [], [0], **PLACE, **{**OPTIONS, "momentum": 0.0})
    assert len(step._tables) <= step._MOST_LISTS
    assert all((param == param[0]).all() and param[0] < 0 for param in kept)


def test_a_gradient_that_is_not_aligned_is_read_all_the_same(step):
    param, bucket = torch.zeros(2048), torch.arange(2049.0)
    step.sgd([param], [bucket[1:]], [], [0], **PLACE, **{**OPTIONS, "momentum": 0.0, "lr": 1.0})
    assert torch.equal(param, -bucket[1:])


def test_a_list_without_elements_is_no_error(step):
    step.sgd([torch.zeros(0)], [torch.zeros(0)], [], [0], **PLACE, **{**OPTIONS, "momentum": 0.0})
    step.sgd([], [], [], [], **PLACE, **{**OPTIONS, "momentum": 0.0})


@pytest.mark.parametrize(
    ("param", "grad", "said"),
    [
        (torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), "float32"),
        (torch.zeros(4, 4).t()[:2], torch.zeros(4, 4).t()[:2], "contiguous"),
        (torch.zeros(2, 2, 2, 2).to(memory_format=CHANNELS_LAST), torch.zeros(2, 2, 2, 2), "memory format"),
        (torch.zeros(4), torch.zeros(2, 2), "shape"),
    ],
)
def test_what_the_kernels_cannot_read_is_refused(step, param, grad, said):
    with pytest.raises(ValueError, match=said):
        step.sgd([param], [grad], [], [0], **PLACE, **{**OPTIONS, "momentum": 0.0})


# Compiled for sm_90

POINTERS = {"table": "*i64", "gradients": "*i64", "owners": "*i32", "bits": "*u8"}
COUNTS = {"n_blocks": "i32", "seed": "u64", "mask_step": "*i64", "limit": "i32", "n_planes": "i32", "step": "i64"}
COMMON = {"DECAY": True, "MAXIMIZE": False, "MASKED": True, "RESCALE": True, "CHUNK": 1024}
KERNELS = {
    "draw_kernel": {"BLOCKS": 256},
    "sgd_kernel": {"MOMENTUM": True, "NESTEROV": True, "FIRST": False, **COMMON},
    "adam_kernel": {"DECOUPLED": True, "OWN_STEPS": True, **COMMON},
}


def compiled(name: str) -> Any:
    from lrd import cuda_kernels

    source = importlib.import_module("triton.compiler").ASTSource
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    kernel, constants = getattr(cuda_kernels, name), KERNELS[name]
    types = {argument: (POINTERS | COUNTS).get(argument, "fp32") for argument in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr") | ({"bits": "*u64"} if name == "draw_kernel" else {})
    places = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    options = {"num_warps": 8, "enable_fp_fusion": False}
    return triton.compile(source(fn=kernel, signature=types, constexprs=places), target=target, options=options)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_compile_without_spills_or_hidden_multiply_adds(name):
    binary = compiled(name)
    ptx, cubin = binary.asm["ptx"], binary.asm["cubin"]
    assert len(cubin) > 1000
    assert ".local" not in ptx
    assert len(re.findall(r"mul\.hi\.u64", ptx)) == (20 if name == "draw_kernel" else 0)  # two a round
    tensors_read, tensors_written = {"draw_kernel": (0, 0), "sgd_kernel": (3, 2), "adam_kernel": (4, 3)}[name]
    assert len(re.findall(r"ld\.global\.v4", ptx)) == tensors_read
    assert len(re.findall(r"st\.global\.v4", ptx)) == tensors_written
    if name == "sgd_kernel":  # four elements a thread, on the two paths: decay, momentum, nesterov, lr
        assert len(re.findall(r"fma\.rn\.f32", ptx)) == 2 * 4 * 4
        assert not re.findall(r"\b(mul|add|sub)\.(ftz\.)?f32", ptx)  # what ptxas might contract says no .rn


def test_import_lrd_leaves_triton_alone():
    code = "import sys, lrd; print('lrd.cuda_step' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.strip() == "False"


# On a device

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def on_device():
    return importlib.import_module("lrd.cuda_step")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("keep_prob", [0.5, 0.75, 0.9, 2**-16])
def test_a_device_draws_the_bits_of_the_mask(on_device, keep_prob):
    for mask_step in (0, 1, 2**33 + 5):
        drawn = drawn_by(on_device, "cuda", keep_prob=keep_prob, seed=FULL, mask_step=mask_step, first_index=2**33)
        for moved, expected in drawn:
            assert torch.equal(moved, expected)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize(("changes", "where"), SGD_CASES, ids=str)
def test_sgd_on_a_device_equals_the_reference(on_device, changes, where):
    options, place = {**OPTIONS, **changes}, {**PLACE, **where}
    params, grads, buffers = (tensors(seed, "cuda") for seed in (1, 2, 3))
    expected = arrays(params, grads, buffers)
    on_device.sgd(params, grads, buffers if options["momentum"] else [], list(range(len(params))), **place, **options)
    sgd_reference(*expected, place, options)
    for now, then in zip((params, grads, buffers), expected, strict=True):
        assert_same_bits(now, [torch.from_numpy(array) for array in then])


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize(("nesterov", "weight_decay"), [(False, 0.0), (False, 1e-2), (True, 0.0), (True, 1e-2)])
def test_sgd_on_a_device_equals_torchs_fused(on_device, nesterov, weight_decay):
    params, theirs = tensors(1, "cuda"), tensors(1, "cuda")
    buffers = [torch.zeros_like(param) for param in params]
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay}
    optimizer = torch.optim.SGD(theirs, fused=True, **options)
    for t in range(3):
        grads = tensors(10 + t, "cuda")
        torch_step(optimizer, theirs, grads)
        every = {**OPTIONS, **options, "is_first": t == 0}
        on_device.sgd(params, grads, buffers, list(range(len(params))), **PLACE, **every)
        assert_same_bits(params, theirs)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_on_a_device_equals_torchs_fused(on_device, weight_decay):
    params, theirs = tensors(1, "cuda"), tensors(1, "cuda")
    means, squares = [[torch.zeros_like(param) for param in params] for _ in range(2)]
    optimizer = torch.optim.AdamW(theirs, lr=1e-3, weight_decay=weight_decay, fused=True)
    for t in range(3):
        grads = tensors(10 + t, "cuda")
        torch_step(optimizer, theirs, grads)
        options = {**ADAM_OPTIONS, "weight_decay": weight_decay, "decoupled": True, "step": t + 1}
        on_device.adam(params, grads, means, squares, list(range(len(params))), **PLACE, **options)
        assert_same_bits(means, [optimizer.state[param]["exp_avg"] for param in theirs])
        assert_same_bits(squares, [optimizer.state[param]["exp_avg_sq"] for param in theirs])
        if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):  # with powf as CUDA 13.2 has it
            assert_same_bits(params, theirs)
        else:  # 1 - powf(0.999, t) magnifies the last bit of another powf
            for ours, their in zip(params, theirs, strict=True):
                torch.testing.assert_close(ours, their, rtol=1e-6, atol=1e-7)


@pytest.mark.cuda
@needs_cuda
def test_a_replayed_graph_draws_the_next_mask(on_device):
    params, eager, grads = tensors(1, "cuda"), tensors(1, "cuda"), tensors(2, "cuda")
    indices, mask_step = list(range(len(params))), torch.tensor(0, device="cuda")
    options = {**OPTIONS, "momentum": 0.0}
    place = {**PLACE, "limit": 1 << 15}

    def captured():
        on_device.sgd(params, grads, [], indices, **{**place, "mask_step": mask_step}, **options)
        mask_step.add_(1)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured()
    for _ in range(3):
        graph.replay()
    for t in range(4):
        on_device.sgd(eager, grads, [], indices, **{**place, "mask_step": t}, **options)
    assert_same_bits(params, eager)
    others = tensors(3, "cuda")  # a step with other gradients in between leaves the graph's alone
    on_device.sgd(params, others, [], indices, **{**place, "mask_step": 4}, **options)
    on_device.sgd(eager, others, [], indices, **{**place, "mask_step": 4}, **options)
    mask_step.fill_(5)
    graph.replay()
    on_device.sgd(eager, grads, [], indices, **{**place, "mask_step": 5}, **options)
    assert_same_bits(params, eager)
