"""Trains a small GPT-2 or LLaMA on the characters of English prose, and lets it write.

    python examples/characters.py --model llama --plot loss.png

The prose is the standard library's own help. Prints how long a training step takes on reference
ops and on fused ones, the held-out loss, and text. Needs rich and tokenizers; --plot needs
matplotlib.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import common
import torch
from torch import Tensor

from fastattn.models.generation import stream
from fastattn.models.gpt2 import GPT2, GPT2Config
from fastattn.models.llama import Llama, LlamaConfig
from fastattn.models.parts import CausalLM

BATCH, LENGTH = 16, 128


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
    return model.loss(model.states(rows[:, :-1]), rows[:, 1:])


def draw(text: Tensor) -> Tensor:
    """Random pieces [BATCH, LENGTH + 1] of a text [N]."""
    starts = torch.randint(len(text) - LENGTH, (BATCH,))
    return text[starts[:, None] + torch.arange(LENGTH + 1)]


def main(arguments: Sequence[str] | None = None) -> float:
    """Runs the example; returns the held-out loss."""
    parser = common.parser(__doc__, steps=300, width=128)
    parser.add_argument("--model", choices=("gpt2", "llama"), default="gpt2")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    parts = ["".join(texts) for texts in common.split(common.prose())]
    characters = sorted(set("".join(parts)))
    number = {character: i for i, character in enumerate(characters)}
    text, unseen = (torch.tensor([number[character] for character in part]) for part in parts)
    model = build(options.model, len(characters), options.width)
    rows = draw(text)
    common.compare_training(model, lambda: loss_of(model, rows), options.repeats)
    losses = common.train(model, lambda _: loss_of(model, draw(text)), options.steps, rate=2e-3)
    with torch.no_grad():
        held_out = loss_of(model, unseen.unfold(0, LENGTH + 1, LENGTH)[:64]).item()
    print(f"held out: {held_out:.3f} nats per character")
    common.plot(losses, held_out, "character", options.plot)
    prompt = "The statement "
    print(prompt, end="")
    ids = torch.tensor([[number[character] for character in prompt]])
    for token in stream(model, ids, max_new_tokens=LENGTH, temperature=0.7, top_p=0.95):
        print(characters[token.item()], end="", flush=True)
    print()
    return held_out


if __name__ == "__main__":
    main(sys.argv[1:])
