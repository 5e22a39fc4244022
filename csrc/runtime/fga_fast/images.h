// Pictures, and what a model makes of them before it looks: the C++ side of fga_fast/io/images.py.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include <fga_fast/error.h>

namespace fga {

enum class Memory { host, device };

// 8-bit pixels in host memory, rows from the top, channels last, RGB or grey. Not owned: they must outlive the call.
struct Picture {
  const uint8_t* pixels = nullptr;
  int64_t height = 0, width = 0;
  int64_t channels = 3;   // 3 or 1
  int64_t row_bytes = 0;  // from one row to the next; 0: width * channels
};

// From a picture of any size to a model's input: resize to cover, centre crop, normalise. Pixels are those that
// the antialiased resize of Pillow 13 gives, to the last bit; older ones differ by 1 where a tall picture gets low.
struct FGA_API Preprocess {
  std::array<int64_t, 2> image_size = {0, 0};  // height and width of the model's input
  std::vector<double> mean, std;               // per channel, of values in [0,1]; three numbers, or one for grey
  double crop_pct = 1;                         // the crop's share of the resized picture, in (0,1]
  std::string interpolation = "bicubic";       // or bilinear, nearest
  bool squash = false;                         // resize both sides to image_size and crop nothing

  void check() const;  // throws Error where a field is out of its range

  // What the model sees of the picture: [height, width, channels], channels last.
  std::vector<uint8_t> view(const Picture& picture) const;

  // (value / 255 - mean) / std of the view, written to out [channels, height, width].
  void write(const Picture& picture, float* out) const;
};

// A batch: pictures of any sizes, or values that are normalised already. Nothing is owned.
struct FGA_API Images {
  static Images pictures(std::vector<Picture> pictures);

  // [batch, channels, height, width], contiguous, in host memory or on the device of the session. Device memory must
  // be ready on torch's current stream, which is the default stream where nobody set another.
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
