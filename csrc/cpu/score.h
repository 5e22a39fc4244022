// Feature score on raw pointers. score.cpp walks the dictionary tile by tile; score_kernel.h turns a tile's
// pre-activations into codes and adds their contributions.
#pragma once

#include <cstdint>

namespace fga {

// The order of Activation and Normalisation in fga_fast/settings.py: the op takes their numbers. (In torch 2.11, every
// string that an op of the stable ABI is given leaks.)
enum class Activation : int64_t { relu, topk, topk_signed, batch_topk, jumprelu, gated };
enum class Normalisation : int64_t { none, layer_norm, constant_norm };

constexpr bool chooses_k(Activation a) {
  return a == Activation::topk || a == Activation::topk_signed;
}
constexpr bool has_threshold(Activation a) {
  return a == Activation::batch_topk || a == Activation::jumprelu;
}

// Features [first, first + count) of the dictionary; the pointers are to the tile's own first feature.
// W: storage type of the decoder; A: type of arithmetic (double for double, else float).
template <class W, class A>
struct FeatureTile {
  int64_t first, count;
  A* codes;                                  // [count, ld_codes] pre-activations without bias, then codes
  int64_t ld_codes;                          // tokens of all images, B * P
  const A *bias, *theta, *scale, *mag_bias;  // [count] each; null where the activation has none
  const W* decoder;                          // [count, C]
  const A* feature_gradients;                // [count, M * P] dense h = g D^T, or null: gather
  const int32_t* possible;  // [count] in how many patches of the range each may be on; its codes are set only where
                            // that is not 0. Null: any
};

// The strongest contributions seen so far, in falling order of magnitude, one list of k a patch or an image.
template <class A>
struct TopList {
  int64_t k;
  int64_t* index;   // [.., k], -1 where there are fewer
  A* contribution;  // [.., k], 0 where there are fewer
};

template <class A>
struct ScoreProblem {
  int64_t rows, patches, width, ld_gradient;  // M * P, P, C, padded C
  const A* gradient;                          // [M, P, ld_gradient]; null: each code counts as it is
  const int64_t *targets, *target_start;      // rows m of image b: targets[target_start[b] .. target_start[b + 1])
  A* scores;                                  // [M, P]
  TopList<A> patch_top;                       // [M, P, k]; k = 0: not wanted
};

// The patches [begin, end) of one image: one thread's work, so that no sum is shared.
struct PatchRange {
  int64_t image, begin, end;
};

// The k largest pre-activations above `least` of each token so far: a heap whose root goes first.
template <class A>
struct Selection {
  int64_t k;
  A least;         // 0 where relu follows the choice, else -inf
  A* value;        // [B * P, k]
  int64_t* index;  // [B * P, k]
  int64_t* size;   // [B * P]
};

#define FGA_DECLARE_SCORE(isa)                                                                                        \
  namespace isa {                                                                                                     \
  template <class S, class A>                                                                                         \
  void normalise_rows(const S* x, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t width, int64_t ld, \
                      Normalisation, A* to);                                                                          \
  template <class W, class A>                                                                                         \
  int64_t activate(const FeatureTile<W, A>&, Activation, int64_t patches, PatchRange);                                \
  template <class W, class A>                                                                                         \
  void accumulate(const FeatureTile<W, A>&, int64_t begin, int64_t end, const ScoreProblem<A>&, PatchRange,           \
                  A* feature_sums);                                                                                   \
  template <class W, class A>                                                                                         \
  void select(const FeatureTile<W, A>&, int64_t patches, PatchRange, const Selection<A>&);                            \
  template <class W, class A>                                                                                         \
  void accumulate_selected(const W* decoder, const int64_t* permutation, const ScoreProblem<A>&, PatchRange,          \
                           const Selection<A>&, A* contributions);                                                    \
  }
FGA_DECLARE_SCORE(baseline)
FGA_DECLARE_SCORE(avx2)
FGA_DECLARE_SCORE(avx512)
#undef FGA_DECLARE_SCORE

}  // namespace fga
