"""Attention of sequences of unequal lengths, packed one behind the other without padding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import checks, dispatch, registry
from fastattn.ops import philox
from fastattn.ops.attention import ATTENTION, arguments, check_tensors, reference


def _check_boundaries(
    name: str, cu_seqlens: Tensor, query: Tensor, total: int, longest: int | None
) -> None:
    checks.on_device(name, cu_seqlens, "query", query)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be torch.int32 or torch.int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name} must be (B + 1,) with B > 0, got {list(cu_seqlens.shape)}")
    if longest is not None:
        if isinstance(longest, bool) or not isinstance(longest, (int, torch.SymInt)):
            raise TypeError(
                f"max_seqlen_{name[-1]} must be an int or None, got {type(longest).__name__}"
            )
        if longest < 0:
            raise ValueError(f"max_seqlen_{name[-1]} must be >= 0, got {longest}")
    # The kernel checks the values too, for a graph cannot.
    if not torch.compiler.is_compiling() and cu_seqlens.device.type == "cpu":
        reference.boundaries(name, cu_seqlens, total, longest)


def _varlen_args(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    align: str = "bottom_right",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> tuple:
    query, key, value = dispatch.autocast(query, key, value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.tensor(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(
                f"{name} must be (rows, heads, head_dim), got {tensor.dim()} dimensions"
            )
    query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))  # [1, H, rows, D]
    check_tensors(query, key, value)
    heads, width = query.shape[1], query.shape[3]
    _check_boundaries("cu_seqlens_q", cu_seqlens_q, query, query.shape[2], max_seqlen_q)
    _check_boundaries("cu_seqlens_k", cu_seqlens_k, query, key.shape[2], max_seqlen_k)
    batch = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k.shape[0] != batch + 1:
        raise ValueError(
            f"cu_seqlens_k must have cu_seqlens_q's {batch + 1} numbers, "
            f"got {cu_seqlens_k.shape[0]}"
        )
    left, right = arguments.bounds(causal, window, align)
    alibi_slopes, sinks = arguments.terms_of_heads(alibi_slopes, sinks, query, batch, heads)
    seed = philox.checked_seed(dropout_p, seed, query.device)
    scale, softcap = arguments.scale_and_softcap(width, scale, softcap)
    return (
        query,
        key,
        value,
        None,
        None,
        alibi_slopes,
        sinks,
        seed,
        cu_seqlens_q,
        cu_seqlens_k,
        align == "bottom_right",
        left,
        right,
        scale,
        softcap,
        float(dropout_p),
        max_seqlen_q,
        max_seqlen_k,
    )


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    align: str = "bottom_right",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of a batch of sequences of unequal lengths, packed as flash-attn packs them.

    Sequence b owns the rows cu_seqlens_q[b] ... cu_seqlens_q[b + 1] of `query` and of the result,
    and cu_seqlens_k[b] ... cu_seqlens_k[b + 1] of `key` and `value`; either may be none. All else
    is that of `attention`, each sequence on its own.

    Args:
        query: [total_q, H, D]; key: [total_k, Hkv, D]; value: [total_k, Hkv, Dv].
        cu_seqlens_q, cu_seqlens_k: [B + 1], int32 or int64, from 0 up to total_q and total_k.
        max_seqlen_q, max_seqlen_k: what no sequence may exceed; checked where given.
        alibi_slopes: [H] or [B, H].
        dropout_p, seed: a weight's bits are counted by its sequence's number, its head, and the
            positions of query and key within the sequence, so that they are those of `attention`
            of the padded batch.
        causal, window, align, scale, softcap, sinks, return_lse: as `attention`; positions count
            within a sequence.

    Returns:
        [total_q, H, Dv]; with `return_lse` also [H, total_q].

    Raises:
        TypeError: a dtype or a kind of argument is wrong. ValueError: a shape, device, head count
        or number does not fit; so for what `cu_seqlens_q` and `cu_seqlens_k` hold, which inside
        torch.compile raises RuntimeError when the graph runs, and on a GPU stops the kernel.
    """
    args = _varlen_args(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=causal,
        window=window,
        align=align,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=seed,
    )
    out, lse = ATTENTION(*args)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


registry.function("attention_varlen", _varlen_args, ATTENTION)
