"""Linear layers with an activation and feed-forward blocks in Triton, forward and backward."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import launch, tiles, tuning

LOG2E = tl.constexpr(1.4426950408889634)
# tanh-GELU is x * sigmoid(x * (LINEAR + CUBIC * x^2)).
LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)
NORMAL = tl.constexpr(1 / math.sqrt(2 * math.pi))
ROOT_HALF = tl.constexpr(math.sqrt(0.5))


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(-LOG2E * x))


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation of fp32 x, and its slope there."""
    if ACTIVATION == "relu":
        found = tl.where(x < 0, 0, x)  # NaN stays
        slope = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        half, part = 0.5 * x, tl.erf(x * ROOT_HALF)
        found = half + half * part  # which rounds less than x * (0.5 + 0.5 * part)
        slope = 0.5 + 0.5 * part + x * NORMAL * tl.exp2(-0.5 * LOG2E * x * x)
    elif ACTIVATION == "gelu_tanh":
        inner = x * (LINEAR + CUBIC * x * x)
        share = _sigmoid(inner)
        found = x * share
        rest = _sigmoid(-inner)  # 1 - share would cancel
        slope = share + x * share * rest * (LINEAR + 3 * CUBIC * x * x)
    elif ACTIVATION == "silu":
        share = _sigmoid(x)
        found = x * share
        slope = share + x * share * _sigmoid(-x)
    else:
        tl.static_assert(ACTIVATION == "identity")
        found = x
        slope = tl.full(x.shape, 1, tl.float32)
    return found, slope


@triton.jit
def _places(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):
    """The tile of this program: GROUP tiles one below the other, then the next to the right, so
    that what a few programs read at a time stays in the cache."""
    down = tl.cdiv(rows, ROWS)
    across = tl.cdiv(cols, COLS)
    group = tl.program_id(0) // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    row = (group * GROUP + within % height) * ROWS + tl.arange(0, ROWS)
    return row, within // height * COLS + tl.arange(0, COLS)


@triton.jit
def _add_bias(total, bias, col, cols):
    if bias is not None:
        total += tl.load(bias + col, col < cols, 0).to(tl.float32)[None, :]
    return total


@triton.jit
def _store(out, x, row, col, rows, cols):
    if out is not None:
        at = row.to(tl.int64)[:, None] * cols + col[None, :]
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        tl.store(out + at, x.to(out.dtype.element_ty), inside)


