// The activations that the ffn room knows.
#pragma once

namespace fastattn {

enum class Activation : int { identity, relu, gelu, gelu_tanh, silu };

}  // namespace fastattn
