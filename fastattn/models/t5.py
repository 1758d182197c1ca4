"""T5 in one file: relative position bias, RMSNorm and gated GELU, under Hugging Face names.

"Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
https://arxiv.org/abs/1910.10683; version 1.1 has the gate and an output layer of its own.
"""

from __future__ import annotations

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

FEED_FORWARD = {"relu": "relu", "gated-gelu": "gelu_tanh", "gated-silu": "silu"}


def _size(layers: int, heads: int, width: int, inner: int) -> dict[str, int]:
    return {"num_layers": layers, "num_heads": heads, "d_model": width, "d_ff": inner}


SIZES = {  # for T5Config(**SIZES["t5-small"]); version 1.1 has other inner widths
    "t5-small": _size(6, 8, 512, 2048),
    "t5-base": _size(12, 12, 768, 3072),
    "t5-large": _size(24, 16, 1024, 4096),
}


@dataclass(frozen=True)
class T5Config:
    """Sizes and rates, named as in Hugging Face's config.json; the defaults are T5 small's."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None  # as many as num_layers
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None  # by d_model ** -0.5; None: where weights are tied
    decoder_start_token_id: int = 0
    eos_token_id: int | None = 1

    def __post_init__(self) -> None:
        if self.feed_forward_proj not in FEED_FORWARD:
            got = self.feed_forward_proj
            raise ValueError(f"feed_forward_proj must be in {list(FEED_FORWARD)}, got {got!r}")

    @classmethod
    def from_json(cls, path: str | Path) -> T5Config:
        """Reads a config.json; raises ValueError for what would make it another model."""
        return models.read_config(cls, path, {"model_type": "t5", "is_encoder_decoder": True})


class Attention(nn.Module):
    """Attention without a scale, which the initial weights of the queries have in them."""

    def __init__(self, config: T5Config, biased: bool = False) -> None:
        super().__init__()
        outer, inner = config.d_model, config.num_heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(outer, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, outer, bias=False)
        if biased:
            buckets = config.relative_attention_num_buckets
            self.relative_attention_bias = nn.Embedding(buckets, config.num_heads)
        self.heads, self.dropout_p = config.num_heads, config.dropout_rate

    def keys_and_values(self, x: Tensor, ops: Any) -> tuple[Tensor, Tensor]:
        """[B, S, H, D] both."""
        key, value = (parts.linear(ops, x, layer) for layer in (self.k, self.v))
        return key.unflatten(-1, (self.heads, -1)), value.unflatten(-1, (self.heads, -1))

    def forward(
        self,
        x: Tensor,
        keys_and_values: tuple[Tensor, Tensor],
        attend: parts.Padded,
        ops: Any,
        **bias: Tensor,
    ) -> Tensor:
        query = parts.linear(ops, x, self.q).unflatten(-1, (self.heads, -1))  # [B, S, H, D]
        dropout_p = self.dropout_p if self.training else 0.0
        out = attend(query, *keys_and_values, scale=1.0, dropout_p=dropout_p, **bias)
        return parts.linear(ops, out.flatten(-2), self.o)  # [B, S, E]


class Block(nn.Module):
    """Attention, in a decoder twice, and feed-forward, each followed by the norm of the next."""

    def __init__(self, config: T5Config, decoder: bool, biased: bool) -> None:
        super().__init__()
        gated = config.feed_forward_proj.startswith("gated")
        wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        gate = nn.Linear(config.d_model, config.d_ff, bias=False)
        dense = {"wi_0": gate, "wi_1": wi, "wo": wo} if gated else {"wi": wi, "wo": wo}
        inner = {"SelfAttention": Attention(config, biased)}
        cross = {"EncDecAttention": Attention(config)}
        layers = [inner, *([cross] if decoder else []), {"DenseReluDense": nn.ModuleDict(dense)}]
        eps = config.layer_norm_epsilon
        self.layer = nn.ModuleList(  # the dictionaries give the parameters their names
            nn.ModuleDict(layer | {"layer_norm": nn.RMSNorm(config.d_model, eps=eps)})
            for layer in layers
        )
        self.activation = FEED_FORWARD[config.feed_forward_proj]
        self.dropout_p = config.dropout_rate

    def forward(
        self,
        normed: Tensor,
        x: Tensor,
        after: nn.RMSNorm,
        bias: dict[str, Tensor],
        attend: parts.Padded,
        ops: Any,
        across: parts.Padded | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        dropout_p = self.dropout_p if self.training else 0.0
        attention, last = self.layer[0]["SelfAttention"], self.layer[-1]
        keys_and_values = attention.keys_and_values(normed, ops)
        out = attention(normed, keys_and_values, attend, ops, **bias)
        if memory is not None:
            cross, norm = self.layer[1].values()
            normed, x = parts.add_norm(ops, out, x, norm, dropout_p=dropout_p)
            out = cross(normed, memory, across, ops)
        normed, x = parts.add_norm(ops, out, x, last["layer_norm"], dropout_p=dropout_p)
        *gate, up, down = last["DenseReluDense"].values()
        options = {"activation": self.activation, "dropout_p": dropout_p}
        out = parts.ffn(ops, normed, up, down, *gate, **options)
        return parts.add_norm(ops, out, x, after, dropout_p=dropout_p)  # [B, S, E] both


class Stack(nn.Module):
    """The encoder or the decoder."""

    def __init__(self, config: T5Config, embedding: nn.Embedding, decoder: bool) -> None:
        super().__init__()
        count = (decoder and config.num_decoder_layers) or config.num_layers
        self.config, self.decoder = config, decoder
        self.embed_tokens = embedding
        self.block = nn.ModuleList(Block(config, decoder, biased=i == 0) for i in range(count))
        self.final_layer_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(
        self,
        input_ids: Tensor,
        attend: parts.Padded,
        ops: Any,
        across: parts.Padded | None = None,
        memory: parts.Memory | None = None,
    ) -> Tensor:
        x = F.dropout(self.embed_tokens(input_ids), self.config.dropout_rate, self.training)
        bias = self._bias(attend.longest, input_ids.shape[1], ops)
        norms = [*(block.layer[0]["layer_norm"] for block in self.block), self.final_layer_norm]
        normed = parts.norm(ops, x, norms[0])
        of_layers = attend.layers, repeat(None) if memory is None else memory.layers
        for block, after, mine, theirs in zip(self.block, norms[1:], *of_layers, strict=False):
            normed, x = block(normed, x, after, bias, mine, ops, across, theirs)
        return F.dropout(normed, self.config.dropout_rate, self.training)

    def _bias(self, first: int, count: int, ops: Any) -> dict[str, Tensor]:
        """The position bias of attention, for queries from position `first` on."""
        table = self.block[0].layer[0]["SelfAttention"].relative_attention_bias
        furthest = first + count - 1
        distance = torch.arange(max(furthest + count, 0), device=table.weight.device) - furthest
        buckets = _bucket(distance, self.config, both_sides=not self.decoder)
        bias = table(buckets).t()[None]  # [1, H, first + 2 * count - 1]
        return parts.relative_bias(ops, bias, count, first + count)


class T5(parts.Seq2SeqLM):
    """Encoder, decoder and head."""

    Config = T5Config

    def __init__(self, config: T5Config, kernels: str = "fused") -> None:
        super().__init__(config, kernels)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, self.shared, decoder=False)
        self.decoder = Stack(config, self.shared, decoder=True)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._init_weights()
        self.tie_weights()

    def _init_weights(self) -> None:
        factor = self.config.initializer_factor
        nn.init.normal_(self.shared.weight, std=factor)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=factor * module.in_features**-0.5)
            if isinstance(module, Attention):
                with torch.no_grad():
                    module.q.weight *= self.config.d_kv**-0.5
        for stack in (self.encoder, self.decoder):
            table = stack.block[0].layer[0]["SelfAttention"].relative_attention_bias
            nn.init.normal_(table.weight, std=factor * self.config.d_model**-0.5)

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.shared.weight

    @staticmethod
    def renamed(state: dict[str, Tensor], config: T5Config) -> dict[str, Tensor]:
        """Old files have a bias of the cross-attention, which is not used."""
        unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        return {name: tensor for name, tensor in state.items() if name != unused}

    @property
    def cache_shape(self) -> kv_cache.CacheShape:
        """What a key/value cache holds of a token."""
        layers = len(self.decoder.block)
        return kv_cache.CacheShape(layers, self.config.num_heads, self.config.d_kv, None)

    def remember(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> parts.Memory:
        mask = parts.visible(input_ids, attention_mask, None)
        ops = models.ops(self.kernels)
        x = self.encoder(input_ids, parts.Padded(self.kernels, mask), ops)  # [B, S, E]
        cross = (block.layer[1]["EncDecAttention"] for block in self.decoder.block)
        return parts.Memory([layer.keys_and_values(x, ops) for layer in cross], mask)

    def decode(
        self, input_ids: Tensor, memory: parts.Memory, attend: parts.Padded, across: parts.Padded
    ) -> Tensor:
        return self.decoder(input_ids, attend, models.ops(self.kernels), across, memory)

    def head(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        config = self.config
        scaled = config.scale_decoder_outputs
        if config.tie_word_embeddings if scaled is None else scaled:
            states = states * config.d_model**-0.5
        return super().head(states)


def _bucket(distance: Tensor, config: T5Config, both_sides: bool) -> Tensor:
    """The bucket of each distance key - query: one for each small one, then ever wider ones."""
    count, most = config.relative_attention_num_buckets, config.relative_attention_max_distance
    bucket = torch.zeros_like(distance)
    if both_sides:
        count //= 2
        bucket = count * (distance > 0)
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    exact = count // 2
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(most / exact)
    wide = (exact + (share * (count - exact)).long()).clamp(max=count - 1)
    return bucket + torch.where(distance < exact, distance, wide)
