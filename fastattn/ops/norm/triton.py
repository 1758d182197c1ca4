"""Layer norm and RMS norm in Triton, forward and backward, with a residual and dropout in front."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import launch, tiles, tuning


@triton.jit
def _places(row, first, rows, cols, COLS: tl.constexpr):
    """Where a tile [R, COLS] lies in a tensor [rows, cols], and which of it is inside."""
    col = first + tl.arange(0, COLS)[None, :]
    return row[:, None] * cols + col, (row < rows)[:, None] & (col < cols)


@triton.jit
def _drop(x, seed, row, first, threshold, factor):
    keep = tiles.kept(seed, 0, row, first, threshold, x.shape[1])
    return tl.where(keep & (factor != 0), x * factor, 0)


@triton.jit
def _load(
    input, residual, summed, seed, row, first, rows, cols, threshold, factor, COLS: tl.constexpr
):
    """What is normalised, fp32 [R, COLS], 0 outside: input, or the sum, rounded as it is kept."""
    at, inside = _places(row, first, rows, cols, COLS)
    if summed is not None:
        x = tl.load(summed + at, inside, 0).to(tl.float32)
    else:
        x = tl.load(input + at, inside, 0).to(tl.float32)
        if residual is not None:
            if seed is not None:
                x = _drop(x, tl.load(seed), row, first, threshold, factor)
            x += tl.load(residual + at, inside, 0).to(tl.float32)
            x = x.to(residual.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _parameter(parameter, missing, first, cols, COLS: tl.constexpr):
    col = first + tl.arange(0, COLS)
    if parameter is None:
        found = tl.full([COLS], missing, tl.float32)
    else:
        found = tl.load(parameter + col, col < cols, 0).to(tl.float32)
    return found[None, :]


@triton.jit
def _store(out, x, row, first, rows, cols):
    at, inside = _places(row, first, rows, cols, x.shape[1])
    tl.store(out + at, x.to(out.dtype.element_ty), inside)


@triton.jit
def _distances(x, mean, row, first, rows, cols):
    """x - mean, and 0 outside."""
    _, inside = _places(row, first, rows, cols, x.shape[1])
    return tl.where(inside, x - mean[:, None], 0)


@triton.jit
def norm_forward(
    input, residual, weight, bias, seed, out, summed, mean_of, rstd_of, rows, cols, eps,
    threshold: tl.uint32, factor, ROWS: tl.constexpr, COLS: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Of ROWS rows, whose first COLS columns stay in registers; more, if LONG, are read again."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    x = _load(input, residual, None, seed, row, 0, rows, cols, threshold, factor, COLS)
    if summed is not None:
        _store(summed, x, row, 0, rows, cols)
    total = tl.sum(x, 1)
    squares = tl.sum(x * x, 1)
    if LONG:
        for first in range(COLS, cols, COLS):
            more = _load(
                input, residual, None, seed, row, first, rows, cols, threshold, factor, COLS
            )
            if summed is not None:
                _store(summed, more, row, first, rows, cols)
            total += tl.sum(more, 1)
            squares += tl.sum(more * more, 1)
    mean = tl.zeros([ROWS], tl.float32)
    if mean_of is not None:  # squares of distances, since those of elements cancel
        mean = total / cols
        distance = _distances(x, mean, row, 0, rows, cols)
        squares = tl.sum(distance * distance, 1)
        if LONG:
            for first in range(COLS, cols, COLS):
                more = _load(
                    input, residual, None, seed, row, first, rows, cols, threshold, factor, COLS
                )
                distance = _distances(more, mean, row, first, rows, cols)
                squares += tl.sum(distance * distance, 1)
        tl.store(mean_of + row, mean, here)
    rstd = tl.rsqrt(squares / cols + eps)
    tl.store(rstd_of + row, rstd, here)
    x = (x - mean[:, None]) * rstd[:, None] * _parameter(weight, 1, 0, cols, COLS)
    _store(out, x + _parameter(bias, 0, 0, cols, COLS), row, 0, rows, cols)
    if LONG:
        for first in range(COLS, cols, COLS):
            more = _load(
                input, residual, None, seed, row, first, rows, cols, threshold, factor, COLS
            )
            more = (more - mean[:, None]) * rstd[:, None]
            more = more * _parameter(weight, 1, first, cols, COLS)
            more = more + _parameter(bias, 0, first, cols, COLS)
            _store(out, more, row, first, rows, cols)


@triton.jit
def _normal_and_grad(
    grad_out, input, residual, summed, seed, mean_of, rstd_of, row, first, rows, cols,
    threshold, factor, COLS: tl.constexpr,
):  # fmt: skip
    """The normalised rows before weight and bias, and the gradient behind these, [R, COLS]."""
    x = _load(input, residual, summed, seed, row, first, rows, cols, threshold, factor, COLS)
    if mean_of is not None:
        x -= tl.load(mean_of + row, row < rows, 0)[:, None]
    x *= tl.load(rstd_of + row, row < rows, 0)[:, None]
    if grad_out is None:
        grad = tl.zeros_like(x)
    else:
        at, inside = _places(row, first, rows, cols, COLS)
        grad = tl.load(grad_out + at, inside, 0).to(tl.float32)
    return x, grad


@triton.jit
def _store_gradients(
    dx, grad_summed, seed, grad_input, grad_residual, row, first, rows, cols, threshold, factor
):
    if grad_summed is not None:
        at, inside = _places(row, first, rows, cols, dx.shape[1])
        dx += tl.load(grad_summed + at, inside, 0).to(tl.float32)
    if grad_residual is not None:
        _store(grad_residual, dx, row, first, rows, cols)
    if seed is not None:
        dx = _drop(dx, tl.load(seed), row, first, threshold, factor)
    _store(grad_input, dx, row, first, rows, cols)


@triton.jit
def norm_backward(
    grad_out, grad_summed, input, residual, summed, weight, seed, mean_of, rstd_of, grad_input,
    grad_residual, weight_parts, bias_parts, rows, cols, threshold: tl.uint32, factor,
    ROWS: tl.constexpr, COLS: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Of the tiles program, program + programs, ... of ROWS rows. Their part of the parameters'
    gradients, [programs, cols], is summed on the way unless rows are LONG."""
    program = tl.program_id(0)
    weight_sum = tl.zeros([ROWS, COLS], tl.float32)
    bias_sum = tl.zeros([ROWS, COLS], tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        normal, grad = _normal_and_grad(
            grad_out, input, residual, summed, seed, mean_of, rstd_of, row, 0, rows, cols,
            threshold, factor, COLS,
        )  # fmt: skip
        if weight_parts is not None:
            weight_sum += grad * normal
        if bias_parts is not None:
            bias_sum += grad
        grad *= _parameter(weight, 1, 0, cols, COLS)
        along = tl.sum(grad * normal, 1)
        total = tl.sum(grad, 1)
        if LONG:
            for first in range(COLS, cols, COLS):
                more, more_grad = _normal_and_grad(
                    grad_out, input, residual, summed, seed, mean_of, rstd_of, row, first, rows,
                    cols, threshold, factor, COLS,
                )  # fmt: skip
                more_grad *= _parameter(weight, 1, first, cols, COLS)
                along += tl.sum(more_grad * more, 1)
                total += tl.sum(more_grad, 1)
        along = (along / cols)[:, None]
        total = (total / cols)[:, None]
        if mean_of is None:
            total = tl.zeros_like(total)
        rstd = tl.load(rstd_of + row, row < rows, 0)[:, None]
        dx = (grad - total - normal * along) * rstd
        if grad_out is None:  # and not NaN where the rows are
            dx = tl.zeros_like(dx)
        _store_gradients(
            dx, grad_summed, seed, grad_input, grad_residual, row, 0, rows, cols, threshold, factor
        )
        if LONG:
            for first in range(COLS, cols, COLS):
                more, more_grad = _normal_and_grad(
                    grad_out, input, residual, summed, seed, mean_of, rstd_of, row, first, rows,
                    cols, threshold, factor, COLS,
                )  # fmt: skip
                more_grad *= _parameter(weight, 1, first, cols, COLS)
                dx = (more_grad - total - more * along) * rstd
                if grad_out is None:
                    dx = tl.zeros_like(dx)
                _store_gradients(
                    dx, grad_summed, seed, grad_input, grad_residual, row, first, rows, cols,
                    threshold, factor,
                )  # fmt: skip
    if not LONG:
        _store_part(weight_parts, weight_sum, program, 0, cols)
        _store_part(bias_parts, bias_sum, program, 0, cols)


@triton.jit
def _store_part(parts, sums, part, first, cols):
    if parts is not None:
        col = first + tl.arange(0, sums.shape[1])
        tl.store(parts + part.to(tl.int64) * cols + col, tl.sum(sums, 0), col < cols)


@triton.jit
def norm_parameters(
    grad_out, input, residual, summed, seed, mean_of, rstd_of, weight_parts, bias_parts, rows,
    cols, threshold: tl.uint32, factor, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Parts [programs, cols] of the gradients of weight and bias, for rows that are long."""
    part = tl.program_id(1)
    first = tl.program_id(0) * COLS
    weight_sum = tl.zeros([ROWS, COLS], tl.float32)
    bias_sum = tl.zeros([ROWS, COLS], tl.float32)
    for tile in range(part, tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        normal, grad = _normal_and_grad(
            grad_out, input, residual, summed, seed, mean_of, rstd_of, row, first, rows, cols,
            threshold, factor, COLS,
        )  # fmt: skip
        weight_sum += grad * normal
        bias_sum += grad
    _store_part(weight_parts, weight_sum, part, first, cols)
    _store_part(bias_parts, bias_sum, part, first, cols)


@triton.jit
def norm_fold(parts, grad, count, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """grad [cols] = the sum of parts [count, cols], in an order that the shape alone decides."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (col < cols)[None, :]
        sums += tl.load(parts + row.to(tl.int64)[:, None] * cols + col[None, :], inside, 0)
    tl.store(grad + col, tl.sum(sums, 0).to(grad.dtype.element_ty), col < cols)


@dataclass(frozen=True)
class Knobs:
    """How the work is cut up; the numbers are chosen so that nothing spills."""

    columns: int = 4096  # of a row that stay in registers
    elements: int = 1024  # of a tile of short rows
    for_each_warp: int = 512  # elements of a tile
    fewest_warps: int = 4
    parts: int = 256  # of the parameters' gradients, at most
    fold: tuple[int, int] = (32, 32)  # parts and columns of a tile

    def tile(self, cols: int) -> dict[str, int]:
        """The tile for rows of `cols` columns; 64 is what one call of Philox serves."""
        width = min(self.columns, max(64, triton.next_power_of_2(cols)))
        return {"ROWS": max(1, self.elements // width), "COLS": width}

    def warps(self, tile: dict[str, int]) -> int:
        """The warps for a tile."""
        return max(self.fewest_warps, tile["ROWS"] * tile["COLS"] // self.for_each_warp)


# The first serves both ways; of the others `tuning` may choose one for forward.
KNOBS = {80: (Knobs(), Knobs(for_each_warp=1024, elements=4096), Knobs(for_each_warp=256))}


def _sizes(input: Tensor, dims: int) -> tuple[int, int]:
    return math.prod(input.shape[: input.dim() - dims]), math.prod(input.shape[-dims:])


def _forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dims: int,
    eps: float,
    dropout_p: float,
    keep_sum: bool,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, cols = _sizes(input, dims)
    sums = keep_sum and residual is not None
    out = torch.empty_like(input)
    like = input if residual is None else residual
    summed = torch.empty_like(like) if sums else like.new_empty(0)
    mean, rstd = (
        input.new_empty(rows if wanted else 0, dtype=torch.float32) for wanted in (centred, True)
    )
    threshold, factor = tiles.threshold_and_factor(dropout_p)

    def launches(knobs: Knobs) -> None:
        tile = knobs.tile(cols)
        launch.launch(
            norm_forward,
            (triton.cdiv(rows, tile["ROWS"]),),
            {
                "input": input,
                "residual": residual,
                "weight": weight,
                "bias": bias,
                "seed": seed,
                "out": out,
                "summed": summed if sums else None,
                "mean_of": mean if centred else None,
                "rstd_of": rstd,
                "rows": rows,
                "cols": cols,
                "eps": eps,
                "threshold": threshold,
                "factor": factor,
                **tile,
                "LONG": cols > tile["COLS"],
            },
            writes=("out", "summed", "mean_of", "rstd_of"),
            num_warps=knobs.warps(tile),
        )

    shape = sums, seed is not None, centred, *tuning.rounded(rows, cols)
    tuning.run(launches, launch.of_architecture(KNOBS, input), "norm_forward", shape, input)
    return out, summed, mean, rstd


def _backward(
    grad_out: Tensor | None,
    grad_summed: Tensor | None,
    input: Tensor,
    residual: Tensor | None,
    summed: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dims: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, cols = _sizes(input, dims)
    apart = residual is not None and (dropout_p > 0 or residual.dtype != input.dtype)
    grad_input = torch.empty_like(input)
    grad_residual = torch.empty_like(residual) if apart else input.new_empty(0)
    gradients = [input.new_empty(0) if p is None else torch.zeros_like(p) for p in (weight, bias)]
    knobs, *_ = launch.of_architecture(KNOBS, input)
    tile = knobs.tile(cols)
    long = cols > tile["COLS"]
    count = min(knobs.parts, triton.cdiv(rows, tile["ROWS"]))
    parts = [
        None if p is None else input.new_empty(count, cols, dtype=torch.float32)
        for p in (weight, bias)
    ]
    threshold, factor = tiles.threshold_and_factor(dropout_p)
    common = {
        "grad_out": grad_out,
        "input": input,
        "residual": residual,
        "summed": summed,
        "seed": seed,
        "mean_of": mean,
        "rstd_of": rstd,
        "rows": rows,
        "cols": cols,
        "threshold": threshold,
        "factor": factor,
        **tile,
    }
    by_parameter = {"weight_parts": parts[0], "bias_parts": parts[1]}
    here = {name: None for name in by_parameter} if long else by_parameter
    launch.launch(
        norm_backward,
        (count,),
        {
            **common,
            **here,
            "grad_summed": grad_summed,
            "weight": weight,
            "grad_input": grad_input,
            "grad_residual": grad_residual if apart else None,
            "LONG": long,
        },
        writes=("grad_input", "grad_residual", *here),
        num_warps=knobs.warps(tile),
    )
    if rows == 0 or parts == [None, None]:
        return grad_input, grad_residual, *gradients
    if long:
        launch.launch(
            norm_parameters,
            (triton.cdiv(cols, tile["COLS"]), count),
            {**common, **by_parameter},
            writes=tuple(by_parameter),
            num_warps=knobs.warps(tile),
        )
    for part, gradient in zip(parts, gradients, strict=True):
        if part is not None:
            launch.launch(
                norm_fold,
                (triton.cdiv(cols, knobs.fold[1]),),
                {
                    "parts": part,
                    "grad": gradient,
                    "count": count,
                    "cols": cols,
                    "ROWS": knobs.fold[0],
                    "COLS": knobs.fold[1],
                },
                writes=("grad",),
                num_warps=knobs.fewest_warps,
            )
    return grad_input, grad_residual, *gradients


def layer_norm_fwd(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op of this name."""
    return _forward(*args, True)


def layer_norm_bwd(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op of this name."""
    *rest, dims, _, dropout_p = args
    return _backward(*rest, dims, dropout_p)


def rms_norm_fwd(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, *rest
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of this name."""
    out, summed, _, rstd = _forward(input, residual, weight, None, *rest, False)
    return out, summed, rstd


def rms_norm_bwd(*args) -> tuple[Tensor, Tensor, Tensor]:
    """The op of this name."""
    *sources, weight, seed, rstd, dims, _, dropout_p = args
    return _backward(*sources, weight, None, seed, None, rstd, dims, dropout_p)[:3]
