"""Attention written out in eager PyTorch: the meaning, the oracle and the fallback."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from fastattn.ops import philox


def wide(dtype: torch.dtype) -> torch.dtype:
    """What scores, softmax and lse are computed in: at least fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def visible(
    position: Tensor,
    kv_len: int,
    mask: Tensor | None,
    bias: Tensor | None,
    left: int | None,
    right: int | None,
) -> Tensor | None:
    """Bool, broadcastable to [B, H, Sq, Sk]: which key a query may see; None when it sees all.

    The query at `position` p sees keys p - left ... p + right, where None has no bound.
    """
    bands = []
    key = torch.arange(kv_len, device=position.device)
    if left is not None:
        bands.append(key >= position[:, None] - left)
    if right is not None:
        bands.append(key <= position[:, None] + right)
    if bias is not None:
        bands.append(bias != -math.inf)
    seen = mask
    for band in bands:
        seen = band if seen is None else seen & band
    return seen


def by_distance(bias: Tensor, q_len: int, kv_len: int) -> Tensor:
    """The matrix [..., Sq, Sk] whose element (i, j) is bias[..., j - i + Sq - 1]."""
    if q_len == 0 or kv_len == 0:
        return bias.new_zeros(*bias.shape[:-1], q_len, kv_len)
    return bias.unfold(-1, kv_len, 1).flip(-2)


def spoilt(seen: Tensor | None, query: Tensor, *keys: Tensor) -> Tensor | None:
    """Bool [B, H, Sq, 1]: which query sees something that is not finite, or is it itself.

    None where nothing is hidden, and arithmetic spreads a NaN by itself.
    """
    if seen is None:
        return None
    finite = query.isfinite().all(-1, keepdim=True)
    for key in keys:
        finite = finite & key.isfinite().all(-1)[:, :, None]
    return (seen & ~finite).any(-1, keepdim=True)


def softmax(
    query: Tensor,
    key: Tensor,
    seen: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    position: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """(weights [B, H, Sq, Sk], lse [B, H, Sq]) of finite queries and keys with equal heads."""
    batch, heads, q_len, _ = query.shape
    kv_len, dtype = key.shape[2], wide(query.dtype)
    scores = (query @ key.transpose(-1, -2)).to(dtype) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.masked_fill(~seen, 0)
    if alibi_slopes is not None:
        distance = (position[:, None] - torch.arange(kv_len, device=query.device)).abs()
        scores = scores - alibi_slopes.to(dtype).expand(batch, heads)[..., None, None] * distance
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        column = sinks.to(dtype)[None, :, None, None].expand(batch, -1, q_len, 1)
        scores = torch.cat([scores, column], -1)
    if scores.shape[-1]:
        highest = scores.detach().amax(-1, keepdim=True)
        highest = highest.masked_fill(highest == -math.inf, 0)
    else:  # no keys, of which there is no maximum
        highest = scores.new_zeros(*scores.shape[:-1], 1)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    lse = (highest + torch.log(total)).squeeze(-1)
    return weights[..., :kv_len] / total.masked_fill(total == 0, 1), lse


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
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
) -> tuple[Tensor, Tensor]:
    """(out [B, H, Sq, Dv], lse [B, H, Sq]); scores, softmax and lse are at least fp32.

    A query that sees a non-finite key or value, or is one itself, gives NaN; one that does not see
    it is untouched by it. A query that sees nothing gives 0 and an lse of -inf. With `cu_seqlens_q`
    and `cu_seqlens_k` the rows of a batch of one are those of sequences, each on its own. A bias of
    three dimensions is one `by_distance`.
    """
    if bias is not None and bias.dim() == 3:
        bias = by_distance(bias, query.shape[2], key.shape[2])
    options = bottom_right, left, right, scale, softcap, dropout_p
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _attention(query, key, value, mask, bias, alibi_slopes, sinks, seed, 0, *options)
    heads, outs, lses = query.shape[1], [], []
    pairs = zip(
        boundaries("cu_seqlens_q", cu_seqlens_q, query.shape[2], max_seqlen_q),
        boundaries("cu_seqlens_k", cu_seqlens_k, key.shape[2], max_seqlen_k),
        strict=True,
    )
    for n, (rows, keys) in enumerate(pairs):
        slopes = alibi_slopes if alibi_slopes is None else alibi_slopes[n : n + 1]
        out, lse = _attention(
            query[:, :, rows],
            key[:, :, keys],
            value[:, :, keys],
            mask,
            bias,
            slopes,
            sinks,
            seed,
            n * heads,
            *options,
        )
        outs.append(out)
        lses.append(lse)
    return _rows_first(torch.cat(outs, 2)), torch.cat(lses, 2)


