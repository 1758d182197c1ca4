"""Rotary position embedding in Triton: forward, backward and in place."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import launch, tiles


@triton.jit
def rope_rows(
    x, out, cos, sin, positions, x_strides, out_strides, cos_strides, sin_strides,
    position_strides, heads, length, width, angles, lines, sign, INTERLEAVED: tl.constexpr,
    INPLACE: tl.constexpr, ROWS: tl.constexpr, ANGLES: tl.constexpr,
):  # fmt: skip
    """out = x [B, heads, length, width] turned by the angles of its positions, times `sign`.

    A program has ROWS rows of one batch, heads inside, so that those of one position share what
    they read of the tables. These have `lines`; a position in none of them turns its rows to NaN.
    """
    programs = tl.cdiv(heads * length, ROWS)
    batch = (tl.program_id(0) // programs).to(tl.int64)
    row = tl.program_id(0) % programs * ROWS + tl.arange(0, ROWS)
    here = (row < heads * length)[:, None]
    head, position = (row % heads).to(tl.int64), (row // heads).to(tl.int64)
    x += batch * x_strides[0]
    out += batch * out_strides[0]
    x_row = (head * x_strides[1] + position * x_strides[2])[:, None]
    out_row = (head * out_strides[1] + position * out_strides[2])[:, None]
    missing = tl.full([ROWS, 1], False, tl.int1)
    if positions is not None:
        at = batch * position_strides[0] + position * position_strides[1]
        position = tl.load(positions + at, row < heads * length, 0)
        missing = ((position < 0) | (position >= lines))[:, None]
    cos_row = (batch * cos_strides[0] + position * cos_strides[1])[:, None]
    sin_row = (batch * sin_strides[0] + position * sin_strides[1])[:, None]
    for first in range(0, angles, ANGLES):
        col = first + tl.arange(0, ANGLES)[None, :]
        inside = here & (col < angles)
        cosine = tl.load(cos + cos_row + col, inside & ~missing, 0)
        cosine = tl.where(missing, float("nan"), cosine)
        sine = tl.load(sin + sin_row + col, inside & ~missing, 0) * sign
        if INTERLEAVED:  # whole pairs are moved, so that neighbours in memory stay together
            both = 2 * first + tl.arange(0, 2 * ANGLES)[None, :]
            inside = here & (both < 2 * angles)
            pairs = tl.load(x + x_row + both * x_strides[3], inside, 0).to(tl.float32)
            a, b = tl.split(pairs.reshape(ROWS, ANGLES, 2))
            pairs = tl.join(
                tiles.turned(a, b, True, cosine, sine), tiles.turned(b, a, False, cosine, sine)
            )
            pairs = pairs.reshape(ROWS, 2 * ANGLES).to(out.dtype.element_ty)
            tl.store(out + out_row + both * out_strides[3], pairs, inside)
        else:
            a = tl.load(x + x_row + col * x_strides[3], inside, 0)
            b = tl.load(x + x_row + (angles + col) * x_strides[3], inside, 0)
            first_half = tiles.turned(a, b, True, cosine, sine).to(out.dtype.element_ty)
            tl.store(out + out_row + col * out_strides[3], first_half, inside)
            second_half = tiles.turned(b, a, False, cosine, sine).to(out.dtype.element_ty)
            tl.store(out + out_row + (angles + col) * out_strides[3], second_half, inside)
    if not INPLACE:
        for first in range(2 * angles, width, 2 * ANGLES):
            col = first + tl.arange(0, 2 * ANGLES)[None, :]
            inside = here & (col < width)
            rest = tl.load(x + x_row + col * x_strides[3], inside, 0)
            tl.store(out + out_row + col * out_strides[3], rest, inside)


@dataclass(frozen=True)
class Knobs:
    """Pairs of a program's tile, of a row's at least and at most, and its warps.

    A tile has no fewer pairs than threads: else two would read, and in place one of them write,
    the same pair.
    """

    pairs: int = 1024
    fewest: int = 16
    warps: int = 4

    def tile(self, angles: int) -> dict[str, int]:
        """The tile for rows of so many pairs that are turned."""
        width = min(self.pairs, max(self.fewest, triton.next_power_of_2(angles)))
        return {"ROWS": self.pairs // width, "ANGLES": width}


KNOBS = {80: Knobs()}


def _rotate(
    x: Tensor,
    out: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    sign: float,
) -> None:
    batch, heads, length, width = x.shape
    angles = cos.shape[-1]
    knobs = launch.of_architecture(KNOBS, x)
    tile = knobs.tile(angles)
    launch.launch(
        rope_rows,
        (batch * triton.cdiv(heads * length, tile["ROWS"]),),
        {
            "x": x,
            "out": out,
            "cos": cos,
            "sin": sin,
            "positions": positions,
            "x_strides": x.stride(),
            "out_strides": out.stride(),
            "cos_strides": _by_batch(cos),
            "sin_strides": _by_batch(sin),
            "position_strides": None if positions is None else positions.stride(),
            "heads": heads,
            "length": length,
            "width": width,
            "angles": angles,
            "lines": cos.shape[-2],
            "sign": sign,
            "INTERLEAVED": interleaved,
            "INPLACE": x is out,
            **tile,
        },
        writes=("out",),
        num_warps=knobs.warps,
        fuse=True,
    )


def _by_batch(table: Tensor) -> tuple[int, int]:
    """The strides of batch and position in a table [S, angles] or [B or 1, S, angles]."""
    return table.stride(0) if table.dim() == 3 and len(table) > 1 else 0, table.stride(-2)


def _rotated(x: Tensor | None, heads_inside: bool, like: Tensor, *rest) -> Tensor:
    if x is None:
        return like.new_empty(0)
    batch, heads, length, width = x.shape
    if heads_inside:
        out = x.new_empty(batch, length, heads, width).transpose(1, 2)
    else:
        out = x.new_empty(x.shape)
    _rotate(x, out, *rest)
    return out


def rope_fwd(
    query, key, cos, sin, positions, interleaved, query_inside, key_inside
) -> tuple[Tensor, Tensor]:
    """The op of this name."""
    rest = query, cos, sin, positions, interleaved, 1.0
    return _rotated(query, query_inside, *rest), _rotated(key, key_inside, *rest)


def rope_bwd(
    grad_query, grad_key, cos, sin, positions, interleaved, query_inside, key_inside
) -> tuple[Tensor, Tensor]:
    """The op of this name."""
    rest = cos, cos, sin, positions, interleaved, -1.0
    return _rotated(grad_query, query_inside, *rest), _rotated(grad_key, key_inside, *rest)


def rope_(query, key, cos, sin, positions, interleaved) -> None:
    """The op of this name."""
    for x in (query, key):
        if x is not None:
            _rotate(x, x, cos, sin, positions, interleaved, 1.0)
