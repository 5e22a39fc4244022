// One step of the rollout and all gradients of attention in one pass, for heads small enough to lie on one
// multiprocessor: dq, dk, dv and the relevance messages, of which the probabilities and dA are there anyway.
//
// STATUS: compiled for sm_80, sm_90a and sm_100, its arithmetic and indexing run on the CPU by an emulation of threads
// and tensor cores (tests/csrc/native); it has never run on a device. Off unless asked for, until a device shows a gain.
//
// A block owns one (row m, head h), a warp 32 keys of it. All of K and V stay in shared memory; tiles of 64
// queries of Q and dO come through a double buffer. For 16 queries at a time a warp computes
//
//   S^T = K Q^T, dA^T = V dO^T;  P = exp2(..), message += row max(P dA, 0), dS = P (dA - delta)
//   dV += P^T dO, dK += dS^T Q          from the registers that hold P and dS, sums in registers to the end
//
// and leaves dS in shared memory; when all warps have, they share out dQ = dS K of the tile. Every key is in the block,
// so nothing is added up across blocks: no atomics, the same bits every time, where PyTorch's flash backward needs
// torch.use_deterministic_algorithms for that. delta = rowsum(dO out) is computed at the start.
//
// FLOPs 10 M H Nq N D on tensor cores. Bytes: q, k, v, out, dO once in, dq, dk, dv once out.
// Shared memory: 2 D + 64 numbers of 16 bits a key, 256 D for the double buffer, statistics: 134 KB at most.
#include <cmath>
#include <cstdint>

#include "attention_relevance.h"
#include "attention_rows.h"
#include "device.h"
#include "number.h"

