"""Cases of rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastattn.testing.case import Case
from fastattn.testing.inputs import Draw


def rope_cases(function: str) -> Iterator[Case]:
    """Both orders of pairs, tables of every shape, and positions."""

    def case(
        name: str,
        sizes: tuple[int, int, int, int, int],
        angles: int,
        tables: tuple[int, ...] | None = None,
        **options: Any,
    ) -> Case:
        batch, heads, kv_heads, length, width = sizes
        table = Draw((*(tables or (length,)), angles), "slopes")
        tensors = {"query": Draw((batch, heads, length, width)), "cos": table, "sin": table}
        if kv_heads:
            tensors["key"] = Draw((batch, kv_heads, length, width))
        else:
            options["key"] = None
        return Case(function, name, tensors, options)

    yield case("plain", (2, 3, 3, 50, 64), 32)
    yield case("interleaved", (2, 3, 3, 50, 64), 32, interleaved=True)
    yield case("partial", (2, 4, 2, 33, 40), 12)
    yield case("partial_interleaved", (2, 4, 2, 33, 40), 12, interleaved=True)
    yield case("odd_sizes", (3, 5, 1, 7, 13), 5)
    yield case("odd_sizes_interleaved", (3, 5, 1, 7, 13), 5, interleaved=True)
    yield case("angles_of_batches", (2, 3, 1, 20, 32), 16, tables=(2, 20))
    yield case("one_row", (1, 8, 2, 1, 128), 64, tables=(1, 1))
    yield case("query_alone", (2, 3, 0, 17, 24), 12)
    positions = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    yield case("positions", (2, 3, 1, 5, 32), 16, tables=(10,), positions=positions)
    yield case(
        "shared_positions", (2, 3, 1, 5, 32), 8, (10,), positions=positions[0], interleaved=True
    )
    yield case("no_angles", (2, 2, 2, 5, 8), 0)
    yield case("no_rows", (2, 2, 2, 0, 8), 4)
