// Tapped attention on the CPU: checks, output tensors, and the threads. A work item is one (image, head) of the forward
// pass or one (target, head) of the backward pass.
#include "attention.h"

#include "../checks.h"
#include "isa.h"

#include <string>
#include <tuple>
#include <vector>

namespace fga {
namespace {

template <class S>
Matrix<const S> head_of(const Tensor& t, int64_t image, int64_t head) {
  return {static_cast<const S*>(t.const_data_ptr()) + image * t.stride(0) + head * t.stride(1), t.stride(2),
          t.stride(3)};
}

template <class S>
Matrix<S> head_of_output(const Tensor& t, int64_t image, int64_t head) {
  return {static_cast<S*>(t.mutable_data_ptr()) + image * t.stride(0) + head * t.stride(1), t.stride(2), t.stride(3)};
}

// The bias of one (image, head), read in place: a dim of size 1 has stride 0.
template <class S, class A>
Bias<S, A> bias_of_head(const std::optional<Tensor>& bias, int64_t image, int64_t head) {
  if (!bias) return {};
  const auto stride = [&](int64_t dim) { return bias->size(dim) == 1 ? 0 : bias->stride(dim); };
  const int64_t first = image * stride(0) + head * stride(1);
  const void* data = bias->const_data_ptr();
  if (bias->element_size() == sizeof(S)) return {{static_cast<const S*>(data) + first, stride(2), stride(3)}, {}};
  return {{}, {static_cast<const A*>(data) + first, stride(2), stride(3)}};
}

// [B, H, N, D] over token-major memory [B, N, H, D]: what callers reshape to [B, N, C] without a copy.
Tensor token_major(const Tensor& like, int64_t images, int64_t heads, int64_t tokens, int64_t width) {
  return torch::stable::transpose(torch::stable::new_empty(like, {images, tokens, heads, width}), 1, 2);
}

void check_qkv(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  check_rank(op, "q", q, 4, "[B, H, Nq, D]");
  check_rank(op, "k", k, 4, "[B, H, N, D]");
  for (auto [name, t] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}}) {
    check_cpu(op, name, *t);
    check_type(op, name, *t, q.scalar_type());
  }
  check_shape(op, "k", k, {q.size(0), q.size(1), k.size(2), q.size(3)});
  check_shape(op, "v", v, {k.size(0), k.size(1), k.size(2), k.size(3)});
  STD_TORCH_CHECK(q.size(3) > 0 && k.size(2) > 0, op, ": no tokens or no head width, got k of shape ", shape_of(k));
}

void check_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& q, const Tensor& k) {
  if (!bias) return;
  check_rank(op, "bias", *bias, 4, "broadcastable to [B, H, Nq, N]");
  check_cpu(op, "bias", *bias);
  const std::string want = shape_of({q.size(0), q.size(1), q.size(2), k.size(2)});
  for (int64_t dim = 0; dim < 4; ++dim)
    STD_TORCH_CHECK(bias->size(dim) == 1 || bias->size(dim) == (dim == 3 ? k.size(2) : q.size(dim)), op,
                    ": bias must be broadcastable to ", want, ", got shape ", shape_of(*bias));
  const ScalarType type = q.scalar_type(), statistics = statistic_type(type);
  STD_TORCH_CHECK(bias->scalar_type() == type || bias->scalar_type() == statistics, op, ": bias must be ",
                  name_of(type), type == statistics ? "" : " or float32", ", got ", name_of(bias->scalar_type()));
}

template <class S, class A>
void run(Isa isa, const AttentionForward<S, A>* items, int64_t count) {
#if FGA_X86_DISPATCH
  if (isa == Isa::avx512) return avx512::attention_forward(items, count);
  if (isa == Isa::avx2) return avx2::attention_forward(items, count);
#endif
  baseline::attention_forward(items, count);
}

template <class S, class A>
void run(Isa isa, const AttentionBackward<S, A>* items, int64_t count) {
#if FGA_X86_DISPATCH
  if (isa == Isa::avx512) return avx512::attention_backward(items, count);
  if (isa == Isa::avx2) return avx2::attention_backward(items, count);
#endif
  baseline::attention_backward(items, count);
}

