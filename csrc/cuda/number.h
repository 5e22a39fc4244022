// Number types of attention on tensor cores. Each knows how a block of 64 bytes of one row, spread over four lanes as
// 16 bytes each, is multiplied with such blocks of other rows, so that kernels read the same bytes for every type.
//
// Which of a row's numbers a tensor core calls which depth index does not matter as long as both factors agree. So lane
// t of four takes the 16 bytes at 16 t of a block, from global or shared memory in one instruction, for both factors.
#pragma once

#include "device.h"

namespace fga::cuda {

// Two rows of the left factor, g and g + 8 where g = lane / 4, 16 bytes each: one lane's part of 16 rows x 64 bytes.
struct LeftBlock {
  uint4 upper, lower;
};

template <void (*kMultiply)(float (&)[4], uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t)>
__device__ __forceinline__ void multiply_16bit(float (&c)[4], const LeftBlock& a, const uint4& b) {
  kMultiply(c, a.upper.x, a.lower.x, a.upper.y, a.lower.y, b.x, b.y);
  kMultiply(c, a.upper.z, a.lower.z, a.upper.w, a.lower.w, b.z, b.w);
}

struct Bf16 {
  using Bits = uint16_t;
  static constexpr bool kNarrow = true;
  static __device__ __forceinline__ float to_float(Bits bits) { return value_of(uint32_t{bits} << 16); }
  static __device__ __forceinline__ void multiply(float (&c)[4], const LeftBlock& a, const uint4& b) {
    multiply_16bit<mma_bf16>(c, a, b);
  }
};

struct Half {
  using Bits = uint16_t;
  static constexpr bool kNarrow = true;
  static __device__ __forceinline__ float to_float(Bits bits) { return half_to_float(bits); }
  static __device__ __forceinline__ void multiply(float (&c)[4], const LeftBlock& a, const uint4& b) {
    multiply_16bit<mma_half>(c, a, b);
  }
};

// float32 on tensor cores that multiply 11-bit significands: x = high + low, where high keeps the upper bits exactly
// and low the next ones, and x y = high high + high low + low high to about 2^-21.
struct Float {
  using Bits = float;
  static constexpr bool kNarrow = false;
  static __device__ __forceinline__ float to_float(Bits value) { return value; }
  static __device__ __forceinline__ uint32_t high(uint32_t x) { return x & 0xffffe000U; }
  static __device__ __forceinline__ uint32_t low(uint32_t x) { return bits_of(value_of(x) - value_of(high(x))); }
  static __device__ __forceinline__ void step(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                              uint32_t b0, uint32_t b1) {
    mma_tf32(c, low(a0), low(a1), low(a2), low(a3), high(b0), high(b1));
    mma_tf32(c, high(a0), high(a1), high(a2), high(a3), low(b0), low(b1));
    mma_tf32(c, high(a0), high(a1), high(a2), high(a3), high(b0), high(b1));
  }
  // The left factor serves a whole loop. Its parts are split off each time: kept, they would take twice the registers.
  static __device__ __forceinline__ void multiply(float (&c)[4], const LeftBlock& a, const uint4& b) {
    step(c, recompute_from(a.upper.x), recompute_from(a.lower.x), recompute_from(a.upper.y), recompute_from(a.lower.y),
         b.x, b.y);
    step(c, recompute_from(a.upper.z), recompute_from(a.lower.z), recompute_from(a.upper.w), recompute_from(a.lower.w),
         b.z, b.w);
  }
};

}  // namespace fga::cuda
