"""The encoder-decoder of "Attention Is All You Need" in one file, under Hugging Face names.

https://arxiv.org/abs/1706.03762, with the variations of the models that followed: learned
positions, the norm in front of a layer or behind it. It reads Marian, Pegasus, BART and mBART.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import models
from fastattn.models import kv_cache, parts

FAMILIES = {  # Hugging Face's model_type -> what it says of the architecture
    "marian": {"positions": "sinusoidal", "pre_norm": False, "embedding_norm": False},
    "pegasus": {"positions": "sinusoidal", "pre_norm": True, "embedding_norm": False},
    "bart": {"positions": "learned", "pre_norm": False, "embedding_norm": True},
    "mbart": {"positions": "learned", "pre_norm": True, "embedding_norm": True},
}
OFFSET = {"sinusoidal": 0, "learned": 2}  # the row of position 0


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and rates, named as in Hugging Face's config.json; the defaults are the paper's base.

    positions: "sinusoidal" or "learned". pre_norm: a norm stands in front of each layer, and one
    behind the last, rather than behind each. embedding_norm: another follows the embeddings.
    """

    vocab_size: int = 37000
    max_position_embeddings: int = 1024
    d_model: int = 512
    encoder_layers: int = 6
    encoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 2048
    activation_function: str = "relu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02
    scale_embedding: bool = True
    positions: str = "sinusoidal"
    pre_norm: bool = False
    embedding_norm: bool = False
    pad_token_id: int = 1
    decoder_start_token_id: int = 2
    eos_token_id: int | None = 2

    def __post_init__(self) -> None:
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, name):
                got = self.d_model, getattr(self, name)
                raise ValueError(f"d_model must be a multiple of {name}, got {got}")
        if self.positions not in OFFSET:
            raise ValueError(f"positions must be in {list(OFFSET)}, got {self.positions!r}")
        parts.check_activation("activation_function", self.activation_function)

    @classmethod
    def from_json(cls, path: str | Path) -> TransformerConfig:
        """Reads a config.json; raises ValueError for what would make it another model."""
        family = json.loads(Path(path).read_text(encoding="utf-8")).get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"{path}: model_type must be in {list(FAMILIES)}, got {family!r}")
        needed = {"is_encoder_decoder": True, "tie_word_embeddings": True}
        needed |= {"share_encoder_decoder_embeddings": True}
        return models.read_config(cls, path, needed, **FAMILIES[family])


class Attention(nn.Module):
    """Attention of x to keys and values made of x or of the encoder's last state."""

    def __init__(self, config: TransformerConfig, heads: int) -> None:
        super().__init__()
        width = config.d_model
        self.k_proj, self.v_proj, self.q_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)
        self.heads, self.dropout_p = heads, config.attention_dropout

    def keys_and_values(self, x: Tensor, ops: Any) -> tuple[Tensor, Tensor]:
        """[B, S, H, D] both."""
        key, value = (parts.linear(ops, x, layer) for layer in (self.k_proj, self.v_proj))
        return key.unflatten(-1, (self.heads, -1)), value.unflatten(-1, (self.heads, -1))

    def forward(
        self, x: Tensor, keys_and_values: tuple[Tensor, Tensor], attend: parts.Padded, ops: Any
    ) -> Tensor:
        query = parts.linear(ops, x, self.q_proj).unflatten(-1, (self.heads, -1))  # [B, S, H, D]
        out = attend(query, *keys_and_values, dropout_p=self.dropout_p if self.training else 0.0)
        return parts.linear(ops, out.flatten(-2), self.out_proj)  # [B, S, E]


