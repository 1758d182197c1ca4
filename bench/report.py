"""What a run says: one set of columns, as a table in the terminal and as Markdown for a README."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from bench.kinds import DTYPES
from bench.rows import FAILED, LEFT_OUT, MISMATCH, OK, Race, Row, races
from bench.work import PROVIDERS

RIVAL_TIMES = 2  # follow from the ratios, so they are dropped together where space is short
LONG_MS = 10.0  # a shorter call's first run is that of caches and pages
STYLES = {
    "faster": "green",
    "slower": "red",
    "refused": "bold red",
    "absent": "yellow",
    "": "",
}


@dataclass(frozen=True)
class Column:
    """A column: its heading, its cells, and how early it goes when the terminal is narrow."""

    heading: str
    cell: Callable[[Race], str]
    dropped: int = 0  # 0 stays, 1 goes first
    ratio: bool = False


def significant(value: float | None, digits: int = 3) -> str:
    """A number with at least `digits` significant digits and no exponent; empty for None."""
    if value is None:
        return ""
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(decimals, 0)}f}"


def power(value: float) -> str:
    """A small number such as 2.1e-6, without padding."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def columns(found: Sequence[Race]) -> list[Column]:
    """The columns that have something to say about these races."""
    rivals = [p for p in PROVIDERS if any(p in race.rivals for race in found)]
    every = [
        Column("fastattn ms", lambda race: speed_or_status(race.fused)),
        Column("spread", lambda race: spread(race.fused), 1),
        Column("first call", lambda race: first_call(race.fused), 3),
        *(Column(f"{PROVIDERS[p]} ms", rival_time(p), RIVAL_TIMES) for p in rivals),
        *(Column(f"× {PROVIDERS[p]}", rival_ratio(p), ratio=True) for p in rivals),
        Column("rate", lambda race: rate(race.fused), 4),
        Column("of limit", lambda race: percent(race.fused.of_limit)),
        Column("peak MB (eager)", peaks, 3),
        Column("error ≤ allowed", errors, 5),
    ]
    return [column for column in every if any(map(column.cell, found))]


def speed_or_status(row: Row) -> str:
    """Milliseconds, or why there are none, marked where the reference served the call."""
    if row.status != OK:
        return row.status
    return significant(row.median_ms) + ("*" if "reference" in row.note else "")


def spread(row: Row) -> str:
    """Half the distance from the 20th to the 80th percentile, in percent of the median."""
    if row.median_ms is None:
        return ""
    return f"±{50 * (row.p80_ms - row.p20_ms) / row.median_ms:.0f} %"


def first_call(row: Row) -> str:
    """How many times as long as the median the first call took, where the clock can tell.

    Of a token it took the prompt as well.
    """
    if row.first_ms is None or row.median_ms is None or row.passes == "token":
        return ""
    if row.median_ms < LONG_MS:
        return ""
    return f"{row.first_ms / row.median_ms:.2f} ×"


def rival_time(provider: str) -> Callable[[Race], str]:
    """Cells of a rival's milliseconds."""
    return lambda race: speed_or_status(race.rivals[provider]) if provider in race.rivals else ""


def rival_ratio(provider: str) -> Callable[[Race], str]:
    """Cells of how many times as long as fastattn a rival takes, or why it has no speed."""

    def cell(race: Race) -> str:
        rival = race.rivals.get(provider)
        if rival is not None and rival.status != OK:
            return rival.status
        ratio = race.ratio(provider)
        return "" if ratio is None else f"{ratio:.2f}"

    return cell


def rate(row: Row) -> str:
    """GFLOP/s where arithmetic is the limit, GB/s where memory is, tokens/s of a model."""
    if row.gflops is not None:
        return f"{significant(row.gflops)} GFLOP/s"
    if row.passes == "token" and row.median_ms is not None:
        return f"{significant(1e3 / row.median_ms)} tokens/s"
    return "" if row.gbs is None else f"{significant(row.gbs)} GB/s"


def percent(fraction: float | None) -> str:
    """Whole percents."""
    return "" if fraction is None else f"{100 * fraction:.0f} %"


def peaks(race: Race) -> str:
    """Megabytes that the call adds, and eager's in brackets."""
    if race.fused.peak_mb is None:
        return ""
    eager = race.rivals.get("eager")
    beside = "" if eager is None or eager.peak_mb is None else f" ({significant(eager.peak_mb)})"
    return significant(race.fused.peak_mb) + beside


def errors(race: Race) -> str:
    """fastattn's error beside what the rule allows."""
    row = race.fused
    if row.error is None or row.allowed is None:
        return ""
    return f"{power(row.error)} {'≤' if row.status == OK else '>'} {power(row.allowed)}"


def work(row: Row) -> str:
    """Shape, passes and the data type where it is not fp32."""
    dtype = "" if row.dtype == "float32" else f" {DTYPES[row.dtype]}"
    return f"{row.shape} {row.passes}{dtype}"


