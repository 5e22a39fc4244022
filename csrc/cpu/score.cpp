// Feature score on the CPU: walks the dictionary in tiles. The encoder product of a tile is the bounded one of
// score_bounded.h or torch's own matrix product; what follows is score_kernel.h. Nothing of size P x F is kept.
#include "isa.h"
#include "score_arguments.h"
#include "score_bounded.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#if FGA_X86_DISPATCH
#define FGA_IF_ISA(set, ...) \
  if (detect_isa() == Isa::set) return set::__VA_ARGS__;
#else
#define FGA_IF_ISA(set, ...)
#endif
#define FGA_ON_ISA(...)             \
  [&] {                             \
    FGA_IF_ISA(avx512, __VA_ARGS__) \
    FGA_IF_ISA(avx2, __VA_ARGS__)   \
    return baseline::__VA_ARGS__;   \
  }()

namespace fga {

namespace {

constexpr int64_t kRangePatches = 128;                   // patches of one work item; accumulate() has room for 256
constexpr int64_t kTileBytes = int64_t{8} << 20;         // pre-activations of one tile; smaller ones pack x more often
constexpr int64_t kBoundedTileBytes = int64_t{1} << 20;  // ... which the bounded product does not do
constexpr int64_t kDecoderBytes = int64_t{1} << 19;      // decoder rows of one block of features
// Share of active features above which a second dense product beats gathering decoder rows: 0.30 with one thread and
// 0.29 with two, measured by benchmarks/bench_score.py on a 2-core Xeon with AVX-512 at commit 975aadd.
constexpr double kDenseShare = 0.3;
// Share of features that may be on above which the dense product of the encoder beats the bounded one.
constexpr double kBoundedShare = 0.15;
constexpr int64_t kTilesUntilRetry = 8;

Tensor call(const char* name, const char* overload, std::vector<StableIValue> stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// out = a b, into memory that is there already
void multiply_into(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  call("aten::mm", "out", {from(a), from(b), from(out)});
}

Tensor cast(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

Tensor narrow_rows(const Tensor& t, int64_t first, int64_t count) {
  Tensor from = t;
  return torch::stable::narrow(from, 0, first, count);
}

std::vector<PatchRange> patch_ranges(int64_t images, int64_t patches) {
  const int64_t pieces = std::max<int64_t>(1, (patches + kRangePatches - 1) / kRangePatches);
  const int64_t even = (pieces + pieces % 2), length = (patches + even - 1) / even;  // an even count shares out evenly
  std::vector<PatchRange> ranges;
  for (int64_t b = 0; b < images; ++b)
    for (int64_t p = 0; p < patches; p += length) ranges.push_back({b, p, std::min(p + length, patches)});
  return ranges;
}

// Rows of targets by image: targets[start[b] .. start[b + 1]).
struct TargetsOfImages {
  std::vector<int64_t> targets, start;
  int64_t most = 0;
  explicit TargetsOfImages(const Arguments& a) : start(a.images + 1, 0) {
    std::vector<std::vector<int64_t>> of(a.images);
    const std::optional<Tensor> image =
        a.image ? std::optional<Tensor>(torch::stable::contiguous(*a.image)) : std::nullopt;
    for (int64_t m = 0; m < a.rows; ++m) of[image_of_row(image, m, a.images, kScore)].push_back(m);
    for (int64_t b = 0; b < a.images; ++b) {
      targets.insert(targets.end(), of[b].begin(), of[b].end());
      start[b + 1] = static_cast<int64_t>(targets.size());
      most = std::max(most, static_cast<int64_t>(of[b].size()));
    }
  }
};

// One call: S is the type of x and g, W that of the SAE, A that of the arithmetic.
template <class S, class W, class A>
class Scorer {
 public:
  Scorer(const Arguments& a, Outputs& o)
      : a_(a),
        o_(o),
        type_(o.scores.scalar_type()),
        of_(a),
        ranges_(patch_ranges(a.images, a.patches)),
        tokens_(a.images * a.patches),
        ld_(a.width) {
    x_ = dense(a.x, a.images, a.normalize);
    if constexpr (std::is_same_v<W, float> && std::is_same_v<A, float>)
      if (a.encoder && bounds_here(a.width)) bounded_.emplace(a, ranges_, data(x_));
    tile_ = std::min(tile_of(kTileBytes), a.features);
    g_ = dense(a.g, a.rows, Normalisation::none);
    gt_ = torch::stable::transpose(g_, 0, 1);
    problem_ = {a.rows * a.patches,
                a.patches,
                a.width,
                ld_,
                a.weigh ? data(g_) : nullptr,
                of_.targets.data(),
                of_.start.data(),
                data(o.scores),
                {a.top, static_cast<int64_t*>(o.patch_index.mutable_data_ptr()), data(o.patch_contribution)}};
    bias_ = cast(a.bias, type_);
    if (a.theta) theta_ = cast(*a.theta, type_);
    if (a.gate_scale) scale_ = cast(*a.gate_scale, type_);
    if (a.mag_bias) mag_ = cast(*a.mag_bias, type_);
  }

  void run() {
    const Tensor xt = torch::stable::transpose(x_, 0, 1);
    Tensor codes = torch::stable::new_empty(x_, {tile_, tokens_});
    if (chooses_k(a_.activation)) reserve_selection();
    if (a_.top) sums_.resize(ranges_.size() * of_.most * tile_);
    for (int64_t first = 0, count; first < a_.features; first += count) {
      const bool bounds = takes_bounds(first);
      count = std::min(bounds ? tile_of(kBoundedTileBytes) : tile_, a_.features - first);
      FeatureTile<W, A> t{
          first,           count,   data(codes), tokens_, data(bias_) + first, at(theta_, first), at(scale_, first),
          at(mag_, first), nullptr, nullptr,     nullptr};
      if (bounds) {
        consume_bounded(t);
        continue;
      }
      multiply_into(cast(narrow_rows(a_.w_enc_t, first, count), type_), xt, narrow_rows(codes, 0, count));
      if (chooses_k(a_.activation))
        each_range([&](PatchRange r, int64_t) { FGA_ON_ISA(select<W, A>(t, a_.patches, r, selection_)); });
      else
        consume(t);
    }
    if (chooses_k(a_.activation)) consume_selection();
    mark_nonfinite();
  }

 private:
  // Features whose pre-activations of all tokens take about so many bytes
  int64_t tile_of(int64_t bytes) const {
    const int64_t tokens = std::max<int64_t>(1, tokens_);
    return std::clamp<int64_t>(bytes / static_cast<int64_t>(sizeof(A)) / tokens / 64 * 64, 64, 2048);
  }

  static A* data(const Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); }
  static const A* at(const std::optional<Tensor>& t, int64_t first) { return t ? data(*t) + first : nullptr; }

  template <class F>
  void each_range(const F& f) {
    torch::stable::parallel_for(0, static_cast<int64_t>(ranges_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(ranges_[i], i);
    });
  }

  // [R, P, C] of any strides and type -> dense [R * P, C] in the arithmetic type, normalised
  Tensor dense(const Tensor& t, int64_t images, Normalisation kind) {
    Tensor out = torch::stable::new_empty(t, {images * a_.patches, a_.width}, type_);
    const S* from = static_cast<const S*>(t.const_data_ptr());
    A* to = data(out);
    torch::stable::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        FGA_ON_ISA(normalise_rows<S, A>(from + b * t.stride(0), t.stride(1), t.stride(2), a_.patches, a_.width, ld_,
                                        kind, to + b * a_.patches * ld_));
    });
    return out;
  }

