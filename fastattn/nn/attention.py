"""Multi-head attention with the arguments, masks and weights of torch.nn's own."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn


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
