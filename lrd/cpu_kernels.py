"""Numba kernels of a masked optimizer step for a list of tensors: `lrd.cpu_step` calls them.

The mask is drawn in registers for 256 elements at a time (lrd.mask's own bits: one Philox block a plane) and laid on
the update before it is stored: it costs no memory, neither traffic nor space.

Each element is rounded as torch's for-loop and foreach implementations round it on a CPU, where one ATen call is one
line here and `add(alpha=)` is a fused multiply-add. `lrd.fused` compares the bits before it trusts them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, float32, from_dtype, int64, njit, types, uint32, uint64
from numba.extending import intrinsic

JOB = np.dtype(
    [(name, "i8") for name in ("tensors", "n_tensors", "chunks", "n_chunks", "claims", "square_root", "set_threads")]
)
_MASK = [("index", "u8"), ("step", "u8"), ("seed", "u8"), ("limit", "i8"), ("rescale", "f4")]
_TENSOR = [("numel", "i8"), ("param", "i8"), ("grad", "i8"), ("is_maximized", "?"), ("weight_decay", "f4")]
SGD = np.dtype([
    *_TENSOR, ("buffer", "i8"), ("is_first", "?"), ("minus_lr", "f4"), ("momentum", "f4"), ("undamped", "f4"),
    ("is_nesterov", "?"), *_MASK,
])  # fmt: skip
ADAM = np.dtype([
    *_TENSOR, ("exp_avg", "i8"), ("exp_avg_sq", "i8"), ("is_decoupled", "?"), ("decay", "f4"), ("weight_1", "f4"),
    ("beta_2", "f4"), ("weight_2", "f4"), ("correction", "f4"), ("eps", "f4"), ("minus_step_size", "f4"), *_MASK,
])  # fmt: skip
_JOB, _SGD, _ADAM = (from_dtype(dtype) for dtype in (JOB, SGD, ADAM))
_BLOCK = 1 << 8  # elements that one Philox block decides
_PIECE = 1 << 9  # elements whose square roots are taken in one call: with more, the memory is idle for longer
_MULTIPLIER_0, _MULTIPLIER_1 = uint64(0xD2E7470EE14C6C93), uint64(0xCA5A826395121157)
_WEYL_0, _WEYL_1 = uint64(0x9E3779B97F4A7C15), uint64(0xBB67AE8584CAA73B)
_MKL_MODE = 0x2 | 0x140000 | 0x100  # high accuracy, denormals as they are, no error handler: as ATen calls it
_ALL = uint64(0xFFFFFFFFFFFFFFFF)


@intrinsic
def _pointer(_context: Any, _address: Any, kind: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind.instance_type)(types.int64, kind), generate


@intrinsic
def _fma(_context: Any, _a: Any, _b: Any, _c: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def _high(_context: Any, _a: Any, _b: Any) -> Any:
    """The upper 64 of a product's 128 bits."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(argument, wide) for argument in arguments))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


