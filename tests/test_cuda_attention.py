"""The gradients of the CUDA attention kernels in the emulator: widths, schedules, memory, leaks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import _library, emulator
from fastattn.emulator import device
from fastattn.testing import Case, Draw, assert_case_close_to_oracle, cases, laid_out, run

pytestmark = pytest.mark.skipif(bool(_library.WHY_NO_CUDA), reason=_library.WHY_NO_CUDA)

CASES = {case.name: case for case in cases("attention")}
PACKED = {case.name: case for case in cases("attention_varlen")}


def everything(head_dim: int, value_dim: int, **more: Draw) -> Case:
    """All terms at once, of heads that the enumerated cases are too narrow for."""
    tensors = {
        "query": Draw((1, 2, 37, head_dim)),
        "key": Draw((1, 1, 70, head_dim)),
        "value": Draw((1, 1, 70, value_dim)),
        "mask": Draw((37, 70), "mask"),
        "bias": Draw((2, 37, 70), "fp32"),
        "alibi_slopes": Draw((2,), "slopes"),
    }
    options = {"causal": True, "softcap": 2.0, "dropout_p": 0.2, "seed": 3, "return_lse": True}
    return Case("attention", f"everything_{head_dim}", tensors | more, options)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim"),
    [
        (torch.float32, 40, 64),
        (torch.float32, 128, 72),
        (torch.bfloat16, 128, 128),
        (torch.float16, 96, 200),
        (torch.bfloat16, 256, 40),
    ],
)
def test_gradients_of_wide_heads(dtype: torch.dtype, head_dim: int, value_dim: int) -> None:
    assert_case_close_to_oracle(everything(head_dim, value_dim), dtype, "emulator")


@pytest.mark.parametrize(
    ("case", "launches"), [(everything(24, 16, sinks=Draw((2,))), 6), (PACKED["no_rows"], 4)]
)
def test_every_schedule_gives_the_same_gradients(case: Case, launches: int) -> None:
    with device.watching(thorough=True) as reports:
        run(case, case.inputs(torch.float16), "emulator")
    assert [report.kernel for report in reports if not report.ok] == []
    assert len(reports) == launches


def gradients(
    tensors: list[Tensor], grad_out: Tensor, wanted: Sequence[Tensor] = (), **options: Any
) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with fastattn.use_kernel("emulator"):
        out = fastattn.attention(*leaves, **options)
        return torch.autograd.grad(out, [*leaves, *wanted], grad_out)


def assert_moved_whole(reports: list[emulator.Report]) -> None:
    """Tiles without bank conflicts, rows without wasted sectors, and products on tensor cores, but
    for those of fp32."""
    for report in reports:
        assert report.counters.bank_conflicts == 1, report.counters
        assert report.counters.sector_efficiency >= 0.95, report.counters
        multiplies = "statistics" not in report.kernel and "f32" not in report.kernel
        assert any(op.startswith("mma.sync") for op in report.counters.mix()) == multiplies


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.1, "seed": 1}], ids=["plain", "dropout"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_memory_is_moved_whole(head_dim: int, options: dict[str, Any]) -> None:
    *tensors, grad_out = (torch.randn(1, 1, 64, head_dim).bfloat16() for _ in range(4))
    with device.watching() as reports:
        gradients(tensors, grad_out, causal=True, **options)
    assert len(reports) == 4
    assert_moved_whole(reports)


def test_memory_of_packed_sequences_is_moved_whole() -> None:
    *leaves, grad_out = (torch.randn(96, 2, 64).bfloat16() for _ in range(4))
    leaves, starts = [each.requires_grad_() for each in leaves], torch.tensor([0, 64, 96])
    with device.watching() as reports, fastattn.use_kernel("emulator"):
        out = fastattn.attention_varlen(*leaves, starts, starts, causal=True)
        torch.autograd.grad(out, leaves, grad_out)
    assert len(reports) == 4
    assert_moved_whole(reports)


@pytest.mark.parametrize("wide", [False, True], ids=["", "fp32 bias"])
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        (torch.float32, 32),
        (torch.float32, 64),
        (torch.float32, 128),
        (torch.bfloat16, 64),
        (torch.float16, 128),
        (torch.bfloat16, 256),
    ],
)
def test_masks_and_biases_are_moved_whole(dtype: torch.dtype, head_dim: int, wide: bool) -> None:
    *tensors, grad_out = (torch.randn(1, 1, 64, head_dim).to(dtype) for _ in range(4))
    bias = torch.randn(1, 64, 64, dtype=torch.float32 if wide else dtype, requires_grad=True)
    mask = torch.rand(64, 64) < 0.8
    with device.watching() as reports:
        gradients(tensors, grad_out, bias=bias, mask=mask, wanted=[bias])
    assert len(reports) == 5
    assert_moved_whole(reports)


@pytest.mark.parametrize("terms", [{"mask": (1, 1, 64)}, {"bias": (1, 1, 64)}, {"bias": (64, 1)}])
def test_what_broadcasts_is_moved_whole(terms: dict[str, tuple[int, ...]]) -> None:
    *tensors, grad_out = (torch.randn(1, 2, 64, 64).bfloat16() for _ in range(4))
    given = {
        name: torch.rand(shape) < 0.8 if name == "mask" else torch.randn(shape).bfloat16()
        for name, shape in terms.items()
    }
    with device.watching() as reports:
        gradients(tensors, grad_out, **given)
    assert_moved_whole(reports)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_odd_rows_meet_no_bank_twice(dtype: torch.dtype) -> None:
    """Nor do they when they cannot be moved 16 bytes at a time."""
    tensors = [torch.randn(1, 2, rows, 13).to(dtype) for rows in (37, 53, 53)]
    terms = {"bias": torch.randn(37, 53).to(dtype), "mask": torch.rand(37, 53) < 0.8}
    with device.watching() as reports:
        gradients(tensors, torch.randn(1, 2, 37, 13).to(dtype), **terms)
    for report in reports:
        assert report.counters.bank_conflicts == 1, report.counters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rubbish", [math.nan, -math.inf])
def test_nothing_leaks_from_under_a_mask(rubbish: float, dtype: torch.dtype) -> None:
    *tensors, grad_out = (torch.randn(2, 1, 70, 16).to(dtype) for _ in range(4))
    mask = torch.arange(70) < 40
    expected = gradients(tensors, grad_out, mask=mask)
    for tensor in tensors[1:]:
        tensor[:, :, 40:] = rubbish
    assert all(map(torch.equal, gradients(tensors, grad_out, mask=mask), expected))


@pytest.mark.parametrize("position", range(4), ids=["query", "key", "value", "grad_out"])
def test_what_is_not_finite_spoils_who_meets_it(position: int) -> None:
    """And nobody else: one NaN in row 25 of a causal attention."""
    tensors = [torch.randn(1, 1, 80, 16) for _ in range(4)]
    expected = gradients(tensors[:3], tensors[3], causal=True)
    tensors[position][:, :, 25, 3] = math.nan
    found = gradients(tensors[:3], tensors[3], causal=True)
    queries = [25] if position in (0, 3) else [*range(25, 80)]  # those that meet it
    keys = [*range(26)] if position in (0, 3) else [*range(80)]  # that are met by those
    for got, wanted, rows in zip(found, expected, (queries, keys, keys), strict=True):
        assert got.isnan().any(-1)[0, 0].nonzero().flatten().tolist() == rows
        others = [row for row in range(80) if row not in rows]
        torch.testing.assert_close(got[:, :, others], wanted[:, :, others])


@pytest.mark.parametrize("layout", ["sliced", "transposed", "heads_inside", "expanded"])
def test_any_strides(layout: str) -> None:
    """Of inputs and of the output's gradient."""
    *tensors, grad_out = (torch.randn(2, 3, 40, 24).bfloat16() for _ in range(4))
    strided = [laid_out(tensor, layout) for tensor in (*tensors, grad_out)]
    plain = [tensor.contiguous() for tensor in strided]
    found = gradients(strided[:3], strided[3])
    assert all(map(torch.equal, found, gradients(plain[:3], plain[3])))


