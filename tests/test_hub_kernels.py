"""What Hugging Face's kernels puts into a model, against the layers that it replaces."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_parity import check, results
from torch import Tensor, nn

import fastattn
from fastattn.integrations import kernels as ours

kernels = pytest.importorskip("kernels", reason="needs kernels: pip install kernels")
pytestmark = pytest.mark.usefixtures("one_thread")


def rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    def half(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(width)), 1e-5

    def forward(self, hidden_states: Tensor) -> Tensor:
        rstd = (hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return self.weight * (hidden_states * rstd)


@pytest.fixture
def model() -> nn.Module:
    """A norm and a rotation, of classes that kernels may replace."""
    rotary = kernels.use_kernel_forward_from_hub("rotary_pos_emb")(rotated)

    @kernels.use_kernelized_func(rotary)
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = kernels.use_kernel_forward_from_hub("RMSNorm")(Norm)(16)

        def forward(self, x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Tensor:
            x = self.norm(x)
            return torch.cat(rotary(x, x, cos, sin, unsqueeze_dim=unsqueeze_dim), 1)

    return Small()


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_layers_compute_what_they_replace(
    model: nn.Module, unsqueeze_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 5, 5, 16)
    angles = torch.randn(2, 5, 8).repeat(1, 1, 2)

    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        dtype = model.norm.weight.dtype
        tables = angles.cos().to(dtype), angles.sin().to(dtype)
        out = model(x.to(dtype), *tables, unsqueeze_dim)
        return out, out.square().sum()

    exact = results(copy.deepcopy(model).double(), run)
    eager = results(model, run)
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        ours.register()
        mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
        replaced = kernels.kernelize(model, mode=mode, device="cpu")
    called = []
    for name in ("rms_norm", "apply_rope"):
        real = getattr(fastattn, name)
        spy = lambda *args, real=real: called.append(real) or real(*args)  # noqa: E731
        monkeypatch.setattr(fastattn, name, spy)
    with fastattn.use_kernel("cpu"):
        check(results(replaced, run), eager, exact, 10)
    assert called == [fastattn.ops.norm.rms_norm, fastattn.ops.rope.apply_rope]


class Block(nn.Module):
    """LLaMA's feed-forward block, or Gemma's."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 24), nn.Linear(16, 24, bias=False)
        self.down_proj, self.act_fn = nn.Linear(24, 16), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Activation(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        inner = input * 0.7978845608 * (1.0 + 0.044715 * input * input)
        return 0.5 * input * (1.0 + torch.tanh(inner))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("SwiGLU", lambda: Block(F.silu)),
        ("GeGLU", lambda: Block(partial(F.gelu, approximate="tanh"))),
        ("NewGELU", Activation),
        ("FastGELU", Activation),
    ],
)
def test_blocks_and_activations(name: str, make: Callable[[], nn.Module]) -> None:
    layer = make()
    named = type(name, (type(layer),), {})
    kernels.replace_kernel_forward_from_hub(named, name)
    model = nn.Sequential(nn.Linear(16, 16), layer)
    x = torch.randn(5, 16)

    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        out = model(x.to(model[0].weight.dtype))
        return out, out.square().sum()

    exact = results(copy.deepcopy(model).double(), run)
    eager = results(model, run)
    layer.__class__ = named
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        ours.register()
        mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
        replaced = kernels.kernelize(model, mode=mode, device="cpu")
    assert "forward" in replaced[1].__dict__
    with fastattn.use_kernel("cpu"):
        check(results(replaced, run), eager, exact, 5)


def test_registering_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ImportError, match="pip install kernels"):
        ours.register()


def test_importing_registers_nothing() -> None:
    from kernels.layer.globals import _KERNEL_MAPPING

    found: dict[str, Any] = _KERNEL_MAPPING.get()
    assert not any("cpu" in devices for name, devices in found.items() if name in ours.LAYERS)
