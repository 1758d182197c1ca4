"""fastattn.nn.TransformerEncoderLayer against torch's, alone and within nn.TransformerEncoder."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from module_parity import (
    DTYPES,
    E,
    H,
    L,
    N,
    S,
    as_bias,
    check,
    hide,
    name_of,
    padding,
    randn,
    twins,
)
from torch import Tensor, nn

import fastattn
from fastattn.nn.feed_forward import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "padding", "2-D -inf", "causal, padding"])
def test_encoder_layer_matches_torch(mask, norm_first, batch_first, dtype) -> None:
    kwargs = {"norm_first": norm_first, "batch_first": batch_first, "activation": "gelu"}
    ours, theirs = twins("TransformerEncoderLayer", E, H, 40, 0.0, dtype=dtype, **kwargs)
    masks = {
        "none": {},
        "padding": {"src_key_padding_mask": padding()},
        "2-D -inf": {"src_mask": as_bias(hide(S)).to(dtype)},
        "causal, padding": {
            "src_mask": torch.ones(S, S).triu(1).bool(),
            "src_key_padding_mask": padding(),
            "is_causal": True,
        },
    }[mask]

    def call(module: nn.Module, x: Tensor) -> Tensor:
        cast = {
            k: v.to(x.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in masks.items()
        }
        return module(x, **cast)

    x = randn(N, S, E, dtype=dtype) if batch_first else randn(S, N, E, dtype=dtype)
    check(ours, theirs, call, [x])


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_encoder_layer_under_autocast_matches_torch(dtype, norm_first) -> None:
    # not ReLU, whose gradient jumps where bf16 rounds to another sign
    kwargs = {"norm_first": norm_first, "activation": "gelu"}
    ours, theirs = twins("TransformerEncoderLayer", E, H, 40, 0.0, dtype=torch.float32, **kwargs)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64):
            return module(x, src_key_padding_mask=padding())

    check(ours, theirs, call, [randn(S, N, E, dtype=dtype)])


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "activation",
    ["relu", F.gelu, F.silu, torch.tanh, nn.ReLU(), nn.GELU("tanh"), nn.SiLU(), nn.Tanh()],
    ids=name_of,
)
def test_encoder_layer_activations_match_torch(activation, bias, norm_first) -> None:
    kwargs = {"activation": activation, "bias": bias, "norm_first": norm_first}
    ours, theirs = twins("TransformerEncoderLayer", E, H, 40, 0.0, dtype=torch.float32, **kwargs)
    check(ours, theirs, lambda module, x: module(x), [randn(S, E)])


@pytest.mark.parametrize("activation", ["relu", torch.tanh], ids=name_of)
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer_dropout_is_torchs(norm_first: bool, activation) -> None:
    kwargs = {"norm_first": norm_first, "activation": activation}
    ours, theirs = twins("TransformerEncoderLayer", E, H, 40, 0.5, dtype=torch.float32, **kwargs)
    for module in (ours, theirs):
        module.self_attn.dropout = 0.0  # drawn from another stream than torch's
        if activation == "relu":  # so is what is fused with a linear layer
            module.dropout.p = 0.0
    check(ours, theirs, lambda module, x: module(x), [randn(S, N, E)])
    assert not torch.equal(*(ours(randn(S, N, E)) for _ in range(2)))


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
def test_encoder_layer_takes_fastattns_activations(activation: str) -> None:
    layer = fastattn.nn.TransformerEncoderLayer(E, H, 40, activation=activation).eval()
    other = nn.TransformerEncoderLayer(E, H, 40, activation=ACTIVATIONS[activation])
    other.load_state_dict(layer.state_dict())
    x = randn(S, N, E)
    torch.testing.assert_close(layer(x), other.eval()(x))


def test_encoder_layer_refuses() -> None:
    with pytest.raises(ValueError, match=r"activation must be callable or one of .*'tanh'"):
        fastattn.nn.TransformerEncoderLayer(E, H, activation="tanh")
    layer = fastattn.nn.TransformerEncoderLayer(E, H)
    with pytest.raises(ValueError, match="query must be"):
        layer(randn(S, N, E + 1).requires_grad_())


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder_stacks_the_layer(norm_first: bool, monkeypatch) -> None:
    ours, theirs = (
        nn.TransformerEncoder(
            module.TransformerEncoderLayer(E, H, 40, batch_first=True, norm_first=norm_first),
            num_layers=2,
        ).eval()
        for module in (fastattn.nn, nn)
    )
    ours.load_state_dict(theirs.state_dict())
    x, future = randn(N, S, E), nn.Transformer.generate_square_subsequent_mask(S)
    seen = ~padding()
    with torch.no_grad():
        expected = [
            theirs(x, src_key_padding_mask=padding()),
            theirs(x, mask=future),
            theirs(x, mask=future, src_key_padding_mask=as_bias(padding())),
        ]

        def bypass(*args):
            raise AssertionError("torch's own layer ran")

        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", bypass)
        found = [
            ours(x, src_key_padding_mask=padding()),
            ours(x, mask=future),
            ours(x, mask=future, src_key_padding_mask=as_bias(padding())),
        ]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a[seen], b[seen])


def test_torchs_decoder_layer_takes_the_attention() -> None:
    layer = nn.TransformerDecoderLayer(E, H, 40, 0.0)
    tgt, memory = randn(L, N, E), randn(S, N, E)
    kwargs = {"memory_key_padding_mask": padding()}
    expected = layer(tgt, memory, **kwargs)
    for name in ("self_attn", "multihead_attn"):
        attention = fastattn.nn.MultiheadAttention(E, H)
        attention.load_state_dict(getattr(layer, name).state_dict())
        setattr(layer, name, attention)
    torch.testing.assert_close(layer(tgt, memory, **kwargs), expected)


class Doubled(nn.Linear):
    """Stands for an adapter: a linear layer whose weight alone does not tell what it does."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("which", ["linear1", "linear2"])
@pytest.mark.parametrize("how", ["subclass", "hook", "forward"])
def test_a_changed_linear_layer_is_not_looked_through(which: str, how: str) -> None:
    ours, theirs = (
        module.TransformerEncoderLayer(E, H, 40, 0.0, activation="gelu")
        for module in (fastattn.nn, nn)
    )
    ours.load_state_dict(theirs.state_dict())
    for layer in (ours, theirs):
        linear = getattr(layer, which)
        if how == "subclass":
            linear.__class__ = Doubled
        elif how == "hook":
            linear.register_forward_hook(lambda module, args, out: 2 * out)
        else:
            linear.forward = lambda x, linear=linear: 2 * F.linear(x, linear.weight, linear.bias)
    x = randn(S, N, E)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer_compiles_into_one_graph(norm_first: bool) -> None:
    layer = fastattn.nn.TransformerEncoderLayer(E, H, 40, 0.0, norm_first=norm_first)
    x = randn(S, N, E)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, src_key_padding_mask=padding()), layer(x, src_key_padding_mask=padding())
    )