  // Whether a tile gets the bounded product. After one where much was possible the next ones are dense.
  bool takes_bounds(int64_t first) {
    const bool first_of_k = chooses_k(a_.activation) && first == 0;  // nothing is known yet of what must be exceeded
    return bounded_ && !first_of_k && dense_tiles_-- <= 0;
  }

  void consume_bounded(const FeatureTile<W, A>& t) {
    if constexpr (std::is_same_v<W, float> && std::is_same_v<A, float>) {
      const bool selects = chooses_k(a_.activation);
      Tensor rows;
      if (a_.weigh && !selects) rows = decoder_rows(t.first, t.count);
      const double share =
          bounded_->encode(t, selects ? &selection_ : nullptr, [&](FeatureTile<W, A>& mine, PatchRange r, int64_t i) {
            if (selects) return FGA_ON_ISA(select<W, A>(mine, a_.patches, r, selection_));
            if (a_.weigh) mine.decoder = static_cast<const W*>(rows.const_data_ptr());
            FGA_ON_ISA(activate<W, A>(mine, a_.activation, a_.patches, r));
            A* sums = a_.top ? sums_.data() + i * of_.most * tile_ : nullptr;
            FGA_ON_ISA(accumulate<W, A>(mine, 0, t.count, problem_, r, sums));
          });
      if (a_.top && !selects) strongest_of_tile(t);
      dense_tiles_ = share > kBoundedShare ? kTilesUntilRetry : 0;
    }
  }

