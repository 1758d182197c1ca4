"""What is true of linear layers and feed-forward blocks whatever computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import ffn, linear
from fastattn.testing import DTYPES, assert_close_to_oracle

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
EACH = pytest.mark.parametrize("activation", ACTIVATIONS)


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastattn.use_kernel(request.param):
        yield request.param


def grads(function: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random projection of the output."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return torch.autograd.grad(out, leaves, weights)


def randn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


# linear


@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (2, 1, 5), (0,), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("sizes", [(12, 20), (1, 1), (0, 4), (4, 0), (300, 1), (1, 300)], ids=str)
def test_linear_is_torchs(lead: tuple[int, ...], sizes: tuple[int, int]) -> None:
    leaves = randn((*lead, sizes[0]), sizes[::-1], sizes[1:])
    for count in (2, 3):
        found = linear(*leaves[:count])
        torch.testing.assert_close(found, F.linear(*leaves[:count]))
        torch.testing.assert_close(grads(linear, leaves[:count]), grads(F.linear, leaves[:count]))


def test_linear_without_features_gives_the_bias() -> None:
    x, weight, bias = torch.randn(3, 0), torch.randn(4, 0), torch.randn(4)
    assert linear(x, weight, bias).equal(bias.expand(3, 4))
    assert linear(x, weight, bias, "relu").equal(bias.relu().expand(3, 4))
    assert linear(x, weight).equal(torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_changes_no_bit(dtype: torch.dtype) -> None:
    x = torch.randn(50, 70).to(dtype)
    assert linear(x, torch.eye(70, dtype=dtype)).equal(x)
    assert linear(x, torch.eye(70, dtype=dtype), torch.zeros(70, dtype=dtype)).equal(x)


def test_rows_are_independent() -> None:
    x, weight, bias = randn((40, 30), (25, 30), (25,), dtype=torch.float32)
    out = linear(x, weight, bias, "gelu")
    spoilt = x.clone()
    spoilt[3], spoilt[20] = float("nan"), float("inf")
    others = torch.ones(40, dtype=torch.bool)
    others[[3, 20]] = False
    assert linear(spoilt, weight, bias, "gelu")[others].equal(out[others])
    assert linear(spoilt, weight, bias, "gelu")[3].isnan().all()


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_over_their_whole_range(activation: str, dtype: torch.dtype) -> None:
    """Values and slopes, the far tails included, keep the error rule against torch's own."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-8, 4, 500)]).to(dtype)
    x = torch.cat([x, -x])[:, None]
    weight = torch.ones(1, 1, dtype=dtype)

    def both(function: Callable, x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        out = function(leaf)
        return out, torch.autograd.grad(out.sum(), leaf)[0]

    found = both(lambda x: linear(x, weight, activation=activation), x)
    eager = both(ACTIVATIONS[activation], x)
    oracle = both(ACTIVATIONS[activation], x.double())
    for factor, *triple in zip((2, 3), found, eager, oracle, strict=True):
        assert_close_to_oracle(*triple, factor, activation)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_of_the_extremes(kernel: str, activation: str, dtype: torch.dtype) -> None:
    extremes = torch.tensor([0.0, 1e30, -1e30, float("inf"), float("nan")], dtype=dtype)
    found = linear(extremes[:, None], torch.ones(1, 1, dtype=dtype), activation=activation)[:, 0]
    # torch's own GELU of infinity is infinite in fp64 only
    meant = extremes if kernel == "reference" else extremes.double()
    torch.testing.assert_close(found, ACTIVATIONS[activation](meant).to(dtype), equal_nan=True)


@pytest.mark.parametrize("which", ["transposed", "sliced", "expanded"])
def test_weights_of_any_stride(which: str) -> None:
    x, square, row = randn((9, 30), (30, 60), (1, 30), dtype=torch.float32)
    weight = {
        "transposed": square[:, ::2].T,
        "sliced": square.T[1::2],
        "expanded": row.expand(30, 30),
    }
    strided = weight[which]
    packed = strided.contiguous()
    assert linear(x, strided, activation="silu").equal(linear(x, packed, activation="silu"))
    found = grads(linear, [x, strided])
    for grad, ref in zip(found, grads(linear, [x, packed]), strict=True):
        assert grad.equal(ref)
    assert ffn(x, strided, strided).equal(ffn(x, packed, packed))


# ffn


@EACH
@pytest.mark.parametrize("biased", [False, True])
def test_plain_block_is_its_formula(activation: str, biased: bool) -> None:
    leaves = randn((6, 12), (20, 12), (9, 20), (20,), (9,))[: 5 if biased else 3]
    act = ACTIVATIONS[activation]

    def written(x: Tensor, up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
        up_bias, down_bias = biases or (0, 0)
        return act(x @ up.T + up_bias) @ down.T + down_bias

    def ours(*tensors: Tensor) -> Tensor:
        return ffn(*tensors, activation=activation)

    torch.testing.assert_close(ours(*leaves), written(*leaves))
    torch.testing.assert_close(grads(ours, leaves), grads(written, leaves))


@EACH
@pytest.mark.parametrize("biased", [False, True])
def test_gated_block_is_its_formula(activation: str, biased: bool) -> None:
    leaves = randn((6, 12), (20, 12), (9, 20), (20, 12), (20,), (9,), (20,))[: 7 if biased else 4]
    act = ACTIVATIONS[activation]

    def written(x: Tensor, up: Tensor, down: Tensor, gate: Tensor, *biases: Tensor) -> Tensor:
        up_bias, down_bias, gate_bias = biases or (0, 0, 0)
        return (act(x @ gate.T + gate_bias) * (x @ up.T + up_bias)) @ down.T + down_bias

    def ours(x: Tensor, up: Tensor, down: Tensor, gate: Tensor, *biases: Tensor) -> Tensor:
        up_bias, down_bias, gate_bias = biases or (None, None, None)
        return ffn(
            x,
            up,
            down,
            up_bias,
            down_bias,
            gate_weight=gate,
            gate_bias=gate_bias,
            activation=activation,
        )

    torch.testing.assert_close(ours(*leaves), written(*leaves))
    torch.testing.assert_close(grads(ours, leaves), grads(written, leaves))


def test_a_block_is_two_linear_layers() -> None:
    x, up, down, up_bias, down_bias = randn((7, 33), (65, 33), (18, 65), (65,), (18,))
    torch.testing.assert_close(
        ffn(x, up, down, up_bias, down_bias),
        linear(linear(x, up, up_bias, "gelu"), down, down_bias),
    )


def test_an_open_gate_lets_through() -> None:
    x, up, down = randn((5, 8), (12, 8), (8, 12))
    closed = {"gate_weight": torch.zeros(12, 8).double(), "activation": "relu"}
    assert (ffn(x, up, down, **closed) == 0).all()
    opened = ffn(x, up, down, **closed, gate_bias=torch.ones(12).double())
    torch.testing.assert_close(opened, x @ up.T @ down.T)


@pytest.mark.parametrize(
    ("lead", "sizes"),
    [((), (4, 6, 5)), ((0,), (4, 6, 5)), ((3,), (0, 6, 5)), ((3,), (4, 0, 5)), ((3,), (4, 6, 0))],
)
@pytest.mark.parametrize("gated", [False, True])
def test_empty_sizes(lead: tuple[int, ...], sizes: tuple[int, int, int], gated: bool) -> None:
    features, hidden, out_features = sizes
    x, up, down, gate, up_bias, down_bias = randn(
        (*lead, features),
        (hidden, features),
        (out_features, hidden),
        (hidden, features),
        (hidden,),
        (out_features,),
    )

    def ours(x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor, down_bias: Tensor) -> Tensor:
        return ffn(x, up, down, up_bias, down_bias, gate_weight=gate if gated else None)

    def written(x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor, down_bias: Tensor) -> Tensor:
        hidden = F.linear(x, up, up_bias)
        hidden = F.gelu(F.linear(x, gate)) * hidden if gated else F.gelu(hidden)
        return F.linear(hidden, down, down_bias)

    leaves = [x, up, down, up_bias, down_bias]
    torch.testing.assert_close(ours(*leaves), written(*leaves))
    torch.testing.assert_close(grads(ours, leaves), grads(written, leaves))
