"""The models that write: GPT-2 and T5 with random weights, through fastattn and transformers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import models
from bench.kinds import Generation
from bench.work import SEED, UnavailableError, Work
from fastattn.models import LanguageModel, gpt2, kv_cache, t5

WIDER = 3.0  # times the usual initial weights: else no token attends to any other in particular


def build(case: Generation, *, compiled: bool = False) -> Work:
    """Make a case runnable: one set of weights in three models, which share its memory.

    Raises `UnavailableError` naming the package to install.
    """
    if why := models.missing({"transformers": "transformers"}):
        raise UnavailableError(why)
    models.quiet()
    torch.manual_seed(SEED)
    make, output, name, measures, alone = TASKS[case.task]
    made = make(case)
    ids = torch.randint(2, made["fused"].config.vocab_size, (case.batch, case.seq + 1))
    work = models.raced(
        case,
        made,
        output(case, ids),
        name,
        compiled=compiled,
        **measures(made["fused"], case),
    )
    if compiled and alone is not None and case.dtype == "float32":
        runtimes = models.exported(*alone(made["sdpa"], ids))
        work.calls.update({name: lambda run=run: (run(),) for name, run in runtimes.items()})
    return work


def share(ours: LanguageModel, theirs: nn.Module) -> dict[str, nn.Module]:
    """The models by provider, all with the weights of `theirs`, which is eager."""
    sdpa = copy.deepcopy(theirs)
    sdpa.set_attn_implementation("sdpa")
    for model in (sdpa, ours):
        model.load_state_dict(theirs.state_dict(), assign=True)
        model.tie_weights()
    return {"fused": ours, "eager": theirs, "sdpa": sdpa}


# GPT-2


def gpt2_models(case: Generation) -> dict[str, nn.Module]:
    """GPT-2 small."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = gpt2.SIZES["gpt2"] | {"initializer_range": WIDER * 0.02}
    with torch.device("meta"):
        ours = gpt2.GPT2(gpt2.GPT2Config(**sizes))
    config = GPT2Config(**sizes, attn_implementation="eager")
    theirs = GPT2LMHeadModel(config).to(getattr(torch, case.dtype))
    return share(ours, theirs)


def prefill(case: Generation, ids: Tensor) -> Callable[[nn.Module], Tensor]:
    """Reads a prompt, fills a cache with it and returns the logits [B, V] of the next token."""
    prompt = ids[:, :-1]

    def output(model: nn.Module) -> Tensor:
        if isinstance(model, gpt2.GPT2):
            cache = kv_cache.Cache(model, *prompt.shape)
            return model.logits(model.states(prompt, cache=cache)[:, -1])
        return model(input_ids=prompt, use_cache=True, logits_to_keep=1).logits[:, -1]

    return output


def decode(case: Generation, ids: Tensor) -> Callable[[nn.Module], Tensor]:
    """Adds a token to a cache of all others, and takes it away; the logits [B, V] after it."""
    prompt, token = ids[:, :-1], ids[:, -1:]
    length = prompt.shape[1]

    @functools.cache
    def filled(model: nn.Module) -> Any:
        if isinstance(model, gpt2.GPT2):
            cache = kv_cache.Cache(model, len(ids), length + 1)
            model.states(prompt, cache=cache)
            return cache
        return model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values

    def output(model: nn.Module) -> Tensor:
        cache = filled(getattr(model, "_orig_mod", model))
        if isinstance(model, gpt2.GPT2):
            lengths = cache.lengths
            logits = model.logits(model.states(token, cache=cache)[:, 0])
            cache.lengths, cache.longest = lengths, length
            return logits
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, 0]
        cache.crop(-1)
        return logits

    return output


class PromptAlone(nn.Module):
    """What runtimes for exported models are given: a prompt's logits, without a cache to fill."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Tokens [B, S] to the logits [B, V] of the next."""
        seen = torch.ones_like(input_ids)  # or transformers asks where packed sequences begin
        out = self.model(
            input_ids=input_ids, attention_mask=seen, use_cache=False, logits_to_keep=1
        )
        return out.logits[:, -1]


