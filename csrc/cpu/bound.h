// Bounds of pre-activations that say, for certain, which features of which patches are off, from products of 16-bit
// integers at half the cost of the float32 product. Only the few features that may be on get their float32 product.
//
// A row is rounded to integers, x = s q + d. With x' = s q,
//   |x . w - s_x s_w (q_x . q_w)| <= |d_x| |w| + |x'| |d_w|                                     (Cauchy-Schwarz)
// q_x . q_w is exact: |q| < 2^15.5, so no partial sum reaches 2^31. Lengths are computed in double and rounded up, and
// the rounding of the float32 product itself is part of the bound, so nothing that is on is ever missed.
#pragma once

#include <cstdint>

namespace fga {

// |q| of a row of integers, rounding included, stays under 46,340 = 2^15.5 for rows of up to kMostWidth numbers.
constexpr double kLength = 46000;
constexpr int64_t kMostWidth = 65536;
constexpr int64_t kPanelFeatures = 16;  // of the packed encoder: [F / 16, C / 2, 16, 2] ...
constexpr int64_t kGroupFeatures = 32;  // ... with F padded to groups of two panels
constexpr int64_t kMostRows = 12;       // patches that a kernel takes at once; quantised patches come in such groups

// Whether the score uses bounds for an encoder of this width, on this processor.
bool bounds_here(int64_t width);

// The smallest float32 that is not below the value.
float up(double value);

// What is known of a row that was rounded: x = scale * q + d.
struct RoundedRow {
  float scale;
  float length;  // at least |x| and |scale * q|
  float error;   // at least |d|; infinite where the row is too large, too small or not finite, so that all is possible
};

// Rounds a row of `width` numbers into q.
RoundedRow round_row(const float* x, int64_t width, int16_t* q);

// Features [first, first + count) of a dictionary whose encoder was rounded; the pointers are to the tile's first one.
struct BoundedTile {
  int64_t count, width, pairs;                   // pairs = padded C / 2
  const int16_t* panels;                         // [padded count / 16, pairs, 16, 2]
  const float *scale, *length, *error, *offset;  // [count padded to 32]; offset: what is added before comparing with 0
  const float* rows;                             // [count, C] the encoder in float32
  float* codes;                                  // [count, ld_codes]
  int64_t ld_codes;
  int32_t* possible;  // [count], see FeatureTile
};

// Patches of a range; `codes` of the tile are at their first patch.
struct RoundedPatches {
  int64_t count, ld;
  const int16_t* q;                     // [count padded to kMostRows, 2 * pairs]
  const float *scale, *length, *error;  // [count padded to kMostRows]
  const float* floor;                   // [count padded to kMostRows]: what must be exceeded
  const float* x;                       // [count, ld] in float32
};

// Counts, for each feature, the patches in which it may be on, and computes its pre-activations there, without bias;
// its other patches get -inf. Returns the sum of the counts.
#define FGA_DECLARE_BOUND(isa)                                        \
  namespace isa {                                                     \
  int64_t bounded_product(const BoundedTile&, const RoundedPatches&); \
  }
FGA_DECLARE_BOUND(avx2)
FGA_DECLARE_BOUND(avx512)
#undef FGA_DECLARE_BOUND

}  // namespace fga
