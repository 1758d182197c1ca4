"""The modules of fastattn.nn against torch.nn's; long because torch's options are many."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn.nn
from fastattn.testing import assert_close_to_oracle

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16]
FACTOR = 5.0
N, L, S, E, H = 2, 5, 7, 24, 4  # batch, queries, keys, width, heads


def twins(name: str, *args, dtype: torch.dtype, theirs: Callable | None = None, **kwargs):
    """A torch.nn module with random parameters, and fastattn's with the same ones."""
    theirs = (theirs or getattr(nn, name))(*args, **kwargs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.to(dtype)
    ours = getattr(fastattn.nn, name)(*args, **kwargs).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def outputs_and_gradients(module: nn.Module, call: Callable, inputs: list[Tensor]) -> dict:
    """Outputs of call(module, *inputs), and gradients of all inputs and parameters."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    module.zero_grad()
    torch.manual_seed(1)
    outs = call(module, *inputs)
    outs = [out for out in (outs if isinstance(outs, tuple) else (outs,)) if out is not None]
    torch.manual_seed(2)
    sum((out * torch.randn(out.shape).to(out.dtype)).sum() for out in outs).backward()
    found = {f"out {i}": out for i, out in enumerate(outs)}
    found |= {f"grad of input {i}": x.grad for i, x in enumerate(inputs)}
    found |= {f"grad of {name}": p.grad for name, p in module.named_parameters()}
    return {name: x.detach() for name, x in found.items() if x is not None}


def check(ours: nn.Module, theirs: nn.Module, call: Callable, inputs: list[Tensor]) -> None:
    """The error rule against torch's own module; a module is a chain of ops, whose errors add."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = outputs_and_gradients(copy.deepcopy(theirs).double(), call, wide)
    eager = outputs_and_gradients(theirs, call, inputs)
    fused = outputs_and_gradients(ours, call, inputs)
    assert fused.keys() == eager.keys() == exact.keys()
    for name, oracle in exact.items():
        assert_close_to_oracle(fused[name], eager[name], oracle, factor=FACTOR, name=name)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


# norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("LayerNorm", {"normalized_shape": E}),
        ("LayerNorm", {"normalized_shape": [3, E], "eps": 1e-2}),
        ("LayerNorm", {"normalized_shape": (E,), "bias": False}),
        ("LayerNorm", {"normalized_shape": E, "elementwise_affine": False}),
        ("RMSNorm", {"normalized_shape": E}),
        ("RMSNorm", {"normalized_shape": [3, E], "eps": 1e-2}),
        ("RMSNorm", {"normalized_shape": E, "elementwise_affine": False}),
    ],
)
@pytest.mark.parametrize("residual", [False, True])
def test_norms_match_torch(name: str, kwargs: dict, residual: bool, dtype: torch.dtype) -> None:
    ours, theirs = twins(name, **kwargs, dtype=dtype)
    inputs = [randn(N, 3, E, dtype=dtype) for _ in range(1 + residual)]

    def call(module: nn.Module, x: Tensor, residual: Tensor | None = None):
        if residual is None:
            return module(x)
        if module is ours:
            return module(x, residual)
        return module(x + residual), x + residual

    check(ours, theirs, call, inputs)


# feed-forward


class TorchFeedForward(nn.Module):
    """What fastattn.nn.FeedForward stands for, in torch.nn."""

    def __init__(self, width: int, hidden: int, activation: str, gated: bool, bias: bool) -> None:
        super().__init__()
        self.activation = fastattn.nn.feed_forward.ACTIVATIONS[activation]
        self.up_proj = nn.Linear(width, hidden, bias)
        self.gate_proj = nn.Linear(width, hidden, bias) if gated else None
        self.down_proj = nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_feed_forward_matches_torch(activation, gated, bias, dtype) -> None:
    kwargs = {"activation": activation, "gated": gated, "bias": bias}
    ours, theirs = twins("FeedForward", E, 40, dtype=dtype, theirs=TorchFeedForward, **kwargs)
    check(ours, theirs, lambda module, x: module(x), [randn(N, L, E, dtype=dtype)])


@pytest.mark.parametrize("gated", [True, False])
def test_feed_forward_drops_hidden_elements_in_training_only(gated: bool) -> None:
    module = fastattn.nn.FeedForward(E, gated=gated, dropout=0.5, bias=False)
    assert module.up_proj.weight.shape == (4 * E, E)
    x = randn(N, E)
    expected = module.eval()(x)
    module.train()
    runs = torch.stack([module(x) for _ in range(2000)])
    assert not torch.equal(runs[0], runs[1])
    spread = runs.std(0) / len(runs) ** 0.5
    assert ((runs.mean(0) - expected).abs() < 5 * spread).all()


