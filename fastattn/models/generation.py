"""Generating text: the likeliest tokens, drawn ones, beam search, streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import checks, models
from fastattn.models import kv_cache, parts


@torch.no_grad()
def generate(
    model: models.LanguageModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    **options: Any,
) -> Tensor:
    """The tokens that follow prompts, or that a decoder makes of an encoder's input.

    Args:
        num_beams: for more than 1, beam search: the most likely of the sequences among which in
            each step that many are kept.
        length_penalty: divides a finished sequence's log-likelihood by this power of its length.
        early_stopping: when a row is done. True: num_beams of its sequences have ended. False: the
            running ones, scored at their length, are no better than the worst of these. "never":
            scored at any length.
        input_ids, attention_mask and the options are `stream`'s; beam search does not sample.

    Returns:
        [B, T] with T at most max_new_tokens: the new tokens, without the prompts, and padding
        behind the token that ends a row.

    Raises:
        TypeError, ValueError: as `stream`.
    """
    if isinstance(num_beams, bool) or not isinstance(num_beams, int):
        raise TypeError(f"num_beams must be an int, got {type(num_beams).__name__}")
    if num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, got {num_beams}")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f'early_stopping must be a bool or "never", got {early_stopping!r}')
    if num_beams == 1:
        if length_penalty != 1.0 or early_stopping:
            got = {"length_penalty": length_penalty, "early_stopping": early_stopping}
            raise ValueError(f"num_beams must be more than 1 for {got}, got 1")
        return torch.stack(list(stream(model, input_ids, attention_mask, **options)), 1)
    call = _Call(model, input_ids, attention_mask, **options)
    if call.temperature:
        raise ValueError(f"temperature must be 0 for beam search, got {call.temperature}")
    return _beam_search(call, num_beams, length_penalty, early_stopping)


def stream(
    model: models.LanguageModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """`generate` one token [B] of every row at a time, without beams, until all rows have ended.

    Args:
        input_ids: (B, S) integers, prompts, or what the encoder of a Seq2SeqLM reads.
        attention_mask: (B, S) bool or integer, 1 at tokens and 0 at padding, which may stand
            anywhere; None: no padding.
        max_new_tokens: how many to make at most, 20 unless given.
        temperature: 0, the default, takes the likeliest token; else one is drawn, with logits
            divided by this.
        top_k: draw from this many of the likeliest only.
        top_p: draw from the fewest likeliest that have this probability together (Holtzman et al.
            2020, arXiv:1904.09751).
        eos_token_id: the token or the tokens that end a row; None: the config's; (): none.
        pad_token_id: what follows them; None: the first of them.
        decoder_input_ids: (B, T), what the decoder of a Seq2SeqLM begins with; None: the config's
            decoder_start_token_id.
        generator: what to draw with; torch's own if None.

    Raises:
        TypeError, ValueError: an argument does not fit, a row has no tokens, the model is in
        training mode or has fewer positions than that takes. All is raised by the call itself.
    """
    return _stream(_Call(model, input_ids, attention_mask, **options))


def _stream(call: _Call) -> Iterator[Tensor]:
    tokens, ended = None, torch.zeros_like(call.last, dtype=torch.bool)
    for _ in range(call.max_new_tokens):
        with torch.no_grad():  # not around a yield, where it would reach the caller
            logits = call.first() if tokens is None else call.next(tokens)
            tokens = call.pick(logits).masked_fill(ended, call.pad)
            ended |= torch.isin(tokens, call.eos)
        yield tokens
        if ended.all():
            return


class _Call:
    """The checked arguments of one call, and the model with its cache."""

    def __init__(
        self,
        model: models.LanguageModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        max_new_tokens: int = 20,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        decoder_input_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        checks.tensor("input_ids", input_ids)
        if model.training:
            raise ValueError("model must be in eval mode, got one in training: call .eval()")
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
            raise TypeError(f"max_new_tokens must be an int, got {type(max_new_tokens).__name__}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        drawing = {"top_k": top_k, "top_p": top_p, "generator": generator}
        for name, value in drawing.items():
            if value is not None and not temperature:
                raise ValueError(f"{name} needs a temperature above 0, got {value}")
        self.model, self.max_new_tokens = model, max_new_tokens
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.generator = generator
        eos = model.config.eos_token_id if eos_token_id is None else eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        self.eos = torch.tensor(eos, dtype=torch.int64, device=input_ids.device)
        self.pad = pad_token_id if pad_token_id is not None else eos[0] if eos else 0
        self._begin(input_ids, attention_mask, decoder_input_ids)

    def _begin(
        self, input_ids: Tensor, attention_mask: Tensor | None, decoder_input_ids: Tensor | None
    ) -> None:
        model, mask = self.model, parts.visible(input_ids, attention_mask, None)
        if mask is None:
            mask = torch.ones_like(input_ids, dtype=torch.bool)
        if not mask.any(1).all() or not len(mask):
            raise ValueError(
                "input_ids must have a token in every row, got an empty one: the shape is "
                f"{tuple(input_ids.shape)} and attention_mask counts {mask.sum(1).tolist()} tokens"
            )
        self.memory = []
        if isinstance(model, parts.Seq2SeqLM):
            with torch.no_grad():
                self.memory = [model.remember(input_ids, None if mask.all() else mask)]
            if decoder_input_ids is None:
                start = model.config.decoder_start_token_id
                decoder_input_ids = torch.full_like(input_ids[:, :1], start)
            batch = (len(input_ids), max(1, decoder_input_ids.shape[-1]))
            if tuple(decoder_input_ids.shape) != batch:
                raise ValueError(
                    f"decoder_input_ids must be ({batch[0]}, T) with T > 0, "
                    f"got {tuple(decoder_input_ids.shape)}"
                )
            input_ids, mask = decoder_input_ids, torch.ones_like(decoder_input_ids).bool()
        elif decoder_input_ids is not None:
            raise ValueError("decoder_input_ids must be None for a model without an encoder")
        lengths = mask.sum(1)  # [B]
        longest = int(lengths.max())
        order = mask.byte().argsort(dim=1, descending=True, stable=True)  # tokens, then padding
        self.prompts = input_ids.gather(1, order)[:, :longest]
        places = torch.arange(longest, device=lengths.device)
        self.mask = None if (lengths == longest).all() else places < lengths[:, None]
        self.last = lengths - 1
        room, positions = longest + self.max_new_tokens - 1, model.cache_shape.positions
        if positions is not None and room > positions:
            raise ValueError(
                f"input_ids must leave positions for {self.max_new_tokens} new tokens: prompts of "
                f"up to {longest} take {room}, got a model with {positions}"
            )
        self.cache = kv_cache.Cache(model, len(lengths), room)

    def first(self) -> Tensor:
        """The logits [B, vocab_size] behind the prompts."""
        states = self.model.states(self.prompts, *self.memory, self.mask, cache=self.cache)
        rows = torch.arange(len(states), device=states.device)
        return self.model.logits(states[rows, self.last])

    def next(self, tokens: Tensor) -> Tensor:
        """The logits [B, vocab_size] behind one more token [B] of each row."""
        states = self.model.states(tokens[:, None], *self.memory, cache=self.cache)
        return self.model.logits(states[:, 0])

    def repeat(self, count: int) -> None:
        """Go on with every row `count` times, one behind the other."""
        rows = torch.arange(len(self.last), device=self.last.device).repeat_interleave(count)
        self.cache.select(rows)
        self.memory = [memory.rows(rows) for memory in self.memory]

    def pick(self, logits: Tensor) -> Tensor:
        """One token [B] of logits [B, vocab_size]."""
        if not self.temperature:
            return logits.argmax(-1)
        probabilities = _filtered(logits, self.temperature, self.top_k, self.top_p).softmax(-1)
        return probabilities.multinomial(1, generator=self.generator)[:, 0]


def _filtered(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits in fp32, with -inf for what is not to be drawn."""
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        rising, order = logits.sort()
        tail = rising.softmax(-1).cumsum(-1) <= 1 - top_p  # the unlikeliest, 1 - top_p together
        tail[:, -1] = False
        logits = logits.masked_fill(tail.scatter(1, order, tail), -torch.inf)
    return logits


