// Registers the CUDA kernels with the schemas of ops.cpp. Stable ABI only, no Python, no mathematics: each function
// checks its arguments, allocates, picks device and stream, and hands raw pointers to a kernel in cuda/<stem>.cu.
#include <cuda_runtime.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "checks.h"
#include "cuda/attention_relevance.h"
#include "cuda/gate.h"

namespace {

using fga::check_rank;
using fga::check_shape;
using fga::check_type;
using fga::name_of;
using fga::shape_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

std::string capability(int32_t device) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    return "unknown";
  return std::to_string(major) + "." + std::to_string(minor);
}

// Says what kept a kernel from starting (no machine code for this device, too much shared memory for it), and for what.
template <class F>
void check_launch(const char* op, const F& described) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    STD_TORCH_CHECK(false, op, ": CUDA did not start the kernel: ", cudaGetErrorString(error), "; ", described());
}

Tensor gate(const Tensor& scores /* [M, P] */, double base, double slope) {
  STD_TORCH_CHECK(scores.dim() == 2, "gate: scores must be [rows, patches], got ", scores.dim(), " dimensions");
  const ScalarType dtype = scores.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "gate: scores must be float32 or float64, got ", name_of(dtype), " of shape ", shape_of(scores));
  STD_TORCH_CHECK(base > 0.0, "gate: base must be positive, got ", base);
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  const Tensor rows = torch::stable::contiguous(scores);
  Tensor gates = torch::stable::empty_like(rows);
  const int64_t m = rows.size(0);
  const int64_t p = rows.size(1);
  if (m == 0 || p == 0) return gates;
  STD_TORCH_CHECK(p <= INT32_MAX, "gate: scores must have fewer than 2^31 patches, got shape ", shape_of(scores));
  const cudaStream_t stream = current_stream(scores.get_device_index());
  if (dtype == ScalarType::Float) {
    fga::cuda::gate(static_cast<const float*>(rows.const_data_ptr()), static_cast<float*>(gates.mutable_data_ptr()), m,
                    p, base, slope, stream);
  } else {
    fga::cuda::gate(static_cast<const double*>(rows.const_data_ptr()), static_cast<double*>(gates.mutable_data_ptr()),
                    m, p, base, slope, stream);
  }
  check_launch("gate", [&] {
    return "got scores " + shape_of(scores) + " of " + name_of(dtype) + " on a device of compute capability " +
           capability(scores.get_device_index());
  });
  return gates;
}

constexpr const char* kRelevance = "attention_relevance";

fga::cuda::NumberType number_type(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::BFloat16: return fga::cuda::NumberType::bf16;
    case ScalarType::Half: return fga::cuda::NumberType::half;
    case ScalarType::Float: return fga::cuda::NumberType::float32;
    default:
      STD_TORCH_CHECK(false, kRelevance, ": q must be float32, bfloat16 or float16 on CUDA, got ",
                      name_of(q.scalar_type()), " of shape ", shape_of(q), " on a device of compute capability ",
                      capability(q.get_device_index()), R"(; use backend="composite" for float64)");
  }
}

// Kernels read 16 bytes at a time: a tensor they cannot read so is copied, any usual layout of q, k, v is not.
Tensor readable(const Tensor& t) {
  constexpr int64_t kBytes = 16;
  const int64_t per_read = kBytes / static_cast<int64_t>(t.element_size());
  const auto aligned = [](const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kBytes == 0; };
  bool usable = t.stride(3) == 1 && aligned(t);
  for (int64_t dim = 0; dim < 3; ++dim) usable = usable && (t.size(dim) == 1 || t.stride(dim) % per_read == 0);
  if (usable) return t;
  const Tensor dense = torch::stable::contiguous(t);
  return aligned(dense) ? dense : torch::stable::clone(dense);
}

