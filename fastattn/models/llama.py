"""LLaMA in one file: rotary positions, RMSNorm, SwiGLU and grouped heads, under Hugging Face names.

"LLaMA: Open and Efficient Foundation Language Models", https://arxiv.org/abs/2302.13971.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn import models
from fastattn.models import kv_cache, parts


def _size(layers: int, heads: int, kv_heads: int, width: int, inner: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": width,
        "intermediate_size": inner,
    }


SIZES = {  # for LlamaConfig(**SIZES["llama-7b"])
    "smollm2-135m": _size(30, 9, 3, 576, 1536),
    "llama-7b": _size(32, 32, 32, 4096, 11008),
    "llama-3-8b": _size(32, 32, 8, 4096, 14336),
}


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and rates, named as in Hugging Face's config.json; the defaults are LLaMA 7B's."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # as many as num_attention_heads
    head_dim: int | None = None  # hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if kv_heads is not None and heads % kv_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {(heads, kv_heads)}"
            )
        if self.head_dim is None and self.hidden_size % heads:
            got = self.hidden_size, heads
            raise ValueError(f"hidden_size must be a multiple of num_attention_heads, got {got}")
        if self.width_of_head % 2:
            raise ValueError(f"head_dim must be even, got {self.width_of_head}")
        parts.check_activation("hidden_act", self.hidden_act)

    @property
    def kv_heads(self) -> int:
        """The heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def width_of_head(self) -> int:
        """Elements of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, path: str | Path) -> LlamaConfig:
        """Reads a config.json; raises ValueError for what would make it another model."""
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{path}: rope_type must be 'default', got {kind!r}")
        theta = rope.get("rope_theta", raw.get("rope_theta", cls.rope_theta))
        return models.read_config(cls, path, {"model_type": "llama"}, rope_theta=theta)


class Rotation(NamedTuple):
    """Cosines and sines [B, S, head_dim / 2] of the angles of tokens."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, positions: Tensor, config: LlamaConfig) -> Rotation:
        """For positions [B, S]; in fp32, whatever the dtype of the model."""
        width = config.width_of_head
        powers = torch.arange(0, width, 2, device=positions.device).float() / width
        angles = positions[..., None].float() / config.rope_theta**powers
        return cls(angles.cos(), angles.sin())


class Attention(nn.Module):
    """A token attends to itself and the tokens before it, several query heads to one of keys."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.width, self.dropout_p = config.width_of_head, config.attention_dropout
        outer, inner = config.hidden_size, config.num_attention_heads * self.width
        kv_inner = config.kv_heads * self.width
        bias = config.attention_bias
        self.q_proj = nn.Linear(outer, inner, bias=bias)
        self.k_proj = nn.Linear(outer, kv_inner, bias=bias)
        self.v_proj = nn.Linear(outer, kv_inner, bias=bias)
        self.o_proj = nn.Linear(inner, outer, bias=bias)

    def forward(self, x: Tensor, rotation: Rotation, attend: parts.Padded, ops: Any) -> Tensor:
        query, key, value = (
            parts.linear(ops, x, proj).unflatten(-1, (-1, self.width))  # [B, S, H or Hkv, D]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        turned = ops.apply_rope(query.transpose(1, 2), key.transpose(1, 2), *rotation)
        query, key = (t.transpose(1, 2) for t in turned)
        out = attend(query, key, value, dropout_p=self.dropout_p if self.training else 0.0)
        return parts.linear(ops, out.flatten(-2), self.o_proj)  # [B, S, E]


class Layer(nn.Module):
    """Attention and feed-forward, each added to x and followed by the norm of what comes next."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, inner, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        bias = config.mlp_bias
        self.self_attn = Attention(config)
        gate, up = (nn.Linear(width, inner, bias=bias) for _ in range(2))
        down = nn.Linear(inner, width, bias=bias)
        self.mlp = nn.ModuleDict({"gate_proj": gate, "up_proj": up, "down_proj": down})
        self.input_layernorm = nn.RMSNorm(width, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)
        self.activation = parts.ACTIVATIONS[config.hidden_act]

    def forward(
        self,
        normed: Tensor,
        x: Tensor,
        after: nn.RMSNorm,
        rotation: Rotation,
        attend: parts.Padded,
        ops: Any,
    ) -> tuple[Tensor, Tensor]:
        out = self.self_attn(normed, rotation, attend, ops)
        normed, x = parts.add_norm(ops, out, x, self.post_attention_layernorm)
        gate, up, down = self.mlp.values()
        out = parts.ffn(ops, normed, up, down, gate, activation=self.activation)
        return parts.add_norm(ops, out, x, after)  # [B, S, E] both


class Llama(parts.CausalLM):
    """The decoder with its head."""

    Config = LlamaConfig

    def __init__(self, config: LlamaConfig, kernels: str = "fused") -> None:
        super().__init__(config, kernels)
        width, count = config.hidden_size, config.num_hidden_layers
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, width, config.pad_token_id),
                "layers": nn.ModuleList(Layer(config) for _ in range(count)),
                "norm": nn.RMSNorm(width, eps=config.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        parts.init_weights(self, config.initializer_range)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight

    @staticmethod
    def renamed(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
        """Old files have the frequencies of the rotation among the weights."""
        return {k: v for k, v in state.items() if not k.endswith("rotary_emb.inv_freq")}

    @property
    def cache_shape(self) -> kv_cache.CacheShape:
        """What a key/value cache holds of a token."""
        config = self.config
        sizes = config.num_hidden_layers, config.kv_heads, config.width_of_head
        return kv_cache.CacheShape(*sizes, config.max_position_embeddings)

    def decode(self, input_ids: Tensor, positions: Tensor, attend: parts.Padded) -> Tensor:
        ops = models.ops(self.kernels)
        embedding, layers, last = self.model.values()
        x = embedding(input_ids)  # [B, S, E]
        rotation = Rotation.of(positions, self.config)
        norms = [*(layer.input_layernorm for layer in layers), last]
        normed = parts.norm(ops, x, norms[0])
        for layer, after, of_layer in zip(layers, norms[1:], attend.layers, strict=False):
            normed, x = layer(normed, x, after, rotation, of_layer, ops)
        return normed