class Layer(nn.Module):
    """Attention, in a decoder twice, and feed-forward, each added to x, with a norm."""

    def __init__(self, config: TransformerConfig, heads: int, inner: int, decoder: bool) -> None:
        super().__init__()
        width = config.d_model
        self.self_attn = Attention(config, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        if decoder:
            self.encoder_attn = Attention(config, heads)
            self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.activation = parts.ACTIVATIONS[config.activation_function]
        self.config, self.decoder = config, decoder

    @property
    def norms(self) -> list[nn.LayerNorm]:
        """In their order."""
        cross = [self.encoder_attn_layer_norm] if self.decoder else []
        return [self.self_attn_layer_norm, *cross, self.final_layer_norm]

    def forward(
        self,
        normed: Tensor,
        x: Tensor,
        after: nn.LayerNorm | None,
        attend: parts.Padded,
        ops: Any,
        across: parts.Padded | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """From a layer's input and the sum to be added to, which are one without pre_norm.

        after: with pre_norm the norm that comes next.
        """
        norms = iter([*self.norms[1:], after] if self.config.pre_norm else self.norms)
        out = self.self_attn(normed, self.self_attn.keys_and_values(normed, ops), attend, ops)
        normed, x = self._add(out, x, next(norms), ops)
        if self.decoder:
            out = self.encoder_attn(normed, memory, across, ops)
            normed, x = self._add(out, x, next(norms), ops)
        dropout_p = self.config.activation_dropout if self.training else 0.0
        options = {"activation": self.activation, "dropout_p": dropout_p}
        out = parts.ffn(ops, normed, self.fc1, self.fc2, **options)
        return self._add(out, x, next(norms), ops)  # [B, S, E] both

    def _add(self, out: Tensor, x: Tensor, norm: nn.LayerNorm, ops: Any) -> tuple[Tensor, Tensor]:
        dropout_p = self.config.dropout if self.training else 0.0
        if self.config.pre_norm:
            return parts.add_norm(ops, out, x, norm, dropout_p=dropout_p)
        normed = parts.add_norm(ops, out, x, norm, dropout_p=dropout_p, return_sum=False)
        return normed, normed


class Stack(nn.Module):
    """The encoder or the decoder."""

    def __init__(self, config: TransformerConfig, embedding: nn.Embedding, decoder: bool) -> None:
        super().__init__()
        self.config, width = config, config.d_model
        side = "decoder" if decoder else "encoder"
        sizes = ("layers", "attention_heads", "ffn_dim")
        count, heads, inner = (getattr(config, f"{side}_{name}") for name in sizes)
        self.embed_tokens = embedding
        rows = config.max_position_embeddings + OFFSET[config.positions]
        self.embed_positions = nn.Embedding(rows, width)
        self.embed_positions.weight.requires_grad_(config.positions == "learned")
        self.layers = nn.ModuleList(Layer(config, heads, inner, decoder) for _ in range(count))
        if config.embedding_norm:
            self.layernorm_embedding = nn.LayerNorm(width)
        if config.pre_norm:
            self.layer_norm = nn.LayerNorm(width)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attend: parts.Padded,
        ops: Any,
        across: parts.Padded | None = None,
        memory: parts.Memory | None = None,
    ) -> Tensor:
        config = self.config
        x = self.embed_tokens(input_ids)
        if config.scale_embedding:
            x = x * math.sqrt(config.d_model)
        x = x + self.embed_positions(positions + OFFSET[config.positions])
        if config.embedding_norm:
            x = parts.norm(ops, x, self.layernorm_embedding)
        normed = x = F.dropout(x, config.dropout, self.training)  # [B, S, E]
        if config.pre_norm:
            norms = [*(layer.norms[0] for layer in self.layers), self.layer_norm]
            normed = parts.norm(ops, x, norms[0])
        else:
            norms = [None] * (len(self.layers) + 1)
        of_layers = attend.layers, repeat(None) if memory is None else memory.layers
        for layer, after, mine, theirs in zip(self.layers, norms[1:], *of_layers, strict=False):
            normed, x = layer(normed, x, after, mine, ops, across, theirs)
        return normed


class Transformer(parts.Seq2SeqLM):
    """Encoder, decoder and head, whose weight is the word embedding of both."""

    Config = TransformerConfig

    def __init__(self, config: TransformerConfig, kernels: str = "fused") -> None:
        super().__init__(config, kernels)
        shared = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_token_id)
        encoder, decoder = (Stack(config, shared, decoder) for decoder in (False, True))
        self.model = nn.ModuleDict({"shared": shared, "encoder": encoder, "decoder": decoder})
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        parts.init_weights(self, config.init_std)
        if config.positions == "sinusoidal":
            for stack in (encoder, decoder):
                stack.embed_positions.weight.copy_(_sinusoids(config))
        self.tie_weights()

    def tie_weights(self) -> None:
        self.lm_head.weight = self.model["shared"].weight

    @staticmethod
    def renamed(state: dict[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
        """Some files leave out the sinusoids, and a bias that is 0."""
        dtype = state["model.shared.weight"].dtype
        made = {"final_logits_bias": torch.zeros(1, config.vocab_size, dtype=dtype)}
        if config.positions == "sinusoidal":
            for side in ("encoder", "decoder"):
                made[f"model.{side}.embed_positions.weight"] = _sinusoids(config).to(dtype)
        return made | state

    @property
    def cache_shape(self) -> kv_cache.CacheShape:
        """What a key/value cache holds of a token."""
        config, heads = self.config, self.config.decoder_attention_heads
        sizes = config.decoder_layers, heads, config.d_model // heads
        return kv_cache.CacheShape(*sizes, config.max_position_embeddings)

    def remember(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> parts.Memory:
        mask = parts.visible(input_ids, attention_mask, self.config.max_position_embeddings)
        attend = parts.self_attention(self.kernels, mask)
        ops, positions = models.ops(self.kernels), parts.positions(attend, input_ids)
        x = self.model["encoder"](attend.pack(input_ids), attend.pack(positions), attend, ops)
        x = attend.unpack(x)  # [B, S, E]
        cross = (layer.encoder_attn for layer in self.model["decoder"].layers)
        return parts.Memory([layer.keys_and_values(x, ops) for layer in cross], mask)

    def decode(
        self, input_ids: Tensor, memory: parts.Memory, attend: parts.Padded, across: parts.Padded
    ) -> Tensor:
        ops, positions = models.ops(self.kernels), parts.positions(attend, input_ids)
        return self.model["decoder"](input_ids, positions, attend, ops, across, memory)

    def head(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return states, self.lm_head.weight, self.final_logits_bias[0]


def _sinusoids(config: TransformerConfig) -> Tensor:
    """[positions, d_model], the sines of all frequencies before the cosines."""
    positions = torch.arange(config.max_position_embeddings).double()
    powers = torch.arange(0, config.d_model, 2).double() / config.d_model
    angles = positions[:, None] / 10000**powers  # in fp64, for large positions
    return torch.cat([angles.sin(), angles.cos()], -1)[:, : config.d_model].float()
