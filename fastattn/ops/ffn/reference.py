"""Linear layers with an activation, and feed-forward blocks, in eager PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, up, gate); out = (activation(gate) * up) down^T, or activation(up) down^T ungated."""
    up = F.linear(input, up_weight, up_bias)
    gate = None if gate_weight is None else F.linear(input, gate_weight, gate_bias)
    act = ACTIVATIONS[activation]
    out = F.linear(act(up) if gate is None else act(gate) * up, down_weight, down_bias)
    empty = input.new_empty(0)
    return out, up.clone() if save else empty, gate.clone() if save and gate is not None else empty
