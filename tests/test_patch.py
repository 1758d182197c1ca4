"""Patched models against themselves before: logits, gradients, generated tokens, what is left."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import test_huggingface
import torch
import torch.nn.functional as F
from model_parity import check, results, sharpened
from test_huggingface import (
    ALL,
    BART_LIKE,
    GENERATING,
    LENGTHS,
    VOCAB,
    build,
    needs_interface,
    reads_interface,
    rows,
    task,
)
from torch import Tensor, nn

import fastattn
from fastattn.integrations.patch import Row

pytestmark = pytest.mark.usefixtures("one_thread")


def compare(model: nn.Module, run: Callable[[nn.Module], tuple[Tensor, Tensor]]) -> Any:
    """The patched model's logits and gradients under the error rule, on the kernels alone."""
    oracle = copy.deepcopy(model).double()
    with fastattn.use_kernel("reference"):
        if hasattr(oracle, "set_attn_implementation"):  # eager is NaN where a row sees nothing
            oracle.set_attn_implementation("fastattn")
        exact = results(oracle, run)
    before = results(model, run)
    names = list(model.state_dict())
    report = fastattn.patch(model)
    with fastattn.use_kernel("cpu"):
        check(results(model, run), before, exact, sum(LENGTHS))
    assert list(model.state_dict()) == names
    again = copy.deepcopy(model)
    fastattn.unpatch(model)
    after = results(model, run)
    assert all(torch.equal(after[name], before[name]) for name in before)
    fastattn.unpatch(again)
    assert not any("forward" in module.__dict__ for module in again.modules())
    return report


# models of transformers


def left(report: Any) -> list[str]:
    """What was not replaced."""
    return [row.layer for row in report.rows if not row.replaced]


def own_attention(model: nn.Module) -> list[str]:
    """What must be left because its code does not use transformers' interface."""
    return [] if reads_interface(model) else [f"attention of {type(model).__name__}"]


@ALL
def test_logits_and_gradients(transformers: Any, name: str) -> None:
    model = build(transformers, name)
    report = compare(model, task(name, "right"))
    assert left(report) == own_attention(model)
    assert len(report.rows) > 1


@GENERATING
def test_generates_the_same(transformers: Any, name: str) -> None:
    model = build(transformers, name)
    ids, mask = rows(LENGTHS, left=True)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": 2}
    options |= {"decoder_start_token_id": 2} if model.config.is_encoder_decoder else {}
    wanted = model.generate(ids, attention_mask=mask, **options)
    fastattn.patch(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), wanted)


