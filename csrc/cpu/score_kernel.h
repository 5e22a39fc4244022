// What one thread does with a tile of the dictionary, compiled once per instruction set. No guard: each inclusion makes
// its own copy (see vector.h).

// Rows of x as arithmetic type, normalised as the SAE expects, padded with zeros to ld columns.
// layer_norm: (x - mean) / (std + 1e-5) with the unbiased std; constant_norm: scaled to norm sqrt(width).
template <class S, class A>
void normalise_rows(const S* x, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t width, int64_t ld,
                    Normalisation kind, A* to) {
  for (int64_t i = 0; i < rows; ++i, x += row_stride, to += ld) {
    for (int64_t c = 0; c < width; ++c) to[c] = static_cast<A>(x[c * column_stride]);
    for (int64_t c = width; c < ld; ++c) to[c] = 0;
    if (kind == Normalisation::none) continue;
    A mean = 0, squares = 0;
    if (kind == Normalisation::layer_norm) {
      for (int64_t c = 0; c < width; ++c) mean += to[c];
      mean /= width;
    }
    for (int64_t c = 0; c < width; ++c) squares += (to[c] - mean) * (to[c] - mean);
    A factor = 1;  // a zero token stays zero
    if (kind == Normalisation::layer_norm) factor = 1 / (std::sqrt(squares / (width - 1)) + A(1e-5));
    if (kind == Normalisation::constant_norm && squares != 0) factor = std::sqrt(A(width) / squares);
    for (int64_t c = 0; c < width; ++c) to[c] = (to[c] - mean) * factor;
  }
}

template <class W, class A>
inline bool is_off(const FeatureTile<W, A>& tile, int64_t f) {
  return tile.possible && tile.possible[f] == 0;
}

// Pre-activations of the range's patches to codes, in place. Returns how many are above zero.
template <class W, class A>
int64_t activate(const FeatureTile<W, A>& tile, Activation activation, int64_t patches, PatchRange range) {
  int64_t active = 0;
  const int64_t n = range.end - range.begin;
  for (int64_t f = 0; f < tile.count; ++f) {
    if (is_off(tile, f)) continue;
    A* z = tile.codes + f * tile.ld_codes + range.image * patches + range.begin;
    const A bias = tile.bias[f];
    if (has_threshold(activation)) {
      const A theta = tile.theta[f];
      for (int64_t t = 0; t < n; ++t) z[t] = z[t] + bias > theta && z[t] + bias > 0 ? z[t] + bias : A(0);
    } else if (activation == Activation::gated) {
      const A scale = tile.scale[f], mag = tile.mag_bias[f];
      for (int64_t t = 0; t < n; ++t) {
        const A magnitude = z[t] * scale + mag;
        z[t] = z[t] + bias > 0 && magnitude > 0 ? magnitude : A(0);
      }
    } else {
      for (int64_t t = 0; t < n; ++t) z[t] = z[t] + bias > 0 ? z[t] + bias : A(0);
    }
    int32_t row = 0;
    for (int64_t t = 0; t < n; ++t) row += z[t] > 0;
    active += row;
  }
  return active;
}

template <class W, class A>
inline A dot(const W* d, const A* g, int64_t width) {
  A sum = 0;
  for (int64_t c = 0; c < width; ++c) sum += static_cast<A>(d[c]) * g[c];
  return sum;
}

// The usual case, decoder in the arithmetic type: explicit vectors, because a strict compiler keeps a sum in order.
// One decoder row with kCount gradients, so that it is loaded once for all of them; kChains sums at a time for each, to
// hide an addition's latency.
template <int kCount, int kChains, class A>
inline void dots(const A* d, const A* const* g, int64_t width, A* sums) {
  constexpr int64_t kStep = kChains * kLanes<A>;
  Vector<A> sum[kCount][kChains] = {};
  int64_t c = 0;
  for (; c + kStep <= width; c += kStep)
#pragma GCC unroll 4
    for (int v = 0; v < kChains; ++v) {
      const Vector<A> row = load(d + c + v * kLanes<A>);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) sum[i][v] += row * load(g[i] + c + v * kLanes<A>);
    }
  for (; c + kLanes<A> <= width; c += kLanes<A>)
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) sum[i][0] += load(d + c) * load(g[i] + c);
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    Vector<A> total = sum[i][0];
#pragma GCC unroll 4
    for (int v = 1; v < kChains; ++v) total += sum[i][v];
    sums[i] = sum_lanes(total);
    for (int64_t rest = c; rest < width; ++rest) sums[i] += d[rest] * g[i][rest];
  }
}

template <class A>
inline A dot(const A* d, const A* g, int64_t width) {
  A sum;
  dots<1, 4>(d, &g, width, &sum);
  return sum;
}

