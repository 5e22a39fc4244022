// Every op's schema in one place, and the CPU kernels behind them. No arithmetic here. Shapes in the letters B images,
// M (image, target) pairs, H heads, N tokens, P patches, C model width, F features.
#include "checks.h"

#include <optional>
#include <tuple>

namespace fga {
std::tuple<Tensor, Tensor> attention_forward_cpu(const Tensor&, const Tensor&, const Tensor&,
                                                 const std::optional<Tensor>&, double);
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor&, const Tensor&, const std::optional<Tensor>&, const Tensor&, const Tensor&, const Tensor&,
    const std::optional<Tensor>&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, bool, bool);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> score_cpu(const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                                             const Tensor&, const Tensor&, const Tensor&,
                                                             const std::optional<Tensor>&, const std::optional<Tensor>&,
                                                             const std::optional<Tensor>&, const std::optional<Tensor>&,
                                                             const std::optional<Tensor>&, const std::optional<Tensor>&,
                                                             int64_t, int64_t, bool, int64_t, int64_t);
std::tuple<Tensor, Tensor> round_encoder_cpu(const Tensor&, bool);
Tensor gate_cpu(const Tensor&, double, double);

// Carrier and gate port hold zeros in the forward pass: they exist for what travels along them in the backward pass.
// gated, is_signed and constant_map say what the autograd formula does with it.
std::tuple<Tensor, Tensor, Tensor, Tensor> tapped_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                const Tensor& carrier,
                                                                const std::optional<Tensor>& bias, double scale,
                                                                bool /*gated*/, bool /*is_signed*/,
                                                                bool /*constant_map*/) {
  auto [out, lse] = attention_forward_cpu(q, k, v, bias, scale);
  check_shape("attention", "carrier", carrier, {k.size(0), k.size(2)});
  check_type("attention", "carrier", carrier, statistic_type(q.scalar_type()));
  check_cpu("attention", "carrier", carrier);
  Tensor carried = torch::stable::new_zeros(carrier, {q.size(0), q.size(2)});
  Tensor port = torch::stable::new_zeros(carrier, {k.size(0), k.size(2)});
  return {out, lse, carried, port};
}
}  // namespace fga

// A saved torch.export program gives arguments by name, and those that an op does not have are dropped. So when an op
// means something else from now on, one of its arguments gets another name, and packages another format_version.
STABLE_TORCH_LIBRARY(fga_fast, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor carrier, Tensor? bias, float scale, bool gated, bool is_signed,"
      " bool constant_map)"
      " -> (Tensor out, Tensor lse, Tensor carrier_out, Tensor port)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor row, Tensor? gate, Tensor q, Tensor k, Tensor v, Tensor? bias,"
      " Tensor out, Tensor lse, Tensor? image, float scale, bool is_signed, bool need_qk, bool need_v)"
      " -> (Tensor dq, Tensor dk, Tensor dv, Tensor row_out)");
  // What attention_backward leaves to PyTorch's kernels on CUDA is dq, dk and dv; this is the rest. CUDA only.
  m.def(
      "attention_relevance(Tensor grad_out, Tensor row, Tensor? gate, Tensor q, Tensor k, Tensor v, Tensor? bias,"
      " Tensor lse, Tensor? image, float scale, bool is_signed) -> Tensor row_out");
  m.def(
      "score(Tensor x, Tensor g, Tensor? image, Tensor W_enc_t, Tensor bias, Tensor W_dec, Tensor? theta,"
      " Tensor? gate_scale, Tensor? mag_bias, Tensor? permutation, Tensor? encoder, Tensor? limits, int activation,"
      " int normalize, bool weigh, int k, int top_features)"
      " -> (Tensor scores, Tensor patch_index, Tensor patch_contribution, Tensor image_index, Tensor "
      "image_contribution)");
  m.def("round_encoder(Tensor W_enc_t, bool only_if_used) -> (Tensor encoder, Tensor limits)");
  m.def("gate(Tensor scores, float base, float slope) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fga_fast, CPU, m) {
  m.impl("attention", TORCH_BOX(&fga::tapped_attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&fga::attention_backward_cpu));
  m.impl("score", TORCH_BOX(&fga::score_cpu));
  m.impl("round_encoder", TORCH_BOX(&fga::round_encoder_cpu));
  m.impl("gate", TORCH_BOX(&fga::gate_cpu));
}
