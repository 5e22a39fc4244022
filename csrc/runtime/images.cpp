#include <fga_fast/images.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "resample.h"
#include "text.h"

namespace fga {
namespace {

void check_picture(const Picture& picture) {
  if (picture.height < 1 || picture.width < 1 || (picture.channels != 3 && picture.channels != 1))
    throw Error("images: expected pictures [H, W, 3] or [H, W, 1] of uint8, got " +
                shown({picture.height, picture.width, picture.channels}));
  if (picture.pixels == nullptr) throw Error("images: expected pixels, got a null pointer");
  if (picture.row_bytes != 0 && picture.row_bytes < picture.width * picture.channels)
    throw Error("images: expected rows of at least " + std::to_string(picture.width * picture.channels) +
                " bytes, got " + std::to_string(picture.row_bytes));
}

// A copy with the number of channels that the model takes. Grey values use Pillow's weights (ITU-R 601).
Pixels with_channels(const Picture& picture, int64_t channels) {
  Pixels out{std::vector<uint8_t>(picture.height * picture.width * channels), picture.height, picture.width, channels};
  const int64_t stride = picture.row_bytes == 0 ? picture.width * picture.channels : picture.row_bytes;
  for (int64_t y = 0; y < picture.height; ++y) {
    const uint8_t* from = picture.pixels + y * stride;
    uint8_t* to = out.values.data() + y * picture.width * channels;
    if (picture.channels == channels) {
      std::memcpy(to, from, picture.width * channels);
      continue;
    }
    for (int64_t x = 0; x < picture.width; ++x)
      if (channels == 1)
        to[x] = static_cast<uint8_t>(
            (from[3 * x] * 19595 + from[3 * x + 1] * 38470 + from[3 * x + 2] * 7471 + 0x8000) >> 16);
      else
        std::fill_n(to + 3 * x, 3, from[x]);
  }
  return out;
}

// The part of the source that becomes the crop, because resize and crop are one step.
std::array<double, 4> crop_box(const Preprocess& p, int64_t source_height, int64_t source_width) {
  const auto [height, width] = p.image_size;
  const auto cover_height = static_cast<int64_t>(std::floor(static_cast<double>(height) / p.crop_pct));
  const auto cover_width = static_cast<int64_t>(std::floor(static_cast<double>(width) / p.crop_pct));
  int64_t new_height = cover_height, new_width = cover_width;
  if (cover_height * source_width >= cover_width * source_height)
    new_width = cover_height * source_width / source_height;
  else
    new_height = cover_width * source_height / source_width;
  // Rounds halves to even, like Python's round().
  const double top = std::nearbyint(static_cast<double>(new_height - height) / 2);
  const double left = std::nearbyint(static_cast<double>(new_width - width) / 2);
  const double step_x = static_cast<double>(source_width) / static_cast<double>(new_width);
  const double step_y = static_cast<double>(source_height) / static_cast<double>(new_height);
  return {left * step_x, top * step_y,
          std::min((left + static_cast<double>(width)) * step_x, static_cast<double>(source_width)),
          std::min((top + static_cast<double>(height)) * step_y, static_cast<double>(source_height))};
}

}  // namespace

void Preprocess::check() const {
  if (std::min(image_size[0], image_size[1]) < 1)
    throw Error("image_size: expected (height, width) of at least 1 pixel, got (" + std::to_string(image_size[0]) +
                ", " + std::to_string(image_size[1]) + ")");
  if ((mean.size() != 1 && mean.size() != 3) || mean.size() != std.size() ||
      !std::all_of(std.begin(), std.end(), [](double s) { return s > 0; }))
    throw Error("mean, std: expected 1 or 3 numbers each, std above 0");
  if (!(crop_pct > 0 && crop_pct <= 1))
    throw Error("crop_pct: expected a number in (0,1], got " + std::to_string(crop_pct));
  constexpr double kMaxSide = 1 << 24;
  if (static_cast<double>(std::max(image_size[0], image_size[1])) > kMaxSide * crop_pct)
    throw Error("image_size, crop_pct: expected a resized picture of at most 2^24 pixels a side");
  if (interpolation != "bicubic" && interpolation != "bilinear" && interpolation != "nearest")
    throw Error("interpolation: expected bicubic, bilinear or nearest, got '" + interpolation + "'");
}

std::vector<uint8_t> Preprocess::view(const Picture& picture) const {
  check();
  check_picture(picture);
  const Pixels pixels = with_channels(picture, static_cast<int64_t>(mean.size()));
  const auto box =
      squash ? std::array<double, 4>{0, 0, static_cast<double>(picture.width), static_cast<double>(picture.height)}
             : crop_box(*this, picture.height, picture.width);
  return resize(pixels, image_size[0], image_size[1], interpolation, box).values;
}

void Preprocess::write(const Picture& picture, float* out) const {
  const std::vector<uint8_t> seen = view(picture);
  const auto channels = static_cast<int64_t>(mean.size());
  for (int64_t c = 0; c < channels; ++c) {
    const auto offset = static_cast<float>(mean[c]), scale = static_cast<float>(std[c]);
    for (int64_t i = 0; i < image_size[0] * image_size[1]; ++i)
      *out++ = (static_cast<float>(seen[i * channels + c]) / 255.0F - offset) / scale;
  }
}

Images Images::pictures(std::vector<Picture> pictures) {
  for (const Picture& picture : pictures) check_picture(picture);
  Images images;
  images.list = std::move(pictures);
  return images;
}

namespace {
Images of_values(const void* values, bool is_double, std::array<int64_t, 4> shape, Memory memory) {
  if (*std::min_element(shape.begin(), shape.end()) < 0)
    throw Error("images: expected a shape [B, C, H, W], got " + shown({shape.begin(), shape.end()}));
  if (values == nullptr && shape[0] != 0) throw Error("images: expected values, got a null pointer");
  static const double none = 0;  // stands for the memory of an empty batch
  Images images;
  images.values = values == nullptr ? &none : values;
  images.is_double = is_double;
  images.shape = shape;
  images.memory = memory;
  return images;
}
}  // namespace

Images Images::normalised(const float* values, std::array<int64_t, 4> shape, Memory memory) {
  return of_values(values, false, shape, memory);
}

Images Images::normalised(const double* values, std::array<int64_t, 4> shape, Memory memory) {
  return of_values(values, true, shape, memory);
}

}  // namespace fga
