// Registers the CUDA kernels with the schemas of ops.cpp. Stable ABI only, no Python, no mathematics: each function
// checks its arguments, allocates, picks device and stream, and hands raw pointers to a kernel in cuda/<stem>.cu.
#include <cuda_runtime.h>

#include <cstdint>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cuda/gate.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor gate(const Tensor& scores /* [M, P] */, double base, double slope) {
  STD_TORCH_CHECK(scores.dim() == 2, "gate: scores must be [rows, patches], got ", scores.dim(), " dimensions");
  const ScalarType dtype = scores.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "gate: scores must be float32 or float64");
  STD_TORCH_CHECK(base > 0.0, "gate: base must be positive, got ", base);
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  const Tensor rows = torch::stable::contiguous(scores);
  Tensor gates = torch::stable::empty_like(rows);
  const int64_t m = rows.size(0);
  const int64_t p = rows.size(1);
  if (m == 0 || p == 0) return gates;
  const cudaStream_t stream = current_stream(scores.get_device_index());
  if (dtype == ScalarType::Float) {
    fga::cuda::gate(static_cast<const float*>(rows.const_data_ptr()), static_cast<float*>(gates.mutable_data_ptr()), m,
                    p, base, slope, stream);
  } else {
    fga::cuda::gate(static_cast<const double*>(rows.const_data_ptr()), static_cast<double*>(gates.mutable_data_ptr()),
                    m, p, base, slope, stream);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return gates;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fga_fast, CUDA, m) {
  m.impl("gate", TORCH_BOX(&gate));
}