namespace fga::cuda {
namespace {

constexpr int kKeySteps = 2;  // times 16 keys a warp
constexpr int kWarpKeys = 16 * kKeySteps;
constexpr int kMostThreads = kMostTokens / kWarpKeys * kWarpSize;
constexpr int kTileQueries = 64;
constexpr int kScoreBlocks = kTileQueries * 2 / kBlockBytes;  // blocks of a row of dS, one key's 64 queries
constexpr int kPaddedQueries = (kMostTokens + kTileQueries - 1) / kTileQueries * kTileQueries;

// Sizes that follow from the bytes of one head's row.
template <int kBlocks>
struct Width {
  static constexpr int kRowBytes = kBlocks * kBlockBytes;
  static constexpr int kNumbers = kRowBytes / 2;
  static constexpr int kTiles = kNumbers / 8;  // columns of a tensor core's output
};

// Shared memory; K, V and dS of all keys follow.
template <int kBlocks>
struct alignas(16) Shared {
  float lse[kPaddedQueries], row[kPaddedQueries], delta[kPaddedQueries];
  unsigned char q[2][kTileQueries * Width<kBlocks>::kRowBytes];
  unsigned char grad_out[2][kTileQueries * Width<kBlocks>::kRowBytes];
};

template <int kBlocks>
constexpr std::size_t shared_bytes(int keys) {
  return sizeof(Shared<kBlocks>) + static_cast<std::size_t>(keys) * (2 * kBlocks + kScoreBlocks) * kBlockBytes;
}

// What one block works on.
template <class T>
struct Work {
  const typename T::Bits *q, *k, *v, *grad_out, *out;
  int row, head;
  int64_t bias;  // offset of this image and head
  float scale;   // NaN where the image does not exist
  int warps;
};

// Sums over all queries: messages and gradients of this warp's keys.
template <int kBlocks>
struct Sums {
  float message[kKeySteps][2];
  float dv[kKeySteps][Width<kBlocks>::kTiles][4], dk[kKeySteps][Width<kBlocks>::kTiles][4];
};

template <class T>
__device__ __forceinline__ float dot(uint32_t a, uint32_t b) {
  const auto low = [](uint32_t pair) { return T::to_float(static_cast<uint16_t>(pair)); };
  const auto high = [](uint32_t pair) { return T::to_float(static_cast<uint16_t>(pair >> 16)); };
  return low(a) * low(b) + high(a) * high(b);
}

// Log-sum-exp, arriving relevance and delta of all queries. Queries past the end get a probability of zero.
template <class T, int kBlocks>
__device__ void load_statistics(Shared<kBlocks>& shared, const Work<T>& w, const AttentionGradients& a, int64_t image,
                                int warp, int lane) {
  const AttentionRelevance& r = a.relevance;
  const float* lse = r.lse + (image * r.heads + w.head) * r.queries;
  for (int i = static_cast<int>(threadIdx.x); i < kPaddedQueries; i += w.warps * kWarpSize) {
    shared.lse[i] = i < r.queries ? lse[i] * kLog2e : INFINITY;
    shared.row[i] = i < r.queries ? r.row[w.row * r.queries + i] : 0.0F;
  }
  constexpr int kChunks = kBlocks * kChunksPerBlock, kRows = kWarpSize / kChunks;
  const int column = lane % kChunks * kPerChunk<T>;
  for (int first = warp * kRows; first < kPaddedQueries; first += w.warps * kRows) {
    const int query = first + lane / kChunks;
    float sum = 0.0F;
    if (query < r.queries && column < r.width) {
      const uint4 x = *reinterpret_cast<const uint4*>(w.out + query * a.out.token_stride + column);
      const uint4 y = *reinterpret_cast<const uint4*>(w.grad_out + query * r.grad_out.token_stride + column);
      sum = dot<T>(x.x, y.x) + dot<T>(x.y, y.y) + dot<T>(x.z, y.z) + dot<T>(x.w, y.w);
    }
#pragma unroll
    for (int step = 1; step < kChunks; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (lane % kChunks == 0) shared.delta[query] = sum;
  }
}

template <class T, int kBlocks>
__device__ __forceinline__ void copy_tile(Shared<kBlocks>& shared, int stage, const Work<T>& w,
                                          const AttentionRelevance& r, int tile) {
  const int64_t first = static_cast<int64_t>(tile) * kTileQueries;
  const int threads = w.warps * kWarpSize;
  copy_rows<T, kBlocks>(shared.q[stage], w.q, r.q.token_stride, first, kTileQueries, r.queries, r.width, threads);
  copy_rows<T, kBlocks>(shared.grad_out[stage], w.grad_out, r.grad_out.token_stride, first, kTileQueries, r.queries,
                        r.width, threads);
}

// c [16 keys, width] += a [16 keys, 16 queries] times 16 rows of a tile of Q or dO, from row `first` on.
template <class T, int kBlocks>
__device__ __forceinline__ void add_product(float (&c)[kKeySteps][Width<kBlocks>::kTiles][4],
                                            const uint32_t (&a)[kKeySteps][4], const unsigned char* tile, int first,
                                            int lane) {
#pragma unroll
  for (int pair = 0; pair < Width<kBlocks>::kTiles / 2; ++pair) {
    uint32_t b[4];
    load_transposed(b, tile + chunk_offset<kBlocks>(first + (lane & 8), lane & 7, 2 * pair + lane / 16));
#pragma unroll
    for (int i = 0; i < kKeySteps; ++i) {
      T::step(c[i][2 * pair], a[i], b[0], b[1]);
      T::step(c[i][2 * pair + 1], a[i], b[2], b[3]);
    }
  }
}

// c [32 keys, 16 queries] += rows of K or V times rows of a tile of Q or dO, from row `first` on.
template <class T, int kBlocks>
__device__ __forceinline__ void multiply_rows(float (&c)[2][kKeySteps][4], const unsigned char* keys,
                                              const unsigned char* tile, int first, int first_key, int lane) {
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    const int chunk = j * kChunksPerBlock + lane % 4;
    LeftBlock left[kKeySteps];
#pragma unroll
    for (int i = 0; i < kKeySteps; ++i) {
      const unsigned char* upper = keys + chunk_offset<kBlocks>(first_key + 16 * i, lane / 4, chunk);
      const unsigned char* lower = keys + chunk_offset<kBlocks>(first_key + 16 * i + 8, lane / 4, chunk);
      left[i] = {*reinterpret_cast<const uint4*>(upper), *reinterpret_cast<const uint4*>(lower)};
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = chunk_offset<kBlocks>(first + 8 * half, lane / 4, chunk);
      const uint4 right = *reinterpret_cast<const uint4*>(tile + at);
#pragma unroll
      for (int i = 0; i < kKeySteps; ++i) T::multiply(c[half][i], left[i], right);
    }
  }
}

// Probabilities and dS of 16 queries, from row `first` of the tile on, and this warp's keys, packed as the left factor
// of the products to come; adds to the messages.
template <class T, int kBlocks, bool kBias>
__device__ __forceinline__ void probabilities(uint32_t (&p)[kKeySteps][4], uint32_t (&ds)[kKeySteps][4],
                                              float (&message)[kKeySteps][2], const Shared<kBlocks>& shared, int stage,
                                              const unsigned char* keys, const unsigned char* values, const Work<T>& w,
                                              const AttentionRelevance& r, int tile, int first, int first_key,
                                              int lane) {
  float s[2][kKeySteps][4] = {}, gradient[2][kKeySteps][4] = {};  // [16 keys, 8 queries] each
  multiply_rows<T, kBlocks>(s, keys, shared.q[stage], first, first_key, lane);
  multiply_rows<T, kBlocks>(gradient, values, shared.grad_out[stage], first, first_key, lane);
  const float scale = w.scale * kLog2e, lowest = r.is_signed ? -INFINITY : 0.0F;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kKeySteps; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {  // element e: key g + 8 (e / 2), query 2 (lane % 4) + e % 2
        const int query = tile * kTileQueries + first + 8 * half + 2 * (lane % 4) + e % 2;
        const int key = first_key + 16 * i + lane / 4 + 8 * (e / 2);
        float logit = s[half][i][e] * scale - shared.lse[query];
        if constexpr (kBias) logit += kLog2e * bias_at<T>(r.bias, w.bias, query, key, r.queries, r.keys);
        const float probability = key < r.keys ? exp2_approximate(logit) : 0.0F;
        message[i][e / 2] += shared.row[query] * max_or_nan(probability * gradient[half][i][e], lowest);
        s[half][i][e] = probability;
        gradient[half][i][e] = probability * (gradient[half][i][e] - shared.delta[query]);
      }
      p[i][2 * half] = T::pack(s[half][i][0], s[half][i][1]);
      p[i][2 * half + 1] = T::pack(s[half][i][2], s[half][i][3]);
      ds[i][2 * half] = T::pack(gradient[half][i][0], gradient[half][i][1]);
      ds[i][2 * half + 1] = T::pack(gradient[half][i][2], gradient[half][i][3]);
    }
  }
}

