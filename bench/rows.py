"""The results: one flat row for each case and provider, kept as CSV or JSON."""

from __future__ import annotations

import csv
import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

OK, MISMATCH, FAILED, LEFT_OUT = "ok", "MISMATCH", "FAILED", "left out"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was raced, how fast it ran, how right it was, and where. None: not measured."""

    case: str
    group: str
    title: str
    shape: str
    passes: str
    dtype: str
    provider: str
    status: str  # ok, MISMATCH, FAILED, left out
    note: str = ""  # the kernels that served the call, or why there is no speed

    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples: int | None = None
    calls_per_sample: int | None = None
    gflops: float | None = None  # per second; cases bound by arithmetic
    gbs: float | None = None  # gigabytes per second; cases bound by memory
    of_limit: float | None = None  # fraction of the machine's measured limit
    peak_mb: float | None = None  # 1e6 bytes that one call adds to resident memory

    error: float | None = None
    eager_error: float | None = None
    allowed: float | None = None
    judged: str = ""  # the tensor that came closest to what is allowed

    processor: str = ""
    cores: int = 0
    threads: int = 0
    isa: str = ""
    torch: str = ""
    fastattn: str = ""
    python: str = ""
    peak_gflops: float | None = None
    peak_by: str = ""
    copy_gbs: float | None = None
    read_gbs: float | None = None


def _kind(hint: object) -> type:
    """The type of a field's values, for `float | None` as well as for `str`."""
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.cast(type, hint)


KINDS = {name: _kind(hint) for name, hint in typing.get_type_hints(Row).items()}


def write_csv(rows: Iterable[Row], path: str | Path) -> None:
    """One line per row; numbers keep five significant digits, None is empty."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(KINDS), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = dataclasses.asdict(row).items()
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values})


def read_csv(path: str | Path) -> list[Row]:
    """The rows of a file that `write_csv` wrote.

    Raises ValueError naming the file and the columns where these are not a benchmark's.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or set(reader.fieldnames) != set(KINDS):
            odd = sorted(set(reader.fieldnames or ()) ^ set(KINDS))
            raise ValueError(f"{path} is not a benchmark's CSV: columns {', '.join(odd)} differ")
        return [Row(**{k: _parse(k, v) for k, v in line.items()}) for line in reader]


def _parse(name: str, text: str) -> object:
    if text == "" and KINDS[name] is not str:
        return None
    return KINDS[name](text)


def write_json(rows: Iterable[Row], path: str | Path) -> None:
    """A list of objects with the columns of the CSV as keys."""
    text = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Race:
    """The rows of one case at one number of threads."""

    fused: Row
    rivals: dict[str, Row]  # by provider

    def ratio(self, provider: str) -> float | None:
        """How many times as long as fastattn the rival takes; None where either has no speed."""
        rival = self.rivals.get(provider)
        if rival is None or rival.median_ms is None or self.fused.median_ms is None:
            return None
        return rival.median_ms / self.fused.median_ms


def races(rows: Sequence[Row]) -> list[Race]:
    """Group rows by case and threads, in their order."""
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.threads, row.case), {})[row.provider] = row
    return [
        Race(fused=group.pop("fused"), rivals=group) for group in (dict(g) for g in groups.values())
    ]