def small(transformers: Any, name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model that reads something else, and its input."""
    sizes: dict[str, Any] = {"attn_implementation": "eager"}
    if name == "DistilBertForMaskedLM":
        sizes |= {"vocab_size": 101, "dim": 48, "hidden_dim": 80, "n_heads": 4, "n_layers": 2}
        ids, mask = rows(LENGTHS)
        inputs = {"input_ids": ids, "attention_mask": mask}
    elif name == "ViTForImageClassification":
        sizes |= test_huggingface.BERT_LIKE | {"image_size": 16, "patch_size": 4}
        sizes.pop("max_position_embeddings")
        sizes["num_labels"] = 10  # two give the classifier's bias one number to be judged by
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    else:
        sizes |= BART_LIKE | {"vocab_size": 101, "num_mel_bins": 8, "max_source_positions": 20}
        sizes |= {"max_target_positions": 12, "pad_token_id": 1, "decoder_start_token_id": 2}
        sizes.pop("max_position_embeddings")
        inputs = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": rows((5, 5))[0]}
    kind = getattr(transformers, name)
    return sharpened(kind(kind.config_class(**sizes))), inputs


@pytest.mark.parametrize(
    "name",
    ["DistilBertForMaskedLM", "ViTForImageClassification", "WhisperForConditionalGeneration"],
)
def test_other_inputs(transformers: Any, name: str) -> None:
    model, inputs = small(transformers, name)
    tokens = inputs.get("attention_mask", torch.ones(1)).bool()

    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        dtype = next(model.parameters()).dtype
        cast = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
        logits = model(**cast).logits
        logits = logits[tokens] if tokens.dim() == 2 else logits.flatten(0, -2)
        return logits, F.cross_entropy(logits, torch.zeros(len(logits)).long())

    report = compare(model, run)
    assert left(report) == own_attention(model) and len(report.rows) > 1


def test_writes_of_sounds_what_it_did(transformers: Any) -> None:
    model, inputs = small(transformers, "WhisperForConditionalGeneration")
    sounds = inputs["input_features"]
    ends = {"eos_token_id": 3, "pad_token_id": 1, "decoder_start_token_id": 2}
    model.generation_config = transformers.GenerationConfig(**ends, max_length=12)
    write = transformers.GenerationMixin.generate  # Whisper's own asks for the tokens of speech
    wanted = write(model, sounds, do_sample=False)
    fastattn.patch(model)
    assert torch.equal(write(model, sounds, do_sample=False), wanted)
    assert wanted.unique().numel() > 3


def test_the_table(transformers: Any) -> None:
    model = build(transformers, "GPT2LMHeadModel")
    report = fastattn.patch(model)
    assert report.rows == [
        Row(1, "attention of GPT2LMHeadModel", True, "attn_implementation 'eager' -> 'fastattn'"),
        Row(5, "LayerNorm", True, "fastattn.nn.LayerNorm"),
        Row(4, "Conv1D", True, "fastattn.linear, up to 16 rows"),
        Row(2, "GPT2MLP", True, "fastattn.ffn, gelu_tanh"),
        Row(1, "Linear", True, "fastattn.linear, up to 24 rows"),
    ]
    assert str(report).splitlines()[1:] == [
        "replaced  5 × LayerNorm                     fastattn.nn.LayerNorm",
        "replaced  4 × Conv1D                        fastattn.linear, up to 16 rows",
        "replaced  2 × GPT2MLP                       fastattn.ffn, gelu_tanh",
        "replaced  1 × Linear                        fastattn.linear, up to 24 rows",
    ]


# bad input to models of transformers


def outcome(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> Any:
    """What a call returns, or the exception that it raises."""
    try:
        with torch.no_grad():
            return call(model)
    except Exception as error:  # whatever transformers makes of it
        return error


@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration"]
)
def test_bad_input_is_what_it_was(transformers: Any, name: str) -> None:
    """A patched model raises where it did before, and answers as it did elsewhere."""
    model = build(transformers, name)
    ids, mask = rows(LENGTHS)
    decoder = {"decoder_input_ids": ids[:, :3]} if name.startswith("T5") else {}
    calls: dict[str, Callable[[nn.Module], Tensor]] = {
        "empty prompt": lambda m: m(ids[:, :0], **decoder).logits,
        "no rows": lambda m: m(ids[:0], **{k: v[:0] for k, v in decoder.items()}).logits,
        "too long": lambda m: m(ids.repeat(1, 5), **decoder).logits,
        "short mask": lambda m: m(ids, attention_mask=mask[:, 1:], **decoder).logits,
        "mask of other rows": lambda m: m(ids, attention_mask=mask[:2], **decoder).logits,
        "mask of too many dimensions": lambda m: (
            m(ids, attention_mask=mask[:, None], **decoder).logits
        ),
        "mask of the wrong polarity": lambda m: m(ids, attention_mask=1 - mask, **decoder).logits,
        "tokens out of range": lambda m: m(ids + VOCAB, **decoder).logits,
    }
    before = {what: outcome(model, call) for what, call in calls.items()}
    fastattn.patch(model)
    for what, call in calls.items():
        found, wanted = outcome(model, call), before[what]
        if isinstance(wanted, Exception):
            named = isinstance(found, ValueError) and str(found).startswith("mask must")
            assert named or type(found) is type(wanted), (what, found, wanted)
        elif what == "mask of the wrong polarity":
            # a row that sees nothing is a mean of all values in eager PyTorch, and 0 here
            assert torch.isfinite(found).all()
            some = ~mask.bool().all(1)
            assert not decoder or torch.allclose(found[some], wanted[some], rtol=1e-3, atol=1e-3)
        else:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=what)


def test_a_static_cache_that_is_too_short(transformers: Any) -> None:
    ids, mask = rows((7, 7))

    def call(model: nn.Module) -> Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=5)
        return model(ids, mask, past_key_values=cache).logits

    model = build(transformers, "LlamaForCausalLM")
    before = outcome(model, call)
    fastattn.patch(model)
    assert isinstance(before, Exception) and type(outcome(model, call)) is type(before)


# models of torch.nn


class Small(nn.Module):
    """An encoder and a decoder of torch.nn."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        sizes = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "batch_first": True}
        self.transformer = nn.Transformer(
            num_encoder_layers=2, num_decoder_layers=2, dropout=0.0, **sizes, **options
        )
        self.head = nn.Sequential(nn.Linear(16, 24), nn.GELU("tanh"), nn.Linear(24, 9))
        self.norm = nn.RMSNorm(9)

    def forward(self, source: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1]).to(target.dtype)
        out = self.transformer(
            source,
            target,
            tgt_mask=causal,
            src_key_padding_mask=hidden,
            memory_key_padding_mask=hidden,
        )
        return self.norm(self.head(out))


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_transformer(norm_first: bool) -> None:
    model = sharpened(Small(norm_first=norm_first), 2.0)
    source, target = torch.randn(2, 7, 16), torch.randn(2, 5, 16)
    hidden = torch.arange(7) >= torch.tensor([[7], [4]])

    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        dtype = next(model.parameters()).dtype
        logits = model(source.to(dtype), target.to(dtype), hidden)
        return logits, logits.square().sum()

    report = compare(model, run)
    replaced = {row.layer: row.count for row in report.rows if row.replaced}
    assert replaced == {
        "TransformerEncoderLayer": 2,
        "TransformerDecoderLayer": 2,
        "MultiheadAttention": 6,
        "LayerNorm": 12,
        "Sequential": 1,
        "RMSNorm": 1,
    }
    fastattn.patch(model)
    with torch.no_grad():  # where torch has a shortcut that bypasses the layers
        found = run(model)[0]
        fastattn.unpatch(model)
        torch.testing.assert_close(found, run(model)[0], rtol=1e-4, atol=1e-4)
    assert model.transformer.encoder.use_nested_tensor is not norm_first


