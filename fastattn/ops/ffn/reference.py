"""Linear layers with an activation, and feed-forward blocks, in eager PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops import philox

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    """(activation(input weight^T + bias), what came before the activation if `save`)."""
    pre = F.linear(input, weight, bias)
    kept = pre.clone() if save and activation != "identity" else input.new_empty(0)
    return ACTIVATIONS[activation](pre), kept


def ffn(
    input: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, up, gate); out = dropout(hidden) down^T, and the projections if they are to be saved.

    hidden = activation(up), or activation(gate) * up with a gate.
    """
    up = F.linear(input, up_weight, up_bias)
    gate = None if gate_weight is None else F.linear(input, gate_weight, gate_bias)
    act = ACTIVATIONS[activation]
    hidden = act(up) if gate is None else act(gate) * up
    if dropout_p:
        kept = philox.keep(seed, 1, math.prod(hidden.shape[:-1]), hidden.shape[-1], dropout_p).view(
            hidden.shape
        )
        scaled = hidden / (1 - dropout_p) if dropout_p < 1 else hidden
        hidden = scaled.masked_fill(~kept, 0)
    out = F.linear(hidden, down_weight, down_bias)
    empty = input.new_empty(0)
    return out, up.clone() if save else empty, gate.clone() if save and gate is not None else empty
