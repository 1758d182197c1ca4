"""Layers for Hugging Face's package kernels, whose `kernelize` puts them into a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.integrations import patch


def register() -> None:
    """Let `kernels.kernelize(model, device="cpu")` put fastattn's layers into a model.

    They take the names "RMSNorm", which the norms of LLaMA, Mistral and Qwen bear in transformers,
    "rotary_pos_emb", and those of the activations that it writes out, "NewGELU" and "FastGELU", for
    training as for inference, with torch.compile too. "SwiGLU" and "GeGLU" are for the feed-forward
    blocks that you name so with `kernels.replace_kernel_forward_from_hub(LlamaMLP, "SwiGLU")`.
    Other names and devices keep what they are mapped to.

    Raises:
        ImportError: the package kernels is missing.
    """
    try:
        from kernels import register_kernel_mapping
    except ImportError as error:
        raise ImportError("this needs kernels: pip install kernels") from error
    register_kernel_mapping({name: {"cpu": Local(layer)} for name, layer in LAYERS.items()})


@dataclass(frozen=True)
class Local:
    """What kernels calls a repository: here it is this file, and holds one layer."""

    layer: type[nn.Module]

    def load(self) -> type[nn.Module]:
        return self.layer


# kernels binds the forward of a layer without a state of its own to the module that it replaces


class RMSNorm(nn.Module):
    """A norm whose eps is called variance_epsilon or eps, as in transformers."""

    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return patch._rms_norm(self, hidden_states, patch._epsilon(self))


class RotaryEmbedding(nn.Module):
    """Queries and keys turned by tables [..., S, D] that hold each angle twice."""

    can_torch_compile = True

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        inside = unsqueeze_dim == 2  # [B, S, H, D]
        query, key = (x.transpose(1, 2) if inside else x for x in (q, k))
        cos, sin = (table[..., : table.shape[-1] // 2] for table in (cos, sin))
        turned = fastattn.apply_rope(query, key, cos, sin)
        query, key = (x.transpose(1, 2) if inside else x for x in turned)
        return query, key


class TanhGELU(nn.Module):
    """GELU by a tanh."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate="tanh")


GATED = "up_proj", "down_proj", "gate_proj"  # in the order of patch._mlp


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), as LLaMA has it."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return patch._mlp(self, x, GATED, "silu")


class GeGLU(nn.Module):
    """The same with tanh-GELU, as Gemma has it."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return patch._mlp(self, x, GATED, "gelu_tanh")


LAYERS: dict[str, type[nn.Module]] = {
    "RMSNorm": RMSNorm,
    "rotary_pos_emb": RotaryEmbedding,
    "NewGELU": TanhGELU,
    "FastGELU": TanhGELU,
    "SwiGLU": SwiGLU,
    "GeGLU": GeGLU,
}
