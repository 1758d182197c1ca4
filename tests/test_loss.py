"""What is true of the cross-entropy of a linear layer whatever computes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
from fastattn import linear_cross_entropy
from fastattn.emulator import device

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


@pytest.mark.parametrize("factor", [1, 3])
def test_a_gradient_is_added_to_what_is_there(factor: int) -> None:
    leaves, target = call(7)
    input, weight, bias = leaves
    loss = factor * linear_cross_entropy(input, weight, target, linear_bias=bias)
    loss = loss + weight.square().sum()  # which comes to the same gradient by another way
    wanted = torch.autograd.grad(loss, leaves, retain_graph=True)
    loss.backward(retain_graph=True)
    for leaf in leaves:
        leaf.grad.mul_(5)
    loss.backward()
    for leaf, grad in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, 6 * grad)


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


# in Triton


WHY_NOT = fastattn.backends()["triton-emulator"]
in_triton = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


def in_fp32(leaves: list[Tensor]) -> list[Tensor]:
    return [leaf.detach().float().requires_grad_() for leaf in leaves]


def by_triton(leaves: list[Tensor], target: Tensor, **options: Any) -> list[Tensor]:
    """Loss and gradients, without a report of the emulator under any schedule."""
    input, weight, bias = leaves
    with fastattn.use_kernel("triton-emulator"), device.watching(thorough=True):
        loss = linear_cross_entropy(input, weight, target, linear_bias=bias, **options)
        return [loss, *torch.autograd.grad(loss.sum(), leaves)]


def by_torch(leaves: list[Tensor], target: Tensor, **options: Any) -> list[Tensor]:
    loss = unfused(*leaves[:2], target, leaves[2], **options)
    return [loss, *torch.autograd.grad(loss.sum(), leaves)]


@pytest.fixture
def knobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of rows and of classes, and tiles, smaller than the calls of these tests."""
    triton = pytest.importorskip("fastattn.ops.loss.triton", reason="pip install triton")
    monkeypatch.setitem(triton.KNOBS, 80, triton.Knobs(rows=7, classes=100, elements=256))


@in_triton
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks_are_a_matter_of_memory(knobs: None, reduction: str) -> None:
    leaves, target = call(20, classes=600)
    leaves, options = in_fp32(leaves), {"reduction": reduction, "label_smoothing": 0.1}
    found, wanted = (by(leaves, target, **options) for by in (by_triton, by_torch))
    torch.testing.assert_close(found, wanted)


@in_triton
def test_whole_tiles_of_classes_that_are_ruled_out(knobs: None) -> None:
    leaves, target = in_fp32(call(9, classes=600)[0]), torch.arange(590, 599)
    with torch.no_grad():
        leaves[2][:300] = leaves[2][400:450] = -math.inf
    torch.testing.assert_close(by_triton(leaves, target), by_torch(leaves, target))


@in_triton
def test_a_graph_that_is_captured_takes_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the kernel finds out which do not count."""
    from fastattn.ops.loss import triton

    leaves, target = call(11)
    leaves = in_fp32(leaves)
    wanted = by_triton(leaves, target, label_smoothing=0.2, softcap=3.0)
    monkeypatch.setattr(triton, "_live", lambda target, _: torch.arange(len(target)))
    found = by_triton(leaves, target, label_smoothing=0.2, softcap=3.0)
    torch.testing.assert_close(found, wanted)
    assert not found[1][target == IGNORED].any()


@in_triton
@pytest.mark.parametrize("wrong", [-1, 9, 2**40])
def test_a_target_that_is_no_class_spoils_the_loss(wrong: int) -> None:
    """Where nobody could look before: here the torch op is called itself."""
    leaves, target = call(6)
    input, weight, bias = (leaf.detach().float() for leaf in leaves)
    target[2] = wrong
    args = input, weight, bias, target, "none", IGNORED, 0.0, 0.0, True, False, False
    with fastattn.use_kernel("triton-emulator"):
        loss, grad, _, _ = torch.ops.fastattn.linear_cross_entropy_fwd.triton(*args)
    assert loss.isnan().equal(torch.arange(6) == 2) and grad.isnan().any(-1).equal(loss.isnan())


@in_triton
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_backward_finds_what_forward_keeps(reduction: str) -> None:
    leaves, target = call(6)
    tensors, share = [leaf.detach().float() for leaf in leaves], torch.tensor(3.0)
    rest = target, reduction, IGNORED, 0.1, 2.0, True, True, True
    with fastattn.use_kernel("triton-emulator"):
        kept = torch.ops.fastattn.linear_cross_entropy_fwd.triton(*tensors, *rest)[1:]
        found = torch.ops.fastattn.linear_cross_entropy_bwd.triton(share, *tensors, *rest)
    torch.testing.assert_close(found, tuple(3 * grad for grad in kept))


@in_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_is_asked_for_products_in_fp32(dtype: torch.dtype) -> None:
    from fastattn.ops.loss import triton

    with FakeTensorMode():
        left = torch.empty(8, 16, dtype=dtype, device="cuda")
        assert triton._product(left.T, left).dtype == torch.float32
