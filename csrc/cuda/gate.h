// The robust gate on CUDA: a plain function on device pointers, no torch header.
#pragma once

#ifdef FGA_CUDA_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

namespace fga::cuda {

// gates = base ** tanh(slope * z), z = (s - med) / (1.4826 (MAD + 1e-8)) per row, med and MAD the lower medians.
// scores and gates are dense device arrays [rows, patches], rows and patches at least 1, patches below 2^31; they may
// be the same array. Queues one kernel on the stream and returns; the caller checks the launch. A row that holds a NaN
// comes out all NaN.
void gate(const float* scores, float* gates, int64_t rows, int64_t patches, double base, double slope,
          cudaStream_t stream);
void gate(const double* scores, double* gates, int64_t rows, int64_t patches, double base, double slope,
          cudaStream_t stream);

}  // namespace fga::cuda
