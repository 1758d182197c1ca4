"""Attention: softmax(query key^T * scale + bias) value, with all that the models add to it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import checks, dispatch, registry
from fastattn.ops import philox
from fastattn.ops.attention import arguments, reference

SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? alibi_slopes,"
    " Tensor? sinks, Tensor? seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, {outputs}"
    "bool bottom_right, SymInt? left, SymInt? right, float scale, float softcap, float dropout_p,"
    " SymInt? max_seqlen_q, SymInt? max_seqlen_k"
)
QUERY, KEY, VALUE, BIAS, SLOPES, SINKS = 0, 1, 2, 4, 5, 6
TENSORS = 10


def _refusals(*args: Any) -> list[str]:
    query, value = args[QUERY], args[VALUE]
    reasons = dispatch.cpu_refusals(*args[:3], args[BIAS], args[SLOPES], args[SINKS])
    if args[SLOPES] is not None and args[SLOPES].requires_grad:
        reasons.append("alibi_slopes requires a gradient")
    if 0 in query.shape or 0 in value.shape:
        reasons.append("a tensor is empty")
    return reasons


def _gpu_refusals(common: Callable[..., list[str]], *args: Any) -> list[str]:
    query, value = args[QUERY], args[VALUE]
    reasons = common(*args[:3], args[BIAS])
    if args[SLOPES] is not None and args[SLOPES].requires_grad:
        reasons.append("alibi_slopes requires a gradient")
    if 0 in query.shape or 0 in value.shape:
        reasons.append("a tensor is empty")
    return reasons + arguments.too_wide(128, 256, query, value)


def _derivative(needs: tuple, args: tuple, outs: tuple, grads: tuple) -> tuple:
    grad_out, grad_lse = grads
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    if grad_out is not None and grad_out.is_cuda and grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()  # of a sum, say: kernels would go element by element
    found = ATTENTION.backward(
        grad_out, grad_lse, *args[:TENSORS], *outs, *args[TENSORS:], needs[BIAS], needs[SINKS]
    )
    by_position = dict(zip((QUERY, KEY, VALUE, BIAS, SINKS), found, strict=True))
    return tuple(by_position.get(i) if needs[i] else None for i in range(len(args)))


def forward_shapes(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Empty (out, lse), laid out as every kernel lays them out."""
    batch, heads, q_len, _ = query.shape
    out = query.new_empty(batch, q_len, heads, value.shape[3]).transpose(1, 2)
    return out, query.new_empty(batch, heads, q_len, dtype=reference.wide(query.dtype))


def _backward_arguments(grad_out: Tensor, grad_lse: Tensor, *rest: Any) -> tuple:
    forward_args = (*rest[:TENSORS], *rest[TENSORS + 2 : -2])
    return forward_args, (grad_out, grad_lse), (QUERY, KEY, VALUE, BIAS, SINKS)


