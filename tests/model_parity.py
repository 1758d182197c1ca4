"""What tests of whole models share: weights that attend, gradients by name, the error rule."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastattn.testing import assert_close_to_oracle, assert_vanishes

FACTOR = 5.0  # a model is a chain of ops, whose errors add up
BART_SIZES = {  # of an encoder-decoder
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
}
KEY_AND_QUERY = {"key.bias": "query.bias", "k_proj.bias": "q_proj.bias"}


def sharpened(model: nn.Module, scale: float = 6.0) -> nn.Module:
    """Random weights hardly attend: with these, six times as large, a wrong mask shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() > 1 and parameter.requires_grad:
                parameter.mul_(scale)
    return model.eval()


def results(
    model: nn.Module, run: Callable[[nn.Module], tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The logits that `run` returns, and the gradients of the loss beside it, by parameter name."""
    model.zero_grad()
    torch.manual_seed(1)  # of dropout
    logits, loss = run(model)
    loss.backward()
    found = {"logits": logits.detach()}
    for name, parameter in model.named_parameters():
        if name.endswith("c_attn.bias"):  # GPT-2's three in one
            for part, grad in zip(("query", "key", "value"), parameter.grad.chunk(3), strict=True):
                found[name.replace("c_attn", part)] = grad
        elif parameter.requires_grad:
            found[name] = parameter.grad
    return found


def errors(
    model: nn.Module,
    run: Callable[[nn.Module], tuple[Tensor, Tensor]],
    exact: dict[str, Tensor],
    draws: int = 6,
) -> dict[str, float]:
    """By name, the largest error of some models whose weights are rounded otherwise.

    Each weight is moved by one unit in its last place, or not at all: sharp attention makes of such
    a rounding one a hundred times as large here and there, so that one draw says little.
    """
    found = dict.fromkeys(exact, 0.0)
    generator = torch.Generator().manual_seed(0)  # not the one that `results` sets anew
    for _ in range(draws):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                toward = torch.randint(-1, 2, parameter.shape, generator=generator) * torch.inf
                moved = torch.nextafter(parameter, toward.to(parameter))
                parameter.copy_(torch.where(toward.isnan(), parameter, moved))
        for name, tensor in results(other, run).items():
            error = (tensor.double() - exact[name]).abs().max().item()
            found[name] = max(found[name], error)
    return found


def check(
    found: dict[str, Tensor],
    eager: dict[str, Tensor],
    exact: dict[str, Tensor],
    terms: int,
    others: dict[str, float] | None = None,
) -> None:
    """The error rule against eager PyTorch; `terms` tokens add to a gradient.

    `others` are errors that eager makes in other draws: twice as large ones are allowed too.
    """
    assert found.keys() == eager.keys() == exact.keys()
    for name, oracle in exact.items():
        size = exact.get(_query(name), oracle).abs().max().item()
        if oracle.abs().max() < 1e-10 * size:  # it moves all scores of a query alike
            noise = found[name].to(found["logits"].dtype)  # bf16 under autocast
            assert_vanishes(noise, size, terms=terms, name=name)
        else:
            extra = (others or {}).get(name, 0.0) * 2 / FACTOR
            assert_close_to_oracle(found[name], eager[name], oracle, FACTOR, name, extra)


def _query(name: str) -> str:
    """The bias of the queries, if `name` is that of the keys."""
    for key, query in KEY_AND_QUERY.items():
        name = name.replace(key, query)
    return name
