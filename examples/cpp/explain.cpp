// Explains a picture with a package, without Python, and paints the heatmap over the part that the model saw:
//   explain model.pt2 picture.ppm overlay.png [class]
#include <fga_fast/session.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <string>

#include "pictures.h"

namespace {

// From blue through green to red.
uint8_t colour(float heat, int channel) {
  const float centre = channel == 0 ? 1.0F : channel == 1 ? 0.5F : 0.0F;
  return static_cast<uint8_t>(255 * std::clamp(1.5F - 2.5F * std::abs(heat - centre), 0.0F, 1.0F));
}

Rgb paint(const std::vector<uint8_t>& view, const fga::Heatmaps& heat) {
  Rgb picture{{}, heat.shape[1], heat.shape[2]};
  const size_t channels = view.size() / heat.values.size();
  for (size_t i = 0; i < heat.values.size(); ++i)
    for (int c = 0; c < 3; ++c) {
      const int seen = view[i * channels + (channels == 3 ? c : 0)];
      picture.pixels.push_back(static_cast<uint8_t>((seen + colour(heat.values[i], c)) / 2));
    }
  return picture;
}

void explain(int argc, char** argv) {
  const fga::Session session(argv[1]);
  const fga::Metadata& about = session.metadata();
  if (!about.preprocess) throw fga::Error("the package has no preprocessing; export it with preprocessing=...");

  const Rgb file = read_picture(argv[2]);
  const fga::Picture picture{file.pixels.data(), file.height, file.width, 3, 0};
  std::optional<std::vector<int64_t>> targets;
  if (argc > 4) targets = {std::stoll(argv[4])};
  const fga::Result result = session.explain(fga::Images::pictures({picture}), targets);

  const int64_t target = result.targets[0];
  const std::string name = about.class_names.empty() ? "" : " (" + about.class_names[target] + ")";
  std::printf("class %lld%s, logit %.4f\n", static_cast<long long>(target), name.c_str(), result.values[0]);
  const auto& relevance = result.relevance.values;
  const auto best = std::max_element(relevance.begin(), relevance.end()) - relevance.begin();
  std::printf("most relevant patch: row %lld, column %lld of %lld x %lld\n",
              static_cast<long long>(best / about.grid[1]), static_cast<long long>(best % about.grid[1]),
              static_cast<long long>(about.grid[0]), static_cast<long long>(about.grid[1]));
  write_png(argv[3], paint(about.preprocess->view(picture), result.heatmap()));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4 || argc > 5) {
    std::fprintf(stderr, "usage: %s model.pt2 picture.ppm overlay.png [class]\n", argv[0]);
    return 2;
  }
  try {
    explain(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "explain: %s\n", error.what());
    return 1;
  }
  return 0;
}
