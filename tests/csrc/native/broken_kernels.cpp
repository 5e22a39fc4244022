// Kernels with one mistake each that a device may or may not forgive; the emulation must not. See test_cuda_on_host.py.
#include "cuda/device.h"

namespace {
using namespace fga::cuda;

struct Case {
  const float* in;  // [64]
  float* out;       // [64]
};

float* shared_floats() {
  return reinterpret_cast<float*>(dynamic_shared());
}

void right(Case c) {  // out[i] = in[63 - i], through shared memory
  const int i = static_cast<int>(threadIdx.x);
  copy_async<4>(shared_floats() + i, c.in + i, true);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  c.out[i] = shared_floats()[63 - i];
}

void without_wait(Case c) {
  const int i = static_cast<int>(threadIdx.x);
  copy_async<4>(shared_floats() + i, c.in + i, true);
  commit_copies();
  __syncthreads();
  c.out[i] = shared_floats()[63 - i];
  wait_for_copies<0>();
}

void without_barrier(Case c) {
  const int i = static_cast<int>(threadIdx.x);
  shared_floats()[i] = c.in[i];
  c.out[i] = shared_floats()[63 - i];
}

void barrier_for_some(Case c) {
  if (threadIdx.x < 40) __syncthreads();
  c.out[threadIdx.x] = 0;
}

void lanes_apart(Case c) {
  float x = c.in[threadIdx.x];
  if (threadIdx.x % 2 == 0)
    x = __shfl_xor_sync(kAllLanes, x, 2);
  else
    x = static_cast<float>(__any_sync(kAllLanes, x > 0));
  c.out[threadIdx.x] = x;
}

void unaligned_copy(Case c) {
  copy_async<16>(dynamic_shared(), c.in + 1, true);
  commit_copies();
  wait_for_copies<0>();
  c.out[threadIdx.x] = 0;
}

void (*const kKernels[])(Case) = {right, without_wait, without_barrier, barrier_for_some, lanes_apart, unaligned_copy};
}  // namespace

extern "C" const char* run_broken(int kernel, const float* in, float* out, int order, int copies_at_once) {
  on_host::settings = {static_cast<on_host::Order>(order), copies_at_once != 0};
  on_host::failure.clear();
  launch(kKernels[kernel], 1, 64, 64 * sizeof(float), nullptr, Case{in, out});
  return on_host::failure.c_str();
}
