#include <doctest/doctest.h>

#include <fga_fast/error.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <random>

#include "scratch.h"
#include "sha256.h"

using fga::Sha256;
using fga::Sha256Route;

namespace {

std::string checksum_of(const std::string& content, const Sha256Route& route) {
  Sha256 checksum(route);
  checksum.add(reinterpret_cast<const uint8_t*>(content.data()), content.size());
  return checksum.finish();
}

std::string random_bytes(std::mt19937& generator, size_t count) {
  std::string bytes;
  for (size_t i = 0; i < count; ++i) bytes += static_cast<char>(generator());
  return bytes;
}

}  // namespace

TEST_CASE("every route gives the checksums of the examples of FIPS 180") {
  for (const Sha256Route& route : fga::sha256_routes()) {
    CAPTURE(route.name);
    const auto of = [&](const std::string& content) { return checksum_of(content, route); };
    CHECK(of("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    CHECK(of("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    CHECK(of("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
          "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    CHECK(of(std::string(1000000, 'a')) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  }
}

TEST_CASE("every route gives the checksums of hashlib around the end of a block") {
  for (const Sha256Route& route : fga::sha256_routes()) {
    CAPTURE(route.name);
    const auto of = [&](size_t bytes) {
      std::string content;
      for (size_t i = 0; i < bytes; ++i) content += static_cast<char>(i * 7);
      return checksum_of(content, route);
    };
    CHECK(of(1) == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d");
    CHECK(of(55) == "576a1bf8d4478657e6dc4af9398544765c2a92cde28478b019235cfed315fc09");
    CHECK(of(56) == "9b20501dfd1d99161c257950f3444f3e49230c351c5c8e0943ef369f85f5205d");
    CHECK(of(63) == "30b345906b493f06f69444b6521113511c242f30e29840462950035043682f1e");
    CHECK(of(64) == "d8bc63b4fc1156e5e7d95a418b9bf54cd3174bedbc2db40f74895349b229b3c0");
    CHECK(of(65) == "1ee23b0fbcaecc1aff4a9e8f1645f35ab2c8e13609cd73b68df8b5e3f63ce073");
    CHECK(of(1000) == "89f4ff56a25dd1db06a4ce6033603775d705fb96f30f8693733fef602a1ca532");
  }
}

TEST_CASE("routes agree on any length, in pieces of any size") {
  std::mt19937 generator(0);
  const Sha256Route& plain = fga::sha256_routes().back();
  CHECK(std::string(plain.name) == "plain");
  for (const Sha256Route& route : fga::sha256_routes())
    for (int i = 0; i < 300; ++i) {
      const std::string content = random_bytes(generator, generator() % 5000);
      CAPTURE(route.name);
      CAPTURE(content.size());
      Sha256 in_pieces(route);
      for (size_t at = 0; at < content.size();) {
        const size_t piece = std::min<size_t>(generator() % 300, content.size() - at);
        in_pieces.add(reinterpret_cast<const uint8_t*>(content.data()) + at, piece);
        at += piece;
      }
      CHECK(in_pieces.finish() == checksum_of(content, plain));
    }
}

TEST_CASE("a processor with SHA instructions uses them") {
  std::ifstream file("/proc/cpuinfo");
  const std::string about{std::istreambuf_iterator<char>(file), {}};
  const bool has_them = about.find(" sha_ni") != std::string::npos;
  CHECK(fga::sha256_routes().size() == (has_them ? 2 : 1));
  if (has_them) CHECK(std::string(fga::sha256_routes().front().name) == "SHA instructions");
}

TEST_CASE("the checksum of a file is that of its bytes") {
  std::mt19937 generator(1);
  const Scratch scratch;
  for (const size_t size : {0, 1, 262143, 262144, 262145, 1000000}) {
    CAPTURE(size);
    const std::string content = random_bytes(generator, size);
    CHECK(fga::sha256_of_file(scratch.write("file", content)) == checksum_of(content, fga::sha256_routes().back()));
  }
}

TEST_CASE("a file that cannot be read has no checksum") {
  const Scratch scratch;
  CHECK_THROWS_WITH_AS(fga::sha256_of_file(scratch.path("nothing")),
                       doctest::Contains("nothing: No such file or directory"), fga::Error);
  CHECK_THROWS_WITH_AS(fga::sha256_of_file(scratch.path("")), doctest::Contains("Is a directory"), fga::Error);
}