def test_gradient_of_lse_alone() -> None:
    case = CASES["causal_tall"]
    leaves = {k: v.requires_grad_() for k, v in case.inputs(torch.float32).items()}
    found = {}
    for kernel in ("emulator", "reference"):
        with fastattn.use_kernel(kernel):
            lse = case.call(**leaves)[1]
            seen = torch.where(lse.isfinite(), lse, 0).square().sum()
            found[kernel] = torch.autograd.grad(seen, [leaves["query"], leaves["key"]])
    for ours, eager in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 70, 1), (1, 1, 1, 90)])
def test_gradient_of_a_bias_of_any_shape(shape: tuple[int, ...]) -> None:
    inputs = [torch.randn(2, 2, n, 16) for n in (70, 90, 90)]
    grad_out = torch.randn(2, 2, 70, 16)
    bias, mask = torch.randn(shape), torch.rand(70, 90) < 0.7
    found = {}
    for kernel in ("emulator", "reference"):
        leaf = bias.clone().requires_grad_()
        with fastattn.use_kernel(kernel):
            out = fastattn.attention(*inputs, bias=leaf, mask=mask, softcap=3.0)
        found[kernel] = torch.autograd.grad(out, leaf, grad_out)[0]
    torch.testing.assert_close(found["emulator"], found["reference"], rtol=1e-4, atol=1e-4)
