// The product of bound.h, compiled for AVX2 and AVX-512. No guard: each inclusion makes its own copy (see
// vector.h). It needs score_kernel.h for the float32 products.

typedef typename VectorOf<float>::integers Integers;
constexpr int kBoundRows = FGA_VECTOR_BYTES == 64 ? 12 : 6;  // with two vectors of features as many sums as fit
constexpr int64_t kBoundFeatures = 2 * kLanes<float>;
constexpr int64_t kMostPatches = 256;  // of a range

inline Integers multiply_pairs(Integers a, Integers b) {  // a0 b0 + a1 b1 of the pairs of 16-bit integers in a lane
#if FGA_VECTOR_BYTES == 64
  return (Integers)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
  return (Integers)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

// Bit i: upper[i] is above zero, or not a number.
inline uint32_t possibly_on(Vector<float> upper) {
#if FGA_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask((__m512)upper, _mm512_setzero_ps(), _CMP_NLE_UQ);
#else
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)upper, _mm256_setzero_ps(), _CMP_NLE_UQ));
#endif
}

// Exact sums of two vectors of features with kBoundRows patches.
inline void multiply_integers(const int16_t* w, int64_t to_second, const int16_t* q, int64_t pairs,
                              Integers (&sums)[kBoundRows][2]) {
  Integers sum[kBoundRows][2] = {};
  for (int64_t c = 0; c < pairs; ++c) {
    Integers first, second;
    __builtin_memcpy(&first, w + c * 2 * kPanelFeatures, sizeof(first));
    __builtin_memcpy(&second, w + to_second + c * 2 * kPanelFeatures, sizeof(second));
#pragma GCC unroll 12
    for (int r = 0; r < kBoundRows; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, q + (r * pairs + c) * 2, sizeof(pair));
      const Integers all = pair - Integers{};
      sum[r][0] += multiply_pairs(first, all);
      sum[r][1] += multiply_pairs(second, all);
      // Else GCC loads all of q first, and has no registers left for the sums: half as fast.
      asm("" : "+v"(sum[r][0]), "+x"(sum[r][1]));
    }
  }
  __builtin_memcpy(sums, sum, sizeof(sum));
}

// Which patches each feature of a group may be on for.
struct Possible {
  int32_t count[kBoundFeatures];
  int32_t patch[kBoundFeatures][kMostPatches];
};

inline void find_possible(const BoundedTile& tile, int64_t f, const RoundedPatches& patches, Possible& possible) {
  const int64_t to_second = FGA_VECTOR_BYTES == 64 ? kPanelFeatures * 2 * tile.pairs : 2 * kLanes<float>;
  const int16_t* panel = tile.panels + f * 2 * tile.pairs;
  for (int32_t& n : possible.count) n = 0;
  for (int64_t t = 0; t < patches.count; t += kBoundRows) {
    Integers sums[kBoundRows][2];
    multiply_integers(panel, to_second, patches.q + t * 2 * tile.pairs, tile.pairs, sums);
    const int64_t rows = std::min<int64_t>(kBoundRows, patches.count - t);
    for (int64_t v = 0; v < 2; ++v) {
      const int64_t at = f + v * kLanes<float>;
      const Vector<float> scale = load(tile.scale + at), length = load(tile.length + at), error = load(tile.error + at),
                          offset = load(tile.offset + at);
      for (int64_t r = 0; r < rows; ++r) {
        const Vector<float> z = __builtin_convertvector(sums[r][v], Vector<float>) * (scale * patches.scale[t + r]);
        const Vector<float> bound = length * patches.error[t + r] + error * patches.length[t + r];
        for (uint32_t bits = possibly_on((z + bound) + (offset - patches.floor[t + r])); bits; bits &= bits - 1) {
          const int64_t lane = v * kLanes<float> + __builtin_ctz(bits);
          possible.patch[lane][possible.count[lane]++] = static_cast<int32_t>(t + r);
        }
      }
    }
  }
}

// Products of a row with some patches. Each is the same sum in the same order, whatever stands beside it, so that a
// feature's value does not depend on which others may be on.
inline void multiply_possible(const float* w, const RoundedPatches& patches, const int32_t* which, int32_t n,
                              int64_t width, float* values) {
  const auto x = [&](int32_t i) { return patches.x + which[i] * patches.ld; };
  int32_t i = 0;
  for (; i + 3 <= n; i += 3) {
    const float* three[] = {x(i), x(i + 1), x(i + 2)};
    dots<3, 4>(w, three, width, values + i);
  }
  for (; i < n; ++i) {
    const float* one = x(i);
    dots<1, 4>(w, &one, width, values + i);
  }
}

int64_t bounded_product(const BoundedTile& tile, const RoundedPatches& patches) {
  Possible possible;
  float values[kMostPatches];
  int64_t total = 0;
  for (int64_t f = 0; f < tile.count; f += kBoundFeatures) {
    find_possible(tile, f, patches, possible);
    for (int64_t i = 0; i < std::min(kBoundFeatures, tile.count - f); ++i) {
      const int32_t n = tile.possible[f + i] = possible.count[i];
      if (n == 0) continue;
      float* codes = tile.codes + (f + i) * tile.ld_codes;
      for (int64_t t = 0; t < patches.count; ++t) codes[t] = -std::numeric_limits<float>::infinity();
      multiply_possible(tile.rows + (f + i) * tile.width, patches, possible.patch[i], n, tile.width, values);
      for (int32_t j = 0; j < n; ++j) codes[possible.patch[i][j]] = values[j];
      total += n;
    }
  }
  return total;
}
