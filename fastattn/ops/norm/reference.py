"""Layer and RMS normalisation in eager PyTorch: the meaning, the oracle and the fallback."""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _affine(normed: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        normed = normed * _wide(weight)
    return normed if bias is None else normed + _wide(bias)


def layer_norm(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, input + residual, mean, rstd); input [rows, cols], statistics [rows] at least fp32."""
    summed = input if residual is None else input + residual
    wide = _wide(summed)
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    out = _affine(centred * rstd, weight, bias).to(input.dtype)
    kept = input.new_empty(0) if residual is None else summed
    return out, kept, mean.squeeze(-1), rstd.squeeze(-1)


def rms_norm(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, input + residual, rstd); input [rows, cols], rstd [rows] at least fp32."""
    summed = input if residual is None else input + residual
    wide = _wide(summed)
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    out = _affine(wide * rstd, weight, None).to(input.dtype)
    kept = input.new_empty(0) if residual is None else summed
    return out, kept, rstd.squeeze(-1)