template <class Item>
void run_all(const std::vector<Item>& items) {
  const Isa isa = detect_isa();
  torch::stable::parallel_for(0, static_cast<int64_t>(items.size()), 1,
                              [&](int64_t begin, int64_t end) { run(isa, items.data() + begin, end - begin); });
}

template <class S>
using Arithmetic = std::conditional_t<std::is_same_v<S, double>, double, float>;

// row_out = gate * mean over heads of the messages [M, H, N].
template <class A>
void combine(const Tensor& messages, const std::optional<Tensor>& gate, Tensor& out) {
  const int64_t heads = messages.size(1), keys = messages.size(2);
  const A* sent = static_cast<const A*>(messages.const_data_ptr());
  const A* w = gate ? static_cast<const A*>(gate->const_data_ptr()) : nullptr;
  A* to = static_cast<A*>(out.mutable_data_ptr());
  for (int64_t m = 0; m < messages.size(0); ++m)
    for (int64_t j = 0; j < keys; ++j) {
      A sum = 0;
      for (int64_t h = 0; h < heads; ++h) sum += sent[(m * heads + h) * keys + j];
      sum /= heads;
      to[m * keys + j] = w ? w[m * keys + j] * sum : sum;
    }
}

void check_images(const std::optional<Tensor>& image, int64_t rows, int64_t images) {
  if (!image) {
    STD_TORCH_CHECK(rows == images, "attention_backward: grad_out has ", rows, " rows for ", images,
                    " images; give image [M] to say which row belongs to which");
    return;
  }
  check_shape("attention_backward", "image", *image, {rows});
  check_type("attention_backward", "image", *image, ScalarType::Long);
  check_cpu("attention_backward", "image", *image);
}

void check_backward(const Tensor& grad_out, const Tensor& row, const std::optional<Tensor>& gate, const Tensor& q,
                    const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias, const Tensor& out,
                    const Tensor& lse, const std::optional<Tensor>& image) {
  const char* op = "attention_backward";
  check_qkv(op, q, k, v);
  check_bias(op, bias, q, k);
  check_rank(op, "grad_out", grad_out, 4, "[M, H, Nq, D]");
  const int64_t rows = grad_out.size(0), heads = q.size(1), queries = q.size(2), width = q.size(3), keys = k.size(2);
  const ScalarType type = q.scalar_type(), statistics = statistic_type(type);
  check_shape(op, "grad_out", grad_out, {rows, heads, queries, width});
  check_shape(op, "out", out, {q.size(0), heads, queries, width});
  check_shape(op, "lse", lse, {q.size(0), heads, queries});
  check_shape(op, "row", row, {rows, queries});
  if (gate) check_shape(op, "gate", *gate, {rows, keys});
  for (auto [name, t] : {std::pair{"grad_out", &grad_out}, {"out", &out}}) {
    check_cpu(op, name, *t);
    check_type(op, name, *t, type);
  }
  for (auto [name, t] : {std::pair{"row", &row}, {"lse", &lse}, {"gate", gate ? &*gate : &row}}) {
    check_cpu(op, name, *t);
    check_type(op, name, *t, statistics);
  }
  check_images(image, rows, q.size(0));
}

}  // namespace

int64_t image_of_row(const std::optional<Tensor>& contiguous_image, int64_t row, int64_t images, const char* op) {
  if (!contiguous_image) return row;
  const int64_t b = static_cast<const int64_t*>(contiguous_image->const_data_ptr())[row];
  STD_TORCH_CHECK(b >= 0 && b < images, op, ": image[", row, "] is ", b, ", expected 0 to ", images - 1);
  return b;
}