def test_only_what_is_asked_for() -> None:
    for options, layers in (
        ({"norms": False, "mlps": False, "linears": False}, {"MultiheadAttention"}),
        ({"attention": False, "mlps": False, "linears": False}, {"LayerNorm", "RMSNorm"}),
        ({"attention": False, "norms": False, "linears": False}, {"Sequential"}),
        ({"attention": False, "norms": False, "mlps": False}, {"Linear"}),
    ):
        report = fastattn.patch(Small(), **options)
        assert {row.layer for row in report.rows} == layers


# what looks like a layer that is fused and is not


class Norm(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight, self.eps, self.kind = nn.Parameter(torch.ones(24)), 1e-5, kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "eps outside":
            return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight
        if self.kind == "L1":
            return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight
        return F.rms_norm(x, (24,), self.weight, self.eps)


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(24, 40), nn.Linear(24, 40)
        self.down, self.kind = nn.Linear(40, 24), kind
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        if self.kind == "quick":
            return self.down(gate * torch.sigmoid(1.702 * gate) * up)
        if self.kind == "two":
            return up, gate
        if self.kind == "residual":
            return x + self.down(F.silu(gate) * up)
        if self.kind == "dropout as a function":
            return self.down(F.dropout(F.silu(gate) * up, 0.5, self.training))
        if self.kind == "dropout":
            return self.down(self.dropout(F.silu(gate) * up))
        if self.kind == "dropout behind":
            return self.dropout(self.down(F.silu(gate) * up))
        return self.down(F.silu(gate) * up)


@pytest.mark.parametrize(
    ("layer", "by"),
    [
        (Norm("own"), "fastattn.rms_norm"),
        (Norm("eps outside"), None),
        (Norm("L1"), None),
        (Block("own"), "fastattn.ffn, silu, gate gate"),
        (Block("dropout"), "fastattn.ffn, silu, gate gate"),
        (Block("dropout behind"), "fastattn.ffn, silu, gate gate"),
        (Block("dropout as a function"), "fastattn.ffn, silu, gate gate"),
        (Block("quick"), None),
        (Block("residual"), None),
        (nn.Sequential(nn.Linear(24, 40), nn.SiLU()), "fastattn.linear, silu"),
        (nn.Sequential(nn.Linear(24, 40), nn.Tanh()), None),
    ],
    ids=lambda x: getattr(x, "kind", None) or type(x).__name__,
)
def test_layers_are_known_by_what_they_compute(layer: nn.Module, by: str | None) -> None:
    x = torch.randn(5, 24)
    with torch.no_grad():
        wanted = layer.eval()(x)
    layer.train()
    state = torch.get_rng_state()
    report = fastattn.patch(layer, linears=False)
    assert torch.equal(torch.get_rng_state(), state)
    expected = Row(
        1, type(layer).__name__, by is not None, by or "it computes what no fused op does"
    )
    assert report.rows == [expected]
    layer.eval()
    torch.testing.assert_close(layer(x), wanted)
    layer.train()
    torch.manual_seed(1)
    if not getattr(layer, "kind", "").startswith("dropout"):
        torch.testing.assert_close(layer(x), wanted)
        return
    dropped = layer(x)
    assert not torch.allclose(dropped, wanted)
    torch.manual_seed(1)
    if layer.kind == "dropout as a function":
        expected = type(layer).forward(layer, x)
    else:
        within = layer.kind == "dropout"
        expected = fastattn.ffn(
            x,
            layer.up.weight,
            layer.down.weight,
            layer.up.bias,
            layer.down.bias,
            gate_weight=layer.gate.weight,
            gate_bias=layer.gate.bias,
            activation="silu",
            dropout_p=0.5 if within else 0.0,
        )
        expected = expected if within else F.dropout(expected)
    assert torch.equal(dropped, expected)


def test_layers_that_change_after_patching() -> None:
    """A hook on a layer within, or another layer in its place, is honoured."""
    block, x = Block("own").eval(), torch.randn(5, 24)
    fastattn.patch(block)
    block.down.register_forward_hook(lambda module, args, out: out + 1)
    plain = block.down.forward(F.silu(block.gate(x)) * block.up(x))
    torch.testing.assert_close(block(x), plain + 1)
    block.up = nn.Sequential(nn.Linear(24, 40), nn.Tanh())
    wanted = block.down.forward(F.silu(block.gate(x)) * block.up(x)) + 1
    torch.testing.assert_close(block(x), wanted)


def test_layers_that_are_not_tried() -> None:
    assert fastattn.patch(Block("two"), linears=False).rows == []
    calls = []
    block = Block("own")
    block.up.register_forward_hook(lambda *args: calls.append(args))
    left = Row(1, "Block", False, "it has hooks, or a layer within")
    assert fastattn.patch(block, linears=False).rows == [left]
    assert not calls
    block = Block("own")
    block.down.half()
    left = Row(1, "Block", False, "its weights have several dtypes")
    assert fastattn.patch(block, linears=False).rows == [left]


def test_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows take fastattn's kernel, many torch's; a block's own layers are left to the block."""
    model = nn.ModuleList([nn.Linear(24, 5), Block("own"), nn.Linear(24, 5).to(torch.float8_e5m2)])
    rows = fastattn.patch(model, norms=False).rows
    assert rows[0] == Row(1, "Linear", True, "fastattn.linear, up to 24 rows")
    assert [row.layer for row in rows] == ["Linear", "Block"]
    assert not any("forward" in part.__dict__ for part in (*model[1].children(), model[2]))
    fused, calls = fastattn.linear, []
    monkeypatch.setattr(fastattn, "linear", lambda *args: calls.append(args) or fused(*args))
    for shape, few in ((24, 24), 1), ((24,), 1), ((0, 24), 1), ((5, 5, 24), 0):
        x = torch.randn(shape)
        torch.testing.assert_close(model[0](x), F.linear(x, model[0].weight, model[0].bias))
        assert len(calls) == few, shape
        calls.clear()
    fastattn.unpatch(model)
    assert "forward" not in model[0].__dict__


def test_a_patched_model_can_be_pickled() -> None:
    model = nn.Sequential(Block("own"), Norm("own"), nn.LayerNorm(24)).eval()
    fastattn.patch(model)
    x = torch.randn(3, 24)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x))
    with torch.no_grad():
        again[0].up.weight.zero_()
    assert not torch.allclose(again(x), model(x))
    fastattn.unpatch(again)
    assert type(again[2]) is nn.LayerNorm


