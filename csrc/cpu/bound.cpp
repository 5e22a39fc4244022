// Rounds an encoder to 16-bit integers, once for an SAE; bound.h says what for.
#include "bound.h"

#include "../checks.h"
#include "isa.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

namespace fga {

namespace {

constexpr double kLargest = 1e18, kSmallest = 1e-12;  // lengths whose products float32 holds without loss

}  // namespace

float up(double value) {
  const float nearest = static_cast<float>(value);
  return nearest < value ? std::nextafter(nearest, std::numeric_limits<float>::infinity()) : nearest;
}

// Where the bounded product was measured to be faster: with AVX2, on an AMD EPYC. FGA_FAST_BOUND=0 or 1, read at each
// call so that both can be timed in turn, says otherwise.
bool bounds_here(int64_t width) {
#if FGA_X86_DISPATCH
  const char* wanted = std::getenv("FGA_FAST_BOUND");
  if (detect_isa() == Isa::baseline || width > kMostWidth || (wanted && std::strcmp(wanted, "0") == 0)) return false;
  return detect_isa() == Isa::avx2 || (wanted && std::strcmp(wanted, "1") == 0);
#else
  return false;
#endif
}

RoundedRow round_row(const float* x, int64_t width, int16_t* q) {
  double squares = 0, largest = 0;
  for (int64_t c = 0; c < width; ++c) {
    const double value = x[c];
    squares += value * value;
    largest = std::max(largest, std::abs(value));  // NaN does not show here, but in the sum
  }
  const double length = std::sqrt(squares);
  if (!(length <= kLargest && (length >= kSmallest || length == 0))) {
    std::fill(q, q + width, int16_t{0});
    return {0, 0, std::numeric_limits<float>::infinity()};
  }
  const float scale = up(std::max(length / kLength, largest / 32767));
  const double inverse = scale > 0 ? 1 / static_cast<double>(scale) : 0;
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to the nearest integer
  double rounded = 0, errors = 0;
  for (int64_t c = 0; c < width; ++c) {
    const double integer = (x[c] * inverse + kMagic) - kMagic;
    q[c] = static_cast<int16_t>(integer);
    const double there = integer * scale, error = x[c] - there;
    rounded += there * there;
    errors += error * error;
  }
  constexpr double kUp = 1 + 1e-11;  // more than the sums in double lose
  return {scale, up(std::sqrt(std::max(squares, rounded)) * kUp), up(std::sqrt(errors) * kUp)};
}

// See fga_fast/ops/round_encoder.py for the meaning of argument and results.
std::tuple<Tensor, Tensor> round_encoder_cpu(const Tensor& w_enc_t, bool only_if_used) {
  constexpr const char* kOp = "round_encoder";
  check_rank(kOp, "W_enc_t", w_enc_t, 2, "[F, C]");
  check_cpu(kOp, "W_enc_t", w_enc_t);
  check_type(kOp, "W_enc_t", w_enc_t, ScalarType::Float);
  if (only_if_used && !bounds_here(w_enc_t.size(1)))
    return {torch::stable::new_empty(w_enc_t, {0, 0, kPanelFeatures, 2}, ScalarType::Short),
            torch::stable::new_empty(w_enc_t, {3, 0})};
  const Tensor dense = torch::stable::contiguous(w_enc_t);
  const int64_t features = dense.size(0), width = dense.size(1), pairs = (width + 1) / 2;
  STD_TORCH_CHECK(width <= kMostWidth, kOp, ": W_enc_t may be up to ", kMostWidth, " wide, got ", width);
  const int64_t panels = (features + kGroupFeatures - 1) / kGroupFeatures * (kGroupFeatures / kPanelFeatures);
  const int64_t padded = panels * kPanelFeatures;
  const Tensor q = torch::stable::new_zeros(dense, {panels, pairs, kPanelFeatures, 2}, ScalarType::Short);
  const Tensor limits = torch::stable::new_zeros(dense, {3, padded});
  const float* w = static_cast<const float*>(dense.const_data_ptr());
  int16_t* integers = static_cast<int16_t*>(q.mutable_data_ptr());
  float* limit = static_cast<float*>(limits.mutable_data_ptr());
  torch::stable::parallel_for(0, features, 64, [&](int64_t begin, int64_t end) {
    std::vector<int16_t> one(2 * pairs);
    for (int64_t f = begin; f < end; ++f) {
      const RoundedRow row = round_row(w + f * width, width, one.data());
      int16_t* to = integers + (f / kPanelFeatures * pairs * kPanelFeatures + f % kPanelFeatures) * 2;
      for (int64_t c = 0; c < 2 * pairs; ++c) to[c / 2 * kPanelFeatures * 2 + c % 2] = one[c];
      limit[f] = row.scale;
      limit[padded + f] = row.length;
      limit[2 * padded + f] = row.error;
    }
  });
  return {q, limits};
}

}  // namespace fga
