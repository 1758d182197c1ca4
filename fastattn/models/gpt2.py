"""GPT-2 in one file: decoder and language-model head, under their Hugging Face names.

"Language Models are Unsupervised Multitask Learners", Radford et al. 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import models
from fastattn.models import kv_cache, parts


def _size(layers: int, heads: int, width: int) -> dict[str, int]:
    return {"n_layer": layers, "n_head": heads, "n_embd": width}


SIZES = {  # for GPT2Config(**SIZES["gpt2"])
    "gpt2": _size(12, 12, 768),
    "gpt2-medium": _size(24, 16, 1024),
    "gpt2-large": _size(36, 20, 1280),
    "gpt2-xl": _size(48, 25, 1600),
}


@dataclass(frozen=True)
class GPT2Config:
    """Sizes and rates, named as in Hugging Face's config.json; the defaults are GPT-2 small's."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # 4 * n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    eos_token_id: int | None = 50256

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            got = self.n_embd, self.n_head
            raise ValueError(f"n_embd must be a multiple of n_head, got {got}")
        parts.check_activation("activation_function", self.activation_function)

    @classmethod
    def from_json(cls, path: str | Path) -> GPT2Config:
        """Reads a config.json; raises ValueError for what would make it another model."""
        needed = {"model_type": "gpt2", "tie_word_embeddings": True, "add_cross_attention": False}
        needed |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
        needed |= {"reorder_and_upcast_attn": False}
        return models.read_config(cls, path, needed)


class Conv1D(nn.Linear):
    """A linear layer whose state dict holds the weight transposed, [in, out], as GPT-2's does."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_state_dict_post_hook(_transpose)
        self.register_load_state_dict_pre_hook(_transpose_back)


def _transpose(layer: Conv1D, state: dict[str, Tensor], prefix: str, *unused: Any) -> None:
    state[prefix + "weight"] = state[prefix + "weight"].t()


def _transpose_back(layer: Conv1D, state: dict[str, Tensor], prefix: str, *unused: Any) -> None:
    if (name := prefix + "weight") in state:
        state[name] = state[name].t().contiguous()


class Attention(nn.Module):
    """A token attends to itself and the tokens before it."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.heads, self.dropout_p = config.n_head, config.attn_pdrop
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, attend: parts.Padded, ops: Any) -> Tensor:
        *lead, width = x.shape
        packed = parts.linear(ops, x, self.c_attn).view(*lead, 3, self.heads, width // self.heads)
        dropout_p = self.dropout_p if self.training else 0.0
        out = attend(*packed.unbind(-3), dropout_p=dropout_p)  # [B, S, H, D]
        return parts.linear(ops, out.flatten(-2), self.c_proj)  # [B, S, E]


class Block(nn.Module):
    """Attention and feed-forward, each added to x and followed by the norm of what comes next."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        width, eps = config.n_embd, config.layer_norm_epsilon
        inner = 4 * width if config.n_inner is None else config.n_inner
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(width, eps=eps)
        mlp = {"c_fc": Conv1D(width, inner), "c_proj": Conv1D(inner, width)}
        self.mlp = nn.ModuleDict(mlp)  # for the names
        self.activation = parts.ACTIVATIONS[config.activation_function]
        self.dropout_p = config.resid_pdrop

    def forward(
        self, normed: Tensor, x: Tensor, after: nn.LayerNorm, attend: parts.Padded, ops: Any
    ) -> tuple[Tensor, Tensor]:
        dropout_p = self.dropout_p if self.training else 0.0
        out = self.attn(normed, attend, ops)
        normed, x = parts.add_norm(ops, out, x, self.ln_2, dropout_p=dropout_p)
        out = parts.ffn(ops, normed, *self.mlp.values(), activation=self.activation)
        return parts.add_norm(ops, out, x, after, dropout_p=dropout_p)  # [B, S, E] both


class GPT2(parts.CausalLM):
    """The decoder with its head, whose weight is the word embedding."""

    Config = GPT2Config

    def __init__(self, config: GPT2Config, kernels: str = "fused") -> None:
        super().__init__(config, kernels)
        width = config.n_embd
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, width),
                "wpe": nn.Embedding(config.n_positions, width),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(width, eps=config.layer_norm_epsilon),
            }
        )
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        parts.init_weights(self, config.initializer_range)
        for block in self.transformer["h"]:  # the residual stream adds up 2 * n_layer of these
            for layer in (block.attn.c_proj, block.mlp["c_proj"]):
                std = config.initializer_range * (2 * config.n_layer) ** -0.5
                nn.init.normal_(layer.weight, std=std)
        self.tie_weights()

    def tie_weights(self) -> None:
        self.lm_head.weight = self.transformer["wte"].weight

    @staticmethod
    def renamed(state: dict[str, Tensor], config: GPT2Config) -> dict[str, Tensor]:
        """Old files have masks among the weights, and names without "transformer."."""
        buffers = ".attn.bias", ".attn.masked_bias"
        ours = "transformer.", "lm_head."
        return {
            name if name.startswith(ours) else f"transformer.{name}": tensor
            for name, tensor in state.items()
            if not name.endswith(buffers)
        }

    @property
    def cache_shape(self) -> kv_cache.CacheShape:
        """What a key/value cache holds of a token."""
        config = self.config
        width = config.n_embd // config.n_head
        return kv_cache.CacheShape(config.n_layer, config.n_head, width, config.n_positions)

    def decode(self, input_ids: Tensor, positions: Tensor, attend: parts.Padded) -> Tensor:
        ops = models.ops(self.kernels)
        words, places, blocks, last = self.transformer.values()
        x = words(input_ids) + places(positions)
        x = F.dropout(x, self.config.embd_pdrop, self.training)  # [B, S, E]
        norms = [*(block.ln_1 for block in blocks), last]
        normed = parts.norm(ops, x, norms[0])
        for block, after, of_layer in zip(blocks, norms[1:], attend.layers, strict=False):
            normed, x = block(normed, x, after, of_layer, ops)
        return normed
