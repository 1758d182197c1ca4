"""What is true of layer norm and RMS norm whatever computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastattn.ops import philox
from fastattn.testing import DTYPES, assert_close_to_oracle

BOTH = pytest.mark.parametrize("norm", [layer_norm, rms_norm], ids=lambda norm: norm.__name__)
ADDED = pytest.mark.parametrize(
    ("added", "norm"),
    [(add_layer_norm, layer_norm), (add_rms_norm, rms_norm)],
    ids=["layer_norm", "rms_norm"],
)
TORCHS = {layer_norm: F.layer_norm, rms_norm: F.rms_norm}


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastattn.use_kernel(request.param):
        yield request.param


def grads(function: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a fixed random projection of the output."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return torch.autograd.grad(out, leaves, weights)


@pytest.mark.parametrize("cols", [1, 7, 64, 1000])
def test_layer_norm_has_mean_0_and_variance_1(cols: int) -> None:
    out = layer_norm(3 * torch.randn(20, cols, dtype=torch.float64) + 5, [cols], eps=1e-12)
    torch.testing.assert_close(out.mean(-1), torch.zeros(20).double(), atol=1e-9, rtol=0)
    if cols > 1:
        torch.testing.assert_close(out.square().mean(-1), torch.ones(20).double())


@pytest.mark.parametrize("cols", [1, 7, 64, 1000])
def test_rms_norm_has_mean_square_1(cols: int) -> None:
    out = rms_norm(3 * torch.randn(20, cols, dtype=torch.float64) + 5, [cols], eps=1e-12)
    torch.testing.assert_close(out.square().mean(-1), torch.ones(20).double())


def test_layer_norm_ignores_shift_and_scale() -> None:
    x, weight, bias = (
        torch.randn(9, 50).double(),
        torch.randn(50).double(),
        torch.randn(50).double(),
    )
    out = layer_norm(x, [50], weight, bias, eps=0.0)
    torch.testing.assert_close(layer_norm(7 * x - 3, [50], weight, bias, eps=0.0), out)
    torch.testing.assert_close(layer_norm(-x, [50], -weight, bias, eps=0.0), out)
    (grad,) = grads(lambda x: layer_norm(x, [50], weight, bias, eps=0.0), x)
    zero = torch.zeros(9, dtype=torch.float64)
    torch.testing.assert_close(grad.sum(-1), zero)  # no slope along the shift
    torch.testing.assert_close((grad * x).sum(-1), zero)  # nor along the scale


def test_rms_norm_ignores_scale() -> None:
    x, weight = torch.randn(9, 50).double(), torch.randn(50).double()
    out = rms_norm(x, [50], weight, eps=0.0)
    torch.testing.assert_close(rms_norm(7 * x, [50], weight, eps=0.0), out)
    torch.testing.assert_close(rms_norm(-x, [50], weight, eps=0.0), -out)
    (grad,) = grads(lambda x: rms_norm(x, [50], weight, eps=0.0), x)
    torch.testing.assert_close((grad * x).sum(-1), torch.zeros(9, dtype=torch.float64))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "normalized"), [((6, 70), 70), ((2, 3, 40), [40]), ((5, 4, 6, 3), (6, 3)), ((8,), 8)]
)
def test_agrees_with_torch(
    norm: Callable, dtype: torch.dtype, shape: tuple[int, ...], normalized: object
) -> None:
    x = torch.randn(shape).to(dtype)
    last = (normalized,) if isinstance(normalized, int) else tuple(normalized)
    parameters = [torch.randn(last).to(dtype) for _ in range(1 + (norm is layer_norm))]
    theirs = TORCHS[norm]

    def call(function: Callable, *tensors: Tensor) -> list[Tensor]:
        return [
            function(tensors[0], last),
            function(tensors[0], last, tensors[1]),
            function(*tensors[:1], last, *tensors[1:], eps=1e-2),
        ]

    exact = call(theirs, x.double(), *(p.double() for p in parameters))
    for found, eager, oracle in zip(
        call(norm, x, *parameters), call(theirs, x, *parameters), exact, strict=True
    ):
        assert found.shape == x.shape and found.dtype == dtype
        # eps of rms_norm, where None, is that of fp32 here and of the dtype in some torch releases
        assert_close_to_oracle(found, eager, oracle)
    assert norm(x, normalized).equal(norm(x, torch.Size(last)))


@BOTH
def test_eps_joins_the_variance(norm: Callable) -> None:
    level = torch.full((3, 16), 2.0)
    if norm is rms_norm:
        torch.testing.assert_close(norm(level, [16], eps=5.0), level / 3)
    else:
        weight, bias = torch.randn(16), torch.randn(16)
        assert norm(level, [16], weight, bias).equal(bias.expand(3, 16))
    assert (norm(torch.zeros(3, 16), [16], eps=1e-6) == 0).all()


def test_rms_norm_takes_the_epsilon_of_its_statistics() -> None:
    for dtype, eps in ((torch.float32, 2.0**-23), (torch.float64, 2.0**-52)):
        x = torch.full((2, 8), 2.0**-13, dtype=dtype)
        assert rms_norm(x, [8]).equal(rms_norm(x, [8], eps=eps))


@BOTH
@pytest.mark.parametrize("mean", [1e3, -3e4])
def test_a_far_mean_costs_no_accuracy(norm: Callable, mean: float) -> None:
    x = torch.randn(40, 700) + mean
    assert_close_to_oracle(
        norm(x, [700], eps=1e-5),
        TORCHS[norm](x, [700], eps=1e-5),
        TORCHS[norm](x.double(), [700], eps=1e-5),
    )


@BOTH
def test_narrow_dtypes_do_not_overflow(norm: Callable) -> None:
    x = 6e4 * torch.sign(torch.randn(5, 300)).half()
    torch.testing.assert_close(norm(x, [300]), TORCHS[norm](x.float(), [300]).half())


@BOTH
@pytest.mark.parametrize("rubbish", [float("nan"), float("inf")])
def test_a_spoilt_row_spoils_no_other(norm: Callable, rubbish: float) -> None:
    x = torch.randn(40, 33)
    spoilt = x.clone()
    spoilt[7, 5] = rubbish
    others = torch.arange(40) != 7
    assert norm(spoilt, [33])[others].equal(norm(x, [33])[others])
    assert norm(spoilt, [33])[7].isnan().any()
    (grad,), (clean,) = (grads(lambda x: norm(x, [33]), tensor) for tensor in (spoilt, x))
    assert grad[others].equal(clean[others])


@ADDED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_added_is_the_norm_of_the_sum(added: Callable, norm: Callable, dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(*s).to(dtype) for s in ((30, 70), (30, 70), (70,)))
    out, summed = added(x, residual, [70], weight)
    assert summed.equal(x + residual)
    assert out.equal(norm(x + residual, [70], weight))


@ADDED
@pytest.mark.parametrize("used", ["out", "summed", "both"])
def test_gradients_of_the_added(added: Callable, norm: Callable, used: str) -> None:
    tensors = [torch.randn(*s).double() for s in ((30, 70), (30, 70), (70,))]
    if used == "summed":
        tensors.pop()

    def pick(out: Tensor, summed: Tensor) -> Tensor:
        return {"out": out, "summed": summed, "both": torch.cat([out, summed])}[used]

    def ours(x: Tensor, residual: Tensor, weight: Tensor | None = None) -> Tensor:
        return pick(*added(x, residual, [70], weight))

    def apart(x: Tensor, residual: Tensor, weight: Tensor | None = None) -> Tensor:
        return pick(norm(x + residual, [70], weight), x + residual)

    torch.testing.assert_close(grads(ours, *tensors), grads(apart, *tensors))


@ADDED
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_dropout_is_philox_counted_by_position(added: Callable, norm: Callable, seed: int) -> None:
    x, residual = torch.rand(33, 150) + 1, torch.zeros(33, 150)
    out, summed = added(x, residual, [150], dropout_p=0.3, seed=seed)
    kept = philox.keep(torch.tensor([seed]), 1, 33, 150, 0.3)[0]
    assert ((summed != 0) == kept).all()
    torch.testing.assert_close(summed, x / 0.7 * kept)
    assert out.equal(norm(summed, [150]))
    assert abs(kept.double().mean().item() - 0.7) < 0.05
    part = added(x[:5, :70], residual[:5, :70], [70], dropout_p=0.3, seed=seed)[1]
    assert part.equal(summed[:5, :70])


@ADDED
def test_dropout_of_nothing_and_of_everything(added: Callable, norm: Callable) -> None:
    x, residual = torch.randn(9, 50), torch.randn(9, 50)
    assert added(x, residual, [50], dropout_p=0.0)[1].equal(residual + x)
    x[2, 3] = float("inf")
    assert added(x, residual, [50], dropout_p=1.0)[1].equal(residual)
    (grad,) = grads(lambda x: added(x, residual, [50], dropout_p=1.0)[0], x)
    assert grad.equal(torch.zeros_like(x))


@ADDED
def test_dropout_seeds_come_from_torch_unless_given(added: Callable, norm: Callable) -> None:
    x, residual = torch.randn(9, 50), torch.randn(9, 50)
    torch.manual_seed(5)
    first, second = (added(x, residual, [50], dropout_p=0.5)[1] for _ in range(2))
    torch.manual_seed(5)
    assert added(x, residual, [50], dropout_p=0.5)[1].equal(first)
    assert not first.equal(second)


@ADDED
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("wide", [False, True], ids=["same_dtype", "fp32_residual"])
def test_a_sum_unwritten_changes_nothing(
    added: Callable, norm: Callable, dropout_p: float, wide: bool
) -> None:
    x, residual, weight = torch.randn(9, 70).bfloat16(), torch.randn(9, 70), torch.randn(70)
    residual = residual if wide else residual.bfloat16()
    options = {"dropout_p": dropout_p, "seed": 3 if dropout_p else None}

    def alone(*tensors: Tensor) -> Tensor:
        return added(*tensors[:2], [70], tensors[2], return_sum=False, **options)

    def beside(*tensors: Tensor) -> Tensor:
        return added(*tensors[:2], [70], tensors[2], **options)[0]

    out, summed = added(x, residual, [70], weight, **options)
    assert alone(x, residual, weight).equal(out)
    assert out.dtype == torch.bfloat16 and summed.dtype == residual.dtype
    for found, expected in zip(
        grads(alone, x, residual, weight), grads(beside, x, residual, weight), strict=True
    ):
        assert found.equal(expected)


@ADDED
def test_a_wide_residual_is_not_rounded(added: Callable, norm: Callable) -> None:
    """A stream in fp32 keeps what bf16 would lose."""
    x, residual = torch.full((4, 64), 2.0**-10).bfloat16(), torch.randn(4, 64)
    assert added(x, residual, [64])[1].equal(residual + x.float())


@ADDED
def test_added_to_itself(added: Callable, norm: Callable) -> None:
    x = torch.randn(5, 12)
    (found,) = grads(lambda x: added(x, x, [12])[0], x)
    torch.testing.assert_close(found, grads(lambda x: norm(2 * x, [12]), x)[0])


@BOTH
def test_parameters_of_any_stride(norm: Callable) -> None:
    x, weight = torch.randn(9, 4, 6), torch.randn(6, 4)
    assert norm(x, [4, 6], weight.T).equal(norm(x, [4, 6], weight.T.contiguous()))
    assert norm(x, [6], weight[:, 1]).equal(norm(x, [6], weight[:, 1].clone()))
    one = torch.randn(1)
    assert norm(x, [6], one.expand(6)).equal(norm(x, [6], one.repeat(6)))


@BOTH
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (2, 0, 8)])
def test_empty_is_what_torch_makes_of_it(norm: Callable, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    weight = torch.ones(shape[-1:])
    found = norm(x, shape[-1:], weight)
    assert found.shape == TORCHS[norm](x, shape[-1:], weight).shape
    for grad, leaf in zip(
        grads(lambda *t: norm(t[0], shape[-1:], t[1]), x, weight), (x, weight), strict=True
    ):
        assert grad.equal(torch.zeros_like(leaf))


@pytest.mark.parametrize("gradient", [False, True], ids=["", "gradient"])
def test_a_tensor_is_no_shape(gradient: bool) -> None:
    x = torch.randn(2, 8, requires_grad=gradient)
    with pytest.raises(TypeError, match="normalized_shape"):
        layer_norm(x, torch.tensor([8]))
