"""Attention of Hugging Face models: `attn_implementation="fastattn"`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastattn


def register(name: str = "fastattn") -> None:
    """Let models of transformers be loaded with, or set to, `attn_implementation=name`.

        huggingface.register()
        model.set_attn_implementation("fastattn")

    Raises:
        ImportError: transformers is missing, or older than its interface for this (4.53).
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            "this needs transformers with AttentionMaskInterface: pip install 'transformers>=4.57'"
        ) from error
    AttentionInterface.register(name, attention)
    # without a mask function of its own an implementation is given no masks at all
    AttentionMaskInterface.register(name, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    output_attentions: bool | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """What the attention modules of transformers call.

    Args:
        module: the caller, whose `is_causal` counts where the argument is None.
        query: [B, H, Sq, D]; key, value: [B, Hkv, Sk, D].
        attention_mask: bool, True = attend, or floating and added, broadcastable to
            [B, H, Sq, Sk]; a sliding window is in it. Without one a causal module's first query
            meets the first key, except that a single query sees all keys.
        position_bias: [1 or B, H, Sq, Sk], added too; it receives its gradient.
        s_aux: [H], attention sinks.
        cache: must be None, for paged caches are not read.
        output_attentions: must be false, for the weights are never made.
        unused: what transformers passes on besides, which says nothing of attention.

    Returns:
        [B, Sq, H, D], and None for the weights.

    Raises:
        ValueError: the weights or a paged cache are asked for; or as `fastattn.attention`.
        TypeError: attention_mask is neither bool nor floating.
    """
    if output_attentions or getattr(getattr(module, "config", None), "output_attentions", False):
        raise ValueError(
            'output_attentions must be False for fastattn, got True: attn_implementation="eager"'
            " returns attention weights"
        )
    if cache is not None:
        raise ValueError(f"cache must be None for fastattn, got {type(cache).__name__}")
    if attention_mask is not None and not (
        attention_mask.dtype == torch.bool or attention_mask.is_floating_point()
    ):
        raise TypeError(f"attention_mask must be bool or floating, got {attention_mask.dtype}")
    q_len, kv_len = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and q_len > 1
    if causal and kv_len > q_len:  # a static cache that is filled for the first time
        key, value = key[:, :, :q_len], value[:, :, :q_len]
        position_bias = None if position_bias is None else position_bias[..., :q_len]
    mask, bias = attention_mask, position_bias
    if mask is not None and mask.dtype != torch.bool:
        mask, bias = None, mask if bias is None else bias + mask
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.to(query.dtype)
    out = fastattn.attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        causal=causal,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout_p=dropout,
    )
    return out.transpose(1, 2), None
