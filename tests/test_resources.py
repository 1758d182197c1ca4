"""The CUDA kernels take no more of a GPU than the committed table grants them."""

from __future__ import annotations

import re
import shutil

import pytest

from bench import resources, roofline
from fastattn import _library

ROWS = resources.read()

compiled = pytest.mark.skipif(
    bool(_library.WHY_NO_CUDA) or None in (shutil.which("ptxas"), roofline.disassembler()),
    reason=_library.WHY_NO_CUDA
    or "ptxas or nvdisasm is not on PATH: with them, the table is measured anew",
)


def test_nothing_spills() -> None:
    assert ROWS and [row for row in ROWS if row.spilled] == []


@pytest.mark.skipif(bool(_library.WHY_NO_CUDA), reason=_library.WHY_NO_CUDA)
def test_every_kernel_is_in_the_table() -> None:
    names = {
        name
        for room in resources.ROOMS
        for name in re.findall(r"\.entry (\w+)\(", _library.ptx(room))
    }
    expected = {(name, arch) for name in names for arch in resources.ARCHITECTURES}
    assert {(row.kernel, row.architecture) for row in ROWS} == expected


@compiled
@pytest.mark.parametrize(
    "room",
    [
        pytest.param(room, marks=[pytest.mark.slow] if "attention" in room else [])
        for room in resources.ROOMS
    ],
)
def test_table_is_the_measured_one(room: str) -> None:
    """No kernel takes more than the table grants it on sm_80."""
    granted = {row.kernel: row for row in ROWS if row.architecture == "sm_80"}
    for row in resources.measured(room, "sm_80"):
        limit = granted[row.kernel]
        assert row.spilled == 0 and row.threads == limit.threads
        assert row.registers <= limit.registers and row.warps >= limit.warps, row
        assert row.static_shared <= limit.static_shared, row
        if limit.tensor_bound is not None:
            assert row.tensor_bound >= limit.tensor_bound, row


def test_products_can_keep_tensor_cores_busy() -> None:
    """At 95 % at least, by the table, on every architecture whose rates are published."""
    bounds = {
        (row.kernel, row.architecture): row.tensor_bound
        for row in ROWS
        if row.kernel.startswith("ffn_") and row.tensor_bound is not None
    }
    assert len(bounds) == 6 * len(roofline.TENSOR) and min(bounds.values()) >= 95


def code(*lines: str) -> list[roofline.Instruction | str]:
    return [
        line if line.startswith(".") else roofline.Instruction(*line.partition(" ")[::2])
        for line in lines
    ]


def test_roofline_of_a_loop() -> None:
    """What is outside the main loop does not count, nor an inner one for exceptions."""
    products = ["HMMA.16816.F32"] * 16
    exception = [".L_x_2", "LDG.E", "STS", "BRA .L_x_2"]
    loop = [".L_x_1", "LDSM.16.M88.4", *products, *exception, "MUFU.EX2", "BRA .L_x_1"]
    body = code("IADD3", "LDSM.16.M88.4", *loop, "FFMA", "EXIT")
    mix = roofline.main_loop(body)
    assert mix == {"LDSM.16.M88.4": 1, "HMMA.16816.F32": 16, "MUFU.EX2": 1, "BRA": 1}
    expected = {"tensor": 128, "fp32": 0, "alu": 0, "special": 8, "issue": 19, "shared": 16}
    assert roofline.roof(mix, "sm_80") == roofline.Roof(expected, 100)
    slower = code(".L_x_1", *products, *["IADD3"] * 80, "BRA .L_x_1")
    assert roofline.roof(roofline.main_loop(slower), "sm_80").percent == 80
    assert roofline.main_loop(code(".L_x_1", "FFMA", "BRA .L_x_1")) is None
