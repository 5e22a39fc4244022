// Numbers are those of Pillow 13 for the same pixels.
#include <doctest/doctest.h>

#include "resample.h"

using fga::Pixels;
using fga::resize;

namespace {

using Bytes = std::vector<uint8_t>;

Pixels row(Bytes values) {
  const auto width = static_cast<int64_t>(values.size());
  return {std::move(values), 1, width, 1};
}

Pixels pattern(int64_t height, int64_t width, int64_t channels) {
  Pixels pixels{{}, height, width, channels};
  for (int64_t i = 0; i < height * width * channels; ++i)
    pixels.values.push_back(static_cast<uint8_t>(i * i * 37 + i * 11 + 5));
  return pixels;
}

Pixels whole(const Pixels& source, int64_t height, int64_t width, const char* interpolation) {
  return resize(source, height, width, interpolation,
                {0, 0, static_cast<double>(source.width), static_cast<double>(source.height)});
}

}  // namespace

TEST_CASE("a row is made narrower and wider") {
  const Pixels source = row({0, 100, 200, 50});
  CHECK(whole(source, 1, 2, "bilinear").values == Bytes{71, 121});
  CHECK(whole(source, 1, 2, "bicubic").values == Bytes{68, 127});
  CHECK(whole(source, 1, 8, "bicubic").values == Bytes{0, 17, 71, 131, 193, 174, 81, 37});
  CHECK(whole(source, 1, 8, "nearest").values == Bytes{0, 0, 100, 100, 200, 200, 50, 50});
}

TEST_CASE("a part of a picture is resized as a part of it") {
  const Pixels source = row({0, 100, 200, 50});
  CHECK(resize(source, 1, 3, "nearest", {1, 0, 4, 1}).values == Bytes{100, 200, 50});
  CHECK(resize(source, 1, 4, "bicubic", {0.5, 0, 2.5, 1}).values == Bytes{17, 71, 131, 193});
}

TEST_CASE("the direction that is resized first is the one that Pillow takes") {
  // The sums are rounded to 8 bits in between, so the other order gives other pixels in both.
  CHECK(whole(pattern(12, 4, 1), 2, 3, "bicubic").values == Bytes{109, 149, 136, 169, 167, 111});
  CHECK(whole(pattern(7, 8, 1), 4, 3, "bicubic").values ==
        Bytes{99, 151, 128, 138, 137, 150, 160, 167, 124, 123, 87, 152});
}

TEST_CASE("a picture of one colour keeps it") {
  for (const char* interpolation : {"bicubic", "bilinear", "nearest"})
    for (const int64_t side : {1, 3, 7, 16, 50}) {
      CAPTURE(interpolation);
      CAPTURE(side);
      const Pixels flat{Bytes(7 * 9 * 3, 201), 7, 9, 3};
      const Pixels resized = whole(flat, side, 2 * side, interpolation);
      CHECK(resized.height == side);
      CHECK(resized.width == 2 * side);
      CHECK(resized.values == Bytes(side * 2 * side * 3, 201));
    }
}

TEST_CASE("channels are resized apart from each other") {
  const Pixels source = pattern(8, 6, 3);
  for (const char* interpolation : {"bicubic", "bilinear", "nearest"}) {
    const Pixels together = whole(source, 5, 9, interpolation);
    for (int64_t channel = 0; channel < 3; ++channel) {
      CAPTURE(channel);
      Pixels one{{}, source.height, source.width, 1};
      for (size_t i = channel; i < source.values.size(); i += 3) one.values.push_back(source.values[i]);
      Bytes expected;
      for (size_t i = channel; i < together.values.size(); i += 3) expected.push_back(together.values[i]);
      CHECK(whole(one, 5, 9, interpolation).values == expected);
    }
  }
}
