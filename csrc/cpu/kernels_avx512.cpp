// attention_kernel.h, score_kernel.h and bound_kernel.h compiled for avx512; isa.h says when it is used.
#include "attention.h"
#include "bound.h"
#include "isa.h"
#include "score.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#if FGA_X86_DISPATCH
#include <immintrin.h>
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,f16c,bmi,bmi2")
#define FGA_VECTOR_BYTES 64
namespace fga::avx512 {
#include "vector.h"
#include "attention_kernel.h"
#include "score_kernel.h"
#include "bound_kernel.h"
}  // namespace fga::avx512
#endif
