"""Attention in Triton: its kernel, over blocks of keys with an online softmax, and both ops."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import attention, launch, tiles
from fastattn.ops.attention.triton_backward import (
    attention_delta,
    attention_grad_bias,
    attention_grad_key,
    attention_grad_query,
)
from fastattn.ops.attention.triton_tiles import (
    LN2,
    Tiles,
    arguments_of,
    blocks_of,
    exponential,
    head_of,
    keys_for,
    logits_of,
    page_of,
    run_tiled,
    strides_of,
    whole_keys,
    work_of,
)


@triton.jit
def _pass(
    out, highest, total, query, key, value, mask, bias, seed, pages, key_strides, value_strides,
    mask_strides, bias_strides, batch, row, slope, random_head, q_len, kv_len, begin, end,
    hole, behind, offset, left, right, scale, softcap, threshold, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, HEAD_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    KEYS: tl.constexpr, WHOLE: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """What `attend` gives, going on from what is given, of begin ... hole and behind ... end.

    WHOLE: of tiles of which each query sees each key, but for mask and bias. CAREFUL keeps what is
    not finite among values from queries that do not see it.
    """
    for step in range(begin, end - (behind - hole), KEYS):
        first = tl.where(step < hole, step, step + (behind - hole))
        at = first + tl.arange(0, KEYS)
        keys_of, values_of, slot, slots = key, value, at, kv_len
        if pages is not None:
            page = page_of(pages, batch, at, kv_len)[:, None]
            keys_of += page * key_strides[0]
            values_of += page * value_strides[0]
            slot, slots = tl.where(at < kv_len, at % pages.size, pages.size), pages.size
        keys = tiles.load(keys_of, key_strides, slot, slots, HEAD_DIM, HEAD_WIDTH)
        product = tl.dot(query, tl.trans(keys), input_precision="ieee")
        logits, _ = logits_of(
            product, row, at, WHOLE, q_len, kv_len, offset, left, right, scale, softcap, slope,
            mask, mask_strides, bias, bias_strides,
        )  # fmt: skip
        now = tl.maximum(highest, tl.max(logits, 1))
        base = tl.where(now == float("-inf"), 0, now)  # nothing is visible so far
        rescale = exponential(highest - base)
        weights = exponential(logits - base[:, None])
        total = total * rescale + tl.sum(weights, 1)
        highest = now
        values = tiles.load(values_of, value_strides, slot, slots, VALUE_DIM, VALUE_WIDTH)
        if CAREFUL:
            spoilt = tl.max(tl.where(tl.abs(values) < float("inf"), 0.0, 1.0), 1)
            sees = tl.where(logits > float("-inf"), spoilt[None, :], 0)
            total = tl.where(tl.max(sees, 1) > 0, float("nan"), total)
            values = tiles.finite(values)
        if seed is not None:
            keep = tiles.kept(tl.load(seed), random_head, row, first, threshold, KEYS)
            weights = tl.where(keep, weights, 0)
        out = tl.dot(
            weights.to(values.dtype), values, out * rescale[:, None], input_precision="ieee"
        )
    return out, highest, total


@triton.jit
def attend(
    query, key, value, mask, bias, sink, seed, pages, key_strides, value_strides, mask_strides,
    bias_strides, batch, row, slope, random_head, q_len, kv_len, begin, end, first_row, last_row,
    offset, left, right, scale, softcap, threshold, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, HEAD_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    KEYS: tl.constexpr, PLAIN: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """Of a block of queries: sum of weighted values, highest logit and sum of weights.

    These are first_row ... last_row; they see none but the keys begin ... end. If it is PLAIN, the
    keys that all of them see come first, in a loop that tests no bounds.
    """
    no_result = tl.zeros([row.shape[0], VALUE_WIDTH], tl.float32)
    lowest = tl.zeros([row.shape[0]], tl.float32) + (float("-inf") if sink is None else sink)
    nothing = tl.zeros([row.shape[0]], tl.float32) + (0.0 if sink is None else 1.0)
    result, highest, total = no_result, lowest, nothing
    hole, behind = begin, begin
    if PLAIN:
        hole, behind = whole_keys(
            begin, end, first_row, last_row, q_len, kv_len, offset, left, right, KEYS
        )
        result, highest, total = _pass(
            result, highest, total, query, key, value, mask, bias, seed, pages, key_strides,
            value_strides, mask_strides, bias_strides, batch, row, slope, random_head, q_len,
            kv_len, hole, behind, 0, 0, offset, left, right, scale, softcap, threshold, HEAD_DIM,
            VALUE_DIM, HEAD_WIDTH, VALUE_WIDTH, KEYS, True, False,
        )  # fmt: skip
    result, highest, total = _pass(
        result, highest, total, query, key, value, mask, bias, seed, pages, key_strides,
        value_strides, mask_strides, bias_strides, batch, row, slope, random_head, q_len, kv_len,
        begin, end, hole, behind, offset, left, right, scale, softcap, threshold, HEAD_DIM,
        VALUE_DIM, HEAD_WIDTH, VALUE_WIDTH, KEYS, False, False,
    )  # fmt: skip
    if HIDES:
        # Nothing times NaN is NaN, also for who does not see it. Where that may have happened
        # all is computed again; elsewhere the last loop has no keys.
        strange = tl.max(tl.max(tl.where(tl.abs(result) < float("inf"), 0, 1), 1), 0) > 0
        result, highest, total = _pass(
            tl.where(strange, no_result, result), tl.where(strange, lowest, highest),
            tl.where(strange, nothing, total), query, key, value, mask, bias, seed, pages,
            key_strides, value_strides, mask_strides, bias_strides, batch, row, slope, random_head,
            q_len, kv_len, begin, tl.where(strange, end, begin), 0, 0, offset, left, right, scale,
            softcap, threshold, HEAD_DIM, VALUE_DIM, HEAD_WIDTH, VALUE_WIDTH, KEYS, False, True,
        )  # fmt: skip
    return result, highest, total


@triton.jit
def attention_forward(
    query, key, value, mask, bias, alibi_slopes, sinks, seed, packed, out, lse, query_strides,
    key_strides, value_strides, mask_strides, bias_strides, out_strides, lse_strides, heads, group,
    q_len, kv_len, left, right, scale, softcap, threshold: tl.uint32, factor,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, PLAIN: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """Of a block of QUERIES."""
    block, head, batch, first_query, q_len, first_key, kv_len, offset = work_of(
        packed, heads, q_len, kv_len, BOTTOM_RIGHT, False, QUERIES
    )
    if packed is not None and block < 0:
        return
    first = block * QUERIES
    row = first + tl.arange(0, QUERIES)
    key = head_of(key, key_strides, batch, head // group, first_key)
    value = head_of(value, value_strides, batch, head // group, first_key)
    if mask is not None:
        mask = head_of(mask, mask_strides, batch, head, first_query)
    if bias is not None:
        bias = head_of(bias, bias_strides, batch, head, first_query)
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + batch * heads + head)
    sink = None
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32)
    queries = tiles.load(
        head_of(query, query_strides, batch, head, first_query), query_strides, row, q_len,
        HEAD_DIM, HEAD_WIDTH,
    )  # fmt: skip
    last = tl.minimum(first + QUERIES, q_len) - 1
    begin, end = keys_for(first, last, kv_len, offset, left, right, KEYS)
    random_head = batch * heads + head
    result, highest, total = attend(
        queries, key, value, mask, bias, sink, seed, None, key_strides, value_strides, mask_strides,
        bias_strides, batch, row, slope, random_head, q_len, kv_len, begin, end, first,
        first + QUERIES - 1, offset, left, right, scale, softcap, threshold, HEAD_DIM, VALUE_DIM,
        HEAD_WIDTH, VALUE_WIDTH, KEYS, PLAIN, HIDES,
    )  # fmt: skip
    result *= tl.where(total == 0, 0, factor / total)[:, None]
    tiles.store(
        head_of(out, out_strides, batch, head, first_query), result, out_strides, row, q_len,
        VALUE_DIM,
    )  # fmt: skip
    logarithm = tl.where(total == 0, float("-inf"), highest + tl.log2(total) * LN2)
    lse = head_of(lse, lse_strides, batch, head, first_query)
    tl.store(lse + row, logarithm, row < q_len)


def attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    bottom_right: bool,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> tuple[Tensor, Tensor]:
    """The op of this name."""
    out, lse = attention.forward_shapes(query, key, value)
    arguments = arguments_of(
        query, key, value, mask, bias, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k,
        bottom_right, left, right, scale, softcap, dropout_p, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip

    def launches(tile: Tiles) -> None:
        launch.launch(
            attention_forward,
            (blocks_of(arguments, tile.queries),),
            {
                **arguments,
                "sinks": sinks,
                "out": out,
                "lse": lse,
                "out_strides": strides_of(out),
                "lse_strides": strides_of(lse[..., None]),
                **tile.sizes,
            },
            writes=("out", "lse"),
            **tile.options,
        )

    run_tiled(launches, arguments, "forward")
    return out, lse


def attention_bwd(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bottom_right: bool,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    need_bias: bool,
    need_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op of this name."""
    batch, heads, q_len, _ = query.shape
    kv_len = key.shape[2]
    tensors = query, key, value, mask, bias, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k
    gradients = attention.backward_shapes(None, None, *tensors, need_bias, need_sinks)
    grad_query, grad_key, grad_value, grad_bias, grad_sinks = gradients
    if grad_out is None:
        grad_out = query.new_zeros(1).expand(out.shape)
    delta = torch.empty_like(lse)
    common = arguments_of(
        query, key, value, mask, bias, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k,
        bottom_right, left, right, scale, softcap, dropout_p, max_seqlen_q, max_seqlen_k,
    ) | {
        "grad_out": grad_out,
        "grad_out_strides": strides_of(grad_out),
        "lse": lse,
        "delta": delta,
        "lse_strides": strides_of(lse[..., None]),
    }  # fmt: skip

    def launches(tile: Tiles) -> None:
        launch.launch(
            attention_delta,
            (triton.cdiv(q_len, tile.queries), batch * heads),
            {
                "grad_out": grad_out,
                "out": out,
                "grad_lse": grad_lse,
                "delta": delta,
                "grad_out_strides": strides_of(grad_out),
                "out_strides": strides_of(out),
                "heads": heads,
                "q_len": q_len,
                "VALUE_DIM": common["VALUE_DIM"],
                "VALUE_WIDTH": common["VALUE_WIDTH"],
                "QUERIES": tile.queries,
            },
            writes=("delta",),
            num_warps=4,
        )
        arguments = common | tile.sizes
        launch.launch(
            attention_grad_query,
            (blocks_of(arguments, tile.queries),),
            arguments | {"grad_query": grad_query, "grad_query_strides": strides_of(grad_query)},
            writes=("grad_query",),
            **tile.options,
        )
        launch.launch(
            attention_grad_key,
            (blocks_of(arguments, tile.keys, of_keys=True),),
            arguments
            | {
                "grad_key": grad_key,
                "grad_value": grad_value,
                "grad_key_strides": strides_of(grad_key),
                "grad_value_strides": strides_of(grad_value),
            },
            writes=("grad_key", "grad_value"),
            **tile.options,
        )
        if need_bias and bias is not None:
            bias_batches, bias_heads, bias_rows, bias_keys = bias.shape
            all_queries, all_keys = bias_rows < q_len, bias_keys < kv_len
            blocks = 1 if all_queries else triton.cdiv(q_len, tile.queries)
            blocks *= 1 if all_keys else triton.cdiv(kv_len, tile.keys)
            launch.launch(
                attention_grad_bias,
                (blocks * bias_batches * bias_heads,),
                arguments
                | {
                    "grad_bias": grad_bias,
                    "batches": batch,
                    "bias_batches": bias_batches,
                    "bias_heads": bias_heads,
                    "ALL_QUERIES": all_queries,
                    "ALL_KEYS": all_keys,
                },
                writes=("grad_bias",),
                **tile.options,
            )

    run_tiled(launches, common, "backward")
    if need_sinks and sinks is not None:
        # One number a row, and next to nothing: PyTorch's own functions do.
        weights = torch.exp(sinks[:, None] - lse.double())  # [B, H, Sq]
        weights = weights.masked_fill(lse == -math.inf, 0)  # a sink of -inf
        grad_sinks = -(weights * delta).sum((0, 2))
    return grad_query, grad_key, grad_value, grad_bias, grad_sinks
