// Files of pictures, as far as the example needs them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct Rgb {
  std::vector<uint8_t> pixels;  // [height, width, 3]
  int64_t height = 0, width = 0;
};

// Binary PPM (P6) with 8 bits a channel; PNG too where libpng was there at build time, transparency on white.
// Throws std::runtime_error.
Rgb read_picture(const std::string& path);

void write_png(const std::string& path, const Rgb& picture);
