// SHA-256 (FIPS 180-4), to recognise a package.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fga {

using Sha256State = std::array<uint32_t, 8>;

// An implementation that adds whole blocks of 64 bytes to the state.
struct Sha256Route {
  const char* name;
  void (*add_blocks)(Sha256State& state, const uint8_t* blocks, size_t count);
};

// The implementations for this processor, the fastest first; the last one is plain C++.
const std::vector<Sha256Route>& sha256_routes();

// The checksum of bytes that come in pieces of any size.
class Sha256 {
 public:
  explicit Sha256(const Sha256Route& route = sha256_routes().front()) : route_(route) {}

  void add(const uint8_t* bytes, size_t count);

  // The checksum of all added bytes in lower-case hexadecimal. Do not call add() afterwards.
  std::string finish();

 private:
  Sha256Route route_;
  Sha256State state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> rest_ = {};  // the last size_ % 64 bytes, less than a block
  uint64_t size_ = 0;
};

// The checksum of a file. Throws Error if it cannot read the file.
std::string sha256_of_file(const std::string& path);

}  // namespace fga
