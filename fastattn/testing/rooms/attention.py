"""Cases of attention: padded, packed, and with a cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import accumulate
from typing import Any

from fastattn.testing.case import Case
from fastattn.testing.inputs import Draw, numbers

USUAL = (2, 3, 3, 70, 130, 32, 32)


def padded(
    function: str,
    name: str,
    sizes: tuple[int, int, int, int, int, int, int],
    *,
    vanishing: tuple[str, ...] = (),
    refused: str = "",
    tensors: Mapping[str, Draw] | None = None,
    **options: Any,
) -> Case:
    """A case of queries [B, H, Sq, D], keys [B, Hkv, Sk, D] and values [B, Hkv, Sk, Dv]."""
    batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim = sizes
    drawn = {
        "query": Draw((batch, heads, q_len, head_dim)),
        "key": Draw((batch, kv_heads, kv_len, head_dim)),
        "value": Draw((batch, kv_heads, kv_len, value_dim)),
    }
    return Case(function, name, drawn | dict(tensors or {}), options, vanishing, refused)


def scaled_dot_product_cases(function: str) -> Iterator[Case]:
    """PyTorch's own arguments, which become those of attention."""
    case = partial(padded, function)
    yield case("plain", USUAL)
    yield case("causal", (2, 2, 2, 50, 110, 24, 40), is_causal=True)
    yield case("bool_mask", USUAL, tensors={"attn_mask": Draw((2, 1, 70, 130), "mask")})
    yield case("float_mask", USUAL, tensors={"attn_mask": Draw((70, 130), "holes")})
    yield case("grouped", (2, 4, 2, 33, 65, 16, 16), enable_gqa=True, scale=0.3)
    yield Case(
        function,
        "three_dimensions",
        {
            "query": Draw((5, 40, 16)),
            "key": Draw((5, 55, 16)),
            "value": Draw((5, 55, 24)),
            "attn_mask": Draw((40, 55)),
        },
    )
    yield case("no_batch", (0, 2, 2, 5, 5, 8, 8), refused="empty")


def attention_cases(function: str) -> Iterator[Case]:
    """Every argument, and lengths on both sides of the sizes of tiles."""
    case = partial(padded, function)
    yield case("plain", USUAL)
    yield case("one_row", (2, 4, 4, 1, 65, 32, 32), return_lse=True)
    yield case("one_key", (2, 3, 3, 65, 1, 16, 24), vanishing=("query", "key"))
    yield case("odd_sizes", (3, 5, 1, 37, 53, 7, 13))
    yield case("one_feature", (2, 2, 2, 66, 70, 1, 1))
    yield case("long", (1, 1, 1, 200, 1100, 32, 16), return_lse=True)
    yield case("causal", (1, 3, 3, 197, 197, 32, 32), causal=True)
    yield case("causal_short", (2, 2, 2, 60, 200, 16, 16), causal=True)
    yield case("causal_tall", (2, 2, 2, 200, 60, 16, 16), causal=True, return_lse=True)
    yield case("causal_top_left", (2, 2, 2, 60, 200, 16, 16), causal=True, align="top_left")
    yield case("window", (2, 2, 2, 150, 210, 16, 16), window=(9, 4))
    yield case("window_causal", (1, 2, 2, 250, 250, 16, 16), window=(70, None), causal=True)
    yield case("grouped", (2, 6, 2, 70, 130, 32, 24), causal=True)
    yield case("mask", USUAL, tensors={"mask": Draw((2, 1, 70, 130), "mask")}, return_lse=True)
    yield case("padding", USUAL, tensors={"mask": Draw((2, 1, 1, 130), "mask")})
    yield case("bias", USUAL, tensors={"bias": Draw((2, 3, 70, 130), "holes")})
    yield case("bias_of_heads", USUAL, tensors={"bias": Draw((3, 70, 130))}, causal=True)
    yield case("bias_of_batch", USUAL, tensors={"bias": Draw((3, 70, 130))})
    yield case("bias_of_keys", USUAL, tensors={"bias": Draw((2, 1, 1, 130), "fp32")})
    yield case("bias_of_rows", USUAL, tensors={"bias": Draw((1, 3, 70, 1))}, vanishing=("bias",))
    yield case("relative_bias", USUAL, tensors={"relative_bias": Draw((3, 199))})
    yield case(
        "relative_bias_of_batch",
        (2, 4, 2, 130, 450, 24, 16),
        tensors={"relative_bias": Draw((2, 1, 579), "holes")},
        causal=True,
        dropout_p=0.2,
        seed=7,
    )
    yield case(
        "both_biases",
        USUAL,
        tensors={"bias": Draw((2, 1, 70, 130)), "relative_bias": Draw((199,), "fp32")},
    )
    yield case("alibi", USUAL, tensors={"alibi_slopes": Draw((3,), "slopes")}, causal=True)
    yield case("sinks", (2, 64, 32, 20, 40, 16, 16), tensors={"sinks": Draw((64,))}, causal=True)
    yield case("softcap", USUAL, softcap=1.5)
    yield case("dropout", USUAL, dropout_p=0.3, seed=2**62 + 12345)
    yield case("negative_scale", USUAL, scale=-0.4)
    yield case(
        "everything",
        (2, 4, 2, 130, 210, 24, 40),
        tensors={
            "mask": Draw((2, 1, 130, 210), "mask"),
            "bias": Draw((4, 130, 210), "fp32"),
            "alibi_slopes": Draw((2, 4), "slopes"),
        },
        causal=True,
        window=(150, None),
        softcap=4.0,
        dropout_p=0.2,
        seed=7,
        return_lse=True,
    )
    yield case("no_batch", (0, 2, 2, 5, 7, 8, 8), refused="empty", return_lse=True)
    yield case("no_queries", (2, 2, 2, 0, 7, 8, 8), refused="empty", return_lse=True)
    yield case("no_keys", (2, 2, 2, 5, 0, 8, 8), refused="empty", return_lse=True)


