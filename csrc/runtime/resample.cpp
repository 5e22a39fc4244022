#include "resample.h"

#include <algorithm>
#include <cmath>

namespace fga {
namespace {

constexpr int kPrecisionBits = 32 - 8 - 2;  // of a weight; 8 bits for the pixel, 2 for sums above 1 and the sign

double bilinear(double x) {
  x = std::abs(x);
  return x < 1 ? 1 - x : 0;
}

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

// The `count` source pixels from `first` that make one output pixel, and their weights.
struct Taps {
  int64_t first = 0, count = 0;
  std::vector<int32_t> weights;
};

// As in Pillow, box edges have single precision and everything else double, with the same order of operations.
std::vector<Taps> taps_of(int64_t source, float begin, float end, int64_t size, double (*filter)(double),
                          double filter_support) {
  const double scale = static_cast<double>(end - begin) / static_cast<double>(size);
  const double stretch = std::max(scale, 1.0);
  const double support = filter_support * stretch, inverse = 1 / stretch;
  std::vector<Taps> all(size);
  std::vector<double> exact;
  for (int64_t i = 0; i < size; ++i) {
    const double centre = begin + (static_cast<double>(i) + 0.5) * scale;
    Taps& taps = all[i];
    taps.first = std::max<int64_t>(static_cast<int64_t>(centre - support + 0.5), 0);
    taps.count = std::min<int64_t>(static_cast<int64_t>(centre + support + 0.5), source) - taps.first;
    exact.resize(taps.count);
    double sum = 0;
    for (int64_t k = 0; k < taps.count; ++k) {
      exact[k] = filter((static_cast<double>(k + taps.first) - centre + 0.5) * inverse);
      sum += exact[k];
    }
    for (double weight : exact) {
      if (sum != 0) weight /= sum;
      taps.weights.push_back(static_cast<int32_t>((weight < 0 ? -0.5 : 0.5) + weight * (1 << kPrecisionBits)));
    }
  }
  return all;
}

uint8_t clip(int32_t sum) {
  return static_cast<uint8_t>(std::clamp(sum >> kPrecisionBits, 0, 255));
}

constexpr int32_t kHalf = 1 << (kPrecisionBits - 1);

Pixels horizontal(const Pixels& source, const std::vector<Taps>& taps, int64_t first_row, int64_t rows) {
  const int64_t width = static_cast<int64_t>(taps.size()), channels = source.channels;
  Pixels out{std::vector<uint8_t>(rows * width * channels), rows, width, channels};
  for (int64_t y = 0; y < rows; ++y) {
    const uint8_t* row = source.values.data() + (first_row + y) * source.width * channels;
    uint8_t* to = out.values.data() + y * width * channels;
    for (const Taps& t : taps)
      for (int64_t c = 0; c < channels; ++c) {
        int32_t sum = kHalf;
        for (int64_t k = 0; k < t.count; ++k) sum += row[(t.first + k) * channels + c] * t.weights[k];
        *to++ = clip(sum);
      }
  }
  return out;
}

Pixels vertical(const Pixels& source, const std::vector<Taps>& taps, int64_t first_row) {
  const int64_t height = static_cast<int64_t>(taps.size()), line = source.width * source.channels;
  Pixels out{std::vector<uint8_t>(height * line), height, source.width, source.channels};
  std::vector<int32_t> sums(line);
  for (int64_t y = 0; y < height; ++y) {
    std::fill(sums.begin(), sums.end(), kHalf);
    for (int64_t k = 0; k < taps[y].count; ++k) {
      const uint8_t* row = source.values.data() + (taps[y].first - first_row + k) * line;
      for (int64_t i = 0; i < line; ++i) sums[i] += row[i] * taps[y].weights[k];
    }
    std::transform(sums.begin(), sums.end(), out.values.begin() + y * line, clip);
  }
  return out;
}

// The source pixel at the centre of each output pixel, or -1 outside. Adds up the steps like Pillow.
std::vector<int64_t> nearest_places(int64_t source, float begin, float end, int64_t size) {
  const double step = static_cast<double>(end - begin) / static_cast<double>(size);
  std::vector<int64_t> places;
  double at = begin + step * 0.5;
  for (int64_t i = 0; i < size; ++i, at += step)
    places.push_back(at < 0 || at >= static_cast<double>(source) ? -1 : static_cast<int64_t>(at));
  return places;
}

Pixels nearest(const Pixels& source, int64_t height, int64_t width, const std::array<float, 4>& box) {
  const auto columns = nearest_places(source.width, box[0], box[2], width);
  const auto rows = nearest_places(source.height, box[1], box[3], height);
  Pixels out{std::vector<uint8_t>(height * width * source.channels), height, width, source.channels};
  uint8_t* to = out.values.data();
  for (const int64_t y : rows)
    for (const int64_t x : columns)
      for (int64_t c = 0; c < source.channels; ++c, ++to)
        if (x >= 0 && y >= 0) *to = source.values[(y * source.width + x) * source.channels + c];
  return out;
}

}  // namespace

Pixels resize(const Pixels& source, int64_t height, int64_t width, const std::string& interpolation,
              const std::array<double, 4>& box) {
  std::array<float, 4> edges;
  std::transform(box.begin(), box.end(), edges.begin(), [](double edge) { return static_cast<float>(edge); });
  const bool as_wide = width == source.width && edges[0] == 0 && edges[2] == static_cast<float>(width);
  const bool as_high = height == source.height && edges[1] == 0 && edges[3] == static_cast<float>(height);
  if (as_wide && as_high) return source;
  if (interpolation == "nearest") return nearest(source, height, width, edges);
  const bool cubic = interpolation == "bicubic";
  const auto filter = cubic ? bicubic : bilinear;
  const auto columns = taps_of(source.width, edges[0], edges[2], width, filter, cubic ? 2 : 1);
  const auto rows = taps_of(source.height, edges[1], edges[3], height, filter, cubic ? 2 : 1);
  if (as_wide) return vertical(source, rows, 0);
  if (as_high) return horizontal(source, columns, 0, source.height);
  // Each pass rounds to 8 bits, so the order matters. This is the order of Pillow 13; older versions always did the
  // horizontal pass first.
  const int64_t shrink = source.height - height;
  if (shrink > 0 && shrink > 2 * (source.width - width))
    return horizontal(vertical(source, rows, 0), columns, 0, height);
  const int64_t first = rows.front().first, last = rows.back().first + rows.back().count;
  return vertical(horizontal(source, columns, first, last - first), rows, first);
}

}  // namespace fga
