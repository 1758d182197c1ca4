"""What a race on a GPU says: a table for each group, in the terminal and as Markdown for a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bench.gpu.rows import EVENTS, GRAPH, HEADINGS, PYTHON, Race, Row, races
from bench.kinds import DTYPES
from bench.report import STYLES, significant, spread
from bench.rows import FAILED, LEFT_OUT, MISMATCH, OK

MARKS = "<!-- bench.gpu -->", "<!-- /bench.gpu -->"  # of the place of the tables in a page
MICROSECONDS = "µs"
SHOWN = 3  # cases of one reason


@dataclass(frozen=True)
class Column:
    """A column: its heading, its cells, and which ratio decides on their colour."""

    heading: str
    cell: Callable[[Race], str]
    ratio: Callable[[Race], float | None] = lambda race: None


def unit(found: Sequence[Race]) -> str:
    """What the figures of a group's providers are; empty where none has a speed."""
    timed = [row for race in found for row in race.rows.values() if row.median_ms]
    if not timed:
        return ""
    if timed[0].timed == PYTHON:
        return MICROSECONDS
    return "TFLOP/s" if timed[0].tflops else "GB/s"


def columns(found: Sequence[Race]) -> list[Column]:
    """The columns that have something to say about these races."""
    raced = [name for name in HEADINGS if any(name in race.rows for race in found)]
    measure = unit(found)
    shown = []
    if measure not in (MICROSECONDS, ""):
        shown += [Column("fastattn ms", milliseconds), Column("spread", steadiness)]
    shown += [Column(HEADINGS[name], figure(name, measure)) for name in raced]
    if measure and any(race.best for race in found):
        shown.append(Column("× best rival", best, lambda race: race.ratio(race.best)))
        shown.append(Column("× eager", times("eager"), lambda race: ratio(race, "eager")))
    return shown


def milliseconds(race: Race) -> str:
    """fastattn's, of the kernel that a call takes."""
    return "" if race.fused is None else significant(race.fused.median_ms)


def steadiness(race: Race) -> str:
    """Half the distance from the 20th to the 80th percentile of these."""
    return "" if race.fused is None else spread(race.fused)


def figure(provider: str, measure: str) -> Callable[[Race], str]:
    """Cells of a provider's speed, or why there is none."""

    def cell(race: Race) -> str:
        row = race.rows.get(provider)
        if row is None:
            return ""
        if row.status != OK or row.median_ms is None:
            return row.status
        if measure == MICROSECONDS:
            return significant(1e3 * row.median_ms)
        return significant(row.tflops or row.gbs) + ("*" if row.timed == EVENTS else "")

    return cell


def ratio(race: Race, provider: str) -> float | None:
    """How many times as long as fastattn a provider takes."""
    return race.ratio(race.rows.get(provider))


def times(provider: str) -> Callable[[Race], str]:
    """Cells of that."""

    def cell(race: Race) -> str:
        value = ratio(race, provider)
        return "" if value is None else f"{value:.2f}"

    return cell


def best(race: Race) -> str:
    """The same of the fastest rival, and which that is."""
    value = race.ratio(race.best)
    return "" if value is None else f"{value:.2f} {HEADINGS[race.best.provider]}"


def work(row: Row) -> str:
    """The operation, its shape and passes, and the data type where it is not bf16."""
    dtype = "" if row.dtype == "bfloat16" else f" {DTYPES[row.dtype]}"
    return f"{row.title}, {row.shape} {row.passes}{dtype}"


def heading(group: str, found: Sequence[Race]) -> str:
    """The name of a group and the unit of its figures."""
    measure = unit(found)
    return f"{group}, {measure}" if measure else group


def limits(row: Row) -> str:
    """The GPU of a row and its measured limits."""
    parts = {"driver": row.driver, "fastattn": row.fastattn, "torch": row.torch}
    parts |= {"Triton": row.triton, "Python": row.python}
    said = ", ".join([row.gpu, *(f"{name} {value}" for name, value in parts.items() if value)])
    if row.product_tflops is None:
        return f"{said}."
    return (
        f"{said}, {row.date}. Measured limits: {significant(row.product_tflops)} TFLOP/s of a "
        f"large bf16 product by cuBLAS, {significant(row.copy_gbs)} GB/s copying."
    )


