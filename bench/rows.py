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
from typing import TypeVar

DATA = Path(__file__).with_name("data")
GPU_TABLE = DATA / "gpu.csv"  # of `python -m bench.gpu`; the others are of `python -m bench`
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

    first_ms: float | None = None  # of the very first call, which may compile and pack
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples: int | None = None
    calls_per_sample: int | None = None
    gflops: float | None = None  # per second; cases bound by arithmetic
    gbs: float | None = None  # gigabytes per second; cases bound by memory
    limit: float | None = None  # of these: median of what the machine reached between the calls
    of_limit: float | None = None  # fraction of that
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


def kinds(of: type) -> dict[str, type]:
    """The type of each of a dataclass's fields, for `float | None` as well as for `str`."""
    return {name: _kind(hint) for name, hint in typing.get_type_hints(of).items()}


def _kind(hint: object) -> type:
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.cast(type, hint)


KINDS = kinds(Row)
Kept = TypeVar("Kept")


def write_csv(rows: Iterable[Kept], path: str | Path, of: type[Kept] = Row) -> None:
    """One line per row; numbers keep five significant digits, None is empty."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(kinds(of)), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = dataclasses.asdict(row).items()
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values})


def read_csv(path: str | Path, of: type[Kept] = Row) -> list[Kept]:
    """The rows of a file that `write_csv` wrote.

    Raises ValueError naming the file and the columns where these are not a benchmark's.
    """
    wanted = kinds(of)
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or set(reader.fieldnames) != set(wanted):
            odd = sorted(set(reader.fieldnames or ()) ^ set(wanted))
            raise ValueError(f"{path} is not a benchmark's CSV: columns {', '.join(odd)} differ")
        return [of(**{k: _parse(wanted[k], v) for k, v in line.items()}) for line in reader]


def _parse(kind: type, text: str) -> object:
    return None if text == "" and kind is not str else kind(text)


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
