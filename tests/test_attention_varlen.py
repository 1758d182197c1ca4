"""What is true of packed sequences: each is on its own, as if the dense op had it alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import attention, attention_varlen

Q_LENS, KV_LENS = (20, 0, 130, 1, 64), (33, 5, 400, 0, 64)
BATCH, HEADS, KV_HEADS = len(Q_LENS), 4, 2


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastattn.use_kernel(request.param):
        yield request.param


def ends(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def packed(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (sum(Q_LENS), HEADS, 16), (sum(KV_LENS), KV_HEADS, 16), (sum(KV_LENS), KV_HEADS, 24)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def each_alone(query: Tensor, key: Tensor, value: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The same by one dense call a sequence that has a query."""
    slopes = options.pop("alibi_slopes", None)
    outs, lses = [], []
    for n, tensors in enumerate(
        zip(query.split(Q_LENS), key.split(KV_LENS), value.split(KV_LENS), strict=True)
    ):
        one = [tensor.transpose(0, 1)[None] for tensor in tensors]
        own = {} if slopes is None else {"alibi_slopes": slopes[n]}
        with fastattn.use_kernel("reference" if 0 in (Q_LENS[n], KV_LENS[n]) else "cpu"):
            out, lse = attention(*one, **options, **own, return_lse=True)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "align": "top_left"},
        {"window": (30, 4), "softcap": 3.0, "scale": 0.4},
        {"alibi_slopes": torch.rand(BATCH, HEADS), "window": (50, None)},
        {"sinks": torch.randn(HEADS, dtype=torch.float64), "causal": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_each_sequence_is_on_its_own(options: dict) -> None:
    leaves = packed()
    if "sinks" in options:
        leaves.append(options["sinks"].clone().requires_grad_())

    def gradients(function, *boundaries: Tensor) -> tuple[Tensor, ...]:
        given = options | ({"sinks": leaves[3]} if "sinks" in options else {})
        out, lse = function(*leaves[:3], *boundaries, **given)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
        total = (out * weights).sum() + lse.masked_fill(lse == -math.inf, 0).sin().sum()
        return out, lse, *torch.autograd.grad(total, leaves)

    def function(*tensors: Tensor, **given) -> tuple[Tensor, Tensor]:
        return attention_varlen(*tensors, **given, return_lse=True)

    for found, expected in zip(
        gradients(function, ends(Q_LENS), ends(KV_LENS)), gradients(each_alone), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_dropout_is_that_of_the_padded_batch() -> None:
    query, key, value = (tensor.detach() for tensor in packed())
    found = attention_varlen(query, key, value, ends(Q_LENS), ends(KV_LENS), dropout_p=0.4, seed=11)
    padded = [
        torch.nn.utils.rnn.pad_sequence(tensor.split(lengths), batch_first=True).transpose(1, 2)
        for tensor, lengths in ((query, Q_LENS), (key, KV_LENS), (value, KV_LENS))
    ]
    mask = torch.arange(max(KV_LENS)) < torch.tensor(KV_LENS)[:, None, None, None]
    out = attention(*padded, mask=mask, dropout_p=0.4, seed=11).transpose(1, 2)
    expected = torch.cat([rows[:length] for rows, length in zip(out, Q_LENS, strict=True)])
    torch.testing.assert_close(found, expected)


def test_nothing_passes_from_one_sequence_to_the_next() -> None:
    query, key, value = (tensor.detach() for tensor in packed(torch.float32))
    whole = attention_varlen(query, key, value, ends(Q_LENS), ends(KV_LENS), causal=True)
    for tensor, lengths in ((query, Q_LENS), (key, KV_LENS), (value, KV_LENS)):
        tensor.split(lengths)[2].fill_(math.nan)
    found = attention_varlen(query, key, value, ends(Q_LENS), ends(KV_LENS), causal=True)
    for n, (rows, before) in enumerate(zip(found.split(Q_LENS), whole.split(Q_LENS), strict=True)):
        if n == 2:
            assert rows.isnan().any(-1).all()
        else:
            torch.testing.assert_close(rows, before)


def test_boundaries_may_be_int32_and_strided() -> None:
    tensors = packed(torch.float32)
    whole = attention_varlen(*tensors, ends(Q_LENS), ends(KV_LENS), 130, 400)
    apart = ends(Q_LENS).repeat_interleave(2)[::2]
    assert attention_varlen(*tensors, apart, ends(KV_LENS).int()).equal(whole)


@pytest.mark.parametrize("kernel", ["cpu"], indirect=True)
def test_what_a_graph_cannot_check_the_kernel_does(kernel: str) -> None:
    tensors = [tensor.detach() for tensor in packed(torch.float32)]
    compiled = torch.compile(attention_varlen, fullgraph=True, backend="aot_eager")
    good = ends(Q_LENS), ends(KV_LENS)
    assert compiled(*tensors, *good).equal(attention_varlen(*tensors, *good))
    for bad in (ends(Q_LENS) + 1, ends(Q_LENS).flip(0), ends((1, 1, 1, 1, 1))):
        with pytest.raises(RuntimeError, match="cu_seqlens_q"):
            compiled(*tensors, bad, good[1])
    with pytest.raises(RuntimeError, match="max_seqlen"):
        compiled(*tensors, *good, 129)
