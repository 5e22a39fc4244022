// Relevance through attention on CUDA: v Cbar of one step of the rollout, from q, k, v, log-sum-exp and dO.
//
// STATUS: compiled for sm_80, sm_90a and sm_100, its arithmetic and indexing run on the CPU by an emulation of threads
// and tensor cores (tests/csrc/native); it has never run on a device. Used only where the caller asks for
// backend="native".
//
// messages_kernel: a block of four warps owns some keys of one (row m, head h). Each warp holds its keys' rows of K and
// V in registers for the whole kernel and walks over all queries, whose rows of Q and dO come in tiles through shared
// memory, the next tile on its way while one is worked on:
//
//   S^T = K Q^T, dA^T = V dO^T (tensor cores),  A = exp2(S scale log2e - lse log2e),  message += row max(A dA, 0)
//
// Keys are the rows of these products, so a lane only ever adds up messages of its own keys: nothing is exchanged until
// two shuffles at the end, there are no atomics, and the result has the same bits every time. Query tiles at which no
// relevance arrives are skipped: in the last block, all but the class token's.
//
// FLOPs 4 M H Nq N D on tensor cores (float32: three times that, see number.h), M H Nq N exponentials. Bytes from
// memory: q, k, v, dO once a key tile, of which an image's share stays in L2, and 4 M H N out.
// combine_kernel: 4 M H N bytes in, 12 M N in and out.
#include "attention_relevance.h"

#include <cmath>
#include <cstdint>

#include "attention_rows.h"
#include "device.h"
#include "number.h"

namespace fga::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;

// Sizes that follow from the bytes of one head's row.
template <int kBlocks>
struct Tile {
  static constexpr int kRowBytes = kBlocks * kBlockBytes;
  static constexpr int kKeySteps = kBlocks <= 2 ? 2 : 1;  // times 16 keys a warp; limited by registers
  static constexpr int kKeys = kWarps * 16 * kKeySteps;
  static constexpr int kQueries = kBlocks <= 4 ? 64 : 32;  // limited by shared memory
};

template <int kBlocks>
struct alignas(16) Stage {
  unsigned char q[Tile<kBlocks>::kQueries * Tile<kBlocks>::kRowBytes];
  unsigned char grad_out[Tile<kBlocks>::kQueries * Tile<kBlocks>::kRowBytes];
  float lse[Tile<kBlocks>::kQueries];
  float row[Tile<kBlocks>::kQueries];
};

// The first tile of queries, from `tile` on, at which relevance arrives; the number of tiles if there is none. Every
// warp looks for itself and finds the same.
template <int kQueries>
__device__ int64_t next_tile(const float* row, int64_t queries, int64_t tile, int lane) {
  const int64_t tiles = (queries + kQueries - 1) / kQueries;
  for (; tile < tiles; ++tile) {
    const float* of_tile = row + tile * kQueries;
    const int64_t left = queries - tile * kQueries;
    bool arrives = false;
#pragma unroll
    for (int i = lane; i < kQueries; i += kWarpSize) arrives = arrives || (i < left && of_tile[i] != 0.0F);
    if (__any_sync(kAllLanes, arrives)) break;
  }
  return tile;
}

// What one block works on.
template <class T>
struct Work {
  const typename T::Bits *q, *k, *v, *grad_out;
  const float *lse, *row;
  int64_t bias;  // offset of this image and head
};

template <class T, int kBlocks>
__device__ __forceinline__ void copy_tile(Stage<kBlocks>& stage, const Work<T>& w, const AttentionRelevance& a,
                                          int64_t tile) {
  const int64_t first = tile * Tile<kBlocks>::kQueries;
  constexpr int kCount = Tile<kBlocks>::kQueries;
  copy_rows<T, kBlocks>(stage.q, w.q, a.q.token_stride, first, kCount, a.queries, a.width, kThreads);
  copy_rows<T, kBlocks>(stage.grad_out, w.grad_out, a.grad_out.token_stride, first, kCount, a.queries, a.width,
                        kThreads);
  const int i = static_cast<int>(threadIdx.x);
  if (i < Tile<kBlocks>::kQueries) {
    const bool valid = first + i < a.queries;  // past the end: row 0, so that nothing is added
    copy_async<4>(&stage.lse[i], valid ? w.lse + first + i : w.lse, valid);
    copy_async<4>(&stage.row[i], valid ? w.row + first + i : w.row, valid);
  }
}

