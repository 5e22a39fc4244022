#include <fga_fast/session.h>

#include <cstdint>
#include <fstream>

#include "check.h"
#include "machine.h"
#include "sha256.h"

namespace {

const std::string kGood = R"({
  "format": "fga_fast package", "format_version": 1, "device": "cpu", "dtype": "float32", "batch": 2,
  "channels": 3, "height": 32, "width": 48, "grid": [2, 3], "classes": 5, "class_names": null,
  "preprocessing": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "interpolation": "bilinear", "crop_pct": 0.9},
  "targets": "predicted", "layers": [6],
  "outputs": [{"name": "logits", "shape": [2, 5], "dtype": "float32"},
              {"name": "targets", "shape": [2], "dtype": "int64"}, {"name": "values", "shape": [2], "dtype": "float32"},
              {"name": "relevance", "shape": [2, 6], "dtype": "float32"},
              {"name": "scores.6", "shape": [2, 6], "dtype": "float32"},
              {"name": "gates.6", "shape": [2, 6], "dtype": "float32"}],
  "backend": "native", "machine": {"architecture": "x86_64", "features": ["avx2"]}, "method": "rollout", "backward": "exact", "gate": {"mode": "combined"}, "versions": {"torch": "2.11.0"}})";

std::string written(const std::string& text) {
  const std::string path = scratch_folder + "/metadata.json";
  std::ofstream(path, std::ios::binary) << text;
  return path;
}

std::string with(const std::string& part, const std::string& other) {
  std::string text = kGood;
  return written(text.replace(text.find(part), part.size(), other));
}

void check_refused(const std::string& part, const std::string& other, const char* words) {
  CHECK_ERROR(fga::Metadata::read(with(part, other)), words);
}

}  // namespace

TEST(metadata_is_read) {
  const auto m = fga::Metadata::read(written(kGood));
  CHECK(m.device == "cpu" && m.dtype == "float32" && m.batch == 2 && m.channels == 3);
  CHECK(m.height == 32 && m.width == 48 && m.patches() == 6 && m.classes == 5 && m.class_names.empty());
  CHECK(m.preprocess && m.preprocess->crop_pct == 0.9 && m.preprocess->interpolation == "bilinear");
  CHECK(m.preprocess->image_size[1] == 48 && !m.preprocess->squash);
  CHECK(!m.targets_given && m.layers == std::vector<int64_t>{6} && m.outputs.size() == 6);
  CHECK(m.outputs[4].name == "scores.6" && m.method == "rollout" && m.backend == "native" &&
        m.versions.at("torch") == "2.11.0");
}

TEST(more_outputs_are_kept) {
  const auto m = fga::Metadata::read(
      with("{\"name\": \"logits\"",
           "{\"name\": \"blocks\", \"shape\": [2, 3, 6], \"dtype\": \"float32\"}, {\"name\": \"logits\""));
  CHECK(m.outputs.size() == 7 && m.outputs[0].name == "blocks" && m.outputs[0].shape[1] == 3);
}

TEST(machines) {
  auto m = fga::Metadata::read(written(kGood));
  m.architecture = fga::architecture();
  m.features = {"a_name_of_tomorrow"};
  fga::check_machine(m);
  m.architecture = "z80";
  CHECK_ERROR(fga::check_machine(m),
              "compiled for another processor, this one lacks z80; export it on a machine like this");
  m.architecture = "";
  fga::check_machine(m);
}

TEST(metadata_is_checked) {
  check_refused("\"fga_fast package\"", "\"else\"", "format: expected fga_fast package, got 'else'");
  check_refused("\"format_version\": 1", "\"format_version\": 2", "format_version: expected 1, got 2; use a newer");
  check_refused("\"batch\": 2", "\"batch\": 0", "batch: expected a whole number of at least 1");
  check_refused("\"batch\": 2", "\"batch\": 1e300", "batch: expected a whole number");
  check_refused("\"batch\": 2", "\"batch\": 2.5", "batch: expected a whole number");
  check_refused("\"batch\": 2,", "", "batch: expected an entry, it is missing");
  check_refused("\"cpu\"", "\"tpu\"", "device: expected cpu or cuda, got 'tpu'");
  check_refused("[2, 3], ", "[2], ", "grid: expected two numbers");
  check_refused("\"class_names\": null", "\"class_names\": [\"a\"]", "class_names: expected 5 names");
  check_refused("\"mean\": [0.5, 0.5, 0.5]", "\"mean\": [0.5]", "mean: expected 3 numbers");
  check_refused("\"crop_pct\": 0.9", "\"crop_pct\": 1.5", "crop_pct: expected a number in (0,1]");
  check_refused("\"crop_pct\"", "\"colour_space\"", "colour_space: expected no such entry");
  check_refused("\"shape\": [2, 5]", "\"shape\": [2, 6]", "logits of shape [2, 5], got [2, 6]");
  check_refused("\"name\": \"gates.6\"", "\"name\": \"scores.6\"", "every output once, got 'scores.6'");
  check_refused("\"name\": \"gates.6\"", "\"name\": \"gates.7\"", "an output 'gates.6'");
  check_refused("{\"name\": \"logits\"",
                "{\"name\": \"more\", \"shape\": [7], \"dtype\": \"int64\"}, {\"name\": \"logits\"",
                "more with a row for each image, got [7]");
  check_refused("\"layers\": [6]", "\"layers\": [6, 9]", "an output 'gates.9'");
  check_refused("\"native\"", "\"magic\"", "backend: expected native or triton or composite, got 'magic'");
  check_refused("\"features\": [\"avx2\"]", "\"features\": [1]", "machine: features: expected strings");
  check_refused("\"height\": 32", "\"height\": 2000000000", "batch: expected a batch of images of at most 2^31 values");
  check_refused("int64", "float32", "targets of dtype int64, got float32");
  check_refused("{\n", "[\n", "JSON: expected");
  CHECK_ERROR(fga::Metadata::read(scratch_folder + "/nothing.json"), "cannot read");
}

TEST(checksums) {
  const auto of = [](size_t bytes) {
    std::string content;
    for (size_t i = 0; i < bytes; ++i) content += static_cast<char>(i * 7);
    return fga::sha256_of_file(written(content));
  };
  // Python's hashlib of the same bytes; around a block's end the padding takes another way.
  CHECK(of(0) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(of(1) == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d");
  CHECK(of(55) == "576a1bf8d4478657e6dc4af9398544765c2a92cde28478b019235cfed315fc09");
  CHECK(of(56) == "9b20501dfd1d99161c257950f3444f3e49230c351c5c8e0943ef369f85f5205d");
  CHECK(of(63) == "30b345906b493f06f69444b6521113511c242f30e29840462950035043682f1e");
  CHECK(of(64) == "d8bc63b4fc1156e5e7d95a418b9bf54cd3174bedbc2db40f74895349b229b3c0");
  CHECK(of(65) == "1ee23b0fbcaecc1aff4a9e8f1645f35ab2c8e13609cd73b68df8b5e3f63ce073");
  CHECK(of(1000) == "89f4ff56a25dd1db06a4ce6033603775d705fb96f30f8693733fef602a1ca532");
  CHECK_ERROR(fga::sha256_of_file(scratch_folder + "/nothing"), "cannot read");
}
