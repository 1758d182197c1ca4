"""The inputs of a case: how they are drawn, and how they lie in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "sliced", "transposed", "heads_inside", "expanded")


class Draw(NamedTuple):
    """How to draw a tensor argument.

    kind: "normal"; "weight", normal over the square root of the last size; "fp32", normal and fp32
    whatever the dtype of the case; "wide", normal and at least fp32; "holes", normal with some
    -inf; "slopes", in (0, 1) and fp32; "mask", bool with four fifths True and the first row all
    False; "distinct", normal and never laid out as "expanded"; "numbers", int64 and not drawn but
    given. Only a floating tensor other than slopes gets a gradient.
    """

    shape: tuple[int, ...]
    kind: str = "normal"
    values: tuple[int, ...] = ()

    def draw(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        if self.kind == "numbers":
            return torch.tensor(self.values, dtype=torch.int64).reshape(self.shape)
        if self.kind == "mask":
            mask = torch.rand(self.shape, generator=generator) < 0.8
            if mask.dim() > 1 and mask.shape[-2] > 1:
                mask[..., :1, :] = False
            return mask
        if self.kind == "slopes":
            return torch.rand(self.shape, generator=generator)
        values = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.kind == "weight":
            values /= math.sqrt(max(1, self.shape[-1]))
        if self.kind == "holes":
            values[torch.rand(self.shape, generator=generator) < 0.2] = -math.inf
        if self.kind == "fp32" or (self.kind == "wide" and dtype != torch.float64):
            dtype = torch.float32
        return values.to(dtype)


def numbers(*values: int) -> Draw:
    """An argument of one dimension that holds these numbers."""
    return Draw((len(values),), "numbers", values)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides; what lies between them in memory is NaN.

    "sliced" takes every other element behind an offset, "transposed" reverses the order of the
    dimensions in memory, "heads_inside" keeps [B, H, S, D] as [B, S, H, D], "expanded" repeats the
    first element of the first of three or more dimensions with stride 0.
    """
    if layout == "sliced" and tensor.dim():
        gaps = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), 1)
        if tensor.is_floating_point():
            gaps.fill_(math.nan)
        gaps[..., 1::2] = tensor
        return gaps[..., 1::2]
    if layout == "transposed":
        order = tuple(reversed(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute(order)
    if layout == "heads_inside" and tensor.dim() == 4:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded" and tensor.dim() > 2 and 0 not in tensor.shape:
        return tensor[:1].contiguous().expand(tensor.shape)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    return tensor.contiguous()


def widened(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The oracle's inputs: the same values, contiguous and in fp64."""
    return {
        name: tensor.contiguous().double() if tensor.is_floating_point() else tensor.contiguous()
        for name, tensor in inputs.items()
    }
