// Tapped attention on raw pointers: what one (image, head) of the forward pass and one (target, head) of the backward
// pass compute. attention.cpp checks tensors and spreads the work over threads; attention_kernel.h does the arithmetic.
#pragma once

#include <cstdint>

namespace fga {

// A matrix [rows, D] somewhere inside a q, k, v or gradient tensor.
template <class S>
struct Matrix {
  S* data;
  int64_t row_stride, column_stride;
};

// S: storage type; A: type of arithmetic and statistics (double for double, else float).
// What is added to the scaled logits, in either type; at most one of the two has data. Strides of 0 are usual.
template <class S, class A>
struct Bias {
  Matrix<const S> narrow;  // [Nq, N]
  Matrix<const A> wide;    // [Nq, N]
};

template <class S, class A>
struct AttentionForward {
  Matrix<const S> q, k, v;  // [Nq, D] [N, D] [N, D]
  Bias<S, A> bias;          // [Nq, N]
  Matrix<S> out;            // [Nq, D]
  A* lse;                   // [Nq] log of the sum of exponentials of the logits
  int64_t queries, keys, width;
  A scale;
};

template <class S, class A>
struct AttentionBackward {
  Matrix<const S> q, k, v, out, grad_out;  // [Nq, D] [N, D] [N, D] [Nq, D] [Nq, D]
  Bias<S, A> bias;                         // [Nq, N]
  const A* lse;                            // [Nq]
  const A* row;                            // [Nq] relevance that arrives at the queries
  Matrix<S> dq, dk, dv;                    // the first two not touched unless need_qk, the last unless need_v
  A* message;                              // [N] row . relu(A * dA) of this head, before the mean over heads
  int64_t queries, keys, width;
  A scale;
  bool is_signed, need_qk, need_v;  // is_signed: no relu in the message
};

#define FGA_DECLARE_ATTENTION(isa)                                        \
  namespace isa {                                                         \
  template <class S, class A>                                             \
  void attention_forward(const AttentionForward<S, A>*, int64_t count);   \
  template <class S, class A>                                             \
  void attention_backward(const AttentionBackward<S, A>*, int64_t count); \
  }
FGA_DECLARE_ATTENTION(baseline)
FGA_DECLARE_ATTENTION(avx2)
FGA_DECLARE_ATTENTION(avx512)
#undef FGA_DECLARE_ATTENTION

}  // namespace fga