def notes(rows: Sequence[Row]) -> list[str]:
    """What the columns mean, and a sentence for each reason why there is no speed or no graph."""
    timed = [row for row in rows if row.timed]
    said = []
    if timed:
        said.append(
            f"Medians of {max(row.samples for row in timed)} interleaved rounds; × is how many "
            "times as long as fastattn the other takes; spread is half of p20 to p80. fastattn's "
            "time is that of its first kernel here that has one, as a call would take it. bf16 "
            "where nothing else is said. Errors are against float64, for the very calls timed; "
            "allowed is twice eager's own error (gradients three times) plus rounding."
        )
    if any(row.timed == GRAPH for row in timed):
        said.append(
            "What the GPU needs, without what Python does: CUDA graphs of a call, or of several "
            "in a row, between CUDA events. What fits in the GPU's cache stays there."
        )
    if any(row.timed == EVENTS for row in timed):
        said.append("* Called from Python, as there is no graph of it.")
    if any(row.timed == PYTHON for row in timed):
        said.append(f"{MICROSECONDS}: of calls that Python launches one after the other.")
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            status = "" if row.status == OK else f"{row.status}: "
            reasons.setdefault(f"{status}{HEADINGS[row.provider]}: {row.note}", []).append(row.case)
    return said + [f"{reason} ({some(cases)})" for reason, cases in reasons.items()]


def some(cases: Sequence[str]) -> str:
    """The first of many."""
    more = len(cases) - SHOWN
    return ", ".join(cases) if more < 2 else f"{', '.join(cases[:SHOWN])} and {more} more"


def terminal(rows: Sequence[Row]) -> RenderableType:
    """A table for each group, and the notes below."""
    parts: list[RenderableType] = [Text(f"\n{limits(rows[0])}")] if rows else []
    for group, found in races(rows).items():
        shown = columns(found)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column(heading(group, found))
        for column in shown:
            table.add_column(column.heading, justify="right")
        for race in found:
            table.add_row(work(race.any), *(styled(column, race) for column in shown))
        parts.append(table)
    for note in notes(rows):
        parts.append(Text(note, style="red" if note.startswith((MISMATCH, FAILED)) else "dim"))
    return Group(*parts)


def styled(column: Column, race: Race) -> Text:
    """A cell, coloured by what it says."""
    text, value = column.cell(race), column.ratio(race)
    if text in (MISMATCH, FAILED):
        return Text(text, style=STYLES["refused"])
    if text == LEFT_OUT:
        return Text(text, style=STYLES["absent"])
    if value is None:
        return Text(text)
    kind = "faster" if value >= 1.05 else "slower" if value < 0.95 else ""
    return Text(text, style=STYLES[kind])


def markdown(rows: Sequence[Row]) -> str:
    """The races as GitHub Markdown: a table for each group, and the notes."""
    parts = [limits(rows[0])] if rows else []
    for group, found in races(rows).items():
        shown = columns(found)
        lines = [
            [heading(group, found), *(column.heading for column in shown)],
            ["---", *("---:" for _ in shown)],
            *([work(race.any), *(column.cell(race) for column in shown)] for race in found),
        ]
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    parts += [note.replace("*", "\\*", 1) for note in notes(rows)]
    return "\n\n".join(parts) + "\n"


def insert(rows: Sequence[Row], page: Path) -> None:
    """Put the tables between the marks of a page.

    Raises ValueError where the page has no such place.
    """
    text = page.read_text(encoding="utf-8")
    begin, end = (text.find(mark) for mark in MARKS)
    if not 0 <= begin < end:
        raise ValueError(f"{page} has no lines {MARKS[0]} and {MARKS[1]} to put the tables between")
    begin += len(MARKS[0])
    page.write_text(f"{text[:begin]}\n{markdown(rows)}{text[end:]}", encoding="utf-8")
