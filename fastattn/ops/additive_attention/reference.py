"""Additive attention in eager PyTorch: the meaning, the oracle and the fallback."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    right: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, H, Sq, Dv], highest score and sum of exp(score - highest), each [B, H, Sq]).

    weight is [H, D]; scores and softmax are at least fp32. Query i sees the keys up to i + right,
    all if None. What a query does not see does not touch it, NaN or not; one that sees a
    non-finite value gives NaN, and one that sees nothing 0.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    q_len, kv_len = query.shape[2], key.shape[2]
    seen = torch.ones((), dtype=torch.bool, device=query.device) if mask is None else mask
    if right is not None:
        rows = torch.arange(q_len, device=query.device)[:, None]
        seen = seen & (torch.arange(kv_len, device=query.device) <= rows + right)
    features = query[:, :, :, None] + key[:, :, None]  # [B, H, Sq, Sk, D]
    features = features.masked_fill(~seen[..., None], 0)
    # A weight for each query, so that the chains of its gradient are no longer than the keys.
    weights = weight[:, None].expand(-1, q_len, -1)  # [H, Sq, D]
    scores = torch.einsum("bhqkd,hqd->bhqk", torch.tanh(features), weights).to(wide)
    scores = scores.masked_fill(~seen, -math.inf)
    if kv_len:
        highest = scores.detach().amax(-1, keepdim=True)
        highest = highest.masked_fill(highest == -math.inf, 0)
    else:  # no keys, of which there is no maximum
        highest = scores.new_zeros(*scores.shape[:-1], 1)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    weights = (weights / total.masked_fill(total == 0, 1)).masked_fill(~seen, 0).to(value.dtype)
    strange = ~value.isfinite().all(-1)[:, :, None]  # [B, H, 1, Sk]
    spoilt = (seen & strange).any(-1, keepdim=True)  # [B, H, Sq, 1]
    out = weights @ value.masked_fill(~value.isfinite(), 0)
    out = out * torch.where(spoilt, math.nan, 1.0).to(out.dtype)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, highest.squeeze(-1), total.squeeze(-1)
