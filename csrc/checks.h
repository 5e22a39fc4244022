// Argument checks that every op shares. Each message names the op, the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

namespace fga {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline std::string shape_of(std::initializer_list<int64_t> sizes) {
  std::string s = "[";
  bool first = true;
  for (int64_t n : sizes) {
    s += (first ? "" : ", ") + std::to_string(n);
    first = false;
  }
  return s + "]";
}

// Names as Python has them.
inline const char* name_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Short: return "int16";
    default: return torch::headeronly::toString(t);
  }
}

inline void check_rank(const char* op, const char* name, const Tensor& t, int64_t rank, const char* meaning) {
  STD_TORCH_CHECK(t.dim() == rank, op, ": ", name, " must be ", meaning, ", got shape ", shape_of(t));
}

inline void check_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> want) {
  bool same = t.dim() == static_cast<int64_t>(want.size());
  int64_t i = 0;
  for (int64_t n : want) same = same && t.size(i++) == n;
  STD_TORCH_CHECK(same, op, ": ", name, " must have shape ", shape_of(want), ", got ", shape_of(t));
}

inline void check_cpu(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU like the other tensors; move them to one device");
}

inline void check_type(const char* op, const char* name, const Tensor& t, ScalarType want) {
  STD_TORCH_CHECK(t.scalar_type() == want, op, ": ", name, " must be ", name_of(want), ", got ",
                  name_of(t.scalar_type()));
}

// Relevance, scores, gates and softmax statistics: float64 for float64 models, float32 for all others.
inline ScalarType statistic_type(ScalarType t) {
  return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The image that row m of a batch of (image, target) pairs belongs to; without an index, image m. Bounds are checked.
int64_t image_of_row(const std::optional<Tensor>& contiguous_image, int64_t row, int64_t images, const char* op);

// Calls f with a value of the C++ type that stands for the tensor's dtype.
template <class F>
void dispatch_floating(const char* op, const char* name, ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float64, bfloat16 or float16, got ", name_of(type));
  }
}

}  // namespace fga
