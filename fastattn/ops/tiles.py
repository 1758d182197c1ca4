"""What the Triton kernels of all rooms share."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops import philox


@triton.jit
def kept(seed, head, row, first, threshold, KEYS: tl.constexpr):
    """Bool [R, KEYS], which positions dropout keeps: those of `fastattn.ops.philox`.

    seed: scalar; head: scalar or [R]; row: [R]; first: of the KEYS keys, a multiple of 16 where
    these are 16, else of 64.
    """
    if KEYS == 16:
        own = first // 16 % 4
        first -= 16 * own
    block = tl.arange(0, max(KEYS // 64, 1))[None, :, None]
    lane = tl.arange(0, 16)[None, None, :]
    counter = (first // 4 + block * 16 + lane).to(tl.uint32)
    row = row.to(tl.uint32)[:, None, None] + tl.zeros_like(counter)
    counter += tl.zeros_like(row)
    head = tl.zeros_like(row) + head
    # One call draws the words of four keys, which lie 16 apart.
    a, b, c, d = tl.philox(seed, counter, row, head, tl.zeros_like(row))
    if KEYS == 16:
        words = tl.where(own < 2, tl.where(own == 0, a, b), tl.where(own == 2, c, d))
    else:
        words = tl.join(tl.join(a, c), tl.join(b, d))  # [R, KEYS / 64, 16, 2, 2]
        words = words.permute(0, 1, 3, 4, 2)
    return words.reshape(row.shape[0], KEYS) >= threshold


def threshold_and_factor(dropout_p: float) -> tuple[int, float]:
    """What `kept` compares with, and by how much that which is kept is scaled."""
    return philox.threshold(dropout_p), 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


@triton.jit
def load(tensor, strides, row, rows, COLS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows [R, WIDTH] of a matrix [rows, COLS] with strides (..., row, column), 0 outside."""
    col = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None]
    if COLS != WIDTH:
        inside = inside & (col < COLS)[None, :]
    at = row.to(tl.int64)[:, None] * strides[2] + col[None, :] * strides[3]
    return tl.load(tensor + at, inside, 0)


@triton.jit
def store(tensor, x, strides, row, rows, COLS: tl.constexpr):
    """The same places, written to in the tensor's dtype."""
    col = tl.arange(0, x.shape[1])
    inside = (row < rows)[:, None] & (col < COLS)[None, :]
    at = row.to(tl.int64)[:, None] * strides[2] + col[None, :] * strides[3]
    tl.store(tensor + at, x.to(tensor.dtype.element_ty), inside)


@triton.jit
def finite(x):
    """x with 0 for what is infinite or NaN."""
    return tl.where(tl.abs(x) < float("inf"), x, 0)


@triton.jit
def turned(x, other, FIRST, cosine, sine):
    """x, the FIRST or second elements of pairs with `other`, where these are turned by an angle."""
    across = other.to(tl.float32) * sine.to(tl.float32)
    return x.to(tl.float32) * cosine.to(tl.float32) + tl.where(FIRST, -across, across)


@triton.jit
def stop_if(bad):
    """Stops the kernel, as an illegal access would, where `bad` is true."""
    tl.inline_asm_elementwise(
        "{ .reg .pred bad; setp.ne.s32 bad, $1, 0; @bad trap; mov.b32 $0, $1; }",
        "=r,r", [bad.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def tanh(x):
    """To an absolute error of a few roundings of 1."""
    return 2 / (1 + tl.exp2(x * -2.885390081777927)) - 1


@triton.jit
def product(
    total, left, right, left_strides, right_strides, row, col, rows, cols, depth,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """total + left [rows, depth] right [depth, cols], of the rows and columns given."""
    if left.dtype.element_ty == tl.float32:
        # The rounding errors of one long chain of sums would grow with the depth.
        for start in range(0, depth, 2 * DEPTH):
            part = tl.zeros(total.shape, tl.float32)
            total += _span(
                part, left, right, left_strides, right_strides, row, col, rows, cols, start,
                tl.minimum(depth, start + 2 * DEPTH), DEPTH,
            )  # fmt: skip
    else:
        total = _span(
            total, left, right, left_strides, right_strides, row, col, rows, cols, 0, depth, DEPTH
        )
    return total


@triton.jit
def _span(
    total, left, right, left_strides, right_strides, row, col, rows, cols, start, end,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """The same, of depths [start, end)."""
    across = row.to(tl.int64)[:, None] * left_strides[0]
    down = col.to(tl.int64)[None, :] * right_strides[1]
    for first in range(start, end, DEPTH):
        at = (first + tl.arange(0, DEPTH)).to(tl.int64)
        inside = at < end
        a = tl.load(
            left + across + at[None, :] * left_strides[1],
            (row < rows)[:, None] & inside[None, :],
            0,
        )
        b = tl.load(
            right + down + at[:, None] * right_strides[0],
            inside[:, None] & (col < cols)[None, :],
            0,
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    return total
