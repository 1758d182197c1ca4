"""The CUDA kernels take no more of a GPU than the committed table grants them."""

from __future__ import annotations

import re
import shutil

import pytest

from bench import resources
from fastattn import _library

ROWS = resources.read()

compiled = pytest.mark.skipif(
    bool(_library.WHY_NO_CUDA) or shutil.which("ptxas") is None,
    reason=_library.WHY_NO_CUDA or "ptxas is not on PATH: with it, the table is measured anew",
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