def backward_shapes(
    grad_out: Tensor | None, grad_lse: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """Empty gradients, laid out likewise; of no elements for what needs none."""
    need_bias, need_sinks = rest[-2:]
    query, key, value = rest[:3]
    return (
        *(
            torch.empty_like(t.transpose(1, 2).contiguous()).transpose(1, 2)
            for t in (query, key, value)
        ),
        *(
            torch.empty(t.shape, dtype=t.dtype, device=t.device)
            if need and t is not None
            else query.new_empty(0)
            for need, t in ((need_bias, rest[BIAS]), (need_sinks, rest[SINKS]))
        ),
    )


ATTENTION = registry.op(
    f"attention_fwd({SCHEMA.format(outputs='')}) -> (Tensor out, Tensor lse)",
    "attention_bwd(Tensor? grad_out, Tensor? grad_lse, "
    f"{SCHEMA.format(outputs='Tensor out, Tensor lse, ')}, bool need_bias, bool need_sinks)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias,"
    " Tensor grad_sinks)",
    reference=reference.attention,
    fake=forward_shapes,
    backward_arguments=_backward_arguments,
    backward_fake=backward_shapes,
    derivative=_derivative,
    kernels={
        "cpu": _refusals,
        "cuda": functools.partial(_gpu_refusals, dispatch.cuda_refusals),
        "triton": functools.partial(_gpu_refusals, dispatch.triton_refusals),
    },
    differentiable=2,
    keep=(0, 1),
)


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Three tensors of four dimensions that belong together."""
    checks.floating("query", query)
    if query.dim() != 4:
        raise ValueError(f"query must be (B, H, Sq, D), got {query.dim()} dimensions")
    batch, heads, _, width = query.shape
    shapes = []  # a shape is slow to ask for
    for name, tensor in (("key", key), ("value", value)):
        checks.same(name, tensor, "query", query, shape=False)
        shape = tensor.shape
        if len(shape) != 4:
            raise ValueError(f"{name} must be (B, Hkv, Sk, head_dim), got {len(shape)} dimensions")
        if shape[0] != batch:
            raise ValueError(f"{name} must have query's batch {batch}, got {shape[0]}")
        shapes.append(shape)
    (_, kv_heads, kv_len, key_width), (_, *of_value, _) = shapes
    if key_width != width:
        raise ValueError(f"key must have query's head_dim {width}, got {key_width}")
    if of_value != [kv_heads, kv_len]:
        raise ValueError(f"value must have key's (Hkv, Sk) {[kv_heads, kv_len]}, got {of_value}")
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(
            f"key must have a number of heads that divides query's {heads}, got {kv_heads}"
        )


def _attention_args(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
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
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> tuple:
    query, key, value = dispatch.autocast(query, key, value)
    check_tensors(query, key, value)
    batch, heads, q_len, width = query.shape
    kv_len = key.shape[2]
    left, right = arguments.bounds(causal, window, align)
    sizes = batch, heads, q_len, kv_len
    mask, bias = arguments.mask_and_bias(mask, bias, query, sizes)
    if relative_bias is not None:
        relative_bias = arguments.relative(relative_bias, query, sizes)
        bias = arguments.summed(bias, relative_bias, query, kv_len)
    alibi_slopes, sinks = arguments.terms_of_heads(alibi_slopes, sinks, query, batch, heads)
    seed = philox.checked_seed(dropout_p, seed, query.device)
    scale, softcap = arguments.scale_and_softcap(width, scale, softcap)
    return (
        query,
        key,
        value,
        mask,
        bias,
        alibi_slopes,
        sinks,
        seed,
        None,
        None,
        align == "bottom_right",
        left,
        right,
        scale,
        softcap,
        float(dropout_p),
        None,
        None,
    )


def _plain_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    bottom_right: bool,
    scale: float | None,
    grouped: bool,
) -> tuple:
    """What the op takes of a plain call that needs a gradient."""
    if query.dim() != 4 or (bias is not None and bias.dim() != 4):
        raise ValueError("query or bias")
    if not grouped and query.shape[:2] != key.shape[:2]:
        raise ValueError("key")
    scale, softcap = arguments.scale_and_softcap(query.shape[3], scale, None)
    right = 0 if causal else None
    terms = mask, bias, *[None] * 5
    return (
        *(query, key, value, *terms),
        *(bottom_right, None, right, scale, softcap, 0.0, None, None),
    )


PLAIN_ATTENTION = registry.plain_op(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, bool causal,"
    " bool bottom_right, float? scale, bool grouped) -> Tensor",
    ATTENTION,
    _plain_arguments,
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
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
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention (Vaswani et al. 2017) in O(Sq + Sk) memory.

    `softmax(softcap(scale * query key^T) + bias - slope * distance) value`, computed block by block
    with an online softmax (Dao et al. 2022, arXiv:2205.14135); backward recomputes the scores.

    Args:
        query: [B, H, Sq, D]; key: [B, Hkv, Sk, D]; value: [B, Hkv, Sk, Dv]. fp32, bf16, fp16 or
            fp64 with any strides; H is a multiple of Hkv (grouped heads, arXiv:2305.13245).
        mask: bool, True = attend, broadcastable to [B, H, Sq, Sk].
        bias: added to the scores, broadcastable likewise, in query's dtype or fp32; -inf masks.
            Receives a gradient, summed over its broadcast dimensions.
        relative_bias: added too, by the distance of key and query alone (T5, arXiv:1910.10683):
            element j - i + Sq - 1 to the score of query i and key j. Broadcastable to
            [B, H, Sq + Sk - 1], in query's dtype or fp32; receives its gradient. On the CPU no
            matrix of it is made, unless `bias` is given too.
        causal: a query sees its own and earlier keys only.
        window: (left, right), the number of keys that a query sees on either side of its own
            position; None or -1 is no bound.
        align: what `causal`, `window` and `alibi_slopes` take as a query's own position where
            Sq != Sk: "bottom_right" lets the last query meet the last key (as flash-attn does),
            "top_left" the first the first (as PyTorch does).
        scale: D ** -0.5 unless given.
        softcap: scores become softcap * tanh(score / softcap) before bias (Gemma 2).
        alibi_slopes: [H] or [B, H]; subtracts slope * |own position - key| (arXiv:2108.12409).
        sinks: [H], a score that joins every softmax without a value (arXiv:2309.17453).
        dropout_p: probability of dropping an attention weight, the rest scaled by 1 / (1 - p).
            Bits come from Philox 4x32-10, counted by position, the same for any kernel and any
            number of threads.
        seed: an int or one int64 for dropout; drawn from torch's generator when None.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        [B, H, Sq, Dv] in query's dtype, laid out as [B, Sq, H, Dv] so that
        `.transpose(1, 2).flatten(2)` copies nothing. A query that sees no key gives 0. With
        `return_lse` also [B, H, Sq] in fp32 (fp64 for fp64), -inf for a query that sees nothing;
        it is differentiable.

    Raises:
        TypeError: a dtype or a kind of argument is wrong. ValueError: a shape, device, head count
        or number does not fit.
    """
    if (
        window is softcap is alibi_slopes is sinks is relative_bias is None
        and type(causal) is bool
        and align in ("bottom_right", "top_left")
        and (scale is None or type(scale) is float)
        and return_lse is False
        and philox.unused(dropout_p, seed)
    ):
        options = causal, align == "bottom_right", scale, True
        out = PLAIN_ATTENTION(query, key, value, mask, bias, *options)
        if out is not None:
            return out
    outs = ATTENTION(
        *_attention_args(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            relative_bias=relative_bias,
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
    )
    return outs if return_lse else outs[0]


def _lead(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """The dimensions in front of Sq and E of the result."""
    shapes = [list(t.shape) for t in (query, key, value)]
    if enable_gqa:
        if len({(t.dim(), t.shape[:-3]) for t in (query, key, value)}) > 1 or query.dim() < 3:
            raise ValueError(
                "query, key and value must be (..., heads, S, E) with equal batch dimensions for "
                f"enable_gqa, got {shapes}"
            )
        return query.shape[:-2]
    try:
        return torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"query, key and value must have matching batch dimensions, got {shapes}"
        ) from None


def _sdpa_args(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple:
    query, key, value, attn_mask = dispatch.autocast(query, key, value, attn_mask)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.tensor(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{name} must be (..., S, E), got {tensor.dim()} dimensions")
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None when is_causal is True, got both")
    lead = _lead(query, key, value, enable_gqa)
    if not enable_gqa:
        query, key, value = (t.expand(*lead, *t.shape[-2:]) for t in (query, key, value))
    if attn_mask is not None:
        checks.on_device("attn_mask", attn_mask, "query", query)
        if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
            raise TypeError(
                f"attn_mask must be torch.bool, torch.float32 or query's {query.dtype}, "
                f"got {attn_mask.dtype}"
            )
        scores = (*lead, query.shape[-2], key.shape[-2])
        try:
            # Expanded only where its dimensions are merged: a mask is not copied needlessly.
            expanded = attn_mask.expand(scores)
            attn_mask = attn_mask if len(lead) == 2 else expanded
        except RuntimeError:
            raise ValueError(
                f"attn_mask must broadcast to {list(scores)}, got {list(attn_mask.shape)}"
            ) from None
    if len(lead) != 2:
        batch = math.prod(lead[:-1]) if enable_gqa else 1
        query, key, value, attn_mask = (
            t
            if t is None
            else t.reshape(batch, t.shape[-3] if enable_gqa else math.prod(lead), *t.shape[-2:])
            for t in (query, key, value, attn_mask)
        )
    boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    return _attention_args(
        query,
        key,
        value,
        mask=attn_mask if boolean else None,
        bias=None if boolean else attn_mask,
        causal=bool(is_causal),
        align="top_left",
        scale=scale,
        dropout_p=dropout_p,
    )


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, argument for argument.

    Args:
        query: [..., Sq, E]; key: [..., Sk, E]; value: [..., Sk, Ev].
        attn_mask: bool (True = attend), or query's dtype or fp32 and added to the scores;
            broadcastable to [..., Sq, Sk]. An added mask receives a gradient.
        dropout_p: applied whenever it is > 0, in training or not.
        is_causal: a causal mask aligned to the top left; not together with `attn_mask`.
        scale: E ** -0.5 unless given.
        enable_gqa: query may have a multiple of key's and value's heads.

    Returns:
        [..., Sq, Ev] in query's dtype.

    Raises:
        TypeError, ValueError: as `attention`.
    """
    if (
        type(is_causal) is type(enable_gqa) is bool
        and (attn_mask is None or not is_causal)
        and (scale is None or type(scale) is float)
        and philox.unused(dropout_p, None)
    ):
        boolean = getattr(attn_mask, "dtype", None) is torch.bool
        mask, bias = (attn_mask, None) if boolean else (None, attn_mask)
        out = PLAIN_ATTENTION(query, key, value, mask, bias, is_causal, False, scale, enable_gqa)
        if out is not None:
            return out
    args = _sdpa_args(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    out = ATTENTION(*args)[0]
    lead = _lead(query, key, value, enable_gqa)
    return out if len(lead) == 2 else out.reshape(*lead, *out.shape[-2:])


registry.function("attention", _attention_args, ATTENTION)
registry.function("scaled_dot_product_attention", _sdpa_args, ATTENTION)
