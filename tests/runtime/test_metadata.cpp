#include <doctest/doctest.h>

#include <fga_fast/session.h>

#include "machine.h"
#include "package.h"

namespace {

fga::Metadata read(const std::string& text) {
  const Scratch scratch;
  return fga::Metadata::read(scratch.write("package.json", text));
}

fga::Metadata read_with(const std::string& part, const std::string& other) {
  return read(replaced(kMetadata, part, other));
}

void check_refused(const std::string& part, const std::string& other, const char* words) {
  CAPTURE(other);
  CHECK_THROWS_WITH_AS(read_with(part, other), doctest::Contains(words), fga::Error);
}

}  // namespace

TEST_CASE("metadata is read") {
  const auto m = read(kMetadata);
  CHECK(m.device == "cpu");
  CHECK(m.dtype == "float32");
  CHECK(m.batch == 2);
  CHECK(std::vector{m.channels, m.height, m.width} == std::vector<int64_t>{3, 32, 48});
  CHECK(m.grid == std::array<int64_t, 2>{2, 3});
  CHECK(m.patches() == 6);
  CHECK(m.classes == 5);
  CHECK(m.class_names.empty());
  REQUIRE(m.preprocess);
  CHECK(m.preprocess->image_size == std::array<int64_t, 2>{32, 48});
  CHECK(m.preprocess->mean == std::vector<double>(3, 0.5));
  CHECK(m.preprocess->std == std::vector<double>(3, 0.2));
  CHECK(m.preprocess->crop_pct == 0.9);
  CHECK(m.preprocess->interpolation == "bilinear");
  CHECK_FALSE(m.preprocess->squash);
  CHECK_FALSE(m.targets_given);
  CHECK(m.gated_blocks == std::vector<int64_t>{6});
  CHECK(m.outputs.size() == 6);
  CHECK(m.outputs[4].name == "scores.6");
  CHECK(m.backend == "native");
  CHECK(m.method == "rollout");
  CHECK(m.backward == "exact");
  CHECK(m.versions.at("torch") == "2.11.0");
  CHECK(m.architecture == "x86_64");
  CHECK(m.features == std::vector<std::string>{"avx2"});
  CHECK(m.sha256.empty());
}

TEST_CASE("outputs that the session does not know are kept") {
  const auto m =
      read_with("{\"name\": \"logits\"",
                "{\"name\": \"blocks\", \"shape\": [2, 3, 6], \"dtype\": \"float32\"}, {\"name\": \"logits\"");
  CHECK(m.outputs.size() == 7);
  CHECK(m.outputs[0].name == "blocks");
  CHECK(m.outputs[0].shape == std::vector<int64_t>{2, 3, 6});
}

TEST_CASE("a signal has the shape of the relevance, since pictures are drawn from it") {
  CHECK_THROWS_WITH_AS(
      read_with("{\"name\": \"logits\"",
                "{\"name\": \"signal\", \"shape\": [2, 3], \"dtype\": \"float32\"}, {\"name\": \"logits\""),
      doctest::Contains("signal of shape [2, 6], got [2, 3]"), fga::Error);
}

TEST_CASE("packages for another processor are refused") {
  auto m = read(kMetadata);
  m.architecture = fga::architecture();
  m.features = {"a_name_of_tomorrow"};
  CHECK_NOTHROW(fga::check_machine(m));
  m.architecture = "z80";
  CHECK_THROWS_WITH_AS(
      fga::check_machine(m),
      doctest::Contains("compiled for another processor, this one lacks z80; export it on a machine like this"),
      fga::Error);
  m.architecture = "";
  CHECK_NOTHROW(fga::check_machine(m));
}

#if defined(__x86_64__)
TEST_CASE("packages that use instructions this processor lacks are refused") {
  fga::Metadata m;
  m.features = {"sse2"};  // all have it
  CHECK_NOTHROW(fga::check_machine(m));
  m.features = {"sse2", "fma4", "sse4a"};  // no processor of Intel has one of these
  if (__builtin_cpu_supports("fma4") || __builtin_cpu_supports("sse4a")) return;
  CHECK_THROWS_WITH_AS(fga::check_machine(m), doctest::Contains("this one lacks fma4, sse4a; export it on"),
                       fga::Error);
}
#endif

TEST_CASE("metadata that does not fit together is refused") {
  check_refused("\"fga_fast package\"", "\"else\"", "format: expected fga_fast package, got 'else'");
  check_refused("\"format_version\": 5", "\"format_version\": 2",
                "format_version: expected 5, got 2; export it again, or use the runtime of that");
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
  check_refused("\"gated_blocks\": [6]", "\"gated_blocks\": [6, 9]", "an output 'gates.9'");
  check_refused("\"native\"", "\"magic\"", "backend: expected native or triton or composite, got 'magic'");
  check_refused("\"features\": [\"avx2\"]", "\"features\": [1]", "machine: features: expected strings");
  check_refused("\"height\": 32", "\"height\": 2000000000", "batch: expected a batch of images of at most 2^31 values");
  check_refused("int64", "float32", "targets of dtype int64, got float32");
  check_refused("{\n", "[\n", "JSON: expected");
  CHECK_THROWS_WITH_AS(fga::Metadata::read(Scratch().path("nothing.json")), doctest::Contains("cannot read"),
                       fga::Error);
}
