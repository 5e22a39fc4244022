#include "pictures.h"

#include <algorithm>
#include <fstream>
#include <stdexcept>

#ifdef HAVE_PNG
#include <png.h>
#endif

namespace {

constexpr int64_t kMaxSide = 1 << 15;

int64_t next_number(std::istream& file) {  // in a PPM header; skips white space and comments
  while ((file >> std::ws).peek() == '#') file.ignore(1 << 20, '\n');
  int64_t number = 0;
  if (!(file >> number)) throw std::runtime_error("expected a number in the header of the PPM file");
  return number;
}

Rgb read_ppm(std::istream& file) {  // after "P6"
  Rgb picture;
  picture.width = next_number(file);
  picture.height = next_number(file);
  const int64_t most = next_number(file);
  if (picture.width < 1 || picture.height < 1 || std::max(picture.width, picture.height) > kMaxSide || most != 255)
    throw std::runtime_error("expected a PPM file of 1 to 32768 pixels a side and 8 bits a channel");
  file.get();
  picture.pixels.resize(picture.width * picture.height * 3);
  file.read(reinterpret_cast<char*>(picture.pixels.data()), static_cast<std::streamsize>(picture.pixels.size()));
  if (!file) throw std::runtime_error("the PPM file is truncated");
  return picture;
}

#ifdef HAVE_PNG
Rgb read_png(const std::string& path) {
  png_image image = {};
  image.version = PNG_IMAGE_VERSION;
  if (png_image_begin_read_from_file(&image, path.c_str()) == 0) throw std::runtime_error(image.message);
  const bool fits = std::max<int64_t>(image.width, image.height) <= kMaxSide;
  if (!fits || (image.format & PNG_FORMAT_FLAG_LINEAR) != 0) {
    png_image_free(&image);
    throw std::runtime_error("expected a PNG file of at most 32768 pixels a side and 8 bits a channel");
  }
  image.format = PNG_FORMAT_RGBA;
  std::vector<uint8_t> rgba(PNG_IMAGE_SIZE(image));
  if (png_image_finish_read(&image, nullptr, rgba.data(), 0, nullptr) == 0) throw std::runtime_error(image.message);
  Rgb picture{{}, image.height, image.width};
  for (size_t i = 0; i < rgba.size(); i += 4)
    for (size_t c = 0; c < 3; ++c) {
      const int alpha = rgba[i + 3];
      picture.pixels.push_back(static_cast<uint8_t>((rgba[i + c] * alpha + 255 * (255 - alpha) + 127) / 255));
    }
  return picture;
}
#endif

void put(std::string& out, uint32_t number) {  // big-endian
  for (int shift = 24; shift >= 0; shift -= 8) out += static_cast<char>(number >> shift);
}

uint32_t crc32(const std::string& bytes) {
  uint32_t crc = 0xffffffff;
  for (const char byte : bytes) {
    crc ^= static_cast<uint8_t>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ ((crc & 1) != 0 ? 0xedb88320 : 0);
  }
  return ~crc;
}

std::string chunk(const std::string& name, const std::string& data) {
  std::string out;
  put(out, static_cast<uint32_t>(data.size()));
  out += name + data;
  put(out, crc32(name + data));
  return out;
}

// The zlib format with uncompressed blocks.
std::string stored(const std::string& data) {
  std::string out = "\x78\x01";
  constexpr size_t kBlock = 65535;
  for (size_t at = 0; at < data.size(); at += kBlock) {
    const size_t size = std::min(kBlock, data.size() - at);
    out += static_cast<char>(at + size == data.size());
    for (const size_t number : {size, ~size}) {
      out += static_cast<char>(number);
      out += static_cast<char>(number >> 8);
    }
    out += data.substr(at, size);
  }
  uint32_t a = 1, b = 0;  // Adler-32
  for (const char byte : data) {
    a = (a + static_cast<uint8_t>(byte)) % 65521;
    b = (b + a) % 65521;
  }
  put(out, b << 16 | a);
  return out;
}

}  // namespace

std::optional<Rgb> next_frame(std::istream& frames) {
  std::string magic(2, '\0');
  if (!frames.read(magic.data(), 2)) {
    if (frames.gcount() == 0) return std::nullopt;
    throw std::runtime_error("the last frame is truncated");
  }
  if (magic != "P6") throw std::runtime_error("expected frames in the format PPM (P6)");
  return read_ppm(frames);
}

Rgb read_picture(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic(2, '\0');
  if (!file.read(magic.data(), 2)) throw std::runtime_error("cannot read " + path);
  try {
    if (magic == "P6") return read_ppm(file);
#ifdef HAVE_PNG
    if (magic == "\x89P") return read_png(path);
#endif
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(path + ": " + error.what());
  }
  throw std::runtime_error(path +
                           ": this program was not built to read this format, only PPM (P6"
#ifdef HAVE_PNG
                           ", or PNG"
#endif
                           ")");
}

void write_png(const std::string& path, const Rgb& picture) {
  std::string rows;
  for (int64_t y = 0; y < picture.height; ++y) {
    rows += '\0';  // no filter
    rows.append(reinterpret_cast<const char*>(picture.pixels.data()) + y * picture.width * 3, picture.width * 3);
  }
  std::string header;
  put(header, static_cast<uint32_t>(picture.width));
  put(header, static_cast<uint32_t>(picture.height));
  header += {8, 2, 0, 0, 0};  // bits, RGB, default methods
  std::ofstream file(path, std::ios::binary);
  file << "\x89PNG\r\n\x1a\n" << chunk("IHDR", header) << chunk("IDAT", stored(rows)) << chunk("IEND", "");
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}