// Adds what the queries of one tile send to this warp's keys. sums[i][0 and 1] belong to keys g and g + 8 of step i.
template <class T, int kBlocks, bool kBias>
__device__ __forceinline__ void add_messages(float (&sums)[Tile<kBlocks>::kKeySteps][2], const Stage<kBlocks>& stage,
                                             const LeftBlock (&k)[Tile<kBlocks>::kKeySteps][kBlocks],
                                             const LeftBlock (&v)[Tile<kBlocks>::kKeySteps][kBlocks],
                                             const AttentionRelevance& a, int64_t bias, int64_t first_query,
                                             int64_t first_key, int lane) {
  constexpr int kKeySteps = Tile<kBlocks>::kKeySteps;
  const float scale = a.scale * kLog2e, lowest = a.is_signed ? -INFINITY : 0.0F;
  const int64_t left = a.queries - first_query;
  const int count = left < Tile<kBlocks>::kQueries ? static_cast<int>(left) : Tile<kBlocks>::kQueries;
#pragma unroll 1
  for (int n = 0; n < count; n += 8) {
    float s[kKeySteps][4] = {}, gradient[kKeySteps][4] = {};  // [16 keys, 8 queries] each
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      const int at = chunk_offset<kBlocks>(n, lane / 4, j * kChunksPerBlock + lane % 4);
      const uint4 q = *reinterpret_cast<const uint4*>(stage.q + at);
      const uint4 grad_out = *reinterpret_cast<const uint4*>(stage.grad_out + at);
#pragma unroll
      for (int i = 0; i < kKeySteps; ++i) {
        T::multiply(s[i], k[i][j], q);
        T::multiply(gradient[i], v[i][j], grad_out);
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {  // element e: key g + 8 (e / 2), query 2 (lane % 4) + e % 2
      const int query = n + 2 * (lane % 4) + e % 2;
      const float lse = stage.lse[query] * kLog2e, row = stage.row[query];
#pragma unroll
      for (int i = 0; i < kKeySteps; ++i) {
        float logit = s[i][e] * scale - lse;
        if constexpr (kBias)
          logit += kLog2e * bias_at<T>(a.bias, bias, first_query + query, first_key + 16 * i + lane / 4 + 8 * (e / 2),
                                       a.queries, a.keys);
        sums[i][e / 2] += row * max_or_nan(exp2_approximate(logit) * gradient[i][e], lowest);
      }
    }
  }
}

template <class T, int kBlocks, bool kBias>
__global__ void __launch_bounds__(kThreads, T::kNarrow ? 3 : 2)
    messages_kernel(const AttentionRelevance a, unsigned key_tiles) {
  using Sizes = Tile<kBlocks>;
  auto* stages = reinterpret_cast<Stage<kBlocks>*>(dynamic_shared());
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t head_of_row = blockIdx.x / key_tiles;  // row * heads + head
  const int64_t head = head_of_row % a.heads, row = head_of_row / a.heads;
  const int64_t image = a.image != nullptr ? a.image[row] : row;
  const int64_t first_key = static_cast<int64_t>(blockIdx.x % key_tiles) * Sizes::kKeys + warp * 16 * Sizes::kKeySteps;
  const bool known = image >= 0 && image < a.images;

  float sums[Sizes::kKeySteps][2];
#pragma unroll
  for (int i = 0; i < Sizes::kKeySteps; ++i) sums[i][0] = sums[i][1] = known ? 0.0F : NAN;
  if (known) {
    const Work<T> w = {head_of<T>(a.q, image, head),
                       head_of<T>(a.k, image, head),
                       head_of<T>(a.v, image, head),
                       head_of<T>(a.grad_out, row, head),
                       a.lse + (image * a.heads + head) * a.queries,
                       a.row + row * a.queries,
                       image * a.bias.batch_stride + head * a.bias.head_stride};
    LeftBlock k[Sizes::kKeySteps][kBlocks], v[Sizes::kKeySteps][kBlocks];
#pragma unroll
    for (int i = 0; i < Sizes::kKeySteps; ++i) {
      load_keys<T, kBlocks>(k[i], w.k, a.k.token_stride, first_key + 16 * i, a.keys, a.width, lane);
      load_keys<T, kBlocks>(v[i], w.v, a.v.token_stride, first_key + 16 * i, a.keys, a.width, lane);
    }
    const int64_t tiles = (a.queries + Sizes::kQueries - 1) / Sizes::kQueries;
    int64_t tile = next_tile<Sizes::kQueries>(w.row, a.queries, 0, lane);
    if (tile < tiles) copy_tile<T, kBlocks>(stages[0], w, a, tile);
    commit_copies();
    for (int now = 0; tile < tiles; now ^= 1) {
      const int64_t next = next_tile<Sizes::kQueries>(w.row, a.queries, tile + 1, lane);
      if (next < tiles) copy_tile<T, kBlocks>(stages[now ^ 1], w, a, next);
      commit_copies();
      wait_for_copies<1>();  // all but the group just closed
      __syncthreads();
      if (first_key < a.keys)
        add_messages<T, kBlocks, kBias>(sums, stages[now], k, v, a, w.bias, tile * Sizes::kQueries, first_key, lane);
      __syncthreads();  // the stage is free for the tile after the next
      tile = next;
    }
  }
  write_messages<Sizes::kKeySteps>(a.messages + head_of_row * a.keys, sums, first_key, a.keys, lane);
}

__global__ void __launch_bounds__(kThreads) combine_kernel(const AttentionRelevance a, unsigned key_tiles) {
  const int64_t row = blockIdx.x / key_tiles;
  const int64_t key = static_cast<int64_t>(blockIdx.x % key_tiles) * kThreads + static_cast<int64_t>(threadIdx.x);
  if (key >= a.keys) return;
  const float* message = a.messages + row * a.heads * a.keys + key;
  float sum = 0.0F;
  for (int64_t head = 0; head < a.heads; ++head) sum += message[head * a.keys];
  sum /= static_cast<float>(a.heads);
  const int64_t i = row * a.keys + key;
  a.row_out[i] = a.gate != nullptr ? a.gate[i] * sum : sum;
}

constexpr int64_t kMostBlocks = 0x7fffffff;
constexpr int kFewestKeys = kWarps * 16;  // of any tile

template <class T, int kBlocks>
void launch_messages(const AttentionRelevance& a, cudaStream_t stream) {
  const int64_t key_tiles = (a.keys + Tile<kBlocks>::kKeys - 1) / Tile<kBlocks>::kKeys;
  const auto kernel = a.bias.data != nullptr ? messages_kernel<T, kBlocks, true> : messages_kernel<T, kBlocks, false>;
  launch(kernel, static_cast<unsigned>(a.rows * a.heads * key_tiles), kThreads, 2 * sizeof(Stage<kBlocks>), stream, a,
         static_cast<unsigned>(key_tiles));
}

template <class T>
void launch_narrow(const AttentionRelevance& a, cudaStream_t stream) {
  if (a.width <= 32) return launch_messages<T, 1>(a, stream);
  if (a.width <= 64) return launch_messages<T, 2>(a, stream);
  if (a.width <= 96) return launch_messages<T, 3>(a, stream);
  return launch_messages<T, 4>(a, stream);
}

}  // namespace

