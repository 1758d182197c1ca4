"""What the Triton kernels of attention share: logits, tiles, arguments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import launch, tiles

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Packed(NamedTuple):
    """The sequences of a packed batch: where each begins and the last ends, how many there are, and
    how long they may be."""

    query_starts: Tensor
    key_starts: Tensor
    sequences: int
    longest_query: int
    longest_key: int


class Pages(NamedTuple):
    """Where the positions of sequences lie in a cache of so many pages of one size: a table of the
    pages of each, and its strides."""

    table: Tensor
    sequence_stride: int
    page_stride: int
    count: int
    size: int


@triton.jit
def page_of(pages, sequence, at, end):
    """The pages of positions in front of `end`; one that is none stops the kernel, for the host has
    not read it."""
    row = pages.table + sequence.to(tl.int64) * pages.sequence_stride
    page = tl.load(row + (at // pages.size).to(tl.int64) * pages.page_stride, at < end, 0)
    tiles.stop_if((page < 0) | (page >= pages.count))
    return page.to(tl.int64)


@triton.jit
def head_of(tensor, strides, batch, head, row=0):
    """Where the matrix of a head begins, or a row of it."""
    to = tensor + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return to + tl.cast(row, tl.int64) * strides[2]


@triton.jit
def _rows_of(starts, n, sequences, longest, total):
    """(first, count) of the rows of sequence n; what is none stops the kernel, for the host has not
    read it."""
    begin = tl.load(starts + n).to(tl.int64)
    end = tl.load(starts + n + 1).to(tl.int64)
    bad = (begin < 0) | (end < begin) | (end > total) | (end - begin > longest)
    bad = bad | ((n == 0) & (begin != 0)) | ((n + 1 == sequences) & (end != total))
    tiles.stop_if(bad)
    return begin.to(tl.int32), (end - begin).to(tl.int32)


@triton.jit
def _sequence(packed, n, q_len, kv_len):
    """The queries and keys in front of sequence n, and in it."""
    first_query, queries = _rows_of(
        packed.query_starts, n, packed.sequences, packed.longest_query, q_len
    )
    first_key, keys = _rows_of(packed.key_starts, n, packed.sequences, packed.longest_key, kv_len)
    return first_query, queries, first_key, keys


@triton.jit
def work_of(
    packed, heads, q_len, kv_len, BOTTOM_RIGHT: tl.constexpr, OF_KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """What this program works on: its block of ROWS queries or keys, head and sequence; the queries
    and keys in front of that sequence and in it; and by how much its keys are ahead of its queries.

    Without rows it is one too many. Of queries the last blocks, which see most, come first.
    """
    total = kv_len if OF_KEYS else q_len
    blocks = tl.cdiv(total, ROWS)
    if packed is not None:
        blocks = total // ROWS + packed.sequences
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % heads
    sequence = tl.program_id(0) // blocks // heads
    first_query = sequence * 0
    first_key = sequence * 0
    if packed is not None:
        # Sequence n has the blocks from starts[n] // ROWS + n on, which are enough for its rows.
        starts = packed.key_starts if OF_KEYS else packed.query_starts
        behind = sequence * 0 + packed.sequences
        while behind - sequence > 1:
            middle = (sequence + behind) // 2
            before = tl.load(starts + middle) // ROWS + middle <= block
            sequence = tl.where(before, middle, sequence)
            behind = tl.where(before, behind, middle)
        _sequence(packed, tl.minimum(block, packed.sequences - 1), q_len, kv_len)  # all are checked
        first_query, q_len, first_key, kv_len = _sequence(packed, sequence, q_len, kv_len)
        block -= (first_key if OF_KEYS else first_query) // ROWS + sequence
    if not OF_KEYS:
        block = tl.cdiv(q_len, ROWS) - 1 - block
    offset = kv_len - q_len if BOTTOM_RIGHT else 0
    return block, head, sequence, first_query, q_len, first_key, kv_len, offset


@triton.jit
def logits_of(
    product, row, key, q_len, kv_len, offset, left, right, scale, softcap, slope,
    mask, mask_strides, bias, bias_strides,
):  # fmt: skip
    """Logits of [R] queries and [K] keys, -inf where hidden; and d logits / d product, without the
    factor `scale`."""
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
    return tl.where(seen, logits, float("-inf")), slopes


@triton.jit
def exponential(x):
    """Of a difference of logits, which of large ones is more exact in their own base than in 2."""
    return tl.exp2(x * LOG2E)


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
    bounds and sinks, for extras such as bias and dropout, and for fp32, without tensor cores; in
    `decode` the queries are those of all heads that share keys."""

    forward: dict[int, Tiles]
    forward_extra: dict[int, Tiles]
    forward_fp32: dict[int, Tiles]
    backward: dict[int, Tiles]
    backward_extra: dict[int, Tiles]
    backward_fp32: dict[int, Tiles]
    decode: dict[int, Tiles]
    decode_fp32: dict[int, Tiles]