  // Codes of a tile to scores, by gathering decoder rows or, where many features fire, by a second product.
  void consume(FeatureTile<W, A>& t) {
    std::vector<int64_t> active(ranges_.size());
    each_range(
        [&](PatchRange r, int64_t i) { active[i] = FGA_ON_ISA(activate<W, A>(t, a_.activation, a_.patches, r)); });
    int64_t total = 0;
    for (int64_t n : active) total += n;
    if (total == 0) return;
    Tensor rows, gradients;
    if (a_.weigh) {
      rows = decoder_rows(t.first, t.count);
      t.decoder = static_cast<const W*>(rows.const_data_ptr());
      if (static_cast<double>(total) > kDenseShare * static_cast<double>(t.count) * static_cast<double>(tokens_)) {
        gradients = torch::stable::new_empty(g_, {t.count, a_.rows * a_.patches});
        multiply_into(cast(rows, type_), gt_, gradients);
        t.feature_gradients = data(gradients);
      }
    }
    // Features in blocks whose decoder rows stay in the L2 cache while all patches use them.
    const int64_t block =
        std::max<int64_t>(16, kDecoderBytes / static_cast<int64_t>(sizeof(W)) / std::max<int64_t>(1, a_.width));
    torch::stable::parallel_for(0, static_cast<int64_t>(ranges_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t f = 0; f < t.count; f += block)
        for (int64_t i = begin; i < end; ++i) {
          A* sums = a_.top ? sums_.data() + i * of_.most * tile_ : nullptr;
          FGA_ON_ISA(accumulate<W, A>(t, f, std::min(f + block, t.count), problem_, ranges_[i], sums));
        }
    });
    if (a_.top) strongest_of_tile(t);
  }

  // A comparison with NaN is false, so a NaN would pass as a feature that is not active: say it in the score instead.
  void mark_nonfinite() {
    const A* x = data(x_);
    for (int64_t b = 0; b < a_.images; ++b)
      for (int64_t p = 0; p < a_.patches; ++p, x += ld_) {
        const bool finite = std::all_of(x, x + a_.width, [](A value) { return std::isfinite(value); });
        for (int64_t j = of_.start[b]; !finite && j < of_.start[b + 1]; ++j)
          data(o_.scores)[of_.targets[j] * a_.patches + p] = std::numeric_limits<A>::quiet_NaN();
      }
  }

  Tensor decoder_rows(int64_t first, int64_t count) {
    if (!a_.permutation) return narrow_rows(a_.w_dec, first, count);
    using torch::stable::detail::from;
    return call("aten::index_select", "",
                {from(a_.w_dec), from(int64_t{0}), from(narrow_rows(*a_.permutation, first, count))});
  }

  // Per image: what a feature gave over all patches, in fixed order of the ranges.
  void strongest_of_tile(const FeatureTile<W, A>& t) {
    for (size_t i = 0; i < ranges_.size();) {
      const int64_t b = ranges_[i].image;
      size_t next = i;
      while (next < ranges_.size() && ranges_[next].image == b) ++next;
      for (int64_t j = of_.start[b]; j < of_.start[b + 1]; ++j)
        for (int64_t f = 0; f < t.count; ++f) {
          A sum = 0;
          for (size_t r = i; r < next; ++r) sum += sums_[r * of_.most * tile_ + (j - of_.start[b]) * t.count + f];
          keep_of_image(of_.targets[j], t.first + f, sum);
        }
      i = next;
    }
  }

  void keep_of_image(int64_t row, int64_t feature, A sum) {
    A* value = data(o_.image_contribution) + row * a_.top;
    if (!(std::abs(sum) > std::abs(value[a_.top - 1]))) return;
    int64_t* index = static_cast<int64_t*>(o_.image_index.mutable_data_ptr()) + row * a_.top;
    int64_t at = a_.top - 1;
    for (; at > 0 && std::abs(sum) > std::abs(value[at - 1]); --at) {
      value[at] = value[at - 1];
      index[at] = index[at - 1];
    }
    value[at] = sum;
    index[at] = feature;
  }

  void reserve_selection() {
    const int64_t k = std::min(a_.k, a_.features);
    values_.resize(tokens_ * k);
    indices_.resize(tokens_ * k);
    sizes_.assign(tokens_, 0);
    const A least = a_.activation == Activation::topk_signed ? -std::numeric_limits<A>::infinity() : A(0);
    selection_ = {k, least, values_.data(), indices_.data(), sizes_.data()};
  }

  void consume_selection() {
    const int64_t k = selection_.k;
    std::vector<A> contributions(a_.top ? problem_.rows * k : 0);
    const int64_t* permutation =
        a_.permutation ? static_cast<const int64_t*>(a_.permutation->const_data_ptr()) : nullptr;
    const W* decoder = static_cast<const W*>(a_.w_dec.const_data_ptr());
    each_range([&](PatchRange r, int64_t) {
      FGA_ON_ISA(accumulate_selected<W, A>(decoder, permutation, problem_, r, selection_,
                                           a_.top ? contributions.data() : nullptr));
    });
    if (!a_.top) return;
    for (int64_t b = 0; b < a_.images; ++b)
      for (int64_t j = of_.start[b]; j < of_.start[b + 1]; ++j) strongest_selected(b, of_.targets[j], contributions);
  }

