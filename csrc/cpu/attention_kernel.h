// Flash-style attention tiles on the CPU, compiled once per instruction set. A block of query rows against all keys
// fits the second-level cache, so probabilities are rebuilt block by block from the log-sum-exp and nothing of size N x
// N is kept; scratch is linear in N. No guard: each inclusion makes its own copy (see vector.h).

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

constexpr int64_t kMaxRows = 64;

// Query rows taken at once: two [rows, keys] tiles within about half a megabyte, at least one register tile.
template <class A>
inline int64_t block_rows(int64_t padded_keys) {
  const int64_t fit = (int64_t{1} << 19) / (2 * sizeof(A) * padded_keys) / kRows * kRows;
  return std::max<int64_t>(kRows, std::min(kMaxRows, fit));
}

// Rows [first, first + count) of a matrix as dense rows of `ld` elements; columns past `width` and `padded - count`
// more rows are zero.
template <class S, class A>
inline void pack_rows(Matrix<const S> m, int64_t first, int64_t count, int64_t padded, int64_t width, int64_t ld,
                      A* to) {
  for (int64_t i = 0; i < padded; ++i, to += ld) {
    int64_t d = 0;
    if (i < count) {
      const S* from = m.data + (first + i) * m.row_stride;
      if (m.column_stride == 1)
        for (; d < width; ++d) to[d] = static_cast<A>(from[d]);
      else
        for (; d < width; ++d) to[d] = static_cast<A>(from[d * m.column_stride]);
    }
    for (; d < ld; ++d) to[d] = 0;
  }
}

// The transpose [width, ld] of a matrix of `count` rows; columns past `count` are zero.
template <class S, class A>
inline void pack_transposed(Matrix<const S> m, int64_t count, int64_t width, int64_t ld, A* to) {
  constexpr int64_t kStrip = 16;  // rows read together, so that each cache line of the result is written once
  for (int64_t n = 0; n < ld; n += kStrip)
    for (int64_t d = 0; d < width; ++d)
      for (int64_t i = n; i < std::min(n + kStrip, ld); ++i)
        to[d * ld + i] = i < count ? static_cast<A>(m.data[i * m.row_stride + d * m.column_stride]) : A(0);
}

template <class S, class A>
inline void unpack_rows(const A* from, int64_t ld, int64_t first, int64_t count, int64_t width, Matrix<S> m) {
  for (int64_t i = 0; i < count; ++i, from += ld) {
    S* to = m.data + (first + i) * m.row_stride;
    for (int64_t d = 0; d < width; ++d) to[d * m.column_stride] = static_cast<S>(from[d]);
  }
}

template <class B, class A>
inline void add_rows(Matrix<const B> m, int64_t first, int64_t count, int64_t width, int64_t ld, A* to) {
  for (int64_t i = 0; i < count; ++i, to += ld) {
    const B* from = m.data + (first + i) * m.row_stride;
    if (m.column_stride == 1)
      for (int64_t j = 0; j < width; ++j) to[j] += static_cast<A>(from[j]);
    else
      for (int64_t j = 0; j < width; ++j) to[j] += static_cast<A>(from[j * m.column_stride]);
  }
}

template <class A>
inline void scale_rows(A* x, int64_t count, A scale) {
  for (int64_t i = 0; i < count; ++i) x[i] *= scale;
}

// One row of logits to exp(logit - shift), padding to zero; returns the sum.
template <class A>
inline A exponentiate(A* row, int64_t keys, int64_t padded, A shift) {
  Vector<A> total{};
  for (int64_t j = 0; j < padded; j += kLanes<A>) {
    Vector<A> e = exponential(load(row + j) - shift);
    if (j + kLanes<A> > keys)
      for (int64_t l = 0; l < kLanes<A>; ++l) e[l] = j + l < keys ? e[l] : A(0);
    store(row + j, e);
    total += e;
  }
  return sum_lanes(total);
}

template <class A>
inline A largest(const A* row, int64_t keys) {
  Vector<A> best = broadcast(row[0]);
  int64_t j = 0;
  for (; j + kLanes<A> <= keys; j += kLanes<A>) best = larger<A>(load(row + j), best);
  A m = row[0];
  for (int64_t l = 0; l < kLanes<A>; ++l) m = best[l] > m ? best[l] : m;
  for (; j < keys; ++j) m = row[j] > m ? row[j] : m;
  return m;
}

// Aligned scratch that grows and is reused by all the work items of one thread.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t elements) : memory_(new A[elements + 64 / sizeof(A)]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_);
    next_ = memory_ + (64 - address % 64) % 64 / sizeof(A);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { delete[] memory_; }
  A* take(int64_t elements) {
    A* at = next_;
    next_ += round_up(elements, 64 / sizeof(A));
    return at;
  }

 private:
  A* memory_;  // a plain array: a std::vector compiled here for one instruction set could be linked in for all
  A* next_;
};

template <class A>
struct Sizes {
  int64_t keys, width, rows;  // padded: to vectors, to vectors, to register tiles
  Sizes(int64_t n, int64_t d)
      : keys(round_up(n, std::max(kLanes<A>, kRows))), width(round_up(d, kLanes<A>)), rows(block_rows<A>(keys)) {}
};

