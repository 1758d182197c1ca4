"""A run as one self-contained HTML page, the picture inlined."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import jinja2

from bench.report import Column, columns, kind, limits, notes, work
from bench.rows import Race, Row, races

TEMPLATE = Path(__file__).with_name("page.html.j2")


def html(rows: Sequence[Row], picture: bytes | None) -> str:
    """The page, with a PNG on top unless that is None."""
    tables = []
    for threads, group in groupby(races(rows), lambda race: race.fused.threads):
        found = list(group)
        shown = columns(found)
        tables.append(
            {
                "threads": threads,
                "limits": limits(found[0].fused),
                "headings": [column.heading for column in shown],
                "lines": lines(found, shown),
            }
        )
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    inlined = None if picture is None else base64.b64encode(picture).decode()
    return template.render(picture=inlined, tables=tables, notes=notes(rows))


def lines(found: Sequence[Race], shown: Sequence[Column]) -> list[dict]:
    """A line of the table for each race, the first of an operation with its title."""
    made, title = [], None
    for race in found:
        cells = [(column.cell(race), kind(column, race)) for column in shown]
        made.append(
            {
                "title": race.fused.title if race.fused.title != title else "",
                "name": work(race.fused),
                "cells": cells,
            }
        )
        title = race.fused.title
    return made
