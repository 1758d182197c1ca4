// The torch ops of the ffn room: linear and ffn, forward and backward.
#include "common/tensor.h"
#include "ffn/ffn.h"

namespace fastattn {
namespace {

Activation activation_of(StringHandle argument) {
  const std::string name = taken(argument);
  static const std::pair<const char*, Activation> known[] = {{"identity", Activation::identity},
                                                             {"relu", Activation::relu},
                                                             {"gelu", Activation::gelu},
                                                             {"gelu_tanh", Activation::gelu_tanh},
                                                             {"silu", Activation::silu}};
  for (const auto& [spelling, activation] : known)
    if (name == spelling) return activation;
  FASTATTN_CHECK(false, "activation '", name, "' is unknown");
}

// Where a weight lies, row by row or, on the CPU, column by column.
Weight placed(const Tensor& weight) { return {weight.const_data_ptr(), !weight.is_contiguous()}; }

// Checks a projection of `in` features; returns its number of output features.
int64_t checked(const char* name, const Tensor& weight, const OptionalTensor& bias, int64_t in,
                Dtype dtype) {
  FASTATTN_CHECK(weight.dim() == 2 && weight.size(1) == in, name,
                 " has not the shape that the others ask for");
  check_dtype(name, weight, dtype);
  const int64_t out = weight.size(0);
  FASTATTN_CHECK(weight.is_contiguous() || (!on_gpu(place_of(weight)) && weight.stride(0) == 1 &&
                                            weight.stride(1) == out),
                 name, " must be contiguous, or on the CPU the transpose of what is");
  if (bias.has_value()) {
    check_sizes("bias", *bias, {out});
    check_dtype("bias", *bias, dtype);
  }
  return out;
}

void* write(const Tensor& tensor, bool wanted) {
  return wanted ? tensor.mutable_data_ptr() : nullptr;
}

// The rows of the input, whose dtype the kernels of its place must know.
int64_t checked_rows(const Tensor& input, Dtype dtype) {
  FASTATTN_CHECK(dtype != Dtype::f64 || !on_gpu(place_of(input)), "no CUDA kernel takes fp64");
  return rows_of("input", input);
}

// A gradient to be written, laid out as `tensor`, or an empty tensor where none is wanted.
Tensor gradient(const OptionalTensor& tensor, bool wanted, Dtype dtype, Place place) {
  if (!wanted || !tensor.has_value()) return empty(0, dtype, place);
  if (tensor->is_contiguous()) return empty_like(*tensor, dtype);
  return empty({tensor->size(0), tensor->size(1)}, {1, tensor->size(0)}, dtype, place);
}

// [rows, columns] for what forward keeps, or an empty tensor where it keeps nothing.
Tensor kept(const Tensor& rows, int64_t columns, bool wanted, Dtype dtype) {
  return wanted ? empty_rows(rows, columns, dtype) : empty(0, dtype, place_of(rows));
}

// The kernels, each on the device of its tensors.
#define FASTATTN_PLACED(name, Args) \
  void name(Place place, const Args& args) { run(place, args, fastattn::name, cuda::name); }
FASTATTN_PLACED(linear_forward, LinearForward)
FASTATTN_PLACED(gated_forward, GatedForward)
FASTATTN_PLACED(drop, Drop)
FASTATTN_PLACED(activation_backward, ActivationBackward)
FASTATTN_PLACED(linear_backward, LinearBackward)

// The projection, and in `pre`, where that is not null, what it was before its activation.
Tensor project(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
               Activation kind, Tensor* pre) {
  const Dtype dtype = dtype_of(input);
  const int64_t rows = checked_rows(input, dtype), in = input.size(input.dim() - 1);
  const int64_t features = checked("weight", weight, bias, in, dtype);
  Tensor out = empty_rows(input, features, dtype);
  if (pre != nullptr) *pre = empty_rows(input, features, dtype);
  linear_forward(place_of(input), {dtype, rows, in, features, input.const_data_ptr(),
                                   placed(weight), read(bias), kind, out.mutable_data_ptr(),
                                   pre == nullptr ? nullptr : pre->mutable_data_ptr()});
  return out;
}

std::tuple<Tensor, Tensor> linear_fwd(Tensor input, Tensor weight, OptionalTensor bias,
                                      StringHandle activation, bool save) {
  const Activation kind = activation_of(activation);
  Tensor pre = empty(0, dtype_of(input), place_of(input));
  Tensor out =
      project(input, weight, bias, kind, save && kind != Activation::identity ? &pre : nullptr);
  return {out, pre};
}

// What a plain call asks for.
Tensor linear(Tensor input, Tensor weight, OptionalTensor bias, StringHandle activation) {
  return project(contiguous_on_cpu("input", input), weight, bias, activation_of(activation),
                 nullptr);
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(Tensor grad_out, Tensor input, Tensor weight,
                                              OptionalTensor bias, Tensor pre,
                                              StringHandle activation, bool need_input,
                                              bool need_weight, bool need_bias) {
  const Dtype dtype = dtype_of(input);
  const Place place = place_of(input);
  const int64_t rows = checked_rows(input, dtype), in = input.size(input.dim() - 1);
  const int64_t features = checked("weight", weight, bias, in, dtype);
  check_rows("grad_out", grad_out, rows, features);
  check_dtype("grad_out", grad_out, dtype);
  const Activation kind = activation_of(activation);
  Tensor grad_pre = grad_out;
  if (kind != Activation::identity) {
    check_rows("pre", pre, rows, features);
    check_dtype("pre", pre, dtype);
    grad_pre = empty(rows, features, dtype, place);
    activation_backward(
        place, {dtype, rows * features, grad_out.const_data_ptr(), pre.const_data_ptr(), nullptr,
                kind, grad_pre.mutable_data_ptr(), nullptr, nullptr});
  }
  need_bias = need_bias && bias.has_value();
  Tensor grad_input = gradient(input, need_input, dtype, place);
  Tensor grad_weight = gradient(weight, need_weight, dtype, place);
  Tensor grad_bias = gradient(bias, need_bias, dtype, place);
  linear_backward(place,
                  {dtype, rows, in, features, grad_pre.const_data_ptr(), input.const_data_ptr(),
                   placed(weight), nullptr, write(grad_input, need_input),
                   write(grad_weight, need_weight), write(grad_bias, need_bias)});
  return {grad_input, grad_weight, grad_bias};
}

// What both directions of a feed-forward block take, checked.
struct Block {
  const Tensor &input, &up_weight;
  const OptionalTensor &up_bias, &gate_weight, &gate_bias;
  const Tensor& down_weight;
  const OptionalTensor& down_bias;
  Dtype dtype = dtype_of(input);
  Place place = place_of(input);
  int64_t rows = checked_rows(input, dtype), in = input.size(input.dim() - 1);
  int64_t features, out_features;
  bool gated = gate_weight.has_value();
  Activation activation;
  double dropout_p;
  Seed seed;

  Block(const Tensor& input, const Tensor& up_weight, const OptionalTensor& up_bias,
        const OptionalTensor& gate_weight, const OptionalTensor& gate_bias,
        const Tensor& down_weight, const OptionalTensor& down_bias, const OptionalTensor& seed,
        StringHandle activation, double dropout_p)
      : input(input),
        up_weight(up_weight),
        up_bias(up_bias),
        gate_weight(gate_weight),
        gate_bias(gate_bias),
        down_weight(down_weight),
        down_bias(down_bias),
        features(checked("up_weight", up_weight, up_bias, in, dtype)),
        out_features(checked("down_weight", down_weight, down_bias, features, dtype)),
        activation(activation_of(activation)),
        dropout_p(dropout_p),
        seed(checked_seed(dropout_p, seed, place)) {
    FASTATTN_CHECK(!gated || checked("gate_weight", *gate_weight, gate_bias, in, dtype) == features,
                   "gate_weight must have as many rows as up_weight");
    FASTATTN_CHECK(gated || !gate_bias.has_value(), "gate_bias needs a gate_weight");
    FASTATTN_CHECK(dropout_p == 0 || rows >> 32 == 0, "dropout counts up to 2^32 rows");
  }

  // The output; what is projected goes to `up` and `gate` too, where they are not null.
  Tensor forward(void* up, void* gate) const {
    const bool few = rows < 32;  // which the products take as they are
    if (!on_gpu(place) && !few && up == nullptr && dropout_p == 0) {
      Tensor out = empty_rows(input, out_features, dtype);
      feed_forward({dtype, rows, in, features, out_features, input.const_data_ptr(),
                    placed(up_weight), read(up_bias),
                    gated ? placed(*gate_weight) : Weight{nullptr, false}, read(gate_bias),
                    activation, placed(down_weight), read(down_bias), out.mutable_data_ptr()});
      return out;
    }
    Tensor hidden = empty(rows, features, dtype, place);
    if (gated) {
      gated_forward(place, {dtype, rows, in, features, input.const_data_ptr(), placed(up_weight),
                            read(up_bias), placed(*gate_weight), read(gate_bias), activation,
                            hidden.mutable_data_ptr(), up, gate});
    } else {
      linear_forward(place, {dtype, rows, in, features, input.const_data_ptr(), placed(up_weight),
                             read(up_bias), activation, hidden.mutable_data_ptr(), up});
    }
    drop_out(hidden);
    Tensor out = empty_rows(input, out_features, dtype);
    linear_forward(
        place, {dtype, rows, features, out_features, hidden.const_data_ptr(), placed(down_weight),
                read(down_bias), Activation::identity, out.mutable_data_ptr(), nullptr});
    return out;
  }

  void drop_out(const Tensor& x) const {
    if (dropout_p > 0)
      drop(place,
           {dtype, rows, features, x.mutable_data_ptr(), dropout_p, seed.value, seed.address});
  }

  // What forward has kept of a projection, or the same again.
  Tensor kept_or_again(const char* name, const Tensor& kept, const Tensor& weight,
                       const OptionalTensor& bias) const {
    if (kept.numel() > 0) {
      check_rows(name, kept, rows, features);
      check_dtype(name, kept, dtype);
      return kept;
    }
    Tensor again = empty(rows, features, dtype, place);
    linear_forward(place, {dtype, rows, in, features, input.const_data_ptr(), placed(weight),
                           read(bias), Activation::identity, again.mutable_data_ptr(), nullptr});
    return again;
  }
};

std::tuple<Tensor, Tensor, Tensor> ffn_fwd(Tensor input, Tensor up_weight, OptionalTensor up_bias,
                                           OptionalTensor gate_weight, OptionalTensor gate_bias,
                                           Tensor down_weight, OptionalTensor down_bias,
                                           OptionalTensor seed, StringHandle activation,
                                           double dropout_p, bool save) {
  const Block of(input, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias, seed,
                 activation, dropout_p);
  Tensor up = kept(input, of.features, save, of.dtype);
  Tensor gate = kept(input, of.features, save && of.gated, of.dtype);
  Tensor out = of.forward(write(up, save), write(gate, save && of.gated));
  return {out, up, gate};
}

// What a plain call asks for.
Tensor ffn(Tensor any, Tensor up_weight, Tensor down_weight, OptionalTensor up_bias,
           OptionalTensor down_bias, OptionalTensor gate_weight, OptionalTensor gate_bias,
           StringHandle activation) {
  const Tensor input = contiguous_on_cpu("input", any);
  const Block of(input, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias,
                 std::nullopt, activation, 0);
  return of.forward(nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffn_bwd(
    Tensor grad_out, Tensor input, Tensor up_weight, OptionalTensor up_bias,
    OptionalTensor gate_weight, OptionalTensor gate_bias, Tensor down_weight,
    OptionalTensor down_bias, OptionalTensor seed, Tensor up, Tensor gate, StringHandle activation,
    double dropout_p, bool need_input, bool need_up_weight, bool need_up_bias,
    bool need_gate_weight, bool need_gate_bias, bool need_down_weight, bool need_down_bias) {
  const Block of(input, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias, seed,
                 activation, dropout_p);
  const Dtype dtype = of.dtype;
  const Place place = of.place;
  const int64_t rows = of.rows, in = of.in, features = of.features;
  check_rows("grad_out", grad_out, rows, of.out_features);
  check_dtype("grad_out", grad_out, dtype);
  need_up_bias = need_up_bias && up_bias.has_value();
  need_gate_weight = need_gate_weight && of.gated;
  need_gate_bias = need_gate_bias && gate_bias.has_value();
  need_down_bias = need_down_bias && down_bias.has_value();
  const bool below = need_input || need_up_weight || need_up_bias || need_gate_weight ||
                     need_gate_bias || need_down_weight;

  Tensor grad_down_weight = gradient(down_weight, need_down_weight, dtype, place);
  Tensor grad_down_bias = gradient(down_bias, need_down_bias, dtype, place);
  Tensor grad_up_weight = gradient(up_weight, need_up_weight, dtype, place);
  Tensor grad_up_bias = gradient(up_bias, need_up_bias, dtype, place);
  Tensor grad_gate_weight = gradient(gate_weight, need_gate_weight, dtype, place);
  Tensor grad_gate_bias = gradient(gate_bias, need_gate_bias, dtype, place);
  Tensor grad_input = gradient(input, need_input, dtype, place);

  // What backward computes of the hidden layer; each in the memory of what it is computed from,
  // where that is nobody else's.
  const Tensor none = empty(0, dtype, place);
  Tensor hidden = none, grad_up = none, grad_gate = none;
  if (below) {
    hidden = empty(rows, features, dtype, place);
    const bool again = up.numel() == 0;
    up = of.kept_or_again("up", up, up_weight, up_bias);
    grad_up = again ? up : empty(rows, features, dtype, place);
    if (of.gated) {
      gate = of.kept_or_again("gate", gate, *gate_weight, gate_bias);
      grad_gate = again ? gate : empty(rows, features, dtype, place);
    }
    const Tensor grad_hidden = hidden;
    linear_backward(
        place, {dtype, rows, features, of.out_features, grad_out.const_data_ptr(), nullptr,
                placed(down_weight), nullptr, grad_hidden.mutable_data_ptr(), nullptr, nullptr});
    of.drop_out(grad_hidden);
    activation_backward(place, {dtype, rows * features, grad_hidden.const_data_ptr(),
                                up.const_data_ptr(), of.gated ? gate.const_data_ptr() : nullptr,
                                of.activation, grad_up.mutable_data_ptr(),
                                write(grad_gate, of.gated), write(hidden, need_down_weight)});
    if (need_down_weight) of.drop_out(hidden);
  }
  linear_backward(place, {dtype, rows, features, of.out_features, grad_out.const_data_ptr(),
                          need_down_weight ? hidden.const_data_ptr() : nullptr, placed(down_weight),
                          nullptr, nullptr, write(grad_down_weight, need_down_weight),
                          write(grad_down_bias, need_down_bias)});
  hidden = none;
  linear_backward(place,
                  {dtype, rows, in, features, grad_up.const_data_ptr(), input.const_data_ptr(),
                   placed(up_weight), nullptr, write(grad_input, need_input),
                   write(grad_up_weight, need_up_weight), write(grad_up_bias, need_up_bias)});
  if (of.gated)
    linear_backward(place,
                    {dtype, rows, in, features, grad_gate.const_data_ptr(), input.const_data_ptr(),
                     placed(*gate_weight), need_input ? grad_input.const_data_ptr() : nullptr,
                     write(grad_input, need_input), write(grad_gate_weight, need_gate_weight),
                     write(grad_gate_bias, need_gate_bias)});
  return {grad_input,     grad_up_weight,   grad_up_bias,  grad_gate_weight,
          grad_gate_bias, grad_down_weight, grad_down_bias};
}

template <class Library>
void implement(Library& library) {
  library.impl("linear_fwd", TORCH_BOX(&linear_fwd));
  library.impl("linear_bwd", TORCH_BOX(&linear_bwd));
  library.impl("ffn_fwd", TORCH_BOX(&ffn_fwd));
  library.impl("ffn_bwd", TORCH_BOX(&ffn_bwd));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, library) {
  implement(library);
  library.impl("linear.plain", TORCH_BOX(&linear));
  library.impl("ffn.plain", TORCH_BOX(&ffn));
}
STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, library) { implement(library); }

}  // namespace fastattn
