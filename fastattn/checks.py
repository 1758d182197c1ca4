"""Checks of arguments: an exception names the argument, what it got and what it takes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, value: object) -> None:
    """`value` is a tensor with sizes and strides."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")


def floating(name: str, value: object) -> None:
    """`value` is a tensor of a dtype that the ops compute in."""
    tensor(name, value)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be one of {list(FLOATING)}, got {value.dtype}")


def on_device(name: str, value: object, other_name: str, other: Tensor) -> None:
    """`value` is a tensor on the device of `other`."""
    tensor(name, value)
    if not (value.is_cpu and other.is_cpu) and value.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s {other.device}, got {value.device}")


def same(name: str, value: object, other_name: str, other: Tensor, *, shape: bool = True) -> None:
    """`value` has the device and dtype, and unless told otherwise the shape, of `other`."""
    on_device(name, value, other_name, other)
    if value.dtype is not other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {value.dtype}")
    if shape and value.shape != other.shape:
        raise ValueError(
            f"{name} must have {other_name}'s shape {list(other.shape)}, got {list(value.shape)}"
        )


def readable(value: Tensor) -> bool:
    """Whether the host can look at a tensor's values; where it cannot, the kernel looks."""
    if torch.compiler.is_compiling() or not value.is_cpu:
        return False
    return not torch._C._are_functorch_transforms_active()


def finite(name: str, value: object) -> None:
    """`value` is a number, neither infinite nor NaN."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # torch.compile cannot trace math.isfinite
        raise ValueError(f"{name} must be finite, got {value}")


def broadcastable(name: str, value: Tensor, scores: tuple[int, ...]) -> Tensor:
    """`value`, viewed as four dimensions, each 1 or that of the scores [B, H, Sq, Sk]."""
    shape = (1,) * (4 - value.dim()) + tuple(value.shape)
    if len(shape) > 4 or any(n not in (1, m) for n, m in zip(shape, scores, strict=True)):
        raise ValueError(
            f"{name} must broadcast to (B, H, Sq, Sk) = {list(scores)}, got {list(value.shape)}"
        )
    return value if value.dim() == 4 else value.reshape(shape)


def features(input: object) -> None:
    """`input` is a tensor [..., in_features]."""
    floating("input", input)
    if input.dim() == 0:
        raise ValueError("input must be (..., in_features), got a 0-dimensional tensor")


def projection(
    prefix: str, weight: object, bias: object | None, input: Tensor, in_features: int
) -> int:
    """`weight` and `bias` are those of a linear layer of `in_features`; how many it puts out."""
    same(prefix + "weight", weight, "input", input, shape=False)
    shape = weight.shape
    if len(shape) != 2 or shape[1] != in_features:
        raise ValueError(f"{prefix}weight must be (out_features, {in_features}), got {list(shape)}")
    if bias is not None:
        same(prefix + "bias", bias, "input", input, shape=False)
        if bias.shape != shape[:1]:
            raise ValueError(f"{prefix}bias must have shape [{shape[0]}], got {list(bias.shape)}")
    return shape[0]


def contiguous(value: Tensor | None) -> Tensor | None:
    """The tensor, contiguous, where there is one."""
    return None if value is None else value.contiguous()
