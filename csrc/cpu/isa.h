// Which instruction set the kernels run with. Each *_kernel.h is compiled once per set (see *_avx512.cpp and its
// siblings) and the best one the processor has is chosen at the first call; nothing is decided at build time, so a
// wheel built on one machine runs on another.
#pragma once

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__) && !defined(__clang__)
#define FGA_X86_DISPATCH 1
#else
#define FGA_X86_DISPATCH 0
#endif

namespace fga {

enum class Isa { baseline, avx2, avx512 };

inline Isa detect_isa() {
#if FGA_X86_DISPATCH
  static const Isa isa = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") ? Isa::avx512
                         : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")       ? Isa::avx2
                                                                                                 : Isa::baseline;
  return isa;
#else
  return Isa::baseline;
#endif
}

}  // namespace fga
