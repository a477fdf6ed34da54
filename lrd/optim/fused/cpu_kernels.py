"""Numba kernels of a masked optimizer step for a list of tensors, called by `cpu_step`.

A record of a table describes a run of elements that is contiguous both in memory and in the
parameter that it belongs to: usually a whole parameter, or a piece of a shard. Two more kernels
serve the steps that the optimizer takes by itself: one restores dropped elements, one draws masks.

The mask is drawn in registers for 256 elements at a time and applied to the update before it is
stored, so it takes no memory: neither traffic nor space. Its bits are those of `lrd.optim.mask`,
one Philox block for each bit plane.

Each element is rounded as torch's for-loop and foreach implementations round it on a CPU: one ATen
call there is one line here, and `add(alpha=)` is a fused multiply-add. `selftest` compares the bits
before the kernels are used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, float32, from_dtype, int64, njit, types, uint8, uint16, uint32, uint64
from numba.extending import intrinsic

from lrd import philox

# What a kernel is called with. All but the two counts are addresses.
JOB_FIELDS = np.dtype(
    [
        ("records", "i8"),  # of SGD_FIELDS or another of the record types below
        ("n_records", "i8"),
        ("chunks", "i8"),  # int64 (n_chunks, 3): record's number, first element, count
        ("n_chunks", "i8"),
        ("next_chunk", "i8"),  # int64 (): the first chunk that no thread has claimed
        ("square_root", "i8"),  # MKL's function, 0: the processor's instruction
        ("set_num_threads", "i8"),  # MKL's function, 0 where square_root is 0
    ]
)

# Addresses come first, see `cpu_step.Kernel`.
_MASK_FIELDS = [
    ("numel", "i8"),
    ("offset", "i8"),  # the first element's index in the whole parameter
    ("index", "u8"),  # the parameter's, in the position of its masks
    ("mask_step", "u8"),
    ("seed", "u8"),
    ("threshold", "i8"),  # 1 to 65536, see `lrd.optim.mask`
]
_STEP_FIELDS = [
    *_MASK_FIELDS,
    ("update_divisor", "f4"),  # divides a kept element's update; 0: no division
    ("is_maximized", "?"),
    ("weight_decay", "f4"),
]
SGD_FIELDS = np.dtype(
    [
        ("param", "i8"),
        ("grad", "i8"),
        ("momentum_buffer", "i8"),  # any address that may be read where momentum is 0
        *_STEP_FIELDS,
        ("is_first_step", "?"),  # the buffer becomes the gradient, whatever it holds
        ("minus_lr", "f4"),
        ("momentum", "f4"),
        ("one_minus_dampening", "f4"),
        ("is_nesterov", "?"),
    ]
)
ADAM_FIELDS = np.dtype(
    [
        ("param", "i8"),
        ("grad", "i8"),
        ("exp_avg", "i8"),
        ("exp_avg_sq", "i8"),
        *_STEP_FIELDS,
        ("is_decoupled", "?"),  # AdamW's weight decay
        ("decay_factor", "f4"),  # 1 - lr * weight_decay
        ("one_minus_beta1", "f4"),
        ("beta2", "f4"),
        ("one_minus_beta2", "f4"),
        ("bias_correction2_sqrt", "f4"),  # sqrt(1 - beta2**step)
        ("eps", "f4"),
        ("minus_step_size", "f4"),  # -lr / (1 - beta1**step)
    ]
)
RESTORE_FIELDS = np.dtype(
    [
        ("new", "i8"),  # the values after a step; dropped ones are overwritten
        ("old", "i8"),  # the values before it
        *_MASK_FIELDS,
        ("element_size", "i8"),  # bytes: 1, 2, 4 or 8
    ]
)
DRAW_FIELDS = np.dtype(
    [
        ("keep_words", "i8"),  # uint32 (numel / 32), numel being a multiple of 256
        *_MASK_FIELDS,
    ]
)

# What a rank sends of its own update in an exchange of kept elements, see `lrd.exchange.packing`.
_EXCHANGE_FIELDS = [
    *_MASK_FIELDS,
    ("is_maximized", "?"),
    ("weight_decay", "f4"),
    ("is_first_step", "?"),
    ("momentum", "f4"),
    ("one_minus_dampening", "f4"),
    ("is_nesterov", "?"),
]
EXCHANGE_FIELDS = np.dtype(
    [
        ("param", "i8"),
        ("grad", "i8"),  # this rank's own
        ("momentum_buffer", "i8"),  # of its own gradients; any readable address without momentum
        ("keep_words", "i8"),  # uint64, one bit for each element, drawn before
        ("chunk_starts", "i8"),  # int64: where each of the record's chunks begins in `packed`
        ("packed", "i8"),  # float32: the kept elements of all records
        *_EXCHANGE_FIELDS,
    ]
)
_JOB = from_dtype(JOB_FIELDS)
_SGD = from_dtype(SGD_FIELDS)
_ADAM = from_dtype(ADAM_FIELDS)
_RESTORE = from_dtype(RESTORE_FIELDS)
_DRAW = from_dtype(DRAW_FIELDS)
_EXCHANGE = from_dtype(EXCHANGE_FIELDS)

BLOCK = philox.BLOCK_BITS  # elements that one Philox block decides

# Elements that a thread claims at a time. A chunk that begins where a Philox block does draws no
# block that another chunk draws too.
CHUNK = 1 << 16
assert CHUNK % BLOCK == 0

# Elements whose square roots are taken in one call. With more, the memory is idle for longer.
_PIECE = 1 << 9

# Philox4x64-10, see `lrd.philox`
_MULTIPLIER_0 = uint64(philox.MULTIPLIER_0)
_MULTIPLIER_1 = uint64(philox.MULTIPLIER_1)
_WEYL_0 = uint64(philox.WEYL_0)
_WEYL_1 = uint64(philox.WEYL_1)
_DOMAIN = uint64(philox.Domain.MASK)

_ALL_ONES = uint64(0xFFFFFFFFFFFFFFFF)

# The mode in which ATen calls MKL, in the names of mkl_vml_defines.h
_VML_HA = 0x2  # high accuracy
_VML_FTZDAZ_OFF = 0x140000  # denormals as they are
_VML_ERRMODE_IGNORE = 0x100  # no error handler
_MKL_MODE = _VML_HA | _VML_FTZDAZ_OFF | _VML_ERRMODE_IGNORE


# What Numba has no word for: pointers, atomics, and instructions of the processor. An intrinsic
# returns its signature and a function that writes the LLVM instructions.


@intrinsic
def _as_pointer(_typing_context: Any, _address: Any, dtype: Any) -> Any:
    """An int64 address as a pointer to `dtype`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer_type = context.get_value_type(signature.return_type)
        return builder.inttoptr(arguments[0], pointer_type)

    return types.CPointer(dtype.instance_type)(types.int64, dtype), generate