// The logits scale q k^T + bias of query rows [i0, i0 + rows); q holds them scaled, and padded as the product needs.
template <class S, class A>
inline void logits(const A* q, const A* kt, const Bias<S, A>& bias, const Sizes<A>& size, int64_t i0, int64_t rows,
                   int64_t keys, int64_t width, A* to) {
  multiply(q, size.width, int64_t{1}, kt, size.keys, to, size.keys, round_up(rows, kRows), size.keys, width, false);
  if (bias.narrow.data) add_rows(bias.narrow, i0, rows, keys, size.keys, to);
  if (bias.wide.data) add_rows(bias.wide, i0, rows, keys, size.keys, to);
}

template <class S, class A>
void forward_item(const AttentionForward<S, A>& item, const Sizes<A>& size, A* kt, A* v, A* q, A* p, A* o) {
  pack_transposed(item.k, item.keys, item.width, size.keys, kt);
  pack_rows(item.v, 0, item.keys, size.keys, item.width, size.width, v);
  for (int64_t i0 = 0; i0 < item.queries; i0 += size.rows) {
    const int64_t rows = std::min(size.rows, item.queries - i0), padded = round_up(rows, kRows);
    pack_rows(item.q, i0, rows, padded, item.width, size.width, q);
    scale_rows(q, padded * size.width, item.scale);
    logits(q, kt, item.bias, size, i0, rows, item.keys, item.width, p);
    A totals[kMaxRows];
    for (int64_t i = 0; i < rows; ++i) {
      const A shift = largest(p + i * size.keys, item.keys);
      totals[i] = exponentiate(p + i * size.keys, item.keys, size.keys, shift);
      item.lse[i0 + i] = shift + std::log(totals[i]);
    }
    multiply(p, size.keys, int64_t{1}, v, size.width, o, size.width, padded, size.width, item.keys, false);
    for (int64_t i = 0; i < rows; ++i) scale_rows(o + i * size.width, size.width, 1 / totals[i]);
    unpack_rows(o, size.width, i0, rows, item.width, item.out);
  }
}

template <class S, class A>
void attention_forward(const AttentionForward<S, A>* items, int64_t count) {
  if (count == 0) return;
  const Sizes<A> size(items->keys, items->width);
  Scratch<A> scratch(2 * size.keys * size.width + size.rows * (2 * size.width + size.keys) + 5 * 64);
  A* kt = scratch.take(size.keys * size.width);
  A* v = scratch.take(size.keys * size.width);
  A* q = scratch.take(size.rows * size.width);
  A* p = scratch.take(size.rows * size.keys);
  A* o = scratch.take(size.rows * size.width);
  for (int64_t i = 0; i < count; ++i) forward_item(items[i], size, kt, v, q, p, o);
}

template <class A>
struct BackwardScratch {
  A *kt, *vt, *k, *dk, *dv;    // [D, N] [D, N] [N, D] [N, D] [N, D]
  A *q, *out, *grad_out, *dq;  // [rows, D]
  A *p, *dp;                   // [rows, N]
};

// message += row_i * relu(P_ij dP_ij): relevance that query i sends to key j through this head; signed without relu.
template <class A>
inline void send_relevance(A row, const A* p, const A* dp, int64_t padded_keys, bool is_signed, A* message) {
  if (row == 0) return;
  const Vector<A> least = broadcast(is_signed ? -std::numeric_limits<A>::infinity() : A(0));
  for (int64_t j = 0; j < padded_keys; j += kLanes<A>) {
    const Vector<A> weighted = load(p + j) * load(dp + j);
    store(message + j, load(message + j) + row * (weighted < least ? least : weighted));  // this way round, NaN stays
  }
}

// Rebuilds the probabilities of one query row from its logits. A log-sum-exp of large magnitude (every key masked with
// the lowest float) has no digits left for the sum, so a row whose sum is off by more than rounding is divided by it.
template <class A>
inline void rebuild_probabilities(A* p, int64_t keys, int64_t padded_keys, A lse) {
  const A total = exponentiate(p, keys, padded_keys, lse);
  if (std::abs(total - 1) > A(1e-5)) scale_rows(p, keys, 1 / total);
}

// Computes dq from the block's P and dP, and adds the block's share to dk.
template <class S, class A>
void backward_logits(const AttentionBackward<S, A>& item, const Sizes<A>& size, const BackwardScratch<A>& b, int64_t i0,
                     int64_t rows) {
  const int64_t padded = round_up(rows, kRows);
  std::fill(b.p + rows * size.keys, b.p + padded * size.keys, A(0));
  pack_rows(item.out, i0, rows, rows, item.width, size.width, b.out);
  for (int64_t i = 0; i < padded; ++i) {  // dP becomes dS = P (dP - delta), delta = sum_d dO O
    A delta = 0;
    if (i < rows)
      for (int64_t d = 0; d < item.width; ++d) delta += b.grad_out[i * size.width + d] * b.out[i * size.width + d];
    A *p = b.p + i * size.keys, *dp = b.dp + i * size.keys;
    for (int64_t j = 0; j < size.keys; j += kLanes<A>) store(dp + j, load(p + j) * (load(dp + j) - delta));
  }
  multiply(b.dp, size.keys, int64_t{1}, b.k, size.width, b.dq, size.width, padded, size.width, item.keys, false);
  scale_rows(b.dq, rows * size.width, item.scale);
  unpack_rows(b.dq, size.width, i0, rows, item.width, item.dq);
  multiply(b.dp, int64_t{1}, size.keys, b.q, size.width, b.dk, size.width, size.keys, size.width, rows, true);
}

