"""Rotary position embedding in eager PyTorch: the meaning, the oracle and the fallback."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> Tensor:
    """x [B, H, S, D] with its pairs turned by the angles of their positions."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]  # [B, S, angles]
    cos, sin = (table.unsqueeze(-3) for table in (cos, sin))  # [..., 1, S, angles]: for all heads
    angles = cos.shape[-1]
    turning, rest = x[..., : 2 * angles], x[..., 2 * angles :]
    wide = turning if x.dtype == torch.float64 else turning.float()
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide[..., :angles], wide[..., angles:]
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


def rope(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    query_inside: bool,
    key_inside: bool,
) -> tuple[Tensor, Tensor]:
    """(query, key) rotated, empty without a key; "inside" lays one out as [B, S, H, D]."""
    out = laid_out(rotated(query, cos, sin, positions, interleaved), query_inside)
    if key is None:
        return out, query.new_empty(0)
    return out, laid_out(rotated(key, cos, sin, positions, interleaved), key_inside)


def laid_out(x: Tensor, heads_inside: bool) -> Tensor:
    """x [B, H, S, D], in memory as [B, S, H, D] or as it says."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if heads_inside else x.contiguous()
