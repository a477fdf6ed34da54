"""Triton kernels of a masked optimizer step for a list of tensors: `lrd.cuda_step` launches them.

`draw_kernel` draws the mask's bits, packed, one Philox block a thread: a bit an element, where a step of SGD moves 160,
and they stay in the L2 cache. `sgd_kernel` and `adam_kernel` read them where they update, also where elements lie in
memory in another order than the mask counts them (channels_last). To draw within the update would take a Philox block
for each such element, where one serves 256.

Rounding is that of torch's `fused=True` (aten/src/ATen/native/cuda/FusedSgdKernel.cu and fused_adam_utils.cuh), which
computes in float32 since torch 2.11. A multiply-add is one `fma` where its machine code contracts it (sm_90, 2.11 and
2.15); nothing else may be contracted: launch with enable_fp_fusion=False. That code rounds neighbouring elements in two
ways at two places, which is not imitated: Adam's L2 weight decay contracts three elements of four, and SGD with
maximize and momentum, without weight decay, rounds the other product where it loads four elements at a time.

What all kernels read (`lrd.cuda_step` builds it):
    table: int64 (n_tensors, 9), a row for each tensor, see the columns below.
    gradients: int64 (n_tensors,), addresses.
    owners: int32 (n_chunks,), the tensor of each chunk. A tensor's chunks follow each other; the last may be partial.
    bits: the keep bits, CHUNK of them for each chunk, in the mask's order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from lrd import mask, philox

CHUNK = 1024  # elements that one program updates
BLOCK = philox.WORDS_PER_BLOCK * philox.WORD_BITS  # elements that one Philox block serves
COLUMNS = ("param", "state", "second state", "numel", "first chunk", "index", "channels", "area", "step")
_PARAM, _STATE, _SECOND_STATE, _NUMEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_FIRST_CHUNK, _INDEX, _CHANNELS, _AREA, _STEP = (tl.constexpr(i) for i in range(4, 9))
_COLUMNS = tl.constexpr(len(COLUMNS))
_BLOCKS_PER_CHUNK = tl.constexpr(CHUNK // BLOCK)
_OCTETS_PER_CHUNK = tl.constexpr(CHUNK // 8)
_TOP = tl.constexpr(mask.RESOLUTION_BITS - 1)
_DOMAIN = tl.constexpr(int(philox.Domain.MASK))
_LEFT, _RIGHT = tl.constexpr(0xD2E7470EE14C6C93), tl.constexpr(0xCA5A826395121157)  # multipliers and Weyl constants
_WEYL_0, _WEYL_1 = tl.constexpr(0x9E3779B97F4A7C15), tl.constexpr(0xBB67AE8584CAA73B)  # of Salmon et al., SC 2011
_FULL = tl.constexpr((1 << 64) - 1)


@triton.jit
def _value(scalar):
    """A scalar: the number itself, or what lies where it points to."""
    if scalar.dtype.is_ptr():
        scalar = tl.load(scalar)
    return scalar


@triton.jit
def _philox(c0, c1, c2, c3, seed):
    """Philox4x64-10 of the counter's words under the key (seed, domain), all uint64."""
    for i in tl.static_range(10):
        left_high, left = tl.umulhi(c0, _LEFT), c0 * _LEFT
        right_high, right = tl.umulhi(c2, _RIGHT), c2 * _RIGHT
        c0 = right_high ^ c1 ^ (seed + ((i * _WEYL_0) & _FULL))
        c2 = left_high ^ c3 ^ ((_DOMAIN + i * _WEYL_1) & _FULL)
        c1, c3 = right, left
    return c0, c1, c2, c3


