"""Every kind of finding has a planted fault: those of few instructions here, and a list of all."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import test_emulator
import test_emulator_sm90
import torch
from test_emulator_instructions import kernel

from fastattn import _library

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    _library.LIBRARY is None, reason=f"needs the compiled library: {_library.WHY_NOT}"
)

# Each warp's lanes at a place of their own, which another warp's share.
SHARED = "and.b32 %r1, %r0, 31; shl.b32 %r1, %r1, 2; mov.u32 %r2, place; add.u32 %r1, %r1, %r2;"
WRITES = f"{SHARED} st.shared.u32 [%r1], %r0;"
# The first warp reads what the second writes, with no barrier in between.
EXCHANGES = f"""
    {SHARED} setp.ge.u32 %p1, %r0, 32; @!%p1 st.shared.u32 [%r1], %r0; bar.sync 0;
    @%p1 st.shared.u32 [%r1], %r0; @!%p1 ld.shared.u32 %r3, [%r1];
"""
INIT = "mbarrier.init.shared::cta.b64 [place], 1;"

# The body, how many threads run it, and in which order their warps do.
FAULTS = {
    "race-write-after-write": (WRITES, 64, "forward"),
    "race-write-after-read": (EXCHANGES, 64, "reverse"),
    "race-read-after-write": (EXCHANGES, 64, "forward"),
    "mask-without-self": ("bar.warp.sync 1;", 2, "forward"),
    "mbarrier-reinitialised": (INIT + INIT, 1, "forward"),
    "mbarrier-in-use": (
        f"{INIT} mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [place], 16;"
        "mbarrier.inval.shared::cta.b64 [place];",
        *(1, "forward"),
    ),
    "mbarrier-too-many-arrivals": (
        f"{INIT} mbarrier.arrive.shared::cta.b64 %d1, [place], 2;",
        *(1, "forward"),
    ),
    "bad-tensor-map": (
        f"{INIT} mov.u32 %r1, 0; cp.async.bulk.tensor.2d.shared::cluster.global.tile"
        ".mbarrier::complete_tx::bytes [place+128], [%a0, {%r1, %r1}], [place];",
        *(1, "forward"),
    ),
    "bad-jump": (
        "mov.u32 %r1, 1; targets: .branchtargets END; brx.idx %r1, targets; END:",
        *(1, "forward"),
    ),
    "trap": ("trap;", 1, "forward"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_fault_is_caught(kind: str) -> None:
    body, threads, order = FAULTS[kind]
    memory = torch.full((64,), -1)  # as a tensor map: one of what is not known
    report = kernel(body, 1).launch(1, threads, memory, order=order)
    assert kind in {finding.kind for finding in report.findings}, report


def test_a_write_to_what_is_read_only_is_caught() -> None:
    memory = np.zeros(32, np.int64)
    memory.flags.writeable = False
    report = kernel("st.global.u64 [%a0], %d0;", 1).launch(1, 32, memory)
    assert {finding.kind for finding in report.findings} == {"write-to-read-only"}
    assert (memory == 0).all()


def test_every_kind_of_finding_has_a_planted_fault() -> None:
    """The kinds that the sources name are those that the tests have caught."""
    sources = "".join(path.read_text() for path in (ROOT / "csrc/emulator").iterdir())
    named = re.findall(r'(?:report|fail|Conflict)[({](?:copy \? )?"([a-z-]+)"', sources)
    caught = {*FAULTS, "write-to-read-only", *test_emulator_sm90.FAULTS.values()}
    caught |= {fault[-1] for fault in test_emulator.FAULTS.values()}
    assert len(set(named)) > 20 and set(named) == {kind for kind in caught if kind != "race-"}