@intrinsic
def _fma(_typing_context: Any, _x: Any, _y: Any, _z: Any) -> Any:
    """x * y + z of float32, rounded once."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def _multiply_high(_typing_context: Any, _x: Any, _y: Any) -> Any:
    """The upper 64 of the 128 bits of a product of uint64."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        x = builder.zext(arguments[0], wide)
        y = builder.zext(arguments[1], wide)

        high = builder.lshr(builder.mul(x, y), ir.Constant(wide, 64))
        return builder.trunc(high, ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


@intrinsic
def _fetch_and_add_one(_typing_context: Any, _address: Any) -> Any:
    """Add one to the int64 at an address, atomically, and return its value before."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        pointer = builder.inttoptr(arguments[0], word.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(word, 1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def _call_mkl_square_root(_typing_context: Any, _function: Any, _count: Any, _values: Any) -> Any:
    """Replace float32 values by their square roots; MKL's function and the values are addresses.

    In C: void function(int64 count, const float *input, float *output, int64 mode).
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        function, count, values = arguments
        word = ir.IntType(64)
        function_type = ir.FunctionType(ir.VoidType(), [word, word, word, word])

        pointer = builder.inttoptr(function, function_type.as_pointer())
        builder.call(pointer, [count, values, values, ir.Constant(word, _MKL_MODE)])
        return ir.Constant(word, 0)

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic
def _call_mkl_set_num_threads(_typing_context: Any, _function: Any, _count: Any) -> Any:
    """Set how many threads MKL may take when this thread calls it; return the number before.

    In C: int function(int).
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        number = ir.IntType(32)
        function_type = ir.FunctionType(number, [number])

        pointer = builder.inttoptr(arguments[0], function_type.as_pointer())
        return builder.call(pointer, [arguments[1]])

    return types.int32(types.int64, types.int32), generate


# The mask


@njit(inline="always", error_model="numpy")
def _philox(c0, c1, c2, c3, k0):
    """One block of Philox4x64-10: four uint64 from the counter's four words and the seed `k0`."""
    k1 = _DOMAIN

    for _ in range(10):
        high_0 = _multiply_high(_MULTIPLIER_0, c0)
        low_0 = _MULTIPLIER_0 * c0
        high_1 = _multiply_high(_MULTIPLIER_1, c2)
        low_1 = _MULTIPLIER_1 * c2

        c0 = high_1 ^ c1 ^ k0
        c1 = low_1
        c2 = high_0 ^ c3 ^ k1
        c3 = low_0

        k0 += _WEYL_0
        k1 += _WEYL_1

    return c0, c1, c2, c3


@njit(inline="always", error_model="numpy")
def _draw_block(block, index, mask_step, seed, threshold, keep_words):
    """Draw the keep bits of one block's 256 elements into `keep_words`, uint32 (8,).

    From the most significant plane down, and no further than any element is undecided: 9.3 planes
    of 16 on average. `lrd.optim.mask` draws the same bits from the least significant plane up,
    because whole arrays are never decided early.

    An element is kept where its number u is smaller than the threshold.
    """
    # Bit i of word w stands for element 64 * w + i of the block.
    kept_0 = kept_1 = kept_2 = kept_3 = uint64(0)

    # Undecided: all of u's bits so far equal the threshold's.
    undecided_0 = undecided_1 = undecided_2 = undecided_3 = _ALL_ONES

    # A threshold of 65536 has no bit in the 16 planes: it keeps everything.
    if threshold > 0xFFFF:
        kept_0 = kept_1 = kept_2 = kept_3 = _ALL_ONES

    # The threshold's bits that are left, the next one always at 0x8000.
    remaining = threshold & 0xFFFF
    plane = uint64(0)

    while remaining != 0 and (undecided_0 | undecided_1 | undecided_2 | undecided_3) != 0:
        w0, w1, w2, w3 = _philox(block, plane, index, mask_step, seed)

        if remaining & 0x8000:
            # The threshold's bit is one: u is smaller where its bit is zero, else undecided.
            kept_0 |= undecided_0 & ~w0
            kept_1 |= undecided_1 & ~w1
            kept_2 |= undecided_2 & ~w2
            kept_3 |= undecided_3 & ~w3
        else:
            # The threshold's bit is zero: u is larger where its bit is one, else undecided.
            w0 = ~w0
            w1 = ~w1
            w2 = ~w2
            w3 = ~w3

        undecided_0 &= w0
        undecided_1 &= w1
        undecided_2 &= w2
        undecided_3 &= w3

        remaining = (remaining << 1) & 0xFFFF
        plane += uint64(1)

    keep_words[0] = uint32(kept_0)
    keep_words[1] = uint32(kept_0 >> uint64(32))
    keep_words[2] = uint32(kept_1)
    keep_words[3] = uint32(kept_1 >> uint64(32))
    keep_words[4] = uint32(kept_2)
    keep_words[5] = uint32(kept_2 >> uint64(32))
    keep_words[6] = uint32(kept_3)
    keep_words[7] = uint32(kept_3 >> uint64(32))


@njit(inline="always")
def _next_keep_word(keep_words, element, is_first, index, mask_step, seed, threshold):
    """The keep bits from `element` on: the lowest bit is its, and 32 - element % 32 bits are valid.

    A block is drawn when its first element is asked for, or any element if `is_first`.
    """
    element = uint64(element)
    if is_first or element % uint64(BLOCK) == 0:
        _draw_block(element // uint64(BLOCK), index, mask_step, seed, threshold, keep_words)
    return keep_words[(element // uint64(32)) % uint64(8)] >> uint32(element % uint64(32))


@njit(inline="always")
def _count_until_next_word(element, n_left):
    """How many of the next `n_left` elements have their keep bits in the word of `element`."""
    return min(32 - element % 32, n_left)


@njit(inline="always", error_model="numpy")
def _select(keep_word, lane, new, old, update_divisor):
    """The new value where the lane's bit keeps the element, else the old one."""
    if update_divisor != 0:
        new = (new - old) / update_divisor + old
    return new if (keep_word >> uint32(lane)) & uint32(1) else old


# SGD's arithmetic


@njit(inline="always", error_model="numpy")
def _decayed_gradient(grad, param, is_maximized, weight_decay):
    """The gradient that the momentum gets."""
    if is_maximized:
        grad = -grad
    if weight_decay != 0:
        grad = _fma(weight_decay, param, grad)
    return grad


@njit(inline="always", error_model="numpy")
def _next_momentum(grad, buffer, is_first_step, momentum, one_minus_dampening):
    """The momentum buffer after a step with the gradient of `_decayed_gradient`."""
    if is_first_step:
        return grad
    return _fma(one_minus_dampening, grad, buffer * momentum)


# The job


@njit
def _claim_chunks(next_chunk, n_chunks):
    """The numbers of chunks that no other thread works on."""
    chunk = _fetch_and_add_one(next_chunk)
    while chunk < n_chunks:
        yield chunk
        chunk = _fetch_and_add_one(next_chunk)


@njit(inline="always")
def _unpack_job(job_address, record_type):
    """The table of records, the chunks, the address of the next chunk, and MKL's two functions."""
    job = carray(_as_pointer(job_address, _JOB), 1)[0]
    records = carray(_as_pointer(job.records, record_type), job.n_records)
    chunks = carray(_as_pointer(job.chunks, int64), (job.n_chunks, 3))
    return records, chunks, job.next_chunk, (job.square_root, job.set_num_threads)


@njit(inline="always")
def _floats(address, start, count):
    """float32 (count,) from element `start` on of what lies at an address."""
    return carray(_as_pointer(address + 4 * start, float32), count)


def sgd_kernel(job_address):
    """Stochastic gradient descent: a C function of a job's address, for each thread to call."""
    records, chunks, next_chunk, _ = _unpack_job(job_address, _SGD)
    keep_words = np.empty(8, np.uint32)  # of 256 elements

    for c in _claim_chunks(next_chunk, len(chunks)):
        row = records[chunks[c, 0]]
        start = chunks[c, 1]
        count = chunks[c, 2]

        params = _floats(row.param, start, count)
        grads = _floats(row.grad, start, count)
        buffers = _floats(row.momentum_buffer, start, count)

        # Into registers. The compiler cannot rule out that the loop writes over the table, and
        # would load these values again for each element.
        offset = row.offset
        is_maximized = row.is_maximized
        is_first_step = row.is_first_step
        is_nesterov = row.is_nesterov
        minus_lr = row.minus_lr
        momentum = row.momentum
        one_minus_dampening = row.one_minus_dampening
        weight_decay = row.weight_decay
        index = row.index
        mask_step = row.mask_step
        seed = row.seed
        threshold = row.threshold
        update_divisor = row.update_divisor

        done = 0
        while done < count:
            element = offset + start + done  # in the whole parameter
            keep_word = _next_keep_word(
                keep_words, element, done == 0, index, mask_step, seed, threshold
            )
            n_lanes = _count_until_next_word(element, count - done)

            for lane in range(n_lanes):
                i = np.uintp(done + lane)
                old = params[i]
                grad = _decayed_gradient(grads[i], old, is_maximized, weight_decay)

                update = grad
                if momentum != 0:
                    buffer = _next_momentum(
                        grad, buffers[i], is_first_step, momentum, one_minus_dampening
                    )
                    buffers[i] = buffer
                    update = _fma(momentum, buffer, grad) if is_nesterov else buffer

                new = _fma(minus_lr, update, old)
                params[i] = _select(keep_word, lane, new, old, update_divisor)

            done += n_lanes


def adam_kernel(job_address):
    """Adam, or AdamW where `is_decoupled`: a C function as `sgd_kernel` is."""
    records, chunks, next_chunk, mkl_functions = _unpack_job(job_address, _ADAM)
    square_root, set_num_threads = mkl_functions
    keep_words = np.empty(8, np.uint32)  # of 256 elements
    roots = np.empty(_PIECE, np.float32)

    # Left to itself MKL starts threads for 256 elements, in each of these threads.
    threads_before = _call_mkl_set_num_threads(set_num_threads, 1) if square_root != 0 else 0

    for c in _claim_chunks(next_chunk, len(chunks)):
        row = records[chunks[c, 0]]
        chunk_start = chunks[c, 1]
        chunk_stop = chunks[c, 1] + chunks[c, 2]

        # Into registers, as in `sgd_kernel`.
        offset = row.offset
        is_maximized = row.is_maximized
        is_decoupled = row.is_decoupled
        weight_decay = row.weight_decay
        decay_factor = row.decay_factor
        beta2 = row.beta2
        one_minus_beta1 = row.one_minus_beta1
        one_minus_beta2 = row.one_minus_beta2
        bias_correction2_sqrt = row.bias_correction2_sqrt
        eps = row.eps
        minus_step_size = row.minus_step_size
        index = row.index
        mask_step = row.mask_step
        seed = row.seed
        threshold = row.threshold
        update_divisor = row.update_divisor

        for start in range(chunk_start, chunk_stop, _PIECE):
            count = min(_PIECE, chunk_stop - start)
            params = _floats(row.param, start, count)
            grads = _floats(row.grad, start, count)
            exp_avgs = _floats(row.exp_avg, start, count)
            exp_avg_sqs = _floats(row.exp_avg_sq, start, count)

            # The moments
            for k in range(count):
                i = np.uintp(k)
                grad = -grads[i] if is_maximized else grads[i]
                if weight_decay != 0 and not is_decoupled:
                    grad = _fma(weight_decay, params[i], grad)

                exp_avgs[i] = _fma(one_minus_beta1, grad - exp_avgs[i], exp_avgs[i])
                exp_avg_sq = _fma(one_minus_beta2 * grad, grad, exp_avg_sqs[i] * beta2)
                exp_avg_sqs[i] = exp_avg_sq
                roots[i] = exp_avg_sq

            # Their square roots, rounded as torch rounds them on this machine
            if square_root != 0:
                _call_mkl_square_root(square_root, count, roots.ctypes.data)
            else:
                for k in range(count):
                    roots[k] = np.sqrt(roots[k])

            # The update, under the mask
            done = 0
            while done < count:
                element = offset + start + done  # in the whole parameter
                is_first = start + done == chunk_start
                keep_word = _next_keep_word(
                    keep_words, element, is_first, index, mask_step, seed, threshold
                )
                n_lanes = _count_until_next_word(element, count - done)

                for lane in range(n_lanes):
                    i = np.uintp(done + lane)
                    old = params[i]
                    new = old * decay_factor if weight_decay != 0 and is_decoupled else old

                    denominator = roots[i] / bias_correction2_sqrt + eps
                    new = new + minus_step_size * exp_avgs[i] / denominator
                    params[i] = _select(keep_word, lane, new, old, update_divisor)

                done += n_lanes

    if square_root != 0:
        _call_mkl_set_num_threads(set_num_threads, threads_before)


def restore_kernel(job_address):
    """Give dropped elements their old bits: a C function as `sgd_kernel` is."""
    records, chunks, next_chunk, _ = _unpack_job(job_address, _RESTORE)
    keep_words = np.empty(8, np.uint32)  # of 256 elements

    for c in _claim_chunks(next_chunk, len(chunks)):
        row = records[chunks[c, 0]]
        start = chunks[c, 1]
        count = chunks[c, 2]

        if row.element_size == 4:
            _restore_chunk(row, start, count, uint32, keep_words)
        elif row.element_size == 2:
            _restore_chunk(row, start, count, uint16, keep_words)
        elif row.element_size == 8:
            _restore_chunk(row, start, count, uint64, keep_words)
        else:
            _restore_chunk(row, start, count, uint8, keep_words)


@njit(inline="always")
def _restore_chunk(row, start, count, bits_type, keep_words):
    """Restore dropped elements of one chunk, whose elements have the size of `bits_type`."""
    first_byte = start * row.element_size
    new = carray(_as_pointer(row.new + first_byte, bits_type), count)
    old = carray(_as_pointer(row.old + first_byte, bits_type), count)

    # Into registers, as in `sgd_kernel`.
    offset = row.offset
    index = row.index
    mask_step = row.mask_step
    seed = row.seed
    threshold = row.threshold

    done = 0
    while done < count:
        element = offset + start + done  # in the whole parameter
        keep_word = _next_keep_word(
            keep_words, element, done == 0, index, mask_step, seed, threshold
        )
        n_lanes = _count_until_next_word(element, count - done)

        for lane in range(n_lanes):
            i = np.uintp(done + lane)
            new_bits = new[i]
            old_bits = old[i]

            # Without a branch, which would be mispredicted half the time
            is_kept = (keep_word >> uint32(lane)) & uint32(1)
            keep_bits = bits_type(0) - bits_type(is_kept)
            new[i] = old_bits ^ ((new_bits ^ old_bits) & keep_bits)

        done += n_lanes


def draw_kernel(job_address):
    """Draw the keep bits of whole blocks: a C function as `sgd_kernel` is.

    `offset` and `numel` are multiples of 256.
    """
    records, chunks, next_chunk, _ = _unpack_job(job_address, _DRAW)

    for c in _claim_chunks(next_chunk, len(chunks)):
        row = records[chunks[c, 0]]
        start = chunks[c, 1]
        count = chunks[c, 2]
        keep_words = carray(_as_pointer(row.keep_words + start // 8, uint32), count // 32)

        for block in range(count // BLOCK):
            _draw_block(
                uint64((row.offset + start) // BLOCK + block),
                row.index,
                row.mask_step,
                row.seed,
                row.threshold,
                keep_words[block * 8 : block * 8 + 8],
            )


@njit(inline="always")
def _tensors_of_chunk(row, start, count):
    """Parameters, gradients and momentum buffers, float32 (count,) each."""
    params = _floats(row.param, start, count)
    grads = _floats(row.grad, start, count)
    buffers = _floats(row.momentum_buffer, start, count)
    return params, grads, buffers


@njit(inline="always")
def _packed_part_of_chunk(row, start, count):
    """The words of keep bits, the packed elements of all chunks, and the number of its first."""
    words = carray(_as_pointer(row.keep_words + start // 8, uint64), (count + 63) // 64)
    starts = carray(_as_pointer(row.chunk_starts, int64), start // CHUNK + 1)
    return words, _as_pointer(row.packed, float32), starts[start // CHUNK]


def pack_kernel(job_address):
    """Write the kept elements of this rank's update one after another: a C function.

    Nothing else is written: the step may still be skipped. Chunks have `CHUNK` elements, see
    `cpu_step`.
    """
    records, chunks, next_chunk, _ = _unpack_job(job_address, _EXCHANGE)
    updates = np.empty(64, np.float32)  # of a word's elements
    kept = np.empty(64, np.float32)  # those that are kept

    for c in _claim_chunks(next_chunk, len(chunks)):
        row = records[chunks[c, 0]]
        start = chunks[c, 1]
        count = chunks[c, 2]

        params, grads, buffers = _tensors_of_chunk(row, start, count)
        words, packed, first = _packed_part_of_chunk(row, start, count)

        # Into registers, as in `sgd_kernel`.
        is_maximized = row.is_maximized
        is_first_step = row.is_first_step
        is_nesterov = row.is_nesterov
        momentum = row.momentum
        one_minus_dampening = row.one_minus_dampening
        weight_decay = row.weight_decay

        for w in range(len(words)):
            word = words[w]
            n_lanes = min(64, count - 64 * w)

            for lane in range(n_lanes):
                i = np.uintp(64 * w + lane)
                grad = _decayed_gradient(grads[i], params[i], is_maximized, weight_decay)

                update = grad
                if momentum != 0:
                    buffer = _next_momentum(
                        grad, buffers[i], is_first_step, momentum, one_minus_dampening
                    )
                    update = _fma(momentum, buffer, grad) if is_nesterov else buffer
                updates[lane] = update

            # Without a branch, which would be mispredicted half the time. Not in `packed`: beyond
            # the last element another thread writes.
            n_kept = np.uintp(0)
            for lane in range(n_lanes):
                kept[n_kept] = updates[lane]
                n_kept += np.uintp((word >> uint64(lane)) & uint64(1))

            for k in range(n_kept):
                packed[first + k] = kept[k]
            first += n_kept


def unpack_kernel(job_address):
    """Update this rank's momentum, and replace its gradient by the mean update: a C function.

    `packed` has the means of the kept elements; dropped ones become zero. One float more than are
    kept is read there.
    """
    records, chunks, next_chunk, _ = _unpack_job(job_address, _EXCHANGE)

    for c in _claim_chunks(next_chunk, len(chunks)):
        row = records[chunks[c, 0]]
        start = chunks[c, 1]
        count = chunks[c, 2]

        params, grads, buffers = _tensors_of_chunk(row, start, count)
        words, packed, first = _packed_part_of_chunk(row, start, count)

        # Into registers, as in `sgd_kernel`.
        is_maximized = row.is_maximized
        is_first_step = row.is_first_step
        momentum = row.momentum
        one_minus_dampening = row.one_minus_dampening
        weight_decay = row.weight_decay

        if momentum != 0:
            for k in range(count):
                i = np.uintp(k)
                grad = _decayed_gradient(grads[i], params[i], is_maximized, weight_decay)
                buffers[i] = _next_momentum(
                    grad, buffers[i], is_first_step, momentum, one_minus_dampening
                )

        for w in range(len(words)):
            word = words[w]
            n_lanes = min(64, count - 64 * w)
            for lane in range(n_lanes):
                is_kept = (word >> uint64(lane)) & uint64(1)
                mean = packed[first]
                grads[np.uintp(64 * w + lane)] = mean if is_kept else float32(0)
                first += is_kept