def boundaries(name: str, cu_seqlens: Tensor, total: int, longest: int | None) -> list[slice]:
    """The rows of each sequence of a packed batch of `total` rows, which are checked."""
    ends = cu_seqlens.tolist()
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != total:
        raise ValueError(
            f"{name} must begin with 0 and end with the number of rows, {total}, got "
            + (f"{ends[0]} ... {ends[-1]}" if len(ends) > 1 else f"{ends}")
        )
    for n, (begin, end) in enumerate(pairwise(ends)):
        if end < begin:
            raise ValueError(f"{name} must not decrease, got {begin}, {end} at {n}")
        if longest is not None and end - begin > longest:
            raise ValueError(
                f"max_seqlen_{name[-1]} must be at least the longest sequence, got {longest} for "
                f"one of {end - begin}"
            )
    return [slice(begin, end) for begin, end in pairwise(ends)]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    first_head: int,
    bottom_right: bool,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """One batch of sequences of equal length; dropout counts heads from `first_head` on."""
    batch, heads, q_len, _ = query.shape
    groups, kv_len = heads // key.shape[1], key.shape[2]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"bias must be floating, got {bias.dtype}")
    position = torch.arange(q_len, device=query.device) + (kv_len - q_len if bottom_right else 0)
    seen = visible(position, kv_len, mask, bias, left, right)
    bad = spoilt(seen, query, key, value)
    if bad is not None:
        query, key, value = (t.masked_fill(~t.isfinite(), 0) for t in (query, key, value))
    weights, lse = softmax(query, key, seen, bias, alibi_slopes, sinks, position, scale, softcap)
    if dropout_p:
        kept = philox.keep(seed, batch * heads, q_len, kv_len, dropout_p, first_head)
        kept = kept.view(weights.shape)
        weights = (
            (weights / (1 - dropout_p)).masked_fill(~kept, 0) if dropout_p < 1 else weights * 0
        )
    out = weights.to(value.dtype) @ value
    if bad is not None:
        out = out * torch.where(bad, math.nan, 1.0).to(out.dtype)
    return _rows_first(out), lse


def rotated(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, first: int, interleaved: bool
) -> Tensor:
    """x [H, S, D] turned by the angles of the positions `first` ... `first` + S (RoPE)."""
    if cos is None or sin is None:
        return x
    if first < 0 or first + x.shape[1] > cos.shape[0]:
        raise ValueError(f"rotary_cos must have a row for every position, got {cos.shape[0]}")
    dtype, pairs = wide(x.dtype), cos.shape[1]
    cos, sin = (table[first : first + x.shape[1]].to(dtype) for table in (cos, sin))
    turned, rest = x[..., : 2 * pairs].to(dtype), x[..., 2 * pairs :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


def slots(
    block_table: Tensor | None, sequence: int, first: int, end: int, cache: Tensor
) -> tuple[Tensor, Tensor]:
    """Pages and the places in them of the positions `first` ... `end` of a sequence."""
    position = torch.arange(first, end, device=cache.device)
    room = cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    if not 0 <= first <= end <= room:
        raise ValueError(
            f"cache_seqlens must leave {room} places unexceeded, got {first} ... {end}"
        )
    if block_table is None:
        return torch.full_like(position, sequence), position
    return block_table[sequence].long()[position // cache.shape[2]], position % cache.shape[2]


def append(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
) -> None:
    """Write key and value [B, Hkv, Sn, D] into the caches, in place, behind what is there."""
    for b, length in enumerate(cache_seqlens.tolist()):
        pages, places = slots(block_table, b, length, length + key.shape[2], key_cache)
        turned = rotated(key[b], rotary_cos, rotary_sin, length, rotary_interleaved)
        key_cache[pages, :, places] = turned.transpose(0, 1)
        value_cache[pages, :, places] = value[b].transpose(0, 1)


def decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    appended: int,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, Sq, Dv], lse [B, H, Sq]): `attention` of each sequence to its part of a cache."""
    outs, lses = [], []
    for b, length in enumerate((cache_seqlens + appended).tolist()):
        pages, places = slots(block_table, b, 0, length, key_cache)
        key, value = (
            cache[pages, :, places].transpose(0, 1)[None] for cache in (key_cache, value_cache)
        )
        first = length - query.shape[2]
        turned = rotated(query[b], rotary_cos, rotary_sin, first, rotary_interleaved)[None]
        slopes = alibi_slopes if alibi_slopes is None else alibi_slopes[b : b + 1]
        terms = None, None, slopes, sinks, None, 0
        out, lse = _attention(turned, key, value, *terms, True, left, right, scale, softcap, 0.0)
        outs.append(out)
        lses.append(lse)
    return _rows_first(torch.cat(outs)), torch.cat(lses)


def _rows_first(out: Tensor) -> Tensor:
    return out.transpose(1, 2).contiguous().transpose(1, 2)
