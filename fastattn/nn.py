"""Drop-in modules with the arguments of torch.nn's own; long because these are many."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn

__all__ = [
    "AdditiveAttention",
    "FeedForward",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`, which can add a residual in the same pass (arXiv:1607.06450)."""

    def forward(
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise `input`, or `input + residual`.

        Args:
            input: [..., *normalized_shape].
            residual: the shape of `input`; where dtypes differ, as under `torch.autocast`, they are
                promoted as by `input + residual`.

        Returns:
            The normalised tensor; with a residual (normalised, input + residual).

        Raises:
            TypeError, ValueError: as `fastattn.layer_norm` and `fastattn.add_layer_norm`.
        """
        args = self.normalized_shape, self.weight, self.bias, self.eps
        if residual is None:
            return fastattn.layer_norm(input, *args)
        return fastattn.add_layer_norm(*_promoted(input, residual), *args)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`, which can add a residual in the same pass (arXiv:1910.07467)."""

    def forward(
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise `input`, or `input + residual`; takes and returns what `LayerNorm` does."""
        args = self.normalized_shape, self.weight, self.eps
        if residual is None:
            return fastattn.rms_norm(input, *args)
        return fastattn.add_rms_norm(*_promoted(input, residual), *args)


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

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., embed_dim] to [..., embed_dim]; raises as `fastattn.ffn` does."""
        return _feed_forward(
            input, self.up_proj, self.down_proj, self.activation, self.dropout, self.gate_proj
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class AdditiveAttention(nn.Module):
    """Attention by a small network, `softmax(weight . tanh(W_q query + W_k key)) value`.

    The alignment model of Bahdanau et al. 2015 (arXiv:1409.0473). Its parameters are `q_proj` and
    `k_proj`, `torch.nn.Linear` layers of which the second may have a bias, and `weight`
    [hidden_dim].

    Args:
        query_dim: width of the queries; key_dim: width of the keys.
        hidden_dim: width of the network.
        bias: whether the network adds a bias before tanh.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        hidden_dim: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(query_dim, hidden_dim, bias=False, **factory)
        self.k_proj = nn.Linear(key_dim, hidden_dim, bias=bias, **factory)
        self.weight = nn.Parameter(torch.empty(hidden_dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw `weight` as the layers draw theirs."""
        self.q_proj.reset_parameters()
        self.k_proj.reset_parameters()
        bound = max(1, self.weight.numel()) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Let L queries attend to S keys, in N sequences.

        Args:
            query: [N, L, query_dim]; key: [N, S, key_dim]; value: [N, S, E], the keys if None.
            mask: bool, True = attend, broadcastable to [N, L, S].
            causal: a query sees its own and earlier keys only.

        Returns:
            [N, L, E].

        Raises:
            TypeError, ValueError: as `fastattn.linear` and `fastattn.additive_attention`.
        """
        queries = fastattn.linear(query, self.q_proj.weight)
        keys = fastattn.linear(key, self.k_proj.weight, self.k_proj.bias)
        value = key if value is None else value
        if mask is not None and mask.dim() == 3:
            mask = mask[:, None]
        return fastattn.additive_attention(
            *(x[:, None] for x in (queries, keys, value)), self.weight, mask=mask, causal=causal
        )[:, 0]


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` (arXiv:1706.03762), with every argument of its constructor.

    It takes more than torch's in three places: `is_causal` needs no attn_mask, and is applied
    beside one that is given; bool and floating masks may be mixed; a query that may see no key
    gets the attention output 0, with and without weights, where torch may give NaN.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Let L queries attend to S keys, in N sequences.

        Args:
            query: [L, N, embed_dim], with batch_first [N, L, embed_dim], or [L, embed_dim].
            key, value: as query, with S for L and kdim or vdim for embed_dim.
            key_padding_mask: [N, S], or [S] without N. Bool, True = do not attend; or floating
                (query's dtype or fp32), added to the scores.
            need_weights: return the weights too. They take L * S of memory and eager PyTorch
                computes them: pass False where they are not used.
            attn_mask: [L, S] or [N * num_heads, L, S], bool or floating like key_padding_mask.
            average_attn_weights: average the weights over the heads.
            is_causal: query i sees keys 0 ... i.

        Returns:
            The output in query's shape, and None or the weights [N, L, S], for each head
            [N, num_heads, L, S] if not averaged, without N where query has none. In training they
            are the weights after dropout.

        Raises:
            TypeError, ValueError: an argument's dtype or shape does not fit; the message names it.
        """
        self._check(query, key, value)
        q, k, v = (self._batch_first(x) for x in self._project(query, key, value))
        masks = self._masks(q, k, key_padding_mask, attn_mask, is_causal)
        heads = self.num_heads, self.head_dim
        # [N, num_heads, L or S, head_dim], views of what the projection wrote
        q, k, v = (x.unflatten(-1, heads).transpose(1, 2) for x in (q, *self._extend(k, v)))
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = _attention_with_weights(q, k, v, masks, dropout_p)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights[0] if query.dim() == 2 else weights
        else:
            out = fastattn.attention(
                q, k, v, **masks._asdict(), align="top_left", dropout_p=dropout_p
            )
        out = out.transpose(1, 2).flatten(2)  # [N, L, embed_dim]
        if query.dim() == 2:
            out = out[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return fastattn.linear(out, self.out_proj.weight, self.out_proj.bias), weights

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        order = "N, length" if self.batch_first else "length, N"
        widths = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, width), x in zip(widths.items(), (query, key, value), strict=True):
            if x.is_nested:
                raise TypeError(
                    f"{name} must be padded (see key_padding_mask), got a nested tensor"
                )
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != width:
                raise ValueError(
                    f"{name} must be [{order}, {width}], or [length, {width}] if all three have "
                    f"no batch, got {list(x.shape)}"
                )
        shapes = [self._batch_first(x).shape[:2] for x in (query, key, value)]
        if shapes[1] != shapes[2]:
            raise ValueError(
                f"value must have key's batch and length {list(shapes[1])}, got {list(shapes[2])}"
            )
        if shapes[0][0] != shapes[1][0]:
            raise ValueError(f"key must have query's batch {shapes[0][0]}, got {shapes[1][0]}")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self._qkv_same_embed_dim:
            if query is key and key is value:
                packed = fastattn.linear(query, self.in_proj_weight, self.in_proj_bias)
                return packed.chunk(3, -1)
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        bias = self.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(map(fastattn.linear, (query, key, value), weights, biases))

    def _extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values that add_bias_kv and add_zero_attn ask for."""
        rows = []
        if self.bias_k is not None:
            rows.append((self.bias_k, self.bias_v))
        if self.add_zero_attn:
            rows.append((k.new_zeros(1, 1, self.embed_dim),) * 2)
        for row_k, row_v in rows:
            k = torch.cat([k, row_k.expand(len(k), -1, -1)], 1)
            v = torch.cat([v, row_v.expand(len(v), -1, -1)], 1)
        return k, v

    def _masks(
        self,
        q: Tensor,
        k: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> _Masks:
        """Both masks as fastattn takes them, broadcastable to [N, num_heads, L, S + extra keys]."""
        (batch, q_len, _), kv_len = q.shape, k.shape[1]
        mask = bias = None
        if key_padding_mask is not None:
            shapes = [(batch, kv_len), (kv_len,)] if batch == 1 else [(batch, kv_len)]
            _check_mask("key_padding_mask", key_padding_mask, shapes, q.dtype)
            mask, bias = _joined(mask, bias, key_padding_mask.reshape(batch, 1, 1, kv_len))
        if attn_mask is not None:
            shapes = [(q_len, kv_len), (batch * self.num_heads, q_len, kv_len)]
            _check_mask("attn_mask", attn_mask, shapes, q.dtype)
            shape = (1, 1) if attn_mask.dim() == 2 else (batch, self.num_heads)
            mask, bias = _joined(mask, bias, attn_mask.reshape(*shape, q_len, kv_len))
        extra = int(self.bias_k is not None) + int(self.add_zero_attn)
        if extra and is_causal:  # every query sees the extra keys
            causal = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device).tril()
            mask, is_causal = causal if mask is None else mask & causal, False
        if extra:
            mask = None if mask is None else F.pad(mask, (0, extra), value=True)
            bias = None if bias is None else F.pad(bias, (0, extra))
        return _Masks(mask, bias, is_causal)


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` (arXiv:1706.03762; norm_first: arXiv:2002.04745).

    The residual adds are fused with the norms that follow, and the two linear layers with the
    activation between them where it is ReLU, GELU or SiLU; `activation` takes a function, a module
    or one of "relu", "gelu", "gelu_tanh" and "silu". A linear layer that was replaced, parametrized
    or given hooks is called as a module.

    Nested tensors are refused. `torch.nn.TransformerEncoder` stacks this layer: it warns that it
    will not make nested tensors of padded batches, unless built with enable_nested_tensor=False.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # the parent's own would make torch's modules
        sizes = d_model, nhead, dim_feedforward, dropout, layer_norm_eps
        factory = {"bias": bias, "device": device, "dtype": dtype}
        _fill(self, ["self_attn"], *sizes, activation, batch_first, norm_first, factory)
        # 0 tells torch.nn.TransformerEncoder to pass padded tensors on, not nested ones
        self.activation_relu_or_gelu = 0

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Encode `src`; returns its shape.

        Args:
            src: [S, N, d_model], with batch_first [N, S, d_model], or [S, d_model].
            src_mask, src_key_padding_mask, is_causal: what `MultiheadAttention.forward` takes as
                attn_mask, key_padding_mask and is_causal.

        Raises:
            TypeError, ValueError: as `MultiheadAttention.forward`.
        """
        masks = src_mask, src_key_padding_mask, is_causal
        if self.norm_first:
            normed, summed = self.norm2(self._sa_block(self.norm1(src), *masks), src)
            return summed + self._ff_block(normed)
        x, _ = self.norm1(self._sa_block(src, *masks), src)
        x, _ = self.norm2(self._ff_block(x), x)
        return x

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(_block(self, x))


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` (arXiv:1706.03762; norm_first: arXiv:2002.04745).

    It is to `TransformerEncoderLayer` what torch's two layers are to each other, with attention to
    `memory` between self-attention and the linear layers.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # the parent's own would make torch's modules
        sizes = d_model, nhead, dim_feedforward, dropout, layer_norm_eps
        factory = {"bias": bias, "device": device, "dtype": dtype}
        attentions = ["self_attn", "multihead_attn"]
        _fill(self, attentions, *sizes, activation, batch_first, norm_first, factory)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Decode `tgt`; returns its shape.

        Args:
            tgt: [T, N, d_model], with batch_first [N, T, d_model], or [T, d_model].
            memory: likewise, with S for T.
            tgt_mask, tgt_key_padding_mask, tgt_is_causal: what `MultiheadAttention.forward` takes
                as attn_mask, key_padding_mask and is_causal, for tgt's attention to itself.
            memory_mask, memory_key_padding_mask, memory_is_causal: for its attention to memory.

        Raises:
            TypeError, ValueError: as `MultiheadAttention.forward`.
        """
        masks = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        across = memory_mask, memory_key_padding_mask, memory_is_causal
        if self.norm_first:
            normed, summed = self.norm2(self._sa_block(self.norm1(tgt), *masks), tgt)
            normed, summed = self.norm3(self._mha_block(normed, memory, *across), summed)
            return summed + self._ff_block(normed)
        x, _ = self.norm1(self._sa_block(tgt, *masks), tgt)
        x, _ = self.norm2(self._mha_block(x, memory, *across), x)
        x, _ = self.norm3(self._ff_block(x), x)
        return x

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(_block(self, x))


def _fill(
    layer: nn.Module,
    attentions: list[str],
    d_model: int,
    nhead: int,
    dim_feedforward: int,
    dropout: float,
    layer_norm_eps: float,
    activation: str | Callable[[Tensor], Tensor],
    batch_first: bool,
    norm_first: bool,
    factory: dict[str, Any],
) -> None:
    """Give an encoder's or a decoder's layer its attentions, its linear layers and its norms."""
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be callable or one of {list(ACTIVATIONS)}, got {activation!r}"
            )
        activation = ACTIVATIONS[activation]
    for name in attentions:
        options = {"dropout": dropout, "batch_first": batch_first}
        setattr(layer, name, MultiheadAttention(d_model, nhead, **options, **factory))
    layer.linear1 = nn.Linear(d_model, dim_feedforward, **factory)
    layer.dropout = nn.Dropout(dropout)
    layer.linear2 = nn.Linear(dim_feedforward, d_model, **factory)
    layer.norm_first = norm_first
    count = len(attentions) + 1
    for i in range(1, count + 1):
        setattr(layer, f"norm{i}", LayerNorm(d_model, eps=layer_norm_eps, **factory))
    for i in range(1, count + 1):
        setattr(layer, f"dropout{i}", nn.Dropout(dropout))
    layer.activation = activation


def _block(layer: nn.Module, x: Tensor) -> Tensor:
    """The linear layers of an encoder's or a decoder's layer."""
    activation = _name_of(layer.activation) or layer.activation
    return _feed_forward(x, layer.linear1, layer.linear2, activation, layer.dropout)


def _promoted(input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(input.dtype, residual.dtype)
    return input.to(dtype), residual.to(dtype)


class _Masks(NamedTuple):
    mask: Tensor | None
    bias: Tensor | None
    causal: bool


def _check_mask(name: str, mask: Tensor, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    if mask.dtype not in (torch.bool, dtype, torch.float32):
        raise TypeError(f"{name} must be torch.bool, {dtype} or torch.float32, got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must have shape {allowed}, got {list(mask.shape)}")


def _joined(
    mask: Tensor | None, bias: Tensor | None, other: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Add torch.nn's mask `other` (True = do not attend, or a bias) to fastattn's two."""
    if other.dtype == torch.bool:
        return ~other if mask is None else mask & ~other, bias
    return mask, other if bias is None else bias + other


def _attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, masks: _Masks, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Attention in eager PyTorch, which keeps the weights [N, num_heads, L, S]."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if masks.bias is not None:
        scores = scores + masks.bias
    if masks.mask is not None:
        scores = scores.masked_fill(~masks.mask, -torch.inf)
    if masks.causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    blind = (scores == -torch.inf).all(-1, keepdim=True)  # the softmax of such a row is NaN
    weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0).to(v.dtype)
    weights = F.dropout(weights, dropout_p)
    return weights @ v, weights


def _name_of(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name under which fastattn fuses `activation`, if it does."""
    if isinstance(activation, nn.Module):
        if _hooked(activation):
            return None
        if type(activation) is nn.GELU:
            return {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.approximate)
        return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(activation))
    return next((name for name, known in ACTIVATIONS.items() if activation is known), None)


def _hooked(module: nn.Module) -> bool:
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _feed_forward(
    input: Tensor,
    up: nn.Module,
    down: nn.Module,
    activation: str | Callable[[Tensor], Tensor],
    dropout: nn.Module,
    gate: nn.Module | None = None,
) -> Tensor:
    """down(dropout(activation(up))), or down(dropout(activation(gate) * up)), fused where it can.

    A module that is hooked, or is not exactly the torch.nn class, is called and not looked into.
    """
    plain = all(map(_plain, (up, down))) and (gate is None or _plain(gate))
    idle = type(dropout) is nn.Dropout and not (dropout.training and dropout.p)
    if plain and idle and not _hooked(dropout) and isinstance(activation, str):
        return fastattn.ffn(
            input,
            up.weight,
            down.weight,
            up.bias,
            down.bias,
            gate_weight=None if gate is None else gate.weight,
            gate_bias=None if gate is None else gate.bias,
            activation=activation,
        )
    hidden = _linear(up if gate is None else gate, input, activation)
    if gate is not None:
        hidden = hidden * _linear(up, input)
    return _linear(down, dropout(hidden))


def _plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and not _hooked(layer)


def _linear(
    layer: nn.Module, input: Tensor, activation: str | Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    fused = activation if isinstance(activation, str) else None
    if _plain(layer):
        out = fastattn.linear(input, layer.weight, layer.bias, fused)
    else:
        out = layer(input) if fused is None else ACTIVATIONS[fused](layer(input))
    return activation(out) if callable(activation) else out
