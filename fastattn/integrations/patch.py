"""`fastattn.patch`: fused layers inside a model that is already there, found by their structure."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

import fastattn
from fastattn import checks
from fastattn.integrations import huggingface, logits
from fastattn.nn.feed_forward import ACTIVATIONS, feed_forward, hooked, linear, matrix

TORCH = {  # torch.nn's own layer -> the one that takes its place, with its parameters
    nn.LayerNorm: fastattn.nn.LayerNorm,
    nn.RMSNorm: fastattn.nn.RMSNorm,
    nn.MultiheadAttention: fastattn.nn.MultiheadAttention,
    nn.TransformerEncoderLayer: fastattn.nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: fastattn.nn.TransformerDecoderLayer,
}
Forward = Callable[..., Tensor]  # of a module and its input
# what replaces a layer's forward, if that is needed, and its name; why nothing does; not asked
Found = tuple[Forward | None, str] | str | None
EPSILONS = "variance_epsilon", "eps"  # what an RMS norm calls it
IDLE = nn.Dropout(0.0)
FEW, FEW_TRANSPOSED = 24, 16  # rows up to which fastattn.linear reads a weight where it lies


@dataclass(frozen=True)
class Row:
    """What became of all layers of one type."""

    count: int
    layer: str  # the name of their type
    replaced: bool
    by: str  # the op that replaced it, or why it was left


@dataclass
class Report:
    """What `patch` did; prints as a table."""

    rows: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            ("replaced" if row.replaced else "left", f"{row.count} × {row.layer}", row.by)
            for row in self.rows
        ]
        width = max((len(line[1]) for line in lines), default=0)
        return "\n".join(f"{did:8}  {what:{width}}  {by}" for did, what, by in lines)


def patch(
    model: nn.Module,
    *,
    attention: bool = True,
    norms: bool = True,
    mlps: bool = True,
    linears: bool = True,
    loss: bool = False,
) -> Report:
    """Let a model of transformers, or of torch.nn's layers, run on fused kernels, in place.

    Parameters, buffers and the state dict stay what they are; `unpatch` undoes it. A layer is
    replaced where it is torch.nn's own, or where on random weights and inputs it computes what a
    fused op computes; all else is left. In training, a feed-forward block runs its own code if it
    has dropout in other places than a module of torch.nn's before or behind its last layer.

    Args:
        model: in any mode; compile it afterwards.
        attention: of torch.nn, and of transformers models that use its AttentionInterface.
        norms: LayerNorm, and RMSNorm as in torch, LLaMA, T5 and Gemma.
        mlps: linear, activation, linear; the same with a gate; linear and activation.
        linears: the other layers of torch.nn.Linear or of transformers' Conv1D, on the CPU and for
            few rows, up to 24 or 16, as a model has that writes token by token. With more rows they
            stay what they were.
        loss: of a language model of transformers. Its logits are then not computed before
            something other than a cross-entropy asks for them, which must be before the weights
            change; they cannot be written to, and torch.compile computes them always.

    Returns:
        What was replaced and what was left, and why; `print` it.

    Raises:
        ValueError: the model is patched.
    """
    if "_fastattn_undo" in model.__dict__:
        raise ValueError("model must not be patched, got one that is: fastattn.unpatch(model)")
    undo: list[tuple[nn.Module, str, Any]] = []  # a module, what was set, its value before
    model._fastattn_undo = undo
    rows: Counter[tuple[str, bool, str]] = Counter()
    known: dict[Any, Found] = {}
    within: set[nn.Module] = set()  # what is replaced
    of_loss = _patch_loss(model, undo) if loss else None
    if attention and hasattr(model, "set_attn_implementation"):
        rows[_patch_interface(model, undo)] += 1
    with torch.random.fork_rng(devices=[]):
        for module in list(model.modules()):
            kind = type(module)
            found: Found = None
            if "forward" in module.__dict__:
                continue
            if attention and getattr(module, "use_nested_tensor", False):  # nn.TransformerEncoder
                _set(undo, module, "use_nested_tensor", False)  # they bypass the layers
            if kind in TORCH:
                wanted = {nn.MultiheadAttention: attention, nn.LayerNorm: norms, nn.RMSNorm: norms}
                if wanted.get(kind, attention and norms and mlps):
                    found = _swap(module, undo)
            elif norms and _is_norm(module):
                found = _alike(module, known, _probe_norm)
            elif mlps and _is_mlp(module):
                found = _alike(module, known, _probe_mlp)
            elif linears and _is_linear(module) and module not in within:
                few = FEW if kind is nn.Linear else FEW_TRANSPOSED
                found = partial(_linear, few=few), f"fastattn.linear, up to {few} rows"
            if isinstance(found, tuple):
                forward, found_name = found
                within.update(module.modules())
                if forward is not None:
                    module.forward = partial(forward, module)
                    undo.append((module, "forward", None))
                rows[kind.__name__, True, found_name] += 1
            elif found is not None:
                rows[kind.__name__, False, found] += 1
    if of_loss is not None:
        rows[of_loss] += 1
    return Report([Row(count, *row) for row, count in rows.items()])


def unpatch(model: nn.Module) -> None:
    """Undo `patch`; raises ValueError where there is nothing to undo."""
    if "_fastattn_undo" not in model.__dict__:
        raise ValueError("model must be patched by fastattn.patch, got one that is not")
    for module, name, before in reversed(model.__dict__.pop("_fastattn_undo")):
        if name == "forward":
            del module.forward
        elif name == "attention":
            module.set_attn_implementation(before)
        else:
            setattr(module, name, before)


def _set(undo: list, module: nn.Module, name: str, value: Any) -> None:
    undo.append((module, name, getattr(module, name)))
    setattr(module, name, value)


# attention of transformers


def _patch_interface(model: nn.Module, undo: list[tuple]) -> tuple[str, bool, str]:
    before = model.config._attn_implementation
    what = f"attention of {type(model).__name__}"
    if not hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS"):
        return what, False, "its code does not use transformers' AttentionInterface"
    if getattr(model.config, "output_attentions", False):
        return what, False, "it returns attention weights"
    huggingface.register()
    try:
        model.set_attn_implementation("fastattn")
    except ValueError as error:
        return what, False, str(error)
    undo.append((model, "attention", before))
    return what, True, f"attn_implementation {before!r} -> 'fastattn'"


# the loss of transformers


def _patch_loss(model: nn.Module, undo: list[tuple]) -> tuple[str, bool, str]:
    what = f"loss of {type(model).__name__}"
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return what, False, "it has no output embeddings"
    if type(head) is not nn.Linear or "forward" in head.__dict__:
        return what, False, "its output embeddings are no torch.nn.Linear"
    head.forward = partial(logits.lazy_linear, head)
    undo.append((head, "forward", None))
    return what, True, "fastattn.linear_cross_entropy"


# layers of torch.nn


def _swap(module: nn.Module, undo: list) -> Found:
    """Make a layer of torch.nn the one of fastattn.nn that has the same parameters."""
    kind = type(module)
    needed = nn.MultiheadAttention, nn.LayerNorm
    if kind in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        names = [n for n, _ in module.named_children() if n.startswith("norm") or "attn" in n]
        if any(type(getattr(module, name)) not in needed for name in names):
            return "its attention or norms are not torch.nn's own"
    _set(undo, module, "__class__", TORCH[kind])
    return None, f"fastattn.nn.{kind.__name__}"


def _is_linear(module: nn.Module) -> bool:
    weight = matrix(module)
    return weight is not None and weight.dtype in checks.FLOATING


def _linear(module: nn.Module, x: Tensor, few: int) -> Tensor:
    if not x.is_cpu or x.shape[:-1].numel() > few:
        return type(module).forward(module, x)
    return fastattn.linear(x, matrix(module), module.bias)


# layers known by what they compute


def _is_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    return (
        list(parameters) == ["weight"]
        and parameters["weight"].dim() == 1
        and not list(module.buffers())
        and _epsilon(module) is not None
    )


def _epsilon(module: nn.Module) -> float | None:
    found = [getattr(module, name, None) for name in EPSILONS]
    return next((eps for eps in found if isinstance(eps, float)), None)


def _is_mlp(module: nn.Module) -> bool:
    linears = _linears(module)
    inside = sum(1 for linear in linears.values() for _ in linear.parameters())
    return len(linears) in (1, 2, 3) and inside == sum(1 for _ in module.parameters())


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if matrix(child) is not None}


def _alike(module: nn.Module, known: dict, probe: Callable[[nn.Module], Any]) -> Any:
    """What `probe` says, asked once for all modules of one type, look and settings."""
    kinds = bool, int, float, str, Callable
    settings = {k: str(v) for k, v in vars(module).items() if isinstance(v, kinds)}
    key = type(module), repr(module), tuple(settings.items())
    if key not in known:
        known[key] = probe(module)
    return known[key]


def _probe(module: nn.Module, inputs: Tensor, candidates: dict[str, Forward]) -> Found:
    """The candidate that computes what the module does, if it has random weights.

    None where the module takes or returns something else than a tensor, else a sentence if there is
    no candidate.
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        return "its weights are on the meta device"
    if len({parameter.dtype for parameter in module.parameters()}) > 1:
        return "its weights have several dtypes"
    if any(map(hooked, module.modules())):
        return "it has hooks, or a layer within"
    trial = copy.deepcopy(module).float().cpu().eval()
    with torch.no_grad():
        for parameter in trial.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0)
        try:
            wanted = trial(inputs)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return None
        if not isinstance(wanted, Tensor):
            return None
        for by, forward in candidates.items():
            found = forward(trial, inputs)
            if found.shape == wanted.shape and _close(found, wanted):
                drops = not _close(trial.train()(inputs), wanted)
                return _dropping(trial, inputs, forward) if drops else forward, by
    return "it computes what no fused op does"


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 2e-5 * wanted.abs().max())


