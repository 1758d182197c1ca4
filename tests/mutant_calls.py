"""What mutants of CUDA kernels are tried on: small calls, by kernel; and which do no harm."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

import fastattn
from fastattn.emulator import device

F32, BF16 = torch.float32, torch.bfloat16


# the calls


def norm(dtype: torch.dtype, *sizes: tuple[int, int], dropout_p: float = 0.0) -> None:
    """Layer and RMS norm of rows of these sizes; with dropout, behind a residual."""
    for rows, cols in sizes:
        x, other = (torch.randn(rows, cols).to(dtype).requires_grad_() for _ in range(2))
        weight, bias = (torch.randn(cols).to(dtype).requires_grad_() for _ in range(2))
        if dropout_p == 0:
            fastattn.layer_norm(x, [cols], weight, bias).sum().backward()
            fastattn.rms_norm(x, [cols], weight).sum().backward()
        else:
            outs = fastattn.add_layer_norm(
                x, other, [cols], weight, bias, dropout_p=dropout_p, seed=5
            )
            sum(out.float().square().sum() for out in outs).backward()


def attend(
    dtype: torch.dtype,
    q_len: int,
    kv_len: int,
    dim: int = 64,
    aligned: bool = True,
    **options: object,
) -> None:
    """With a query that begins on a multiple of 16 bytes, or behind one."""
    query, key, value = (torch.randn(1, 1, n, dim).to(dtype) for n in (q_len, kv_len, kv_len))
    if not aligned:
        query = torch.cat([query.new_zeros(1), query.flatten()])[1:].view(query.shape)
    value[:, :, kv_len // 2] = math.nan  # makes the kernel look twice
    fastattn.attention(query, key, value, **options)


def attend_backward(
    dtype: torch.dtype,
    q_len: int,
    kv_len: int,
    dim: int = 64,
    biased: bool = False,
    **options: object,
) -> None:
    query, key, value = (torch.randn(1, 1, n, dim).to(dtype) for n in (q_len, kv_len, kv_len))
    query[:, :, q_len // 2] = value[:, :, kv_len // 2] = math.nan  # makes the kernels look twice
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    if biased:
        leaves.append(torch.randn(1, q_len, kv_len).to(dtype).requires_grad_())
        options["bias"] = leaves[-1]
    out = fastattn.attention(*leaves[:3], causal=True, **options)
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def attend_shared_bias(dtype: torch.dtype) -> None:
    """With a bias of one row, which all queries of both batches share."""
    query, key, value = (torch.randn(2, 1, n, 64).to(dtype) for n in (200, 72, 72))
    bias = torch.randn(72).to(dtype).requires_grad_()
    out = fastattn.attention(query, key, value, bias=bias)
    out.backward(torch.ones_like(out))


def attend_packed(dtype: torch.dtype, **options: object) -> None:
    """Sequences of which one has no keys, and one no queries."""
    tensors = [torch.randn(9, 1, 64).to(dtype).requires_grad_() for _ in range(3)]
    starts = torch.tensor([0, 5, 9, 9]), torch.tensor([0, 0, 6, 9])
    out = fastattn.attention_varlen(*tensors, *starts, 5, 6, **options)
    out.backward(torch.ones_like(out))


def attend_to_everything(dtype: torch.dtype, dim: int) -> None:
    attend(
        dtype, 70, 100, dim, mask=torch.rand(70, 100) < 0.7, bias=torch.randn(1, 70, 100),
        alibi_slopes=torch.rand(1), softcap=3.0, dropout_p=0.2, seed=3, causal=True,
        window=(50, 20),
    )  # fmt: skip


def on_sm90(call: Callable[[], None]) -> Callable[[], None]:
    def there() -> None:
        with device.emulating(90):
            call()

    return there


def decode(dtype: torch.dtype, length: int, dim: int = 64) -> None:
    """A few queries behind a window, with a hidden NaN on either side of it."""
    query = torch.randn(1, 2, 3, dim).to(dtype)
    caches = [torch.randn(1, 1, length, dim).to(dtype) for _ in range(2)]
    for cache in caches:
        cache[:, :, [0, length - 2]] = math.nan
    options = {"cache_seqlens": length, "causal": True, "window": (length - 4, None)}
    fastattn.attention_decode(query, *caches, **options)


def feed_forward(dtype: torch.dtype) -> None:
    """Three steps of the depth each way, none at all, aligned rows and others, all epilogues."""
    for rows, features, hidden, activation in ((70, 72, 72, "gelu"), (9, 73, 7, "silu")):
        x, up, gate = (
            torch.randn(n, features).to(dtype).requires_grad_() for n in (rows, hidden, hidden)
        )
        bias = torch.randn(hidden).to(dtype).requires_grad_()
        down = torch.randn(8, hidden).to(dtype).requires_grad_()
        gated = {"gate_weight": gate, "gate_bias": bias, "activation": activation}
        fastattn.ffn(x, up, down, bias, **gated).sum().backward()
        fastattn.linear(x, up, bias, activation).sum().backward()
    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        # Vectors, and three elements behind them; small, for large ones pass as if there were none.
        fastattn.linear(x / 8, up[:3], None, activation).sum().backward()
    for empty in ((x[:, :0], up[:, :0]), (x, up[:0]), (x[:0], up)):
        fastattn.linear(*empty).sum().backward()


def feed_forward_by_boxes() -> None:
    """Squares whole and not, for both groups of both multiprocessors; more steps than there are
    places for, each way; all that is added and kept.
    """
    for rows, features, outs in ((264, 456, 136), (456, 136, 264), (136, 264, 456)):
        x, weight = (torch.randn(n, features).bfloat16().requires_grad_() for n in (rows, outs))
        fastattn.linear(x, weight, torch.randn(outs).bfloat16(), "gelu").sum().backward()
    x, up, gate = (torch.randn(n, 72).bfloat16().requires_grad_() for n in (40, 136, 136))
    bias, down = (torch.randn(*n, 136).bfloat16().requires_grad_() for n in ((), (8,)))
    fastattn.ffn(x, up, down, bias, gate_weight=gate, gate_bias=bias).sum().backward()


def drop(dtype: torch.dtype) -> None:
    x, up, down = (torch.randn(*shape).to(dtype) for shape in ((5, 9), (67, 9), (3, 67)))
    fastattn.ffn(x, up, down, dropout_p=0.3, seed=3)


# the kernels, each with the calls that its mutants are tried on

# Rows of some lanes, of a warp and of several, more than a block has at a time.
NORMS_F32 = (
    functools.partial(norm, F32, (18, 33), (6, 161), (3, 301)),
    functools.partial(norm, F32, (10, 67), dropout_p=0.3),
)
NORMS_BF16 = (
    functools.partial(norm, BF16, (36, 256), (6, 1032)),
    functools.partial(norm, BF16, (10, 256), (6, 1032), dropout_p=0.3),
)
FORWARD_SM90 = (
    on_sm90(lambda: attend_packed(BF16)),
    on_sm90(lambda: attend(BF16, 250, 24, causal=True)),  # blocks of queries that see nothing
    on_sm90(lambda: attend(BF16, 190, 600, causal=True, window=(250, None))),  # a NaN for some
    on_sm90(lambda: attend(BF16, 70, 900, causal=True, window=(300, None))),  # none in sight
    on_sm90(lambda: attend(BF16, 37, 53, 8, aligned=False, causal=True)),
    on_sm90(lambda: attend(BF16, 600, 130)),  # several tiles for each block
)
FORWARD_EXTRA_SM90 = (
    on_sm90(lambda: attend_packed(BF16, softcap=2.0)),
    on_sm90(lambda: attend(BF16, 250, 24, softcap=2.0, causal=True)),
    on_sm90(lambda: attend_to_everything(BF16, 8)),
    on_sm90(lambda: attend(BF16, 600, 130, softcap=2.0)),  # several tiles for each block
    on_sm90(lambda: attend(BF16, 120, 300, softcap=2.0, causal=True, window=(80, None))),
    on_sm90(lambda: attend(BF16, 70, 500, softcap=2.0, causal=True, window=(150, None))),
    on_sm90(lambda: attend(BF16, 37, 53, 8, aligned=False, dropout_p=0.1, seed=1, causal=True)),
)
GRADIENTS_SM90 = (
    on_sm90(lambda: attend_packed(BF16)),
    on_sm90(lambda: attend_backward(BF16, 200, 300)),
    on_sm90(lambda: attend_backward(BF16, 20, 300, align="top_left")),
    on_sm90(lambda: attend_backward(BF16, 300, 20)),
    on_sm90(lambda: attend_backward(BF16, 300, 300, window=(100, None))),  # a NaN for some
)
GRADIENTS_EXTRA_SM90 = (
    on_sm90(lambda: attend_packed(BF16, dropout_p=0.1, seed=1)),
    on_sm90(lambda: attend_backward(BF16, 200, 304, biased=True)),
    on_sm90(lambda: attend_backward(BF16, 70, 100, biased=True)),  # rows of a bias that are not
    on_sm90(lambda: attend_backward(BF16, 20, 300, align="top_left", softcap=2.0)),
    on_sm90(lambda: attend_backward(BF16, 300, 20, dropout_p=0.1, seed=1)),
    on_sm90(lambda: attend_backward(BF16, 300, 300, window=(100, None), dropout_p=0.1, seed=1)),
)
BIAS_SM90 = (
    on_sm90(lambda: attend_backward(BF16, 200, 304, biased=True)),
    on_sm90(lambda: attend_backward(BF16, 70, 100, biased=True, dropout_p=0.1, seed=1)),
    on_sm90(lambda: attend_shared_bias(BF16)),
)
GRADIENTS_BF16 = (
    functools.partial(attend_backward, BF16, 70, 100),
    functools.partial(attend_backward, BF16, 70, 100, dropout_p=0.1, seed=1),
    functools.partial(attend_backward, BF16, 20, 100, align="top_left"),  # keys that nobody sees
    functools.partial(attend_backward, BF16, 140, 20),  # queries that see nothing
    functools.partial(attend_backward, BF16, 37, 53, 8),
    functools.partial(attend_backward, BF16, 37, 53, 9),
    lambda: attend_backward(BF16, 70, 100, mask=torch.rand(70, 100) < 0.7),
    functools.partial(attend_packed, BF16),
)
BIAS_BF16 = (
    functools.partial(attend_backward, BF16, 70, 100, biased=True),
    functools.partial(attend_backward, BF16, 70, 100, biased=True, dropout_p=0.1, seed=1),
    functools.partial(attend_backward, BF16, 37, 53, 8, biased=True),
    functools.partial(attend_backward, BF16, 37, 53, 9, biased=True),
)
DECODE_BF16 = (  # in several rounds, in less than one, and without copies of 16 bytes
    functools.partial(decode, BF16, 150, 8),
    functools.partial(decode, BF16, 10),
    functools.partial(decode, BF16, 90, 9),
)
FFN_SM90 = (on_sm90(feed_forward_by_boxes),)
FFN_F32, FFN_BF16 = functools.partial(feed_forward, F32), functools.partial(feed_forward, BF16)

KERNELS: dict[str, tuple[Callable[[], None], ...]] = {
    "norm_forward_f32_x1": NORMS_F32,
    "norm_backward_f32_x1": NORMS_F32,
    "norm_fold_f32": (lambda: norm(F32, (600, 33)), lambda: norm(F32, (3, 64))),
    "norm_forward_bf16_x8": NORMS_BF16,
    "norm_forward_plain_bf16_x8": NORMS_BF16,
    "norm_backward_bf16_x8": NORMS_BF16,
    "attention_forward_bf16_64": (
        lambda: attend(BF16, 70, 200, causal=True),
        lambda: attend(BF16, 160, 20, 8, causal=True),
        lambda: attend(BF16, 37, 53, 9),
        lambda: attend_packed(BF16),
    ),
    "attention_forward_bf16_extra_64": (
        lambda: attend_to_everything(BF16, 8),
        lambda: attend_to_everything(BF16, 9),
        lambda: attend(BF16, 160, 20, mask=torch.ones(160, 20, dtype=torch.bool), causal=True),
        lambda: attend(BF16, 37, 53, 9, dropout_p=0.1, seed=1),
    ),
    "attention_forward_f32_extra_32": (
        lambda: attend_to_everything(F32, 8),
        lambda: attend_to_everything(F32, 5),
        lambda: attend(F32, 140, 20, 4, causal=True),
        lambda: attend(F32, 37, 53, 5),
    ),
    "attention_forward_bf16_64_sm90": FORWARD_SM90,
    "attention_forward_bf16_extra_64_sm90": FORWARD_EXTRA_SM90,
    "attention_backward_queries_bf16_64_sm90": GRADIENTS_SM90,
    "attention_backward_keys_bf16_64_sm90": GRADIENTS_SM90,
    "attention_backward_queries_bf16_extra_64_sm90": GRADIENTS_EXTRA_SM90,
    "attention_backward_keys_bf16_extra_64_sm90": GRADIENTS_EXTRA_SM90,
    "attention_backward_bias_bf16_64_sm90": BIAS_SM90,
    "attention_backward_queries_bf16_64": GRADIENTS_BF16,
    "attention_backward_keys_bf16_64": GRADIENTS_BF16,
    "attention_backward_bias_bf16_64": BIAS_BF16,
    "attention_decode_bf16_64": DECODE_BF16,
    "attention_combine_bf16": DECODE_BF16,
    "ffn_forward_f32": (FFN_F32,),
    "ffn_grad_input_f32": (FFN_F32,),
    "ffn_grad_weight_f32": (FFN_F32,),
    "ffn_activation_backward_f32": (FFN_F32,),
    "ffn_drop_f32": (functools.partial(drop, F32),),
    "ffn_sum_columns_f32_to_f32": (FFN_F32,),
    "ffn_forward_bf16": (FFN_BF16,),
    "ffn_grad_input_bf16": (FFN_BF16,),
    "ffn_grad_weight_bf16": (FFN_BF16,),
    "ffn_forward_bf16_sm90": FFN_SM90,
    "ffn_grad_input_bf16_sm90": FFN_SM90,
    "ffn_grad_weight_bf16_sm90": FFN_SM90,
}

# What attention for sm_90 does twice in its pass over values that are no numbers: around their
# removal, and before the products that follow; forward, and for gradients.
TWICE = (
    *(f"fence.proxy.async.shared::cta: {n} of 8" for n in range(5, 9)),
    *(f"wgmma.wait_group.sync.aligned{how}: 9 of 10" for how in ("", " loosened")),
    *(f"fence.proxy.async.shared::cta: {n} of 6" for n in (3, 4, 6)),
    *(f"cp.async.wait_all: {n} of 7" for n in (4, 5, 6)),
    *(f"bar.sync: {n} of 9" for n in (6, 7)),
)

# Of the waits of attention's forward kernels on sm_90, in the order of their PTX.
IMPLIED = {
    (1, 5): "for room for a tile's keys, which the tile before needs no more than its queries",
    (8,): "for room for the queries of a second tile, where a block has one: it looks again only"
    " where tiles are not alike, and then the GPU deals them out",
    (11, 17): "for the next keys: beside it values are waited for, which are copied behind them",
    (18, 20): "for values that a careful look has waited for",
}

# Mutants which do no harm, by words of what they are; the bounds in csrc/attention, which say what
# is visible and not what may be touched, are left to the tests of masks and windows.
HARMLESS: dict[tuple[str, ...], str] = {
    ("n * size * V < cols", "loosened"): "draws for columns that there are not",
    ("bits >> i & 1", "gt loosened"): "a bit that is asked for by a sign",
    ("rows.finish(", "loosened"): "a sum of which nothing is made",
    ("at < (whole ? 1 : vectors)", "loosened"): "a round more, in which no lane is inside",
    ("if (apart < lanes)", "lt loosened"): "teams of 3, 5, 9 or 17 threads, which there are not",
    ("if (size <= int{kWarp})", "lt loosened"): "the same, of 33 threads",
    ("norm_forward_f32_x1", "lt loosened", " vectors)", "load_all("): "a register that nothing was"
    " loaded to, which is zero here, in a sum",
    ("row - threadIdx.y < in.rows", "loosened"): "a turn more, in which no team has a row",
    ("other < threads", "ge loosened"): "of the first team, which is always there",
    ("first < in.parts", "loosened"): "a round more, in which no part is inside",
    ("if (step < steps) fetch(step", "loosened"): "a copy more, of zeros that nobody reads",
    ("const bool inside = first_row", "loosened"): "a warp more, whose sums nobody stores",
    ("return typename Right::Lines", "lt loosened"): "line 32 of 64, where lines are below 32",
    ("c < cols; c += 4", "loosened"): "columns more, which are zeros",
    ("i < Rows * Place::kCols", "gt loosened"): "no thread begins so far behind",
    (
        "i < Rows * Place::kCols",
        "lt loosened",
    ): "an element behind the tile, which the same thread copies next if it is read",
    (
        "attention_forward_f32",
        "copies of all",
    ): "what is copied for zeros is not visible, or unread",
    (
        "attention_backward_keys",
        "copies of all",
    ): "what is copied for rows past the end has weight 0",
    ("copies of all", "at<E>(query, key)"): "a bias past the ends is that of nothing visible",
    ("at + 4 <= in.size", "loosened"): "the last four elements go one by one",
    ("count > 0 ? at : from.data", "loosened"): "the address of a copy of no bytes",
    ("_sm90", "fence.mbarrier_init"): "the emulator's copy engine sees what threads see",
    ("i < squares", "ge loosened"): "a block behind the last square, which there is not",
    ("Square(in, width, i)", "lt loosened"): "the lesser of two that are equal",
    ("switch (static_cast<Activation>", "gt loosened"): "an activation that there is not",
    (
        "attention_backward_queries_bf16_64: gt loosened",
        "lane_index() {",
    ): "`first + count <= rows` of Band::whole, by the compiler's account on this line: rows that"
    " end with the queries are asked one by one, and none is hidden",
    (
        "_extra_64_sm90: gt loosened",
        "anew(steps)",
    ): "the loop of `clean`, by the compiler's account on this line: no thread is beyond its end",
    ("ffn_grad_weight_bf16_sm90", "ge loosened", "finish<"): "nothing is added to this gradient",
    **{("_sm90", words): "what is done twice is needed once" for words in TWICE},
    ("_sm90", "wait_group", ": 6 of 10"): "in front of a first block, no product is under way",
    ("_sm90", "loosened", "store<"): "rows of results are whole 16 bytes, as those of values",
    ("_sm90", "loosened", "store_rows<"): "the same",
    ("_sm90", "bar.warp.sync"): "lanes of a warp meet at its next shuffle or product, too",
    **{
        (
            f"forward_bf16_{kernel}_sm90",
            f"without mbarrier.try_wait.parity.shared::cta.b64: {n} of 20",
        ): why
        for kernel in ("64", "extra_64")
        for numbers, why in IMPLIED.items()
        for n in numbers
    },
    ("_sm90", "take_turn"): "turns make a kernel fast, and not right",
    **{
        (f"forward_bf16_{kernel}_sm90", f"without mbarrier.arrive.shared::cta.b64: {n} of 20"): "at"
        " the end nobody waits for it, or a block that looks again has keys"
        for kernel, numbers in (("64", (18, 19, 20)), ("extra_64", (15, 19, 20)))
        for n in numbers
    },
}
