"""The cases of every public function, a file for each room of operations."""

from __future__ import annotations

from fastattn.testing.case import Case
from fastattn.testing.rooms.additive_attention import additive_attention_cases
from fastattn.testing.rooms.attention import (
    attention_cases,
    decode_cases,
    scaled_dot_product_cases,
    varlen_cases,
)
from fastattn.testing.rooms.ffn import ffn_cases, linear_cases
from fastattn.testing.rooms.loss import loss_cases
from fastattn.testing.rooms.norm import norm_cases
from fastattn.testing.rooms.rope import rope_cases

_TABLE = {
    "attention": attention_cases,
    "attention_varlen": varlen_cases,
    "attention_decode": decode_cases,
    "scaled_dot_product_attention": scaled_dot_product_cases,
    "additive_attention": additive_attention_cases,
    "layer_norm": norm_cases,
    "add_layer_norm": norm_cases,
    "rms_norm": norm_cases,
    "add_rms_norm": norm_cases,
    "linear": linear_cases,
    "linear_cross_entropy": loss_cases,
    "ffn": ffn_cases,
    "apply_rope": rope_cases,
}


def cases(function: str) -> list[Case]:
    """The cases of one public function; none for a function that the table does not know."""
    return list(_TABLE[function](function)) if function in _TABLE else []


def all_cases() -> list[Case]:
    """The cases of every public function."""
    return [case for function in _TABLE for case in cases(function)]