def terminal(rows: Sequence[Row], width: int) -> RenderableType:
    """A table for each number of threads, narrowed to `width`, and the notes below it."""
    parts: list[RenderableType] = []
    for _, group in groupby(races(rows), lambda race: race.fused.threads):
        found = list(group)
        shown, dropped = columns(found), []
        table = _table(found, shown)
        console = Console(width=1000)
        while Measurement.get(console, console.options, table).maximum > width:
            first = min((c.dropped for c in shown if c.dropped), default=0)
            if not first:
                break
            dropped += [c.heading for c in shown if c.dropped == first]
            shown = [c for c in shown if c.dropped != first]
            table = _table(found, shown)
        parts += [Text(f"\n{limits(found[0].fused)}"), table]
        if dropped:
            parts.append(Text(f"Left out for want of width: {', '.join(dropped)}.", style="dim"))
    parts += [
        Text(note, style="red" if note.startswith((MISMATCH, FAILED)) else "dim")
        for note in notes(rows)
    ]
    return Group(*parts)


def _table(found: Sequence[Race], shown: Sequence[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in shown:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for (_, title), group in groupby(found, lambda race: (race.fused.group, race.fused.title)):
        table.add_row(Text(title, style="bold"))
        for race in group:
            cells = [_styled(column, race) for column in shown]
            table.add_row(f"  {work(race.fused)}", *cells)
    return table


def _styled(column: Column, race: Race) -> Text:
    text = column.cell(race)
    return Text(text, style=STYLES[kind(column, race)])


def kind(column: Column, race: Race) -> str:
    """What a cell says: faster, slower, refused, absent, or nothing in particular."""
    text = column.cell(race)
    if text in (MISMATCH, FAILED):
        return "refused"
    if text == LEFT_OUT:
        return "absent"
    if column.ratio and text:
        return "faster" if float(text) >= 1.05 else "slower" if float(text) < 0.95 else ""
    return ""


def limits(row: Row) -> str:
    """The machine of a row and its measured limits, in one sentence."""
    return (
        f"{row.processor}, {row.threads} of {row.cores} cores, fastattn {row.fastattn} "
        f"({row.isa}), torch {row.torch}, Python {row.python}. At best "
        f"{significant(row.peak_gflops)} GFLOP/s fp32 ({row.peak_by}), "
        f"{significant(row.copy_gbs)} GB/s copying, {significant(row.read_gbs)} GB/s reading."
    )


def notes(rows: Sequence[Row]) -> list[str]:
    """What the columns mean, and a sentence for each call that has no speed or no kernel."""
    timed = [row for row in rows if row.samples]
    said = []
    if timed:
        runs = sorted(row.samples * row.calls_per_sample for row in timed)
        span = f"{runs[0]} to {runs[-1]}" if runs[0] < runs[-1] else runs[0]
        said.append(
            f"Medians of {span} interleaved runs per call; × is how many times as "
            "long as fastattn the other takes; spread is half of p20 to p80. Errors are against "
            "float64, for the very calls timed; allowed is twice eager's own error (gradients "
            "three times) plus rounding. A share of a limit is of its median in the same race: the "
            "loop, the reading or the copying takes its turn too."
        )
        if any(map(first_call, timed)):
            said.append(
                "First call is how many times as long as the median the process took for its first "
                "call of a case, where that is 10 ms or more."
            )
        if any(row.gbs and row.of_limit > 1 for row in timed):
            said.append(
                "What is above the limit of copying or reading stays in the cache, or goes about "
                "it better than PyTorch's copy_ and sum."
            )
        if any(row.peak_mb is not None for row in timed):
            said.append(
                "Peak MB is what one call adds to the resident memory of a fresh process: outputs, "
                "gradients, scratch and packed weights, whoever allocated them."
            )
    reference = sorted({row.note for row in timed if "reference" in row.note})
    said += [f"* The reference served {note}." for note in reference]
    said += [
        f"{row.status}: {row.case}, {PROVIDERS[row.provider]}: {row.note}"
        for row in rows
        if row.status != OK
    ]
    return said


def markdown(rows: Sequence[Row]) -> str:
    """The races as GitHub Markdown: a table for each number of threads, and the notes."""
    parts = []
    for _, group in groupby(races(rows), lambda race: race.fused.threads):
        found = list(group)
        shown = [column for column in columns(found) if column.dropped != RIVAL_TIMES]
        lines = [
            _line(["", *(column.heading for column in shown)]),
            _line(["---", *("---:" for _ in shown)]),
        ]
        for race in found:
            name = f"{race.fused.title}, {work(race.fused)}"
            lines.append(_line([name, *(column.cell(race) for column in shown)]))
        parts += [limits(found[0].fused), "\n".join(lines)]
    parts += [note.replace("*", "\\*", 1) for note in notes(rows)]
    return "\n\n".join(parts) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
