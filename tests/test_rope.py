"""What is true of rotary position embedding whatever computes it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import apply_rope
from fastattn.emulator import device
from fastattn.testing import DTYPES, LAYOUTS, assert_close_to_oracle, laid_out

INTERLEAVED = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


WHY_NOT = fastattn.backends()["triton-emulator"]
TRITON = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastattn.use_kernel(request.param):
        yield request.param


def tables(length: int, angles: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin [length, angles] of the usual frequencies."""
    frequencies = 10000 ** -(torch.arange(angles).double() / angles)
    angle = torch.arange(length).double()[:, None] * frequencies
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_transformers(dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 4, 9, 32).to(dtype), torch.randn(2, 2, 9, 32).to(dtype)
    cos, sin = tables(9, 16, torch.float64)

    def theirs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        return x * cos + rotate_half(x) * sin

    for found, x in zip(apply_rope(query, key, cos, sin), (query, key), strict=True):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        eager = theirs(x, cos.to(dtype), sin.to(dtype))
        assert_close_to_oracle(found, eager, theirs(x.double(), *(t.to(wide) for t in (cos, sin))))


def test_interleaved_is_multiplication_by_a_unit_number() -> None:
    x = torch.randn(2, 3, 8, 20).double()
    cos, sin = tables(8, 10, torch.float64)
    found = apply_rope(x, None, cos, sin, interleaved=True)
    turned = torch.view_as_complex(x.unflatten(-1, (10, 2))) * torch.complex(cos, sin)
    torch.testing.assert_close(found, torch.view_as_real(turned).flatten(-2))


@INTERLEAVED
def test_scores_depend_on_distance_alone(interleaved: bool) -> None:
    query, key = torch.randn(1, 1, 1, 24).double(), torch.randn(1, 1, 1, 24).double()
    cos, sin = tables(100, 12, torch.float64)

    def score(i: int, j: int) -> Tensor:
        turned = [
            apply_rope(x, None, cos, sin, positions=torch.tensor([n]), interleaved=interleaved)
            for x, n in ((query, i), (key, j))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(99, 95))
    torch.testing.assert_close(score(4, 4), (query * key).sum())


@INTERLEAVED
def test_negative_angles_turn_back(interleaved: bool) -> None:
    x = torch.randn(2, 3, 9, 20).double()
    cos, sin = tables(9, 8, torch.float64)
    there = apply_rope(x, None, cos, sin, interleaved=interleaved)
    assert there[..., 16:].equal(x[..., 16:]) and not there[..., :16].allclose(x[..., :16])
    torch.testing.assert_close(apply_rope(there, None, cos, -sin, interleaved=interleaved), x)
    torch.testing.assert_close(there.norm(dim=-1), x.norm(dim=-1))
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(
        apply_rope(leaf, None, cos, sin, interleaved=interleaved), leaf, there
    )
    torch.testing.assert_close(grad, x)


@INTERLEAVED
def test_positions_choose_lines_of_the_tables(interleaved: bool) -> None:
    query, key = torch.randn(2, 3, 5, 16), torch.randn(2, 1, 5, 16)
    cos, sin = tables(12, 6)
    positions = torch.tensor([[11, 0, 3, 3, 5], [1, 2, 3, 4, 5]])
    found = apply_rope(query, key, cos, sin, positions=positions, interleaved=interleaved)
    apart = apply_rope(query, key, cos[positions], sin[positions], interleaved=interleaved)
    narrow = apply_rope(query, key, cos, sin, positions=positions.int(), interleaved=interleaved)
    for x, other, third in zip(found, apart, narrow, strict=True):
        assert x.equal(other) and x.equal(third)
    one = apply_rope(query, None, cos, sin, positions=positions[1], interleaved=interleaved)
    assert one[1].equal(found[0][1])
    first = apply_rope(query, None, cos[:5], sin[:5], interleaved=interleaved)
    counted = apply_rope(query, None, cos, sin, positions=torch.arange(5), interleaved=interleaved)
    assert first.equal(counted)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_layout_is_kept(kernel: str, transposed: bool) -> None:
    x = torch.randn(2, 9, 3, 16).transpose(1, 2) if transposed else torch.randn(2, 3, 9, 16)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = apply_rope(leaf, None, *tables(9, 8))
    (grad,) = torch.autograd.grad(out, leaf, torch.randn(2, 3, 9, 16))
    assert out.stride() == x.stride()
    if kernel == "cpu":  # elsewhere autograd decides
        assert grad.stride() == x.stride()