@triton.jit
def ffn_forward(
    input, weight, bias, gate_weight, gate_bias, out, pre, gate, input_strides, weight_strides,
    rows, cols, depth, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = activation(pre), or activation(gate) * pre; pre = input weight^T + bias, gate likewise.

    weight_strides are those of weight^T, and of gate_weight^T.
    """
    row, col = _places(rows, cols, ROWS, COLS, GROUP)
    total = tl.zeros([ROWS, COLS], tl.float32)
    total = tiles.product(
        total, input, weight, input_strides, weight_strides, row, col, rows, cols, depth, DEPTH
    )
    total = _add_bias(total, bias, col, cols)
    _store(pre, total, row, col, rows, cols)
    if gate_weight is None:
        total, _ = _activate(total, ACTIVATION)
    else:
        other = tl.zeros([ROWS, COLS], tl.float32)
        other = tiles.product(
            other, input, gate_weight, input_strides, weight_strides, row, col, rows, cols, depth,
            DEPTH,
        )  # fmt: skip
        other = _add_bias(other, gate_bias, col, cols)
        _store(gate, other, row, col, rows, cols)
        opened, _ = _activate(other, ACTIVATION)
        total *= opened
    _store(out, total, row, col, rows, cols)


@triton.jit
def ffn_product(
    left, right, other_left, other_right, out, left_strides, right_strides, rows, cols, depth,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [rows, cols] = left right, and with others, laid out alike, + other_left other_right."""
    row, col = _places(rows, cols, ROWS, COLS, GROUP)
    total = tl.zeros([ROWS, COLS], tl.float32)
    total = tiles.product(
        total, left, right, left_strides, right_strides, row, col, rows, cols, depth, DEPTH
    )
    if other_left is not None:
        total = tiles.product(
            total, other_left, other_right, left_strides, right_strides, row, col, rows, cols,
            depth, DEPTH,
        )  # fmt: skip
    _store(out, total, row, col, rows, cols)


@triton.jit
def ffn_activation(
    grad_out, pre, gate, grad_pre, grad_gate, hidden, size, ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of pre and gate; and hidden, activation(pre) or activation(gate) * pre, again.

    All are of `size` elements, fp32 in between.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    grad = tl.load(grad_out + at, inside, 0).to(tl.float32)
    x = tl.load(pre + at, inside, 0).to(tl.float32)
    if gate is None:
        again, slope = _activate(x, ACTIVATION)
        grad *= slope
    else:
        opened, slope = _activate(tl.load(gate + at, inside, 0).to(tl.float32), ACTIVATION)
        again = opened * x
        tl.store(grad_gate + at, (grad * x * slope).to(grad_gate.dtype.element_ty), inside)
        grad *= opened
    tl.store(grad_pre + at, grad.to(grad_pre.dtype.element_ty), inside)
    if hidden is not None:
        tl.store(hidden + at, again.to(hidden.dtype.element_ty), inside)


@triton.jit
def ffn_drop(
    x, out, seed, rows, cols, threshold, factor, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out = dropout(x), both [rows, cols]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLS
    col = first + tl.arange(0, COLS)
    kept = tiles.kept(tl.load(seed), 0, row, first, threshold, COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    at = row.to(tl.int64)[:, None] * cols + col[None, :]
    scaled = tl.load(x + at, inside, 0).to(tl.float32) * factor
    tl.store(out + at, tl.where(kept, scaled, 0).to(out.dtype.element_ty), inside)


@triton.jit
def ffn_columns(grad, out, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out [cols] = the sum of grad [rows, cols] over rows, in an order that the shape decides."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        total += tl.load(grad + row.to(tl.int64)[:, None] * cols + col[None, :], inside, 0)
    tl.store(out + col, tl.sum(total, 0).to(out.dtype.element_ty), col < cols)


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of a product's tile, its warps, loads in flight, and what `launch`
    takes as `registers`."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True)
class Knobs:
    """Tiles of products of 16-bit numbers, of two that share a tile, and in fp32, which knows no
    tensor cores: the first unless `tuning`; rows of tiles that are worked on together; elements of
    an elementwise tile; rows and columns of one that sums columns, and of one that drops some, 64
    of which Philox serves."""

    product: tuple[Tile, ...] = (Tile(128, 128, 32, 8, 3), Tile(64, 64, 64, 4, 3))
    gated: tuple[Tile, ...] = (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3))
    fp32: tuple[Tile, ...] = (Tile(64, 64, 16, 8, 1, 255),)
    group: int = 8
    elements: int = 1024
    columns: tuple[int, int] = (32, 32)
    drop: tuple[int, int] = (16, 64)


KNOBS = {80: Knobs()}


def _launch_product(
    kernel: triton.JITFunction, gated: bool, writes: tuple[str, ...], **arguments
) -> None:
    out, rows, cols = (arguments[name] for name in ("out", "rows", "cols"))
    knobs = launch.of_architecture(KNOBS, out)
    kind = "fp32" if out.dtype == torch.float32 else "gated" if gated else "product"

    def launches(tile: Tile) -> None:
        launch.launch(
            kernel,
            (triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols),),
            {
                **arguments,
                "ROWS": tile.rows,
                "COLS": tile.cols,
                "DEPTH": tile.depth,
                "GROUP": knobs.group,
            },
            writes=writes,
            num_warps=tile.warps,
            num_stages=tile.stages,
            fuse=True,
            registers=tile.registers,
        )

    shape = tuning.rounded(rows, cols, arguments["depth"])
    tuning.run(launches, getattr(knobs, kind), f"{kernel.__name__}_{kind}", shape, out)


def _project(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    save: bool,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, pre, gate), the latter of no elements unless they are there to `save`."""
    features, depth = weight.shape
    shape = (*input.shape[:-1], features)
    empty, gated = input.new_empty(0), gate_weight is not None
    out = input.new_empty(shape)
    pre = input.new_empty(shape) if save else empty
    gate = input.new_empty(shape) if save and gated else empty
    _launch_product(
        ffn_forward,
        gated,
        ("out", "pre", "gate"),
        input=input,
        weight=weight,
        bias=bias,
        gate_weight=gate_weight,
        gate_bias=gate_bias,
        out=out,
        pre=pre if save else None,
        gate=gate if save and gated else None,
        input_strides=(depth, 1),
        weight_strides=(1, depth),
        rows=math.prod(input.shape[:-1]),
        cols=features,
        depth=depth,
        ACTIVATION=activation,
    )
    return out, pre, gate


def _multiply(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    transposed: bool = False,
    other: tuple[Tensor, Tensor] | None = None,
) -> None:
    """out = left right, or left^T right, + the product of the others; all are contiguous."""
    depth, cols = math.prod(right.shape[:-1]), right.shape[-1]
    rows = left.shape[-1] if transposed else math.prod(left.shape[:-1])
    _launch_product(
        ffn_product,
        False,
        ("out",),
        left=left,
        right=right,
        other_left=other and other[0],
        other_right=other and other[1],
        out=out,
        left_strides=(1, rows) if transposed else (depth, 1),
        right_strides=(cols, 1),
        rows=rows,
        cols=cols,
        depth=depth,
    )


def _sum_rows(grad: Tensor, out: Tensor) -> None:
    rows, cols = launch.of_architecture(KNOBS, grad).columns
    launch.launch(
        ffn_columns,
        (triton.cdiv(out.numel(), cols),),
        {
            "grad": grad,
            "out": out,
            "rows": math.prod(grad.shape[:-1]),
            "cols": out.numel(),
            "ROWS": rows,
            "COLS": cols,
        },
        writes=("out",),
        num_warps=4,
    )


def _through_activation(
    grad_out: Tensor, pre: Tensor, gate: Tensor | None, activation: str, again: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of pre and gate, and hidden if it is needed `again`."""
    block = launch.of_architecture(KNOBS, pre).elements
    grad_pre = torch.empty_like(pre)
    grad_gate = None if gate is None else torch.empty_like(gate)
    hidden = torch.empty_like(pre) if again else None
    launch.launch(
        ffn_activation,
        (triton.cdiv(pre.numel(), block),),
        {
            "grad_out": grad_out,
            "pre": pre,
            "gate": gate,
            "grad_pre": grad_pre,
            "grad_gate": grad_gate,
            "hidden": hidden,
            "size": pre.numel(),
            "ACTIVATION": activation,
            "BLOCK": block,
        },
        writes=("grad_pre", "grad_gate", "hidden"),
        num_warps=4,
    )
    return grad_pre, grad_gate, hidden


def _drop_out(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    if not dropout_p:
        return x
    rows, cols = launch.of_architecture(KNOBS, x).drop
    out = torch.empty_like(x)
    threshold, factor = tiles.threshold_and_factor(dropout_p)
    count = math.prod(x.shape[:-1])
    launch.launch(
        ffn_drop,
        (triton.cdiv(count, rows), triton.cdiv(x.shape[-1], cols)),
        {
            "x": x,
            "out": out,
            "seed": seed,
            "rows": count,
            "cols": x.shape[-1],
            "threshold": threshold,
            "factor": factor,
            "ROWS": rows,
            "COLS": cols,
        },
        writes=("out",),
        num_warps=4,
    )
    return out


def _gradient(tensor: Tensor | None, wanted: bool, other: Tensor) -> Tensor:
    return torch.empty_like(tensor) if wanted and tensor is not None else other.new_empty(0)


def linear_fwd(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    """The op of this name."""
    return _project(input, weight, bias, activation, save and activation != "identity")[:2]


def linear_bwd(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    activation: str,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of this name."""
    grad_input = _gradient(input, need_input, input)
    grad_weight = _gradient(weight, need_weight, input)
    grad_bias = _gradient(bias, need_bias, input)
    grad = grad_out
    if activation != "identity":
        grad, _, _ = _through_activation(grad_out, pre, None, activation, False)
    if need_input:
        _multiply(grad, weight, grad_input)
    if need_weight:
        _multiply(grad, input, grad_weight, transposed=True)
    if need_bias and bias is not None:
        _sum_rows(grad, grad_bias)
    return grad_input, grad_weight, grad_bias


def ffn_fwd(
    input, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias, seed, activation,
    dropout_p, save,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op of this name."""
    hidden, up, gate = _project(input, up_weight, up_bias, activation, save, gate_weight, gate_bias)
    hidden = _drop_out(hidden, seed, dropout_p)
    return _project(hidden, down_weight, down_bias, "identity", False)[0], up, gate


def ffn_bwd(
    grad_out, input, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias, seed, up,
    gate, activation, dropout_p, *needs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The op of this name."""
    tensors = input, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias
    needs = tuple(need and t is not None for need, t in zip(needs, tensors, strict=True))
    found = tuple(_gradient(t, need, input) for t, need in zip(tensors, needs, strict=True))
    grad_input, grad_up_weight, grad_up_bias, grad_gate_weight, grad_gate_bias = found[:5]
    grad_down_weight, grad_down_bias = found[5:]
    gated = gate_weight is not None
    if any(needs[:6]):
        if not up.numel():  # forward has not kept it
            up, _, _ = _project(input, up_weight, up_bias, "identity", False)
            if gated:
                gate, _, _ = _project(input, gate_weight, gate_bias, "identity", False)
        grad_hidden = torch.empty_like(up)
        _multiply(grad_out, down_weight, grad_hidden)
        grad_hidden = _drop_out(grad_hidden, seed, dropout_p)
        grad_up, grad_gate, hidden = _through_activation(
            grad_hidden, up, gate if gated else None, activation, needs[5]
        )
    if needs[0]:
        other = (grad_gate, gate_weight) if gated else None
        _multiply(grad_up, up_weight, grad_input, other=other)
    if needs[1]:
        _multiply(grad_up, input, grad_up_weight, transposed=True)
    if needs[2]:
        _sum_rows(grad_up, grad_up_bias)
    if needs[3]:
        _multiply(grad_gate, input, grad_gate_weight, transposed=True)
    if needs[4]:
        _sum_rows(grad_gate, grad_gate_bias)
    if needs[5]:
        hidden = _drop_out(hidden, seed, dropout_p)
        _multiply(grad_out, hidden, grad_down_weight, transposed=True)
    if needs[6]:
        _sum_rows(grad_out, grad_down_bias)
    return found