bool fits(const AttentionRelevance& a) {
  const int64_t key_tiles = (a.keys + kFewestKeys - 1) / kFewestKeys;
  return a.width > 0 && a.width <= kWidestHead && a.width % 8 == 0 && a.heads > 0 &&
         key_tiles <= kMostBlocks / a.heads && a.rows <= kMostBlocks / (a.heads * key_tiles);
}

void attention_messages(const AttentionRelevance& a, cudaStream_t stream) {
  if (a.type == NumberType::bf16) return launch_narrow<Bf16>(a, stream);
  if (a.type == NumberType::half) return launch_narrow<Half>(a, stream);
  if (a.width <= 32) return launch_messages<Float, 2>(a, stream);
  if (a.width <= 64) return launch_messages<Float, 4>(a, stream);
  if (a.width <= 96) return launch_messages<Float, 6>(a, stream);
  return launch_messages<Float, 8>(a, stream);
}

void attention_combine(const AttentionRelevance& a, cudaStream_t stream) {
  const int64_t key_tiles = (a.keys + kThreads - 1) / kThreads;
  launch(combine_kernel, static_cast<unsigned>(a.rows * key_tiles), kThreads, 0, stream, a,
         static_cast<unsigned>(key_tiles));
}

}  // namespace fga::cuda
