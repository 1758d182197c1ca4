"""Cases of a language model's loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fastattn.testing.case import Case
from fastattn.testing.inputs import Draw


def loss_cases(function: str) -> Iterator[Case]:
    """Every reduction, ignored rows, and sizes from 0 on."""

    def case(
        name: str,
        lead: tuple[int, ...],
        sizes: tuple[int, int],
        *,
        bias: bool = True,
        ignored: int = 0,
        vanishing: tuple[str, ...] = (),
        **options: Any,
    ) -> Case:
        features, classes = sizes
        ignore_index = options.get("ignore_index", -100)
        targets = [7919 * i % 10007 % classes for i in range(math.prod(lead))]
        for i in range(ignored):  # the first row, and others here and there
            targets[7 * i % len(targets)] = ignore_index
        tensors = {
            "input": Draw((*lead, features)),
            "linear_weight": Draw((classes, features), "weight"),
            "target": Draw(lead, "numbers", tuple(targets)),
        }
        if bias:
            tensors["linear_bias"] = Draw((classes,))
        return Case(function, name, tensors, options, vanishing)

    yield case("plain", (50,), (129, 70))
    yield case("no_bias", (2, 25), (64, 40), bias=False)
    yield case("ignored", (3, 40), (30, 50), ignored=70)
    yield case("all_ignored", (4,), (16, 8), ignored=4, reduction="sum")
    yield case("sum", (60,), (40, 33), reduction="sum", ignored=3)
    yield case("none", (2, 30), (40, 33), reduction="none", ignored=3)
    yield case("smoothing", (40,), (50, 61), label_smoothing=0.1, ignored=3)
    yield case("softcap", (40,), (50, 61), softcap=1.5)
    yield case("vector", (), (96, 48))
    yield case("one_row", (1,), (257, 130))
    yield case("odd_sizes", (3, 7), (11, 5))
    everything = ("input", "linear_weight", "linear_bias")
    yield case("one_class", (9,), (8, 1), vanishing=everything)
    yield case("one_class_smooth", (), (128, 1), vanishing=everything, label_smoothing=0.1)
    yield case("chunks", (270,), (5, 4099), ignored=11)  # more rows than logits are made of at once
    yield case(
        "everything",
        (5, 13),
        (10, 42),
        reduction="none",
        ignore_index=3,
        ignored=20,
        label_smoothing=0.2,
        softcap=2.0,
    )
    yield case("no_rows", (0,), (16, 8), reduction="sum")
    yield case("no_features", (5,), (0, 8))