def _dropping(trial: nn.Module, inputs: Tensor, forward: partial[Tensor]) -> Forward:
    """`forward` in training: with the module's dropout, or not at all if that stands elsewhere."""
    names = [name for name, child in trial.named_children() if type(child) is nn.Dropout]
    if forward.func is _mlp and len(names) == 1:
        setattr(trial, names[0], _Marks())
        for dropping in (partial(forward, dropout=names[0]), partial(_then, forward, names[0])):
            if _close(dropping(trial, inputs), trial(inputs)):
                return dropping
    return partial(_unless_it_drops, forward)


class _Marks(nn.Module):
    """Stands where dropout did, and shows in the result where that was."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(-1, 1, x.shape[-1])


def _then(forward: Forward, dropout: str, module: nn.Module, x: Tensor) -> Tensor:
    return getattr(module, dropout)(forward(module, x))


def _unless_it_drops(forward: Forward, module: nn.Module, x: Tensor) -> Tensor:
    return type(module).forward(module, x) if module.training else forward(module, x)


def _probe_norm(module: nn.Module) -> Found:
    eps = _epsilon(module)
    inputs = torch.randn(4, len(module.weight), device="cpu")
    inputs[2:] *= eps**0.5  # where eps tells
    candidates = {
        "fastattn.rms_norm": partial(_rms_norm, eps=eps),
        "fastattn.rms_norm, weight + 1": partial(_rms_norm_of_one_more, eps=eps),
    }
    return _probe(module, inputs, candidates)


def _rms_norm(module: nn.Module, x: Tensor, eps: float) -> Tensor:
    return fastattn.rms_norm(x, module.weight.shape, module.weight.to(x.dtype), eps)


def _rms_norm_of_one_more(module: nn.Module, x: Tensor, eps: float) -> Tensor:
    return fastattn.rms_norm(x, module.weight.shape, 1 + module.weight.float(), eps)


def _probe_mlp(module: nn.Module) -> Found:
    linears = _linears(module)
    shapes = {name: matrix(layer).shape for name, layer in linears.items()}  # [out, in]
    width = next(iter(shapes.values()))[1]
    op = "fastattn.linear" if len(linears) == 1 else "fastattn.ffn"
    candidates = {}
    for names in permutations(linears):
        up, down, gate = ([shapes[name] for name in names] + [None, None])[:3]
        if up[1] != width or (down and down[1] != up[0]) or (gate and gate != up):
            continue
        for activation in ACTIVATIONS:
            said = f"{op}, {activation}" + (f", gate {names[2]}" if names[2:] else "")
            candidates[said] = partial(_mlp, names=names, activation=activation)
    return _probe(module, 2 * torch.randn(64, width, device="cpu"), candidates)


def _mlp(
    module: nn.Module, x: Tensor, names: tuple[str, ...], activation: str, dropout: str = ""
) -> Tensor:
    """names: of the layers up, down and, if there is one, gate; or of the only one."""
    layers = [getattr(module, name) for name in names]
    if len(layers) == 1:
        return linear(layers[0], x, activation)
    up, down, *gate = layers
    drops = getattr(module, dropout) if dropout else IDLE
    return feed_forward(x, up, down, activation, drops, *gate)
