"""What is true of attention weights: they are those by which the values are mixed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import attention, attention_weights

BATCH, HEADS, Q_LEN, KV_LEN, DIM = 2, 4, 30, 45, 8


def query_and_key(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(BATCH, HEADS, Q_LEN, DIM, dtype=dtype),
        torch.randn(BATCH, 2, KV_LEN, DIM, dtype=dtype),
    )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"causal": True, "align": "top_left", "window": (7, None)},
    {"mask": torch.rand(BATCH, 1, Q_LEN, KV_LEN) < 0.5, "softcap": 2.0},
    {"mask": torch.rand(KV_LEN) < 0.7, "bias": torch.randn(HEADS, Q_LEN, KV_LEN).double()},
    {"relative_bias": torch.randn(HEADS, Q_LEN + KV_LEN - 1).double(), "causal": True},
    {"bias": torch.randn(BATCH, 1, 1, KV_LEN).masked_fill(torch.rand(KV_LEN) < 0.2, -math.inf)},
    {"alibi_slopes": torch.rand(HEADS), "sinks": torch.randn(HEADS), "scale": 0.7},
    {"alibi_slopes": torch.rand(BATCH, HEADS), "causal": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_they_mix_the_values(options: dict[str, Any]) -> None:
    """With the identity as values, attention returns its weights."""
    query, key = query_and_key()
    identity = torch.eye(KV_LEN, dtype=torch.float64).expand(BATCH, 2, -1, -1)
    weights = attention(query, key, identity, **options)
    torch.testing.assert_close(attention_weights(query, key, **options), weights)
    heads, rows = [3, 0], [29, 4, 4, -2]
    found = attention_weights(query, key, heads=heads, rows=rows, **options)
    torch.testing.assert_close(found, weights[:, heads][:, :, rows])


def test_chosen_by_a_tensor_or_not_at_all() -> None:
    query, key = query_and_key(torch.bfloat16)
    all_of_them = attention_weights(query, key)
    assert all_of_them.dtype == torch.float32
    assert all_of_them.shape == (BATCH, HEADS, Q_LEN, KV_LEN)
    some = attention_weights(query, key, rows=torch.arange(5, dtype=torch.int32), heads=range(2))
    assert some.shape == (BATCH, 2, 5, KV_LEN)
    torch.testing.assert_close(some, all_of_them[:, :2, :5])
    assert attention_weights(query, key, rows=[]).shape == (BATCH, HEADS, 0, KV_LEN)


def test_what_is_hidden_does_not_spoil() -> None:
    query, key = query_and_key()
    key[:, :, 40] = math.nan
    weights = attention_weights(query, key, causal=True)
    spoilt = torch.arange(Q_LEN) + KV_LEN - Q_LEN >= 40
    assert weights[:, :, ~spoilt].isfinite().all()
    assert (weights[:, :, ~spoilt, 40:] == 0).all()
    assert weights[:, :, spoilt, :40].isnan().all()


def test_long_sequences_need_no_square() -> None:
    """The whole matrix would be 4 TB."""
    query = torch.randn(1, 1, 2**20, 2)
    weights = attention_weights(query, query, rows=[2**20 - 1], causal=True)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


def test_gradients_are_those_of_attention() -> None:
    query, key = (tensor.requires_grad_() for tensor in query_and_key())
    identity = torch.eye(KV_LEN, dtype=torch.float64).expand(BATCH, 2, -1, -1)
    found = torch.autograd.grad(
        attention_weights(query, key, rows=[3]).square().sum(), [query, key]
    )
    out = attention(query, key, identity)[:, :, 3:4]
    torch.testing.assert_close(found, torch.autograd.grad(out.square().sum(), [query, key]))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rows": [30]}, ValueError, r"rows.*\[-30, 30\).*30"),
        ({"heads": [0, -5]}, ValueError, "heads"),
        ({"rows": [[1]]}, ValueError, "rows.*one dimension"),
        ({"rows": [1.5]}, TypeError, "rows.*float"),
        ({"heads": "first"}, TypeError, "heads.*str"),
        ({"heads": [True, False]}, TypeError, "heads.*bool"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, ValueError, "mask"),
        ({"align": "left"}, ValueError, "align"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        attention_weights(*query_and_key(), **options)
