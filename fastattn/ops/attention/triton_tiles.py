"""What the Triton kernels of attention share: logits, tiles, arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import launch, tiles

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def head_of(tensor, strides, batch, head):
    """Where the matrix of a head begins."""
    return tensor + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def logits_of(
    product, row, key, q_len, kv_len, offset, left, right, scale, softcap, slope,
    mask, mask_strides, bias, bias_strides,
):  # fmt: skip
    """Logits in base 2 of [R] queries and [K] keys, -inf where hidden; and d logits / d product,
    without the factor `scale`."""
    apart = row[:, None] + offset - key[None, :]
    seen = (row < q_len)[:, None] & (key < kv_len)[None, :]
    inside = seen
    if left is not None:
        seen = seen & (apart <= left)
    if right is not None:
        seen = seen & (-apart <= right)
    rows = row.to(tl.int64)[:, None]
    if mask is not None:
        at = rows * mask_strides[2] + key[None, :] * mask_strides[3]
        seen = seen & tl.load(mask + at, inside, False)
    logits = (product - product + product) * scale  # what is infinite is no number
    slopes = tl.full(product.shape, 1, tl.float32)
    if softcap is not None:
        bent = tiles.tanh(logits / softcap)
        logits = softcap * bent
        slopes = 1 - bent * bent
    if bias is not None:
        at = rows * bias_strides[2] + key.to(tl.int64)[None, :] * bias_strides[3]
        term = tl.load(bias + at, inside, 0).to(tl.float32)
        seen = seen & (term != float("-inf"))
        logits += term
    if slope is not None:
        logits -= slope * tl.abs(apart).to(tl.float32)
    return tl.where(seen, logits * LOG2E, float("-inf")), slopes


@triton.jit
def keys_for(first, last, kv_len, offset, left, right, KEYS: tl.constexpr):
    """The blocks of keys (begin, end) that the queries first ... last may see."""
    begin = 0
    if left is not None:
        begin = tl.maximum(first + offset - left, 0) // KEYS * KEYS
    end = kv_len
    if right is not None:
        end = tl.minimum(last + offset + right + 1, kv_len)
    return begin, end


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a tile, its warps, how many tiles of a loop are in flight, and what
    `launch` takes as `registers`."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True)
class Knobs:
    """The tiles for heads of at most so many bytes a row: for what needs no more than products,
    bounds and sinks, for extras such as bias and dropout, and for fp32, without tensor cores."""

    forward: dict[int, Tiles]
    forward_extra: dict[int, Tiles]
    forward_fp32: dict[int, Tiles]
    backward: dict[int, Tiles]
    backward_extra: dict[int, Tiles]
    backward_fp32: dict[int, Tiles]


KNOBS = {
    80: Knobs(
        forward={128: Tiles(64, 64, 4, 2), 256: Tiles(64, 64, 8, 2)},
        forward_extra={128: Tiles(64, 64, 8, 1), 256: Tiles(64, 64, 8, 1)},
        forward_fp32={256: Tiles(16, 64, 8, 1)},
        backward={128: Tiles(32, 64, 4, 2), 256: Tiles(32, 64, 8, 2)},
        backward_extra={128: Tiles(32, 64, 8, 2), 256: Tiles(32, 64, 8, 1)},
        backward_fp32={256: Tiles(16, 64, 8, 1, 255)},
    )
}


def tiles_for(arguments: dict, direction: str) -> tuple[dict[str, int], dict[str, Any]]:
    """The tile for these arguments, and how to launch it."""
    query = arguments["query"]
    extras = "mask", "bias", "alibi_slopes", "seed", "softcap"
    kind = "_extra" if any(arguments[name] is not None for name in extras) else ""
    if query.dtype == torch.float32:
        kind = "_fp32"
    table = getattr(launch.of_architecture(KNOBS, query), direction + kind)
    width = max(arguments["HEAD_WIDTH"], arguments["VALUE_WIDTH"]) * query.dtype.itemsize
    tile = table[min(n for n in table if n >= width)]
    options = {
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "fuse": True,
        "registers": tile.registers,
    }
    return {"QUERIES": tile.queries, "KEYS": tile.keys}, options


def strides_of(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Those of a tensor [B, H, rows, columns], 0 where a dimension broadcasts."""
    if tensor is None:
        return None
    return tuple(0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def arguments_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    bottom_right: bool,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> dict:
    """What the kernels of both directions take."""
    _, heads, q_len, head_dim = query.shape
    kv_len, value_dim = value.shape[2:]
    threshold, factor = tiles.threshold_and_factor(dropout_p)
    furthest = q_len + kv_len
    return {
        "query": query,
        "key": key,
        "value": value,
        "mask": mask,
        "bias": bias,
        "alibi_slopes": alibi_slopes,
        "seed": seed,
        "query_strides": strides_of(query),
        "key_strides": strides_of(key),
        "value_strides": strides_of(value),
        "mask_strides": strides_of(mask),
        "bias_strides": strides_of(bias),
        "heads": heads,
        "group": heads // key.shape[1],
        "q_len": q_len,
        "kv_len": kv_len,
        "offset": kv_len - q_len if bottom_right else 0,
        "left": left if left is None else min(left, furthest),
        "right": right if right is None else min(right, furthest),
        "scale": scale,
        "softcap": softcap or None,
        "threshold": threshold,
        "factor": factor,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "HEAD_WIDTH": max(16, triton.next_power_of_2(head_dim)),
        "VALUE_WIDTH": max(16, triton.next_power_of_2(value_dim)),
        "HIDES": any(what is not None for what in (mask, bias, left, right)),
    }
