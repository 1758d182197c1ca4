"""The layers of torch.nn.Transformer, with their residual adds and linear layers fused."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.feed_forward import ACTIVATIONS, feed_forward, hooked
from fastattn.nn.norm import LayerNorm


class _Layer(nn.Module):
    """What both layers are made of, under torch's names: attentions, linear layers and norms."""

    _attentions: tuple[str, ...]
    recompute = False  # of a layer of torch.nn that `fastattn.patch` has made one of these

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
        recompute: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # the parent's own would make torch's modules
        if isinstance(activation, str):
            if activation not in ACTIVATIONS:
                raise ValueError(
                    f"activation must be callable or one of {list(ACTIVATIONS)}, got {activation!r}"
                )
            activation = ACTIVATIONS[activation]
        factory = {"bias": bias, "device": device, "dtype": dtype}
        for name in self._attentions:
            options = {"dropout": dropout, "batch_first": batch_first}
            setattr(self, name, MultiheadAttention(d_model, nhead, **options, **factory))
        self.linear1 = nn.Linear(d_model, dim_feedforward, **factory)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **factory)
        self.norm_first = norm_first
        blocks = range(1, len(self._attentions) + 2)
        for i in blocks:
            setattr(self, f"norm{i}", LayerNorm(d_model, eps=layer_norm_eps, **factory))
        for i in blocks:
            setattr(self, f"dropout{i}", nn.Dropout(dropout))
        self.activation = activation
        self.recompute = recompute

    def _linears(self, x: Tensor) -> Tensor:
        activation = _name_of(self.activation) or self.activation
        return feed_forward(
            x, self.linear1, self.linear2, activation, self.dropout, recompute=self.recompute
        )


class TransformerEncoderLayer(_Layer, nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` (arXiv:1706.03762; norm_first: arXiv:2002.04745).

    The residual adds are fused with the norms that follow, and the two linear layers with the
    activation and the dropout between them where it is ReLU, GELU or SiLU; `activation` takes a
    function, a module or one of "relu", "gelu", "gelu_tanh" and "silu". A linear layer that was
    replaced, parametrized or given hooks is called as a module. With `recompute`, an argument and
    an attribute beside torch's, backward computes what is dim_feedforward wide again instead of
    keeping it.

    Nested tensors are refused. `torch.nn.TransformerEncoder` stacks this layer: it warns that it
    will not make nested tensors of padded batches, unless built with enable_nested_tensor=False.
    """

    _attentions = ("self_attn",)
    # tells torch.nn.TransformerEncoder to pass padded tensors on, not nested ones
    activation_relu_or_gelu = 0

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
        return self.dropout2(self._linears(x))


class TransformerDecoderLayer(_Layer, nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` (arXiv:1706.03762; norm_first: arXiv:2002.04745).

    It is to `TransformerEncoderLayer` what torch's two layers are to each other, with attention to
    `memory` between self-attention and the linear layers.
    """

    _attentions = "self_attn", "multihead_attn"

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
        return self.dropout3(self._linears(x))


def _name_of(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name under which fastattn fuses `activation`, if it does."""
    if isinstance(activation, nn.Module):
        if hooked(activation):
            return None
        if type(activation) is nn.GELU:
            return {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.approximate)
        return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(activation))
    return next((name for name, known in ACTIVATIONS.items() if activation is known), None)
