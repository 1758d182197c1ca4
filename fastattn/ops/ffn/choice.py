"""When fused products on a GPU are chosen over cuBLAS with an activation of its own behind it.

The rule weighs, in multiply-adds:

- What fusing saves is traffic: eager PyTorch writes what stands before the activation and reads it
  again. That is worth `BALANCE` multiply-adds a byte, the ratio of peak arithmetic to bandwidth,
  which lies between 60 and 150 on tensor cores from sm_80 on, and near 6 in fp32. On an H100 a GELU
  of its own behind cuBLAS cost what 106 would.
- What it costs is arithmetic at less than cuBLAS's speed. On sm_90 that is measured (bench/GPU.md):
  the CUDA kernels, by `wgmma`, have 0.93 to 0.95 of it for a bias alone, and 0.92 to 1.03 with the
  gradients, Triton's 504 of 771 TFLOP/s for squares of 4096, both in 16 bits; in fp32 the CUDA
  kernels have 32 of 46. Of the cases there with an activation the rule chooses what was faster.
  Elsewhere it is an assumption: a kernel by hand comes close to cuBLAS where that has no more than
  `mma.sync` either (sm_80 to 89, sm_120), and on sm_100 `tcgen05` has more still.
- Kernels compute squares of 128 and do not split the depth: when the last of them leave some
  multiprocessors idle, all that these could have computed is lost, and where there are fewer
  squares than multiprocessors, or rows that are not whole 16 bytes, cuBLAS has better kernels.
- A layer that is trained has three products and saves traffic in the first alone. A bias alone is
  in cuBLAS's epilogue, too.

It binds a free choice only: `use_kernel("cuda")` runs the kernel on all that it can compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import dispatch

SIDE = 128  # of the squares that a block computes: ProductTiles, BoxTiles
BALANCE = {2: 100, 4: 6}  # multiply-adds for which a GPU moves a byte, by the bytes of an element
CUBLAS = 0.8  # of the peak

# Of cuBLAS's speed, by the architecture's first number; of those not named the last.
SPEED = {
    ("cuda", 2): {8: 0.85, 9: 0.97, 12: 0.85, 10: 0.3},
    ("triton", 2): {8: 0.85, 9: 0.66, 12: 0.85, 10: 0.3},
    ("cuda", 4): {8: 0.67},
    ("triton", 4): {8: 0.67},
}


class Product(NamedTuple):
    """A result of rows and columns that sums over a depth."""

    rows: int
    cols: int
    depth: int

    def gradients(self) -> tuple[Product, Product]:
        """The products of its backward: of the left side, and of the right one."""
        return (
            Product(self.rows, self.depth, self.cols),
            Product(self.cols, self.depth, self.rows),
        )

    def squares(self) -> int:
        return -(-self.rows // SIDE) * -(-self.cols // SIDE)

    def lost(self, speed: float, multiprocessors: int) -> float:
        """Multiply-adds that a GPU could have done besides, at this part of cuBLAS's speed."""
        rounds = -(-self.squares() // multiprocessors)
        full = self.squares() / (rounds * multiprocessors)
        return math.prod(self) * (1 / (speed * full) - 1) / CUBLAS


def refusals(kernel: str, input: Tensor, products: Sequence[Product], saved: int) -> list[str]:
    """The reasons for which cuBLAS is expected to be faster; none where a kernel is forced.

    Args:
        kernel: "cuda" or "triton". input: on a GPU.
        products: all that is computed, with gradients for a layer that is trained.
        saved: elements of traffic that fusing saves.
    """
    if dispatch.forced() is not None or not input.is_cuda:
        return []
    gpu = torch.cuda.get_device_properties(input.device)
    speeds = SPEED[kernel, input.element_size()]
    speed = speeds.get(gpu.major, [*speeds.values()][-1])
    return expected_losses(input.element_size(), speed, gpu.multi_processor_count, products, saved)


def expected_losses(
    element: int, speed: float, multiprocessors: int, products: Sequence[Product], saved: int
) -> list[str]:
    """The rule itself, for elements of so many bytes, on a GPU of so many multiprocessors where
    kernels have this part of cuBLAS's speed.
    """
    if not all(map(math.prod, products)):
        return []
    reasons = []
    if any(size * element % 16 for product in products for size in product[1:]):
        reasons.append("rows are not whole 16 bytes, with which cuBLAS is expected to be faster")
    squares = min(product.squares() for product in products)
    if squares < multiprocessors:
        reasons.append(f"{squares} squares of the result leave some of {multiprocessors} idle")
    lost = sum(product.lost(speed, multiprocessors) for product in products)
    gained = saved * element * BALANCE[element]
    if lost >= gained:
        reasons.append(
            f"cuBLAS is expected to be faster by {lost:.2g} multiply-adds, and to fuse saves"
            f" {gained:.2g}"
        )
    return reasons
