#include <doctest/doctest.h>

#include <fga_fast/session.h>

#include <algorithm>

namespace {
fga::Result result_of(const std::vector<double>& relevance, const char* dtype) {
  fga::Result result;
  result.relevance = {{1, 6}, relevance};
  result.targets = {0};
  result.grid = {2, 3};
  result.image_size = {4, 6};
  result.dtype = dtype;
  return result;
}
}  // namespace

TEST_CASE("a heat map is interpolated between patches and fills [0,1]") {
  // In 36ths: what PyTorch's interpolate gives, less the least value, over the range.
  const std::vector<double> expected = {0,  1,    3,    5,     7,     8,  4,  4.5, 5.5, 8.25, 12.75, 15,
                                        12, 11.5, 10.5, 14.75, 24.25, 29, 16, 15,  13,  18,   30,    36};
  for (const char* dtype : {"float32", "float64"}) {
    const auto heat = result_of({0, 1, 2, 4, 3, 9}, dtype).heatmap();
    CHECK(heat.shape == std::array<int64_t, 3>{1, 4, 6});
    REQUIRE(heat.values.size() == 24);
    for (size_t i = 0; i < 24; ++i) CHECK(heat.values[i] == doctest::Approx(expected[i] / 36).epsilon(1e-6));
  }
}

TEST_CASE("a heat map has the scale of its own values, and shows the signal where there is one") {
  const auto usual = result_of({0, 1, 2, 4, 3, 9}, "float32").heatmap();
  fga::Result tiny = result_of(std::vector<double>(6, 0.25), "float32");
  tiny.more["signal"] = {{1, 6}, {0, 1e-12, 2e-12, 4e-12, 3e-12, 9e-12}};
  const auto heat = tiny.heatmap();
  for (size_t i = 0; i < 24; ++i) CHECK(heat.values[i] == doctest::Approx(usual.values[i]).epsilon(1e-5));
}

TEST_CASE("the heat map of a constant relevance is zero") {
  for (const char* dtype : {"float32", "float64"}) {
    const auto heat = result_of(std::vector<double>(6, 0.1), dtype).heatmap(37, 41);
    CHECK(heat.values.size() == 37 * 41);
    CHECK(std::all_of(heat.values.begin(), heat.values.end(), [](float value) { return value == 0; }));
  }
}

TEST_CASE("a heat map needs at least one pixel a side") {
  CHECK_THROWS_WITH_AS(result_of(std::vector<double>(6), "float32").heatmap(-1, 4),
                       doctest::Contains("size: expected at least 1 pixel a side"), fga::Error);
}
