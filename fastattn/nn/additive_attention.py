"""Attention by a small network, with its projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastattn


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
