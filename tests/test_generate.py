"""Generated tokens against transformers and against the models without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_models_lm import ALL, KINDS, Kind, rows
from torch import Tensor, nn

from fastattn import models
from fastattn.models import generation
from fastattn.models.generation import generate, stream
from fastattn.models.kv_cache import Cache
from fastattn.models.transformer import Transformer

pytestmark = pytest.mark.usefixtures("one_thread")

PAD, EOS, NEW = 1, 2, 8
LAST = ("fc2.weight", "out_proj.weight", "wo.weight", ".o.weight", "c_proj.weight")
PROMPTS = (11, 5, 1, 8)


def lively(model: nn.Module) -> nn.Module:
    """With layers that outweigh the residual stream, for else a tied head repeats its input."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(LAST):
                parameter.mul_(12)
    return model


def pair(transformers: Any, kind: Kind) -> tuple[models.LanguageModel, nn.Module]:
    theirs = lively(kind.build_theirs(transformers))
    return kind.build_like(theirs), theirs


def expected(theirs: nn.Module, kind: Kind, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """What transformers' generate adds to the prompts, padded to NEW tokens."""
    start = {"decoder_start_token_id": 2 if "encoder_layers" in kind.sizes else 0}
    settings = {"pad_token_id": PAD, "eos_token_id": EOS, "do_sample": False, "max_new_tokens": NEW}
    settings |= start if kind.seq2seq else {}
    theirs.generation_config = type(theirs.generation_config)()  # BART's would force tokens
    out = theirs.generate(input_ids=ids, attention_mask=mask, **settings | options)
    out = out[:, 1 if kind.seq2seq else ids.shape[1] :]
    return nn.functional.pad(out, (0, NEW - out.shape[1]), value=PAD)


def found(model: models.LanguageModel, ids: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    settings = {"pad_token_id": PAD, "eos_token_id": EOS, "max_new_tokens": NEW}
    out = generate(model, ids, mask, **settings | options)
    return nn.functional.pad(out, (0, NEW - out.shape[1]), value=PAD)


# against transformers


@ALL
def test_greedy_is_that_of_transformers(transformers: Any, kind: Kind) -> None:
    ours, theirs = pair(transformers, kind)
    ids, mask = rows(PROMPTS, left=True)
    wanted = expected(theirs, kind, ids, mask)
    assert wanted.unique(dim=0).shape[0] > 1
    for kernels in models.KERNELS:
        ours.kernels = kernels
        assert torch.equal(found(ours, ids, mask), wanted)


@ALL
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "length_penalty": 0.0, "early_stopping": "never"},
        {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 3, "length_penalty": -1.0, "eos_token_id": list(range(2, 40))},
        {"num_beams": 3, "length_penalty": 1.5, "eos_token_id": [5, 9], "early_stopping": "never"},
    ],
    ids=["default", "never", "early", "many_ends", "long"],
)
def test_beam_search_is_that_of_transformers(
    transformers: Any, kind: Kind, options: dict[str, Any]
) -> None:
    ours, theirs = pair(transformers, kind)
    ids, mask = rows(PROMPTS, left=True)
    wanted = expected(theirs, kind, ids, mask, **options)
    assert torch.equal(found(ours, ids, mask, **options), wanted)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.9}, {"top_p": 1}],
)
def test_what_may_be_drawn_is_that_of_transformers(
    transformers: Any, options: dict[str, Any]
) -> None:
    options = {"temperature": 1.0, "top_k": None, "top_p": None} | options
    logits = 3 * torch.randn(7, 101)
    warpers = transformers.LogitsProcessorList()
    warpers.append(transformers.TemperatureLogitsWarper(options["temperature"]))
    if options["top_k"] is not None:
        warpers.append(transformers.TopKLogitsWarper(options["top_k"]))
    if options["top_p"] is not None:
        warpers.append(transformers.TopPLogitsWarper(float(options["top_p"])))
    torch.testing.assert_close(generation._filtered(logits, **options), warpers(None, logits))


# against the model without a cache


@ALL
def test_prompts_of_a_batch_do_not_meet(kind: Kind) -> None:
    model = lively(kind.build())
    # an encoder with absolute positions begins to count at the padding
    for left in (False,) if kind.ours is Transformer else (False, True):
        ids, mask = rows(PROMPTS, left)
        together = found(model, ids, mask)
        for row in range(len(PROMPTS)):
            alone = found(model, ids[row : row + 1, mask[row].bool()], None)
            assert torch.equal(together[row : row + 1], alone)


