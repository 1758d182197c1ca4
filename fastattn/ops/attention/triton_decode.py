"""Decoding in Triton: programs share out the keys of a cache, and a second kernel adds up what they
leave; a third puts new keys and values there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import launch, tiles
from fastattn.ops.attention import decode
from fastattn.ops.attention.triton import attend
from fastattn.ops.attention.triton_tiles import (
    LN2,
    Pages,
    Tiles,
    exponential,
    head_of,
    keys_for,
    page_of,
    run_tiled,
    strides_of,
    width_of,
)


@triton.jit
def _length(lengths, sequence, appended, room, inside=True):
    """Of a sequence in the cache with what is appended; without room for it the kernel stops, for
    the host has not read it."""
    length = tl.load(lengths + sequence, inside, 0).to(tl.int64)
    tiles.stop_if((length < 0) | (length > room - appended))
    return length.to(tl.int32) + appended


@triton.jit
def _turned(
    rows, stride, position, inside, cos, sin, cos_strides, sin_strides, positions,
    HEAD_DIM: tl.constexpr, HEAD_WIDTH: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows [R, HEAD_WIDTH] that begin at `rows`, each turned to its position; 0 outside."""
    col = tl.arange(0, HEAD_WIDTH)[None, :]
    own = tl.load(rows[:, None] + col * stride, inside[:, None] & (col < HEAD_DIM), 0)
    if cos is not None:
        tiles.stop_if(inside & ((position < 0) | (position >= positions)))
        turns = inside[:, None] & (col < 2 * PAIRS)
        first = col % 2 == 0 if INTERLEAVED else col < PAIRS
        pair = col // 2 if INTERLEAVED else tl.where(first, col, col - PAIRS)
        apart = 1 if INTERLEAVED else PAIRS
        other = tl.load(
            rows[:, None] + tl.where(first, col + apart, col - apart) * stride, turns, 0
        )
        place = position.to(tl.int64)[:, None]
        cosine = tl.load(cos + place * cos_strides[0] + pair * cos_strides[1], turns, 1)
        sine = tl.load(sin + place * sin_strides[0] + pair * sin_strides[1], turns, 0)
        own = tiles.turned(own, other, first, cosine, sine).to(own.dtype)
    return own


@triton.jit
def attention_split(
    query, key, value, lengths, pages, cos, sin, alibi_slopes, parts, statistics, query_strides,
    key_strides, value_strides, cos_strides, sin_strides, heads, group, q_len, blocks, splits,
    appended, room, positions, left, right, scale, softcap, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, HEAD_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    HIDES: tl.constexpr,
):  # fmt: skip
    """Of QUERIES rows of the queries that share a head of keys, and a split of these: `parts`, the
    sum of weighted values, and `statistics`, the highest logit and the sum of weights."""
    # Neighbours have the heads of one split, for these may share pages of memory.
    kv_heads = heads // group
    kv_head = tl.program_id(0) % kv_heads
    split = tl.program_id(0) // kv_heads % splits
    first = tl.program_id(0) // kv_heads // splits % blocks * QUERIES
    batch = tl.program_id(0) // kv_heads // splits // blocks
    number = first + tl.arange(0, QUERIES)
    row = number // group
    head = kv_head * group + number % group

    length = _length(lengths, batch, appended, room)
    offset = length - q_len
    last = tl.minimum(first + QUERIES, group * q_len) - 1
    begin, end = keys_for(first // group, last // group, length, offset, left, right, KEYS)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), KEYS) * KEYS
    begin += split * share
    end = tl.minimum(begin + share, end)

    queries = _turned(
        head_of(query, query_strides, batch, head, row), query_strides[3], offset + row,
        row < q_len, cos, sin, cos_strides, sin_strides, positions, HEAD_DIM, HEAD_WIDTH, PAIRS,
        INTERLEAVED,
    )  # fmt: skip
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + batch * heads + head, row < q_len, 0)[:, None]
    lead = batch if pages is None else batch * 0
    # To these queries keys past the split's end are not there.
    result, highest, total = attend(
        queries, head_of(key, key_strides, lead, kv_head),
        head_of(value, value_strides, lead, kv_head), None, None, None, None, pages, key_strides,
        value_strides, None, None, batch, row, slope, None, q_len, end, begin, end, first // group,
        (first + QUERIES - 1) // group, offset, left, right, scale, softcap, None, HEAD_DIM,
        VALUE_DIM, HEAD_WIDTH, VALUE_WIDTH, KEYS, False, HIDES,
    )  # fmt: skip
    at = ((batch * heads + head).to(tl.int64) * q_len + row) * splits + split
    tl.store(statistics + 2 * at, highest, row < q_len)
    tl.store(statistics + 2 * at + 1, total, row < q_len)
    col = tl.arange(0, VALUE_WIDTH)
    inside = (row < q_len)[:, None] & (col < VALUE_DIM)[None, :]
    tl.store(parts + at[:, None] * VALUE_DIM + col[None, :], result, inside)