@pytest.mark.parametrize("layer", ["FeedForward", "TransformerEncoderLayer"])
def test_dropout_between_linear_layers_is_fused_and_recomputed(layer: str) -> None:
    """Draws what `fastattn.ffn` draws, and keeps nothing of the hidden width."""
    if layer == "FeedForward":
        module = fastattn.nn.FeedForward(E, 40, "relu", dropout=0.4, recompute=True)
        up, down, block = module.up_proj, module.down_proj, module
    else:
        module = fastattn.nn.TransformerEncoderLayer(E, H, 40, 0.4, recompute=True)
        up, down, block = module.linear1, module.linear2, module._linears
    kept: list[int] = []
    x = randn(N, L, E, dtype=torch.float32)
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.shape[-1]) or t, lambda t: t
    ):
        out = block(x)
    torch.manual_seed(3)
    weights = up.weight, down.weight, up.bias, down.bias
    assert torch.equal(out, fastattn.ffn(x, *weights, activation="relu", dropout_p=0.4))
    assert kept.count(40) == 2  # down's weight and up's bias


def test_feed_forward_refuses() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of .*got 'tanh'"):
        fastattn.nn.FeedForward(E, activation="tanh")
    with pytest.raises(ValueError, match="dropout"):
        fastattn.nn.FeedForward(E, dropout=1.5)
    with pytest.raises(ValueError, match="up_weight"):
        fastattn.nn.FeedForward(E)(randn(N, E + 1))


# multi-head attention


def padding(batch: int = N) -> Tensor:
    """[N, S], True at the padding; the rows differ, and no row is all padding."""
    return torch.arange(S) >= torch.tensor([S - 2, S - 4])[:batch, None]


def hide(q_len: int = L, *lead: int) -> Tensor:
    """[*lead, L, S], True where a query may not attend; every query sees key 0."""
    hidden = torch.rand(*lead, q_len, S) < 0.4
    hidden[..., 0] = False
    return hidden


def as_bias(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)


MASKS: dict[str, Callable[[], dict]] = {
    "none": dict,
    "padding": lambda: {"key_padding_mask": padding()},
    "padding float": lambda: {"key_padding_mask": torch.randn(N, S)},
    "padding -inf": lambda: {"key_padding_mask": as_bias(padding())},
    "2-D": lambda: {"attn_mask": hide()},
    "2-D float": lambda: {"attn_mask": torch.randn(L, S)},
    "2-D -inf": lambda: {"attn_mask": as_bias(hide())},
    "3-D": lambda: {"attn_mask": hide(L, N * H)},
    "3-D float": lambda: {"attn_mask": torch.randn(N * H, L, S)},
    "2-D, padding": lambda: {"attn_mask": hide(), "key_padding_mask": padding()},
    "3-D, padding": lambda: {"attn_mask": hide(L, N * H), "key_padding_mask": padding()},
    "3-D float, padding float": lambda: {
        "attn_mask": torch.randn(N * H, L, S),
        "key_padding_mask": as_bias(padding()),
    },
    "causal": lambda: {"attn_mask": torch.ones(L, S).triu(1).bool(), "is_causal": True},
    "causal, padding": lambda: {
        "attn_mask": as_bias(torch.ones(L, S).triu(1).bool()),
        "key_padding_mask": as_bias(padding()),
        "is_causal": True,
    },
}
WEIGHTS = {
    "no weights": {"need_weights": False},
    "mean weights": {},
    "weights": {"average_attn_weights": False},
}


