// Reads and writes picture files for the example.
#pragma once

#include <cstdint>
#include <istream>
#include <optional>
#include <string>
#include <vector>

struct Rgb {
  std::vector<uint8_t> pixels;  // [height, width, 3]
  int64_t height = 0, width = 0;
};

// Reads binary PPM (P6) with 8 bits per channel, and PNG if libpng was there at build time; puts transparency on white.
// Throws std::runtime_error.
Rgb read_picture(const std::string& path);

// The next of several binary PPM pictures that follow each other; none at the end. Throws std::runtime_error.
std::optional<Rgb> next_frame(std::istream& frames);

void write_png(const std::string& path, const Rgb& picture);
