"""Cases of additive attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastattn.testing.case import Case
from fastattn.testing.inputs import Draw


def additive_attention_cases(function: str) -> Iterator[Case]:
    """Every argument, and widths from 1 on."""

    def case(
        name: str,
        sizes: tuple[int, int, int, int, int, int],
        *,
        weight: tuple[int, ...] | None = None,
        mask: tuple[int, ...] | None = None,
        vanishing: tuple[str, ...] = (),
        refused: str = "",
        **options: Any,
    ) -> Case:
        batch, heads, q_len, kv_len, width, value_dim = sizes
        tensors = {
            "query": Draw((batch, heads, q_len, width)),
            "key": Draw((batch, heads, kv_len, width)),
            "value": Draw((batch, heads, kv_len, value_dim)),
            "weight": Draw(weight or (heads, width), "weight"),
        }
        if mask:
            tensors["mask"] = Draw(mask, "mask")
        return Case(function, name, tensors, options, vanishing, refused)

    yield case("plain", (2, 2, 70, 130, 32, 24))
    yield case("one_row", (3, 1, 1, 50, 64, 80))
    yield case("few_rows", (2, 3, 2, 300, 20, 12), mask=(2, 1, 2, 300))
    yield case("few_rows_causal", (2, 2, 2, 37, 7, 5), causal=True)
    yield case("one_key", (2, 2, 65, 1, 16, 24), vanishing=("query", "key", "weight"))
    yield case("odd_sizes", (3, 5, 13, 37, 7, 5), weight=(7,))
    yield case("one_feature", (2, 2, 33, 40, 1, 1))
    yield case("long", (1, 1, 150, 600, 9, 16))
    yield case("wide", (1, 1, 17, 35, 300, 40))
    yield case("mask", (2, 3, 40, 70, 16, 16), mask=(2, 1, 40, 70))
    yield case("padding", (2, 2, 30, 90, 24, 16), mask=(2, 1, 1, 90))
    yield case("causal", (2, 2, 150, 150, 16, 8), causal=True)
    yield case("causal_tall", (1, 2, 90, 60, 16, 8), causal=True, mask=(90, 60))
    yield case("no_batch", (0, 2, 5, 7, 8, 8), refused="empty")
    yield case("no_queries", (2, 2, 0, 7, 8, 8), refused="empty")
    yield case("no_keys", (2, 2, 5, 0, 8, 8), refused="empty")
