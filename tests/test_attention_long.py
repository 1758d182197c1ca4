"""Attention to keys and values that are far from a core: blocks of queries take turns at them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastattn import attention
from fastattn.testing import Case, Draw, assert_case_close_to_oracle, use_threads

BATCH, HEADS, QUERIES, KEYS, WIDTH = 1, 2, 230, 1200, 256  # 2.5 MB of keys and values
BLOCK = 48  # queries, of which some blocks take turns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (100, 20)},
        {"window": (3, None), "align": "top_left"},
        {"causal": True, "dropout_p": 0.2, "seed": 3, "softcap": 2.0},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_keeps_the_error_rule(options: dict[str, Any], dtype: torch.dtype) -> None:
    tensors = {
        "query": Draw((BATCH, HEADS, QUERIES, WIDTH)),
        "key": Draw((BATCH, 1, KEYS, WIDTH)),
        "value": Draw((BATCH, 1, KEYS, WIDTH)),
    }
    case = Case("attention", "many_keys", tensors, {**options, "return_lse": True})
    assert_case_close_to_oracle(case, dtype, "cpu")


@pytest.mark.parametrize("hidden", [False, True], ids=["", "mask"])
def test_a_block_alone_has_the_same_bits(hidden: bool) -> None:
    query = torch.randn(BATCH, HEADS, QUERIES, WIDTH)
    key, value = torch.randn(2, BATCH, HEADS, KEYS, WIDTH)
    mask = torch.rand(BATCH, HEADS, QUERIES, KEYS) > 0.2 if hidden else None
    if hidden:
        mask[:, :, 60:70] = False
        mask[..., 7], value[:, :, 7] = False, torch.inf
    for threads in (1, 2):
        with use_threads(threads):
            whole = attention(query, key, value, mask=mask)
        for first in range(0, QUERIES, BLOCK):
            rows = slice(first, first + BLOCK)
            part = attention(
                query[:, :, rows], key, value, mask=None if mask is None else mask[:, :, rows]
            )
            assert part.equal(whole[:, :, rows])
