"""Cases of the norms, with and without a residual."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastattn.testing.case import Case
from fastattn.testing.inputs import Draw


def norm_cases(function: str) -> Iterator[Case]:
    """Rows from few columns to many; where there is a residual, dropout and no sum too."""
    added, centred = function.startswith("add_"), function.endswith("layer_norm")

    def case(
        name: str,
        shape: tuple[int, ...],
        dims: int = 1,
        weight: str | None = "normal",
        bias: str | None = "normal",
        residual: str = "normal",
        **options: Any,
    ) -> Case:
        tensors = {"input": Draw(shape)}
        if added:
            tensors["residual"] = Draw(shape, residual)
        normalized = shape[len(shape) - dims :]
        if weight:
            tensors["weight"] = Draw(normalized, weight)
        if bias and centred:
            tensors["bias"] = Draw(normalized, bias)
        return Case(function, name, tensors, {"normalized_shape": normalized, **options})

    yield case("plain", (70, 256))
    yield case("odd_sizes", (3, 11, 37))
    yield case("one_row", (1, 1000), eps=1e-3)
    yield case("no_parameters", (40, 129), weight=None, bias=None)
    yield case("fp32_parameters", (90, 65), weight="fp32", bias="fp32")
    yield case("weight_only", (40, 72), bias=None)
    yield case("two_dimensions", (2, 15, 6, 21), dims=2)
    yield case("few_columns", (500, 3))
    yield case("many_columns", (2, 9000))
    yield case("no_rows", (0, 16))
    if not added:
        return
    yield case("dropout", (70, 200), dropout_p=0.3, seed=2**62 + 12345)
    yield case("fp32_residual", (5, 13, 50), residual="wide", weight="fp32")
    yield case("sum_unwritten", (40, 130), return_sum=False)
    yield case(
        "everything",
        (3, 15, 4, 30),
        dims=2,
        residual="wide",
        dropout_p=0.2,
        seed=7,
        return_sum=False,
    )
