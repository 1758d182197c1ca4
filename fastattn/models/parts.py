"""What several models share: who attends to whom, layers of torch.nn on any ops, forward."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import models
from fastattn.ops.attention.reference import by_distance

if TYPE_CHECKING:
    from fastattn.models import kv_cache

# Hugging Face's names of activations -> fastattn's
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}


class Padded:
    """Attention within the rows of a batch, all tokens of it, none to what a mask hides."""

    start: int | Tensor = 0  # how many tokens come before those of a row
    longest = 0  # the largest such number

    def __init__(self, kernels: str, mask: Tensor | None, causal: bool = False) -> None:
        """mask [B, Sk], True at the keys to attend to."""
        self.ops, self.causal = models.ops(kernels), causal
        self.mask = None if mask is None else mask[:, None, None]  # [B, 1, 1, Sk]

    @property
    def layers(self) -> Iterator[Padded]:
        """One such pattern for each layer."""
        return repeat(self)

    def pack(self, x: Tensor) -> Tensor:
        """What the layers see of x [B, S, ...]."""
        return x

    def unpack(self, x: Tensor) -> Tensor:
        """The opposite."""
        return x

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """query [B, Sq, H, D], key and value [B, Sk, Hkv, D], to [B, Sq, H, D]."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        options |= {"mask": self.mask, "causal": self.causal}
        return self.ops.attention(query, key, value, **options).transpose(1, 2)


class Packed(Padded):
    """The same for fused ops, with padding left out: one row of all tokens."""

    def __init__(self, mask: Tensor, causal: bool = False) -> None:
        super().__init__("fused", None, causal)
        self.shape = mask.shape
        self.tokens = mask.flatten().nonzero()[:, 0]
        self.ends = F.pad(mask.sum(1).cumsum(0), (1, 0))  # [B + 1]

    def pack(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)[self.tokens][None]  # [1, tokens, ...]

    def unpack(self, x: Tensor) -> Tensor:
        """Back to [B, S, ...], with 0 at padding."""
        out = x.new_zeros(self.shape.numel(), *x.shape[2:])
        return out.index_copy(0, self.tokens, x[0]).unflatten(0, self.shape)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        rows = (x[0] for x in (query, key, value))  # [tokens, H, D]
        options |= {"causal": self.causal}
        return self.ops.attention_varlen(*rows, self.ends, self.ends, **options)[None]


def self_attention(kernels: str, mask: Tensor | None, causal: bool = False) -> Padded:
    """Without padding where the ops can do that and nothing traces them.

    torch.compile cannot know how much padding there is.
    """
    packs = kernels == "fused" and not torch.compiler.is_compiling()
    if mask is None or not packs or not len(mask):  # a traced mask's length must not be asked for
        return Padded(kernels, mask, causal)
    return Packed(mask, causal)


class Memory(NamedTuple):
    """What a decoder's layers attend to of the encoder's tokens."""

    layers: list[tuple[Tensor, Tensor]]  # keys and values [B, S, H, D] of each
    mask: Tensor | None  # [B, S], True at tokens

    def rows(self, index: Tensor) -> Memory:
        """The memory of these rows of the batch, in this order."""
        layers = [(key[index], value[index]) for key, value in self.layers]
        return Memory(layers, None if self.mask is None else self.mask[index])


def visible(
    input_ids: Tensor, attention_mask: Tensor | None, longest: int | None, prefix: str = ""
) -> Tensor | None:
    """The mask as bool; raises TypeError or ValueError where it or the ids do not fit."""
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{prefix}input_ids must be int64 or int32, got {input_ids.dtype}")
    shape = tuple(input_ids.shape)
    if len(shape) != 2 or (longest is not None and shape[1] > longest):
        limit = "" if longest is None else f", S <= {longest}"
        raise ValueError(f"{prefix}input_ids must have shape (B, S){limit}, got {shape}")
    if attention_mask is None:
        return None
    got = tuple(attention_mask.shape), attention_mask.dtype
    if got[0] != shape or got[1].is_floating_point:
        raise ValueError(
            f"{prefix}attention_mask must be bool or integer, {shape}, got {got[1]}, {got[0]}"
        )
    return attention_mask.bool()


def check_activation(name: str, value: str) -> None:
    """Raises ValueError where fastattn has no such activation."""
    if value not in ACTIVATIONS:
        raise ValueError(f"{name} must be in {list(ACTIVATIONS)}, got {value!r}")