// Where the four lanes of a row leave their pairs of dS: row a key, column a query of the tile.
__device__ __forceinline__ void write_scores(unsigned char* scores, const uint32_t (&ds)[kKeySteps][4], int first,
                                             int first_key, int lane) {
#pragma unroll
  for (int i = 0; i < kKeySteps; ++i) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {  // part % 2: keys + 8; part / 2: queries + 8
      const int at = chunk_offset<kScoreBlocks>(first_key + 16 * i + 8 * (part % 2), lane / 4, first / 8 + part / 2);
      *reinterpret_cast<uint32_t*>(scores + at + lane % 4 * 4) = ds[i][part];
    }
  }
}

// dq of a tile, 16 queries times 32 numbers a warp and turn: dS K over all keys.
template <class T, int kBlocks>
__device__ __forceinline__ void write_dq(const unsigned char* scores, const unsigned char* keys, const Work<T>& w,
                                         const AttentionGradients& a, int tile, int warp, int lane) {
  const AttentionRelevance& r = a.relevance;
  auto* dq = static_cast<uint16_t*>(a.dq);
  for (int turn = warp; turn < kTileQueries / 16 * kBlocks; turn += w.warps) {
    const int first = turn / kBlocks * 16, j = turn % kBlocks;
    const int64_t query = static_cast<int64_t>(tile) * kTileQueries + first;
    if (query >= r.queries) break;
    float c[4][4] = {};  // [16 queries, 8 numbers] each
#pragma unroll 2
    for (int key = 0; key < w.warps * kWarpKeys; key += 16) {
      uint32_t s[4];
      load_transposed(s, scores + chunk_offset<kScoreBlocks>(key + lane / 16 * 8, lane & 7, first / 8 + lane / 8 % 2));
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t b[4];
        const int chunk = j * kChunksPerBlock + 2 * pair + lane / 16;
        load_transposed(b, keys + chunk_offset<kBlocks>(key + (lane & 8), lane & 7, chunk));
        T::step(c[2 * pair], s, b[0], b[1]);
        T::step(c[2 * pair + 1], s, b[2], b[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int column = 32 * j + 8 * n + 2 * (lane % 4);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t to = query + lane / 4 + 8 * half;
        if (to < r.queries && column < r.width)
          *reinterpret_cast<uint32_t*>(dq + ((w.row * r.queries + to) * r.heads + w.head) * r.width + column) =
              T::pack(c[n][2 * half] * w.scale, c[n][2 * half + 1] * w.scale);
      }
    }
  }
}

// dk or dv of this warp's keys.
template <class T, int kBlocks>
__device__ __forceinline__ void write_gradient(void* to, const float (&sums)[kKeySteps][Width<kBlocks>::kTiles][4],
                                               float factor, const Work<T>& w, const AttentionRelevance& r,
                                               int first_key, int lane) {
#pragma unroll
  for (int i = 0; i < kKeySteps; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t key = first_key + 16 * i + 8 * half + lane / 4;
      if (key >= r.keys) continue;
      auto* row = static_cast<uint16_t*>(to) + ((w.row * r.keys + key) * r.heads + w.head) * r.width;
#pragma unroll
      for (int n = 0; n < Width<kBlocks>::kTiles; ++n) {
        const int column = 8 * n + 2 * (lane % 4);
        if (column < r.width)
          *reinterpret_cast<uint32_t*>(row + column) =
              T::pack(sums[i][n][2 * half] * factor, sums[i][n][2 * half + 1] * factor);
      }
    }
  }
}

