"""Norms with the arguments of torch.nn's own, which can add a residual in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastattn


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


def _promoted(input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(input.dtype, residual.dtype)
    return input.to(dtype), residual.to(dtype)