KNOBS = {
    80: Knobs(
        forward={128: Tiles(64, 64, 4, 2), 256: Tiles(64, 64, 8, 2), 512: Tiles(64, 32, 8, 2)},
        forward_extra={
            128: Tiles(64, 64, 8, 1),
            256: Tiles(64, 64, 8, 1),
            512: Tiles(32, 64, 8, 1),
        },
        forward_fp32={256: Tiles(16, 64, 8, 1), 512: Tiles(16, 16, 8, 1, 255)},
        backward={128: Tiles(32, 64, 4, 2), 256: Tiles(32, 64, 8, 2), 512: Tiles(32, 64, 8, 1)},
        backward_extra={
            128: Tiles(32, 64, 8, 2),
            256: Tiles(32, 64, 8, 1),
            512: Tiles(16, 64, 8, 1),
        },
        backward_fp32={256: Tiles(16, 64, 8, 1, 255), 512: Tiles(16, 16, 8, 1, 255)},
        decode={256: Tiles(16, 64, 4, 2), 512: Tiles(16, 32, 4, 2)},
        decode_fp32={256: Tiles(16, 64, 8, 1), 512: Tiles(16, 16, 8, 1, 255)},
    )
}
# On sm_90 Triton 3.9 lets a loop of backward fetch ahead to where `wgmma` may still read.
KNOBS[90] = replace(
    KNOBS[80],
    backward={width: replace(tile, stages=1) for width, tile in KNOBS[80].backward.items()},
    backward_extra={
        width: replace(tile, stages=1) for width, tile in KNOBS[80].backward_extra.items()
    },
)
KNOBS[100] = KNOBS[80]


def tiles_for(arguments: dict, direction: str) -> tuple[dict[str, int], dict[str, Any]]:
    """The tile for these arguments, and how to launch it."""
    query = arguments["query"]
    kind = "_fp32" if query.dtype == torch.float32 else ""
    extras = "mask", "bias", "alibi_slopes", "seed", "softcap"
    if not kind and direction != "decode" and any(arguments[n] is not None for n in extras):
        kind = "_extra"
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


def blocks_of(arguments: dict, rows: int, of_keys: bool = False) -> int:
    """The programs that `work_of` shares the queries or keys out among, of so many rows each."""
    tensor = arguments["key" if of_keys else "query"]
    batch, heads, length, _ = tensor.shape
    packed = arguments["packed"]
    if packed is None:
        return triton.cdiv(length, rows) * batch * heads
    return (length // rows + packed.sequences) * heads


def width_of(cols: int) -> int:
    """Of a tile that holds so many columns and can be multiplied."""
    return max(16, triton.next_power_of_2(cols))


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
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    bottom_right: bool,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> dict:
    """What the kernels of both directions take."""
    _, heads, q_len, head_dim = query.shape
    kv_len, value_dim = value.shape[2:]
    packed = None
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        packed = Packed(
            cu_seqlens_q.contiguous(),
            cu_seqlens_k.contiguous(),
            cu_seqlens_q.shape[0] - 1,
            q_len if max_seqlen_q is None else min(max_seqlen_q, q_len),
            kv_len if max_seqlen_k is None else min(max_seqlen_k, kv_len),
        )
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
        "packed": packed,
        "query_strides": strides_of(query),
        "key_strides": strides_of(key),
        "value_strides": strides_of(value),
        "mask_strides": strides_of(mask),
        "bias_strides": strides_of(bias),
        "heads": heads,
        "group": heads // key.shape[1],
        "q_len": q_len,
        "kv_len": kv_len,
        "left": left if left is None else min(left, furthest),
        "right": right if right is None else min(right, furthest),
        "scale": scale,
        "softcap": softcap or None,
        "threshold": threshold,
        "factor": factor,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "HEAD_WIDTH": width_of(head_dim),
        "VALUE_WIDTH": width_of(value_dim),
        "BOTTOM_RIGHT": bottom_right,
        "HIDES": any(what is not None for what in (mask, bias, left, right)),
    }
