// What a session refuses before a compiled model runs; tests/runtime/test_runtime.py and
// tests/runtime/test_runtime_programs.py test the rest.
#include <doctest/doctest.h>

#include <fga_fast/session.h>

#include "package.h"

#define CHECK_REFUSED(package, options, words) \
  CHECK_THROWS_WITH_AS(fga::Session(package, options), doctest::Contains(words), fga::Error)

namespace {

// For any processor, without kernels of fga_fast.
const std::string kComposite =
    replaced(replaced(kMetadata, "\"machine\": {\"architecture\": \"x86_64\", \"features\": [\"avx2\"]}, ", ""),
             "\"native\"", "\"composite\"");
const std::string kNative = replaced(kComposite, "\"composite\"", "\"native\"");

// A file that is no compiled model, with metadata beside it that says it is one.
std::string written(const Scratch& scratch, const std::string& metadata) {
  scratch.write("package.json", metadata);
  return scratch.write("package.pt2", "abc");
}

}  // namespace

TEST_CASE("a package is a .pt2 file with its metadata beside it") {
  const Scratch scratch;
  CHECK_REFUSED(scratch.write("model.onnx", "abc"), {}, "package: expected a file ending in .pt2, got ");
  CHECK_REFUSED(scratch.path("nothing.pt2"), {}, "package: no file ");
  CHECK_REFUSED(scratch.write("alone.pt2", "abc"), {}, "alone.json; it must lie beside the .pt2 file");
  CHECK_REFUSED(written(scratch, "{"), {}, "package.json: JSON: expected");
}

TEST_CASE("a package that does not load says which torch made it") {
  const Scratch scratch;
  CHECK_REFUSED(written(scratch, kComposite), {}, "package.pt2 does not load in torch ");
  CHECK_REFUSED(written(scratch, kComposite), {}, "(made by 2.11.0)");
}

TEST_CASE("a package of another checksum is refused, unless nobody asks") {
  const Scratch scratch;
  const auto with = [](const std::string& checksum) {
    return replaced(kComposite, "\"gated_blocks\"", "\"sha256\": \"" + checksum + "\", \"gated_blocks\"");
  };
  const std::string of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
  const std::string other = "aa7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
  CHECK_REFUSED(written(scratch, with(other)), {}, "is not the file that its metadata was written for (sha256)");
  CHECK_REFUSED(written(scratch, with(of_abc)), {}, "does not load in torch");
  fga::Options trusting;
  trusting.verify = false;
  CHECK_REFUSED(written(scratch, with(other)), trusting, "does not load in torch");
}

TEST_CASE("packages that this process cannot run are refused") {
  const Scratch scratch;
  const char* const triton = "calls Triton kernels, which need Python; export it with backend=\"composite\"";
  CHECK_REFUSED(written(scratch, replaced(kNative, "\"native\"", "\"triton\"")), {}, triton);
  CHECK_REFUSED(written(scratch, replaced(kNative, "\"device\": \"cpu\"", "\"device\": \"cuda\"")), {}, triton);
  CHECK_REFUSED(
      written(scratch, replaced(kComposite, "\"gated_blocks\"",
                                "\"machine\": {\"architecture\": \"z80\", \"features\": []}, \"gated_blocks\"")),
      {}, "this one lacks z80; export it on a machine like this one");
  fga::Options none;
  none.runners = 0;
  CHECK_REFUSED(written(scratch, kComposite), none, "runners: expected at least 1, got 0");
}

// One case, as operators stay for the rest of the process.
TEST_CASE("operators are loaded from the library that is named, or from the one beside the session's") {
  const Scratch scratch;
  const std::string package = written(scratch, kNative);
  fga::Options options;
  options.ops_library = scratch.path("libnothing.so");
  CHECK_REFUSED(package, options, "libnothing.so");
  CHECK_REFUSED(package, options, "give ops_library, the path of libfga_ops.so");
  options.ops_library = scratch.write("libtext.so", "abc");
  CHECK_REFUSED(package, options, "libtext.so");
  options.ops_library = RUNTIME_LIBRARY;  // a library without operators
  CHECK_REFUSED(package, options, "has no operators of fga_fast in it");
  CHECK_REFUSED(package, {}, "does not load in torch");
}