// dot() of a decoder row with the gradients of n patches
template <class W, class A>
inline void dot_each(const W* d, const A* g, int64_t ld, const int32_t* patches, int32_t n, int64_t width, A* sums) {
  int32_t i = 0;
  if constexpr (std::is_same_v<W, A>)
    for (; i + 4 <= n; i += 4) {
      const A* four[] = {g + patches[i] * ld, g + patches[i + 1] * ld, g + patches[i + 2] * ld,
                         g + patches[i + 3] * ld};
      dots<4, 2>(d, four, width, sums + i);
    }
  for (; i < n; ++i) sums[i] = dot(d, g + patches[i] * ld, width);
}

// Which patches of a range a feature is active in, rising. Returns how many.
template <class A>
inline int32_t active_patches(const A* code, PatchRange range, int32_t* patches) {
  int32_t n = 0;
  int64_t t = range.begin;
  for (; t + kLanes<A> <= range.end; t += kLanes<A>)
    for (uint32_t bits = above_zero(code + t); bits; bits &= bits - 1)
      patches[n++] = static_cast<int32_t>(t) + __builtin_ctz(bits);
  for (; t < range.end; ++t)
    if (code[t] > 0) patches[n++] = static_cast<int32_t>(t);
  return n;
}

// Keeps the k contributions of largest magnitude, ties to the one that came first (the lowest feature).
template <class A>
inline void keep_strongest(const TopList<A>& list, int64_t row, int64_t feature, A contribution) {
  A* value = list.contribution + row * list.k;
  int64_t* index = list.index + row * list.k;
  int64_t at = list.k;
  while (at > 0 && std::abs(contribution) > std::abs(value[at - 1])) --at;
  if (at == list.k) return;
  for (int64_t i = list.k - 1; i > at; --i) {
    value[i] = value[i - 1];
    index[i] = index[i - 1];
  }
  value[at] = contribution;
  index[at] = feature;
}

// Adds the contributions code * (decoder row . gradient) of the tile's features [begin, end) to the scores of one range
// of patches. Decoder row and gradients meet in the caches: a row is read once from memory and used by every patch that
// fires.
template <class W, class A>
void accumulate(const FeatureTile<W, A>& tile, int64_t begin, int64_t end, const ScoreProblem<A>& problem,
                PatchRange range, A* feature_sums) {
  const int64_t patches = problem.patches;
  const int64_t *first = problem.targets + problem.target_start[range.image],
                *last = problem.targets + problem.target_start[range.image + 1];
  int32_t active[256];  // score.cpp keeps ranges within 256 patches
  A values[256];
  for (int64_t f = begin; f < end; ++f) {
    const A* code = tile.codes + f * tile.ld_codes + range.image * patches;
    const int32_t n = is_off(tile, f) ? 0 : active_patches(code, range, active);
    for (const int64_t* m = first; m < last; ++m) {
      const int64_t row = *m * patches;
      if (!tile.feature_gradients && problem.gradient)
        dot_each(tile.decoder + f * problem.width, problem.gradient + row * problem.ld_gradient, problem.ld_gradient,
                 active, n, problem.width, values);
      A sum = 0;
      for (int32_t i = 0; i < n; ++i) {
        A value = code[active[i]];
        if (tile.feature_gradients)
          value *= tile.feature_gradients[f * problem.rows + row + active[i]];
        else if (problem.gradient)
          value *= values[i];
        problem.scores[row + active[i]] += value;
        sum += value;
        if (problem.patch_top.k) keep_strongest(problem.patch_top, row + active[i], tile.first + f, value);
      }
      if (feature_sums) feature_sums[(m - first) * tile.count + f] = sum;
    }
  }
}

// Heap order: the smallest value at the root, of equal ones the highest feature, so that ties go to the lowest feature.
template <class A>
inline bool goes_before(A value, int64_t index, A other, int64_t other_index) {
  return value < other || (value == other && index > other_index);
}

template <class A>
inline void sift_down(A* value, int64_t* index, int64_t size, A v, int64_t f) {
  int64_t at = 0;
  for (int64_t child = 1; child < size; child = 2 * at + 1) {
    if (child + 1 < size && goes_before(value[child + 1], index[child + 1], value[child], index[child])) ++child;
    if (!goes_before(value[child], index[child], v, f)) break;
    value[at] = value[child];
    index[at] = index[child];
    at = child;
  }
  value[at] = v;
  index[at] = f;
}

template <class A>
inline void sift_up(A* value, int64_t* index, int64_t at, A v, int64_t f) {
  for (; at > 0; at = (at - 1) / 2) {
    const int64_t parent = (at - 1) / 2;
    if (!goes_before(v, f, value[parent], index[parent])) break;
    value[at] = value[parent];
    index[at] = index[parent];
  }
  value[at] = v;
  index[at] = f;
}

