"""The emulator runs kernels right, and every check of its catches a planted fault."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastattn import _library, emulator
from fastattn.emulator.__main__ import main

DATA = Path(__file__).with_name("data")
THREADS = 128

SOURCE, ARCHITECTURE = "emulator.cu", "compute_80"  # of the fixture `kernels`

pytestmark = pytest.mark.skipif(
    _library.LIBRARY is None, reason=f"needs the compiled library: {_library.WHY_NOT}"
)


def kinds(report: emulator.Report) -> set[str]:
    return {finding.kind for finding in report.findings}


# --- sound kernels: right results, the same under every schedule, and nothing found


def test_block_sum(kernels):
    x, out = torch.randn(1000), torch.zeros(3)
    report = kernels["block_sum"].check(3, THREADS, x, out, 1000)
    torch.testing.assert_close(out.sum(), x.sum(), rtol=1e-5, atol=1e-5)
    assert report.ok, report


def test_warp_exchange(kernels):
    x, out = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    assert kernels["rotate"].check(1, 32, x, out).ok
    assert out.tolist() == [*range(1, 32), 0]


def test_pipeline(kernels):
    x, out = torch.randn(4 * 512), torch.zeros(4 * 512)
    report = kernels["pipeline"].check(1, THREADS, x, out, 4)
    assert report.ok, report
    assert torch.equal(out, 2 * x)


def test_last_block_adds_up(kernels):
    x = torch.arange(5, dtype=torch.int32)
    partial, counter, out = (torch.zeros(n, dtype=torch.int32) for n in (5, 1, 1))
    report = kernels["grid_sum"].check(5, 32, x, partial, counter, out)
    assert report.ok, report
    assert out.item() == 10


def test_producer_and_consumer(kernels):
    x, out = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    report = kernels["hand_over"].check(1, 64, x, out)
    assert report.ok, report
    assert out.tolist() == list(range(31, -1, -1))


def test_tensor_cores(kernels):
    a, b, c = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16(), torch.zeros(16, 8)
    report = kernels["matmul_bf16"].check(1, 32, a, b, c)
    assert report.ok, report
    assert torch.equal(c, (a.double() @ b.double()).float())


def test_unordered_writes_of_the_same_value_do_no_harm(kernels):
    assert kernels["everybody_agrees"].check(4, 32, torch.zeros(1, dtype=torch.int32)).ok


# --- planted faults

ints = torch.int32


def zeros(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(count, dtype=dtype)


FAULTS = {
    "block_sum_unordered": (1, THREADS, lambda: (torch.ones(256), zeros(1), 256), "race-"),
    "rotate_unordered": (1, 32, lambda: (torch.arange(32, dtype=ints), zeros(32, ints)), "race-"),
    "pipeline_no_wait": (
        1,
        THREADS,
        lambda: (torch.ones(2048), zeros(2048), 4),
        "copy-not-waited-for",
    ),
    "pipeline_no_barrier": (
        1,
        THREADS,
        lambda: (torch.ones(2048), zeros(2048), 4),
        "copy-not-waited-for",
    ),
    "copy_never_waited_for": (1, 1, lambda: (torch.ones(4),), "copy-never-waited-for"),
    "grid_sum_no_fence": (
        3,
        32,
        lambda: (torch.ones(3, dtype=ints), zeros(3, ints), zeros(1, ints), zeros(1, ints)),
        "race-read-after-write",
    ),
    "last_block_wins": (4, 1, lambda: (zeros(1, ints),), "race-write-after-write"),
    "reads_what_others_write": (4, 1, lambda: (zeros(4, ints),), "race-"),
    "uninitialised": (1, 32, lambda: (zeros(32),), "uninitialised-read"),
    "scale": (1, 64, lambda: (torch.ones(64), zeros(50), 64), "out-of-bounds"),
    "scale4": (1, 4, lambda: (torch.ones(32)[1:17], zeros(16)), "misaligned"),
    "past_shared": (1, 64, lambda: (zeros(64),), "out-of-bounds"),
    "divergent_barrier": (1, 32, lambda: (zeros(32, ints),), "divergence"),
    "half_a_warp": (1, 32, lambda: (zeros(32, ints),), "barrier-after-exit"),
    "barrier_after_exit": (1, 64, lambda: (zeros(32, ints),), "barrier-after-exit"),
    "two_barriers": (1, 64, lambda: (zeros(64, ints),), "barrier-mismatch"),
    "barrier_count": (1, 64, lambda: (zeros(64, ints),), "barrier-mismatch"),
    "deadlock": (1, 64, lambda: (zeros(64, ints),), "deadlock"),
    "wait_for_a_flag": (1, 32, lambda: (zeros(1, ints),), "hang"),
    "shuffle_from_nobody": (1, 32, lambda: (zeros(16, ints),), "shuffle-from-inactive-lane"),
}


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(kernels, name: str, order: str):
    grid, block, arguments, kind = FAULTS[name]
    shared = 128 if name == "past_shared" else 0
    report = kernels[name].launch(
        grid, block, *arguments(), shared=shared, order=order, patience=100_000
    )
    assert any(found.startswith(kind) for found in kinds(report)), report
    assert all("emulator.cu" in str(f.place.source) for f in report.findings if f.place)


def test_every_schedule_has_its_own_result_where_blocks_race(kernels):
    report = kernels["last_block_wins"].check(4, 1, zeros(1, ints))
    assert "schedule-dependent-result" in kinds(report)


@pytest.mark.parametrize("late", [True, False])
def test_copies_arrive_as_late_or_early_as_they_may(kernels, late: bool):
    """Late, a reader that does not wait sees garbage; early, it sees the data."""
    x, out = torch.ones(512), zeros(512)
    kernels["pipeline_no_wait"].launch(1, THREADS, x, out, 1, late=late)
    assert out.isnan().all() if late else (out == 2).all()


def test_a_finding_says_where_and_who(kernels):
    out = zeros(3, ints)
    report = kernels["rotate_unordered"].launch(
        1, 32, torch.arange(32, dtype=ints), zeros(32, ints)
    )
    finding = next(f for f in report.findings if f.kind == "race-read-after-write")
    source = (DATA / "emulator.cu").read_text().splitlines()
    read, write = finding.place.source, finding.other_place.source
    assert "place[(threadIdx.x + 1) % 32]" in source[read.line - 1]
    assert "place[threadIdx.x] = " in source[write.line - 1]
    assert finding.place.text.startswith("ld.shared") and finding.block == (0, 0, 0)
    assert finding.other_thread[0] == (finding.thread[0] + 1) % 32
    assert "shared address" in finding.address and finding.count > 1
    with pytest.raises(emulator.EmulatorError, match="race-read-after-write"):
        report.require()
    report = kernels["scale"].launch(1, 4, torch.ones(4), out.float(), 4)
    assert "byte 12 of argument 1, which has 12" in str(report)


# --- counters


def test_bank_conflicts(kernels):
    x, out = torch.randn(32, 32), torch.zeros(32, 32)
    padded = kernels["transpose"].launch(1, (32, 8), x, out)
    assert torch.equal(out, x.T) and padded.counters.bank_conflicts == 1
    conflicts = kernels["transpose_conflicts"].launch(1, (32, 8), x, out)
    worst = conflicts.counters.worst("shared")
    assert [site.transfers for site in worst if site.ideal] == [32 * site.ideal for site in worst]


def test_sectors(kernels):
    x, out = torch.randn(32 * 8), torch.zeros(32)
    dense = kernels["strided"].launch(1, 32, x, out, 1).counters
    sparse = kernels["strided"].launch(1, 32, x, out, 8).counters
    assert dense.sector_efficiency == 1
    # 32 loads of 4 bytes touch 32 sectors of 32; the stores are dense.
    assert sparse.sector_efficiency == pytest.approx((4 + 4) / (32 + 4))


def test_instruction_mix(kernels):
    mix = kernels["strided"].launch(2, 64, torch.ones(64), torch.zeros(64), 1).counters.mix()
    assert mix["st.global.f32"] == 4 and mix["ret"] == 4  # two blocks of two warps


# --- arguments and errors


def test_numpy_arrays_views_and_null(kernels):
    x, out = np.ones((4, 8), np.float32), np.zeros((4, 8), np.float32)
    assert kernels["scale"].launch(1, 32, x, out, 32).ok
    assert (out == 2).all()
    packed = torch.arange(64.0)  # two views of one storage: written through the second
    assert kernels["scale"].launch(1, 32, packed[:32], packed[32:], 32).ok
    assert torch.equal(packed[32:], 2 * packed[:32])
    assert "out-of-bounds" in kinds(kernels["scale"].launch(1, 1, None, x, 1))
    x.flags.writeable = False
    assert "write-to-read-only" in kinds(kernels["scale"].launch(1, 32, out, x, 32))


def test_bad_arguments(kernels):
    kernel, x = kernels["scale"], torch.ones(4)
    with pytest.raises(TypeError, match="takes 3 arguments, got 2"):
        kernel.launch(1, 4, x, x)
    with pytest.raises(TypeError, match="argument 2 is an array"):
        kernel.launch(1, 4, x, x, x)
    with pytest.raises(TypeError, match="float"):
        kernel.launch(1, 4, x, x, 4.5)
    with pytest.raises(ValueError, match="at most 1024 threads"):
        kernel.launch(1, 2048, x, x, 4)
    with pytest.raises(ValueError, match="grid"):
        kernel.launch(0, 4, x, x, 4)
    with pytest.raises(ValueError, match="order"):
        kernel.launch(1, 4, x, x, 4, order="sideways")
    with pytest.raises(ValueError, match="shared"):
        kernel.launch(1, 4, x, x, 4, shared=1 << 20)
    with pytest.raises(ValueError, match="on the CPU"):
        kernel.launch(1, 4, x.to("meta"), x, 4)
    with pytest.raises(KeyError, match="names 0"):
        kernels["no such kernel"]


# --- the command line


def test_command_line(capsys):
    ptx = str(DATA / "emulator.ptx")
    shape = ["--kernel", "scale", "--grid", "1", "--block", "64", "--counters", "--args"]
    assert main(["check", ptx, *shape, "f32[64]=normal", "f32[64]=0", "64"]) == 0
    printed = capsys.readouterr().out
    assert "nothing found" in printed and "st.global.f32" in printed
    assert main(["check", ptx, *shape, "f32[64]", "f32[60]", "0x40"]) == 1
    assert "out-of-bounds" in capsys.readouterr().out
    assert main(["check", ptx, *shape, "f32[64]"]) == 2
    assert "takes 3 arguments" in capsys.readouterr().err
    assert main(["check", ptx, *shape, "f33[64]", "null", "1"]) == 2
    assert "'f33[64]'" in capsys.readouterr().err


def test_command_line_from_a_shell(python):
    listed = python("-m", "fastattn.emulator", "list", str(DATA / "emulator.ptx"))
    assert listed.returncode == 0 and "block_sum u64 u64 u32" in listed.stdout, listed.stderr
