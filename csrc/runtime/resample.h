// Resizes 8-bit pictures exactly like Pillow, so that a model sees the same pixels from C++ and from Python.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace fga {

// [height, width, channels], channels last.
struct Pixels {
  std::vector<uint8_t> values;
  int64_t height = 0, width = 0, channels = 0;
};

// Resizes the part `box` (left, top, right, bottom, in pixels of the source) of a picture.
// interpolation: "bicubic", "bilinear" or "nearest".
Pixels resize(const Pixels& source, int64_t height, int64_t width, const std::string& interpolation,
              const std::array<double, 4>& box);

}  // namespace fga