def attend(module: nn.Module, *inputs: Tensor, **kwargs):
    """Float masks follow the dtype of the query, as torch wants them."""
    dtype = inputs[0].dtype
    kwargs = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in kwargs.items()
    }
    return module(*(inputs * 3)[:3], **kwargs) if len(inputs) == 1 else module(*inputs, **kwargs)


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [*((weights, torch.float32) for weights in WEIGHTS), ("no weights", torch.bfloat16)],
)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_matches_torch(mask, batch_first, weights, dtype) -> None:
    ours, theirs = twins("MultiheadAttention", E, H, batch_first=batch_first, dtype=dtype)
    order = (lambda n, s: (n, s, E)) if batch_first else (lambda n, s: (s, n, E))
    inputs = [randn(*order(N, s), dtype=dtype) for s in (L, S, S)]
    check(ours, theirs, partial(attend, **MASKS[mask](), **WEIGHTS[weights]), inputs)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mask", ["none", "padding", "2-D", "3-D float"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"kdim": 10, "vdim": 6},
        {"kdim": 10, "vdim": 6, "bias": False},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True},
    ],
    ids=str,
)
def test_attention_options_match_torch(kwargs: dict, mask: str, weights: str) -> None:
    ours, theirs = twins(
        "MultiheadAttention", E, H, batch_first=True, dtype=torch.float32, **kwargs
    )
    inputs = [
        randn(N, L, E),
        randn(N, S, kwargs.get("kdim", E)),
        randn(N, S, kwargs.get("vdim", E)),
    ]
    check(ours, theirs, partial(attend, **MASKS[mask](), **WEIGHTS[weights]), inputs)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_unbatched_attention_matches_torch(kind: str, weights: str) -> None:
    ours, theirs = twins("MultiheadAttention", E, H, dtype=torch.float32)
    inputs = [randn(S, E)] if kind == "self" else [randn(L, E), randn(S, E), randn(S, E)]
    masks = {"key_padding_mask": padding()[0], "attn_mask": hide(len(inputs[0]), H)}
    check(ours, theirs, partial(attend, **masks, **WEIGHTS[weights]), inputs)


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_matches_torch(batch_first: bool) -> None:
    ours, theirs = twins("MultiheadAttention", E, H, batch_first=batch_first, dtype=torch.float32)
    x = randn(N, S, E) if batch_first else randn(S, N, E)
    call = partial(attend, key_padding_mask=padding(), need_weights=False)
    check(ours, theirs, call, [x])
    with torch.no_grad():  # where torch takes its own fast path
        out, _ = attend(ours.eval(), x, need_weights=False)
        expected, _ = attend(theirs.eval(), x, need_weights=False)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("q_len", [S, L, S + 2])
def test_is_causal_needs_no_mask_and_joins_one(q_len: int, need_weights: bool) -> None:
    module = fastattn.nn.MultiheadAttention(E, H, batch_first=True)
    query, memory = randn(N, q_len, E), randn(N, S, E)
    future = torch.ones(q_len, S).triu(1).bool()
    hidden = hide(q_len)
    run = partial(module, query, memory, memory, need_weights=need_weights)
    torch.testing.assert_close(run(is_causal=True)[0], run(attn_mask=future)[0])
    both = run(attn_mask=hidden, is_causal=True)[0]
    torch.testing.assert_close(both, run(attn_mask=hidden | future)[0])


@pytest.mark.parametrize("need_weights", [True, False])
def test_causal_queries_see_the_added_keys(need_weights: bool) -> None:
    kwargs = {"add_bias_kv": True, "add_zero_attn": True}
    module = fastattn.nn.MultiheadAttention(E, H, batch_first=True, **kwargs)
    x = randn(N, S, E)
    run = partial(module, x, x, x, need_weights=need_weights)
    out, weights = run(is_causal=True)
    torch.testing.assert_close(out, run(attn_mask=torch.ones(S, S).triu(1).bool())[0])
    assert not need_weights or (weights[..., S:] > 0).all()


@pytest.mark.parametrize("need_weights", [True, False])
def test_bool_and_float_masks_mix(need_weights: bool) -> None:
    module = fastattn.nn.MultiheadAttention(E, H, batch_first=True)
    x, bias = randn(N, S, E), torch.randn(S, S)
    run = partial(module, x, x, x, need_weights=need_weights, attn_mask=bias)
    mixed, floating = (run(key_padding_mask=m)[0] for m in (padding(), as_bias(padding())))
    torch.testing.assert_close(mixed, floating)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("floating", [True, False])
def test_a_query_without_keys_gets_zero_and_finite_gradients(floating, need_weights) -> None:
    module = fastattn.nn.MultiheadAttention(E, H, batch_first=True)
    x = randn(N, S, E).requires_grad_()
    mask = torch.tensor([False, True])[:, None].expand(N, S)
    mask = as_bias(mask) if floating else mask
    out, weights = module(x, x, x, key_padding_mask=mask, need_weights=need_weights)
    assert torch.equal(out[1], module.out_proj.bias.expand(S, E))
    assert not need_weights or weights[1].eq(0).all()
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in [x, *module.parameters()])


