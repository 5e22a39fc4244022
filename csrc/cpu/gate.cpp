// Gate on the CPU: robust z of each row of scores, then base ** tanh(slope z).
#include "../checks.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace fga {
namespace {

// The lower median, as torch.median has it. Reorders its argument.
template <class A>
A lower_median(std::vector<A>& values) {
  const auto middle = values.begin() + (values.size() - 1) / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

template <class A>
void gate_row(const A* scores, int64_t patches, A base, A slope, A* out) {
  if (std::any_of(scores, scores + patches, [](A s) { return std::isnan(s); })) {  // nth_element needs an order
    std::fill(out, out + patches, std::numeric_limits<A>::quiet_NaN());
    return;
  }
  std::vector<A> values(scores, scores + patches);
  const A median = lower_median(values);
  for (int64_t p = 0; p < patches; ++p) values[p] = std::abs(scores[p] - median);
  const A spread = A(1.4826) * (lower_median(values) + A(1e-8));
  for (int64_t p = 0; p < patches; ++p) out[p] = std::pow(base, std::tanh(slope * ((scores[p] - median) / spread)));
}

}  // namespace

// scores [M, P] float32 or float64 -> gates [M, P], same dtype, within [1 / base, base]
Tensor gate_cpu(const Tensor& scores, double base, double slope) {
  check_rank("gate", "scores", scores, 2, "[M, P]");
  check_cpu("gate", "scores", scores);
  const ScalarType type = scores.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "gate: scores must be float32 or float64, got ", name_of(type));
  STD_TORCH_CHECK(base > 0, "gate: base must be positive, got ", base);
  const Tensor in = torch::stable::contiguous(scores);
  Tensor out = torch::stable::new_empty(scores, {scores.size(0), scores.size(1)});
  const int64_t rows = scores.size(0), patches = scores.size(1);
  if (rows == 0 || patches == 0) return out;
  dispatch_floating("gate", "scores", type, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
      const T* from = static_cast<const T*>(in.const_data_ptr());
      T* to = static_cast<T*>(out.mutable_data_ptr());
      torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m)
          gate_row(from + m * patches, patches, static_cast<T>(base), static_cast<T>(slope), to + m * patches);
      });
    }
  });
  return out;
}

}  // namespace fga
