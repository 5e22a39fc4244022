// Robust gate on CUDA, one block per row of scores.
//
// STATUS: compiled for sm_80, sm_90a and sm_100, its arithmetic run on the CPU by an emulation of threads
// (tests/csrc/native); it has never run on a device. Used only where the caller asks for backend="native".
//
// The lower median is found by radix selection, not by sorting: float bits are mapped to integers of the same order,
// and each pass counts one byte of the keys that agree with the bytes found so far. Four passes over the row (eight in
// float64) give the exact order statistic of up to 2^31 - 1 numbers in 1 KB of shared memory. The counts are integers,
// so the order in which atomics land cannot change the result: the gate is bitwise reproducible.
#include "gate.h"

#include <algorithm>
#include <cmath>

#include "device.h"

namespace fga::cuda {
namespace {

constexpr int kThreads = 256;  // one thread for each value of a key byte
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMaxBlocks = 1 << 30;
using Count = unsigned;  // 64 bits in shared memory have no atomic addition: threads would take turns in a loop

struct Workspace {
  Count bins[kThreads];
  Count warp_totals[kWarps];
  Count below;  // keys smaller than the chosen byte's
  int byte;
};

// Order-preserving bijection between floats and unsigned integers: negative numbers have all bits flipped, so that a
// larger magnitude sorts lower; positive ones get the top bit set, so that they sort above.
template <class V, class B>
struct Key {
  using Value = V;
  using Bits = B;
  static constexpr Bits kSign = Bits{1} << (sizeof(Bits) * 8 - 1);
  static __device__ Bits encode(Value v) {
    const Bits b = bits_of(v);
    return (b & kSign) != 0 ? ~b : b | kSign;
  }
  static __device__ Value decode(Bits b) { return value_of((b & kSign) != 0 ? b & ~kSign : ~b); }
};
using FloatKey = Key<float, uint32_t>;
using DoubleKey = Key<double, uint64_t>;

// Sum of the bins below this thread's, by a warp scan and a short sum over warps. Every thread of the block calls it.
__device__ Count exclusive_scan(Count own, Workspace& shared) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int warp = static_cast<int>(threadIdx.x) >> 5;
  Count inclusive = own;
  for (int step = 1; step < 32; step *= 2) {
    const Count other = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) shared.warp_totals[warp] = inclusive;
  __syncthreads();
  Count before = 0;
  for (int w = 0; w < warp; ++w) before += shared.warp_totals[w];
  return before + inclusive - own;
}

// The value of the given rank (0 is the smallest) among value(0) .. value(count - 1). NaN if any value is NaN, as in
// torch.median. Every thread of the block gets the answer.
template <typename Key, typename ValueAt>
__device__ typename Key::Value select(ValueAt value, int64_t count, Count rank, Workspace& shared) {
  using Bits = typename Key::Bits;
  int found_nan = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) found_nan |= isnan(value(i)) ? 1 : 0;
  if (__syncthreads_or(found_nan) != 0) return static_cast<typename Key::Value>(NAN);

  Bits prefix = 0;
  for (int shift = static_cast<int>(sizeof(Bits)) * 8 - 8; shift >= 0; shift -= 8) {
    shared.bins[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      const Bits key = Key::encode(value(i));
      // Two shifts, since one by the full width of the type is undefined.
      const bool candidate = (((key ^ prefix) >> shift) >> 8) == 0;
      if (candidate) atomicAdd(&shared.bins[static_cast<int>((key >> shift) & 0xffU)], Count{1});
    }
    __syncthreads();
    const Count own = shared.bins[threadIdx.x];
    const Count below = exclusive_scan(own, shared);
    if (below <= rank && rank < below + own) {  // true in exactly one thread
      shared.below = below;
      shared.byte = static_cast<int>(threadIdx.x);
    }
    __syncthreads();
    prefix |= static_cast<Bits>(shared.byte) << shift;
    rank -= shared.below;
  }
  return Key::decode(prefix);
}

template <typename Key>
__global__ void __launch_bounds__(kThreads, 4)
    gate_kernel(const typename Key::Value* scores, typename Key::Value* gates, int64_t rows, int64_t patches,
                typename Key::Value base, typename Key::Value slope) {
  using Value = typename Key::Value;
  __shared__ Workspace shared;
  const Count lower_middle = static_cast<Count>(patches - 1) / 2;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Value* s = scores + row * patches;
    Value* w = gates + row * patches;
    const auto score = [s](int64_t i) { return s[i]; };
    const Value median = select<Key>(score, patches, lower_middle, shared);
    const auto deviation = [s, median](int64_t i) { return fabs(s[i] - median); };
    const Value mad = select<Key>(deviation, patches, lower_middle, shared);
    const Value scale = static_cast<Value>(1.4826) * (mad + static_cast<Value>(1e-8));
    for (int64_t i = threadIdx.x; i < patches; i += kThreads) {
      w[i] = pow(base, tanh(slope * ((s[i] - median) / scale)));
    }
    __syncthreads();  // the next row reuses the workspace
  }
}

template <typename Key>
void launch(const typename Key::Value* scores, typename Key::Value* gates, int64_t rows, int64_t patches, double base,
            double slope, cudaStream_t stream) {
  using Value = typename Key::Value;
  const auto blocks = static_cast<unsigned>(std::min(rows, kMaxBlocks));
  fga::cuda::launch(gate_kernel<Key>, blocks, kThreads, 0, stream, scores, gates, rows, patches,
                    static_cast<Value>(base), static_cast<Value>(slope));
}

}  // namespace

void gate(const float* scores, float* gates, int64_t rows, int64_t patches, double base, double slope,
          cudaStream_t stream) {
  launch<FloatKey>(scores, gates, rows, patches, base, slope, stream);
}

void gate(const double* scores, double* gates, int64_t rows, int64_t patches, double base, double slope,
          cudaStream_t stream) {
  launch<DoubleKey>(scores, gates, rows, patches, base, slope, stream);
}

}  // namespace fga::cuda
