"""The models that predict tokens, on fused ops against eager PyTorch and Hugging Face."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from model_parity import BART_SIZES, check, errors, results, sharpened
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastattn import models
from fastattn.models.generation import generate
from fastattn.models.gpt2 import GPT2, GPT2Config
from fastattn.models.llama import Llama, LlamaConfig
from fastattn.models.t5 import T5, T5Config
from fastattn.models.transformer import FAMILIES, Transformer, TransformerConfig

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, LENGTHS, TARGETS = 101, (17, 9, 1), (5, 7, 4)  # tokens in each row
SEQ2SEQ = BART_SIZES | {
    "max_position_embeddings": 24,
    "activation_function": "gelu",
    "scale_embedding": True,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
}
SMALL_T5 = {
    "d_model": 48,
    "d_kv": 8,
    "d_ff": 80,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}


class Kind(NamedTuple):
    """A model under test: our class, Hugging Face's, and what both configs are made of."""

    ours: type
    theirs: str
    sizes: dict[str, Any]
    own: dict[str, Any] = {}  # noqa: RUF012  of our config alone
    scale: float = 6.0

    def build(self, kernels: str = "fused", **changes: Any) -> models.LanguageModel:
        config = self.ours.Config(**{"vocab_size": VOCAB} | self.sizes | self.own | changes)
        return sharpened(self.ours(config, kernels), self.scale)

    def build_theirs(self, transformers: Any, **changes: Any) -> nn.Module:
        kind = getattr(transformers, self.theirs)
        settings = {"vocab_size": VOCAB, "attn_implementation": "eager"} | self.sizes | changes
        return sharpened(kind(kind.config_class(**settings)), self.scale)

    def build_like(self, theirs: nn.Module) -> models.LanguageModel:
        """Ours with their weights, tied as theirs are: T5 in transformers 5 is in any case."""
        tied = "tie_word_embeddings"
        model = self.build(**{tied: getattr(theirs.config, tied)} if tied in self.own else {})
        model.load_state_dict(theirs.state_dict())
        return model

    @property
    def seq2seq(self) -> bool:
        return self.ours in (T5, Transformer)


KINDS = {
    "gpt2": Kind(
        GPT2,
        "GPT2LMHeadModel",
        {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 24, "eos_token_id": 2},
    ),
    "llama": Kind(
        Llama,
        "LlamaForCausalLM",
        {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 24,
        },
    ),
    "t5": Kind(T5, "T5ForConditionalGeneration", SMALL_T5, scale=1.0),
    "t5-gated": Kind(
        T5,
        "T5ForConditionalGeneration",
        SMALL_T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {"tie_word_embeddings": True, "scale_decoder_outputs": False},  # as theirs reads that
        scale=1.0,
    ),
    "marian": Kind(Transformer, "MarianMTModel", SEQ2SEQ, FAMILIES["marian"]),
    "pegasus": Kind(Transformer, "PegasusForConditionalGeneration", SEQ2SEQ, FAMILIES["pegasus"]),
    "bart": Kind(Transformer, "BartForConditionalGeneration", SEQ2SEQ, FAMILIES["bart"]),
    "mbart": Kind(Transformer, "MBartForConditionalGeneration", SEQ2SEQ, FAMILIES["mbart"]),
}
ALL = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
FOUR = pytest.mark.parametrize("name", ["gpt2", "llama", "t5-gated", "mbart"])


