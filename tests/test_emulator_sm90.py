"""The instructions of sm_90a under the emulator: mbarriers, bulk copies and wgmma."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastattn import _library, emulator

DATA = Path(__file__).with_name("data")

SOURCE, ARCHITECTURE = "emulator_sm90.cu", "compute_90a"  # of the fixture `kernels`

pytestmark = pytest.mark.skipif(
    _library.LIBRARY is None, reason=f"needs the compiled library: {_library.WHY_NOT}"
)


def kinds(report: emulator.Report) -> set[str]:
    return {finding.kind for finding in report.findings}


def test_bulk_copies(kernels):
    x, out = torch.randn(128), torch.zeros(128)
    report = kernels["bulk"].check(1, 128, x, out)
    assert report.ok, report
    assert torch.equal(out, 2 * x)


def test_warps_hand_over_through_mbarriers(kernels):
    x, out = torch.arange(96, dtype=torch.int32), torch.zeros(96, dtype=torch.int32)
    report = kernels["hand_over"].check(1, 64, x, out, 3)
    assert report.ok, report
    assert torch.equal(out.view(3, 32), x.view(3, 32).flip(1))


def test_copies_arrive_at_mbarriers(kernels):
    x, out = torch.randn(128), torch.zeros(128)
    report = kernels["copy_for_others"].check(1, 128, x, out)
    assert report.ok, report
    assert torch.equal(out, x)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("corner", [(0, 0), (5, 3), (-4, -2), (40, 9)])
def test_boxes_of_tensors(kernels, swizzle: int, corner: tuple[int, int]):
    """What lies outside of the source is zero, what lies outside of the target is dropped."""
    x = torch.randn(12, 64).bfloat16()[:, :48]
    out = torch.full((16, 64), 7.0).bfloat16()
    box = (8, 16) if swizzle == 32 else (8, 32)
    maps = [emulator.TensorMap(tensor, box, swizzle) for tensor in (x, out)]
    bytes_ = 2 * box[0] * box[1]
    report = kernels["copy_box"].check(1, 32, *maps, *corner, bytes_, shared=1024)
    assert report.ok, report
    padded = torch.zeros(64, 128).bfloat16()
    padded[8:20, 32:80] = x
    expected = torch.full((64, 128), 7.0).bfloat16()
    column, row = corner[0] + 32, corner[1] + 8
    there = (slice(row, row + box[0]), slice(column, column + box[1]))
    expected[there] = padded[there]
    assert torch.equal(out, expected[8:24, 32:96])


def test_products(kernels):
    a, b, c = torch.randn(64, 16).bfloat16(), torch.randn(8, 16).bfloat16(), torch.zeros(64, 8)
    report = kernels["wgmma"].check(1, 128, a, b, c)
    assert report.ok, report
    assert torch.equal(c, (a.double() @ b.double().T).float())


def test_blocks_of_a_cluster_read_each_others_memory(kernels):
    x, out = torch.arange(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    report = kernels["swap"].check(4, 32, x, out)
    assert report.ok, report
    assert torch.equal(out.view(2, 2, 32), x.view(2, 2, 32).flip(1, 2))


def test_a_copy_reaches_both_blocks_of_a_cluster(kernels):
    x, out = torch.arange(24 * 32, dtype=torch.int32).view(24, 32), torch.zeros(4, 3, 32).int()
    report = kernels["share"].check(4, 32, emulator.TensorMap(x, (8, 32)), out, 3)
    assert report.ok, report
    assert torch.equal(out, x.view(3, 8, 32).sum(1, dtype=torch.int32).expand(4, 3, 32))


CLUSTER_FAULTS = {
    "swap_no_meeting": "race-read-after-write",
    "swap_no_second_meeting": "out-of-bounds",
    "share_too_early": "race-write-after-read",
    "share_with_one_only": "hang",
}


@pytest.mark.parametrize("name", CLUSTER_FAULTS)
def test_fault_in_a_cluster_is_caught(kernels, name: str):
    x, out = torch.arange(24 * 32, dtype=torch.int32).view(24, 32), torch.zeros(4, 3, 32).int()
    arguments = (x, out) if name.startswith("swap") else (emulator.TensorMap(x, (8, 32)), out, 3)
    report = kernels[name].check(4, 32, *arguments, patience=100_000)
    assert CLUSTER_FAULTS[name] in kinds(report), report


def test_bad_clusters(kernels):
    x = torch.zeros(128, dtype=torch.int32)
    with pytest.raises(ValueError, match="cluster must be"):
        kernels["swap"].launch(4, 32, x, x.clone(), cluster=4)
    with pytest.raises(ValueError, match="cluster must divide"):
        kernels["swap"].launch(3, 32, x, x.clone())
    with pytest.raises(ValueError, match="at most 16"):
        kernels["bulk"].launch(32, 128, x.float(), x.float(), cluster=32)


FAULTS = {
    "bulk_no_wait": "copy-not-waited-for",
    "bulk_no_init": "mbarrier-not-initialised",
    "bulk_too_few_bytes": "hang",
    "bulk_no_fence": "missing-proxy-fence",
    "bulk_no_store_wait": "copy-not-waited-for",
    "copy_for_others_early": "copy-not-waited-for",
    "copy_for_others_no_wait": "copy-not-waited-for",
    "hand_over_no_wait": "hang",  # the consumer misses a phase
    "wgmma_no_fence": "missing-proxy-fence",
    "wgmma_no_register_fence": "missing-register-fence",
    "wgmma_no_wait": "copy-not-waited-for",
}


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(kernels, name: str, order: str):
    halves, ints = torch.ones(128, 16).bfloat16(), torch.zeros(96, dtype=torch.int32)
    if name.startswith("wgmma"):
        arguments = (halves[:64], halves[64:72], torch.zeros(512))
    else:
        arguments = (torch.ones(128), torch.zeros(128))
    if name.startswith("hand_over"):
        arguments = (ints, ints.clone(), 3)
    threads = 64 if name.startswith("hand") else 128
    report = kernels[name].launch(1, threads, *arguments, order=order, patience=100_000)
    assert any(kind.startswith(FAULTS[name]) for kind in kinds(report)), report


def test_a_block_that_ends_before_its_copies_is_caught(kernels):
    report = kernels["bulk_no_wait"].launch(1, 128, torch.ones(128), torch.zeros(128))
    assert "copy-never-waited-for" in kinds(report), report


@pytest.mark.parametrize("late", [True, False])
def test_products_arrive_as_late_or_early_as_they_may(kernels, late: bool):
    a, b, c = torch.ones(64, 16).bfloat16(), torch.ones(8, 16).bfloat16(), torch.zeros(64, 8)
    kernels["wgmma_no_wait"].launch(1, 128, a, b, c, late=late)
    assert c.isnan().all() if late else (c == 16).all()


def test_a_removed_instruction_is_missed(kernels):
    """The same by taking single instructions out of the sound kernel's PTX."""
    text = (DATA / "emulator_sm90.ptx").read_text()
    begin = text.index(".entry bulk(")
    for pattern, kind in (
        (r"fence\.proxy\.async[^;]*;", "missing-proxy-fence"),
        (r"cp\.async\.bulk\.wait_group[^;]*;", "copy-not-waited-for"),
        (r"mbarrier\.init[^;]*;", "mbarrier-not-initialised"),
    ):
        mutant = text[:begin] + re.sub(pattern, "", text[begin:], count=1)
        report = emulator.load(mutant)["bulk"].launch(
            1, 128, torch.ones(128), torch.zeros(128), patience=100_000
        )
        assert kind in kinds(report), pattern


def test_bad_tensor_maps():
    x = torch.zeros(8, 64).bfloat16()
    for tensor, box, swizzle, words in (
        (x.T, (8, 8), 0, "last one contiguous"),
        (x, (8,), 0, "each of 2 dimensions"),
        (x, (8, 257), 0, "1 to 256"),
        (x, (8, 64), 16, "swizzle must be"),
        (x, (8, 64), 64, "within the swizzle"),
        (x.to(torch.complex64), (8, 8), 0, "dtypes"),
    ):
        with pytest.raises(ValueError, match=words):
            emulator.TensorMap(tensor, box, swizzle)
