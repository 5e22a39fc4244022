// Runs CUDA kernels on the CPU: every CUDA thread is a fiber, one block at a time. What csrc/cuda/device.h wraps is
// replaced here by the same thing done by hand, with the operand layouts of the PTX manual, so that a kernel's indexing
// and arithmetic can be tested without a device. Not its speed, nor what a real memory system may reorder.
//
// What it finds besides wrong results: lanes of a warp that meet in different instructions, barriers not all threads
// reach, copies read before they were waited for (they are carried out as late as allowed, or at once, by choice),
// dependence on the order in which threads run (by choice), shared memory read before it was written (it starts as
// NaN), and, under AddressSanitizer, accesses outside of any buffer.
#pragma once

#include <math.h>  // also declares isnan, pow and tanh outside of std, as device code has them

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;

namespace on_host {

// The same bits as another type.
template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float bf16_to_float(uint16_t bits) {
  return bits_as<float>(uint32_t{bits} << 16);
}
inline float half_to_float(uint16_t bits) {
  return static_cast<float>(bits_as<_Float16>(bits));
}

// c [16, 8] += a [16, depth] b [depth, 8] for one warp; a and b by functions of (row, depth index) and (depth index,
// column) that read the lanes' registers.
template <class A, class B>
void multiply_warp(float (&c)[4], const char* what, int depth, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                   uint32_t b0, uint32_t b1, const A& a, const B& b) {
  Thread& t = me();
  const uint32_t in[] = {a0, a1, a2, a3, b0, b1};
  std::copy(std::begin(in), std::end(in), t.in);
  block->meet_warp(what, [&] {
    Thread* lanes = block->warp_of_current();
    double left[16][16], right[16][8];
    for (int k = 0; k < depth; ++k) {
      for (int row = 0; row < 16; ++row) left[row][k] = a(lanes, row, k);
      for (int column = 0; column < 8; ++column) right[k][column] = b(lanes, k, column);
    }
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) {
        double sum = 0;
        for (int k = 0; k < depth; ++k) sum += left[row][k] * right[k][column];
        const auto rounded = static_cast<float>(sum);
        std::memcpy(&lanes[row % 8 * 4 + column / 2].out[row / 8 * 2 + column % 2], &rounded, sizeof rounded);
      }
  });
  for (int i = 0; i < 4; ++i) c[i] += bits_as<float>(me().out[i]);
}

// mma.m16n8k16, 16-bit: a0 and a1 hold rows g and g + 8 at depths 2t, 2t + 1, a2 and a3 the same at depths + 8; b0 and
// b1 hold column g at depths 2t, 2t + 1 and + 8; g = lane / 4, t = lane % 4.
template <float (*kToFloat)(uint16_t)>
void multiply_16bit(float (&c)[4], const char* what, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                    uint32_t b1) {
  const auto half_of = [](uint32_t pair, int k) { return kToFloat(static_cast<uint16_t>(pair >> (k % 2 * 16))); };
  multiply_warp(
      c, what, 16, a0, a1, a2, a3, b0, b1,
      [&](Thread* lanes, int row, int k) { return half_of(lanes[row % 8 * 4 + k % 8 / 2].in[row / 8 + k / 8 * 2], k); },
      [&](Thread* lanes, int k, int column) { return half_of(lanes[column * 4 + k % 8 / 2].in[4 + k / 8], k); });
}

// Meets with the warp and gives what `lane` brought.
template <class V>
V exchanged(V value, int lane, const char* what) {
  static_assert(sizeof(V) <= 8);
  std::memcpy(me().in, &value, sizeof value);
  block->meet_warp(what, [] {
    Thread* lanes = block->warp_of_current();
    for (int i = 0; i < kLanes; ++i) std::memcpy(lanes[i].out, lanes[i].in, 8);  // so that `in` may be reused at once
  });
  std::memcpy(&value, block->warp_of_current()[lane].out, sizeof value);
  return value;
}

}  // namespace on_host

#define threadIdx (on_host::block->current().index)
#define blockIdx (on_host::block->index)
#define gridDim (on_host::block->grid)
#define blockDim (on_host::block->size)

