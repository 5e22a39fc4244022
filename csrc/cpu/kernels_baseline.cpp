// attention_kernel.h and score_kernel.h compiled for baseline; isa.h says when it is used.
#include "attention.h"
#include "isa.h"
#include "score.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#define FGA_VECTOR_BYTES 16
namespace fga::baseline {
#include "vector.h"
#include "attention_kernel.h"
#include "score_kernel.h"
}  // namespace fga::baseline