def varlen_cases(function: str) -> Iterator[Case]:
    """Sequences that are long, short and empty, side by side."""

    def case(
        name: str,
        q_lens: tuple[int, ...],
        kv_lens: tuple[int, ...],
        sizes: tuple[int, int, int, int],
        *,
        refused: str = "",
        tensors: Mapping[str, Draw] | None = None,
        **options: Any,
    ) -> Case:
        heads, kv_heads, head_dim, value_dim = sizes
        drawn = {
            "query": Draw((sum(q_lens), heads, head_dim), "distinct"),
            "key": Draw((sum(kv_lens), kv_heads, head_dim), "distinct"),
            "value": Draw((sum(kv_lens), kv_heads, value_dim), "distinct"),
            "cu_seqlens_q": numbers(0, *accumulate(q_lens)),
            "cu_seqlens_k": numbers(0, *accumulate(kv_lens)),
        }
        return Case(function, name, drawn | dict(tensors or {}), options, refused=refused)

    lengths = (5, 70, 1, 33)
    yield case("plain", lengths, lengths, (3, 3, 16, 16))
    yield case("causal", lengths, lengths, (2, 2, 16, 16), causal=True, max_seqlen_q=70)
    yield case("one_sequence", (70,), (130,), (2, 1, 24, 24), return_lse=True)
    yield case("no_rows", (0, 40, 0, 3, 7), (9, 0, 0, 50, 8), (2, 2, 16, 8), return_lse=True)
    yield case("long_and_short", (3, 900, 2), (2, 800, 5), (1, 1, 16, 16), causal=True)
    yield case(
        "everything",
        (20, 61, 0, 130),
        (50, 61, 3, 100),
        (4, 2, 24, 40),
        tensors={"alibi_slopes": Draw((4, 4), "slopes"), "sinks": Draw((4,))},
        causal=True,
        align="top_left",
        window=(40, None),
        softcap=4.0,
        dropout_p=0.2,
        seed=7,
        return_lse=True,
    )
    yield case("nothing", (0, 0), (0, 4), (2, 2, 8, 8), refused="empty", return_lse=True)


def decode_cases(function: str) -> Iterator[Case]:
    """Caches that are full, nearly empty and paged, with and without new keys."""

    def case(
        name: str,
        lengths: tuple[int, ...],
        sizes: tuple[int, int, int, int, int, int],
        *,
        page: int | None = None,
        new: int = 0,
        rotary: int = 0,
        refused: str = "",
        tensors: Mapping[str, Draw] | None = None,
        **options: Any,
    ) -> Case:
        heads, kv_heads, q_len, room, head_dim, value_dim = sizes
        batch = len(lengths)
        lead = (batch, kv_heads, room)
        drawn = {"query": Draw((batch, heads, q_len, head_dim))}
        if page is not None:
            columns = -(-room // page)
            lead = (batch * columns + 1, kv_heads, page)  # one page that nobody owns
            table = [n * 7 % lead[0] for n in range(1, lead[0])]  # 7 divides no such number here
            drawn["block_table"] = Draw((batch, columns), "numbers", tuple(table))
        drawn |= {
            "key_cache": Draw((*lead, head_dim), "distinct"),
            "value_cache": Draw((*lead, value_dim), "distinct"),
            "cache_seqlens": numbers(*lengths),
        }
        if new:
            drawn["key"] = Draw((batch, kv_heads, new, head_dim))
            drawn["value"] = Draw((batch, kv_heads, new, value_dim))
        if rotary:
            drawn["rotary_cos"] = drawn["rotary_sin"] = Draw((room, rotary))
        written = ("key_cache", "value_cache") if new else ()
        drawn |= tensors or {}
        return Case(function, name, drawn, options, (), refused, written, inference=True)

    yield case("plain", (300, 7, 1), (4, 4, 1, 300, 32, 32), return_lse=True)
    yield case("grouped", (520, 260), (12, 2, 1, 530, 40, 24), new=1)
    yield case("few_queries", (600, 0, 255), (6, 2, 4, 700, 32, 16), new=4, causal=True)
    yield case("paged", (70, 33, 0), (4, 2, 2, 90, 16, 16), page=16, new=3, return_lse=True)
    yield case("rotary", (40, 9), (4, 1, 3, 50, 24, 8), new=3, rotary=10, rotary_interleaved=False)
    yield case("prompt", (0, 30), (4, 2, 25, 60, 16, 16), new=25, causal=True, return_lse=True)
    yield case(
        "chunk",
        (40, 3),
        (4, 2, 12, 70, 16, 8),
        page=8,
        new=12,
        rotary=6,
        rotary_interleaved=False,
        causal=True,
        return_lse=True,
    )
    yield case("window", (900, 30), (2, 1, 2, 900, 16, 16), window=(300, 0), softcap=2.0)
    yield case("odd_sizes", (37, 11), (5, 5, 3, 37, 7, 13), scale=-0.4)
    yield case(
        "everything",
        (500, 3),
        (8, 2, 3, 510, 48, 40),
        page=9,
        new=5,
        rotary=20,
        rotary_interleaved=True,
        tensors={"alibi_slopes": Draw((2, 8), "slopes"), "sinks": Draw((8,))},
        causal=True,
        window=(400, None),
        softcap=4.0,
        return_lse=True,
    )
    yield case("no_keys", (0, 0), (2, 2, 1, 0, 8, 8), refused="empty", return_lse=True)