// One block of query rows. Returns without work where no gradient arrives (every patch row of a last block that is read
// at the class token): P * dP and dS are exactly zero there.
template <class S, class A>
void backward_block(const AttentionBackward<S, A>& item, const Sizes<A>& size, const BackwardScratch<A>& b, int64_t i0,
                    A* message) {
  const int64_t rows = std::min(size.rows, item.queries - i0), padded = round_up(rows, kRows);
  pack_rows(item.grad_out, i0, rows, padded, item.width, size.width, b.grad_out);
  if (std::all_of(b.grad_out, b.grad_out + rows * size.width, [](A g) { return g == 0; })) {
    std::fill(b.dq, b.dq + padded * size.width, A(0));
    if (item.need_qk) unpack_rows(b.dq, size.width, i0, rows, item.width, item.dq);
    return;
  }
  // Scaling the queries scales the logits and dk = scale dS^T q with no work of size N x N; dq is scaled at the end.
  pack_rows(item.q, i0, rows, padded, item.width, size.width, b.q);
  scale_rows(b.q, padded * size.width, item.scale);
  logits(b.q, b.kt, item.bias, size, i0, rows, item.keys, item.width, b.p);
  multiply(b.grad_out, size.width, int64_t{1}, b.vt, size.keys, b.dp, size.keys, padded, size.keys, item.width, false);
  for (int64_t i = 0; i < rows; ++i) {
    A* p = b.p + i * size.keys;
    rebuild_probabilities(p, item.keys, size.keys, item.lse[i0 + i]);
    send_relevance(item.row[i0 + i], p, b.dp + i * size.keys, size.keys, item.is_signed, message);
  }
  if (item.need_v)
    multiply(b.p, int64_t{1}, size.keys, b.grad_out, size.width, b.dv, size.width, size.keys, size.width, rows, true);
  if (item.need_qk) backward_logits(item, size, b, i0, rows);
}

template <class S, class A>
void backward_item(const AttentionBackward<S, A>& item, const Sizes<A>& size, const BackwardScratch<A>& b, A* message) {
  pack_transposed(item.k, item.keys, item.width, size.keys, b.kt);
  pack_transposed(item.v, item.keys, item.width, size.keys, b.vt);
  std::fill(message, message + size.keys, A(0));
  if (item.need_qk) {
    pack_rows(item.k, 0, item.keys, size.keys, item.width, size.width, b.k);
    std::fill(b.dk, b.dk + size.keys * size.width, A(0));
  }
  if (item.need_v) std::fill(b.dv, b.dv + size.keys * size.width, A(0));
  for (int64_t i0 = 0; i0 < item.queries; i0 += size.rows) backward_block(item, size, b, i0, message);
  std::copy(message, message + item.keys, item.message);
  if (item.need_qk) unpack_rows(b.dk, size.width, 0, item.keys, item.width, item.dk);
  if (item.need_v) unpack_rows(b.dv, size.width, 0, item.keys, item.width, item.dv);
}

template <class S, class A>
void attention_backward(const AttentionBackward<S, A>* items, int64_t count) {
  if (count == 0) return;
  const Sizes<A> size(items->keys, items->width);
  const int64_t tokens = size.keys * size.width, block = size.rows * size.width, tile = size.rows * size.keys;
  Scratch<A> scratch(5 * tokens + 4 * block + 2 * tile + size.keys + 12 * 64);
  BackwardScratch<A> b;
  for (A** p : {&b.kt, &b.vt, &b.k, &b.dk, &b.dv}) *p = scratch.take(tokens);
  for (A** p : {&b.q, &b.out, &b.grad_out, &b.dq}) *p = scratch.take(block);
  for (A** p : {&b.p, &b.dp}) *p = scratch.take(tile);
  A* message = scratch.take(size.keys);
  for (int64_t i = 0; i < count; ++i) backward_item(items[i], size, b, message);
}

#define FGA_INSTANTIATE_ATTENTION(S, A)                                          \
  template void attention_forward<S, A>(const AttentionForward<S, A>*, int64_t); \
  template void attention_backward<S, A>(const AttentionBackward<S, A>*, int64_t);
FGA_INSTANTIATE_ATTENTION(float, float)
FGA_INSTANTIATE_ATTENTION(double, double)
FGA_INSTANTIATE_ATTENTION(torch::headeronly::BFloat16, float)
FGA_INSTANTIATE_ATTENTION(torch::headeronly::Half, float)
#undef FGA_INSTANTIATE_ATTENTION