@ALL
def test_every_token_is_the_likeliest(kind: Kind) -> None:
    model = lively(kind.build())
    ids, _ = rows((6, 6))
    tokens = found(model, ids, None, eos_token_id=())
    with torch.no_grad():
        if kind.seq2seq:
            start = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
            logits = model(ids, torch.cat([start, tokens[:, :-1]], 1))
        else:
            logits = model(torch.cat([ids, tokens[:, :-1]], 1))[:, ids.shape[1] - 1 :]
    assert torch.equal(logits.argmax(-1), tokens)


def test_a_decoder_may_begin_with_more() -> None:
    for name in ("t5", "bart"):
        model = KINDS[name].build()
        ids, mask = rows((6, 3))
        whole = found(model, ids, mask, eos_token_id=())
        start = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
        begun = torch.cat([start, whole[:, :3]], 1)
        rest = found(model, ids, mask, eos_token_id=(), decoder_input_ids=begun, max_new_tokens=5)
        assert torch.equal(rest[:, :5], whole[:, 3:])


@ALL
def test_a_prompt_may_come_in_pieces(kind: Kind) -> None:
    ids, _ = rows((9, 9))
    model = kind.build()
    cache = Cache(model, 2, 12)
    with torch.no_grad():
        memory = [model.remember(*rows((6, 3)))] if kind.seq2seq else []
        whole = model.states(ids, *memory)
        pieces = [model.states(x, *memory, cache=cache) for x in ids.split([4, 1, 3, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == [9, 9]


@ALL
def test_generates_under_autocast(kind: Kind) -> None:
    model = kind.build()
    ids, mask = rows(PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        for kernels in models.KERNELS:
            model.kernels = kernels
            tokens = found(model, ids, mask, eos_token_id=())
            assert tokens.shape == (len(PROMPTS), NEW)


def test_more_beams_than_there_are_tokens() -> None:
    model = KINDS["gpt2"].build(vocab_size=3)
    ids = torch.zeros(1, 2, dtype=torch.long)
    assert found(model, ids, None, num_beams=5, eos_token_id=[0, 1, 2]).shape == (1, NEW)


# streams and draws


def test_a_stream_ends_with_its_rows() -> None:
    model = KINDS["gpt2"].build()
    ids, mask = rows(PROMPTS)
    whole = generate(model, ids, mask, max_new_tokens=NEW, eos_token_id=())
    ends = whole[:, 2].tolist()  # every row ends with its third token, if not before
    tokens = list(stream(model, ids, mask, max_new_tokens=NEW, eos_token_id=ends, pad_token_id=0))
    assert len(tokens) <= 3 and all(t.shape == (len(PROMPTS),) for t in tokens)
    for row, cut in zip(torch.stack(tokens, 1), whole, strict=True):
        end = next(i for i, token in enumerate(cut.tolist()) if token in ends) + 1
        assert torch.equal(row[:end], cut[:end]) and not row[end:].any()
    assert torch.is_grad_enabled()
    partial = stream(model, ids, mask, max_new_tokens=NEW)
    next(partial)
    assert torch.is_grad_enabled()


def test_draws_follow_their_generator_and_the_probabilities() -> None:
    model = KINDS["llama"].build()
    ids, _ = rows((4,))

    def draw(seed: int, **options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return found(
            model, ids.expand(64, -1), None, temperature=1.0, generator=generator, **options
        )

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    greedy = found(model, ids.expand(64, -1), None)
    assert torch.equal(draw(1, top_k=1), greedy)
    assert torch.equal(draw(1, top_p=1e-6), greedy)
    with torch.no_grad():
        likely = model(ids)[0, -1].softmax(-1)
    counts = draw(3, max_new_tokens=1)[:, 0].bincount(minlength=len(likely)) / 64
    assert (counts - likely).abs().sum() < 1.0  # two independent distributions come to near 2


# what is refused


def test_refusals() -> None:
    model, seq2seq = KINDS["gpt2"].build(), KINDS["bart"].build()
    ids, mask = rows((5, 3))
    for error, message, options in (
        (ValueError, "max_new_tokens must be at least 1, got 0", {"max_new_tokens": 0}),
        (TypeError, "max_new_tokens must be an int, got float", {"max_new_tokens": 2.5}),
        (ValueError, "temperature must be at least 0, got -1", {"temperature": -1}),
        (ValueError, "top_k must be at least 1, got 0", {"top_k": 0, "temperature": 1.0}),
        (ValueError, r"top_p must be in \(0, 1\], got 0", {"top_p": 0.0, "temperature": 1.0}),
        (ValueError, "top_k needs a temperature above 0, got 3", {"top_k": 3}),
        (ValueError, "top_p needs a temperature above 0", {"top_p": 0.5}),
        (ValueError, "generator needs a temperature", {"generator": torch.Generator()}),
        (ValueError, "num_beams must be at least 1, got 0", {"num_beams": 0}),
        (TypeError, "num_beams must be an int, got bool", {"num_beams": True}),
        (ValueError, "num_beams must be more than 1 for", {"length_penalty": 2.0}),
        (ValueError, "temperature must be 0 for beam", {"num_beams": 2, "temperature": 1.0}),
        (ValueError, 'early_stopping must be a bool or "never"', {"early_stopping": "soon"}),
        (ValueError, "decoder_input_ids must be None", {"decoder_input_ids": ids}),
        (ValueError, "prompts of up to 5 take 25, got .* 24", {"max_new_tokens": 21}),
    ):
        with pytest.raises(error, match=message):
            generate(model, ids, mask, **options)
    for other, message in (
        (torch.zeros_like(mask), r"a token in every row.*\[0, 0\]"),
        (1 - mask, r"a token in every row.*\(2, 5\).*\[0, 2\]"),  # the wrong way round
        (mask[:, 1:], r"attention_mask must be .*\(2, 5\), got .*\(2, 4\)"),
        (mask.float().log(), r"attention_mask must be bool or integer.*float32"),
    ):
        for each in (model, seq2seq):
            with pytest.raises(ValueError, match=message):
                stream(each, ids, other)
    for empty in (ids[:, :0], ids[:0]):
        with pytest.raises(ValueError, match="input_ids must have a token in every row"):
            generate(model, empty)
    with pytest.raises(TypeError, match=r"input_ids must be int64 or int32, got torch\.float32"):
        generate(model, ids.float())
    with pytest.raises(TypeError, match=r"input_ids must be a torch\.Tensor, got list"):
        generate(model, [1, 2])
    with pytest.raises(ValueError, match=r"take 44, got a model with 24"):
        generate(model, ids.repeat(1, 5))
    with pytest.raises(ValueError, match=r"input_ids must have .*S <= 24, got \(2, 25\)"):
        generate(seq2seq, ids.repeat(1, 5))
    with pytest.raises(ValueError, match=r"decoder_input_ids must be \(2, T\) with T > 0"):
        generate(seq2seq, ids, decoder_input_ids=ids[:1])
    with pytest.raises(ValueError, match="model must be in eval mode"):
        stream(model.train(), ids)


def test_caches_that_do_not_fit() -> None:
    model = KINDS["gpt2"].build()
    ids, mask = rows((5, 3))
    with pytest.raises(ValueError, match="at most the model's 24 positions, got 25"):
        Cache(model, 2, 25)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        Cache(KINDS["t5"].build(), 2, 0)
    with pytest.raises(ValueError, match=r"call the model under torch\.no_grad\(\)"):
        model(ids, cache=Cache(model, 2, 9))
    with torch.no_grad():
        with pytest.raises(ValueError, match="room for 5 tokens, got one for 4"):
            model(ids, cache=Cache(model, 2, 4))
        with pytest.raises(ValueError, match="the cache's 3 rows, got 2"):
            model(ids, cache=Cache(model, 3, 9))
        with pytest.raises(ValueError, match="padding behind the tokens"):
            model(ids, mask.flip(1), cache=Cache(model, 2, 9))
        cache = Cache(model, 2, 7)
        model(ids, mask, cache=cache)
        assert cache.lengths.tolist() == [5, 3]
        with pytest.raises(ValueError, match=r"\(B, 1\) after prompts of unequal lengths"):
            model(ids[:, :2], cache=cache)
        for _ in range(2):
            model(ids[:, :1], cache=cache)
        with pytest.raises(ValueError, match="room for 8 tokens, got one for 7"):
            model(ids[:, :1], cache=cache)
        t5 = KINDS["t5"].build()
        cache = Cache(t5, 2, 9)
        memory = t5.remember(ids, mask)
        t5.states(ids, memory, mask, cache=cache)
        with pytest.raises(ValueError, match="rows of one length for a model with a position"):
            t5.states(ids[:, :1], memory, cache=cache)
        with pytest.raises(ValueError, match=r"eval mode.*call \.eval\(\)"):
            model.train()(ids, cache=Cache(model, 2, 9))
