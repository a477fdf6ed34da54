"""Triton kernels of a masked optimizer step for a list of tensors, launched by `cuda_step`.

`draw_kernel` draws the mask's bits, packed, one Philox block a thread. `sgd_kernel` and
`adam_kernel` read them from the L2 cache. The mask is 1 bit an element; SGD with momentum moves 160
bits an element. In channels_last, neighbours in memory lie in different Philox blocks, so drawing
inside the update would compute a block for each element in place of one for 256.

Rounding is that of torch's `fused=True` (aten/src/ATen/native/cuda/FusedSgdKernel.cu and
fused_adam_utils.cuh), which computes in float32 since torch 2.11. A multiply-add is one `fma` where
torch's machine code contracts it (sm_90, 2.11 and 2.15). Nothing else may be contracted: launch
with enable_fp_fusion=False.

torch's code rounds neighbouring elements in two ways at two places, which is not imitated: Adam's
L2 weight decay contracts three elements of four, and SGD with maximize and momentum, without weight
decay, rounds the other product where it loads four elements at a time.

What all kernels read, built by `cuda_step`:
    table: int64 (n_tensors, 9), a row for each tensor, see `COLUMNS`.
    gradient_addresses: int64 (n_tensors,).
    tensor_of_chunk: int32 (n_chunks,), the number of the tensor that a chunk belongs to. A tensor's
        chunks follow each other; its last one may be partial.
    keep_bits: CHUNK bits for each chunk, in the mask's order: uint64 words for `draw_kernel`, bytes
        for the others.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from lrd import philox
from lrd.optim import mask

BLOCK = philox.BLOCK_BITS  # elements that one Philox block serves

# Elements that one program updates. A chunk's mask must be whole Philox blocks.
CHUNK = 1024
assert CHUNK % BLOCK == 0

COLUMNS = (
    "param",  # address
    "first_state",  # address of momentum_buffer or exp_avg; 0: none
    "second_state",  # address of exp_avg_sq; 0: none
    "numel",
    "first_chunk",  # number of the tensor's first chunk
    "index",  # the parameter's, counted through the optimizer's groups
    "channels",  # of a tensor in channels_last; else 0
    "area",  # height times width of a tensor in channels_last; else 0
    "step",  # address of the tensor's own count of updates, float32 (); 0: none
)

_PARAM = tl.constexpr(COLUMNS.index("param"))
_FIRST_STATE = tl.constexpr(COLUMNS.index("first_state"))
_SECOND_STATE = tl.constexpr(COLUMNS.index("second_state"))
_NUMEL = tl.constexpr(COLUMNS.index("numel"))
_FIRST_CHUNK = tl.constexpr(COLUMNS.index("first_chunk"))
_INDEX = tl.constexpr(COLUMNS.index("index"))
_CHANNELS = tl.constexpr(COLUMNS.index("channels"))
_AREA = tl.constexpr(COLUMNS.index("area"))
_STEP = tl.constexpr(COLUMNS.index("step"))
_N_COLUMNS = tl.constexpr(len(COLUMNS))

_BLOCKS_PER_CHUNK = tl.constexpr(CHUNK // BLOCK)
_BYTES_PER_CHUNK = tl.constexpr(CHUNK // 8)
_LAST_PLANE = tl.constexpr(mask.RESOLUTION_BITS - 1)

# Philox4x64-10, see `lrd.philox`
_MULTIPLIER_0 = tl.constexpr(philox.MULTIPLIER_0)
_MULTIPLIER_1 = tl.constexpr(philox.MULTIPLIER_1)
_WEYL_0 = tl.constexpr(philox.WEYL_0)
_WEYL_1 = tl.constexpr(philox.WEYL_1)
_DOMAIN = tl.constexpr(int(philox.Domain.MASK))
_ALL_ONES = tl.constexpr((1 << 64) - 1)


@triton.jit
def _load_scalar(scalar):
    """A scalar: the number itself, or what lies where it points to."""
    if scalar.dtype.is_ptr():
        scalar = tl.load(scalar)
    return scalar


# The mask


@triton.jit
def _philox(c0, c1, c2, c3, seed):
    """Philox4x64-10 of the counter's four words under the key (seed, domain), all uint64."""
    for i in tl.static_range(10):
        high_0 = tl.umulhi(c0, _MULTIPLIER_0)
        low_0 = c0 * _MULTIPLIER_0
        high_1 = tl.umulhi(c2, _MULTIPLIER_1)
        low_1 = c2 * _MULTIPLIER_1

        c0 = high_1 ^ c1 ^ (seed + ((i * _WEYL_0) & _ALL_ONES))
        c2 = high_0 ^ c3 ^ ((_DOMAIN + i * _WEYL_1) & _ALL_ONES)
        c1 = low_1
        c3 = low_0

    return c0, c1, c2, c3


