"""The CUDA products for sm_90 in the emulator, both ways: cases, schedules, rows on their own, and
what is left to the kernels for sm_80.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastattn
from fastattn import _library, emulator
from fastattn.emulator import device
from fastattn.testing import Case, Draw, assert_case_close_to_oracle

pytestmark = pytest.mark.skipif(bool(_library.WHY_NO_CUDA), reason=_library.WHY_NO_CUDA)

BF16, F16 = torch.bfloat16, torch.float16
NAMES = {BF16: "bf16", F16: "f16"}


@pytest.fixture(autouse=True)
def on_sm90() -> Iterator[None]:
    with device.emulating(90), fastattn.use_kernel("emulator"):
        yield


KINDS = {"ffn_forward", "ffn_grad_input", "ffn_grad_weight"}


def products(reports: list[emulator.Report]) -> list[str]:
    return [report.kernel for report in reports if report.kernel.startswith(tuple(KINDS))]


def linear(name: str, rows: int, features: int, outs: int, bias: bool = True, **options: Any):
    tensors = {"input": Draw((rows, features)), "weight": Draw((outs, features), "weight")}
    if bias:
        tensors["bias"] = Draw((outs,))
    return Case("linear", name, tensors, options)


def ffn(name: str, rows: int, features: int, hidden: int, gated: bool, **options: Any) -> Case:
    tensors = {
        "input": Draw((rows, features)),
        "up_weight": Draw((hidden, features), "weight"),
        "up_bias": Draw((hidden,)),
        "down_weight": Draw((features, hidden), "weight"),
    }
    if gated:
        tensors["gate_weight"] = Draw((hidden, features), "weight")
        tensors["gate_bias"] = Draw((hidden,))
    return Case("ffn", name, tensors, options)


# Squares whole and not, fewer than multiprocessors and more than both groups of both; steps of the
# depth fewer than places for them, and more, the last one whole and not.
CASES = [
    linear("one_square", 128, 64, 128),
    linear("parts_of_squares", 130, 200, 264, activation="gelu"),
    linear("many_squares", 300, 72, 520, bias=False),
    linear("deep", 40, 904, 136, activation="silu"),
    linear("one_row", 1, 8, 8, activation="gelu_tanh"),
    ffn("relu", 150, 72, 136, False, activation="relu"),
    ffn("dropout", 70, 64, 200, False, dropout_p=0.3, seed=5),
    ffn("gelu_gated", 140, 136, 72, True, activation="gelu"),
    ffn("silu_gated", 270, 40, 200, True, activation="silu", recompute=True),
]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case.id}-{dtype}")
        for case, dtype in zip(CASES, itertools.cycle(NAMES), strict=False)
    ],
)
def test_matches_oracle(case: Case, dtype: torch.dtype) -> None:
    with device.watching() as reports:
        assert_case_close_to_oracle(case, dtype, "emulator")
    found = products(reports)
    assert {name.removesuffix(f"_{NAMES[dtype]}_sm90") for name in found} == KINDS


@pytest.mark.parametrize("gated", [False, True])
def test_every_schedule_gives_the_same_bits(gated: bool) -> None:
    case = ffn("schedules", 140, 72, 200, gated, activation="silu")
    with device.watching(thorough=True) as reports:
        assert_case_close_to_oracle(case, BF16, "emulator")
    assert products(reports)


def test_rows_are_independent() -> None:
    """Of each other's numbers, of what is none, and of how many there are."""
    x, weight, bias = (torch.randn(*n).bfloat16() for n in ((300, 136), (264, 136), (264,)))
    expected = fastattn.linear(x, weight, bias, "gelu")
    assert torch.equal(fastattn.linear(x[7:8], weight, bias, "gelu"), expected[7:8])
    spoilt = x.clone()
    spoilt[150, 3] = math.nan
    found = fastattn.linear(spoilt, weight, bias, "gelu")
    assert found[150].isnan().all()
    others = torch.arange(300) != 150
    assert torch.equal(found[others], expected[others])


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements, behind one more."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def test_the_rest_is_left_to_sm80() -> None:
    x, weight, bias = (torch.randn(*n).bfloat16() for n in ((50, 72), (40, 72), (40,)))
    for arguments, served in (
        ((x, weight, bias), True),
        ((shifted(x), weight, bias), False),
        ((x, shifted(weight), bias), False),
        ((x, weight, shifted(bias)), False),
        ((x[:, :70].contiguous(), weight[:, :70].contiguous(), bias), False),
        ((x, weight[:39], bias[:39]), False),
        ((x[:, :0], weight[:, :0], bias), False),
        ((x.float(), weight.float(), bias.float()), False),
    ):
        with device.watching() as reports:
            out = fastattn.linear(*arguments, "relu")
        (name,) = products(reports)
        assert name.endswith("_sm90") == served
        doubles = (each.double() for each in arguments)
        expected = torch.relu(torch.nn.functional.linear(*doubles))
        torch.testing.assert_close(out.double(), expected, rtol=0.01, atol=0.02)
