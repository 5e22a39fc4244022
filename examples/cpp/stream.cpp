// Explains frames as they come, for a pipe: binary PPM pictures on standard input, the relevance of their patches as
// PFM pictures of floats on standard output, and in the end the times a frame took on standard error:
//   ffmpeg -i video.mp4 -f image2pipe -c:v ppm - | stream model.pt2 [class] > maps.pfm
#include <fga_fast/session.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <iostream>
#include <optional>
#include <string>
#include <vector>

#include "pictures.h"

namespace {

// Rows from the bottom, as the format wants them.
void write_pfm(std::ostream& out, const std::vector<float>& values, int64_t rows, int64_t columns) {
  out << "Pf\n" << columns << ' ' << rows << "\n-1.0\n";
  for (int64_t row = rows - 1; row >= 0; --row)
    out.write(reinterpret_cast<const char*>(values.data() + row * columns),
              columns * static_cast<std::streamsize>(sizeof(float)));
  out.flush();
  if (!out) throw std::runtime_error("standard output cannot be written");
}

void report(std::vector<double> took) {
  if (took.empty()) return;
  std::sort(took.begin(), took.end());
  const auto at = [&](double share) { return took[static_cast<size_t>(share * static_cast<double>(took.size() - 1))]; };
  std::fprintf(stderr, "%zu frames, milliseconds for one: p50 %.2f, p99 %.2f, most %.2f\n", took.size(), at(0.5),
               at(0.99), took.back());
}

void stream(int argc, char** argv) {
  std::ios::sync_with_stdio(false);  // nothing else here reads or writes these streams
  const fga::Session session(argv[1]);
  const fga::Metadata& about = session.metadata();
  std::optional<std::vector<int64_t>> targets;
  if (argc > 2) targets = {std::stoll(argv[2])};
  std::vector<float> relevance(about.patches());
  fga::Buffers buffers;
  buffers.relevance = relevance.data();
  std::vector<double> took;
  while (const std::optional<Rgb> frame = next_frame(std::cin)) {
    const auto start = std::chrono::steady_clock::now();
    const fga::Picture picture{frame->pixels.data(), frame->height, frame->width, 3, 0};
    session.explain_into(buffers, fga::Images::pictures({picture}), targets);
    took.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
    write_pfm(std::cout, relevance, about.grid[0], about.grid[1]);
  }
  report(took);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    std::fprintf(stderr, "usage: %s model.pt2 [class] < frames.ppm > maps.pfm\n", argv[0]);
    return 2;
  }
  try {
    stream(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "stream: %s\n", error.what());
    return 1;
  }
  return 0;
}