@triton.jit(do_not_specialize=["n_blocks", "seed", "mask_step", "limit", "n_planes"])
def draw_kernel(table, owners, bits, n_blocks, seed, mask_step, limit, n_planes, BLOCKS: tl.constexpr):
    """Draw `bits`, uint64 (4 * n_blocks,). T is `limit`; its lowest set bit is in the last of the `n_planes` planes."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    owner = tl.load(owners + block // _BLOCKS_PER_CHUNK, mask=block < n_blocks, other=0)
    row = table + owner.to(tl.int64) * _COLUMNS
    counter = (block - tl.load(row + _FIRST_CHUNK) * _BLOCKS_PER_CHUNK).to(tl.uint64)
    index = tl.load(row + _INDEX).to(tl.uint64)
    step = _value(mask_step).to(tl.uint64)
    kept = tl.full((BLOCKS, 2, 2), 0, tl.uint64)
    for i in range(n_planes):
        plane = n_planes - 1 - i
        w0, w1, w2, w3 = _philox(counter, plane.to(tl.uint64), index, step, seed.to(tl.uint64))
        zeros = ~tl.join(tl.join(w0, w2), tl.join(w1, w3))
        # T's bit one: smaller where u's is zero, else undecided. T's bit zero: larger where u's is one, else undecided.
        kept = tl.where(((limit >> (_TOP - plane)) & 1) != 0, kept | zeros, kept & zeros)
    place = tl.program_id(0).to(tl.int64) * (BLOCKS * 4) + tl.arange(0, BLOCKS * 4)
    tl.store(bits + place, tl.reshape(kept, (BLOCKS * 4,)), mask=place < n_blocks.to(tl.int64) * 4)


@triton.jit
def _floats(address, start, WHOLE: tl.constexpr):
    pointer = address.to(tl.pointer_type(tl.float32))
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)  # looked at in _is_whole: four elements a load
    return pointer + start


@triton.jit
def _is_whole(row, gradient, start, CHUNK: tl.constexpr):
    """Whether a chunk is full and all its tensors are aligned to 16 bytes. A gradient in a bucket may not be."""
    addresses = gradient | tl.load(row + _PARAM) | tl.load(row + _STATE) | tl.load(row + _SECOND_STATE)
    return (start + CHUNK <= tl.load(row + _NUMEL)) & ((addresses & 15) == 0)


@triton.jit
def _kept(bits, row, chunk, start, inside, CHUNK: tl.constexpr):
    """The mask of a chunk's elements, which lie one after the other in memory."""
    channels, area = tl.load(row + _CHANNELS).to(tl.uint32), tl.load(row + _AREA).to(tl.uint32)
    if channels == 0:  # by fours, as a thread has its elements: each needs one load and nothing of its neighbours'
        four = tl.arange(0, CHUNK // 4)
        nibble = tl.load(bits + chunk * _OCTETS_PER_CHUNK + four // 2).to(tl.int32) >> four % 2 * 4
        bit = tl.reshape(nibble[:, None] >> tl.arange(0, 4)[None, :], (CHUNK,))
    else:  # (outer, place in the area, channel) in memory, (outer, channel, place) for the mask
        position = (start + tl.arange(0, CHUNK)).to(tl.uint32)
        pixel = position // channels
        outer = pixel // area
        element = (outer * channels + position - pixel * channels) * area + pixel - outer * area
        octet = tl.load(bits + tl.load(row + _FIRST_CHUNK) * _OCTETS_PER_CHUNK + element // 8, mask=inside)
        bit = octet.to(tl.int32) >> (element % 8).to(tl.int32)
    return bit & 1 != 0


@triton.jit
def _selected(old, new, kept, keep_prob, RESCALE: tl.constexpr):
    """What to write. To write dropped elements' old bits costs nothing: nearly every sector has a kept one."""
    if RESCALE:
        new = old + tl.div_rn(new - old, keep_prob)
    if kept is not None:
        new = tl.where(kept, new, old)
    return new


@triton.jit
def _sgd_chunk(
    row, gradient, bits, chunk, start, lr, momentum, dampening, decay, keep,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr, FIRST: tl.constexpr,
    MASKED: tl.constexpr, RESCALE: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, CHUNK)
    inside = None if WHOLE else start + lane < tl.load(row + _NUMEL)
    param = _floats(tl.load(row + _PARAM), start, WHOLE) + lane
    old = tl.load(param, mask=inside)
    update = tl.load(_floats(gradient, start, WHOLE) + lane, mask=inside)
    buffer = _floats(tl.load(row + _STATE), start, WHOLE) + lane
    average = tl.load(buffer, mask=inside) if MOMENTUM and not FIRST else update
    kept = _kept(bits, row, chunk, start, inside, CHUNK) if MASKED else None  # before the stores, which no load passes
    if MAXIMIZE:
        update = -update
    if DECAY:
        update = tl.fma(old, decay, update)
    if MOMENTUM:
        average = update if FIRST else tl.fma(update, 1.0 - dampening, average * momentum)
        tl.store(buffer, average, mask=inside)
        update = tl.fma(average, momentum, update) if NESTEROV else average
    new = tl.fma(update, -lr, old)
    tl.store(param, _selected(old, new, kept, keep, RESCALE), mask=inside)


@triton.jit
def sgd_kernel(
    table, gradients, owners, bits, lr, momentum, dampening, decay, keep,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr, FIRST: tl.constexpr,
    MASKED: tl.constexpr, RESCALE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One chunk of one tensor a program. Scalars are float32; `lr` may be a pointer to it."""
    chunk = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + chunk).to(tl.int64)
    row, gradient, lr = table + owner * _COLUMNS, tl.load(gradients + owner), _value(lr)
    start = (chunk - tl.load(row + _FIRST_CHUNK)) * CHUNK
    if _is_whole(row, gradient, start, CHUNK):
        _sgd_chunk(row, gradient, bits, chunk, start, lr, momentum, dampening, decay, keep,
                   MOMENTUM, NESTEROV, DECAY, MAXIMIZE, FIRST, MASKED, RESCALE, CHUNK, WHOLE=True)  # fmt: skip
    else:
        _sgd_chunk(row, gradient, bits, chunk, start, lr, momentum, dampening, decay, keep,
                   MOMENTUM, NESTEROV, DECAY, MAXIMIZE, FIRST, MASKED, RESCALE, CHUNK, WHOLE=False)  # fmt: skip


@triton.jit
def _adam_chunk(
    row, gradient, bits, chunk, start, lr, time, beta1, beta2, decay, eps, keep,
    DECAY: tl.constexpr, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr,
    MASKED: tl.constexpr, RESCALE: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, CHUNK)
    inside = None if WHOLE else start + lane < tl.load(row + _NUMEL)
    param = _floats(tl.load(row + _PARAM), start, WHOLE) + lane
    first_moment = _floats(tl.load(row + _STATE), start, WHOLE) + lane
    second_moment = _floats(tl.load(row + _SECOND_STATE), start, WHOLE) + lane
    old = tl.load(param, mask=inside)
    grad = tl.load(_floats(gradient, start, WHOLE) + lane, mask=inside)
    mean, mean_square = tl.load(first_moment, mask=inside), tl.load(second_moment, mask=inside)
    kept = _kept(bits, row, chunk, start, inside, CHUNK) if MASKED else None  # before the stores, which no load passes
    step_size = tl.div_rn(lr, 1.0 - libdevice.pow(beta1, time))  # while the loads are under way
    root_correction = tl.sqrt_rn(1.0 - libdevice.pow(beta2, time))
    new = old
    if MAXIMIZE:
        grad = -grad
    if DECAY and DECOUPLED:
        new = tl.fma(old, -(lr * decay), old)
    elif DECAY:
        grad = tl.fma(old, decay, grad)
    square = grad * grad
    mean = tl.fma(mean, beta1, tl.fma(grad, -beta1, grad))
    mean_square = tl.fma(mean_square, beta2, tl.fma(square, -beta2, square))
    tl.store(first_moment, mean, mask=inside)
    tl.store(second_moment, mean_square, mask=inside)
    new -= tl.div_rn(mean * step_size, tl.div_rn(tl.sqrt_rn(mean_square), root_correction) + eps)
    tl.store(param, _selected(old, new, kept, keep, RESCALE), mask=inside)


@triton.jit(do_not_specialize=["step"])
def adam_kernel(
    table, gradients, owners, bits, step, lr, beta1, beta2, decay, eps, keep,
    DECAY: tl.constexpr, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr,
    MASKED: tl.constexpr, RESCALE: tl.constexpr, CHUNK: tl.constexpr, OWN_STEPS: tl.constexpr,
):  # fmt: skip
    """One chunk of one tensor a program. Scalars are float32; `step` and `lr` may be pointers to them.

    OWN_STEPS: each tensor counts for itself, float32 at the address in the table; `step` is not looked at.
    """
    chunk = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + chunk).to(tl.int64)
    row, gradient, lr = table + owner * _COLUMNS, tl.load(gradients + owner), _value(lr)
    start = (chunk - tl.load(row + _FIRST_CHUNK)) * CHUNK
    if OWN_STEPS:  # noqa: SIM108  # a conditional expression would compile both
        time = tl.load(tl.load(row + _STEP).to(tl.pointer_type(tl.float32)))
    else:
        time = _value(step).to(tl.float32)
    if _is_whole(row, gradient, start, CHUNK):
        _adam_chunk(row, gradient, bits, chunk, start, lr, time, beta1, beta2, decay, eps, keep,
                    DECAY, DECOUPLED, MAXIMIZE, MASKED, RESCALE, CHUNK, WHOLE=True)  # fmt: skip
    else:
        _adam_chunk(row, gradient, bits, chunk, start, lr, time, beta1, beta2, decay, eps, keep,
                    DECAY, DECOUPLED, MAXIMIZE, MASKED, RESCALE, CHUNK, WHOLE=False)  # fmt: skip
