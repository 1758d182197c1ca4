"""Attention written out in eager PyTorch: the meaning, the oracle and the fallback."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.ops import philox


def visible(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    offset: int,
    left: int | None,
    right: int | None,
) -> Tensor | None:
    """Bool, broadcastable to [B, H, Sq, Sk]: which key a query may see; None when it sees all.

    Query i sees keys i + offset - left ... i + offset + right, where None has no bound.
    """
    seen = mask
    if left is not None or right is not None:
        rows = torch.arange(query.shape[2], device=query.device)[:, None] + offset
        cols = torch.arange(key.shape[2], device=query.device)
        if left is not None:
            band = cols >= rows - left
            seen = band if seen is None else seen & band
        if right is not None:
            band = cols <= rows + right
            seen = band if seen is None else seen & band
    return seen


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    offset: int,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, Sq, Dv], lse [B, H, Sq]); scores, softmax and lse are at least fp32.

    A query that sees a non-finite key or value, or is one itself, gives NaN; one that does not see
    it is untouched by it. A query that sees nothing gives 0 and an lse of -inf.
    """
    batch, heads, q_len, _ = query.shape
    groups, kv_len = heads // key.shape[1], key.shape[2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    seen = visible(query, key, mask, offset, left, right)
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"bias must be floating, got {bias.dtype}")
    if bias is not None and seen is not None:
        bias = bias.masked_fill(~seen, 0)
    if bias is not None:
        hidden = bias == -math.inf
        seen = ~hidden if seen is None else seen & ~hidden
    spoilt = None
    if seen is not None:
        finite_key = (key.isfinite().all(-1) & value.isfinite().all(-1))[:, :, None]
        finite_query = query.isfinite().all(-1, keepdim=True)
        spoilt = (seen & ~(finite_key & finite_query)).any(-1, keepdim=True)
        query, key, value = (t.masked_fill(~t.isfinite(), 0) for t in (query, key, value))
    scores = (query @ key.transpose(-1, -2)).to(wide) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if alibi_slopes is not None:
        rows = torch.arange(q_len, device=query.device)[:, None] + offset
        distance = (rows - torch.arange(kv_len, device=query.device)).abs()
        scores = scores - alibi_slopes.to(wide).expand(batch, heads)[..., None, None] * distance
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        column = sinks.to(wide)[None, :, None, None].expand(batch, -1, q_len, 1)
        scores = torch.cat([scores, column], -1)
    if scores.shape[-1]:
        highest = scores.detach().amax(-1, keepdim=True)
        highest = highest.masked_fill(highest == -math.inf, 0)
    else:  # no keys, of which there is no maximum
        highest = scores.new_zeros(*scores.shape[:-1], 1)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    lse = (highest + torch.log(total)).squeeze(-1)
    weights = weights[..., :kv_len] / total.masked_fill(total == 0, 1)
    if dropout_p:
        kept = philox.keep(seed, batch * heads, q_len, kv_len, dropout_p).view(weights.shape)
        weights = (
            (weights / (1 - dropout_p)).masked_fill(~kept, 0) if dropout_p < 1 else weights * 0
        )
    out = weights.to(value.dtype) @ value
    if spoilt is not None:
        out = out * torch.where(spoilt, math.nan, 1.0).to(out.dtype)
    return _rows_first(out), lse


def _rows_first(out: Tensor) -> Tensor:
    return out.transpose(1, 2).contiguous().transpose(1, 2)
