"""The arguments that the functions of this room share: checked, and brought to one form."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import checks, dispatch
from fastattn.ops.attention import reference


def mask_and_bias(
    mask: Tensor | None, bias: Tensor | None, query: Tensor, scores: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Both as views of four dimensions."""
    if mask is not None:
        checks.on_device("mask", mask, "query", query)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be torch.bool (True = attend), got {mask.dtype}; use bias")
        mask = checks.broadcastable("mask", mask, scores)
    if bias is not None:
        checks.floating("bias", bias)
        checks.on_device("bias", bias, "query", query)
        if bias.dtype not in (query.dtype, torch.float32):
            raise TypeError(f"bias must be {query.dtype} or torch.float32, got {bias.dtype}")
        bias = checks.broadcastable("bias", bias, scores)
    return mask, bias


def relative(relative_bias: Tensor, query: Tensor, scores: tuple[int, ...]) -> Tensor:
    """A bias by distance as [1 or B, 1 or H, Sq + Sk - 1]."""
    checks.floating("relative_bias", relative_bias)
    checks.on_device("relative_bias", relative_bias, "query", query)
    if relative_bias.dtype not in (query.dtype, torch.float32):
        raise TypeError(
            f"relative_bias must be {query.dtype} or torch.float32, got {relative_bias.dtype}"
        )
    batch, heads, q_len, kv_len = scores
    sizes = batch, heads, max(q_len + kv_len - 1, 0)
    shape = (1,) * (3 - relative_bias.dim()) + tuple(relative_bias.shape)
    fits = len(shape) == 3 and shape[0] in (1, batch) and shape[1] in (1, heads)
    if not fits or shape[2] != sizes[2]:
        raise ValueError(
            f"relative_bias must broadcast to (B, H, Sq + Sk - 1) = {list(sizes)} with all of its "
            f"last dimension, got {list(relative_bias.shape)}"
        )
    return relative_bias.reshape(shape)


def summed(bias: Tensor | None, relative_bias: Tensor, query: Tensor, kv_len: int) -> Tensor:
    """Both as the op's one bias: the relative one as it is if it is alone and a kernel knows it."""
    if bias is None and query.is_cpu and dispatch.forced() in (None, "cpu", "reference"):
        return relative_bias.contiguous()
    matrix = reference.by_distance(relative_bias, query.shape[2], kv_len)
    return matrix if bias is None else matrix + bias


def bounds(
    causal: bool, window: tuple[int | None, int | None] | None, align: str = "bottom_right"
) -> tuple[int | None, int | None]:
    """(left, right), None for no bound, of keys around a query's own position."""
    if align not in ("bottom_right", "top_left"):
        raise ValueError(f'align must be "bottom_right" or "top_left", got {align!r}')
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    left = right = None
    if window is not None:
        try:
            left, right = (None if bound in (None, -1) else bound for bound in window)
        except (TypeError, ValueError):
            raise TypeError(
                f"window must be None or a pair (left, right), got {window!r}"
            ) from None
        for bound in (left, right):
            if bound is None:
                continue
            if isinstance(bound, bool) or not isinstance(bound, (int, torch.SymInt)):
                raise TypeError(f"window must hold integers or None, got {window!r}")
            if bound < 0:
                raise ValueError(f"window must hold sizes >= 0, None or -1, got {window!r}")
    return left, 0 if causal else right


def terms_of_heads(
    alibi_slopes: Tensor | None, sinks: Tensor | None, query: Tensor, batch: int, heads: int
) -> tuple[Tensor | None, Tensor | None]:
    """Slopes as [B, H] in fp32 and sinks as [H] in fp64: one type for every kernel."""
    if alibi_slopes is not None:
        checks.floating("alibi_slopes", alibi_slopes)
        checks.on_device("alibi_slopes", alibi_slopes, "query", query)
        if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
            raise ValueError(
                f"alibi_slopes must be (H,) or (B, H) = {[batch, heads]}, "
                f"got {list(alibi_slopes.shape)}"
            )
        alibi_slopes = alibi_slopes.float().expand(batch, heads).contiguous()
    if sinks is not None:
        checks.floating("sinks", sinks)
        checks.on_device("sinks", sinks, "query", query)
        if tuple(sinks.shape) != (heads,):
            raise ValueError(f"sinks must be (H,) = {[heads]}, got {list(sinks.shape)}")
        sinks = sinks.double().contiguous()
    return alibi_slopes, sinks


def too_wide(in_fp32: int, in_others: int, *tensors: Tensor) -> list[str]:
    """The refusal of a kernel whose heads have at most so many elements, where it is due."""
    widest = in_fp32 if tensors[0].dtype == torch.float32 else in_others
    for tensor in tensors:
        if tensor.shape[3] > widest:
            return [f"heads are wider than {widest}"]
    return []


def scale_and_softcap(
    width: int, scale: float | None, softcap: float | None
) -> tuple[float, float]:
    """Both as numbers, checked: the default scale of a head `width` wide, 0 for no softcap."""
    if scale is None:
        scale = max(width, 1) ** -0.5
    checks.finite("scale", scale)
    if softcap is not None:
        checks.finite("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap must be > 0 or None, got {softcap}")
    return float(scale), float(softcap or 0.0)