// Heap sort by feature: in place, and no worse than k log k when k is the whole dictionary.
template <class A>
inline void sort_by_feature(A* value, int64_t* index, int64_t size) {
  const auto sink = [&](int64_t at, int64_t n) {
    const A v = value[at];
    const int64_t f = index[at];
    for (int64_t child = 2 * at + 1; child < n; child = 2 * at + 1) {
      if (child + 1 < n && index[child + 1] > index[child]) ++child;
      if (index[child] < f) break;
      value[at] = value[child];
      index[at] = index[child];
      at = child;
    }
    value[at] = v;
    index[at] = f;
  };
  for (int64_t i = size / 2 - 1; i >= 0; --i) sink(i, size);
  for (int64_t n = size - 1; n > 0; --n) {
    std::swap(value[0], value[n]);
    std::swap(index[0], index[n]);
    sink(0, n);
  }
}

// Keeps each patch's k largest pre-activations. Where relu follows the choice, those at or below zero are left out at
// once. Nearly all stay under their patch's floor, so chunks of patches are first compared as a whole, without
// branches.
template <class W, class A>
void select(const FeatureTile<W, A>& tile, int64_t patches, PatchRange range, const Selection<A>& kept) {
  constexpr int64_t kChunk = 16;
  A floor[256 + kChunk];  // what a pre-activation must exceed to be kept: once the heap is full, its root
  const int64_t n = range.end - range.begin, first = range.image * patches + range.begin;
  for (int64_t t = 0; t < n; ++t)
    floor[t] = kept.size[first + t] < kept.k ? kept.least : kept.value[(first + t) * kept.k];
  for (int64_t f = 0; f < tile.count; ++f) {
    if (is_off(tile, f)) continue;
    const A* z = tile.codes + f * tile.ld_codes + first;
    const A bias = tile.bias[f];
    for (int64_t t0 = 0; t0 < n; t0 += kChunk) {
      const int64_t end = std::min(t0 + kChunk, n);
      int32_t any = 0;
      if (end - t0 == kChunk)
        for (int64_t t = t0; t < t0 + kChunk; ++t) any |= z[t] + bias > floor[t];
      else
        any = 1;
      if (!any) continue;
      for (int64_t t = t0; t < end; ++t) {
        const A v = z[t] + bias;
        if (!(v > floor[t])) continue;
        const int64_t row = first + t;
        A* value = kept.value + row * kept.k;
        int64_t *index = kept.index + row * kept.k, &size = kept.size[row];
        if (size < kept.k)
          sift_up(value, index, size++, v, tile.first + f);
        else
          sift_down(value, index, size, v, tile.first + f);
        if (size == kept.k) floor[t] = value[0];
      }
    }
  }
}

// The scores of the chosen features, in order of features so that sums do not depend on the order of choice.
// contributions [M, P, k]: what each chosen feature gave, for the strongest of the image; null where not wanted.
template <class W, class A>
void accumulate_selected(const W* decoder, const int64_t* permutation, const ScoreProblem<A>& problem, PatchRange range,
                         const Selection<A>& kept, A* contributions) {
  const int64_t *first = problem.targets + problem.target_start[range.image],
                *last = problem.targets + problem.target_start[range.image + 1];
  for (int64_t t = range.begin; t < range.end; ++t) {
    const int64_t token = range.image * problem.patches + t, size = kept.size[token];
    A* value = kept.value + token * kept.k;
    int64_t* index = kept.index + token * kept.k;
    sort_by_feature(value, index, size);
    for (const int64_t* m = first; m < last; ++m) {
      const int64_t row = *m * problem.patches + t;
      const A* g = problem.gradient ? problem.gradient + row * problem.ld_gradient : nullptr;
      for (int64_t i = 0; i < size; ++i) {
        const int64_t f = permutation ? permutation[index[i]] : index[i];
        const A c = g ? value[i] * dot(decoder + f * problem.width, g, problem.width) : value[i];
        problem.scores[row] += c;
        if (problem.patch_top.k) keep_strongest(problem.patch_top, row, index[i], c);
        if (contributions) contributions[row * kept.k + i] = c;
      }
    }
  }
}

#define FGA_INSTANTIATE_SCORE(W, A)                                                                                   \
  template int64_t activate<W, A>(const FeatureTile<W, A>&, Activation, int64_t, PatchRange);                         \
  template void accumulate<W, A>(const FeatureTile<W, A>&, int64_t, int64_t, const ScoreProblem<A>&, PatchRange, A*); \
  template void select<W, A>(const FeatureTile<W, A>&, int64_t, PatchRange, const Selection<A>&);                     \
  template void accumulate_selected<W, A>(const W*, const int64_t*, const ScoreProblem<A>&, PatchRange,               \
                                          const Selection<A>&, A*);                                                   \
  template void normalise_rows<W, A>(const W*, int64_t, int64_t, int64_t, int64_t, int64_t, Normalisation, A*);
FGA_INSTANTIATE_SCORE(float, float)
FGA_INSTANTIATE_SCORE(double, double)
FGA_INSTANTIATE_SCORE(torch::headeronly::BFloat16, float)
FGA_INSTANTIATE_SCORE(torch::headeronly::Half, float)
#undef FGA_INSTANTIATE_SCORE