@triton.jit(do_not_specialize=["n_blocks", "seed", "mask_step", "threshold", "n_planes"])
def draw_kernel(
    table,  # int64 (n_tensors, 9)
    tensor_of_chunk,  # int32 (n_chunks,)
    keep_bits,  # uint64 (4 * n_blocks,), written
    n_blocks,
    seed,
    mask_step,  # a number, or a pointer to it
    threshold,  # 1 to 65535, see `lrd.optim.mask`
    n_planes,  # its lowest set bit is in the last of these bit planes
    BLOCKS: tl.constexpr,
):
    """Draw the mask's bits: BLOCKS Philox blocks a program."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    tensor = tl.load(tensor_of_chunk + block // _BLOCKS_PER_CHUNK, mask=block < n_blocks, other=0)

    # The mask's position: the block within its tensor, the parameter's index, the update count
    row = table + tensor.to(tl.int64) * _N_COLUMNS
    counter = (block - tl.load(row + _FIRST_CHUNK) * _BLOCKS_PER_CHUNK).to(tl.uint64)
    index = tl.load(row + _INDEX).to(tl.uint64)
    step = _load_scalar(mask_step).to(tl.uint64)

    # An element is kept where its number u is smaller than the threshold. Compare them from the
    # least significant plane up. Where the threshold's bit is one, u is smaller if its bit is zero;
    # where it is zero, u is larger if its bit is one; else the planes so far decide.
    kept = tl.full((BLOCKS, 2, 2), 0, tl.uint64)
    for i in range(n_planes):
        plane = n_planes - 1 - i
        w0, w1, w2, w3 = _philox(counter, plane.to(tl.uint64), index, step, seed.to(tl.uint64))
        zeros = ~tl.join(tl.join(w0, w2), tl.join(w1, w3))
        is_one = ((threshold >> (_LAST_PLANE - plane)) & 1) != 0
        kept = tl.where(is_one, kept | zeros, kept & zeros)

    word = tl.program_id(0).to(tl.int64) * (BLOCKS * 4) + tl.arange(0, BLOCKS * 4)
    n_words = n_blocks.to(tl.int64) * 4
    tl.store(keep_bits + word, tl.reshape(kept, (BLOCKS * 4,)), mask=word < n_words)


@triton.jit
def _load_mask(keep_bits, row, chunk, start, inside, CHUNK: tl.constexpr):
    """The mask of a chunk's elements in the order of memory, bool (CHUNK,)."""
    channels = tl.load(row + _CHANNELS).to(tl.uint32)
    area = tl.load(row + _AREA).to(tl.uint32)

    if channels == 0:
        # Row-major: the mask's order. A thread has four elements that follow each other, so it
        # needs one load of a byte, and nothing of its neighbours'.
        four = tl.arange(0, CHUNK // 4)
        byte_of_four = tl.load(keep_bits + chunk * _BYTES_PER_CHUNK + four // 2)
        nibble = byte_of_four.to(tl.int32) >> four % 2 * 4
        bit = tl.reshape(nibble[:, None] >> tl.arange(0, 4)[None, :], (CHUNK,))
    else:
        # channels_last: (image, pixel, channel) in memory, (image, channel, pixel) for the mask.
        offset = (start + tl.arange(0, CHUNK)).to(tl.uint32)
        pixel = offset // channels
        image = pixel // area
        element = (image * channels + offset - pixel * channels) * area + pixel - image * area

        first_byte = tl.load(row + _FIRST_CHUNK) * _BYTES_PER_CHUNK
        byte = tl.load(keep_bits + first_byte + element // 8, mask=inside)
        bit = byte.to(tl.int32) >> (element % 8).to(tl.int32)

    return bit & 1 != 0


@triton.jit
def _select(old, new, kept, update_divisor, RESCALE: tl.constexpr):
    """The values to write: new where kept, else old.

    To write the old bits of dropped elements costs nothing: nearly every sector of memory has an
    element that is kept.
    """
    if RESCALE:
        new = old + tl.div_rn(new - old, update_divisor)
    if kept is not None:
        new = tl.where(kept, new, old)
    return new


# The memory


@triton.jit
def _as_float_pointer(address, start, VECTORIZED: tl.constexpr):
    """A pointer to the float32 element `start` of what lies at an address."""
    pointer = address.to(tl.pointer_type(tl.float32))
    if VECTORIZED:
        # `_can_vectorize` has checked it. The compiler then loads four elements at a time.
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def _can_vectorize(row, gradient_address, start, CHUNK: tl.constexpr):
    """Whether a chunk is full and all its tensors are aligned to 16 bytes.

    A gradient in a bucket may not be.
    """
    addresses = (
        gradient_address
        | tl.load(row + _PARAM)
        | tl.load(row + _FIRST_STATE)
        | tl.load(row + _SECOND_STATE)
    )
    return (start + CHUNK <= tl.load(row + _NUMEL)) & ((addresses & 15) == 0)


# SGD


@triton.jit
def _update_chunk_by_sgd(
    row,
    gradient_address,
    keep_bits,
    chunk,
    start,
    lr,
    momentum,
    dampening,
    weight_decay,
    update_divisor,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    MASKED: tl.constexpr,
    RESCALE: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTORIZED: tl.constexpr,
):
    """SGD's update of the CHUNK elements from `start` on of the tensor that `row` describes."""
    lane = tl.arange(0, CHUNK)
    inside = None if VECTORIZED else start + lane < tl.load(row + _NUMEL)

    # Load, all tensors float32 (CHUNK,)
    param_pointer = _as_float_pointer(tl.load(row + _PARAM), start, VECTORIZED) + lane
    old = tl.load(param_pointer, mask=inside)
    grad = tl.load(_as_float_pointer(gradient_address, start, VECTORIZED) + lane, mask=inside)
    buffer_pointer = _as_float_pointer(tl.load(row + _FIRST_STATE), start, VECTORIZED) + lane
    buffer = tl.load(buffer_pointer, mask=inside) if MOMENTUM and not FIRST_STEP else grad

    # Before the stores: no load is moved ahead of a store.
    kept = _load_mask(keep_bits, row, chunk, start, inside, CHUNK) if MASKED else None

    # Gradient
    if MAXIMIZE:
        grad = -grad
    if WEIGHT_DECAY:
        grad = tl.fma(old, weight_decay, grad)

    # Momentum
    update = grad
    if MOMENTUM:
        buffer = grad if FIRST_STEP else tl.fma(grad, 1.0 - dampening, buffer * momentum)
        tl.store(buffer_pointer, buffer, mask=inside)
        update = tl.fma(buffer, momentum, grad) if NESTEROV else buffer

    # Parameter
    new = tl.fma(update, -lr, old)
    tl.store(param_pointer, _select(old, new, kept, update_divisor, RESCALE), mask=inside)


@triton.jit
def sgd_kernel(
    table,  # int64 (n_tensors, 9)
    gradient_addresses,  # int64 (n_tensors,)
    tensor_of_chunk,  # int32 (n_chunks,)
    keep_bits,  # uint8 (n_chunks * CHUNK / 8,)
    lr,  # float32, or a pointer to it
    momentum,  # float32, as are the numbers below
    dampening,
    weight_decay,
    update_divisor,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    MASKED: tl.constexpr,
    RESCALE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Stochastic gradient descent: one chunk of one tensor a program."""
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(tensor_of_chunk + chunk).to(tl.int64)
    row = table + tensor * _N_COLUMNS
    gradient_address = tl.load(gradient_addresses + tensor)
    lr = _load_scalar(lr)
    start = (chunk - tl.load(row + _FIRST_CHUNK)) * CHUNK

    # The same call twice: VECTORIZED must be known when it is compiled.
    if _can_vectorize(row, gradient_address, start, CHUNK):
        _update_chunk_by_sgd(
            row=row,
            gradient_address=gradient_address,
            keep_bits=keep_bits,
            chunk=chunk,
            start=start,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            update_divisor=update_divisor,
            MOMENTUM=MOMENTUM,
            NESTEROV=NESTEROV,
            WEIGHT_DECAY=WEIGHT_DECAY,
            MAXIMIZE=MAXIMIZE,
            FIRST_STEP=FIRST_STEP,
            MASKED=MASKED,
            RESCALE=RESCALE,
            CHUNK=CHUNK,
            VECTORIZED=True,
        )
    else:
        _update_chunk_by_sgd(
            row=row,
            gradient_address=gradient_address,
            keep_bits=keep_bits,
            chunk=chunk,
            start=start,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            update_divisor=update_divisor,
            MOMENTUM=MOMENTUM,
            NESTEROV=NESTEROV,
            WEIGHT_DECAY=WEIGHT_DECAY,
            MAXIMIZE=MAXIMIZE,
            FIRST_STEP=FIRST_STEP,
            MASKED=MASKED,
            RESCALE=RESCALE,
            CHUNK=CHUNK,
            VECTORIZED=False,
        )


# Adam


@triton.jit
def _update_chunk_by_adam(
    row,
    gradient_address,
    keep_bits,
    chunk,
    start,
    lr,
    step,
    beta1,
    beta2,
    weight_decay,
    eps,
    update_divisor,
    WEIGHT_DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    MASKED: tl.constexpr,
    RESCALE: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTORIZED: tl.constexpr,
):
    """Adam's update of the CHUNK elements from `start` on of the tensor that `row` describes."""
    lane = tl.arange(0, CHUNK)
    inside = None if VECTORIZED else start + lane < tl.load(row + _NUMEL)

    # Load, all tensors float32 (CHUNK,)
    param_pointer = _as_float_pointer(tl.load(row + _PARAM), start, VECTORIZED) + lane
    exp_avg_pointer = _as_float_pointer(tl.load(row + _FIRST_STATE), start, VECTORIZED) + lane
    exp_avg_sq_pointer = _as_float_pointer(tl.load(row + _SECOND_STATE), start, VECTORIZED) + lane
    old = tl.load(param_pointer, mask=inside)
    grad = tl.load(_as_float_pointer(gradient_address, start, VECTORIZED) + lane, mask=inside)
    exp_avg = tl.load(exp_avg_pointer, mask=inside)
    exp_avg_sq = tl.load(exp_avg_sq_pointer, mask=inside)

    # Before the stores: no load is moved ahead of a store.
    kept = _load_mask(keep_bits, row, chunk, start, inside, CHUNK) if MASKED else None

    # Bias corrections, while the loads are under way
    step_size = tl.div_rn(lr, 1.0 - libdevice.pow(beta1, step))
    bias_correction2_sqrt = tl.sqrt_rn(1.0 - libdevice.pow(beta2, step))

    # Gradient and weight decay
    new = old
    if MAXIMIZE:
        grad = -grad
    if WEIGHT_DECAY and DECOUPLED:
        new = tl.fma(old, -(lr * weight_decay), old)
    elif WEIGHT_DECAY:
        grad = tl.fma(old, weight_decay, grad)

    # Moments
    square = grad * grad
    exp_avg = tl.fma(exp_avg, beta1, tl.fma(grad, -beta1, grad))
    exp_avg_sq = tl.fma(exp_avg_sq, beta2, tl.fma(square, -beta2, square))
    tl.store(exp_avg_pointer, exp_avg, mask=inside)
    tl.store(exp_avg_sq_pointer, exp_avg_sq, mask=inside)

    # Parameter
    numerator = exp_avg * step_size
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), bias_correction2_sqrt) + eps
    new -= tl.div_rn(numerator, denominator)
    tl.store(param_pointer, _select(old, new, kept, update_divisor, RESCALE), mask=inside)


@triton.jit(do_not_specialize=["step"])
def adam_kernel(
    table,  # int64 (n_tensors, 9)
    gradient_addresses,  # int64 (n_tensors,)
    tensor_of_chunk,  # int32 (n_chunks,)
    keep_bits,  # uint8 (n_chunks * CHUNK / 8,)
    step,  # how many updates this one makes, from 1; or a pointer to it
    lr,  # float32, or a pointer to it
    beta1,  # float32, as are the numbers below
    beta2,
    weight_decay,
    eps,
    update_divisor,
    WEIGHT_DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    MASKED: tl.constexpr,
    RESCALE: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP_IN_TABLE: tl.constexpr,
):
    """Adam, or AdamW where DECOUPLED: one chunk of one tensor a program.

    With STEP_IN_TABLE each tensor counts its own updates, at the address in the table, and `step`
    is not read.
    """
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(tensor_of_chunk + chunk).to(tl.int64)
    row = table + tensor * _N_COLUMNS
    gradient_address = tl.load(gradient_addresses + tensor)
    lr = _load_scalar(lr)
    start = (chunk - tl.load(row + _FIRST_CHUNK)) * CHUNK

    # A conditional expression would compile both.
    if STEP_IN_TABLE:
        float_step = tl.load(tl.load(row + _STEP).to(tl.pointer_type(tl.float32)))
    else:
        float_step = _load_scalar(step).to(tl.float32)

    # The same call twice: VECTORIZED must be known when it is compiled.
    if _can_vectorize(row, gradient_address, start, CHUNK):
        _update_chunk_by_adam(
            row=row,
            gradient_address=gradient_address,
            keep_bits=keep_bits,
            chunk=chunk,
            start=start,
            lr=lr,
            step=float_step,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            update_divisor=update_divisor,
            WEIGHT_DECAY=WEIGHT_DECAY,
            DECOUPLED=DECOUPLED,
            MAXIMIZE=MAXIMIZE,
            MASKED=MASKED,
            RESCALE=RESCALE,
            CHUNK=CHUNK,
            VECTORIZED=True,
        )
    else:
        _update_chunk_by_adam(
            row=row,
            gradient_address=gradient_address,
            keep_bits=keep_bits,
            chunk=chunk,
            start=start,
            lr=lr,
            step=float_step,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            update_divisor=update_divisor,
            WEIGHT_DECAY=WEIGHT_DECAY,
            DECOUPLED=DECOUPLED,
            MAXIMIZE=MAXIMIZE,
            MASKED=MASKED,
            RESCALE=RESCALE,
            CHUNK=CHUNK,
            VECTORIZED=False,
        )
