"""Additive attention: softmax(weight . tanh(query + key)) value, after Bahdanau et al."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import checks, dispatch, registry
from fastattn.ops.additive_attention import reference


def _refusals(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, *rest: Any) -> list[str]:
    reasons = dispatch.cpu_refusals(query, key, value, weight)
    if 0 in query.shape or 0 in value.shape:
        reasons.append("a tensor is empty")
    return reasons


def _derivative(needs: tuple, args: tuple, outs: tuple, grads: tuple) -> tuple:
    found = ADDITIVE_ATTENTION.backward(grads[0], *args[:-1], *outs, args[-1])
    return (
        *(grad if need else None for grad, need in zip(found, needs[:4], strict=True)),
        None,
        None,
    )


ADDITIVE_ATTENTION = registry.op(
    "additive_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? mask,"
    " SymInt? right) -> (Tensor out, Tensor highest, Tensor total)",
    "additive_attention_bwd(Tensor grad_out, Tensor query, Tensor key, Tensor value,"
    " Tensor weight, Tensor? mask, Tensor out, Tensor highest, Tensor total, SymInt? right)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_weight)",
    reference=reference.additive_attention,
    backward_arguments=lambda grad_out, *rest: (
        (*rest[:5], rest[-1]),
        (grad_out,),
        (0, 1, 2, 3),
    ),
    backward_fake=lambda grad_out, query, key, value, weight, *rest: (
        *(
            torch.empty_like(t.transpose(1, 2).contiguous()).transpose(1, 2)
            for t in (query, key, value)
        ),
        torch.empty_like(weight),
    ),
    derivative=_derivative,
    kernels={"cpu": _refusals},
    keep=(0, 1, 2),
)


def _checked(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> None:
    checks.floating("query", query)
    if query.dim() != 4:
        raise ValueError(f"query must be (B, H, Sq, D), got {query.dim()} dimensions")
    batch, heads, _, width = query.shape
    for name, tensor in (("key", key), ("value", value), ("weight", weight)):
        checks.same(name, tensor, "query", query, shape=False)
    for name, tensor, last in (("key", key, "D"), ("value", value, "Dv")):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (B, H, Sk, {last}), got {tensor.dim()} dimensions")
        if tensor.shape[:2] != (batch, heads):
            raise ValueError(
                f"{name} must have query's (B, H) {[batch, heads]}, got {list(tensor.shape[:2])}"
            )
    if key.shape[3] != width:
        raise ValueError(f"key must have query's width {width}, got {key.shape[3]}")
    if value.shape[2] != key.shape[2]:
        raise ValueError(f"value must have key's length {key.shape[2]}, got {value.shape[2]}")
    if tuple(weight.shape) not in ((width,), (heads, width)):
        raise ValueError(
            f"weight must be (D,) or (H, D) = {[heads, width]}, got {list(weight.shape)}"
        )


def _args(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
) -> tuple:
    query, key, value, weight = dispatch.autocast(query, key, value, weight)
    _checked(query, key, value, weight)
    batch, heads, q_len, width = query.shape
    kv_len = key.shape[2]
    if mask is not None:
        checks.on_device("mask", mask, "query", query)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be torch.bool (True = attend), got {mask.dtype}")
        mask = checks.broadcastable("mask", mask, (batch, heads, q_len, kv_len))
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    weight = weight.expand(heads, width).contiguous()
    return query, key, value, weight, mask, kv_len - q_len if causal else None


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Additive attention (Bahdanau et al. 2015, arXiv:1409.0473) in O(Sq + Sk) memory.

    `softmax(sum over d of weight[d] * tanh(query[d] + key[d])) value`. `query` and `key` are
    already projected, `W_q q` and `W_k k` in the paper: `fastattn.nn.AdditiveAttention` does both.
    Neither direction makes a tensor of (Sq, Sk) or (Sq, Sk, D).

    Args:
        query: [B, H, Sq, D]; key: [B, H, Sk, D]; value: [B, H, Sk, Dv]. fp32, bf16, fp16 or fp64
            with any strides.
        weight: [D], or [H, D] for one of its own per head.
        mask: bool, True = attend, broadcastable to [B, H, Sq, Sk].
        causal: a query sees its own and earlier keys only, the last query meeting the last key.

    Returns:
        [B, H, Sq, Dv] in query's dtype, laid out as [B, Sq, H, Dv]. A query that sees no key
        gives 0.

    Raises:
        TypeError: a dtype or a kind of argument is wrong. ValueError: a shape or device does not
        fit.
    """
    return ADDITIVE_ATTENTION(*_args(query, key, value, weight, mask=mask, causal=causal))[0]


registry.function("additive_attention", _args, ADDITIVE_ATTENTION)