inline void __syncthreads() {
  on_host::block->meet(on_host::block->all, static_cast<int>(on_host::block->threads.size()), "__syncthreads", [] {});
}
inline int __any_sync(unsigned, bool vote) {
  on_host::me().in[0] = vote ? 1 : 0;
  on_host::block->meet_warp("__any_sync", [] {
    on_host::Thread* lanes = on_host::block->warp_of_current();
    uint32_t any = 0;
    for (int i = 0; i < on_host::kLanes; ++i) any |= lanes[i].in[0];
    for (int i = 0; i < on_host::kLanes; ++i) lanes[i].out[0] = any;
  });
  return static_cast<int>(on_host::me().out[0]);
}
template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  const int lane = static_cast<int>(on_host::me().index.x) % on_host::kLanes;
  return on_host::exchanged(value, lane ^ mask, "__shfl_xor_sync");
}

template <class V>
V __shfl_up_sync(unsigned, V value, int step) {
  const int lane = static_cast<int>(on_host::me().index.x) % on_host::kLanes;
  return on_host::exchanged(value, lane < step ? lane : lane - step, "__shfl_up_sync");
}
inline int __syncthreads_or(int vote) {
  on_host::Block& block = *on_host::block;
  on_host::me().in[0] = vote != 0 ? 1 : 0;
  block.meet(block.all, static_cast<int>(block.threads.size()), "__syncthreads_or", [&block] {
    block.vote = 0;
    for (const on_host::Thread& thread : block.threads) block.vote |= static_cast<int>(thread.in[0]);
  });
  return block.vote;
}
template <class V>
V atomicAdd(V* to, V value) {
  const V before = *to;
  *to += value;
  return before;
}

namespace fga::cuda {

inline uint32_t bits_of(float x) {
  return on_host::bits_as<uint32_t>(x);
}
inline float value_of(uint32_t bits) {
  return on_host::bits_as<float>(bits);
}
inline uint64_t bits_of(double x) {
  return on_host::bits_as<uint64_t>(x);
}
inline double value_of(uint64_t bits) {
  return on_host::bits_as<double>(bits);
}

inline void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  on_host::multiply_16bit<on_host::bf16_to_float>(c, "mma bf16", a0, a1, a2, a3, b0, b1);
}
inline void mma_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  on_host::multiply_16bit<on_host::half_to_float>(c, "mma f16", a0, a1, a2, a3, b0, b1);
}
// mma.m16n8k8, tf32: a0 and a1 hold rows g and g + 8 at depth t, a2 and a3 the same at t + 4; b0 and b1 column g at t
// and t + 4. The lower 13 bits of every factor are not seen.
inline void mma_tf32(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const auto seen = [](uint32_t bits) { return value_of(bits & 0xffffe000U); };
  on_host::multiply_warp(
      c, "mma tf32", 8, a0, a1, a2, a3, b0, b1,
      [&](on_host::Thread* lanes, int row, int k) { return seen(lanes[row % 8 * 4 + k % 4].in[row / 8 + k / 4 * 2]); },
      [&](on_host::Thread* lanes, int k, int column) { return seen(lanes[column * 4 + k % 4].in[4 + k / 4]); });
}

template <int kBytes>
void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % kBytes != 0 || reinterpret_cast<uintptr_t>(global) % kBytes != 0)
    on_host::block->fail("copy_async of " + std::to_string(kBytes) + " bytes between unaligned addresses");
  const on_host::Copy copy = {shared, global, kBytes, valid};
  if (on_host::settings.copies_at_once)
    copy.run();
  else
    on_host::me().open.push_back(copy);
}
inline void commit_copies() {
  on_host::me().groups.push_back(std::move(on_host::me().open));
  on_host::me().open.clear();
}
template <int kPending>
void wait_for_copies() {
  auto& groups = on_host::me().groups;
  for (; groups.size() > static_cast<std::size_t>(kPending); groups.erase(groups.begin()))
    for (const on_host::Copy& copy : groups.front()) copy.run();
}

inline uint32_t recompute_from(uint32_t x) {
  return x;
}
inline float exp2_approximate(float x) {
  return std::exp2(x);
}
inline float max_or_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? NAN : std::max(a, b);
}
using on_host::half_to_float;
inline unsigned char* dynamic_shared() {
  return on_host::block->shared.data();
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, std::size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  on_host::most_shared_bytes = std::max(on_host::most_shared_bytes, shared_bytes);
  on_host::Block b;
  b.threads.resize(threads);
  b.size.x = threads;
  b.grid.x = blocks;
  b.shared.resize(shared_bytes);
  b.body = [&] { kernel(arguments...); };
  for (b.index.x = 0; b.index.x < blocks && !b.failed; ++b.index.x) {
    std::fill(b.shared.begin(), b.shared.end(), 0xff);  // NaN in every float type
    on_host::run_block(b);
  }
}

}  // namespace fga::cuda
