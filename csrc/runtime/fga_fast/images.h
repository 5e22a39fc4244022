// Pictures and their preprocessing: the C++ version of fga_fast/io/images.py.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include <fga_fast/error.h>

namespace fga {

enum class Memory { host, device };

// 8-bit pixels in host memory, rows from the top, channels last, RGB or grey. The caller owns them during the call.
struct Picture {
  const uint8_t* pixels = nullptr;
  int64_t height = 0, width = 0;
  int64_t channels = 3;   // 3 or 1
  int64_t row_bytes = 0;  // from one row to the next; 0: width * channels
};

// From a picture of any size to a model's input: resize to cover, centre crop, normalise. Pixels are bit-equal to the
// antialiased resize of Pillow 13; older versions may differ by 1 when a tall picture shrinks in height.
struct FGA_API Preprocess {
  std::array<int64_t, 2> image_size = {0, 0};  // height and width of the model's input
  std::vector<double> mean, std;               // per channel, of values in [0,1]; three numbers, or one for grey
  double crop_pct = 1;                         // the crop's share of the resized picture, in (0,1]
  std::string interpolation = "bicubic";       // or bilinear, nearest
  bool squash = false;                         // resize both sides to image_size and crop nothing

  void check() const;  // throws Error if a field is out of range

  // The pixels that the model sees: [height, width, channels].
  std::vector<uint8_t> view(const Picture& picture) const;

  // (value / 255 - mean) / std of the view, written to out [channels, height, width].
  void write(const Picture& picture, float* out) const;
};

// A batch: pictures of any sizes, or normalised values. The caller owns the memory.
struct FGA_API Images {
  static Images pictures(std::vector<Picture> pictures);

  // [B, channels, height, width], contiguous, in host memory or on the session's device. Device memory must be ready on
  // torch's current stream, by default the default stream.
  static Images normalised(const float* values, std::array<int64_t, 4> shape, Memory memory = Memory::host);
  static Images normalised(const double* values, std::array<int64_t, 4> shape, Memory memory = Memory::host);

  int64_t size() const { return values == nullptr ? static_cast<int64_t>(list.size()) : shape[0]; }

  std::vector<Picture> list;     // either these
  const void* values = nullptr;  // or this
  bool is_double = false;
  std::array<int64_t, 4> shape = {0, 0, 0, 0};
  Memory memory = Memory::host;
};

}  // namespace fga
