// Pixels that Pillow gave for the same pictures; tests/runtime/test_runtime.py compares many more.
#include <doctest/doctest.h>

#include <fga_fast/images.h>

#include <limits>

using fga::Picture;
using fga::Preprocess;

namespace {

std::vector<uint8_t> pattern(int64_t count) {
  std::vector<uint8_t> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(static_cast<uint8_t>(i * i * 37 + i * 11 + 5));
  return values;
}

Preprocess colour(int64_t height, int64_t width) {
  return {{height, width}, {0.485, 0.456, 0.406}, {0.229, 0.224, 0.225}, 1, "bicubic", false};
}

}  // namespace

TEST_CASE("a picture is resized to cover the input and cropped") {
  const auto pixels = pattern(7 * 9 * 3);
  const std::vector<uint8_t> expected = {85,  92,  179, 142, 141, 161, 113, 135, 199, 138, 108, 137,
                                         134, 151, 151, 170, 139, 109, 91,  136, 109, 91,  90,  148,
                                         148, 175, 138, 111, 115, 175, 111, 88,  121, 123, 135, 153,
                                         145, 97,  118, 129, 81,  84,  116, 143, 104, 144, 175, 116};
  CHECK(colour(4, 4).view({pixels.data(), 7, 9, 3, 0}) == expected);
}

TEST_CASE("a grey model sees a colour picture in grey") {
  const auto pixels = pattern(8 * 6 * 3);
  const Preprocess p{{3, 5}, {0.5}, {0.25}, 0.8, "bilinear", false};
  const std::vector<uint8_t> expected = {149, 210, 96, 181, 42, 169, 131, 144, 157, 146, 101, 40, 132, 122, 190};
  CHECK(p.view({pixels.data(), 8, 6, 3, 0}) == expected);
}

TEST_CASE("squashing resizes both sides and crops nothing") {
  const auto pixels = pattern(3 * 9);
  Preprocess p{{5, 4}, {0.5}, {0.25}, 1, "nearest", true};
  CHECK(p.view({pixels.data(), 3, 9, 1, 0}) ==
        std::vector<uint8_t>(
            {53, 115, 217, 103, 53, 115, 217, 103, 231, 89, 243, 181, 3, 169, 119, 109, 3, 169, 119, 109}));
  p.interpolation = "bicubic";
  CHECK(p.view({pixels.data(), 3, 9, 1, 0}) ==
        std::vector<uint8_t>(
            {46, 139, 165, 125, 95, 133, 146, 131, 163, 131, 119, 140, 120, 163, 124, 141, 84, 185, 131, 141}));
}

TEST_CASE("rows of a picture may be apart in memory") {
  const auto pixels = pattern(6 * 20);
  std::vector<uint8_t> dense;
  for (int64_t y = 0; y < 6; ++y) dense.insert(dense.end(), pixels.begin() + y * 20, pixels.begin() + y * 20 + 15);
  CHECK(colour(4, 4).view({pixels.data(), 6, 5, 3, 20}) == colour(4, 4).view({dense.data(), 6, 5, 3, 0}));
}

TEST_CASE("a picture of the right size keeps its pixels") {
  const auto pixels = pattern(4 * 4 * 3);
  CHECK(colour(4, 4).view({pixels.data(), 4, 4, 3, 0}) == pixels);
  std::vector<float> values(48);
  colour(4, 4).write({pixels.data(), 4, 4, 3, 0}, values.data());
  CHECK(values[0] == doctest::Approx((5 / 255.0 - 0.485) / 0.229).epsilon(1e-6));
  CHECK(values[47] == doctest::Approx((pixels[47] / 255.0 - 0.406) / 0.225).epsilon(1e-6));
}

TEST_CASE("preprocessing out of range is refused") {
  const auto p = [](double mean, double std, double crop_pct, const char* interpolation) {
    Preprocess{{4, 4}, {mean}, {std}, crop_pct, interpolation, false}.check();
  };
  CHECK_THROWS_WITH_AS(p(0, 0, 1, "bicubic"), doctest::Contains("mean, std: expected 1 or 3 numbers each, std above 0"),
                       fga::Error);
  CHECK_THROWS_WITH_AS(p(0, std::numeric_limits<double>::quiet_NaN(), 1, "bicubic"), doctest::Contains("std above 0"),
                       fga::Error);
  CHECK_THROWS_WITH_AS(p(0, 1, 0, "bicubic"), doctest::Contains("crop_pct: expected a number in (0,1]"), fga::Error);
  CHECK_THROWS_WITH_AS(p(0, 1, 1e-300, "bicubic"),
                       doctest::Contains("image_size, crop_pct: expected a resized picture of at most 2^24 pixels"),
                       fga::Error);
  CHECK_THROWS_WITH_AS(p(0, 1, 1, "lanczos"),
                       doctest::Contains("interpolation: expected bicubic, bilinear or nearest, got 'lanczos'"),
                       fga::Error);
  CHECK_THROWS_WITH_AS(colour(0, 4).check(),
                       doctest::Contains("image_size: expected (height, width) of at least 1 pixel, got (0, 4)"),
                       fga::Error);
}

TEST_CASE("pictures and values that cannot be are refused") {
  const uint8_t pixel[4] = {};
  CHECK_THROWS_WITH_AS(fga::Images::pictures({{pixel, 1, 1, 4, 0}}),
                       doctest::Contains("images: expected pictures [H, W, 3] or [H, W, 1]"), fga::Error);
  CHECK_THROWS_WITH_AS(fga::Images::pictures({{pixel, 0, 1, 3, 0}}), doctest::Contains("got [0, 1, 3]"), fga::Error);
  CHECK_THROWS_WITH_AS(fga::Images::pictures({{nullptr, 1, 1, 3, 0}}), doctest::Contains("null pointer"), fga::Error);
  CHECK_THROWS_WITH_AS(fga::Images::pictures({{pixel, 1, 1, 3, 2}}),
                       doctest::Contains("rows of at least 3 bytes, got 2"), fga::Error);
  CHECK_THROWS_WITH_AS(fga::Images::normalised(static_cast<const float*>(nullptr), {1, 3, 4, 4}),
                       doctest::Contains("null pointer"), fga::Error);
  CHECK(fga::Images::normalised(static_cast<const float*>(nullptr), {0, 3, 4, 4}).size() == 0);
}
