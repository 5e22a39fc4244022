// START HERE: fga::Session explains images with a package that Python exported, without Python. See docs/cpp.md.
// This header does not include torch. Letters in shapes: B images, P patches.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <fga_fast/error.h>
#include <fga_fast/images.h>

namespace fga {

// The content of NAME.json, which describes NAME.pt2.
struct FGA_API Metadata {
  struct Output {
    std::string name, dtype;
    std::vector<int64_t> shape;
  };
  std::string device, dtype;  // cpu or cuda; float32, float64 or bfloat16
  int64_t batch = 0;          // images in one run of the compiled model
  int64_t channels = 0, height = 0, width = 0;
  std::array<int64_t, 2> grid = {0, 0};  // patches: rows, columns
  int64_t classes = 0;
  bool predicts = false;                 // the model has classes, of which it predicts one
  std::vector<std::string> class_names;  // empty if unknown
  std::optional<Preprocess> preprocess;
  bool targets_given = false;  // true: a call may give the classes to explain; false: explains the predicted class
  std::vector<int64_t> gated_blocks;  // blocks with an SAE
  std::vector<Output> outputs;
  std::string backend;  // whose kernels the package calls: native or composite
  std::string method, backward;
  std::map<std::string, std::string> versions;
  std::string architecture;           // of the processor it was compiled for, such as x86_64; empty if unknown
  std::vector<std::string> features;  // instruction sets that it may use
  std::string sha256;                 // of NAME.pt2; may be empty

  static Metadata read(const std::string& json_path);
  int64_t patches() const { return grid[0] * grid[1]; }
};

// Numbers of any shape, row-major. Doubles represent the values of every dtype exactly.
struct Array {
  std::vector<int64_t> shape;
  std::vector<double> values;
};

struct Heatmaps {
  std::array<int64_t, 3> shape = {0, 0, 0};  // B, height, width
  std::vector<float> values;                 // in [0,1]
};

struct FGA_API Result {
  Array logits;                       // [B, classes]
  std::vector<int64_t> targets;       // [B], the explained classes
  std::vector<double> values;         // [B], their logits
  Array relevance;                    // [B, P], patches row by row
  std::map<int64_t, Array> scores;    // by block [B, P]
  std::map<int64_t, Array> gates;     // by block [B, P]
  std::map<std::string, Array> more;  // further outputs by name: signal, ungated, the strongest features, blocks
  std::array<int64_t, 2> grid;        // patches: rows, columns
  std::array<int64_t, 2> image_size;  // height and width of the model's input
  std::string dtype;                  // of relevance, scores and gates: float64 for float64 models, else float32

  // Relevance (its signal, where there is one) as pictures: what is below 0 counts as 0; bilinear, then per image
  // (h - min) / (max - min), however small the values are. 0: the size of the model's input.
  Heatmaps heatmap(int64_t height = 0, int64_t width = 0) const;
};

// Memory of the caller for the answers to B images, row by row; nullptr: not wanted.
struct Buffers {
  float* relevance = nullptr;  // [B, P]
  float* logits = nullptr;     // [B, classes]
  int64_t* targets = nullptr;  // [B], the explained classes
};

struct Options {
  std::string ops_library;  // path of libfga_ops.so; empty: beside this library
  int device_index = -1;    // for a CUDA package; -1: the current device
  int runners = 1;          // number of calls that may compute at once; each needs its own activations
  bool verify = true;       // compare the package with the checksum in its metadata
};

// Loads a package once and explains any number of images. Loading runs its machine code: load only packages you trust.
// Several threads may call one session at the same time, and a process may have several sessions.
class FGA_API Session {
 public:
  // path: NAME.pt2; NAME.json must lie beside it.
  explicit Session(const std::string& path, const Options& options = {});
  ~Session();
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;

  const Metadata& metadata() const;

  // Any number of images: fewer than a batch are padded, more take several runs.
  // targets: for packages that take them, one class for each image, or one class for all; -1: the predicted one, which
  // is also explained without targets.
  Result explain(const Images& images, const std::optional<std::vector<int64_t>>& targets = std::nullopt) const;

  // The same for callers that want float32 numbers where they have room for them, as in a loop over frames: nothing is
  // widened, and nothing else is copied.
  void explain_into(const Buffers& buffers, const Images& images,
                    const std::optional<std::vector<int64_t>>& targets = std::nullopt) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace fga
