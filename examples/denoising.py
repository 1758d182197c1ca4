"""Trains a small T5 to restore what is cut out of English prose, and lets it restore.

    python examples/denoising.py --plot loss.png

The prose is the standard library's own help. Prints how long a training step takes on reference
ops and on fused ones, the held-out loss beside that of a guess by frequency, and what it restores.
Needs rich and tokenizers; --plot needs matplotlib.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.models.generation import generate
from fastattn.models.t5 import T5, T5Config

BATCH, LENGTH = 16, 120
# Half of a row is cut out, in long spans (arXiv:2205.05131): in a minute a model learns to write on
# sooner than to look back at what stands around a gap.
SPANS, CUT = 3, 60
SPECIAL = ["<pad>", "</s>", *(f"<extra_id_{i}>" for i in range(SPANS + 1))]
EOS, SENTINEL = 1, 2  # the first of those that stand for a span
VOCAB = 1024


def lengths(total: int) -> list[int]:
    """SPANS random lengths of at least 1 that add up to `total`."""
    ends = 1 + torch.randperm(total - 1)[: SPANS - 1].sort().values
    return ends.diff(prepend=torch.tensor([0]), append=torch.tensor([total])).tolist()


def corrupt(row: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of a row [LENGTH], a sentinel in place of each span, and the spans.

    Each span stands behind its sentinel.
    """
    read, wanted = [], []
    start = 0
    for i, (kept, cut) in enumerate(zip(lengths(LENGTH - CUT), lengths(CUT), strict=True)):
        sentinel = torch.tensor([SENTINEL + i])
        read += [row[start : start + kept], sentinel]
        wanted += [sentinel, row[start + kept : start + kept + cut]]
        start += kept + cut
    return torch.cat([*read, torch.tensor([EOS])]), torch.cat([*wanted, torch.tensor([EOS])])


def draw(text: Tensor) -> tuple[Tensor, Tensor]:
    """BATCH corrupted parts of a text [N]: [BATCH, S] to read and [BATCH, T] to write."""
    starts = torch.randint(len(text) - LENGTH, (BATCH,)).tolist()
    rows = [corrupt(text[start : start + LENGTH]) for start in starts]
    read, wanted = zip(*rows, strict=True)
    return torch.stack(read), torch.stack(wanted)


def loss_of(model: T5, read: Tensor, wanted: Tensor) -> Tensor:
    """In nats per piece that is to be written."""
    before = F.pad(wanted[:, :-1], (1, 0), value=model.config.decoder_start_token_id)
    return model.loss(model.states(before, model.remember(read)), wanted)


def main(arguments: Sequence[str] | None = None) -> float:
    """Runs the example; returns the held-out loss."""
    options = common.parser(__doc__, steps=300, width=128).parse_args(arguments)
    torch.manual_seed(0)
    parts = common.split(common.prose())
    tokenizer = common.pieces(parts[0], VOCAB, SPECIAL)
    text, unseen = (common.running(tokenizer, part) for part in parts)
    sizes = {"d_model": options.width, "d_kv": 32, "d_ff": 4 * options.width, "num_layers": 2}
    sizes |= {"num_heads": max(1, options.width // 32), "feed_forward_proj": "gated-gelu"}
    sizes |= {"initializer_factor": 0.5, "dropout_rate": 0.0}  # few steps, no piece seen twice
    model = T5(T5Config(vocab_size=VOCAB, eos_token_id=EOS, **sizes))
    batch = draw(text)
    common.compare_training(model, lambda: loss_of(model, *batch), options.repeats)
    losses = common.train(model, lambda _: loss_of(model, *draw(text)), options.steps, rate=5e-3)
    batches = [draw(unseen) for _ in range(8)]
    with torch.no_grad():
        held_out = sum(loss_of(model, *batch).item() for batch in batches) / len(batches)
    counts = sum(draw(text)[1].flatten().bincount(minlength=VOCAB) for _ in range(64)) + 1
    wanted = torch.cat([wanted.flatten() for _, wanted in batches])
    by_frequency = -(counts / counts.sum()).log()[wanted].mean().item()
    print(f"held out: {held_out:.3f} nats per piece, by their frequency {by_frequency:.3f}")
    common.plot(losses, held_out, "piece", options.plot)
    read, wanted = batches[0]
    found = generate(model, read[:1], max_new_tokens=2 * CUT, temperature=0.8, top_p=0.9)
    for name, ids in {"read": read[0], "cut out": wanted[0], "restored": found[0]}.items():
        words = tokenizer.decode(ids.tolist(), skip_special_tokens=False).split()
        print(f"{name}: {' '.join(words)}")
    return held_out


if __name__ == "__main__":
    main(sys.argv[1:])
