"""Trains a small encoder-decoder to translate the messages of programs from English to German.

    python examples/translation.py --plot loss.png

The pairs of sentences are those of the gettext catalogues on this machine. Prints how long a
training step takes on reference ops and on fused ones, the held-out loss beside that of a guess by
frequency, and translations of held-out messages. Needs rich and tokenizers; --plot needs
matplotlib.
"""

from __future__ import annotations

import gettext
import sys
from collections.abc import Sequence
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from fastattn.models.generation import generate
from fastattn.models.transformer import Transformer, TransformerConfig

BATCH, LONGEST = 32, 48  # pieces of a sentence
PAD, BEGIN, END = range(3)
VOCAB = 2048
FOLDER = Path("/usr/share/locale")
GET_CATALOGUES = """\
no German gettext catalogues with enough messages under {}: apt-get install gcc-12-locales (or \
another package that brings some), or name a folder of .mo files with --catalogues"""


def catalogue(path: Path) -> dict[str, str]:
    """The messages of a .mo file, English -> German; none if it cannot be read."""
    with path.open("rb") as file:
        try:
            found = gettext.GNUTranslations(file)._catalog
        except (OSError, UnicodeDecodeError):
            return {}
    return {source: target for source, target in found.items() if isinstance(source, str)}


def messages(folder: Path) -> list[tuple[str, str]]:
    """Pairs of sentences, each English one once, in an order of no meaning.

    Raises SystemExit, saying how to get some, where there are fewer than a hundred.
    """
    paths = sorted(folder.glob("de/LC_MESSAGES/*.mo")) or sorted(folder.glob("*.mo"))
    found: dict[str, str] = {}
    for path in paths:
        if not path.name.startswith("iso_"):  # names of languages and countries
            found = catalogue(path) | found
    pairs = sorted(
        (" ".join(source.split()), " ".join(target.split()))
        for source, target in found.items()
        if 3 <= len(source.split()) <= 20 and target != source
    )
    if len(pairs) < 100:
        raise SystemExit(GET_CATALOGUES.format(folder))
    return [pairs[i] for i in torch.randperm(len(pairs)).tolist()]


def padded(rows: list[list[int]]) -> Tensor:
    """[B, S] of sentences of unequal length."""
    tensors = [torch.tensor(row[:LONGEST]) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=PAD)


def encode(tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """The pieces [N, S] and [N, T] of the sentences, each with its end."""
    sides = zip(*pairs, strict=True)
    return tuple(
        padded([[*text.ids[: LONGEST - 1], END] for text in tokenizer.encode_batch(side)])
        for side in sides
    )


def batch(sentences: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """These rows, no longer than they need be."""
    found = (side[rows] for side in sentences)
    return tuple(side[:, : (side != PAD).sum(1).max()] for side in found)


def loss_of(model: Transformer, source: Tensor, target: Tensor) -> Tensor:
    """In nats per piece of the German sentences."""
    before = F.pad(target[:, :-1], (1, 0), value=BEGIN)
    states = model.states(before, model.remember(source, source != PAD))
    return model.loss(states, target, ignore_index=PAD)


def main(arguments: Sequence[str] | None = None) -> float:
    """Runs the example; returns the held-out loss."""
    parser = common.parser(__doc__, steps=250, width=128)
    parser.add_argument(
        "--catalogues",
        type=Path,
        default=FOLDER,
        metavar="FOLDER",
        help="of .mo files, or of de/LC_MESSAGES/*.mo (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    known, unseen = common.split(messages(options.catalogues))
    special = ["<pad>", "<s>", "</s>"]
    tokenizer = common.pieces((text for pair in known for text in pair), VOCAB, special)
    train, test = (encode(tokenizer, pairs) for pairs in (known, unseen))
    print(f"{len(known)} pairs to learn from, {len(unseen)} held out")
    sizes = {"d_model": options.width, "max_position_embeddings": LONGEST}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 3, f"{side}_attention_heads": max(1, options.width // 32)}
        sizes[f"{side}_ffn_dim"] = 4 * options.width
    tokens = {"pad_token_id": PAD, "decoder_start_token_id": BEGIN, "eos_token_id": END}
    config = TransformerConfig(vocab_size=VOCAB, pre_norm=True, dropout=0.0, **sizes, **tokens)
    model = Transformer(config)
    first = batch(train, torch.arange(BATCH) % len(known))
    common.compare_training(model, lambda: loss_of(model, *first), options.repeats)

    def loss(_: int) -> Tensor:
        return loss_of(model, *batch(train, torch.randint(len(known), (BATCH,))))

    losses = common.train(model, loss, options.steps, rate=3e-3)
    with torch.no_grad():
        held_out = loss_of(model, *(side[:256] for side in test)).item()
    counts = train[1].flatten().bincount(minlength=VOCAB) + 1
    counts[PAD] = 0
    shares = counts / counts.sum()
    by_frequency = -shares[test[1][test[1] != PAD]].log().mean().item()
    print(f"held out: {held_out:.3f} nats per piece, by their frequency {by_frequency:.3f}")
    common.plot(losses, held_out, "piece", options.plot)
    source, _ = batch(test, torch.arange(min(4, len(unseen))))
    found = generate(model, source, source != PAD, num_beams=3, max_new_tokens=LONGEST - 1)
    for (english, german), ids in zip(unseen, found.tolist(), strict=False):
        print(f"{english}\n  people: {german}\n  model:  {tokenizer.decode(ids)}")
    return held_out


if __name__ == "__main__":
    main(sys.argv[1:])
