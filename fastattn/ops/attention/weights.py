"""The weights of attention themselves, of chosen heads and queries, for looking at them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.ops.attention import arguments, check_tensors, reference


def _chosen(name: str, chosen: Sequence[int] | Tensor | None, size: int, like: Tensor) -> Tensor:
    """Indices in [0, size), of which negative ones count from the end."""
    if chosen is None:
        return torch.arange(size, device=like.device)
    try:
        index = torch.as_tensor(chosen, device=like.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must be a sequence of integers or None, got {type(chosen).__name__}"
        ) from None
    if index.numel() == 0 and not isinstance(chosen, Tensor):
        index = index.long()
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must hold integers, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"{name} must be of one dimension, got {index.dim()}")
    if index.numel() and not (index.min() >= -size and index.max() < size):
        raise ValueError(f"{name} must lie in [{-size}, {size}), got {index.tolist()}")
    return index.long() % max(size, 1)


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    heads: Sequence[int] | Tensor | None = None,
    rows: Sequence[int] | Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    align: str = "bottom_right",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The weights by which `attention` mixes the values, for chosen heads and query rows.

    Made of PyTorch's own functions: differentiable in any mode, with no memory for what was not
    chosen.

    Args:
        query: [B, H, Sq, D]; key: [B, Hkv, Sk, D].
        heads: which of the H heads, in this order; all if None.
        rows: which of the Sq queries, in this order; all if None.
        mask, bias, relative_bias, causal, window, align, scale, softcap, alibi_slopes, sinks: as
            `attention`, of all heads and rows.

    Returns:
        [B, chosen heads, chosen rows, Sk] in fp32 (fp64 for fp64). A row sums to one; to less with
        sinks, and to zero where nothing is seen.

    Raises:
        TypeError: a dtype or a kind of argument is wrong. ValueError: a shape, device, head count
        or number does not fit.
    """
    query, key = dispatch.autocast(query, key)
    check_tensors(query, key, key)
    batch, all_heads, q_len, width = query.shape
    groups, kv_len = all_heads // max(key.shape[1], 1), key.shape[2]
    left, right = arguments.bounds(causal, window, align)
    sizes = batch, all_heads, q_len, kv_len
    mask, bias = arguments.mask_and_bias(mask, bias, query, sizes)
    if relative_bias is not None:
        relative_bias = arguments.relative(relative_bias, query, sizes)
    alibi_slopes, sinks = arguments.terms_of_heads(alibi_slopes, sinks, query, batch, all_heads)
    scale, softcap = arguments.scale_and_softcap(width, scale, softcap)
    heads = _chosen("heads", heads, all_heads, query)
    rows = _chosen("rows", rows, q_len, query)

    def part(scores: Tensor | None) -> Tensor | None:
        """What broadcasts to [B, H, Sq, Sk], for the chosen heads and rows."""
        if scores is not None and scores.shape[1] > 1:
            scores = scores.index_select(1, heads)
        if scores is not None and scores.shape[2] > 1:
            scores = scores.index_select(2, rows)
        return scores

    query, mask, bias = part(query), part(mask), part(bias)
    if relative_bias is not None:
        if relative_bias.shape[1] > 1:
            relative_bias = relative_bias.index_select(1, heads)
        keys = torch.arange(kv_len, device=query.device)
        of_rows = relative_bias[..., keys - rows[:, None] + q_len - 1]  # [B, heads, rows, Sk]
        bias = of_rows if bias is None else bias + of_rows
    key = key.index_select(1, heads // max(groups, 1))
    alibi_slopes, sinks = (
        terms if terms is None else terms.index_select(-1, heads) for terms in (alibi_slopes, sinks)
    )
    position = rows + (kv_len - q_len if align == "bottom_right" else 0)
    seen = reference.visible(position, kv_len, mask, bias, left, right)
    bad = reference.spoilt(seen, query, key)
    if bad is not None:
        query, key = (t.masked_fill(~t.isfinite(), 0) for t in (query, key))
    weights, _ = reference.softmax(
        query, key, seen, bias, alibi_slopes, sinks, position, scale, softcap
    )
    return weights if bad is None else weights.masked_fill(bad & seen, math.nan)
