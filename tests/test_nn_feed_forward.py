"""fastattn.nn.FeedForward against what it stands for in torch.nn."""

from __future__ import annotations

import pytest
import torch
from module_parity import DTYPES, E, H, L, N, check, randn, twins
from torch import Tensor, nn

import fastattn
from fastattn.nn.feed_forward import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("one_thread")


class TorchFeedForward(nn.Module):
    """What fastattn.nn.FeedForward stands for, in torch.nn."""

    def __init__(self, width: int, hidden: int, activation: str, gated: bool, bias: bool) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
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