@INTERLEAVED
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_is_the_same(dtype: torch.dtype, layout: str, interleaved: bool) -> None:
    query, key = torch.randn(2, 4, 9, 24).to(dtype), torch.randn(2, 1, 9, 24).to(dtype)
    cos, sin = tables(9, 11)
    expected = apply_rope(query, key, cos, sin, interleaved=interleaved)
    given = laid_out(query, layout), laid_out(key, layout)
    found = apply_rope(*given, cos, sin, interleaved=interleaved, inplace=True)
    for x, out, ref in zip(given, found, expected, strict=True):
        assert out is x and x.equal(ref)


@INTERLEAVED
def test_gradients_through_what_was_overwritten(interleaved: bool) -> None:
    cos, sin = tables(5, 6)
    leaves = [torch.randn(2, h, 5, 16, requires_grad=True) for h in (4, 2)]

    def loss(inplace: bool) -> Tensor:
        query, key = (2 * leaf for leaf in leaves)
        query, key = apply_rope(query, key, cos, sin, interleaved=interleaved, inplace=inplace)
        return (query.unflatten(1, (2, 2)) * key[:, :, None]).square().sum()

    for found, expected in zip(
        torch.autograd.grad(loss(True), leaves, create_graph=True),
        torch.autograd.grad(loss(False), leaves, create_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
        again = [
            torch.autograd.grad(g.sum(), leaves[0], retain_graph=True)[0] for g in (found, expected)
        ]
        torch.testing.assert_close(*again)
    with pytest.raises(RuntimeError, match="leaf"):
        apply_rope(leaves[0], None, cos, sin, inplace=True)


def test_in_place_under_torch_compile(kernel: str) -> None:
    cos, sin = tables(5, 8)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def block(x: Tensor) -> Tensor:
        x = x * 2
        return apply_rope(x, None, cos, sin, inplace=True) + x

    x = torch.randn(2, 3, 5, 16)
    torch.testing.assert_close(block(x), 2 * apply_rope(2 * x, None, cos, sin))


@pytest.mark.parametrize("key", [None, torch.randn(2, 1, 5, 8)], ids=["alone", "key"])
def test_opcheck_of_the_op_in_place(key: Tensor | None) -> None:
    args = torch.randn(2, 3, 5, 8), key, *tables(5, 4), None, True
    torch.library.opcheck(torch.ops.fastattn.rope_.default, args)
    if not WHY_NOT:
        with fastattn.use_kernel("triton-emulator"):
            torch.library.opcheck(torch.ops.fastattn.rope_.triton, args)


@TRITON
@INTERLEAVED
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_in_place_in_triton(layout: str, interleaved: bool) -> None:
    """No two threads of a program meet at an element that one of them writes."""
    cos, sin = tables(9, 11)
    given = [laid_out(torch.randn(2, heads, 9, 24).bfloat16(), layout) for heads in (4, 1)]
    expected = apply_rope(*given, cos, sin, interleaved=interleaved)
    with fastattn.use_kernel("triton-emulator"), device.watching(thorough=True):
        apply_rope(*given, cos, sin, interleaved=interleaved, inplace=True)
    for x, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(x, wanted)


@TRITON
def test_gradients_of_what_triton_overwrote() -> None:
    leaves = [torch.randn(2, heads, 5, 16, requires_grad=True) for heads in (4, 2)]
    found = []
    for name in ("triton-emulator", "reference"):
        with fastattn.use_kernel(name):
            turned = apply_rope(*(2 * leaf for leaf in leaves), *tables(5, 6), inplace=True)
            found.append(torch.autograd.grad(sum(x.square().sum() for x in turned), leaves))
    torch.testing.assert_close(*found)


@TRITON
@pytest.mark.parametrize("position", [-1, 10, 2**40])
def test_a_position_in_no_table_spoils_its_rows(position: int) -> None:
    """Where nobody could look before: here the torch op is called itself."""
    x, positions = torch.randn(2, 3, 5, 16), torch.arange(10).view(2, 5)
    positions[1, 2] = position
    with fastattn.use_kernel("triton-emulator"):
        args = x, None, *tables(10, 6), positions, False, False, False
        out, _ = torch.ops.fastattn.rope_fwd.triton(*args)
    spoilt = torch.zeros(2, 3, 5, 12, dtype=torch.bool)
    spoilt[1, :, 2] = True
    assert out[..., :12].isnan().equal(spoilt) and out[..., 12:].equal(x[..., 12:])


def test_learned_angles_get_a_gradient(kernel: str) -> None:
    """By the reference, which the kernel leaves them to."""
    x = torch.randn(1, 2, 5, 8).double()
    leaves = [table.requires_grad_() for table in tables(5, 4, torch.float64)]
    if kernel == "cpu":
        with pytest.raises(fastattn.UnavailableKernelError, match="gradient"):
            apply_rope(x, None, *leaves)
        return
    assert torch.autograd.gradcheck(lambda *t: apply_rope(x, None, *t), leaves)
