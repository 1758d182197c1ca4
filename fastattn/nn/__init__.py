"""Drop-in modules with the arguments and the state dicts of torch.nn's own, and two beside them."""

from fastattn.nn.additive_attention import AdditiveAttention
from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.feed_forward import FeedForward
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "AdditiveAttention",
    "FeedForward",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
