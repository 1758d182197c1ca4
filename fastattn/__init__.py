"""fastattn: fused attention, layer-norm and FFN kernels for PyTorch, training included."""

from fastattn._library import isa
from fastattn.dispatch import Choice, UnavailableKernelError, backends, use_kernel
from fastattn.ops.additive_attention import additive_attention
from fastattn.ops.attention import attention, scaled_dot_product_attention
from fastattn.ops.attention.decode import attention_decode
from fastattn.ops.attention.varlen import attention_varlen
from fastattn.ops.attention.weights import attention_weights
from fastattn.ops.ffn import ffn, linear
from fastattn.ops.loss import linear_cross_entropy
from fastattn.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastattn.ops.rope import apply_rope
from fastattn.registry import explain

from fastattn import nn  # isort: skip  last, for the modules are made of the functions above
from fastattn.integrations.patch import patch, unpatch  # isort: skip  and this of the modules

__version__ = "0.1.0"

__all__ = [
    "Choice",
    "UnavailableKernelError",
    "add_layer_norm",
    "add_rms_norm",
    "additive_attention",
    "apply_rope",
    "attention",
    "attention_decode",
    "attention_varlen",
    "attention_weights",
    "backends",
    "explain",
    "ffn",
    "isa",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "nn",
    "patch",
    "rms_norm",
    "scaled_dot_product_attention",
    "unpatch",
    "use_kernel",
]
