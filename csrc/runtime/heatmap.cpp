// Turns the relevance of patches into pictures, like Explanation.heatmap.
#include <algorithm>
#include <cmath>
#include <limits>

#include <fga_fast/session.h>

#include "text.h"

namespace fga {
namespace {

// The two patches around an output pixel, and its place between them.
template <class T>
struct Place {
  int64_t below, above;
  T fraction;
};

template <class T>
std::vector<Place<T>> places_of(int64_t patches, int64_t pixels) {
  std::vector<Place<T>> places;
  const T scale = static_cast<T>(patches) / static_cast<T>(pixels);
  for (int64_t i = 0; i < pixels; ++i) {
    const T at = std::max<T>(scale * (static_cast<T>(i) + T(0.5)) - T(0.5), 0);
    const int64_t below = std::min(static_cast<int64_t>(at), patches - 1);
    places.push_back({below, std::min(below + 1, patches - 1), std::min<T>(at - static_cast<T>(below), 1)});
  }
  return places;
}

// Computes in the dtype of the relevance, so that nearly constant maps are rounded like in Python.
template <class T>
void draw(const double* relevance, const std::array<int64_t, 2>& grid, const std::vector<Place<T>>& rows,
          const std::vector<Place<T>>& columns, float* out) {
  // What speaks against the target counts as 0.
  const auto positive = [](double value) { return std::max(static_cast<T>(value), T(0)); };
  const auto at = [&](int64_t y, int64_t x) { return positive(relevance[y * grid[1] + x]); };
  const auto [least, most] = std::minmax_element(relevance, relevance + grid[0] * grid[1]);
  const T floor = positive(*least), ceiling = positive(*most);
  std::vector<T> large;
  for (const auto& y : rows)
    for (const auto& x : columns) {
      const T upper = (1 - x.fraction) * at(y.below, x.below) + x.fraction * at(y.below, x.above);
      const T lower = (1 - x.fraction) * at(y.above, x.below) + x.fraction * at(y.above, x.above);
      // Rounding could leave the range of the inputs, and on a constant map the picture would show only that.
      large.push_back(std::clamp((1 - y.fraction) * upper + y.fraction * lower, floor, ceiling));
    }
  const auto [low, high] = std::minmax_element(large.begin(), large.end());
  const T start = *low, range = *high - *low;
  // What differs by rounding only is the same everywhere: 0.
  const bool seen = range > 8 * std::numeric_limits<T>::epsilon() * std::max(-*low, *high);
  std::transform(large.begin(), large.end(), out,
                 [&](T value) { return seen ? static_cast<float>((value - start) / range) : 0.0F; });
}

template <class T>
void draw_all(const Result& result, Heatmaps& heatmaps) {
  const auto signal = result.more.find("signal");
  const Array& shown = signal == result.more.end() ? result.relevance : signal->second;
  const auto rows = places_of<T>(result.grid[0], heatmaps.shape[1]);
  const auto columns = places_of<T>(result.grid[1], heatmaps.shape[2]);
  for (int64_t image = 0; image < heatmaps.shape[0]; ++image)
    draw<T>(shown.values.data() + image * result.grid[0] * result.grid[1], result.grid, rows, columns,
            heatmaps.values.data() + image * heatmaps.shape[1] * heatmaps.shape[2]);
}

}  // namespace

Heatmaps Result::heatmap(int64_t height, int64_t width) const {
  if (height == 0 && width == 0) height = image_size[0], width = image_size[1];
  if (std::min(height, width) < 1) throw Error("size: expected at least 1 pixel a side, got " + shown({height, width}));
  Heatmaps heatmaps;
  heatmaps.shape = {static_cast<int64_t>(targets.size()), height, width};
  heatmaps.values.resize(targets.size() * height * width);
  if (dtype == "float64")
    draw_all<double>(*this, heatmaps);
  else
    draw_all<float>(*this, heatmaps);
  return heatmaps;
}

}  // namespace fga
