// The CUDA kernels compiled for the CPU, callable from Python through ctypes. See cuda_on_host.h.
#define FGA_CUDA_ON_HOST
#include "cuda/attention_relevance.cu"

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

// Shared memory of the largest launch since the last call.
int64_t emulated_shared_bytes() {
  const auto most = static_cast<int64_t>(on_host::most_shared_bytes);
  on_host::most_shared_bytes = 0;
  return most;
}

int emulated_attention_relevance_bytes() {
  return sizeof(fga::cuda::AttentionRelevance);
}
}
