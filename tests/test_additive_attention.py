"""What is true of additive attention, whatever kernel computes it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn.testing import DTYPES, assert_close_to_oracle

KERNELS = ("cpu", "reference")
B, H, SQ, SK, D, DV = 2, 3, 40, 70, 24, 16
# Of few queries keys are read row by row, of many in panels.
few_and_many = pytest.mark.parametrize("queries", [2, SQ])


@pytest.fixture(params=KERNELS, autouse=True)
def kernel(request: pytest.FixtureRequest):
    with fastattn.use_kernel(request.param):
        yield request.param


def drawn(dtype: torch.dtype = torch.float32, queries: int = SQ) -> tuple[Tensor, ...]:
    """query, key, value, weight."""
    shapes = (B, H, queries, D), (B, H, SK, D), (B, H, SK, DV), (H, D)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def plain(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The formula, as the paper has it."""
    scores = (torch.tanh(query.unsqueeze(3) + key.unsqueeze(2)) * weight[:, None, None]).sum(-1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ value


def with_gradients(
    function: Callable[..., Tensor], tensors: tuple[Tensor, ...], parameters: tuple = ()
) -> list[Tensor]:
    """The output, and the gradients of the tensors and the parameters."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(3)
    grad = (torch.randn(out.shape, generator=generator) * 16).round().div(16).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [*leaves, *parameters], grad)]


def check(function: Callable, formula: Callable, tensors: tuple[Tensor, ...]) -> None:
    """Outputs and gradients keep the error rule against the formula."""
    exact = with_gradients(formula, tuple(tensor.double() for tensor in tensors))
    found, eager = with_gradients(function, tensors), with_gradients(formula, tensors)
    for i, name in enumerate(("out", "query", "key", "value", "weight")):
        assert_close_to_oracle(found[i], eager[i], exact[i], 2 if i == 0 else 3, name)


@few_and_many
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_formula(dtype: torch.dtype, queries: int) -> None:
    mask = torch.rand(B, 1, queries, SK) < 0.7
    check(fastattn.additive_attention, plain, drawn(dtype, queries))
    check(
        lambda *tensors: fastattn.additive_attention(*tensors, mask=mask),
        lambda *tensors: plain(*tensors, mask),
        drawn(dtype, queries),
    )


@few_and_many
def test_causal_is_a_mask_aligned_to_the_last_key(queries: int) -> None:
    triangle = torch.ones(queries, SK, dtype=torch.bool).tril(SK - queries)
    tensors = drawn(queries=queries)
    causal = with_gradients(lambda *t: fastattn.additive_attention(*t, causal=True), tensors)
    masked = with_gradients(lambda *t: fastattn.additive_attention(*t, mask=triangle), tensors)
    for found, expected in zip(causal, masked, strict=True):
        torch.testing.assert_close(found, expected)


def test_weights_sum_to_one() -> None:
    query, key, value, weight = drawn()
    out = fastattn.additive_attention(query, key, torch.ones_like(value), weight)
    torch.testing.assert_close(out, torch.ones_like(out))


def test_without_weight_it_is_the_mean() -> None:
    query, key, value, weight = drawn()
    out = fastattn.additive_attention(query, key, value, torch.zeros_like(weight))
    torch.testing.assert_close(out, value.mean(2, keepdim=True).expand(out.shape))


def test_a_weight_for_all_heads() -> None:
    query, key, value, weight = drawn()
    each = fastattn.additive_attention(query, key, value, weight[:1].expand(H, D))
    assert fastattn.additive_attention(query, key, value, weight[0]).equal(each)


@few_and_many
@pytest.mark.parametrize("strange", [math.nan, math.inf])
def test_what_is_not_seen_does_not_leak(strange: float, queries: int) -> None:
    mask = torch.ones(SK, dtype=torch.bool)
    mask[5::7] = False
    tensors = drawn(queries=queries)
    clean = with_gradients(lambda *t: fastattn.additive_attention(*t, mask=mask), tensors)
    for tensor in tensors[1:3]:
        tensor[:, :, ~mask] = strange
    found = with_gradients(lambda *t: fastattn.additive_attention(*t, mask=mask), tensors)
    for tensor, expected in zip(found, clean, strict=True):
        assert tensor.isfinite().all()
        torch.testing.assert_close(tensor, expected)
    assert not found[2][:, :, ~mask].any() and not found[3][:, :, ~mask].any()
    assert not fastattn.additive_attention(*tensors).isfinite().any()


@few_and_many
def test_a_nan_query_spoils_what_it_sees(queries: int) -> None:
    mask = torch.rand(B, H, queries, SK) < 0.7
    tensors = drawn(queries=queries)
    tensors[0][:, :, 1] = math.nan
    out, _, key, value, _ = with_gradients(
        lambda *t: fastattn.additive_attention(*t, mask=mask), tensors
    )
    assert out[:, :, 1].isnan().all() and out[:, :, :1].isfinite().all()
    for grad in key, value:
        assert grad.isnan().any(-1).equal(mask[:, :, 1])


@few_and_many
def test_a_row_that_sees_nothing_gives_zero(queries: int) -> None:
    mask = torch.ones(B, 1, queries, SK, dtype=torch.bool)
    mask[:, :, 1] = False
    tensors = drawn(queries=queries)
    out, query, *rest = with_gradients(
        lambda *t: fastattn.additive_attention(*t, mask=mask), tensors
    )
    assert not out[:, :, 1].any() and not query[:, :, 1].any()
    assert all(tensor.isfinite().all() for tensor in rest)


@pytest.mark.parametrize(("queries", "keys"), [(2, 1), (SK, SQ)])
def test_the_first_of_more_queries_than_keys_see_nothing(queries: int, keys: int) -> None:
    query, key, value, weight = drawn(queries=queries)
    tall = fastattn.additive_attention(
        query, key[:, :, :keys], value[:, :, :keys], weight, causal=True
    )
    assert not tall[:, :, : queries - keys].any() and tall[:, :, queries - keys].any()


@few_and_many
@pytest.mark.parametrize("size", [15.0, 21.0, 60.0])
def test_large_features(size: float, queries: int) -> None:
    """Those that cancel and those that saturate tanh, past the range of their exponentials."""
    query, key, value, weight = drawn(queries=queries)
    shift = size * torch.randn(D).sign()
    check(fastattn.additive_attention, plain, (query + shift, key - shift, value, weight))
    check(fastattn.additive_attention, plain, (size * query, size * key, value, weight))


@few_and_many
def test_infinite_features_saturate(queries: int) -> None:
    query, key, value, weight = drawn(queries=queries)
    query[:, :, 0] = math.inf
    found = fastattn.additive_attention(query, key, value, weight)
    torch.testing.assert_close(found, plain(query, key, value, weight))
    torch.testing.assert_close(found[:, :, 0], value.mean(2))


@pytest.mark.parametrize("kernel", ["cpu"], indirect=True)  # the reference makes the pairs
def test_memory_is_not_that_of_pairs(peak_growth: Callable[..., int], kernel: str) -> None:
    """Forward and backward, where query + key alone would take 1 GiB."""
    before = """
import torch, fastattn
query, key, value = (torch.randn(1, 1, 2048, 64, requires_grad=True) for _ in range(3))
weight = torch.randn(64, requires_grad=True)
fastattn.additive_attention(query[:, :, :9], key, value, weight).sum().backward()
"""
    code = "fastattn.additive_attention(query, key, value, weight).sum().backward()"
    assert peak_growth(before, code) < 32 << 20


# the module


class Plain(nn.Module):
    """What fastattn.nn.AdditiveAttention stands for, in torch.nn."""

    def __init__(self, module: fastattn.nn.AdditiveAttention) -> None:
        super().__init__()
        module = copy.deepcopy(module)
        self.q_proj, self.k_proj, self.weight = module.q_proj, module.k_proj, module.weight

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        pairs = self.q_proj(query)[:, :, None] + self.k_proj(key)[:, None]
        scores = (torch.tanh(pairs) @ self.weight).masked_fill(~mask, -math.inf)
        return scores.softmax(-1) @ value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_module_is_the_paper(bias: bool, dtype: torch.dtype) -> None:
    module = fastattn.nn.AdditiveAttention(20, 12, 24, bias=bias, dtype=dtype)
    mask = torch.rand(B, SQ, SK) < 0.7
    tensors = tuple(
        torch.randn(shape).to(dtype) for shape in ((B, SQ, 20), (B, SK, 12), (B, SK, DV))
    )

    def results(module: nn.Module, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        return with_gradients(lambda *t: module(*t, mask), tensors, tuple(module.parameters()))

    exact = results(Plain(module).double(), tuple(tensor.double() for tensor in tensors))
    eager, fused = results(Plain(module), tensors), results(module, tensors)
    for i, oracle in enumerate(exact):
        # A module is a chain of ops, whose errors add.
        assert_close_to_oracle(fused[i], eager[i], oracle, 5, f"result {i}")


def test_module_takes_keys_as_values_and_any_mask() -> None:
    module = fastattn.nn.AdditiveAttention(20, 12, 24)
    query, key = torch.randn(B, SQ, 20), torch.randn(B, SK, 12)
    assert module(query, key).equal(module(query, key, key))
    row = torch.rand(SK) < 0.7
    assert module(query, key, mask=row).equal(module(query, key, mask=row.expand(B, SQ, SK)))
    triangle = torch.ones(SQ, SQ, dtype=torch.bool).tril()
    torch.testing.assert_close(
        module(query, key[:, :SQ], causal=True), module(query, key[:, :SQ], mask=triangle)
    )
    again = fastattn.nn.AdditiveAttention(20, 12, 24)
    again.load_state_dict(module.state_dict())
    assert again(query, key).equal(module(query, key))
