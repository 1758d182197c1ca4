"""fastattn.nn.TransformerDecoderLayer against torch's, alone and within torch's nn.Transformer."""

from __future__ import annotations

import pytest
import torch
from module_parity import DTYPES, E, H, L, N, S, check, name_of, padding, randn, twins
from torch import Tensor, nn

import fastattn

pytestmark = pytest.mark.usefixtures("one_thread")

FUTURE = torch.ones(L, L).triu(1).bool()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"memory_key_padding_mask": padding()},
        {"tgt_mask": FUTURE, "tgt_is_causal": True, "memory_key_padding_mask": padding()},
        {"memory_mask": torch.arange(S) > torch.arange(L)[:, None]},
    ],
    ids=lambda masks: "-".join(masks) or "none",
)
def test_decoder_layer_matches_torch(masks, norm_first, batch_first, dtype) -> None:
    kwargs = {"norm_first": norm_first, "batch_first": batch_first, "activation": "gelu"}
    ours, theirs = twins("TransformerDecoderLayer", E, H, 40, 0.0, dtype=dtype, **kwargs)
    inputs = [randn(N, length, E, dtype=dtype) for length in (L, S)]
    inputs = inputs if batch_first else [x.transpose(0, 1).contiguous() for x in inputs]
    check(ours, theirs, lambda module, *x: module(*x, **masks), inputs)


@pytest.mark.parametrize("activation", ["relu", torch.tanh, nn.GELU("tanh")], ids=name_of)
@pytest.mark.parametrize("norm_first", [True, False])
def test_decoder_layer_dropout_is_torchs(norm_first: bool, activation) -> None:
    kwargs = {"norm_first": norm_first, "activation": activation}
    ours, theirs = twins("TransformerDecoderLayer", E, H, 40, 0.5, dtype=torch.float32, **kwargs)
    for module in (ours, theirs):
        for attention in (module.self_attn, module.multihead_attn):
            attention.dropout = 0.0  # drawn from another stream than torch's
        if activation is not torch.tanh:  # so is what is fused with a linear layer
            module.dropout.p = 0.0
    inputs = [randn(L, N, E), randn(S, N, E)]
    check(ours, theirs, lambda module, *x: module(*x), inputs)
    assert not torch.equal(*(ours(*inputs) for _ in range(2)))


def test_decoder_layer_refuses() -> None:
    with pytest.raises(ValueError, match=r"activation must be callable or one of .*'tanh'"):
        fastattn.nn.TransformerDecoderLayer(E, H, activation="tanh")
    layer = fastattn.nn.TransformerDecoderLayer(E, H, batch_first=True)
    tgt, memory = randn(N, L, E), randn(N, S, E)
    with pytest.raises(ValueError, match="query must be"):
        layer(tgt[..., 1:], memory)
    with pytest.raises(ValueError, match="key must be"):
        layer(tgt, memory[..., 1:])
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape"):
        layer(tgt, memory, memory_key_padding_mask=padding()[:, 1:])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_transformer_takes_the_layers(norm_first: bool) -> None:
    def build(module) -> nn.Transformer:
        options = {"batch_first": True, "norm_first": norm_first}
        layers = [
            getattr(module, f"Transformer{side}Layer")(E, H, 40, 0.0, **options)
            for side in ("Encoder", "Decoder")
        ]
        stacks = nn.TransformerEncoder(layers[0], 2), nn.TransformerDecoder(layers[1], 2)
        return nn.Transformer(
            E, H, custom_encoder=stacks[0], custom_decoder=stacks[1], batch_first=True
        ).eval()

    ours, theirs = build(fastattn.nn), build(nn)
    ours.load_state_dict(theirs.state_dict())
    inputs = randn(N, S, E), randn(N, L, E)
    masks = {"src_key_padding_mask": padding(), "memory_key_padding_mask": padding()}
    masks["tgt_mask"] = FUTURE
    torch.testing.assert_close(ours(*inputs, **masks), theirs(*inputs, **masks))


def test_decoder_layer_compiles_into_one_graph() -> None:
    layer = fastattn.nn.TransformerDecoderLayer(E, H, 40, 0.0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def call(layer: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
        return layer(x, memory, memory_key_padding_mask=padding(), tgt_is_causal=True)

    inputs = randn(L, N, E), randn(S, N, E)
    torch.testing.assert_close(call(compiled, *inputs), call(layer, *inputs))
