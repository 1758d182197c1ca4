"""fastattn.nn.MultiheadAttention against torch's, with every option, mask and kind of weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from module_parity import E, H, L, N, S, as_bias, check, hide, padding, randn, twins
from torch import Tensor, nn

import fastattn

pytestmark = pytest.mark.usefixtures("one_thread")

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
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
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