fga::cuda::HeadTensor heads_of(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

fga::cuda::LogitBias bias_of(const std::optional<Tensor>& bias, const Tensor& q, const Tensor& k) {
  if (!bias) return {};
  check_rank(kRelevance, "bias", *bias, 4, "broadcastable to [B, H, Nq, N]");
  const std::string want = shape_of({q.size(0), q.size(1), q.size(2), k.size(2)});
  for (int64_t dim = 0; dim < 4; ++dim)
    STD_TORCH_CHECK(bias->size(dim) == 1 || bias->size(dim) == (dim == 3 ? k.size(2) : q.size(dim)), kRelevance,
                    ": bias must be broadcastable to ", want, ", got shape ", shape_of(*bias));
  STD_TORCH_CHECK(bias->scalar_type() == q.scalar_type() || bias->scalar_type() == ScalarType::Float, kRelevance,
                  ": bias must be ", name_of(q.scalar_type()), " or float32, got ", name_of(bias->scalar_type()));
  const auto stride = [&](int64_t dim) { return bias->size(dim) == 1 ? 0 : bias->stride(dim); };
  return {bias->const_data_ptr(), stride(0), stride(1), stride(2), stride(3), bias->scalar_type() == ScalarType::Float};
}

// What attention_relevance takes.
struct Arguments {
  const Tensor &grad_out, &row;
  const std::optional<Tensor>& gate;
  const Tensor &q, &k, &v;
  const std::optional<Tensor>& bias;
  const Tensor& lse;
  const std::optional<Tensor>& image;
};

void check_arguments(const Arguments& t) {
  check_rank(kRelevance, "q", t.q, 4, "[B, H, Nq, D]");
  check_rank(kRelevance, "k", t.k, 4, "[B, H, N, D]");
  check_rank(kRelevance, "grad_out", t.grad_out, 4, "[M, H, Nq, D]");
  const int64_t rows = t.grad_out.size(0), heads = t.q.size(1), queries = t.q.size(2), width = t.q.size(3);
  const int64_t keys = t.k.size(2);
  check_shape(kRelevance, "k", t.k, {t.q.size(0), heads, keys, width});
  check_shape(kRelevance, "v", t.v, {t.q.size(0), heads, keys, width});
  check_shape(kRelevance, "grad_out", t.grad_out, {rows, heads, queries, width});
  check_shape(kRelevance, "lse", t.lse, {t.q.size(0), heads, queries});
  check_shape(kRelevance, "row", t.row, {rows, queries});
  for (auto [name, tensor] : {std::pair{"k", &t.k}, {"v", &t.v}, {"grad_out", &t.grad_out}})
    check_type(kRelevance, name, *tensor, t.q.scalar_type());
  check_type(kRelevance, "lse", t.lse, ScalarType::Float);
  check_type(kRelevance, "row", t.row, ScalarType::Float);
  if (t.gate) {
    check_shape(kRelevance, "gate", *t.gate, {rows, keys});
    check_type(kRelevance, "gate", *t.gate, ScalarType::Float);
  }
  if (t.image) {
    check_shape(kRelevance, "image", *t.image, {rows});
    check_type(kRelevance, "image", *t.image, ScalarType::Long);
  }
  STD_TORCH_CHECK(t.image || rows == t.q.size(0), kRelevance, ": grad_out has ", rows, " rows for ", t.q.size(0),
                  " images; give image [M] to say which row belongs to which");
  STD_TORCH_CHECK(rows == 0 || t.q.size(0) > 0, kRelevance, ": grad_out has ", rows,
                  " rows, but there are no images: q is ", shape_of(t.q));
  for (const Tensor* tensor : {&t.k, &t.v, &t.grad_out, &t.lse, &t.row, t.gate ? &*t.gate : &t.q,
                               t.image ? &*t.image : &t.q, t.bias ? &*t.bias : &t.q})
    STD_TORCH_CHECK(tensor->is_cuda() && tensor->get_device_index() == t.q.get_device_index(), kRelevance,
                    ": all tensors must be on the CUDA device of q");
}

// The problem a kernel is given, and what keeps its memory alive.
struct Prepared {
  Tensor q, k, v, grad_out, lse, row, messages, row_out;
  std::optional<Tensor> gate, image;
  fga::cuda::AttentionRelevance work;
};

// Allocates row_out and a workspace of 4 M H N bytes.
Prepared prepare(const Arguments& t, double scale, bool is_signed) {
  const auto dense = [](const std::optional<Tensor>& x) {
    return x ? std::optional<Tensor>(torch::stable::contiguous(*x)) : std::nullopt;
  };
  const auto type = number_type(t.q);
  const int64_t rows = t.grad_out.size(0), heads = t.q.size(1), keys = t.k.size(2);
  Prepared p = {readable(t.q),
                readable(t.k),
                readable(t.v),
                readable(t.grad_out),
                torch::stable::contiguous(t.lse),
                torch::stable::contiguous(t.row),
                torch::stable::new_empty(t.row, {rows, heads, keys}),
                torch::stable::new_empty(t.row, {rows, keys}),
                dense(t.gate),
                dense(t.image),
                {}};
  p.work = {type,
            heads_of(p.q),
            heads_of(p.k),
            heads_of(p.v),
            heads_of(p.grad_out),
            bias_of(t.bias, t.q, t.k),
            static_cast<const float*>(p.lse.const_data_ptr()),
            static_cast<const float*>(p.row.const_data_ptr()),
            p.gate ? static_cast<const float*>(p.gate->const_data_ptr()) : nullptr,
            p.image ? static_cast<const int64_t*>(p.image->const_data_ptr()) : nullptr,
            static_cast<float*>(p.messages.mutable_data_ptr()),
            static_cast<float*>(p.row_out.mutable_data_ptr()),
            rows,
            t.q.size(0),
            heads,
            t.q.size(2),
            keys,
            static_cast<int>(t.q.size(3)),
            static_cast<float>(scale),
            is_signed};
  return p;
}

std::string described(const Arguments& t) {
  return "got q " + shape_of(t.q) + " k " + shape_of(t.k) + " grad_out " + shape_of(t.grad_out) + " of " +
         name_of(t.q.scalar_type()) + " on a device of compute capability " + capability(t.q.get_device_index());
}

// -> row_out [M, N]
Tensor attention_relevance(const Tensor& grad_out, const Tensor& row, const std::optional<Tensor>& gate,
                           const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias,
                           const Tensor& lse, const std::optional<Tensor>& image, double scale, bool is_signed) {
  const Arguments arguments = {grad_out, row, gate, q, k, v, bias, lse, image};
  check_arguments(arguments);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Prepared p = prepare(arguments, scale, is_signed);
  if (p.work.rows == 0 || p.work.keys == 0) return p.row_out;
  STD_TORCH_CHECK(fga::cuda::fits(p.work), kRelevance, ": head width must be a multiple of 8 up to ",
                  fga::cuda::kWidestHead, " and rows x heads x keys / 64 below 2^31, ", described(arguments),
                  R"(; use backend="composite")");
  const cudaStream_t stream = current_stream(q.get_device_index());
  fga::cuda::attention_messages(p.work, stream);
  check_launch(kRelevance, [&] { return described(arguments); });
  fga::cuda::attention_combine(p.work, stream);
  check_launch(kRelevance, [&] { return described(arguments); });
  return p.row_out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fga_fast, CUDA, m) {
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("attention_relevance", TORCH_BOX(&attention_relevance));
}
