"""When fused products on a GPU are chosen over cuBLAS with an activation of its own behind it.

Times are known of an H200 alone (bench/GPU.md), so the rule weighs what else is known, per element
of the result:

- What fusing saves is traffic: eager PyTorch writes what stands before the activation and reads it
  again. That is worth `BALANCE` multiply-adds a byte, the ratio of peak arithmetic to bandwidth,
  which lies between 60 and 150 on tensor cores from sm_80 on, and near 6 in fp32.
- What it costs is arithmetic at less than cuBLAS's speed. `SPEED` is measured on sm_90, where
  `mma.sync` has some 60 % of the peak that `wgmma` has (Luo et al. 2024, arXiv:2402.13499) and the
  kernel 274 TFLOP/s of cuBLAS's 772 for squares of 4096, in fp32 31 of 46; elsewhere it is an
  assumption: a kernel by hand comes close to cuBLAS where that has no more than `mma.sync` either
  (sm_80 to 89, sm_120), and on sm_100 `tcgen05` has more still.
- A layer that is trained has three products and saves traffic in the first alone. A bias alone is
  in cuBLAS's epilogue, too.
- The kernel computes squares of 128 and does not split the depth. With fewer squares than
  multiprocessors, or rows that are not whole 16 bytes, cuBLAS has better kernels.

The rule is that of the CUDA C++ kernels, and stands for Triton's too, which on sm_90 use `wgmma`
and have 506 TFLOP/s, yet lose to cuBLAS in all that was timed. It binds a free choice only:
`use_kernel("cuda")` runs the kernel on all that it can compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import dispatch

SIDE = 128  # of the squares that a block computes: ProductTiles
BALANCE = {2: 100, 4: 6}  # multiply-adds for which a GPU moves a byte, by the bytes of an element
SPEED = {8: 0.85, 9: 0.35, 10: 0.3, 12: 0.85}  # of cuBLAS's, by the architecture's first number
FP32_SPEED = 0.67
CUBLAS = 0.8  # of the peak


def refusals(
    input: Tensor, depths: tuple[int, ...], widths: tuple[int, ...], products: int, saved: int
) -> list[str]:
    """The reasons for which cuBLAS is expected to be faster; none where a kernel is forced.

    Args:
        input: [..., features], on a GPU.
        depths: what the products that make one element of the activation's result sum over, or
            that take it up.
        widths: the features that each of the kernels' results has.
        products: 3 with gradients, else 1. saved: elements of traffic for each of the result's.
    """
    if dispatch.forced() is not None or not input.is_cuda:
        return []
    gpu = torch.cuda.get_device_properties(input.device)
    rows = input.numel() // max(1, input.shape[-1])
    return expected_losses(
        input.element_size(), gpu.major, gpu.multi_processor_count, rows, depths, widths,
        products * sum(depths), saved,
    )  # fmt: skip


def expected_losses(
    element: int,
    major: int,
    multiprocessors: int,
    rows: int,
    depths: tuple[int, ...],
    widths: tuple[int, ...],
    multiply_adds: int,
    saved: int,
) -> list[str]:
    """The rule itself, for elements of so many bytes on a GPU of so many multiprocessors."""
    reasons = []
    if any(size * element % 16 for size in (*depths, *widths)):
        reasons.append("rows are not whole 16 bytes, with which cuBLAS is expected to be faster")
    squares = -(-rows // SIDE) * min(-(-width // SIDE) for width in widths)
    if squares < multiprocessors:
        reasons.append(f"{squares} squares of the result leave some of {multiprocessors} idle")
    speed = FP32_SPEED if element == 4 else SPEED.get(major, 0.3)
    lost = multiply_adds * (1 / speed - 1) / CUBLAS
    gained = saved * element * BALANCE[element]
    if lost >= gained:
        reasons.append(
            f"cuBLAS is expected to be faster by {lost:.0f} multiply-adds per element, and to fuse"
            f" saves {gained}"
        )
    return reasons
