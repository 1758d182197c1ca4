"""Layer and RMS normalisation in eager PyTorch: the meaning, the oracle and the fallback."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.ops import philox


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _sum(
    input: Tensor, residual: Tensor | None, seed: Tensor | None, dims: int, dropout_p: float
) -> Tensor:
    """What is normalised: input, or residual + dropout(input) in the dtype of residual."""
    if residual is None:
        return input
    if dropout_p:
        cols = math.prod(input.shape[-dims:])
        kept = philox.keep(seed, 1, math.prod(input.shape[:-dims]), cols, dropout_p)
        scaled = _wide(input) / (1 - dropout_p) if dropout_p < 1 else input
        input = scaled.masked_fill(~kept.view(input.shape), 0)
    return (residual + input).to(residual.dtype)


def _affine(normed: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        normed = normed * _wide(weight)
    return normed if bias is None else normed + _wide(bias)


def layer_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dims: int,
    eps: float,
    dropout_p: float,
    keep_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, sum, mean, rstd) over the last `dims` dimensions of contiguous tensors.

    out is in the dtype of input, the sum in that of residual and empty if there is none or it is
    not to be kept, the statistics [rows] are at least fp32.
    """
    summed = _sum(input, residual, seed, dims, dropout_p)
    over = tuple(range(input.dim()))[-dims:]
    wide = _wide(summed)
    mean = wide.mean(over, keepdim=True)
    centred = wide - mean
    rstd = (centred.square().mean(over, keepdim=True) + eps).rsqrt()
    out = _affine(centred * rstd, weight, bias).to(input.dtype)
    kept = summed if keep_sum and residual is not None else summed.new_empty(0)
    return out, kept, mean.flatten(), rstd.flatten()


def rms_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    dims: int,
    eps: float,
    dropout_p: float,
    keep_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, sum, rstd), as `layer_norm`."""
    summed = _sum(input, residual, seed, dims, dropout_p)
    over = tuple(range(input.dim()))[-dims:]
    wide = _wide(summed)
    rstd = (wide.square().mean(over, keepdim=True) + eps).rsqrt()
    out = _affine(wide * rstd, weight, None).to(input.dtype)
    kept = summed if keep_sum and residual is not None else summed.new_empty(0)
    return out, kept, rstd.flatten()
