"""Reference Transformers, one plain file each, and the sets of ops that all of them can run on.

A model takes `kernels="fused"` (fastattn), `"sdpa"` (PyTorch with its own fused attention) or
`"reference"` (eager PyTorch, attention written out), so that one set of weights compares them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn


class EagerOps:
    """The ops of a Transformer in plain PyTorch, with the signatures that fastattn gives them."""

    activations: ClassVar = {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "silu": F.silu,
    }
    layer_norm = staticmethod(F.layer_norm)

    @staticmethod
    def attention(query, key, value, *, mask=None, dropout_p=0.0):
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # [B, H, Sq, Sk]
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return F.dropout(scores.softmax(-1), dropout_p) @ value  # [B, H, Sq, D]

    @staticmethod
    def linear(input, weight, bias=None, activation=None):
        out = F.linear(input, weight, bias)
        return out if activation is None else EagerOps.activations[activation](out)

    @staticmethod
    def ffn(input, up_weight, down_weight, up_bias=None, down_bias=None, *, activation="gelu"):
        hidden = EagerOps.linear(input, up_weight, up_bias, activation)  # [..., hidden]
        return F.linear(hidden, down_weight, down_bias)

    @staticmethod
    def add_layer_norm(
        input,
        residual,
        normalized_shape,
        weight=None,
        bias=None,
        eps=1e-5,
        *,
        dropout_p=0.0,
        return_sum=True,
    ):
        summed = F.dropout(input, dropout_p) + residual
        out = F.layer_norm(summed, normalized_shape, weight, bias, eps)
        return (out, summed) if return_sum else out


class SdpaOps(EagerOps):
    """Eager PyTorch with its own fused attention."""

    @staticmethod
    def attention(query, key, value, *, mask=None, dropout_p=0.0):
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p)


KERNELS: dict[str, Any] = {"fused": fastattn, "sdpa": SdpaOps, "reference": EagerOps}


def ops(kernels: str) -> Any:
    """The ops behind a value of `kernels`; raises ValueError where there are none."""
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {list(KERNELS)}, got {kernels!r}")
    return KERNELS[kernels]


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder, from model.safetensors or else pytorch_model.bin.

    The oldest files call a norm's weight and bias gamma and beta; here they do not. Raises
    FileNotFoundError where there is neither file, ImportError without the package safetensors.
    """
    if (folder / "model.safetensors").exists():
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(
                f"reading {folder / 'model.safetensors'} needs safetensors: pip install safetensors"
            ) from error
        state = load_file(folder / "model.safetensors")
    elif (folder / "pytorch_model.bin").exists():
        state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    else:
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")
    return {
        name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias"): tensor
        for name, tensor in state.items()
    }