def test_float_mask_gets_its_gradient() -> None:
    ours, theirs = twins("MultiheadAttention", E, H, batch_first=True, dtype=torch.float32)

    def call(module: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        return module(x, x, x, attn_mask=mask, need_weights=False)[0]

    check(ours, theirs, call, [randn(N, S, E), randn(N * H, S, S)])


def test_dropped_weights_are_torchs() -> None:
    ours, theirs = twins("MultiheadAttention", E, H, dropout=0.5, dtype=torch.float32)
    call = partial(attend, average_attn_weights=False)
    check(ours, theirs, call, [randn(L, N, E), randn(S, N, E), randn(S, N, E)])


def test_dropout_without_weights() -> None:
    module = fastattn.nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    x = randn(1, S, E)
    expected, _ = module.eval()(x, x, x, need_weights=False)
    module.train()
    runs = torch.stack([module(x, x, x, need_weights=False)[0] for _ in range(500)])
    assert not torch.equal(runs[0], runs[1])
    spread = runs.std(0) / len(runs) ** 0.5
    assert ((runs.mean(0) - expected).abs() < 5 * spread).all()
    again = []
    for _ in range(2):
        torch.manual_seed(3)
        again.append(module(x, x, x, need_weights=False)[0])
    assert torch.equal(*again)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": randn(L, E + 1)}, ValueError, "query must be .*got"),
        ({"query": randn(1, N, L, E)}, ValueError, "query must be .*got"),
        ({"key": randn(S, E)}, ValueError, "key must be .*got"),
        ({"key": randn(N, S, E + 1)}, ValueError, r"key must be .* 24\].*got \[2, 7, 25\]"),
        ({"value": randn(N, S + 1, E)}, ValueError, "value must have key's batch and length"),
        ({"query": randn(N + 1, L, E)}, ValueError, "key must have query's batch 3, got 2"),
        ({"query": randn(N, L, E).double()}, TypeError, "float64"),
        ({"key_padding_mask": torch.ones(N, S)[:, 1:]}, ValueError, "key_padding_mask .*shape"),
        ({"key_padding_mask": torch.ones(N, S).int()}, TypeError, "key_padding_mask .*int32"),
        ({"attn_mask": torch.ones(S, L)}, ValueError, r"attn_mask .*\[5, 7\] or \[8, 5, 7\]"),
        ({"attn_mask": torch.ones(N, L, S)}, ValueError, "attn_mask must have shape"),
        ({"attn_mask": torch.ones(L, S).double()}, TypeError, "attn_mask .*float64"),
    ],
    ids=str,
)
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_refuses(change, error, message, need_weights) -> None:
    module = fastattn.nn.MultiheadAttention(E, H, batch_first=True)
    inputs = {"query": randn(N, L, E), "key": randn(N, S, E), "value": randn(N, S, E)}
    with pytest.raises(error, match=message):
        module(**(inputs | change), need_weights=need_weights)


def test_attention_refuses_nested_tensors() -> None:
    module = fastattn.nn.MultiheadAttention(E, H, batch_first=True)
    x = torch.nested.nested_tensor([randn(3, E), randn(2, E)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"query must be padded .*nested"):
        module(x, x, x)


# encoder layer


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
    ids=str,
)
def test_encoder_layer_activations_match_torch(activation, bias, norm_first) -> None:
    kwargs = {"activation": activation, "bias": bias, "norm_first": norm_first}
    ours, theirs = twins("TransformerEncoderLayer", E, H, 40, 0.0, dtype=torch.float32, **kwargs)
    check(ours, theirs, lambda module, x: module(x), [randn(S, E)])


@pytest.mark.parametrize("activation", ["relu", torch.tanh], ids=str)
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
    other = nn.TransformerEncoderLayer(E, H, 40, activation=fastattn.nn.feed_forward.ACTIVATIONS[activation])
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


# all modules

CONSTRUCTED = [
    ("LayerNorm", (E,), {}),
    ("LayerNorm", (E,), {"bias": False}),
    ("RMSNorm", ([3, E],), {}),
    ("MultiheadAttention", (E, H), {}),
    ("MultiheadAttention", (E, H), {"kdim": 3, "vdim": 5, "add_bias_kv": True, "bias": False}),
    ("TransformerEncoderLayer", (E, H, 40), {}),
    ("TransformerEncoderLayer", (E, H, 40), {"bias": False, "dtype": torch.float64}),
    ("TransformerDecoderLayer", (E, H, 40), {"norm_first": True}),
    ("TransformerDecoderLayer", (E, H, 40), {"bias": False, "dtype": torch.float64}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), CONSTRUCTED, ids=str)
def test_state_moves_both_ways_and_starts_like_torchs(name, args, kwargs) -> None:
    modules = []
    for namespace in (fastattn.nn, nn):
        torch.manual_seed(7)
        modules.append(getattr(namespace, name)(*args, **kwargs))
    ours, theirs = modules
    assert isinstance(ours, type(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [*CONSTRUCTED, ("FeedForward", (E,), {"gated": True, "activation": "silu"})],
    ids=str,
)
def test_modules_pickle_copy_and_print(name, args, kwargs) -> None:
    module = getattr(fastattn.nn, name)(*args, **kwargs)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert type(other) is type(module)
        for a, b in zip(module.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
    assert repr(module).startswith(f"{name}(")


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer_compiles_into_one_graph(norm_first: bool) -> None:
    layer = fastattn.nn.TransformerEncoderLayer(E, H, 40, 0.0, norm_first=norm_first)
    x = randn(S, N, E)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, src_key_padding_mask=padding()), layer(x, src_key_padding_mask=padding())
    )