  void strongest_selected(int64_t image, int64_t row, const std::vector<A>& contributions) {
    std::vector<std::pair<int64_t, A>> pairs;
    for (int64_t p = 0; p < a_.patches; ++p) {
      const int64_t token = image * a_.patches + p;
      for (int64_t i = 0; i < sizes_[token]; ++i)
        pairs.emplace_back(indices_[token * selection_.k + i],
                           contributions[(row * a_.patches + p) * selection_.k + i]);
    }
    std::stable_sort(pairs.begin(), pairs.end(), [](const auto& l, const auto& r) { return l.first < r.first; });
    for (size_t i = 0; i < pairs.size();) {
      const int64_t feature = pairs[i].first;
      A sum = 0;
      for (; i < pairs.size() && pairs[i].first == feature; ++i) sum += pairs[i].second;
      keep_of_image(row, feature, sum);
    }
  }

  const Arguments& a_;
  Outputs& o_;
  ScalarType type_;
  TargetsOfImages of_;
  std::vector<PatchRange> ranges_;
  int64_t tokens_, ld_, tile_;
  Tensor x_, g_, gt_, bias_;
  std::optional<Tensor> theta_, scale_, mag_;
  ScoreProblem<A> problem_;
  std::vector<A> sums_, values_;
  std::vector<int64_t> indices_, sizes_;
  Selection<A> selection_{};
  std::optional<BoundedEncoder> bounded_;
  int64_t dense_tiles_ = 0;  // that come before the bounded product is tried again
};

template <class S>
void run(const Arguments& a, Outputs& o) {
  using A = std::conditional_t<std::is_same_v<S, double>, double, float>;
  if (a.w_enc_t.scalar_type() == a.x.scalar_type())
    Scorer<S, S, A>(a, o).run();
  else
    Scorer<S, A, A>(a, o).run();
}

}  // namespace

// See fga_fast/ops/score.py for the meaning of each argument.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> score_cpu(
    const Tensor& x, const Tensor& g, const std::optional<Tensor>& image, const Tensor& w_enc_t, const Tensor& bias,
    const Tensor& w_dec, const std::optional<Tensor>& theta, const std::optional<Tensor>& gate_scale,
    const std::optional<Tensor>& mag_bias, const std::optional<Tensor>& permutation,
    const std::optional<Tensor>& encoder, const std::optional<Tensor>& limits, int64_t activation, int64_t normalize,
    bool weigh, int64_t k, int64_t top_features) {
  check_rank(kScore, "x", x, 3, "[B, P, C]");
  check_rank(kScore, "g", g, 3, "[M, P, C]");
  check_rank(kScore, "W_enc_t", w_enc_t, 2, "[F, C]");
  const auto dense = [](const Tensor& t) { return torch::stable::contiguous(t); };
  const auto dense_optional = [&](const std::optional<Tensor>& t) {
    return t ? std::optional<Tensor>(dense(*t)) : std::nullopt;
  };
  const Arguments a{x,
                    g,
                    dense(w_enc_t),
                    dense(bias),
                    dense(w_dec),
                    image,
                    dense_optional(theta),
                    dense_optional(gate_scale),
                    dense_optional(mag_bias),
                    dense_optional(permutation),
                    dense_optional(encoder),
                    dense_optional(limits),
                    numbered("activation", activation, Activation::gated),
                    numbered("normalize", normalize, Normalisation::constant_norm),
                    weigh,
                    k,
                    top_features,
                    x.size(0),
                    g.size(0),
                    x.size(1),
                    x.size(2),
                    w_enc_t.size(0)};
  check_score(a);
  const ScalarType statistics = statistic_type(x.scalar_type());
  using torch::stable::new_empty;
  Outputs o{torch::stable::new_zeros(x, {a.rows, a.patches}, statistics),
            new_empty(x, {a.rows, a.patches, a.top}, ScalarType::Long),
            torch::stable::new_zeros(x, {a.rows, a.patches, a.top}, statistics),
            new_empty(x, {a.rows, a.top}, ScalarType::Long), torch::stable::new_zeros(x, {a.rows, a.top}, statistics)};
  torch::stable::fill_(o.patch_index, -1);
  torch::stable::fill_(o.image_index, -1);
  if (a.images * a.patches > 0 && a.rows > 0)
    dispatch_floating(kScore, "x", x.scalar_type(), [&](auto tag) { run<decltype(tag)>(a, o); });
  return {o.scores, o.patch_index, o.patch_contribution, o.image_index, o.image_contribution};
}

}  // namespace fga
