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

class BoundedEncoder {
 public:
  // x: [B * P, C] in float32, normalised
  BoundedEncoder(const Arguments& a, const std::vector<PatchRange>& ranges, const float* x)
      : a_(a),
        ranges_(ranges),
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
      offset_[f] = up(bias - least + 8 * kUnit * (std::abs(bias) + least));
      error_[f] = up(limits_[2 * padded_ + f] + product * limits_[padded_ + f]);
    }
    patches_.resize(ranges.size());
    torch::stable::parallel_for(0, static_cast<int64_t>(ranges.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) round_patches(ranges[i], patches_[i]);
    });
  }

  // The pre-activations of a tile, then finish(its tile, range, i) for each range of patches. Returns the share of
  // features that may be on.
  template <class F>
  double encode(const FeatureTile<float, float>& t, const Selection<float>* selection, const F& finish) {
    const int64_t ranges = static_cast<int64_t>(ranges_.size());
    const auto finish_range = [&](int64_t i) {
      FeatureTile<float, float> mine = t;
      mine.possible = patches_[i].possible.data();
      finish(mine, ranges_[i], i);
    };
    // One image has few ranges. With more threads than that they share the features of a range; sums come after.
    const int64_t groups = (t.count + kGroupFeatures - 1) / kGroupFeatures;
    const int64_t parts = std::clamp<int64_t>(torch::stable::get_num_threads() / ranges, 1, groups);
    std::vector<int64_t> possible(ranges * parts);
    for (int64_t i = 0; i < ranges; ++i) begin(ranges_[i], patches_[i], t.count, selection);
    torch::stable::parallel_for(0, ranges * parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t i = item / parts, part = item % parts;
        const int64_t from = groups * part / parts * kGroupFeatures,
                      to = std::min(groups * (part + 1) / parts * kGroupFeatures, t.count);
        possible[item] = product(t, from, to, ranges_[i], patches_[i]);
        if (parts == 1) finish_range(i);  // while the codes are in the cache
      }
    });
    if (parts > 1)
      torch::stable::parallel_for(0, ranges, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) finish_range(i);
      });
    const int64_t all = std::accumulate(possible.begin(), possible.end(), int64_t{0});
    return static_cast<double>(all) / static_cast<double>(t.count * a_.images * a_.patches);
  }

 private:
  struct Patches {
    std::vector<int16_t> q;
    std::vector<float> scale, length, error, floor;
    std::vector<int32_t> possible;
  };

  // What a range's patches must exceed is known for topk only.
  void begin(PatchRange range, Patches& p, int64_t count, const Selection<float>* selection) const {
    p.possible.resize(count);
    const int64_t first = range.image * a_.patches + range.begin;
    for (int64_t j = 0; selection && j < range.end - range.begin; ++j) {
      const bool full = selection->size[first + j] >= selection->k;
      const float floor = full ? selection->value[(first + j) * selection->k] : selection->least;
      p.floor[j] = floor - static_cast<float>(8 * kUnit) * std::abs(floor);
    }
  }

  // The pre-activations of the tile's features [begin, end), multiples of 32 but for the tile's end, for the patches of
  // one range; and which are possible. Returns how many are.
  int64_t product(const FeatureTile<float, float>& t, int64_t begin, int64_t end, PatchRange range, Patches& p) const {
    const int64_t first = range.image * a_.patches + range.begin, n = range.end - range.begin, f = t.first + begin;
    const BoundedTile tile{end - begin,
                           a_.width,
                           pairs_,
                           static_cast<const int16_t*>(a_.encoder->const_data_ptr()) + f * 2 * pairs_,
                           limits_ + f,
                           limits_ + padded_ + f,
                           error_.data() + f,
                           offset_.data() + f,
                           static_cast<const float*>(a_.w_enc_t.const_data_ptr()) + f * a_.width,
                           t.codes + begin * t.ld_codes + first,
                           t.ld_codes,
                           p.possible.data() + begin};
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
    return 0;  // bounds_here() says no
#endif
  }

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
  const std::vector<PatchRange>& ranges_;
  const float* x_;
  int64_t pairs_, padded_;
  const float* limits_;  // [3, padded_]: scale, length, error
  std::vector<float> offset_, error_;
  std::vector<Patches> patches_;
};

}  // namespace
}  // namespace fga
