// Which instruction set the kernels run with. Each *_kernel.h is compiled once per set (see *_avx512.cpp and its
// siblings), and the first call chooses the best one that the processor has. The build decides nothing, so a wheel
// built on one machine runs on another.
#pragma once

#include <cstdlib>
#include <cstring>

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__) && !defined(__clang__)
#define FGA_X86_DISPATCH 1
#else
#define FGA_X86_DISPATCH 0
#endif

namespace fga {

enum class Isa { baseline, avx2, avx512 };

inline Isa best_isa() {
#if FGA_X86_DISPATCH
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

// The best set, or a lesser one named by FGA_FAST_ISA (baseline, avx2), so that one machine can test them all.
inline Isa detect_isa() {
  static const Isa isa = [] {
    const char* wanted = std::getenv("FGA_FAST_ISA");
    const Isa best = best_isa();
    if (wanted && std::strcmp(wanted, "baseline") == 0) return Isa::baseline;
    if (wanted && std::strcmp(wanted, "avx2") == 0 && best == Isa::avx512) return Isa::avx2;
    return best;
  }();
  return isa;
}

}  // namespace fga
