"""Models of transformers on fastattn's attention against their own eager attention."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_parity import BART_SIZES, check, results, sharpened
from torch import Tensor, nn

import fastattn
from fastattn.integrations import huggingface

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, LENGTHS = 101, (11, 17, 5)
BERT_LIKE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
}
LLAMA_LIKE = BERT_LIKE | {"num_key_value_heads": 2, "max_position_embeddings": 64}
BART_LIKE = BART_SIZES | {"max_position_embeddings": 64}
T5_LIKE = {"d_model": 48, "d_kv": 8, "d_ff": 80, "num_layers": 2, "num_heads": 4}
GPT2_LIKE = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
MODELS: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": BERT_LIKE,
    "RobertaForMaskedLM": BERT_LIKE,
    "GPT2LMHeadModel": GPT2_LIKE,
    "LlamaForCausalLM": LLAMA_LIKE,
    "MistralForCausalLM": LLAMA_LIKE | {"sliding_window": 6},
    "Qwen2ForCausalLM": LLAMA_LIKE,
    "Gemma2ForCausalLM": LLAMA_LIKE | {"head_dim": 12, "sliding_window": 6},
    "T5ForConditionalGeneration": T5_LIKE,
    "BartForConditionalGeneration": BART_LIKE,
}
ALL = pytest.mark.parametrize("name", MODELS)
GENERATING = pytest.mark.parametrize("name", [n for n in MODELS if "MaskedLM" not in n])


def build(transformers: Any, name: str, **changes: Any) -> nn.Module:
    kind = getattr(transformers, name)
    settings = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    settings |= {"attn_implementation": "eager"} | MODELS[name] | changes
    model = sharpened(kind(kind.config_class(**settings)), 1.0 if name.startswith("T5") else 6.0)
    if model.can_generate():
        model.generation_config = type(model.generation_config)()
    return model


def reads_interface(model: nn.Module) -> bool:
    """Whether its code takes its attention from transformers' registry, as all of 5 does."""
    return hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")


def needs_interface(model: nn.Module) -> nn.Module:
    """The model; skips the test where its attention is its own."""
    if not reads_interface(model):
        pytest.skip(f"{type(model).__name__} of this transformers has an attention of its own")
    return model


def rows(lengths: tuple[int, ...], left: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens and the mask of rows of these lengths."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if left else mask
    return torch.randint(3, VOCAB, mask.shape).masked_fill(~mask, 1), mask.long()


def task(name: str, form: str) -> Callable[[nn.Module], tuple[Tensor, Tensor]]:
    """Logits of the tokens, and the loss of predicting random ones, with a mask of some form."""
    ids, mask = rows(LENGTHS, left=form == "left")
    inputs = {"input_ids": ids, "attention_mask": None if form == "none" else mask}
    tokens = torch.ones_like(mask) if form == "none" else mask
    if name.startswith(("T5", "Bart")):
        target, tokens = rows((5, 7, 4))
        inputs |= {"decoder_input_ids": target}
        if form != "none":
            inputs |= {"decoder_attention_mask": tokens}
    labels = torch.randint(3, VOCAB, (int(tokens.sum()),))

    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        logits = model(**inputs).logits[tokens.bool()]
        return logits, F.cross_entropy(logits, labels)

    return run


@ALL
@pytest.mark.parametrize("form", ["none", "right", "left"])
def test_logits_and_gradients(transformers: Any, name: str, form: str) -> None:
    model = build(transformers, name)
    run = task(name, form)
    oracle = copy.deepcopy(model).double()
    # eager in fp64 is NaN where a row sees nothing, and sdpa has no softcap
    oracle.set_attn_implementation("fastattn" if "Gemma2" in name else "sdpa")
    with fastattn.use_kernel("reference"):
        exact = results(oracle, run)
    eager = results(model, run)
    model.set_attn_implementation("fastattn")
    with fastattn.use_kernel("cpu"):
        check(results(model, run), eager, exact, sum(LENGTHS))


@GENERATING
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generates_the_same(transformers: Any, name: str, cache: str) -> None:
    model = build(transformers, name)
    ids, mask = rows(LENGTHS, left=True)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2 if cache == "dynamic" else 1}
    options |= {"decoder_start_token_id": 2} if model.config.is_encoder_decoder else {}
    options |= {"pad_token_id": 1, "eos_token_id": 2}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    for one_mask in (mask, torch.ones_like(mask)):
        model.set_attn_implementation("eager")
        wanted = model.generate(ids, attention_mask=one_mask, **options)
        model.set_attn_implementation("fastattn")
        assert torch.equal(model.generate(ids, attention_mask=one_mask, **options), wanted)


@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "LlamaForCausalLM", "T5ForConditionalGeneration"]
)
def test_a_mask_of_four_dimensions(transformers: Any, name: str) -> None:
    model = needs_interface(build(transformers, name))
    ids = rows((7, 7))[0]
    seen = torch.rand(2, 1, 7, 7) < 0.6
    seen |= torch.eye(7, dtype=torch.bool)
    inputs = {"input_ids": ids, "attention_mask": torch.zeros(2, 1, 7, 7).masked_fill(~seen, -1e9)}
    if name.startswith("T5"):
        inputs |= {"decoder_input_ids": ids[:, :3]}
        inputs |= {"attention_mask": inputs["attention_mask"][:, :, :1]}
    with torch.no_grad():
        wanted = model(**inputs).logits
        model.set_attn_implementation("fastattn")
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)


def test_dropout_is_applied(transformers: Any) -> None:
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.5}
    model = build(transformers, "BertForMaskedLM", **rates)
    model.set_attn_implementation("fastattn")
    ids, mask = rows(LENGTHS)
    with torch.no_grad():
        still = model(ids, mask).logits
        assert not torch.allclose(model.train()(ids, mask).logits, still)


def test_sinks_softcap_and_scale() -> None:
    """The arguments that few models use, against attention written out."""
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    sinks = torch.randn(4)
    options = {"scaling": 0.7, "softcap": 3.0, "s_aux": sinks, "is_causal": True}
    found, weights = huggingface.attention(nn.Module(), query, key, value, None, **options)
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.7
    scores = 3.0 * (scores / 3.0).tanh()
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    scores = torch.cat([scores, sinks[None, :, None, None].expand(2, 4, 5, 1)], -1)
    wanted = scores.softmax(-1)[..., :-1] @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(found, wanted.transpose(1, 2))
    assert weights is None


def test_refusals(transformers: Any) -> None:
    model = needs_interface(build(transformers, "BertForMaskedLM"))
    model.set_attn_implementation("fastattn")
    ids, mask = rows(LENGTHS)
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(ids, mask, output_attentions=True)
    query = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="cache must be None for fastattn, got dict"):
        huggingface.attention(nn.Module(), query, query, query, None, cache={})
    wrong = mask[:, None, None, 1:].bool().expand(-1, 1, max(LENGTHS), -1)
    with pytest.raises(ValueError, match=r"mask must broadcast .*got \[3, 1, 17, 16\]"):
        model(ids, wrong)
    with pytest.raises(TypeError, match=r"attention_mask must be bool or floating, got .*int64"):
        huggingface.attention(nn.Module(), query, query, query, torch.ones(3, 3).long())


def test_one_call_registers(
    transformers: Any, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    interfaces = transformers.AttentionInterface(), transformers.AttentionMaskInterface()
    assert not any("own" in names for names in interfaces)
    huggingface.register("own")
    assert all("own" in names for names in interfaces)
    code = "import sys, fastattn.integrations.huggingface; sys.exit('transformers' in sys.modules)"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
