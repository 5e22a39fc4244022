// The CUDA kernels (compiled beside this for the CPU) callable from Python through ctypes. See cuda_on_host.h.
#include "cuda/attention_relevance.h"

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

const char* emulated_attention_gradients(const fga::cuda::AttentionGradients* a) {
  on_host::failure.clear();
  if (!fga::cuda::fits(*a)) return "does not fit";
  fga::cuda::attention_gradients(*a, nullptr);
  fga::cuda::attention_combine(a->relevance, nullptr);
  return on_host::failure.c_str();
}

// Shared memory of the largest launch since the last call.
int64_t emulated_shared_bytes() {
  const auto most = static_cast<int64_t>(on_host::most_shared_bytes);
  on_host::most_shared_bytes = 0;
  return most;
}

int emulated_bytes() {
  return sizeof(fga::cuda::AttentionGradients);
}
}
