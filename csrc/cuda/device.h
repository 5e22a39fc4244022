// Everything a kernel needs that only a GPU has: tensor-core products, asynchronous copies, warp votes and shuffles,
// launches. Kernels call these and hold no assembly, so that a host build can replace them (with
// tests/csrc/native/cuda_on_host.h) and run the very same kernels on the CPU.
#pragma once

#ifdef FGA_CUDA_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>

namespace fga::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffU;

#ifndef FGA_CUDA_ON_HOST

// c [16, 8] += a [16, 16] b [16, 8], the lane's share of each as the PTX manual lays out mma.m16n8k16 (16-bit floats)
// and, with half the depth, mma.m16n8k8 (tf32).
#define FGA_MMA(name, shape_and_types)                                                                                 \
  __device__ __forceinline__ void name(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, \
                                       uint32_t b1) {                                                                  \
    asm("mma.sync.aligned." shape_and_types                                                                            \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "                                                              \
        "{%0, %1, %2, %3};"                                                                                            \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                               \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                                       \
  }
FGA_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FGA_MMA(mma_half, "m16n8k16.row.col.f32.f16.f16.f32")
FGA_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FGA_MMA

// Copies kBytes (4, or 16 with both ends aligned to 16) from global to shared memory in the background, or zeroes them.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  } else {
    static_assert(kBytes == 4);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  }
}

// Closes a group of copies; wait_for_copies returns when at most kPending groups of this thread are still on their way.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The same number, about which the compiler knows nothing: what is computed from it stays where it is written.
__device__ __forceinline__ uint32_t recompute_from(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger of two numbers; NaN if either is, where fmaxf would hide it.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char fga_dynamic_shared[];
  return fga_dynamic_shared;
}

// Queues kernel(arguments...) on the stream. cudaGetLastError() says whether that failed.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, std::size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  constexpr std::size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking && cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                            static_cast<int>(shared_bytes)) != cudaSuccess) {
    return;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  (void)cudaLaunchKernelEx(&config, kernel, arguments...);
}

__device__ __forceinline__ uint32_t bits_of(float x) {
  return __float_as_uint(x);
}
__device__ __forceinline__ float value_of(uint32_t bits) {
  return __uint_as_float(bits);
}
__device__ __forceinline__ uint64_t bits_of(double x) {
  return static_cast<uint64_t>(__double_as_longlong(x));
}
__device__ __forceinline__ double value_of(uint64_t bits) {
  return __longlong_as_double(static_cast<long long>(bits));  // NOLINT(google-runtime-int): the type it takes
}

#endif  // FGA_CUDA_ON_HOST

}  // namespace fga::cuda