// q [B, H, Nq, D], k and v [B, H, N, D], bias broadcastable to [B, H, Nq, N] or none
// -> out [B, H, Nq, D] (token-major memory), lse [B, H, Nq]
std::tuple<Tensor, Tensor> attention_forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const std::optional<Tensor>& bias, double scale) {
  check_qkv("attention", q, k, v);
  check_bias("attention", bias, q, k);
  const int64_t images = q.size(0), heads = q.size(1), queries = q.size(2), width = q.size(3);
  Tensor out = token_major(q, images, heads, queries, width);
  Tensor lse = torch::stable::new_empty(q, {images, heads, queries}, statistic_type(q.scalar_type()));
  dispatch_floating("attention", "q", q.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using A = Arithmetic<S>;
    std::vector<AttentionForward<S, A>> items;
    for (int64_t b = 0; b < images; ++b)
      for (int64_t h = 0; h < heads; ++h)
        items.push_back({head_of<S>(q, b, h), head_of<S>(k, b, h), head_of<S>(v, b, h), bias_of_head<S, A>(bias, b, h),
                         head_of_output<S>(out, b, h),
                         static_cast<A*>(lse.mutable_data_ptr()) + (b * heads + h) * queries, queries, k.size(2), width,
                         static_cast<A>(scale)});
    run_all(items);
  });
  return {out, lse};
}

// grad_out [M, H, Nq, D], row [M, Nq], gate [M, N] or none (1), image [M] or none (row m is image m)
// -> dq [M, H, Nq, D] and dk [M, H, N, D] (empty unless need_qk), dv [M, H, N, D] (empty unless need_v), row_out [M, N]
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& grad_out, const Tensor& row, const std::optional<Tensor>& gate, const Tensor& q, const Tensor& k,
    const Tensor& v, const std::optional<Tensor>& bias, const Tensor& out, const Tensor& lse,
    const std::optional<Tensor>& image, double scale, bool is_signed, bool need_qk, bool need_v) {
  check_backward(grad_out, row, gate, q, k, v, bias, out, lse, image);
  const int64_t rows = grad_out.size(0), heads = q.size(1), queries = q.size(2), width = q.size(3), keys = k.size(2);
  const ScalarType type = q.scalar_type(), statistics = statistic_type(type);
  const auto contiguous = [](const std::optional<Tensor>& t) {
    return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
  };
  const auto gradient = [&](bool wanted, int64_t tokens) {
    return wanted ? token_major(q, rows, heads, tokens, width) : torch::stable::new_empty(q, {0});
  };
  const Tensor dense_row = torch::stable::contiguous(row), dense_lse = torch::stable::contiguous(lse);
  const std::optional<Tensor> dense_gate = contiguous(gate), dense_image = contiguous(image);
  Tensor dq = gradient(need_qk, queries), dk = gradient(need_qk, keys), dv = gradient(need_v, keys);
  Tensor messages = torch::stable::new_empty(q, {rows, heads, keys}, statistics);
  Tensor row_out = torch::stable::new_empty(q, {rows, keys}, statistics);
  dispatch_floating("attention_backward", "q", type, [&](auto tag) {
    using S = decltype(tag);
    using A = Arithmetic<S>;
    const A* lse_data = static_cast<const A*>(dense_lse.const_data_ptr());
    const A* arriving = static_cast<const A*>(dense_row.const_data_ptr());
    A* message = static_cast<A*>(messages.mutable_data_ptr());
    std::vector<AttentionBackward<S, A>> items;
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t b = image_of_row(dense_image, m, q.size(0), "attention_backward");
      for (int64_t h = 0; h < heads; ++h) {
        const auto gradient_of_head = [&](const Tensor& t, bool wanted) {
          return wanted ? head_of_output<S>(t, m, h) : Matrix<S>{};
        };
        items.push_back({head_of<S>(q, b, h), head_of<S>(k, b, h), head_of<S>(v, b, h), head_of<S>(out, b, h),
                         head_of<S>(grad_out, m, h), bias_of_head<S, A>(bias, b, h),
                         lse_data + (b * heads + h) * queries, arriving + m * queries, gradient_of_head(dq, need_qk),
                         gradient_of_head(dk, need_qk), gradient_of_head(dv, need_v), message + (m * heads + h) * keys,
                         queries, keys, width, static_cast<A>(scale), is_signed, need_qk, need_v});
      }
    }
    run_all(items);
    combine<A>(messages, dense_gate, row_out);
  });
  return {dq, dk, dv, row_out};
}

}  // namespace fga