class TokenAlone(PromptAlone):
    """The same of a token, whose key and value join a cache that is not given back."""

    def forward(self, input_ids: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """A token [B, 1] and a cache, each [layers, B, H, S, D], to the logits [B, V]."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache = DynamicCache()
        for key, value in zip(keys, values, strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
            cache.layers.append(layer)
        return self.model(input_ids=input_ids, past_key_values=cache).logits[:, 0]


def prompt_alone(model: nn.Module, ids: Tensor) -> tuple[nn.Module, dict[str, Tensor]]:
    """What is exported of prefill, and what it reads."""
    return PromptAlone(model), {"input_ids": ids[:, :-1].contiguous()}


def token_alone(model: nn.Module, ids: Tensor) -> tuple[nn.Module, dict[str, Tensor]]:
    """What is exported of decode, and what it reads."""
    with torch.no_grad():
        layers = model(input_ids=ids[:, :-1], logits_to_keep=1).past_key_values.layers
    return TokenAlone(model), {
        "input_ids": ids[:, -1:].contiguous(),
        "keys": torch.stack([layer.keys for layer in layers]),
        "values": torch.stack([layer.values for layer in layers]),
    }


def prefill_measures(model: gpt2.GPT2, case: Generation) -> dict[str, float]:
    """The floating-point operations, the product with the head for one token of each row."""
    width, seq, config = model.config.n_embd, case.seq, model.config
    per_layer = 2.0 * 12 * width**2 * seq + 4.0 * width * seq * (seq + 1) / 2
    return {"flops": case.batch * (config.n_layer * per_layer + 2.0 * width * config.vocab_size)}


def decode_measures(model: gpt2.GPT2, case: Generation) -> dict[str, float]:
    """The bytes of all weights but the positions, and of the cache."""
    weights = sum(p.numel() for p in model.parameters()) - model.transformer["wpe"].weight.numel()
    cached = 2 * case.batch * (case.seq + 1) * model.config.n_embd * model.config.n_layer
    return {"traffic": float(model.lm_head.weight.element_size() * (weights + cached))}


# T5


def t5_models(case: Generation) -> dict[str, nn.Module]:
    """T5 small."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = t5.SIZES["t5-small"] | {"dropout_rate": case.dropout}
    with torch.device("meta"):
        ours = t5.T5(t5.T5Config(**sizes))
    config = T5Config(**sizes, attn_implementation="eager")
    theirs = T5ForConditionalGeneration(config).to(getattr(torch, case.dtype))
    return share(ours, theirs)


def loss(case: Generation, ids: Tensor) -> Callable[[nn.Module], Tensor]:
    """Reads tokens and writes some of them again; the mean loss of all that it writes."""
    read, written, wanted = ids[:, :-1], ids[:, : case.written], ids[:, 1 : case.written + 1]

    def output(model: nn.Module) -> Tensor:
        if isinstance(model, t5.T5):
            return model.loss(model.states(written, model.remember(read)), wanted)
        logits = model(input_ids=read, decoder_input_ids=written).logits
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())

    return output


def training_measures(model: t5.T5, case: Generation) -> dict[str, float]:
    """The floating-point operations: backward, two products for each, five for attention's two."""
    config = model.config
    inner, width = config.num_heads * config.d_kv, config.d_model
    square, ffn = width * inner, 2 * width * config.d_ff
    read, written = case.seq, case.written
    products = read * config.num_layers * (6 * square + ffn)  # the decoder's keys and values too
    products += written * (config.num_layers * (6 * square + ffn) + width * config.vocab_size)
    pairs = config.num_layers * (read**2 + read * written + written * (written + 1) / 2)
    return {"flops": case.batch * (3 * 2.0 * products + 3.5 * 4 * inner * pairs)}


TASKS = {  # the models, their output and its name, what it costs, and what is exported of it
    "prefill": (gpt2_models, prefill, "logits", prefill_measures, prompt_alone),
    "decode": (gpt2_models, decode, "logits", decode_measures, token_alone),
    "training": (t5_models, loss, "loss", training_measures, None),
}