template <class T, int kBlocks, bool kBias, bool kQk>
__global__ void __launch_bounds__(kMostThreads, 1) gradients_kernel(const AttentionGradients a, int warps) {
  const AttentionRelevance& r = a.relevance;
  auto& shared = *reinterpret_cast<Shared<kBlocks>*>(dynamic_shared());
  unsigned char* keys = dynamic_shared() + sizeof(Shared<kBlocks>);
  unsigned char* values = keys + warps * kWarpKeys * Width<kBlocks>::kRowBytes;
  unsigned char* scores = values + warps * kWarpKeys * Width<kBlocks>::kRowBytes;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int row = static_cast<int>(blockIdx.x / static_cast<unsigned>(r.heads));
  const int head = static_cast<int>(blockIdx.x % static_cast<unsigned>(r.heads));
  const int64_t asked = r.image != nullptr ? r.image[row] : row;
  const bool known = asked >= 0 && asked < r.images;
  const int64_t image = known ? asked : 0;
  const Work<T> w = {head_of<T>(r.q, image, head),
                     head_of<T>(r.k, image, head),
                     head_of<T>(r.v, image, head),
                     head_of<T>(r.grad_out, row, head),
                     head_of<T>(a.out, image, head),
                     row,
                     head,
                     image * r.bias.batch_stride + head * r.bias.head_stride,
                     known ? r.scale : NAN,
                     warps};
  const int tiles = static_cast<int>((r.queries + kTileQueries - 1) / kTileQueries), first_key = warp * kWarpKeys;

  copy_rows<T, kBlocks>(keys, w.k, r.k.token_stride, 0, warps * kWarpKeys, r.keys, r.width, warps * kWarpSize);
  copy_rows<T, kBlocks>(values, w.v, r.v.token_stride, 0, warps * kWarpKeys, r.keys, r.width, warps * kWarpSize);
  copy_tile<T, kBlocks>(shared, 0, w, r, 0);
  commit_copies();
  load_statistics<T, kBlocks>(shared, w, a, image, warp, lane);

  Sums<kBlocks> sums = {};
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies<0>();
    __syncthreads();  // this tile is there; the stage of the tile before, and dS, are free
    if (tile + 1 < tiles) copy_tile<T, kBlocks>(shared, (tile + 1) % 2, w, r, tile + 1);
    commit_copies();
#pragma unroll 1
    for (int first = 0; first < kTileQueries && tile * kTileQueries + first < r.queries; first += 16) {
      uint32_t p[kKeySteps][4], ds[kKeySteps][4];
      probabilities<T, kBlocks, kBias>(p, ds, sums.message, shared, tile % 2, keys, values, w, r, tile, first,
                                       first_key, lane);
      add_product<T, kBlocks>(sums.dv, p, shared.grad_out[tile % 2], first, lane);
      if constexpr (kQk) {
        add_product<T, kBlocks>(sums.dk, ds, shared.q[tile % 2], first, lane);
        write_scores(scores, ds, first, first_key, lane);
      }
    }
    if constexpr (kQk) {
      __syncthreads();  // dS of all keys is there
      write_dq<T, kBlocks>(scores, keys, w, a, tile, warp, lane);
    }
  }
  write_messages<kKeySteps>(r.messages + (row * r.heads + head) * r.keys, sums.message, first_key, r.keys, lane);
  write_gradient<T, kBlocks>(a.dv, sums.dv, 1.0F, w, r, first_key, lane);
  if constexpr (kQk) write_gradient<T, kBlocks>(a.dk, sums.dk, w.scale, w, r, first_key, lane);
}