@triton.jit
def attention_combine(
    parts, statistics, sinks, out, lse, out_strides, heads, q_len, splits, VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, SPLITS: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Of one row: its SPLITS or fewer added up, SOME at a time, and a sink where there is one."""
    number = tl.program_id(0)
    row = number % q_len
    head = number // q_len % heads
    batch = number // q_len // heads
    first = number.to(tl.int64) * splits
    split = tl.arange(0, SPLITS)
    highest = tl.load(statistics + 2 * (first + split), split < splits, float("-inf"))
    total = tl.load(statistics + 2 * (first + split) + 1, split < splits, 0)
    top = tl.max(highest, 0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32)
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0, top)
    total = tl.sum(total * exponential(highest - base), 0)
    if sinks is not None:
        total += exponential(sink - base)
    col = tl.arange(0, VALUE_WIDTH)
    result = tl.zeros([VALUE_WIDTH], tl.float32)
    for some in range(0, splits, SOME):
        own = some + tl.arange(0, SOME)
        logit = tl.load(statistics + 2 * (first + own), own < splits, float("-inf"))
        at = (first + own)[:, None] * VALUE_DIM + col[None, :]
        inside = (own < splits)[:, None] & (col < VALUE_DIM)[None, :]
        result += tl.sum(tl.load(parts + at, inside, 0) * exponential(logit - base)[:, None], 0)
    result *= tl.where(total == 0, 0, 1 / total)
    to = head_of(out, out_strides, batch, head, row)
    tl.store(to + col * out_strides[3], result.to(out.dtype.element_ty), col < VALUE_DIM)
    logarithm = tl.where(total == 0, float("-inf"), top + tl.log2(total) * LN2)
    tl.store(lse + number, logarithm)


@triton.jit
def attention_put(
    key, value, key_cache, value_cache, lengths, pages, cos, sin, key_strides, value_strides,
    key_cache_strides, value_cache_strides, cos_strides, sin_strides, sequences, kv_heads, appended,
    room, positions, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """One new key of a head, turned to its position, and its value, into the caches."""
    head = tl.program_id(0) % kv_heads + tl.arange(0, 1)
    row = tl.program_id(0) // kv_heads % appended
    sequence = tl.program_id(0) // kv_heads // appended
    position = _length(lengths, sequence, appended, room) - appended + row
    page, slot = sequence.to(tl.int64), position
    written = False
    if pages is not None:
        page, slot = page_of(pages, sequence, position, position + 1), position % pages.size
        # Where sequences share pages the last wins, whichever comes first: it alone writes.
        for some in range(sequence, sequences, SOME):
            other = some + tl.arange(0, SOME)
            there = other < sequences
            end = _length(lengths, other, appended, room, there)
            begin = tl.where(other == sequence, position + 1, end - appended)
            begin += (slot - begin % pages.size + pages.size) % pages.size
            for step in range(0, appended, pages.size):
                at = begin + step
                inside = there & (at < end)
                same = inside & (page_of(pages, other, at, tl.where(there, end, 0)) == page)
                written = written | (tl.max(same.to(tl.int32), 0) > 0)
    mine = (head >= 0) & (not written)
    keys = _turned(
        head_of(key, key_strides, sequence, head, row), key_strides[3], position + head * 0, mine,
        cos, sin, cos_strides, sin_strides, positions, HEAD_DIM, HEAD_WIDTH, PAIRS, INTERLEAVED,
    )  # fmt: skip
    col = tl.arange(0, HEAD_WIDTH)[None, :]
    to = head_of(key_cache, key_cache_strides, page, head, slot)
    inside = mine[:, None] & (col < HEAD_DIM)
    tl.store(to[:, None] + col * key_cache_strides[3], keys, inside)
    col = tl.arange(0, VALUE_WIDTH)[None, :]
    inside = mine[:, None] & (col < VALUE_DIM)
    values = head_of(value, value_strides, sequence, head, row)[:, None] + col * value_strides[3]
    to = head_of(value_cache, value_cache_strides, page, head, slot)
    tl.store(to[:, None] + col * value_cache_strides[3], tl.load(values, inside, 0), inside)


def _cache(
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
) -> dict:
    """What the kernels of both ops take."""
    count, _, size, head_dim = key_cache.shape
    value_dim = value_cache.shape[3]
    table = block_table
    return {
        "lengths": cache_seqlens.contiguous(),
        "pages": None if table is None else Pages(table, *table.stride(), count, size),
        "room": size * (1 if table is None else table.shape[1]),
        "cos": rotary_cos,
        "sin": rotary_sin,
        "cos_strides": None if rotary_cos is None else rotary_cos.stride(),
        "sin_strides": None if rotary_sin is None else rotary_sin.stride(),
        "positions": 0 if rotary_cos is None else rotary_cos.shape[0],
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "HEAD_WIDTH": width_of(head_dim),
        "VALUE_WIDTH": width_of(value_dim),
        "PAIRS": 0 if rotary_cos is None else rotary_cos.shape[1],
        "INTERLEAVED": rotary_interleaved,
    }


def attention_append(
    key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, *pages
) -> None:
    """The op of this name."""
    batch, kv_heads, appended, _ = key.shape
    launch.launch(
        attention_put,
        (batch * kv_heads * appended,),
        {
            "key": key,
            "value": value,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "key_strides": strides_of(key),
            "value_strides": strides_of(value),
            "key_cache_strides": strides_of(key_cache),
            "value_cache_strides": strides_of(value_cache),
            "sequences": batch,
            "kv_heads": kv_heads,
            "appended": appended,
            "SOME": 32,
            **_cache(key_cache, value_cache, *pages),
        },
        writes=("key_cache", "value_cache"),
        num_warps=1,
    )


def splits_of(blocks: int, room: int) -> int:
    """Splits of the keys: enough programs to fill any GPU, whichever it is, so that the result does
    not depend on it; but none of few keys, and not so many that adding them up takes long."""
    wanted, least, most = 512, 256, 128
    return max(1, min(wanted // blocks, triton.cdiv(room, least), most))


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    appended: int,
    *rest,
) -> tuple[Tensor, Tensor]:
    """The op of this name."""
    pages, (alibi_slopes, sinks, left, right, scale, softcap) = rest[:4], rest[4:]
    out, lse = decode.decode_shapes(query, key_cache, value_cache)
    batch, heads, q_len, _ = query.shape
    kv_heads, value_dim = key_cache.shape[1], value_cache.shape[3]
    arguments = {
        "query": query,
        "key": key_cache,
        "value": value_cache,
        **_cache(key_cache, value_cache, cache_seqlens, *pages),
    }
    furthest = q_len + arguments["room"]
    arguments["left"], arguments["right"] = (
        bound if bound is None else min(bound, furthest) for bound in (left, right)
    )

    def launches(tile: Tiles) -> None:
        blocks = triton.cdiv(heads // kv_heads * q_len, tile.queries)
        splits = splits_of(batch * kv_heads * blocks, arguments["room"])
        parts = query.new_empty(batch, heads, q_len, splits, value_dim, dtype=torch.float32)
        statistics = query.new_empty(batch, heads, q_len, splits, 2, dtype=torch.float32)
        launch.launch(
            attention_split,
            (batch * kv_heads * blocks * splits,),
            {
                **arguments,
                "alibi_slopes": alibi_slopes,
                "parts": parts,
                "statistics": statistics,
                "query_strides": strides_of(query),
                "key_strides": strides_of(key_cache),
                "value_strides": strides_of(value_cache),
                "heads": heads,
                "group": heads // kv_heads,
                "q_len": q_len,
                "blocks": blocks,
                "splits": splits,
                "appended": appended,
                "scale": scale,
                "softcap": softcap or None,
                "HIDES": left is not None or (right is not None and q_len > 1),
                **tile.sizes,
            },
            writes=("parts", "statistics"),
            **tile.options,
        )
        launch.launch(
            attention_combine,
            (batch * heads * q_len,),
            {
                "parts": parts,
                "statistics": statistics,
                "sinks": sinks,
                "out": out,
                "lse": lse,
                "out_strides": strides_of(out),
                "heads": heads,
                "q_len": q_len,
                "splits": splits,
                "VALUE_DIM": value_dim,
                "VALUE_WIDTH": arguments["VALUE_WIDTH"],
                "SPLITS": triton.next_power_of_2(splits),
                "SOME": 16,
            },
            writes=("out", "lse"),
            num_warps=4,
        )

    run_tiled(launches, arguments, "decode")
    return out, lse
