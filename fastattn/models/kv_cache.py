"""The key/value cache: what a decoder keeps of the tokens so far, and attention to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import models
from fastattn.models import parts


class CacheShape(NamedTuple):
    """What a model keeps of a token, and for how many."""

    layers: int
    heads: int  # of keys and values
    width: int  # of a head
    positions: int | None  # tokens that the model can number; None: any


class Cache:
    """Keys and values of the tokens so far, with room for `length` in each of `batch` rows.

    Pass it to a model, under torch.no_grad(), along with the tokens that come next. `lengths` [B]
    is how many each row has. Raises ValueError where the model has fewer positions than `length`.
    """

    def __init__(self, model: models.LanguageModel, batch: int, length: int) -> None:
        layers, heads, width, positions = model.cache_shape
        if length < 1 or (positions is not None and length > positions):
            most = "" if positions is None else f" and at most the model's {positions} positions"
            raise ValueError(f"length must be at least 1{most}, got {length}")
        size = batch, heads, length, width
        weight = model.lm_head.weight
        self.layers = [(weight.new_zeros(size), weight.new_zeros(size)) for _ in range(layers)]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self.length, self.longest, self.even = length, 0, True

    def append(self, kernels: str, input_ids: Tensor, mask: Tensor | None) -> _Step:
        """How the tokens input_ids [B, S] attend, which are counted as in the cache from now on.

        mask [B, S] is True at tokens, and False at padding behind them. Raises ValueError where
        they do not fit.
        """
        if torch.is_grad_enabled():
            raise ValueError("cache is for inference: call the model under torch.no_grad()")
        batch, count = input_ids.shape
        if batch != len(self.lengths):
            raise ValueError(
                f"input_ids must have the cache's {len(self.lengths)} rows, got {batch}"
            )
        if self.longest + count > self.length:
            raise ValueError(
                f"cache must have room for {self.longest + count} tokens, got one for {self.length}"
            )
        if count > 1 and not self.even:
            raise ValueError(
                f"input_ids must be (B, 1) after prompts of unequal lengths, got {(batch, count)}"
            )
        if mask is not None and (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError("attention_mask must have its padding behind the tokens for a cache")
        step = _Step(kernels, self)
        self.lengths = self.lengths + (count if mask is None else mask.sum(1))
        self.longest = self.longest + count if mask is None else int(self.lengths.max())
        self.even = self.even if mask is None else bool((self.lengths == self.longest).all())
        return step

    def select(self, rows: Tensor, shared: int = 0) -> None:
        """Keep these rows of the batch, in this order; a row may come several times.

        shared: so many first tokens are the same in a row as in the one that takes its place.
        """
        used = slice(shared, self.longest)
        if len(rows) == len(self.lengths):
            moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
            for pair in self.layers:
                for x in pair:
                    x[moved, :, used] = x[rows[moved], :, used]
        else:
            for i, pair in enumerate(self.layers):
                self.layers[i] = tuple(x.new_zeros(len(rows), *x.shape[1:]) for x in pair)
                for out, x in zip(self.layers[i], pair, strict=True):
                    out[:, :, : self.longest] = x[rows, :, : self.longest]
        self.lengths = self.lengths[rows]


class _Step(parts.Padded):
    """Attention of new tokens to themselves and to what a cache holds of the tokens before."""

    def __init__(self, kernels: str, cache: Cache) -> None:
        super().__init__(kernels, None, causal=True)
        self.caches, self.lengths = cache.layers, cache.lengths
        self.start = cache.lengths[:, None]
        self.longest, self.even = cache.longest, cache.even

    @property
    def layers(self) -> list[_Layer]:
        return [_Layer(self, keys, values) for keys, values in self.caches]


@dataclass
class _Layer:
    """The same for one layer, whose keys and values are put into the cache."""

    step: _Step
    keys: Tensor  # [B, Hkv, length, D]
    values: Tensor

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float, **options: Any
    ) -> Tensor:
        if dropout_p:
            raise ValueError("cache is for models in eval mode, got one with dropout: call .eval()")
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [B, H, S, D]
        ops = self.step.ops
        biased = "bias" in options or "relative_bias" in options
        if biased and not self.step.even:
            raise ValueError("cache must have rows of one length for a model with a position bias")
        if query.shape[2] == 1 and not biased:
            out = ops.attention_decode(
                query,
                self.keys,
                self.values,
                cache_seqlens=self.step.lengths,
                key=key,
                value=value,
                **options,
            )
        else:
            first = self.step.longest
            end = first + query.shape[2]
            self.keys[:, :, first:end], self.values[:, :, first:end] = key, value
            keys, values = self.keys[:, :, :end], self.values[:, :, :end]
            out = ops.attention(query, keys, values, causal=True, **options)
        return out.transpose(1, 2)
