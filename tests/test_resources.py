"""The GPU kernels take of a GPU what the committed table says, and that is little enough."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import fastattn
from bench import programs, resources, roofline, triton_calls
from fastattn import _library

ROOT = Path(__file__).resolve().parents[1]
ROWS = resources.read()
MEASURED = ("ffn", "norm", "norm_bf16_1024")  # anew in every run, on sm_80; others in slow ones
CUDA_ROWS = [row for row in ROWS if not row.kernel.startswith("triton_")]
BUILDS = [(room, arch) for room in resources.ROOMS for arch in resources.architectures(room)]
MOST_SHARED = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100a": 227 * 1024}  # of a block
WHY_NO_TRITON = fastattn.backends()["triton-emulator"]
WHY_NOT_MEASURED = resources.why_not()

as_in_the_table = pytest.mark.skipif(bool(WHY_NOT_MEASURED), reason=WHY_NOT_MEASURED)


def test_nothing_spills() -> None:
    assert ROWS and [row for row in ROWS if row.spilled] == []


@pytest.mark.skipif(bool(_library.WHY_NO_CUDA), reason=_library.WHY_NO_CUDA)
def test_every_kernel_is_in_the_table() -> None:
    expected = {(name, arch) for room, arch in BUILDS for name in resources.codes(room)}
    assert {(row.kernel, row.architecture) for row in CUDA_ROWS} == expected


@as_in_the_table
@pytest.mark.parametrize("room", resources.ROOMS)
def test_table_is_of_this_code(room: str) -> None:
    """On every architecture: a kernel that changes is to be measured anew on all of them."""
    codes = resources.codes(room)
    stale = {row.kernel for row in CUDA_ROWS if row.code != codes.get(row.kernel, row.code)}
    assert not stale, f"run `python -m bench.resources {room} --write`"


def test_shared_memory_is_within_the_device() -> None:
    for row in ROWS:
        if row not in CUDA_ROWS:
            assert row.shared <= MOST_SHARED[row.architecture], row


@pytest.mark.parametrize("call", triton_calls.CALLS)
def test_every_triton_call_is_in_the_table(call: str) -> None:
    suffix = call.partition("_")[2]
    names = {row.kernel for row in ROWS if row.kernel.endswith(suffix)} - {
        row.kernel for row in CUDA_ROWS
    }
    found = {(row.kernel, row.architecture) for row in ROWS if row.kernel in names}
    assert names
    assert found == {(name, arch) for name in names for arch in resources.TRITON_ARCHITECTURES}


@pytest.mark.skipif(bool(WHY_NO_TRITON), reason=WHY_NO_TRITON)
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(call, marks=() if call in MEASURED else pytest.mark.slow)
        for call in triton_calls.CALLS
    ],
)
def test_triton_takes_what_the_table_says(call: str) -> None:
    """On sm_80; another release of Triton may need a few registers more."""
    granted = {row.kernel: row for row in ROWS if row.architecture == "sm_80"}
    for row in resources.measured_in_triton(call, "sm_80"):
        limit = granted[row.kernel]
        assert row.spilled == 0 and row.threads == limit.threads
        assert row.shared <= limit.shared, row
        assert row.warps >= limit.warps or row.registers <= limit.registers + 8, row
        assert (row.tensor_bound is None) == (limit.tensor_bound is None), row


@as_in_the_table
@pytest.mark.parametrize(
    ("room", "architecture"),
    [
        pytest.param(
            room, arch, marks=() if (room in MEASURED and arch == "sm_80") else pytest.mark.slow
        )
        for room, arch in BUILDS
    ],
)
def test_table_is_the_measured_one(room: str, architecture: str) -> None:
    found = {row.kernel: row for row in resources.measured(room, architecture)}
    rows = [row for row in CUDA_ROWS if row.architecture == architecture]
    assert found == {row.kernel: row for row in rows if row.kernel in resources.codes(room)}


SOURCES = {
    source.parent.name + source.stem.removeprefix("cuda"): source
    for source in (ROOT / "csrc").glob("*/cuda*.cu")
}


def test_every_source_is_measured() -> None:
    assert set(SOURCES) == set(resources.ROOMS)


@pytest.mark.slow
@pytest.mark.skipif(
    programs.find("nvcc") is None, reason="there is no nvcc: `pip install nvidia-cuda-nvcc`"
)
@pytest.mark.parametrize(("room", "architecture"), BUILDS)
def test_nvcc_warns_of_nothing(room: str, architecture: str, tmp_path: Path) -> None:
    """Not of a spill either, where the source is compiled for an architecture of its own."""
    flags = ["-std=c++20", "-Icsrc", "-Werror", "all-warnings", "-Xptxas", "-warn-spills"]
    command = [programs.find("nvcc"), *flags, f"-arch={architecture}", "-cubin", SOURCES[room]]
    out = ["-o", tmp_path / f"{room}.cubin"]
    run = subprocess.run([*command, *out], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, ""), run.stderr


def test_products_are_on_tensor_cores() -> None:
    """In the main loop of every kernel that multiplies 16 bits, on every architecture."""
    multiplies = r"attention_(forward|decode|backward_(queries|keys|bias))|ffn_(forward|grad_\w+?)"
    for row in CUDA_ROWS:
        expected = re.match(rf"({multiplies})_b?f16", row.kernel)
        assert bool(row.products) == bool(expected), row


def test_enough_warps_live_on_a_multiprocessor() -> None:
    assert min(row.warps for row in CUDA_ROWS) >= 8


def test_products_can_keep_tensor_cores_busy() -> None:
    """At 95 % at least, by the table, on every architecture whose rates are published."""
    bounds = {
        (row.kernel, row.architecture): row.tensor_bound
        for row in ROWS
        if row.kernel.startswith("ffn_") and row.tensor_bound is not None
    }
    assert len(bounds) == 6 * len(roofline.TENSOR) and min(bounds.values()) >= 95


def test_attention_can_keep_tensor_cores_busy() -> None:
    """On sm_80, up to what shared memory allows: csrc/cuda/ROOFLINE.md has the sums."""
    bounds = {row.kernel: row.tensor_bound for row in ROWS if row.architecture == "sm_80"}
    least = {
        "forward": {64: 85, 128: 87},
        "backward_queries": {64: 84, 128: 85},
        "backward_keys": {64: 83, 128: 71},
    }
    for dtype in ("bf16", "f16"):
        for kernel, of_dims in least.items():
            for dim, percent in of_dims.items():
                assert bounds[f"attention_{kernel}_{dtype}_{dim}"] >= percent


def test_triton_multiplies_on_tensor_cores() -> None:
    """In the main loop of every kernel with products of 16-bit numbers, by the table of sm_80."""
    rows = [row for row in ROWS if row not in CUDA_ROWS and row.architecture == "sm_80"]
    multiply = r"triton_(ffn_(forward|product)|attention_(forward|grad_\w+|split))_bf16"
    with_products = {row.kernel for row in rows if re.match(multiply, row.kernel)}
    assert {row.kernel for row in rows if row.tensor_bound is not None} == with_products != set()


def code(*lines: str) -> list[roofline.Instruction | str]:
    """Labels, and instructions, of which those with @P0 have a condition."""
    return [
        line
        if line.startswith(".")
        else roofline.Instruction(*line.removeprefix("@P0 ").partition(" ")[::2], "@P0" in line)
        for line in lines
    ]


def test_roofline_of_a_loop() -> None:
    """What is outside the main loop does not count, nor what a jump in it passes over."""
    products = ["HMMA.16816.F32"] * 16
    exception = ["@P0 BRA .L_x_3", ".L_x_2", "LDG.E", "STS", "@P0 BRA .L_x_2", ".L_x_3"]
    copy = ["@P0 BRA .L_x_4", "IADD3", "LDGSTS.E", ".L_x_4"]
    masks = ["@P0 BRA .L_x_5", "MUFU.EX2", "BRA .L_x_6", ".L_x_5", "FSEL", "FSEL", ".L_x_6"]
    loop = [".L_x_1", *products, *exception, *copy, *masks, "@P0 BRA .L_x_1"]
    body = code("IADD3", "LDSM.16.M88.4", *loop, "FFMA", "EXIT")
    mix = roofline.main_loop(body)
    once = {"IADD3": 1, "LDGSTS.E": 1, "MUFU.EX2": 1}
    assert mix == {"HMMA.16816.F32": 16, "BRA": 5, **once}
    expected = {"tensor": 128, "fp32": 0, "alu": 2, "special": 8, "issue": 24, "shared": 16}
    assert roofline.roof(mix, "sm_80") == roofline.Roof(expected, 100)
    slower = code(".L_x_1", *products, *["IADD3"] * 80, "BRA .L_x_1")
    assert roofline.roof(roofline.main_loop(slower), "sm_80").percent == 80
    assert roofline.main_loop(code(".L_x_1", "FFMA", "BRA .L_x_1")) is None
    longer = code(".L_x_2", *products, *["IADD3"] * 90, "@P0 BRA .L_x_2")
    assert roofline.main_loop(slower + longer) == roofline.main_loop(slower)
