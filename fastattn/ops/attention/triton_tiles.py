"""What the Triton kernels of attention share: logits, tiles, arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import launch, tiles, tuning

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
    product, row, key, whole, q_len, kv_len, offset, left, right, scale, softcap, slope,
    mask, mask_strides, bias, bias_strides,
):  # fmt: skip
    """Logits of [R] queries and [K] keys, -inf where hidden; and d logits / d product, without the
    factor `scale`. Of a `whole` tile, which has neither mask nor bias, nothing is hidden."""
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
    if not whole:
        logits = tl.where(seen, logits, float("-inf"))
    return logits, slopes


@triton.jit
def exponential(x):
    """Of a difference of logits, which of large ones is more exact in their own base than in 2."""
    return tl.exp2(x * LOG2E)


@triton.jit
def keys_for(first, last, kv_len, offset, left, right, KEYS: tl.constexpr):
    """The blocks of keys (begin, end) that some of the queries first ... last may see."""
    begin = 0
    if left is not None:
        begin = tl.maximum(first + offset - left, 0) // KEYS * KEYS
    end = kv_len
    if right is not None:
        end = tl.minimum(last + offset + right + 1, kv_len)
    return begin, end


@triton.jit
def all_see(first_row, last_row, first, last, q_len, kv_len, offset, left, right):
    """Whether all the queries first_row ... last_row may see all the keys first ... last."""
    seen = (last_row < q_len) & (last < kv_len)
    if left is not None:
        seen = seen & (last_row + offset - first <= left)
    if right is not None:
        seen = seen & (last - first_row - offset <= right)
    return seen


@triton.jit
def whole_keys(
    begin, end, first_row, last_row, q_len, kv_len, offset, left, right, KEYS: tl.constexpr
):
    """Of the blocks of keys from `begin` to `end` those (begin, end) that all of them may see."""
    all_begin = begin
    if left is not None:
        all_begin = tl.maximum(begin, tl.cdiv(last_row + offset - left, KEYS) * KEYS)
    all_end = tl.minimum(end, kv_len)
    if right is not None:
        all_end = tl.minimum(all_end, first_row + offset + right + 1)
    all_end = tl.where(last_row < q_len, all_end // KEYS * KEYS, 0)
    return all_begin, tl.maximum(all_begin, all_end)


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a tile, its warps, how many tiles of a loop are in flight, and what
    `launch` takes as `registers`."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """As the kernels take them."""
        return {"QUERIES": self.queries, "KEYS": self.keys}

    @property
    def options(self) -> dict[str, Any]:
        """How to launch them."""
        return {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "fuse": True,
            "registers": self.registers,
        }


Choices = dict[int, tuple[Tiles, ...]]


@dataclass(frozen=True)
class Knobs:
    """The tiles for heads of at most so many bytes a row, the first unless `tuning`: for what needs
    no more than products, bounds and sinks, for extras such as bias and dropout, and for fp32,
    without tensor cores; in `decode` the queries are those of all heads that share keys."""

    forward: Choices
    forward_extra: Choices
    forward_fp32: Choices
    backward: Choices
    backward_extra: Choices
    backward_fp32: Choices
    decode: Choices
    decode_fp32: Choices


KNOBS = {
    80: Knobs(
        forward={
            128: (Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 2)),
            256: (Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2)),
            512: (Tiles(64, 32, 8, 2),),
        },
        forward_extra={
            128: (Tiles(64, 64, 8, 1),),
            256: (Tiles(64, 64, 8, 1),),
            512: (Tiles(32, 64, 8, 1),),
        },
        forward_fp32={256: (Tiles(16, 64, 8, 1),), 512: (Tiles(16, 16, 8, 1, 255),)},
        backward={
            128: (Tiles(32, 64, 4, 2), Tiles(64, 64, 8, 2)),
            256: (Tiles(32, 64, 8, 2), Tiles(32, 32, 4, 2)),
            512: (Tiles(32, 64, 8, 1),),
        },
        backward_extra={
            128: (Tiles(32, 64, 8, 2),),
            256: (Tiles(32, 64, 8, 1),),
            512: (Tiles(16, 64, 8, 1),),
        },
        backward_fp32={256: (Tiles(16, 64, 8, 1, 255),), 512: (Tiles(16, 16, 8, 1, 255),)},
        decode={
            256: (Tiles(16, 64, 4, 2), Tiles(16, 128, 4, 2)),
            512: (Tiles(16, 32, 4, 2),),
        },
        decode_fp32={256: (Tiles(16, 64, 8, 1),), 512: (Tiles(16, 16, 8, 1, 255),)},
    )
}


def _one_stage(choices: Choices) -> Choices:
    return {
        width: tuple(replace(tile, stages=1) for tile in tiles) for width, tiles in choices.items()
    }


# On sm_90 Triton 3.9 lets a loop of backward fetch ahead to where `wgmma` may still read.
KNOBS[90] = replace(
    KNOBS[80],
    backward=_one_stage(KNOBS[80].backward),
    backward_extra=_one_stage(KNOBS[80].backward_extra),
)
KNOBS[100] = KNOBS[80]


def run_tiled(launches: Callable[[Tiles], None], arguments: dict, direction: str) -> None:
    """Call `launches` with the tiles for these arguments, "forward", "backward" or "decode"."""
    query, key = arguments["query"], arguments["key"]
    kind = "" if direction == "decode" or arguments["PLAIN"] else "_extra"
    if query.dtype == torch.float32:
        kind = "_fp32"
    table = getattr(launch.of_architecture(KNOBS, query), direction + kind)
    widths = arguments["HEAD_WIDTH"], arguments["VALUE_WIDTH"]
    choices = table[min(n for n in table if n >= max(widths) * query.dtype.itemsize)]
    batch, heads, q_len, _ = query.shape
    bounds = arguments["left"] is not None, arguments["right"] is not None
    shape = *widths, *bounds, *tuning.rounded(batch * heads, q_len, key.shape[2])
    tuning.run(launches, choices, f"attention_{direction}{kind}", shape, query)


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
    extra = softcap or any(what is not None for what in (mask, bias, alibi_slopes, seed))
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
        # If so, tests of bounds are worth being left out where they can be.
        "PLAIN": query.dtype != torch.float32 and not extra,
        "HIDES": any(what is not None for what in (mask, bias, left, right)),
    }
