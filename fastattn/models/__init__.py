"""Reference Transformers, one plain file each, and what all of them start from.

A model takes `kernels="fused"` (fastattn), `"sdpa"` (PyTorch with its own fused attention) or
`"reference"` (eager PyTorch, attention written out), so that one set of weights compares them.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.ops.loss.reference import wide


class EagerOps:
    """The ops of a Transformer in plain PyTorch, with the signatures that fastattn gives them."""

    activations: ClassVar = {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "silu": F.silu,
    }
    layer_norm = staticmethod(F.layer_norm)
    rms_norm = staticmethod(F.rms_norm)

    @staticmethod
    def attention(
        query, key, value, *, mask=None, bias=None, causal=False, scale=None, dropout_p=0.0
    ):
        group = query.shape[1] // key.shape[1]  # the query heads that share one of key and value
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = query @ key.transpose(-1, -2) * scale  # [B, H, Sq, Sk]
        if bias is not None:
            scores = scores + bias
        mask = _with_causal(mask, causal, query, key)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return F.dropout(scores.softmax(-1), dropout_p) @ value  # [B, H, Sq, D]

    @classmethod
    def attention_decode(
        cls, query, key_cache, value_cache, *, cache_seqlens, key, value, scale=None
    ):
        rows = torch.arange(len(query), device=query.device)
        for cache, new in ((key_cache, key), (value_cache, value)):
            cache[rows, :, cache_seqlens] = new[:, :, 0].to(cache.dtype)
        places = torch.arange(key_cache.shape[2], device=query.device)
        query, key_cache, value_cache = (x.to(key.dtype) for x in (query, key_cache, value_cache))
        mask = places <= cache_seqlens[:, None, None, None]  # [B, 1, 1, S]
        return cls.attention(query, key_cache, value_cache, mask=mask, scale=scale)

    @staticmethod
    def apply_rope(query, key, cos, sin):
        cos, sin = (table.unsqueeze(-3).to(query.dtype) for table in (cos, sin))  # [..., 1, S, D/2]

        def turned(x):
            first, second = x.chunk(2, -1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

        return turned(query), turned(key)

    @staticmethod
    def linear(input, weight, bias=None, activation=None):
        out = F.linear(input, weight, bias)
        return out if activation is None else EagerOps.activations[activation](out)

    @staticmethod
    def linear_cross_entropy(input, linear_weight, target, *, linear_bias=None, **options):
        logits = F.linear(input, linear_weight, linear_bias).flatten(0, -2)
        return F.cross_entropy(wide(logits), target.flatten(), **options)

    @staticmethod
    def ffn(
        input,
        up_weight,
        down_weight,
        up_bias=None,
        down_bias=None,
        *,
        gate_weight=None,
        gate_bias=None,
        activation="gelu",
        dropout_p=0.0,
    ):
        if gate_weight is None:
            hidden = EagerOps.linear(input, up_weight, up_bias, activation)  # [..., hidden]
        else:
            gate = EagerOps.linear(input, gate_weight, gate_bias, activation)
            hidden = gate * F.linear(input, up_weight, up_bias)
        return F.linear(F.dropout(hidden, dropout_p), down_weight, down_bias)

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

    @staticmethod
    def add_rms_norm(
        input, residual, normalized_shape, weight=None, eps=None, *, dropout_p=0.0, return_sum=True
    ):
        summed = F.dropout(input, dropout_p) + residual
        out = F.rms_norm(summed, normalized_shape, weight, eps)
        return (out, summed) if return_sum else out


class SdpaOps(EagerOps):
    """Eager PyTorch with its own fused attention."""

    @staticmethod
    def attention(
        query, key, value, *, mask=None, bias=None, causal=False, scale=None, dropout_p=0.0
    ):
        square = query.shape[2] == key.shape[2]  # else PyTorch aligns to the other corner
        is_causal = causal and square and mask is None and bias is None
        mask = _with_causal(mask, causal and not is_causal, query, key)
        if bias is not None:
            least = torch.finfo(bias.dtype).min
            mask = bias if mask is None else bias.masked_fill(~mask, least)
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped
        )


def _with_causal(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """`mask` and, if asked for, the causal one, with the last query at the last key."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if not causal or q_len == 1:
        return mask
    past = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril(kv_len - q_len)
    return past if mask is None else mask & past


KERNELS: dict[str, Any] = {"fused": fastattn, "sdpa": SdpaOps, "reference": EagerOps}


def ops(kernels: str) -> Any:
    """The ops behind a value of `kernels`; raises ValueError where there are none."""
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {list(KERNELS)}, got {kernels!r}")
    return KERNELS[kernels]


class LanguageModel(nn.Module):
    """A config, the ops to run on, and weights in Hugging Face's format.

    `kernels` names the ops (see fastattn.models) and may be changed at any time.
    """

    Config: ClassVar[type]

    def __init__(self, config: Any, kernels: str) -> None:
        super().__init__()
        ops(kernels)
        self.config, self.kernels = config, kernels

    @classmethod
    def from_pretrained(cls, folder: str | Path, kernels: str = "fused") -> LanguageModel:
        """Loads a Hugging Face folder in eval mode, in the dtype of its weights.

        Reads config.json and model.safetensors or pytorch_model.bin. Raises FileNotFoundError, or
        ValueError for the config of another model.
        """
        folder = Path(folder)
        config = cls.Config.from_json(folder / "config.json")
        state = cls.renamed(load_weights(folder), config)
        with torch.device("meta"):
            model = cls(config, kernels)
        names: dict[int, str] = {}  # of a parameter, the first that the file has
        shared = list(model.named_parameters(remove_duplicate=False))
        for name, parameter in shared:
            if name in state:
                names.setdefault(id(parameter), name)
        for name, parameter in shared:  # files keep one name of a shared tensor
            if name not in state and id(parameter) in names:
                state[name] = state[names[id(parameter)]]
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        return model.eval()

    @staticmethod
    def renamed(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """The tensors of a file under the names of this model."""
        return state

    def tie_weights(self) -> None:
        """Lets the layers that share a tensor share it."""

    def head(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The linear layer that gives logits: its input (..., E), weight (vocab_size, E), bias."""
        return states, self.lm_head.weight, None

    def logits(self, states: Tensor) -> Tensor:
        """Logits (..., vocab_size) of states (..., E)."""
        return ops(self.kernels).linear(*self.head(states))

    def loss(self, states: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
        """The mean cross-entropy of target (...) int64 given states (..., E), a scalar in fp32.

        Targets that are ignore_index do not count. Fused ops do not keep the logits.
        """
        states, weight, bias = self.head(states)
        options = {"linear_bias": bias, "ignore_index": ignore_index}
        return ops(self.kernels).linear_cross_entropy(states, weight, target, **options)


def read_config(cls: type, path: str | Path, needed: dict[str, Any], **translated: Any) -> Any:
    """A config from a config.json that has the values `needed`, or does not name them.

    `translated` are fields that have other names there. Raises ValueError for what would make it
    another model.
    """
    raw = json.loads(Path(path).read_text(encoding="utf-8"))
    for name, value in needed.items():
        if raw.get(name, value) != value:
            raise ValueError(f"{path}: {name} must be {value!r}, got {raw[name]!r}")
    return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw} | translated)


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
