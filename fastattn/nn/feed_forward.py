"""The feed-forward block, and its fused parts for layers that hold torch.nn's own modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


class FeedForward(nn.Module):
    """The Transformer's feed-forward block, plain or gated.

    Plain: `down(activation(up(x)))` (arXiv:1706.03762). Gated: `down(activation(gate(x)) * up(x))`,
    which is SwiGLU for "silu", GeGLU for "gelu" and "gelu_tanh", ReGLU for "relu"
    (arXiv:2002.05202). Its parameters are those of `torch.nn.Linear` layers named, as Hugging Face
    does, up_proj, down_proj and, if gated, gate_proj.

    Args:
        embed_dim: width of input and output.
        hidden_dim: width between the projections; 4 * embed_dim when None.
        activation: "relu", "gelu" (erf), "gelu_tanh" or "silu".
        gated: whether there is a gate.
        bias: whether the projections add a bias.
        dropout: probability of zeroing an element between the projections in training.
        recompute: backward projects the input again instead of keeping what has `hidden_dim`.

    Raises:
        ValueError: `activation` or `dropout` is none of the above.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
        hidden_dim = 4 * embed_dim if hidden_dim is None else hidden_dim
        factory = {"bias": bias, "device": device, "dtype": dtype}
        self.activation = activation
        self.gate_proj = nn.Linear(embed_dim, hidden_dim, **factory) if gated else None
        self.up_proj = nn.Linear(embed_dim, hidden_dim, **factory)
        self.down_proj = nn.Linear(hidden_dim, embed_dim, **factory)
        self.dropout = nn.Dropout(dropout)
        self.recompute = recompute

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., embed_dim] to [..., embed_dim]; raises as `fastattn.ffn` does."""
        return feed_forward(
            input,
            self.up_proj,
            self.down_proj,
            self.activation,
            self.dropout,
            self.gate_proj,
            self.recompute,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def feed_forward(
    input: Tensor,
    up: nn.Module,
    down: nn.Module,
    activation: str | Callable[[Tensor], Tensor],
    dropout: nn.Module,
    gate: nn.Module | None = None,
    recompute: bool = False,
) -> Tensor:
    """down(dropout(activation(up))), or down(dropout(activation(gate) * up)), fused where it can.

    A module that is hooked, or of another class than `matrix` knows, is called and not looked into.
    """
    layers = (up, down) if gate is None else (up, down, gate)
    weights = [None if hooked(layer) else matrix(layer) for layer in layers]
    drops = type(dropout) is nn.Dropout and not hooked(dropout)
    if all([weight is not None for weight in weights]) and drops and isinstance(activation, str):
        return fastattn.ffn(
            input,
            *weights[:2],
            up.bias,
            down.bias,
            gate_weight=None if gate is None else weights[2],
            gate_bias=None if gate is None else gate.bias,
            activation=activation,
            dropout_p=dropout.p if dropout.training else 0.0,
            recompute=recompute,
        )
    hidden = linear(up if gate is None else gate, input, activation)
    if gate is not None:
        hidden = hidden * linear(up, input)
    return linear(down, dropout(hidden))


def linear(
    layer: nn.Module, input: Tensor, activation: str | Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """activation(layer(input)), fused where the layer is plain and the activation has a name."""
    fused = activation if isinstance(activation, str) else None
    weight = None if hooked(layer) else matrix(layer)
    if weight is not None:
        out = fastattn.linear(input, weight, layer.bias, fused)
    else:
        out = layer(input) if fused is None else ACTIVATIONS[fused](layer(input))
    return activation(out) if callable(activation) else out


def matrix(layer: nn.Module) -> Tensor | None:
    """The weight [out, in] of a linear layer, or None for a module of any other class.

    A layer is torch.nn's, or transformers' Conv1D, whose parameter is the transpose.
    """
    kind = type(layer)
    if kind is nn.Linear:
        return layer.weight
    transposed = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    return layer.weight.t() if transposed else None


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more, or other, than the forward of its class."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
