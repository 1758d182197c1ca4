"""Logits that wait until they are asked for: the loss of a patched model, and its other uses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_parity import check, results
from test_huggingface import ALL, LENGTHS, build, rows
from torch import Tensor, nn

import fastattn
from fastattn import linear_cross_entropy
from fastattn.integrations.logits import Logits
from fastattn.integrations.patch import Row

pytestmark = pytest.mark.usefixtures("one_thread")


def with_labels(name: str) -> Callable[[nn.Module], tuple[Tensor, Tensor]]:
    """The logits of the tokens, and the loss that the model itself makes of labels."""
    ids, mask = rows(LENGTHS)
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    tokens = mask.bool()
    if name.startswith(("T5", "Bart")):
        target, tokens = rows((5, 7, 4))
        tokens = tokens.bool()
        labels = target.masked_fill(~tokens, -100)
        inputs |= {"decoder_input_ids": target, "labels": labels}

    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        out = model(**inputs)
        return out.logits[tokens], out.loss

    return run


@ALL
def test_the_loss(transformers: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused, with the loss and the gradients that the model had before, and its logits."""
    model, run = build(transformers, name), with_labels(name)
    oracle = copy.deepcopy(model).double()
    with fastattn.use_kernel("reference"):
        oracle.set_attn_implementation("fastattn")
        exact = results(oracle, run)
    before, loss = results(model, run), run(model)[1]
    row = fastattn.patch(model, loss=True).rows[-1]
    assert row == Row(1, f"loss of {name}", True, "fastattn.linear_cross_entropy")
    fused = []
    monkeypatch.setattr(
        fastattn,
        "linear_cross_entropy",
        lambda *args, **kw: fused.append(kw) or linear_cross_entropy(*args, **kw),
    )
    with fastattn.use_kernel("cpu"):
        found = results(model, run)
        torch.testing.assert_close(run(model)[1], loss)
    assert len(fused) == 2
    check(found, before, exact, sum(LENGTHS))
    fastattn.unpatch(model)
    assert type(run(model)[0]) is Tensor


def test_logits_are_made_when_they_are_asked_for(transformers: Any) -> None:
    model = build(transformers, "LlamaForCausalLM")
    ids, mask = rows(LENGTHS)
    wanted = model(ids, mask).logits
    fastattn.patch(model, attention=False, norms=False, mlps=False, loss=True)
    logits = model(ids, mask).logits
    assert logits.shape == wanted.shape and logits.requires_grad and logits.dtype == wanted.dtype
    rows_of_some = logits[:, 2:-1], logits[0], logits[..., -1, :], logits[mask.bool()]
    assert all(type(x) is Logits and x.computed is None for x in (logits, *rows_of_some))
    others = wanted[:, 2:-1], wanted[0], wanted[..., -1, :], wanted[mask.bool()]
    for one, other in zip(rows_of_some, others, strict=True):
        torch.testing.assert_close(one + 0.0, other, rtol=1e-4, atol=1e-4)
    for one in (logits[..., 0], logits[..., :5], logits[:, :, [1, 2]], logits.mT, logits[None]):
        assert type(one) is Tensor
    torch.testing.assert_close(logits[..., 0, :5] * 1, wanted[..., 0, :5], rtol=1e-4, atol=1e-4)
    for found, other in (
        (logits.flatten(0, 1).double().softmax(-1), wanted.flatten(0, 1).double().softmax(-1)),
        (F.cross_entropy(logits.mT, ids), F.cross_entropy(wanted.mT, ids)),
        (
            F.cross_entropy(logits[0], ids[0], weight=torch.arange(101.0)),
            F.cross_entropy(wanted[0], ids[0], weight=torch.arange(101.0)),
        ),
        (F.cross_entropy(logits[0] * 2, ids[0]), F.cross_entropy(wanted[0] * 2, ids[0])),
        (torch.stack([logits, logits]).sum(), 2 * wanted.sum()),
        (pickle.loads(pickle.dumps(logits.detach())), wanted.detach()),
    ):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-4)
        assert type(found) is Tensor
    assert torch.equal(logits.argmax(-1), wanted.argmax(-1))


def test_logits_cannot_be_written_to_or_read_late(transformers: Any) -> None:
    model = build(transformers, "GPT2LMHeadModel")
    fastattn.patch(model, loss=True)
    ids, mask = rows(LENGTHS)
    out = model(ids, attention_mask=mask, labels=ids)
    with pytest.raises(RuntimeError, match="must not be written to, got mul_: clone them"):
        out.logits.mul_(2)
    with pytest.raises(RuntimeError, match="must not be written to, got __setitem__"):
        out.logits[0] = 0
    assert out.logits[0].clone().zero_().sum() == 0
    out = model(ids, attention_mask=mask, labels=ids)
    out.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="must be read before its weights change"):
        out.logits.argmax(-1)
    with torch.inference_mode():
        assert torch.isfinite(model(ids, attention_mask=mask).logits.sum())


def test_the_loss_under_autocast_and_in_a_graph(transformers: Any) -> None:
    model = build(transformers, "LlamaForCausalLM")
    ids, mask = rows(LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(ids, mask, labels=ids)
    plain = model(ids, mask, labels=ids).loss
    fastattn.patch(model, loss=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, attention_mask=mask, labels=ids)
    assert out.logits.dtype == before.logits.dtype and out.loss.dtype == before.loss.dtype
    torch.testing.assert_close(out.loss, before.loss, rtol=3e-2, atol=3e-2)
    head = torch.compile(model.lm_head, fullgraph=True, backend="eager")
    x = torch.randn(2, 48)
    assert type(head(x)) is Tensor
    torch.testing.assert_close(head(x), F.linear(x, model.lm_head.weight))
    torch.testing.assert_close(model(ids, mask, labels=ids).loss, plain)


def test_losses_that_are_left(transformers: Any) -> None:
    what = {"attention": False, "norms": False, "mlps": False, "linears": False, "loss": True}
    row = Row(1, "loss of LayerNorm", False, "it has no output embeddings")
    assert fastattn.patch(nn.LayerNorm(3), **what).rows == [row]
    model = build(transformers, "LlamaForCausalLM")
    model.lm_head = nn.Sequential(model.lm_head)
    why = "its output embeddings are no torch.nn.Linear"
    assert fastattn.patch(model, **what).rows == [Row(1, "loss of LlamaForCausalLM", False, why)]