@intrinsic
def _claim(_context: Any, _address: Any) -> Any:
    """Add one to the int64 at an address, atomically; its value before."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def _roots(_context: Any, _function: Any, _count: Any, _values: Any) -> Any:
    """The library's square roots, in place: void function(int64 count, const float *, float *, int64 mode)."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word] * 4).as_pointer()
        function, count, values = arguments
        builder.call(builder.inttoptr(function, kind), [count, values, values, ir.Constant(word, _MKL_MODE)])
        return ir.Constant(word, 0)

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic
def _set_threads(_context: Any, _function: Any, _count: Any) -> Any:
    """How many threads the library may take when this one calls it; what it was before: int function(int)."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        number = ir.IntType(32)
        kind = ir.FunctionType(number, [number]).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], kind), [arguments[1]])

    return types.int32(types.int64, types.int32), generate


@njit(inline="always", error_model="numpy")
def _philox(c0, c1, c2, c3, k0):
    """One block of Philox4x64-10 (Salmon et al., SC 2011), the key's second word zero: lrd.philox's domain MASK."""
    k1 = uint64(0)
    for _ in range(10):
        high_0, low_0 = _high(_MULTIPLIER_0, c0), _MULTIPLIER_0 * c0
        high_1, low_1 = _high(_MULTIPLIER_1, c2), _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 += _WEYL_0
        k1 += _WEYL_1
    return c0, c1, c2, c3


@njit(inline="always", error_model="numpy")
def _draw(block, index, step, seed, limit, words):
    """The keep bits of one block's 256 elements into `words`, uint32 (8,).

    From the most significant plane down, and no further than anything is undecided: 9.3 planes of 16 on average. The
    bits are lrd.mask's, which goes the other way because whole arrays are never decided early.
    """
    kept_0 = kept_1 = kept_2 = kept_3 = uint64(0)
    open_0 = open_1 = open_2 = open_3 = _ALL  # u's bits so far equal T's
    if limit > 0xFFFF:
        kept_0 = kept_1 = kept_2 = kept_3 = _ALL
    rest, plane = limit & 0xFFFF, uint64(0)
    while rest != 0 and (open_0 | open_1 | open_2 | open_3) != 0:
        w0, w1, w2, w3 = _philox(block, plane, index, step, seed)
        if rest & 0x8000:  # T's bit is one: smaller where u's is zero
            kept_0 |= open_0 & ~w0
            kept_1 |= open_1 & ~w1
            kept_2 |= open_2 & ~w2
            kept_3 |= open_3 & ~w3
        else:  # T's bit is zero: larger where u's is one
            w0, w1, w2, w3 = ~w0, ~w1, ~w2, ~w3
        open_0 &= w0
        open_1 &= w1
        open_2 &= w2
        open_3 &= w3
        rest = (rest << 1) & 0xFFFF
        plane += uint64(1)
    words[0], words[1] = uint32(kept_0), uint32(kept_0 >> uint64(32))
    words[2], words[3] = uint32(kept_1), uint32(kept_1 >> uint64(32))
    words[4], words[5] = uint32(kept_2), uint32(kept_2 >> uint64(32))
    words[6], words[7] = uint32(kept_3), uint32(kept_3 >> uint64(32))


@njit(inline="always")
def _word(words, element, index, step, seed, limit):
    """The keep bits of 32 elements from `element` on, whose turn it is: a block is drawn at its first."""
    if element % _BLOCK == 0:
        _draw(uint64(element // _BLOCK), index, step, seed, limit, words)
    return words[(element // 32) % 8]


@njit(inline="always", error_model="numpy")
def _masked(word, lane, new, old, rescale):
    if rescale != 0:
        new = (new - old) / rescale + old
    return new if (word >> uint32(lane)) & uint32(1) else old


@njit
def _claimed(claims, count):
    """Numbers below `count` that no other thread works at."""
    number = _claim(claims)
    while number < count:
        yield number
        number = _claim(claims)


@njit(inline="always")
def _unpacked(job, kind):
    own = carray(_pointer(job, _JOB), 1)[0]
    tensors = carray(_pointer(own.tensors, kind), own.n_tensors)
    chunks = carray(_pointer(own.chunks, int64), (own.n_chunks, 3))
    return tensors, chunks, own.claims, (own.square_root, own.set_threads)


@njit(inline="always")
def _floats(address, start, count):
    return carray(_pointer(address + 4 * start, float32), count)


def sgd(job):
    """Stochastic gradient descent; a C function of the address of a JOB, for each thread to call."""
    tensors, chunks, claims, _ = _unpacked(job, _SGD)
    words = np.empty(8, np.uint32)
    for c in _claimed(claims, len(chunks)):
        own, start, count = tensors[chunks[c, 0]], chunks[c, 1], chunks[c, 2]
        param = _floats(own.param, start, count)
        grad = _floats(own.grad, start, count)
        buffer = _floats(own.buffer, start, count)
        # Into registers: what stays in memory might be what the loop writes, for all that the compiler knows.
        is_maximized, is_first, is_nesterov = own.is_maximized, own.is_first, own.is_nesterov
        minus_lr, momentum, undamped, weight_decay = own.minus_lr, own.momentum, own.undamped, own.weight_decay
        index, step, seed, limit, rescale = own.index, own.step, own.seed, own.limit, own.rescale
        for done in range(0, count, 32):
            word = _word(words, start + done, index, step, seed, limit)
            for lane in range(min(32, count - done)):
                i = np.uintp(done + lane)
                old, g = param[i], grad[i]
                if is_maximized:
                    g = -g
                if weight_decay != 0:
                    g = _fma(weight_decay, old, g)
                if momentum != 0:
                    b = g if is_first else _fma(undamped, g, buffer[i] * momentum)
                    buffer[i] = b
                    g = _fma(momentum, b, g) if is_nesterov else b
                param[i] = _masked(word, lane, _fma(minus_lr, g, old), old, rescale)


def adam(job):
    """Adam, and AdamW where it is decoupled; otherwise as `sgd`."""
    tensors, chunks, claims, (square_root, set_threads) = _unpacked(job, _ADAM)
    words, roots = np.empty(8, np.uint32), np.empty(_PIECE, np.float32)
    threads = _set_threads(set_threads, 1) if square_root != 0 else 0
    for c in _claimed(claims, len(chunks)):
        own = tensors[chunks[c, 0]]
        is_maximized, is_decoupled = own.is_maximized, own.is_decoupled
        weight_decay, decay, beta_2, weight_1, weight_2 = (
            own.weight_decay, own.decay, own.beta_2, own.weight_1, own.weight_2
        )  # fmt: skip
        correction, eps, minus_step_size = own.correction, own.eps, own.minus_step_size
        index, step, seed, limit, rescale = own.index, own.step, own.seed, own.limit, own.rescale
        for start in range(chunks[c, 1], chunks[c, 1] + chunks[c, 2], _PIECE):
            count = min(_PIECE, chunks[c, 1] + chunks[c, 2] - start)
            param = _floats(own.param, start, count)
            grad = _floats(own.grad, start, count)
            exp_avg = _floats(own.exp_avg, start, count)
            exp_avg_sq = _floats(own.exp_avg_sq, start, count)
            for position in range(count):
                i = np.uintp(position)
                g = -grad[i] if is_maximized else grad[i]
                if weight_decay != 0 and not is_decoupled:
                    g = _fma(weight_decay, param[i], g)
                exp_avg[i] = _fma(weight_1, g - exp_avg[i], exp_avg[i])
                exp_avg_sq[i] = roots[i] = _fma(weight_2 * g, g, exp_avg_sq[i] * beta_2)
            if square_root != 0:
                _roots(square_root, count, roots.ctypes.data)
            else:
                for position in range(count):
                    roots[position] = np.sqrt(roots[position])
            for done in range(0, count, 32):
                word = _word(words, start + done, index, step, seed, limit)
                for lane in range(min(32, count - done)):
                    i = np.uintp(done + lane)
                    old = param[i]
                    new = old * decay if weight_decay != 0 and is_decoupled else old
                    new = new + minus_step_size * exp_avg[i] / (roots[i] / correction + eps)
                    param[i] = _masked(word, lane, new, old, rescale)
    if square_root != 0:
        _set_threads(set_threads, threads)