def _beam_search(
    call: _Call, beams: int, length_penalty: float, early_stopping: bool | str
) -> Tensor:
    """The best sequence [B, T] of each row, scored and ended as in transformers.

    Of each row `beams` sequences run on, and the `beams` best ended ones are kept.
    """
    never = -1e9  # the score of a sequence that is none
    logits = call.first()  # [B, vocab_size]
    batch, vocab = logits.shape
    rows = torch.arange(batch, device=logits.device)[:, None]  # [B, 1]
    call.repeat(beams)
    logits = logits.repeat_interleave(beams, 0)
    length = call.max_new_tokens
    running = torch.full((batch, beams, length), call.pad, device=logits.device)
    scores = logits.new_zeros(batch, beams, dtype=torch.float32)
    scores[:, 1:] = never  # the beams are still the same
    ended, ended_scores = running, torch.full_like(scores, never)
    is_ended = torch.zeros_like(scores, dtype=torch.bool)
    lengths = torch.zeros_like(scores, dtype=torch.int64)  # of the ended ones
    hopeful = torch.ones_like(is_ended[:, :1])
    shortest = int(call.last.min()) + 1  # of the prompts
    count = max(2, 1 + len(call.eos)) * beams  # so many that `beams` of them do not end
    count = min(count, vocab * beams)
    best = torch.arange(count, device=logits.device) < beams
    for i in range(length):
        if i:
            logits = call.next(running[:, :, i - 1].flatten())
        likely = logits.float().log_softmax(-1).unflatten(0, (batch, beams)) + scores[..., None]
        found, index = likely.flatten(1).topk(count)  # [B, count]
        origin, tokens = index // vocab, index % vocab
        grown = running[rows, origin]
        grown[:, :, i] = tokens
        ends = torch.isin(tokens, call.eos) | (i + 1 == length)

        scores, kept = (found + never * ends).topk(beams)
        running = grown[rows, kept]

        full = is_ended.all(1, keepdim=True) & (early_stopping is True)
        barred = full | ~hopeful | ~(ends & best)
        candidates = found / (i + 1) ** length_penalty + never * barred
        ended_scores, kept_ended = torch.cat([ended_scores, candidates], 1).topk(beams)
        ended = torch.cat([ended, grown], 1)[rows, kept_ended]
        is_ended = torch.cat([is_ended, ends & best], 1)[rows, kept_ended]
        lengths = F.pad(lengths, (0, count), value=i + 1)[rows, kept_ended]

        reach = length if early_stopping == "never" and length_penalty > 0 else i + 1
        worst = ended_scores.amin(1, keepdim=True).where(is_ended, never)
        hopeful = hopeful & (scores[:, :1] / reach**length_penalty > worst).any(1, keepdim=True)
        if not hopeful.any() or ends.all() or (early_stopping is True and is_ended.all()):
            break
        # the beams of a row have its prompt in common
        call.cache.select((rows * beams + origin[rows, kept]).flatten(), shortest)
    return ended[:, 0, : int(lengths[:, 0].max())]
