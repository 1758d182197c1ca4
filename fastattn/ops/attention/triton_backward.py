"""The Triton kernels of attention's gradients, which compute the weights again."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.ops import tiles
from fastattn.ops.attention.triton_tiles import (
    all_see,
    exponential,
    head_of,
    keys_for,
    logits_of,
    work_of,
)


@triton.jit
def attention_delta(
    grad_out, out, grad_lse, delta, grad_out_strides, out_strides, heads, q_len,
    VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """delta [B, H, Sq]: the product of out and its gradient, less the gradient of lse."""
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    grads = tiles.load(
        head_of(grad_out, grad_out_strides, batch, head), grad_out_strides, row, q_len, VALUE_DIM,
        VALUE_WIDTH,
    )  # fmt: skip
    outs = tiles.load(
        head_of(out, out_strides, batch, head), out_strides, row, q_len, VALUE_DIM, VALUE_WIDTH
    )
    found = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    at = tl.program_id(1).to(tl.int64) * q_len + row
    if grad_lse is not None:
        found -= tl.load(grad_lse + at, row < q_len, 0)
    tl.store(delta + at, found, row < q_len)


@triton.jit
def _load_rows(lse, delta, strides, batch, head, first_query, row, q_len):
    """The log-sum-exp of a block of queries, 0 for who sees nothing, and their delta."""
    logarithm = tl.load(head_of(lse, strides, batch, head, first_query) + row, row < q_len, 0)
    logarithm = tl.where(logarithm == float("-inf"), 0, logarithm)
    deltas = tl.load(head_of(delta, strides, batch, head, first_query) + row, row < q_len, 0)
    return logarithm, deltas


@triton.jit
def _gradients(
    queries, grads, keys, values, mask, bias, seed, mask_strides, bias_strides, row, at, lse, delta,
    slope, random_head, whole, q_len, kv_len, offset, left, right, scale, softcap, threshold,
    factor, first, KEYS: tl.constexpr,
):  # fmt: skip
    """Weights behind dropout, but for its factor; gradients of logits; and of these by products."""
    product = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    logits, slopes = logits_of(
        product, row, at, whole, q_len, kv_len, offset, left, right, scale, softcap, slope,
        mask, mask_strides, bias, bias_strides,
    )  # fmt: skip
    weights = exponential(logits - lse[:, None])
    kept = weights
    grad = tl.dot(grads, tl.trans(values), input_precision="ieee")
    if seed is not None:
        keep = tiles.kept(tl.load(seed), random_head, row, first, threshold, KEYS)
        kept = tl.where(keep, weights, 0)
        grad = tl.where(keep, grad * factor, 0)
    grad = weights * (grad - delta[:, None])
    return kept, tl.where(logits == float("-inf"), 0, grad), slopes


@triton.jit
def _query_gradient(
    result, queries, grads, key, value, mask, bias, seed, key_strides, value_strides, mask_strides,
    bias_strides, row, lse, delta, slope, random_head, q_len, kv_len, begin, end, offset, left,
    right, scale, softcap, threshold, factor, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    HEAD_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, KEYS: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """Of a block of queries, added to result; CAREFUL keeps out hidden keys that are not finite."""
    for first in range(begin, end, KEYS):
        at = first + tl.arange(0, KEYS)
        keys = tiles.load(key, key_strides, at, kv_len, HEAD_DIM, HEAD_WIDTH)
        values = tiles.load(value, value_strides, at, kv_len, VALUE_DIM, VALUE_WIDTH)
        _, grad, slopes = _gradients(
            queries, grads, keys, values, mask, bias, seed, mask_strides, bias_strides, row, at,
            lse, delta, slope, random_head, False, q_len, kv_len, offset, left, right, scale,
            softcap, threshold, factor, first, KEYS,
        )  # fmt: skip
        if CAREFUL:
            keys = tiles.finite(keys)
        result = tl.dot((grad * slopes).to(keys.dtype), keys, result, input_precision="ieee")
    return result


@triton.jit
def attention_grad_query(
    query, key, value, mask, bias, alibi_slopes, seed, packed, grad_out, lse, delta, grad_query,
    query_strides, key_strides, value_strides, mask_strides, bias_strides, grad_out_strides,
    grad_query_strides, lse_strides, heads, group, q_len, kv_len, left, right, scale, softcap,
    threshold: tl.uint32, factor, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    HEAD_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PLAIN: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """Of a block of QUERIES."""
    block, head, batch, first_query, q_len, first_key, kv_len, offset = work_of(
        packed, heads, q_len, kv_len, BOTTOM_RIGHT, False, QUERIES
    )
    if packed is not None and block < 0:
        return
    random_head = batch * heads + head
    first = block * QUERIES
    row = first + tl.arange(0, QUERIES)
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + random_head)
    key = head_of(key, key_strides, batch, head // group, first_key)
    value = head_of(value, value_strides, batch, head // group, first_key)
    if mask is not None:
        mask = head_of(mask, mask_strides, batch, head, first_query)
    if bias is not None:
        bias = head_of(bias, bias_strides, batch, head, first_query)
    queries = tiles.load(
        head_of(query, query_strides, batch, head, first_query), query_strides, row, q_len,
        HEAD_DIM, HEAD_WIDTH,
    )  # fmt: skip
    grads = tiles.load(
        head_of(grad_out, grad_out_strides, batch, head, first_query), grad_out_strides, row, q_len,
        VALUE_DIM, VALUE_WIDTH,
    )  # fmt: skip
    logarithm, deltas = _load_rows(lse, delta, lse_strides, batch, head, first_query, row, q_len)
    last = tl.minimum(first + QUERIES, q_len) - 1
    begin, end = keys_for(first, last, kv_len, offset, left, right, KEYS)
    nothing = tl.zeros([QUERIES, HEAD_WIDTH], tl.float32)
    result = _query_gradient(
        nothing, queries, grads, key, value, mask, bias, seed, key_strides, value_strides,
        mask_strides, bias_strides, row, logarithm, deltas, slope, random_head, q_len, kv_len,
        begin, end, offset, left, right, scale, softcap, threshold, factor, HEAD_DIM, VALUE_DIM,
        HEAD_WIDTH, VALUE_WIDTH, KEYS, False,
    )  # fmt: skip
    if HIDES:  # as in attention_forward
        strange = tl.max(tl.max(tl.where(tl.abs(result) < float("inf"), 0, 1), 1), 0) > 0
        result = _query_gradient(
            tl.where(strange, nothing, result), queries, grads, key, value, mask, bias, seed,
            key_strides, value_strides, mask_strides, bias_strides, row, logarithm, deltas, slope,
            random_head, q_len, kv_len, begin, tl.where(strange, end, begin), offset, left, right,
            scale, softcap, threshold, factor, HEAD_DIM, VALUE_DIM, HEAD_WIDTH, VALUE_WIDTH, KEYS,
            True,
        )  # fmt: skip
    tiles.store(
        head_of(grad_query, grad_query_strides, batch, head, first_query), result * scale,
        grad_query_strides, row, q_len, HEAD_DIM,
    )  # fmt: skip


@triton.jit
def attention_grad_key(
    query, key, value, mask, bias, alibi_slopes, seed, packed, grad_out, lse, delta, grad_key,
    grad_value, query_strides, key_strides, value_strides, mask_strides, bias_strides,
    grad_out_strides, grad_key_strides, grad_value_strides, lse_strides, heads, group, q_len,
    kv_len, left, right, scale, softcap, threshold: tl.uint32, factor, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, HEAD_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, PLAIN: tl.constexpr,
    HIDES: tl.constexpr,
):  # fmt: skip
    """Of a block of KEYS and their values, summed over the queries of all heads that share them."""
    block, kv_head, batch, first_query, q_len, first_key, kv_len, offset = work_of(
        packed, heads // group, q_len, kv_len, BOTTOM_RIGHT, True, KEYS
    )
    first = block * KEYS
    if packed is not None and first >= kv_len:
        return
    at = first + tl.arange(0, KEYS)
    keys = tiles.load(
        head_of(key, key_strides, batch, kv_head, first_key), key_strides, at, kv_len, HEAD_DIM,
        HEAD_WIDTH,
    )  # fmt: skip
    values = tiles.load(
        head_of(value, value_strides, batch, kv_head, first_key), value_strides, at, kv_len,
        VALUE_DIM, VALUE_WIDTH,
    )  # fmt: skip
    key_sum = tl.zeros([KEYS, HEAD_WIDTH], tl.float32)
    value_sum = tl.zeros([KEYS, VALUE_WIDTH], tl.float32)
    begin = 0
    if right is not None:
        begin = tl.maximum(first - offset - right, 0) // QUERIES * QUERIES
    end = q_len
    if left is not None:
        end = tl.minimum(first + KEYS - offset + left, q_len)
    for head in range(kv_head * group, kv_head * group + group):
        random_head = batch * heads + head
        slope = None
        if alibi_slopes is not None:
            slope = tl.load(alibi_slopes + random_head)
        queries_of = head_of(query, query_strides, batch, head, first_query)
        grads_of = head_of(grad_out, grad_out_strides, batch, head, first_query)
        mask_of = None
        if mask is not None:
            mask_of = head_of(mask, mask_strides, batch, head, first_query)
        bias_of = None
        if bias is not None:
            bias_of = head_of(bias, bias_strides, batch, head, first_query)
        for first_row in range(begin, end, QUERIES):
            row = first_row + tl.arange(0, QUERIES)
            queries = tiles.load(queries_of, query_strides, row, q_len, HEAD_DIM, HEAD_WIDTH)
            grads = tiles.load(grads_of, grad_out_strides, row, q_len, VALUE_DIM, VALUE_WIDTH)
            logarithm, deltas = _load_rows(
                lse, delta, lse_strides, batch, head, first_query, row, q_len
            )
            whole = False
            if PLAIN:
                last_row, last = first_row + QUERIES - 1, first + KEYS - 1
                whole = all_see(
                    first_row, last_row, first, last, q_len, kv_len, offset, left, right
                )
            kept, grad, slopes = _gradients(
                queries, grads, keys, values, mask_of, bias_of, seed, mask_strides, bias_strides,
                row, at, logarithm, deltas, slope, random_head, whole, q_len, kv_len, offset, left,
                right, scale, softcap, threshold, factor, first, KEYS,
            )  # fmt: skip
            value_sum = tl.dot(
                tl.trans(kept.to(grads.dtype)), grads, value_sum, input_precision="ieee"
            )
            key_sum = tl.dot(
                tl.trans((grad * slopes).to(queries.dtype)), queries, key_sum,
                input_precision="ieee",
            )  # fmt: skip
    tiles.store(
        head_of(grad_key, grad_key_strides, batch, kv_head, first_key), key_sum * scale,
        grad_key_strides, at, kv_len, HEAD_DIM,
    )  # fmt: skip
    tiles.store(
        head_of(grad_value, grad_value_strides, batch, kv_head, first_key), value_sum * factor,
        grad_value_strides, at, kv_len, VALUE_DIM,
    )  # fmt: skip


@triton.jit
def attention_grad_bias(
    query, key, value, mask, bias, alibi_slopes, seed, packed, grad_out, lse, delta, grad_bias,
    query_strides, key_strides, value_strides, mask_strides, bias_strides, grad_out_strides,
    lse_strides, batches, heads, group, q_len, kv_len, bias_batches, bias_heads, left, right, scale,
    softcap, threshold: tl.uint32, factor, ALL_QUERIES: tl.constexpr, ALL_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, PLAIN: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """Of a tile [QUERIES, KEYS] of bias, contiguous, summed over all dimensions that it broadcasts
    over; of [KEYS] if over ALL_QUERIES, and of [QUERIES] if over ALL_KEYS. No sequence is packed.
    """
    offset = kv_len - q_len if BOTTOM_RIGHT else 0
    key_blocks = 1 if ALL_KEYS else tl.cdiv(kv_len, KEYS)
    query_blocks = 1 if ALL_QUERIES else tl.cdiv(q_len, QUERIES)
    key_block = tl.program_id(0) % key_blocks
    query_block = tl.program_id(0) // key_blocks % query_blocks
    lead = tl.program_id(0) // key_blocks // query_blocks
    result = tl.zeros([QUERIES, KEYS], tl.float32)
    begin = query_block * QUERIES
    end = begin + 1
    if ALL_QUERIES:
        end = q_len
    key_begin = key_block * KEYS
    key_end = key_begin + 1
    if ALL_KEYS:
        key_end = kv_len
    # Each of these has one step or all of them.
    for batch in range(lead // bias_heads, batches, bias_batches):
        for head in range(lead % bias_heads, heads, bias_heads):
            random_head = batch * heads + head
            mask_of = None
            if mask is not None:
                mask_of = head_of(mask, mask_strides, batch, head)
            slope = None
            if alibi_slopes is not None:
                slope = tl.load(alibi_slopes + random_head)
            for first_row in range(begin, end, QUERIES):
                row = first_row + tl.arange(0, QUERIES)
                queries = tiles.load(
                    head_of(query, query_strides, batch, head), query_strides, row, q_len, HEAD_DIM,
                    HEAD_WIDTH,
                )  # fmt: skip
                grads = tiles.load(
                    head_of(grad_out, grad_out_strides, batch, head), grad_out_strides, row, q_len,
                    VALUE_DIM, VALUE_WIDTH,
                )  # fmt: skip
                logarithm, deltas = _load_rows(lse, delta, lse_strides, batch, head, 0, row, q_len)
                for first in range(key_begin, key_end, KEYS):
                    at = first + tl.arange(0, KEYS)
                    keys = tiles.load(
                        head_of(key, key_strides, batch, head // group), key_strides, at, kv_len,
                        HEAD_DIM, HEAD_WIDTH,
                    )  # fmt: skip
                    values = tiles.load(
                        head_of(value, value_strides, batch, head // group), value_strides, at,
                        kv_len, VALUE_DIM, VALUE_WIDTH,
                    )  # fmt: skip
                    _, grad, _ = _gradients(
                        queries, grads, keys, values, mask_of,
                        head_of(bias, bias_strides, batch, head), seed, mask_strides, bias_strides,
                        row, at, logarithm, deltas, slope, random_head, False, q_len, kv_len,
                        offset, left, right, scale, softcap, threshold, factor, first, KEYS,
                    )  # fmt: skip
                    result += grad
    row = begin + tl.arange(0, QUERIES)
    at = key_begin + tl.arange(0, KEYS)
    rows = 1 if ALL_QUERIES else q_len
    keys_of = 1 if ALL_KEYS else kv_len
    to = grad_bias + lead.to(tl.int64) * rows * keys_of
    if ALL_QUERIES:
        if ALL_KEYS:
            tl.store(to, tl.sum(tl.sum(result, 1), 0).to(grad_bias.dtype.element_ty))
        else:
            tl.store(to + at, tl.sum(result, 0).to(grad_bias.dtype.element_ty), at < kv_len)
    elif ALL_KEYS:
        tl.store(to + row, tl.sum(result, 1).to(grad_bias.dtype.element_ty), row < q_len)
    else:
        tl.store(
            to + row.to(tl.int64)[:, None] * kv_len + at[None, :],
            result.to(grad_bias.dtype.element_ty),
            (row < q_len)[:, None] & (at < kv_len)[None, :],
        )
