"""The picture of a run: who is faster, how near to the machine's limit, with how much memory."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

from bench.report import limits, significant, work
from bench.rows import LEFT_OUT, OK, Race, Row, races
from bench.work import PROVIDERS

COLOURS = {
    "fused": "#d9480f",
    "eager": "#868e96",
    "sdpa": "#1c7ed6",
    "compile": "#7048e8",
    "onnxruntime": "#2b8a3e",
    "openvino": "#c2255c",
}
INK, RULE = "#212529", "#dee2e6"
ROW = 0.27  # inches


def png(rows: Sequence[Row]) -> bytes:
    """The races as a PNG.

    Raises ImportError without matplotlib, ValueError where nothing was timed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = [race for race in races(rows) if race.fused.status != LEFT_OUT]
    if not any(row.median_ms for row in rows):
        raise ValueError("there is nothing to draw: no call was timed")
    places, headings = layout(found)
    bottom = max(places) + 0.8
    style = {"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": RULE}
    with plt.rc_context(style):
        figure, panels = plt.subplots(
            1,
            3,
            sharey=True,
            figsize=(13, ROW * bottom + 1.9),
            width_ratios=(4, 3, 3),
            layout="constrained",
        )
        speed, limit, memory = panels
        speed.set_yticks(places, [f"{race.fused.title}  {work(race.fused)}" for race in found])
        speed.set_ylim(bottom, -0.8)
        for panel in panels:
            panel.set_axisbelow(True)
            panel.grid(axis="x", color=RULE, linewidth=0.8)
            panel.spines[["top", "right", "left"]].set_visible(False)
            panel.tick_params(length=0, labelcolor=INK)
        for place, text in headings:
            speed.annotate(
                text,
                (0, place),
                xytext=(-4, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="center",
                weight="bold",
            )
        draw_speed(speed, found, places)
        draw(limit, found, places, lambda row: row.of_limit and 100 * row.of_limit)
        limit.axvline(100, color=INK, linewidth=1, zorder=1)
        limit.set_xlim(left=0)
        limit.set_title("Share of the measured limit, %\n(arithmetic, copying or reading)")
        draw(memory, found, places, lambda row: row.peak_mb)
        memory.set_xscale("log")
        memory.xaxis.set_major_formatter(lambda value, _: significant(value, 1))
        memory.set_title("Peak memory of a call, MB\n(less is better)")
        for panel in panels:
            panel.title.set(fontsize=9.5, color=INK)
        handles = [
            plt.Line2D([], [], marker="o", linestyle="", color=COLOURS[p], label=PROVIDERS[p])
            for p in PROVIDERS
            if any(row.provider == p and row.median_ms for row in rows)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False)
        caption = textwrap.fill(limits(found[-1].fused), 180)
        figure.supxlabel(caption, x=0.01, ha="left", fontsize=8, color="#495057")
        out = BytesIO()
        figure.savefig(out, format="png", dpi=150)
        plt.close(figure)
    return out.getvalue()


def layout(found: Sequence[Race]) -> tuple[list[float], list[tuple[float, str]]]:
    """The height of each race, and the height and text of each group's heading."""
    places, headings = [], []
    several = len({race.fused.threads for race in found}) > 1
    place, last = 0.0, None
    for race in found:
        group, threads = race.fused.group, race.fused.threads
        if (group, threads) != last:
            last = (group, threads)
            place += 0.5 if places else 0.0
            plural = "s" if threads > 1 else ""
            headings.append((place, f"{group}, {threads} thread{plural}" if several else group))
            place += 1
        places.append(place)
        place += 1
    return places, headings


def draw(
    panel: Any, found: Sequence[Race], places: Sequence[float], value: Callable[[Row], float | None]
) -> None:
    """A dot for every provider's value, fastattn's on top."""
    for race, place in zip(found, places, strict=True):
        rows = [*race.rivals.values(), race.fused]
        for row in rows:
            if (x := value(row)) is not None:
                main = row is race.fused
                panel.plot(
                    x, place, "o", color=COLOURS[row.provider], ms=7 if main else 5, zorder=3 + main
                )


def draw_speed(panel: Any, found: Sequence[Race], places: Sequence[float]) -> None:
    """Eager's time over each provider's, from p20 to p80, on a logarithmic axis."""
    from matplotlib.ticker import FixedLocator, NullLocator

    reached = [1.0]
    for race, place in zip(found, places, strict=True):
        if race.fused.status != OK:
            beside(panel, race.fused.status, place, "#c92a2a")
        eager = race.rivals.get("eager")
        if eager is None or eager.median_ms is None:
            continue
        for row in (*race.rivals.values(), race.fused):
            if row.median_ms is None or row is eager:
                continue
            main = row is race.fused
            ratio, colour = eager.median_ms / row.median_ms, COLOURS[row.provider]
            reached.append(ratio)
            panel.plot(
                [eager.median_ms / row.p80_ms, eager.median_ms / row.p20_ms],
                [place, place],
                color=colour,
                linewidth=2.5 if main else 1.5,
                alpha=0.5,
                solid_capstyle="round",
            )
            panel.plot(ratio, place, "o", color=colour, ms=7 if main else 5, zorder=3 + main)
            if main:
                panel.plot([1, ratio], [place, place], color=colour, linewidth=1, zorder=2)
                beside(panel, f"{ratio:.2f}×", place, colour)
    panel.axvline(1, color=COLOURS["eager"], linewidth=1.5, zorder=1)
    panel.set_xscale("log", base=2)
    panel.set_xlim(min(0.7, 0.8 * min(reached)), max(2.2, 1.3 * max(reached)))
    ticks = [2.0**k for k in range(-6, 9)]
    low, high = panel.get_xlim()
    panel.xaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}×" if x >= 1 else f"1/{1 / x:g}")
    panel.set_title("Speed against eager PyTorch\n(bars from p20 to p80, more is better)")


def beside(panel: Any, text: str, place: float, colour: str) -> None:
    """A word in the margin right of a panel."""
    panel.annotate(
        text,
        (1.01, place),
        xycoords=("axes fraction", "data"),
        va="center",
        color=colour,
        weight="bold",
    )
