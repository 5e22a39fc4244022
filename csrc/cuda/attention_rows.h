// How the attention kernel reads rows of q, k, v and dO: straight into registers, or through tiles in shared memory,
// from which it reads 16 bytes a lane without bank conflicts.
#pragma once

#include <cstdint>

#include "attention_relevance.h"
#include "device.h"
#include "number.h"

namespace fga::cuda {

constexpr int kBlockBytes = 64;  // what four lanes read of a row at once
constexpr int kChunkBytes = 16;  // what one lane reads
constexpr int kChunksPerBlock = kBlockBytes / kChunkBytes;
constexpr float kLog2e = 1.4426950408889634F;

template <class T>
constexpr int kPerChunk = kChunkBytes / static_cast<int>(sizeof(typename T::Bits));

// Where chunk c of row eights + r lies in a tile whose rows have kBlocks blocks; eights is a multiple of 8, r below 8.
// Eight lanes read the four chunks of a block in two neighbouring rows at once; these lie in different banks. So does
// the same chunk of eight rows.
template <int kBlocks>
__device__ __forceinline__ int chunk_offset(int eights, int r, int c) {
  c ^= r >> 1;
  if constexpr (kBlocks % 2 == 0) c ^= (r & 1) * kChunksPerBlock;
  return (eights + r) * (kBlocks * kBlockBytes) + c * kChunkBytes;
}

template <class T>
__device__ __forceinline__ const typename T::Bits* head_of(const HeadTensor& t, int64_t batch, int64_t head) {
  return static_cast<const typename T::Bits*>(t.data) + batch * t.batch_stride + head * t.head_stride;
}

// The lane's part of 16 rows of K or V, zeros past the last key and past the head's width.
template <class T, int kBlocks>
__device__ __forceinline__ void load_keys(LeftBlock (&block)[kBlocks], const typename T::Bits* head, int64_t stride,
                                          int64_t first, int64_t keys, int width, int lane) {
  const int64_t upper = first + lane / 4, lower = upper + 8;
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    const int column = (j * kChunksPerBlock + lane % 4) * kPerChunk<T>;
    const uint4 zero = {0, 0, 0, 0};
    block[j].upper = block[j].lower = zero;
    if (column < width && upper < keys)
      block[j].upper = *reinterpret_cast<const uint4*>(head + upper * stride + column);
    if (column < width && lower < keys)
      block[j].lower = *reinterpret_cast<const uint4*>(head + lower * stride + column);
  }
}

// Starts the copy of rows first .. first + count - 1 of one head into a tile, zeros past the last token and past the
// head's width; all threads of the block take part.
template <class T, int kBlocks>
__device__ __forceinline__ void copy_rows(unsigned char* tile, const typename T::Bits* head, int64_t stride,
                                          int64_t first, int count, int64_t tokens, int width, int threads) {
  // A thread keeps to one column of chunks, so that little is computed between two copies.
  constexpr int kChunks = kBlocks * kChunksPerBlock;
  const int thread = static_cast<int>(recompute_from(threadIdx.x)), step = threads / kChunks, c = thread % kChunks;
  const int left = tokens - first < count ? static_cast<int>(tokens - first) : count;
  const bool inside = c * kPerChunk<T> < width;
  int r = thread / kChunks;
  if (r >= step) return;  // threads left over where the number of chunks does not divide theirs
  const auto* from = head + (first + r) * stride + c * kPerChunk<T>;
#pragma unroll 4
  for (; r < count; r += step, from += step * stride) {
    const bool valid = inside && r < left;
    copy_async<kChunkBytes>(tile + chunk_offset<kBlocks>(r & ~7, r & 7, c), valid ? from : head, valid);
  }
}

template <class T>
__device__ float bias_at(const LogitBias& bias, int64_t offset, int64_t query, int64_t key, int64_t queries,
                         int64_t keys) {
  if (query >= queries || key >= keys) return 0.0F;
  const int64_t i = offset + query * bias.query_stride + key * bias.key_stride;
  if (bias.float32) return static_cast<const float*>(bias.data)[i];
  return T::to_float(static_cast<const typename T::Bits*>(bias.data)[i]);
}

// Writes the messages of this warp's keys, from the four lanes that hold parts of each.
template <int kKeySteps>
__device__ __forceinline__ void write_messages(float* messages, const float (&sums)[kKeySteps][2], int64_t first_key,
                                               int64_t keys, int lane) {
#pragma unroll
  for (int i = 0; i < kKeySteps; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = sums[i][half];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      const int64_t key = first_key + 16 * i + 8 * half + lane / 4;
      if (lane % 4 == 0 && key < keys) messages[key] = sum;
    }
  }
}

}  // namespace fga::cuda
