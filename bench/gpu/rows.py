"""The results on a GPU: one flat row for each case and provider, kept as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

KERNELS = ("cuda", "triton", "emulator", "triton-emulator")  # fastattn's own, the preferred first
HEADINGS = {
    **{kernel: kernel for kernel in KERNELS},
    "eager": "eager",
    "sdpa": "SDPA",
    "sdpa-flash": "SDPA flash",
    "sdpa-cudnn": "SDPA cuDNN",
    "sdpa-efficient": "SDPA mem. eff.",
    "flash-attn": "flash-attn",
    "compile": "torch.compile",
}
GRAPH, EVENTS, PYTHON = "graph", "events", "python"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was raced, how fast it ran, how right it was, and where. None: not measured."""

    group: str
    case: str
    title: str
    shape: str
    passes: str
    dtype: str
    provider: str
    status: str  # as in bench.rows
    note: str = ""  # why there is no speed, or no graph

    timed: str = ""  # graph: replayed; events: called between CUDA events; python: by its clock
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples: int | None = None
    calls_per_sample: int | None = None
    tflops: float | None = None  # per second; cases bound by arithmetic
    gbs: float | None = None  # gigabytes per second; cases bound by memory

    error: float | None = None
    eager_error: float | None = None
    allowed: float | None = None
    judged: str = ""  # the tensor that came closest to what is allowed

    gpu: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    fastattn: str = ""
    python: str = ""
    date: str = ""
    product_tflops: float | None = None  # the limits measured on this GPU
    copy_gbs: float | None = None


@dataclass(frozen=True)
class Race:
    """The rows of one case."""

    rows: dict[str, Row]  # by provider

    @property
    def any(self) -> Row:
        """One that says which case it is."""
        return next(iter(self.rows.values()))

    @property
    def fused(self) -> Row | None:
        """The first of fastattn's kernels that has a speed: the one that a call takes."""
        timed = (self.rows[kernel] for kernel in KERNELS if kernel in self.rows)
        return next((row for row in timed if row.median_ms), None)

    @property
    def best(self) -> Row | None:
        """The fastest rival."""
        rivals = [r for name, r in self.rows.items() if name not in KERNELS and r.median_ms]
        return min(rivals, key=lambda row: row.median_ms, default=None)

    def ratio(self, rival: Row | None) -> float | None:
        """How many times as long as fastattn the rival takes; None where either has no speed."""
        if self.fused is None or rival is None or rival.median_ms is None:
            return None
        return rival.median_ms / self.fused.median_ms


def races(rows: Sequence[Row]) -> dict[str, list[Race]]:
    """The races of each group, in their order."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.group, row.case), {})[row.provider] = row
    groups: dict[str, list[Race]] = {}
    for (group, _), found in cases.items():
        groups.setdefault(group, []).append(Race(found))
    return groups