def init_weights(model: nn.Module, std: float) -> None:
    """Normal weights and no biases."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def linear(ops: Any, x: Tensor, layer: nn.Linear, activation: str | None = None) -> Tensor:
    """`layer` and an activation."""
    return ops.linear(x, layer.weight, layer.bias, activation)


def relative_bias(ops: Any, bias: Tensor, q_len: int, kv_len: int) -> dict[str, Tensor]:
    """What attention takes for a bias [1, H, Sq + Sk - 1] by the distance of key and query.

    Where that becomes a matrix, it is made here, once for all layers.
    """
    if ops is models.ops("fused") and bias.is_cpu:
        return {"relative_bias": bias}
    return {"bias": by_distance(bias, q_len, kv_len)}


def norm(ops: Any, x: Tensor, layer: nn.LayerNorm | nn.RMSNorm) -> Tensor:
    """`layer` of x."""
    if isinstance(layer, nn.RMSNorm):
        return ops.rms_norm(x, layer.normalized_shape, layer.weight, layer.eps)
    return ops.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def add_norm(
    ops: Any, out: Tensor, x: Tensor, layer: nn.LayerNorm | nn.RMSNorm, **options: Any
) -> tuple[Tensor, Tensor] | Tensor:
    """`layer` of x + dropout(out), and this sum; the options are `fastattn.add_layer_norm`'s."""
    if out.dtype != x.dtype:  # autocast makes a product bf16 and leaves what is added to it
        out = out.to(x.dtype)
    if isinstance(layer, nn.RMSNorm):
        return ops.add_rms_norm(out, x, layer.normalized_shape, layer.weight, layer.eps, **options)
    args = layer.normalized_shape, layer.weight, layer.bias, layer.eps
    return ops.add_layer_norm(out, x, *args, **options)


def ffn(
    ops: Any,
    x: Tensor,
    up: nn.Linear,
    down: nn.Linear,
    gate: nn.Linear | None = None,
    *,
    activation: str,
    dropout_p: float = 0.0,
) -> Tensor:
    """The feed-forward block, with dropout before its last layer."""
    gates = {} if gate is None else {"gate_weight": gate.weight, "gate_bias": gate.bias}
    layers = up.weight, down.weight, up.bias, down.bias
    return ops.ffn(x, *layers, **gates, activation=activation, dropout_p=dropout_p)


class CausalLM(models.LanguageModel):
    """A decoder that predicts what follows each token."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits (B, S, vocab_size) of what follows each token; those at padding mean nothing.

        The arguments are those of `states`.
        """
        return self.logits(self.states(*args, **kwargs))

    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: kv_cache.Cache | None = None,
    ) -> Tensor:
        """The last hidden state (B, S, E), after the norm, which `logits` and `loss` take.

        Args:
            input_ids: (B, S) integers.
            attention_mask: (B, S) bool or integer, 1 at tokens and 0 at padding; None: no padding.
            position_ids: (S,) or (B, S) integers; None: 0 .. S - 1, after what the cache holds.
            cache: keys and values of the tokens before, to which those of these are added; padding
                must then follow the tokens.

        Raises ValueError naming the argument.
        """
        mask = visible(input_ids, attention_mask, self.cache_shape.positions)
        if cache is None:
            attend = self_attention(self.kernels, mask, causal=True)
        else:
            attend = cache.append(self.kernels, input_ids, mask)
        if position_ids is None:
            position_ids = positions(attend, input_ids)
        position_ids = attend.pack(position_ids.expand(input_ids.shape))
        return attend.unpack(self.decode(attend.pack(input_ids), position_ids, attend))

    def decode(self, input_ids: Tensor, positions: Tensor, attend: Padded) -> Tensor:
        """The last hidden state (B, S, E) of tokens (B, S) at positions (B, S)."""
        raise NotImplementedError


class Seq2SeqLM(models.LanguageModel):
    """An encoder, and a decoder that predicts what follows each of its tokens."""

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, vocab_size) of what follows each token of the decoder.

        Args:
            input_ids: (B, S) integers; decoder_input_ids: (B, T) integers.
            attention_mask: (B, S) bool or integer, 1 at tokens and 0 at padding; None: no padding.
            decoder_attention_mask: (B, T) likewise.

        The logits at padding mean nothing. Raises ValueError naming the argument.
        """
        memory = self.remember(input_ids, attention_mask)
        return self.logits(self.states(decoder_input_ids, memory, decoder_attention_mask))

    def remember(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Memory:
        """Runs the encoder; the arguments are forward's."""
        raise NotImplementedError

    def states(
        self,
        decoder_input_ids: Tensor,
        memory: Memory,
        decoder_attention_mask: Tensor | None = None,
        cache: kv_cache.Cache | None = None,
    ) -> Tensor:
        """The decoder's last hidden state (B, T, E); the arguments are forward's.

        cache: keys and values of the tokens before, to which those of these are added.
        """
        positions = self.cache_shape.positions
        mask = visible(decoder_input_ids, decoder_attention_mask, positions, "decoder_")
        if cache is None:
            attend = Padded(self.kernels, mask, causal=True)
        else:
            attend = cache.append(self.kernels, decoder_input_ids, mask)
        return self.decode(decoder_input_ids, memory, attend, Padded(self.kernels, memory.mask))

    def decode(self, input_ids: Tensor, memory: Memory, attend: Padded, across: Padded) -> Tensor:
        """The last hidden state (B, T, E), with attention to itself and across to the memory."""
        raise NotImplementedError


def positions(attend: Padded, input_ids: Tensor) -> Tensor:
    """The positions (B, S) of tokens (B, S), one behind the other."""
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (attend.start + places).expand(input_ids.shape)
