"""Tensor maps: how a kernel of sm_90 and up is told of a tensor that the copy engine moves."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# The codes of tensormap.replace for element types.
ELEMENTS = {
    **{torch.uint8: 0, torch.int8: 0, torch.int16: 1, torch.int32: 3, torch.int64: 5},
    **{torch.float16: 6, torch.float32: 7, torch.float64: 9, torch.bfloat16: 10},
}
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}


@dataclass(frozen=True)
class TensorMap:
    """What cuTensorMapEncodeTiled makes, as an argument for a `CUtensorMap` parameter.

    tensor    torch CPU tensor of 1 to 5 dimensions, the last one contiguous
    box       elements of a copy in each dimension, in the order of tensor.shape
    swizzle   bytes of the swizzle in shared memory: 0, 32, 64 or 128

    Raises ValueError for what a tensor map cannot describe.
    """

    tensor: torch.Tensor
    box: Sequence[int]
    swizzle: int = 0

    def __post_init__(self) -> None:
        tensor, box = self.tensor, tuple(self.box)
        if not 1 <= tensor.dim() <= 5 or tensor.stride(-1) != 1:
            raise ValueError(
                "tensor must have 1 to 5 dimensions, the last one contiguous, "
                f"got shape {tuple(tensor.shape)} and strides {tensor.stride()}"
            )
        if tensor.dtype not in ELEMENTS:
            raise ValueError(f"tensor must have one of the dtypes {list(ELEMENTS)}")
        if len(box) != tensor.dim() or any(not 1 <= n <= 256 for n in box):
            raise ValueError(
                f"box must hold 1 to 256 elements of each of {tensor.dim()} dimensions, got {box}"
            )
        if self.swizzle not in SWIZZLES:
            raise ValueError(f"swizzle must be one of {list(SWIZZLES)}, got {self.swizzle}")
        row = box[-1] * tensor.element_size()
        if row % 16 or (self.swizzle and row > self.swizzle):
            raise ValueError(
                f"box must have rows of a multiple of 16 bytes within the swizzle, got {row}"
            )

    def pack(self, address: int) -> bytes:
        """The 128 bytes of the map of a tensor that lies at `address`."""
        tensor = self.tensor

        def five(values: Sequence[int]) -> list[int]:
            return [*reversed(values), *[1] * 5][:5]

        strides = [s * tensor.element_size() for s in reversed(tensor.stride()[:-1])]
        return struct.pack(
            "<QI5I5I4x4Q5I4I4x",
            address,
            tensor.dim() - 1,
            *five(tuple(self.box)),
            *five(tensor.shape),
            *[*strides, *[0] * 4][:4],
            *[1] * 5,
            ELEMENTS[tensor.dtype],
            0,
            SWIZZLES[self.swizzle],
            0,
        )
