"""What is true of the cross-entropy of a linear layer whatever computes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import linear_cross_entropy

IGNORED = -100


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastattn.use_kernel(request.param):
        yield request.param


def call(*lead: int, features: int = 12, classes: int = 9) -> tuple[list[Tensor], Tensor]:
    """Input, weight and bias in fp64, which want gradients, and targets, every fifth ignored."""
    shapes = (*lead, features), (classes, features), (classes,)
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    target = torch.randint(classes, lead)
    target.flatten()[::5] = IGNORED
    return leaves, target


def unfused(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, **options: Any
) -> Tensor:
    logits = F.linear(input, weight, bias)
    found = F.cross_entropy(logits.flatten(0, -2), target.flatten(), **options)
    return found.view(target.shape) if found.dim() else found


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_is_torchs(reduction: str, smoothing: float, with_bias: bool) -> None:
    leaves, target = call(3, 4)
    input, weight, bias = leaves if with_bias else (*leaves[:2], None)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    found = linear_cross_entropy(input, weight, target, linear_bias=bias, **options)
    wanted = unfused(input, weight, target, bias, **options)
    torch.testing.assert_close(found, wanted)
    share = torch.randn_like(wanted)  # of the whole loss: forward cannot know it
    leaves = [leaf for leaf in (input, weight, bias) if leaf is not None]
    grads = (torch.autograd.grad(loss, leaves, share) for loss in (found, wanted))
    torch.testing.assert_close(*grads)


def test_ignored_rows_do_not_count() -> None:
    (input, weight, bias), target = call(20)
    kept = target != IGNORED
    with torch.no_grad():
        input[~kept] = math.nan
    loss = linear_cross_entropy(input, weight, target, linear_bias=bias)
    alone = linear_cross_entropy(input[kept], weight, target[kept], linear_bias=bias)
    torch.testing.assert_close(loss, alone)
    if fastattn.explain("linear_cross_entropy", input, weight, target).kernel == "cpu":
        grads = torch.autograd.grad(loss, (input, weight, bias))
        assert not grads[0][~kept].any() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("rows", [0, 3])
def test_the_mean_of_no_rows(rows: int) -> None:
    (input, weight, _), target = call(rows)
    target.fill_(IGNORED)
    loss = linear_cross_entropy(input, weight, target)
    assert loss.isnan()
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (input, weight)))
    assert linear_cross_entropy(input, weight, target, reduction="sum") == 0


def test_backward_twice() -> None:
    (input, weight, bias), target = call(7)
    loss = 3 * linear_cross_entropy(input, weight, target, linear_bias=bias)
    first = torch.autograd.grad(loss, (input, weight, bias), retain_graph=True)
    again = torch.autograd.grad(loss, (input, weight, bias))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))


def test_a_gradient_that_is_not_wanted() -> None:
    (input, weight, _), target = call(7)
    (alone,) = torch.autograd.grad(linear_cross_entropy(input, weight.detach(), target), input)
    both = torch.autograd.grad(linear_cross_entropy(input, weight, target), (input, weight))
    torch.testing.assert_close(alone, both[0])
    with torch.no_grad():
        assert not linear_cross_entropy(input, weight, target).requires_grad


def test_large_logits() -> None:
    weight = torch.tensor([[1e4], [-1e4], [9e3]], requires_grad=True)
    input, target = torch.ones(2, 1), torch.tensor([0, 1])
    loss = linear_cross_entropy(input, weight, target, reduction="none")
    assert loss.tolist() == [0.0, 2e4]


def test_classes_that_are_ruled_out() -> None:
    (input, weight, bias), target = call(10)
    with torch.no_grad():
        bias[8] = -math.inf
    target = target.masked_fill(target == 8, 1)
    loss = linear_cross_entropy(input, weight, target, linear_bias=bias)
    torch.testing.assert_close(
        loss, linear_cross_entropy(input, weight[:8], target, linear_bias=bias[:8])
    )
    assert not torch.autograd.grad(loss, weight)[0][8].any()


def test_a_cap() -> None:
    (input, weight, _), target = call(10)
    logits = 2 * (F.linear(input, weight) / 2).tanh()
    found = linear_cross_entropy(input, weight, target, softcap=2)
    torch.testing.assert_close(found, F.cross_entropy(logits, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_is_not_rounded(dtype: torch.dtype) -> None:
    (input, weight, _), target = call(10)
    loss = linear_cross_entropy(input.to(dtype), weight.to(dtype), target)
    assert loss.dtype == torch.float32 and loss != loss.to(dtype)


def test_most_logits_never_exist(peak_growth: Callable[..., int], kernel: str) -> None:
    before = """
import torch
from fastattn import linear_cross_entropy

def step(rows):
    x, w = torch.randn(rows, 4, requires_grad=True), torch.randn(4096, 4, requires_grad=True)
    linear_cross_entropy(x, w, torch.zeros(rows).long()).backward()

step(512)
"""
    grown, all_logits = peak_growth(before, "step(8192)", FASTATTN_KERNEL=kernel), 8192 * 4096 * 4
    assert grown > all_logits if kernel == "reference" else grown < all_logits / 8
