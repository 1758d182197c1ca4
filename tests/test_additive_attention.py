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


@pytest.fixture(params=KERNELS, autouse=True)
def kernel(request: pytest.FixtureRequest):
    with fastattn.use_kernel(request.param):
        yield request.param


def drawn(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """query, key, value, weight."""
    shapes = (B, H, SQ, D), (B, H, SK, D), (B, H, SK, DV), (H, D)
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_formula(dtype: torch.dtype) -> None:
    mask = torch.rand(B, 1, SQ, SK) < 0.7
    check(fastattn.additive_attention, plain, drawn(dtype))
    check(
        lambda *tensors: fastattn.additive_attention(*tensors, mask=mask),
        lambda *tensors: plain(*tensors, mask),
        drawn(dtype),
    )


def test_causal_is_a_mask_aligned_to_the_last_key() -> None:
    triangle = torch.ones(SQ, SK, dtype=torch.bool).tril(SK - SQ)
    tensors = drawn()
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


@pytest.mark.parametrize("strange", [math.nan, math.inf])
def test_what_is_not_seen_does_not_leak(strange: float) -> None:
    mask = torch.ones(SK, dtype=torch.bool)
    mask[5::7] = False
    tensors = drawn()
    clean = with_gradients(lambda *t: fastattn.additive_attention(*t, mask=mask), tensors)
    for tensor in tensors[1:3]:
        tensor[:, :, ~mask] = strange
    found = with_gradients(lambda *t: fastattn.additive_attention(*t, mask=mask), tensors)
    for tensor, expected in zip(found, clean, strict=True):
        assert tensor.isfinite().all()
        torch.testing.assert_close(tensor, expected)
    assert not found[2][:, :, ~mask].any() and not found[3][:, :, ~mask].any()
    assert not fastattn.additive_attention(*tensors).isfinite().any()


def test_a_nan_query_spoils_what_it_sees() -> None:
    mask = torch.rand(B, H, SQ, SK) < 0.7
    tensors = drawn()
    tensors[0][:, :, 7] = math.nan
    out, _, key, value, _ = with_gradients(
        lambda *t: fastattn.additive_attention(*t, mask=mask), tensors
    )
    assert out[:, :, 7].isnan().all() and out[:, :, :7].isfinite().all()
    for grad in key, value:
        assert grad.isnan().any(-1).equal(mask[:, :, 7])


def test_a_row_that_sees_nothing_gives_zero() -> None:
    mask = torch.ones(B, 1, SQ, SK, dtype=torch.bool)
    mask[:, :, 3] = False
    tensors = drawn()
    out, query, *rest = with_gradients(
        lambda *t: fastattn.additive_attention(*t, mask=mask), tensors
    )
    assert not out[:, :, 3].any() and not query[:, :, 3].any()
    assert all(tensor.isfinite().all() for tensor in rest)
    tall = fastattn.additive_attention(
        tensors[1], tensors[0], tensors[2][:, :, :SQ], tensors[3], causal=True
    )
    assert not tall[:, :, : SK - SQ].any() and tall[:, :, SK - SQ].any()


@pytest.mark.parametrize("size", [15.0, 21.0, 60.0])
def test_large_features(size: float) -> None:
    """Those that cancel and those that saturate tanh, past the range of their exponentials."""
    query, key, value, weight = drawn()
    shift = size * torch.randn(D).sign()
    check(fastattn.additive_attention, plain, (query + shift, key - shift, value, weight))
    check(fastattn.additive_attention, plain, (size * query, size * key, value, weight))


def test_infinite_features_saturate() -> None:
    query, key, value, weight = drawn()
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
