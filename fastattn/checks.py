"""Checks of arguments: an exception names the argument, what it got and what it takes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def floating(name: str, value: object) -> None:
    tensor(name, value)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be one of {list(FLOATING)}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {value.layout}")


def on_device(name: str, value: object, other_name: str, other: Tensor) -> None:
    tensor(name, value)
    if value.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s {other.device}, got {value.device}")


def same(name: str, value: object, other_name: str, other: Tensor, *, shape: bool = True) -> None:
    """`value` has the device and dtype, and unless told otherwise the shape, of `other`."""
    on_device(name, value, other_name, other)
    if value.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {value.layout}")
    if shape and value.shape != other.shape:
        raise ValueError(
            f"{name} must have {other_name}'s shape {list(other.shape)}, got {list(value.shape)}"
        )


def finite(name: str, value: object) -> None:
    if isinstance(value, Tensor) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # torch.compile cannot trace math.isfinite
        raise ValueError(f"{name} must be finite, got {value}")
