// The CUDA kernels (compiled beside this for the CPU) callable from Python through ctypes. See cuda_on_host.h.
#include "cuda/attention_relevance.h"
#include "cuda/attention_rows.h"
#include "cuda/gate.h"

extern "C" {

// 0 forward, 1 backward, 2 shuffled order of threads; copies carried out at once or as late as allowed.
void emulated_settings(int order, int copies_at_once) {
  on_host::settings = {static_cast<on_host::Order>(order), copies_at_once != 0};
}

// "" if all went well, else what did not.
const char* emulated_attention_relevance(const fga::cuda::AttentionRelevance* a) {
  on_host::failure.clear();
  if (!fga::cuda::fits(*a)) return "does not fit";
  fga::cuda::attention_messages(*a, nullptr);
  fga::cuda::attention_combine(*a, nullptr);
  return on_host::failure.c_str();
}

const char* emulated_gate(const void* scores, void* gates, int is_double, int64_t rows, int64_t patches, double base,
                          double slope) {
  on_host::failure.clear();
  if (is_double)
    fga::cuda::gate(static_cast<const double*>(scores), static_cast<double*>(gates), rows, patches, base, slope,
                    nullptr);
  else
    fga::cuda::gate(static_cast<const float*>(scores), static_cast<float*>(gates), rows, patches, base, slope, nullptr);
  return on_host::failure.c_str();
}

// Shared memory of the largest launch since the last call.
int64_t emulated_shared_bytes() {
  const auto most = static_cast<int64_t>(on_host::most_shared_bytes);
  on_host::most_shared_bytes = 0;
  return most;
}

// Where chunk c of row r lies in a tile.
int emulated_chunk_offset(int blocks, int r, int c) {
  switch (blocks) {
    case 1: return fga::cuda::chunk_offset<1>(r & ~7, r & 7, c);
    case 2: return fga::cuda::chunk_offset<2>(r & ~7, r & 7, c);
    case 3: return fga::cuda::chunk_offset<3>(r & ~7, r & 7, c);
    case 4: return fga::cuda::chunk_offset<4>(r & ~7, r & 7, c);
    case 6: return fga::cuda::chunk_offset<6>(r & ~7, r & 7, c);
    default: return fga::cuda::chunk_offset<8>(r & ~7, r & 7, c);
  }
}

int emulated_bytes() {
  return sizeof(fga::cuda::AttentionRelevance);
}
}
