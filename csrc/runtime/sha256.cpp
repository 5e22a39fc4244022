#include "sha256.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include <fga_fast/error.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace fga {
namespace {

alignas(16) constexpr std::array<uint32_t, 64> kRounds = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

void add_block(Sha256State& state, const uint8_t* block) {
  std::array<uint32_t, 64> w;
  for (int i = 0; i < 16; ++i)
    w[i] = uint32_t{block[4 * i]} << 24 | uint32_t{block[4 * i + 1]} << 16 | uint32_t{block[4 * i + 2]} << 8 |
           block[4 * i + 3];
  for (int i = 16; i < 64; ++i) {
    const uint32_t a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + (std::rotr(a, 7) ^ std::rotr(a, 18) ^ a >> 3) + w[i - 7] +
           (std::rotr(b, 17) ^ std::rotr(b, 19) ^ b >> 10);
  }
  auto [a, b, c, d, e, f, g, h] = state;
#pragma GCC unroll 64  // then the words only change names and none moves
  for (int i = 0; i < 64; ++i) {
    const uint32_t one =
        h + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) + ((e & f) ^ (~e & g)) + kRounds[i] + w[i];
    const uint32_t two = (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + one, d = c, c = b, b = a, a = one + two;
  }
  const Sha256State change = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; ++i) state[i] += change[i];
}

void add_blocks(Sha256State& state, const uint8_t* blocks, size_t count) {
  for (size_t i = 0; i < count; ++i) add_block(state, blocks + 64 * i);
}

#if defined(__x86_64__)

// Asks cpuid, because older compilers do not know the name in __builtin_cpu_supports. These instructions imply SSE4.1.
bool has_sha_instructions() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b & 1U << 29) != 0;
}

// W[t] to W[t+3] from the sixteen words before them: four words per vector, the earliest in the lowest place.
__attribute__((target("sha,sse4.1"))) inline __m128i next_words(__m128i w16, __m128i w12, __m128i w8, __m128i w4) {
  const __m128i w7 = _mm_alignr_epi8(w4, w8, 4);  // W[t-7] to W[t-4]
  return _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(w16, w12), w7), w4);
}

// The instructions take the state as two vectors, (a, b, e, f) and (c, d, g, h), with the first word in the highest
// place. Two rounds make a new (a, b, e, f), and the old one becomes (c, d, g, h): the vectors swap roles each time.
__attribute__((target("sha,sse4.1"))) void add_blocks_by_instructions(Sha256State& state, const uint8_t* blocks,
                                                                      size_t count) {
  const auto word = [&](int i) { return static_cast<int>(state[i]); };
  __m128i abef = _mm_set_epi32(word(0), word(1), word(4), word(5));
  __m128i cdgh = _mm_set_epi32(word(2), word(3), word(6), word(7));
  const __m128i big_endian = _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3);
  for (; count > 0; --count, blocks += 64) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    __m128i w[4];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {  // four rounds each
      __m128i& now = w[i % 4];
      if (i < 4)
        now = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(blocks) + i), big_endian);
      else
        now = next_words(now, w[(i + 1) % 4], w[(i + 2) % 4], w[(i + 3) % 4]);
      const __m128i sum = _mm_add_epi32(now, _mm_load_si128(reinterpret_cast<const __m128i*>(kRounds.data()) + i));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_unpackhi_epi64(sum, sum));
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  alignas(16) std::array<uint32_t, 8> parts;
  _mm_store_si128(reinterpret_cast<__m128i*>(parts.data()), abef);
  _mm_store_si128(reinterpret_cast<__m128i*>(parts.data()) + 1, cdgh);
  state = {parts[3], parts[2], parts[7], parts[6], parts[1], parts[0], parts[5], parts[4]};
}

#endif

std::vector<Sha256Route> routes() {
  std::vector<Sha256Route> found;
#if defined(__x86_64__)
  if (has_sha_instructions()) found.push_back({"SHA instructions", add_blocks_by_instructions});
#endif
  found.push_back({"plain", add_blocks});
  return found;
}

class File {
 public:
  explicit File(const std::string& path) : path_(path), descriptor_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (descriptor_ < 0) fail();
  }
  ~File() { close(descriptor_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // The number of bytes read; 0 at the end.
  size_t read_into(std::vector<uint8_t>& buffer) {
    for (;;) {
      const ssize_t bytes = read(descriptor_, buffer.data(), buffer.size());
      if (bytes >= 0) return static_cast<size_t>(bytes);
      if (errno != EINTR) fail();
    }
  }

 private:
  [[noreturn]] void fail() const { throw Error("package: cannot read " + path_ + ": " + std::strerror(errno)); }

  std::string path_;
  int descriptor_;
};

}  // namespace

const std::vector<Sha256Route>& sha256_routes() {
  static const std::vector<Sha256Route> found = routes();
  return found;
}

void Sha256::add(const uint8_t* bytes, size_t count) {
  const size_t filled = size_ % 64;
  size_ += count;
  if (filled != 0) {
    const size_t taken = std::min(count, 64 - filled);
    std::copy_n(bytes, taken, rest_.begin() + static_cast<std::ptrdiff_t>(filled));
    if (filled + taken < 64) return;
    route_.add_blocks(state_, rest_.data(), 1);
    bytes += taken, count -= taken;
  }
  route_.add_blocks(state_, bytes, count / 64);
  std::copy_n(bytes + count / 64 * 64, count % 64, rest_.begin());
}

// The message ends with a one bit, zeros, and its length in bits.
std::string Sha256::finish() {
  const uint64_t bits = size_ * 8;
  std::array<uint8_t, 72> tail = {0x80};
  const size_t zeros_end = 64 - (size_ + 8) % 64;  // 1 to 64 bytes; the first is 0x80
  for (int i = 0; i < 8; ++i) tail[zeros_end + i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
  add(tail.data(), zeros_end + 8);
  std::string hex;
  for (const uint32_t word : state_)
    for (int shift = 28; shift >= 0; shift -= 4) hex += "0123456789abcdef"[word >> shift & 15];
  return hex;
}

std::string sha256_of_file(const std::string& path) {
  File file(path);
  Sha256 checksum;
  std::vector<uint8_t> buffer(size_t{1} << 18);  // fits the second level of cache
  while (const size_t bytes = file.read_into(buffer)) checksum.add(buffer.data(), bytes);
  return checksum.finish();
}

}  // namespace fga