def rows(lengths: tuple[int, ...], left: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens and the mask of rows of these lengths."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, VOCAB, mask.shape)
    return ids, (mask.flip(1) if left else mask).long()


def batch(kind: Kind, left: bool = False) -> dict[str, Tensor]:
    ids, mask = rows(LENGTHS, left)
    if not kind.seq2seq:
        return {"input_ids": ids, "attention_mask": mask}
    target, target_mask = rows(TARGETS)
    masks = {"attention_mask": mask, "decoder_attention_mask": target_mask}
    return {"input_ids": ids, "decoder_input_ids": target, **masks}


def task(kind: Kind, inputs: dict[str, Tensor]) -> Callable[[nn.Module], tuple[Tensor, Tensor]]:
    """Logits of the tokens, and the loss of predicting random ones."""
    tokens = inputs["decoder_attention_mask" if kind.seq2seq else "attention_mask"].bool()
    labels = torch.randint(3, VOCAB, (int(tokens.sum()),))

    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        out = model(**inputs)
        logits = getattr(out, "logits", out)[tokens]
        return logits, F.cross_entropy(logits, labels)

    return run


# fused against eager


@ALL
@pytest.mark.parametrize("kernels", ["fused", "sdpa"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_fused_is_eager(kind: Kind, kernels: str, side: str) -> None:
    model = kind.build("reference")
    run = task(kind, batch(kind, left=side == "left"))
    exact = results(copy.deepcopy(model).double(), run)
    eager, others = results(model, run), errors(model, run, exact)
    model.kernels = kernels
    check(results(model, run), eager, exact, sum(LENGTHS), others)


@ALL
def test_the_loss(kind: Kind) -> None:
    """Made without its logits, with theirs beside it."""
    model, inputs = kind.build("reference"), batch(kind)
    mask = inputs["decoder_attention_mask" if kind.seq2seq else "attention_mask"].bool()
    labels = torch.randint(3, VOCAB, mask.shape).masked_fill(~mask, 7)

    def run(model: models.LanguageModel) -> tuple[Tensor, Tensor]:
        if kind.seq2seq:
            memory = model.remember(inputs["input_ids"], inputs["attention_mask"])
            given = inputs["decoder_input_ids"], memory, inputs["decoder_attention_mask"]
        else:
            given = tuple(inputs.values())
        states = model.states(*given)
        logits, loss = model.logits(states)[mask], model.loss(states, labels, ignore_index=7)
        torch.testing.assert_close(loss, F.cross_entropy(logits, labels[mask], ignore_index=7))
        return logits, loss

    exact = results(copy.deepcopy(model).double(), run)
    eager, others = results(model, run), errors(model, run, exact)
    model.kernels = "fused"
    check(results(model, run), eager, exact, sum(LENGTHS), others)


@FOUR
def test_fused_is_eager_in_bf16(name: str) -> None:
    kind = KINDS[name]
    model = kind.build("reference").bfloat16()
    run = task(kind, batch(kind))
    exact = results(copy.deepcopy(model).double(), run)
    eager = results(model, run)
    model.kernels = "fused"
    check(results(model, run), eager, exact, sum(LENGTHS))


@FOUR
def test_fused_is_eager_under_autocast(name: str) -> None:
    kind = KINDS[name]
    model = kind.build("reference")
    run = task(kind, batch(kind))
    exact = results(copy.deepcopy(model).double(), run)
    with torch.autocast("cpu", torch.bfloat16):
        eager = results(model, run)
        model.kernels = "fused"
        check(results(model, run), eager, exact, sum(LENGTHS))


@pytest.mark.parametrize(
    ("name", "one_layer"),
    [
        ("gpt2", {"n_layer": 1}),
        ("llama", {"num_hidden_layers": 1}),
        ("t5-gated", {"num_layers": 1}),
        ("mbart", {"encoder_layers": 1, "decoder_layers": 1}),
    ],
)
def test_compiles_into_one_graph(name: str, one_layer: dict[str, int]) -> None:
    kind = KINDS[name]
    model, inputs = kind.build(**one_layer), batch(kind)
    run = task(kind, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(name == "llama"):  # gradients take most of the time
        torch.testing.assert_close(run(compiled)[0], run(model)[0], rtol=1e-4, atol=1e-4)


@FOUR
def test_checkpoints_change_nothing(name: str) -> None:
    """Layers that are computed anew in backward drop what they dropped before."""
    kind = KINDS[name]
    model = kind.build().train()
    run = task(kind, batch(kind))
    plain = results(model, run)
    layers = [x for m in model.modules() if isinstance(m, nn.ModuleList) for x in m]
    layers = [layer for layer in layers if type(layer).__name__ in ("Block", "Layer")]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    saved = results(model, run)
    assert len(layers) >= 2
    assert all(torch.equal(saved[name], plain[name]) for name in plain)


@ALL
def test_a_wrong_mask_would_show(kind: Kind) -> None:
    model, inputs = kind.build(), batch(kind, left=True)
    run = task(kind, inputs)
    with torch.no_grad():
        right = run(model)[0]
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        wrong = run(model)[0]
    assert (right - wrong).norm() > 0.1 * right.norm()


@ALL
def test_dropout_in_training(kind: Kind) -> None:
    model, inputs = kind.build(), batch(kind)

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(**inputs)

    still = logits(1)
    torch.testing.assert_close(logits(2), still)
    model.train()
    assert torch.equal(logits(1), logits(1))
    assert torch.equal(logits(1), logits(2)) == (kind.ours is Llama)  # which has none by default


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("gpt2", "resid_pdrop"),
        ("gpt2", "embd_pdrop"),
        ("gpt2", "attn_pdrop"),
        ("llama", "attention_dropout"),
        ("bart", "dropout"),
        ("bart", "attention_dropout"),
        ("bart", "activation_dropout"),
    ],
)
def test_each_dropout_alone(name: str, rate: str) -> None:
    kind = KINDS[name]
    rates = [
        f.name for f in dataclasses.fields(kind.ours.Config) if f.name.endswith(("drop", "dropout"))
    ]
    assert rate in rates
    model = kind.build(**dict.fromkeys(rates, 0.0) | {rate: 0.5}).train()
    inputs = batch(kind)
    with torch.no_grad():
        assert not torch.allclose(model(**inputs), model(**inputs))


# against Hugging Face


@ALL
def test_matches_hugging_face(transformers: Any, kind: Kind) -> None:
    theirs = kind.build_theirs(transformers)
    ours = kind.build_like(theirs)
    theirs.load_state_dict(ours.state_dict())
    run = task(kind, batch(kind))
    reference = copy.deepcopy(ours).double()
    reference.kernels = "reference"
    exact = results(reference, run)  # for theirs casts to fp32 in fp64
    eager, found = results(theirs, run), results(ours, run)
    for name, gradient in eager.items():
        if kind.ours is GPT2 and name.endswith((".c_attn.weight", ".c_proj.weight", "fc.weight")):
            eager[name] = gradient.t()
        torch.testing.assert_close(eager[name], exact[name].float(), rtol=1e-3, atol=1e-4, msg=name)
    check(found, eager, exact, sum(LENGTHS))


@ALL
def test_from_pretrained(transformers: Any, tmp_path: Path, kind: Kind) -> None:
    theirs = kind.build_theirs(transformers)
    theirs.save_pretrained(tmp_path)
    model = kind.ours.from_pretrained(tmp_path, kernels="reference")
    assert model.kernels == "reference" and not model.training
    assert not any(x.is_meta for x in (*model.parameters(), *model.buffers()))
    assert all(p.is_contiguous() for p in model.parameters())
    run = task(kind, batch(kind))
    with torch.no_grad():
        torch.testing.assert_close(run(model)[0], run(theirs)[0], rtol=1e-4, atol=1e-4)
    tied = model.lm_head.weight is next(
        m.weight for m in model.modules() if isinstance(m, nn.Embedding)
    )
    assert tied == theirs.config.tie_word_embeddings


@ALL
def test_weights_keep_their_dtype(transformers: Any, tmp_path: Path, kind: Kind) -> None:
    kind.build_theirs(transformers).to(torch.bfloat16).save_pretrained(tmp_path)
    model = kind.ours.from_pretrained(tmp_path)
    assert {x.dtype for x in (*model.parameters(), *model.buffers())} == {torch.bfloat16}
    assert all(
        p.requires_grad != ("embed_positions" in name and p.shape[0] == 24)
        for name, p in model.named_parameters()
    )  # sinusoids are not learned


def test_options_of_llama(transformers: Any) -> None:
    changes = {
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 10,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_new",
    }
    rope = {"rope_theta": 500.0}  # transformers 4 has it outside
    theirs = KINDS["llama"].build_theirs(
        transformers, rope_parameters={"rope_type": "default"} | rope, **rope, **changes
    )
    ours = KINDS["llama"].build(**rope, **changes)
    ours.load_state_dict(theirs.state_dict())
    inputs = batch(KINDS["llama"]) | {"position_ids": torch.arange(5, 5 + max(LENGTHS))[None]}
    tokens = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(
            ours(**inputs)[tokens], theirs(**inputs).logits[tokens], rtol=1e-4, atol=1e-4
        )


def test_old_files_of_gpt2(transformers: Any, tmp_path: Path) -> None:
    theirs = KINDS["gpt2"].build_theirs(transformers)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {k: v for k, v in theirs.transformer.state_dict().items()}
    state |= {"h.0.attn.bias": torch.ones(1, 1, 24, 24), "h.1.attn.masked_bias": torch.tensor(-1.0)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    run = task(KINDS["gpt2"], batch(KINDS["gpt2"]))
    with torch.no_grad():
        torch.testing.assert_close(
            run(GPT2.from_pretrained(tmp_path))[0], run(theirs)[0], rtol=1e-4, atol=1e-4
        )


# what is refused


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (GPT2Config, {"model_type": "gptj"}, "model_type must be 'gpt2', got 'gptj'"),
        (GPT2Config, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn must be False"),
        (GPT2Config, {"n_embd": 50, "n_head": 4}, r"multiple of n_head, got \(50, 4\)"),
        (GPT2Config, {"activation_function": "mish"}, "activation_function must be in .*'mish'"),
        (LlamaConfig, {"model_type": "gemma"}, "model_type must be 'llama', got 'gemma'"),
        (LlamaConfig, {"rope_scaling": {"type": "linear"}}, "rope_type must be 'default', got 'l"),
        (LlamaConfig, {"num_key_value_heads": 5}, r"num_key_value_heads, got \(32, 5\)"),
        (LlamaConfig, {"head_dim": 3}, "head_dim must be even, got 3"),
        (LlamaConfig, {"hidden_size": 100}, r"of num_attention_heads, got \(100, 32\)"),
        (T5Config, {"model_type": "umt5"}, "model_type must be 't5', got 'umt5'"),
        (T5Config, {"feed_forward_proj": "gated-mish"}, "feed_forward_proj must be in .*mish"),
        (TransformerConfig, {"model_type": "t5"}, "model_type must be in .*'marian'.*got 't5'"),
        (
            TransformerConfig,
            {"model_type": "marian", "share_encoder_decoder_embeddings": False},
            "share_encoder_decoder_embeddings must be True, got False",
        ),
    ],
)
def test_configs_of_other_models(
    tmp_path: Path, config: Any, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changes))
    with pytest.raises(ValueError, match=message):
        config.from_json(tmp_path / "config.json")


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match=r"kernels must be one of .*'sdpa'.*, got 'fast'"):
        KINDS["gpt2"].build("fast")
    with pytest.raises(ValueError, match=r"positions must be in .*, got 'rotary'"):
        TransformerConfig(positions="rotary")
    with pytest.raises(ValueError, match=r"of decoder_attention_heads, got \(512, 7\)"):
        TransformerConfig(decoder_attention_heads=7)
    ids = torch.ones(2, 5, dtype=torch.long)
    for kind in KINDS.values():
        model = kind.build()
        args = (ids, ids) if kind.seq2seq else (ids,)
        with pytest.raises(ValueError, match=r"input_ids must have shape \(B, S\).*got \(5,\)"):
            model(ids[0], *args[1:])
        if kind.ours is not T5:  # whose positions have no end
            with pytest.raises(ValueError, match=r"input_ids must have .*S <= 24, got \(2, 25\)"):
                model(ids.repeat(1, 5), *args[1:])
        with pytest.raises(ValueError, match=r"attention_mask must be .*\(2, 5\), got .*\(2, 4\)"):
            model(*args, attention_mask=ids[:, 1:])
        with pytest.raises(ValueError, match=r"attention_mask must be bool or integer.*float32"):
            model(*args, attention_mask=ids.float())
        if kind.seq2seq:
            with pytest.raises(ValueError, match="decoder_attention_mask must be bool or integer"):
                model(*args, decoder_attention_mask=ids.float())
            with pytest.raises(ValueError, match=r"decoder_input_ids must have shape \(B, S\)"):
                model(ids, ids[0])


@ALL
@pytest.mark.parametrize("shape", [(2, 0), (0, 5)], ids=["no_tokens", "no_rows"])
def test_nothing_to_read(kind: Kind, shape: tuple[int, int]) -> None:
    ids = torch.ones(shape, dtype=torch.long)
    for kernels in models.KERNELS:
        model = kind.build(kernels)
        for mask in (None, ids):
            out = model(*[ids] * (1 + kind.seq2seq), attention_mask=mask)
            assert out.shape == (*shape, VOCAB)


@ALL
def test_a_mask_the_wrong_way_round_shows(kind: Kind) -> None:
    ids, mask = rows((5, 5))
    model = kind.build()
    others = [ids] * kind.seq2seq
    with pytest.raises(ValueError, match="a token in every row"):  # all are hidden
        generate(model, ids, 1 - mask)
    seen = model(ids, *others, attention_mask=mask)
    assert torch.isfinite(model(ids, *others, attention_mask=1 - mask)).all()
    torch.testing.assert_close(seen, model(ids, *others), rtol=1e-4, atol=1e-4)