template <class T, int kBlocks>
void launch_gradients(const AttentionGradients& a, cudaStream_t stream) {
  const int warps = static_cast<int>((a.relevance.keys + kWarpKeys - 1) / kWarpKeys);
  const bool bias = a.relevance.bias.data != nullptr;
  const auto kernel =
      a.need_qk ? (bias ? gradients_kernel<T, kBlocks, true, true> : gradients_kernel<T, kBlocks, false, true>)
                : (bias ? gradients_kernel<T, kBlocks, true, false> : gradients_kernel<T, kBlocks, false, false>);
  launch(kernel, static_cast<unsigned>(a.relevance.rows * a.relevance.heads), static_cast<unsigned>(warps * kWarpSize),
         shared_bytes<kBlocks>(warps * kWarpKeys), stream, a, warps);
}

}  // namespace

bool fits(const AttentionGradients& a) {
  const AttentionRelevance& r = a.relevance;
  return fits(r) && r.type != NumberType::float32 && r.width <= kWidestFusedHead && r.keys <= kMostTokens &&
         r.queries <= kMostTokens && (r.images > 0 || r.rows == 0);
}

void attention_gradients(const AttentionGradients& a, cudaStream_t stream) {
  const bool half = a.relevance.type == NumberType::half;
  if (a.relevance.width <= 32)
    return half ? launch_gradients<Half, 1>(a, stream) : launch_gradients<Bf16, 1>(a, stream);
  return half ? launch_gradients<Half, 2>(a, stream) : launch_gradients<Bf16, 2>(a, stream);
}

}  // namespace fga::cuda
