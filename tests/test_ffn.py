"""What is true of linear layers and feed-forward blocks whatever computes them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import ffn, linear
from fastattn.ops import philox
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


@pytest.mark.parametrize("name", ["cpu", "emulator", "triton-emulator"])
@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
def test_slopes_of_large_inputs_do_not_cancel(activation: str, name: str) -> None:
    """What is left of 1 - sigmoid has lost its bits, and is multiplied by the input."""
    if why_not := fastattn.backends()[name]:
        pytest.skip(why_not)
    x = torch.linspace(3, 12, 301)[:, None]

    def slopes(x: Tensor) -> Tensor:
        leaf, weight = x.requires_grad_(), torch.ones(1, 1, dtype=x.dtype)
        return torch.autograd.grad(linear(leaf, weight, activation=activation).sum(), leaf)[0]

    with fastattn.use_kernel("reference"):
        oracle = slopes(x.double())
    with fastattn.use_kernel(name):
        error = (slopes(x) - oracle).abs().max()
    assert error <= 2 * torch.finfo(torch.float32).eps  # eager's tanh-GELU makes 8 eps


@pytest.mark.parametrize("name", ["emulator", "triton-emulator"])
def test_fp32_products_are_no_long_chains(name: str) -> None:
    """Of what a GPU has no tensor cores for, they round no more than 64 chains of 16, added up."""
    if why_not := fastattn.backends()[name]:
        pytest.skip(why_not)
    x, weight = randn((8, 1024), (32, 1024), dtype=torch.float32)
    oracle = x.double() @ weight.double().T
    chains = torch.zeros(8, 32)
    for start in range(0, 1024, 16):
        chain = torch.zeros(8, 32)
        for k in range(start, start + 16):
            chain += x[:, k, None] * weight[:, k]
        chains += chain
    with fastattn.use_kernel(name):
        found = linear(x, weight)
    assert (found - oracle).square().mean() <= 1.2 * (chains - oracle).square().mean()


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 40])
@pytest.mark.parametrize("sizes", [(5, 3), (135, 70), (260, 4100)], ids=str)
def test_a_transposed_weight_is_not_copied(
    kernel: str, sizes: tuple[int, int], rows: int, dtype: torch.dtype
) -> None:
    """What GPT-2 keeps, [in, out], is read and its gradient written as it lies."""
    x, kept, bias = randn((rows, sizes[0]), sizes, sizes[1:], dtype=dtype)

    def ours(x: Tensor, kept: Tensor, bias: Tensor) -> Tensor:
        return linear(x, kept.t(), bias, "silu")

    def eager(x: Tensor, kept: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.linear(x, kept.t(), bias))

    leaves = [x, kept, bias]
    wide = [leaf.double() for leaf in leaves]
    assert_close_to_oracle(ours(*leaves), eager(*leaves), eager(*wide))
    found = grads(ours, leaves)
    for grad, usual, oracle in zip(found, grads(eager, leaves), grads(eager, wide), strict=True):
        assert_close_to_oracle(grad, usual, oracle, 3.0)
    if kernel == "cpu":
        assert found[1].is_contiguous()


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [31, 32, 45, 200, 1400])  # of one block, and of several
@pytest.mark.parametrize("sizes", [(70, 200, 45), (3, 1, 2), (260, 1100, 64)], ids=str)
def test_what_backward_needs_changes_no_bit(
    sizes: tuple[int, int, int], rows: int, transposed: bool, gated: bool, dtype: torch.dtype
) -> None:
    width, hidden, out = sizes
    shapes = (hidden, width), (out, hidden), (hidden, width)
    x, *biases = randn((rows, width), (hidden,), (out,), (hidden,), dtype=dtype)
    weights = [
        torch.randn(shape[:: -1 if transposed else 1]).to(dtype) / shape[1] ** 0.5
        for shape in shapes
    ]
    if transposed:
        weights = [weight.t() for weight in weights]
    up, down, gate = zip(weights, biases, strict=True)
    gates = {"gate_weight": gate[0], "gate_bias": gate[1]} if gated else {}
    call = functools.partial(ffn, x, up[0], down[0], up[1], activation="silu", **gates)
    with torch.no_grad():
        found = call(down[1]), call()
    up[0].requires_grad_()
    for got, expected in zip(found, (call(down[1]), call()), strict=True):
        assert got.equal(expected)


def test_an_open_gate_lets_through() -> None:
    x, up, down = randn((5, 8), (12, 8), (8, 12))
    closed = {"gate_weight": torch.zeros(12, 8).double(), "activation": "relu"}
    assert (ffn(x, up, down, **closed) == 0).all()
    opened = ffn(x, up, down, **closed, gate_bias=torch.ones(12).double())
    torch.testing.assert_close(opened, x @ up.T @ down.T)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_dropout_is_philox_counted_by_position(gated: bool, seed: int) -> None:
    """Of what is hidden, gate included, which two projections that change nothing let out."""
    x, same = torch.rand(33, 150) + 1, torch.eye(150)
    options = {"activation": "relu", "gate_weight": same if gated else None}
    out = ffn(x, same, same, **options, dropout_p=0.3, seed=seed)
    kept = philox.keep(torch.tensor([seed]), 1, 33, 150, 0.3)[0]
    assert ((out != 0) == kept).all()
    torch.testing.assert_close(out, (x * x if gated else x) / 0.7 * kept)
    assert ffn(x.view(3, 11, 150), same, same, **options, dropout_p=0.3, seed=seed).equal(
        out.view(3, 11, 150)
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_has_its_formulas_gradients(gated: bool, recompute: bool) -> None:
    leaves = randn((6, 12), (70, 12), (9, 70), (70, 12))[: 4 if gated else 3]
    kept = philox.keep(torch.tensor([5]), 1, 6, 70, 0.4)[0]

    def written(x: Tensor, up: Tensor, down: Tensor, *gate: Tensor) -> Tensor:
        hidden = F.silu(x @ gate[0].T) * (x @ up.T) if gate else F.silu(x @ up.T)
        return (hidden * kept / 0.6) @ down.T

    def ours(x: Tensor, up: Tensor, down: Tensor, *gate: Tensor) -> Tensor:
        options = {"gate_weight": gate[0] if gate else None, "recompute": recompute}
        return ffn(x, up, down, **options, activation="silu", dropout_p=0.4, seed=5)

    torch.testing.assert_close(ours(*leaves), written(*leaves))
    torch.testing.assert_close(grads(ours, leaves), grads(written, leaves))


def test_dropout_of_nothing_and_of_everything() -> None:
    x, up, down, bias = randn((6, 12), (20, 12), (9, 20), (9,))
    assert ffn(x, up, down, dropout_p=0.0).equal(ffn(x, up, down))
    x[2, 3] = float("inf")

    def empty(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return ffn(x, up, down, down_bias=bias, activation="relu", dropout_p=1.0)

    assert empty(x, up, down).equal(bias.expand(6, 9))
    x[2, 3] = 0.0
    for leaf, grad in zip([x, up, down], grads(empty, [x, up, down]), strict=True):
        assert grad.equal(torch.zeros_like(leaf))


def test_dropout_seeds_come_from_torch_unless_given() -> None:
    x, up, down = randn((6, 12), (20, 12), (9, 20))
    torch.manual_seed(5)
    first, second = (ffn(x, up, down, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert ffn(x, up, down, dropout_p=0.5).equal(first)
    assert not first.equal(second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [3, 60])  # for which products have different kernels
def test_recomputing_changes_no_bit_and_keeps_nothing_hidden(
    dtype: torch.dtype, gated: bool, rows: int
) -> None:
    shapes = (rows, 70), (150, 70), (30, 150), (150,), (30,), (150, 70), (150,)
    leaves = randn(*shapes[: 7 if gated else 5], dtype=dtype)
    kept: list[torch.Size] = []

    def block(recompute: bool, *tensors: Tensor) -> Tensor:
        names = ("gate_weight", "gate_bias")
        gate = dict(zip(names, tensors[5:], strict=False))
        options = {"dropout_p": 0.2, "seed": 3, "recompute": recompute}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.shape) or t, lambda t: t
        ):
            return ffn(*tensors[:5], **gate, **options)

    usual = grads(functools.partial(block, False), leaves)
    assert (rows, 150) in kept
    kept.clear()
    for grad, expected in zip(grads(functools.partial(block, True), leaves), usual, strict=True):
        assert grad.equal(expected)
    assert (rows, 150) not in kept


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
