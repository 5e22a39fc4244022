// A tile's pre-activations by the bounded product of bound.h, where the SAE brings a rounded encoder.
#pragma once

#include "bound.h"
#include "isa.h"
#include "score_arguments.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace fga {
namespace {  // score.cpp alone includes this

constexpr double kUnit = 1.0 / (1 << 24);  // of float32's rounding

// Whether the bounded product is faster here: measured with AVX2 on an AMD EPYC. FGA_FAST_BOUND=0 or 1, read at each
// call so that both can be timed in turn, says otherwise.
inline bool bounds_here() {
#if FGA_X86_DISPATCH
  const char* wanted = std::getenv("FGA_FAST_BOUND");
  if (detect_isa() == Isa::baseline || (wanted && std::strcmp(wanted, "0") == 0)) return false;
  return detect_isa() == Isa::avx2 || (wanted && std::strcmp(wanted, "1") == 0);
#else
  return false;
#endif
}

inline float above(double value) {
  return std::nextafter(static_cast<float>(value), std::numeric_limits<float>::infinity());
}

class BoundedEncoder {
 public:
  // x: [B * P, C] in float32, normalised
  BoundedEncoder(const Arguments& a, const std::vector<PatchRange>& ranges, const float* x)
      : a_(a),
        x_(x),
        pairs_(a.encoder->size(1)),
        padded_(a.encoder->size(0) * kPanelFeatures),
        limits_(static_cast<const float*>(a.limits->const_data_ptr())),
        offset_(padded_, -std::numeric_limits<float>::infinity()),
        error_(padded_) {
    const auto values = [](const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); };
    const float* theta = a.theta ? values(*a.theta) : nullptr;
    const double product = 1.01 * kUnit * static_cast<double>(a.width + 32);  // what float32 may lose, of |x| |w|
    for (int64_t f = 0; f < a.features; ++f) {
      const double bias = values(a.bias)[f], least = theta ? std::max(theta[f], 0.0f) : 0.0;
      offset_[f] = above(bias - least + 8 * kUnit * (std::abs(bias) + least));
      error_[f] = above(limits_[2 * padded_ + f] + product * limits_[padded_ + f]);
    }
    patches_.resize(ranges.size());
    torch::stable::parallel_for(0, static_cast<int64_t>(ranges.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) round_patches(ranges[i], patches_[i]);
    });
  }

  // The pre-activations of a tile for the patches of range number i, and t.possible. Returns how many are possible.
  int64_t product(FeatureTile<float, float>& t, PatchRange range, int64_t i, const Selection<float>* selection) {
    Patches& p = patches_[i];
    p.possible.resize(t.count);
    t.possible = p.possible.data();
    const int64_t first = range.image * a_.patches + range.begin, n = range.end - range.begin;
    for (int64_t j = 0; selection && j < n; ++j) {
      const bool full = selection->size[first + j] >= selection->k;
      const float floor = full ? selection->value[(first + j) * selection->k] : selection->least;
      p.floor[j] = floor - static_cast<float>(8 * kUnit) * std::abs(floor);
    }
    const BoundedTile tile{t.count,
                           a_.width,
                           pairs_,
                           static_cast<const int16_t*>(a_.encoder->const_data_ptr()) + t.first * 2 * pairs_,
                           limits_ + t.first,
                           limits_ + padded_ + t.first,
                           error_.data() + t.first,
                           offset_.data() + t.first,
                           static_cast<const float*>(a_.w_enc_t.const_data_ptr()) + t.first * a_.width,
                           t.codes + first,
                           t.ld_codes,
                           p.possible.data()};
    const RoundedPatches patches{n,
                                 a_.width,
                                 p.q.data(),
                                 p.scale.data(),
                                 p.length.data(),
                                 p.error.data(),
                                 p.floor.data(),
                                 x_ + first * a_.width};
#if FGA_X86_DISPATCH
    return detect_isa() == Isa::avx512 ? avx512::bounded_product(tile, patches) : avx2::bounded_product(tile, patches);
#else
    return 0;  // bounds_here() is false
#endif
  }

 private:
  struct Patches {
    std::vector<int16_t> q;
    std::vector<float> scale, length, error, floor;
    std::vector<int32_t> possible;
  };

  void round_patches(PatchRange range, Patches& p) const {
    const int64_t n = range.end - range.begin, rows = (n + kMostRows - 1) / kMostRows * kMostRows;
    p.q.resize(rows * 2 * pairs_);
    for (std::vector<float>* of_rows : {&p.scale, &p.length, &p.error, &p.floor}) of_rows->resize(rows);
    for (int64_t j = 0; j < n; ++j) {
      const float* x = x_ + (range.image * a_.patches + range.begin + j) * a_.width;
      const RoundedRow row = round_row(x, a_.width, p.q.data() + j * 2 * pairs_);
      p.scale[j] = row.scale;
      p.length[j] = row.length;
      p.error[j] = row.error;
    }
  }

  const Arguments& a_;
  const float* x_;
  int64_t pairs_, padded_;
  const float* limits_;  // [3, padded_]: scale, length, error
  std::vector<float> offset_, error_;
  std::vector<Patches> patches_;
};

}  // namespace
}  // namespace fga
