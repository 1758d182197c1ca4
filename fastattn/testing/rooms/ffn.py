"""Cases of the linear layer and the feed-forward block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastattn.testing.case import Case
from fastattn.testing.inputs import Draw


def linear_cases(function: str) -> Iterator[Case]:
    """Every activation, and sizes from 0 on."""

    def case(
        name: str, lead: tuple[int, ...], sizes: tuple[int, int], bias: bool, **options: Any
    ) -> Case:
        features, out_features = sizes
        tensors = {
            "input": Draw((*lead, features)),
            "weight": Draw((out_features, features), "weight"),
        }
        if bias:
            tensors["bias"] = Draw((out_features,))
        return Case(function, name, tensors, options)

    yield case("plain", (50,), (129, 70), bias=True)
    yield case("no_bias", (2, 25), (64, 40), bias=False)
    yield case("deep", (13,), (900, 33), bias=True)
    yield case("vector", (), (96, 48), bias=True)
    yield case("one_row", (1,), (257, 130), bias=True, activation="gelu")
    yield case("odd_sizes", (3, 7), (11, 5), bias=True, activation="silu")
    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        yield case(activation, (60,), (100, 90), bias=True, activation=activation)
    yield case("no_rows", (0,), (16, 8), bias=True, activation="relu")
    yield case("no_features", (5,), (0, 8), bias=True)
    yield case("no_outputs", (5,), (8, 0), bias=True)


def ffn_cases(function: str) -> Iterator[Case]:
    """Every activation, plain and gated, and sizes from 0 on."""

    def case(
        name: str,
        lead: tuple[int, ...],
        sizes: tuple[int, int, int],
        *,
        gated: bool,
        bias: bool = True,
        **options: Any,
    ) -> Case:
        features, hidden, out_features = sizes
        tensors = {
            "input": Draw((*lead, features)),
            "up_weight": Draw((hidden, features), "weight"),
            "down_weight": Draw((out_features, hidden), "weight"),
        }
        if bias:
            tensors |= {"up_bias": Draw((hidden,)), "down_bias": Draw((out_features,))}
        if gated:
            tensors["gate_weight"] = Draw((hidden, features), "weight")
        if gated and bias:
            tensors["gate_bias"] = Draw((hidden,))
        return Case(function, name, tensors, options)

    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        for gated in (False, True):
            name = f"{activation}{'_gated' * gated}"
            yield case(name, (40,), (64, 96, 50), gated=gated, activation=activation)
    yield case("no_bias", (2, 15), (40, 72, 40), gated=True, bias=False, activation="silu")
    yield case("one_row", (1,), (70, 130, 70), gated=False)
    yield case("odd_sizes", (3, 5), (13, 29, 7), gated=True)
    yield case("deep", (9,), (500, 450, 30), gated=True, activation="silu")
    yield case("vector", (), (32, 48, 32), gated=False)
    yield case("dropout", (35,), (30, 150, 20), gated=False, dropout_p=0.3, seed=2**62 + 12345)
    yield case("recompute", (40,), (64, 96, 50), gated=False, recompute=True)
    yield case(
        "everything",
        (3, 13),
        (40, 150, 24),
        gated=True,
        activation="silu",
        dropout_p=0.2,
        seed=7,
        recompute=True,
    )
    yield case("no_rows", (0,), (16, 24, 16), gated=True, dropout_p=0.5, recompute=True)
    yield case("no_hidden", (4,), (16, 0, 8), gated=False)
