"""Trains a small GPT-2 or LLaMA on the characters of English prose, and lets it write.

    python examples/characters.py --model llama --plot loss.png

The prose is the standard library's own help, `pydoc_data.topics`. Prints how long a training step
takes on eager PyTorch and on fused ops, the held-out loss, and text. Needs rich; --plot needs
matplotlib.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from fastattn.models.generation import stream
from fastattn.models.gpt2 import GPT2, GPT2Config
from fastattn.models.llama import Llama, LlamaConfig
from fastattn.models.parts import CausalLM

BATCH, LENGTH = 16, 128


def prose() -> str:
    """The help topics, one behind the other."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def build(kind: str, vocab: int, width: int) -> CausalLM:
    """Four layers of 32-wide heads."""
    heads = max(1, width // 32)
    if kind == "gpt2":
        sizes = {"n_layer": 4, "n_head": heads, "n_embd": width, "n_positions": 2 * LENGTH}
        return GPT2(GPT2Config(vocab_size=vocab, eos_token_id=None, **sizes))
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": heads, "max_position_embeddings": 2 * LENGTH}
    return Llama(LlamaConfig(vocab_size=vocab, eos_token_id=None, **sizes))


def loss_of(model: CausalLM, rows: Tensor) -> Tensor:
    """Of predicting all but the first of the characters [B, LENGTH + 1], in nats."""
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def step(model: CausalLM, optimizer: torch.optim.Optimizer, rows: Tensor) -> float:
    """One step of training; returns the loss before it."""
    optimizer.zero_grad()
    loss = loss_of(model, rows)
    loss.backward()
    optimizer.step()
    return loss.item()


def compare(model: CausalLM, rows: Tensor, repeats: int) -> None:
    """Prints the time of a training step on either ops."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    times: dict[str, list[float]] = {"reference": [], "fused": []}
    for _ in range(repeats + 1):
        for model.kernels, found in times.items():
            start = time.perf_counter()
            step(model, optimizer, rows)
            found.append(1e3 * (time.perf_counter() - start))
    eager, fused = (statistics.median(found[1:]) for found in times.values())
    print(f"a training step: {eager:.1f} ms on eager PyTorch, {fused:.1f} ms on fused ops")


def train(model: CausalLM, text: Tensor, steps: int) -> list[float]:
    """The losses of `steps` steps on random pieces of text."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps + 1)
    losses = []
    with Progress() as progress:
        task = progress.add_task("training", total=steps)
        for _ in range(steps):
            starts = torch.randint(len(text) - LENGTH, (BATCH,))
            rows = text[starts[:, None] + torch.arange(LENGTH + 1)]
            losses.append(step(model, optimizer, rows))
            schedule.step()
            progress.update(task, advance=1, description=f"loss {losses[-1]:.2f}")
    return losses


def plot(losses: list[float], held_out: float, path: str) -> None:
    """Draws the curve of training and the held-out loss."""
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.plot(losses, label="training")
    axes.axhline(held_out, color="black", linestyle="--", label="held out")
    axes.set(xlabel="step", ylabel="nats per character")
    axes.legend()
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> float:
    """Runs the example; returns the held-out loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("gpt2", "llama"), default="gpt2")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--plot", help="where to save the curve of the loss")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    text = prose()
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    tokens = torch.tensor([number[character] for character in text])
    cut = len(tokens) * 9 // 10
    model = build(options.model, len(characters), options.width)
    compare(model.train(), tokens[: BATCH * (LENGTH + 1)].view(BATCH, -1), repeats=5)
    losses = train(model, tokens[:cut], options.steps)
    model.eval()
    with torch.no_grad():
        rows = tokens[cut:].unfold(0, LENGTH + 1, LENGTH)[:64]
        held_out = loss_of(model, rows).item()
    print(f"held out: {held_out:.3f} nats per character")
    if options.plot:
        plot(losses, held_out, options.plot)
    prompt = "The statement "
    print(prompt, end="")
    ids = torch.tensor([[number[character] for character in prompt]])
    for token in stream(model, ids, max_new_tokens=LENGTH, temperature=0.7, top_p=0.95):
        print(characters[token.item()], end="", flush=True)
    print()
    return held_out


if __name__ == "__main__":
    main(sys.argv[1:])