def test_a_patched_model_compiles() -> None:
    model = nn.Sequential(Block("own"), Norm("own"), nn.LayerNorm(24)).eval()
    fastattn.patch(model)
    x = torch.randn(3, 24)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


class Stubborn(nn.Module):
    """Looks like a model of transformers that takes no other attention."""

    config = SimpleNamespace(_attn_implementation="eager")

    def set_attn_implementation(self, name: str) -> None:
        raise ValueError(f"no {name} here")


def test_attention_that_cannot_be_replaced(
    transformers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = "attention of Stubborn"
    why = "its code does not use transformers' AttentionInterface"
    assert fastattn.patch(Stubborn()).rows == [Row(1, what, False, why)]
    monkeypatch.setattr(sys.modules[__name__], "ALL_ATTENTION_FUNCTIONS", {}, raising=False)
    assert fastattn.patch(Stubborn()).rows == [Row(1, what, False, "no fastattn here")]
    Stubborn.config.output_attentions = True
    assert fastattn.patch(Stubborn()).rows == [Row(1, what, False, "it returns attention weights")]


def test_a_patched_model_refuses_what_it_cannot_do(transformers: Any) -> None:
    model = needs_interface(build(transformers, "BertForMaskedLM"))
    fastattn.patch(model)
    ids, mask = rows(LENGTHS)
    with pytest.raises(ValueError, match="output_attentions must be False for fastattn"):
        model(ids, mask, output_attentions=True)
    fastattn.unpatch(model)
    assert len(model(ids, mask, output_attentions=True).attentions) == 2


def test_refusals() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    with pytest.raises(ValueError, match=r"patched by fastattn\.patch, got one that is not"):
        fastattn.unpatch(model)
    fastattn.patch(model)
    with pytest.raises(ValueError, match="must not be patched, got one that is"):
        fastattn.patch(model)
    fastattn.unpatch(model)
    with torch.device("meta"):
        model = nn.Sequential(Block("own"))
    left = Row(1, "Block", False, "its weights are on the meta device")
    assert fastattn.patch(model, linears=False).rows == [left]
