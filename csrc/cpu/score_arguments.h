// What the score op is called with, checked: every message names the argument, what was expected and what came.
#pragma once

#include "../checks.h"
#include "bound.h"
#include "score.h"

#include <optional>
#include <utility>

namespace fga {
namespace {  // score.cpp alone includes this

constexpr const char* kScore = "score";

// Dense in memory but for x, g and image.
struct Arguments {
  Tensor x, g, w_enc_t, bias, w_dec;
  std::optional<Tensor> image, theta, gate_scale, mag_bias, permutation;
  std::optional<Tensor> encoder, limits;  // rounded; see bound.h
  Activation activation;
  Normalisation normalize;
  bool weigh;  // combined; else activation_only
  int64_t k, top;
  int64_t images, rows, patches, width, features;
};

struct Outputs {
  Tensor scores, patch_index, patch_contribution, image_index, image_contribution;
};

// The value of that number of an enum whose last value is `last`.
template <class E>
E numbered(const char* name, int64_t number, E last) {
  const auto most = static_cast<int64_t>(last);
  STD_TORCH_CHECK(number >= 0 && number <= most, kScore, ": ", name, " must be 0 to ", most, ", got ", number);
  return static_cast<E>(number);
}

inline void check_vector(const char* name, const std::optional<Tensor>& t, bool wanted, int64_t features,
                         ScalarType type) {
  STD_TORCH_CHECK(t.has_value() == wanted, kScore, ": ", name, wanted ? " is missing for" : " does not belong to",
                  " this activation");
  if (!t) return;
  check_shape(kScore, name, *t, {features});
  check_cpu(kScore, name, *t);
  check_type(kScore, name, *t, type);
}

// Contiguous int64; every entry is used as a row number, so each is checked.
inline void check_permutation(const Tensor& permutation, int64_t features) {
  check_vector("permutation", permutation, true, features, ScalarType::Long);
  const int64_t* row = static_cast<const int64_t*>(permutation.const_data_ptr());
  for (int64_t f = 0; f < features; ++f)
    STD_TORCH_CHECK(row[f] >= 0 && row[f] < features, kScore, ": permutation[", f, "] is ", row[f], ", expected 0 to ",
                    features - 1);
}

inline void check_rounded(const Arguments& a) {
  STD_TORCH_CHECK(a.encoder.has_value() == a.limits.has_value(), kScore, ": encoder and limits belong together");
  if (!a.encoder) return;
  const int64_t panels = (a.features + kGroupFeatures - 1) / kGroupFeatures * (kGroupFeatures / kPanelFeatures);
  check_shape(kScore, "encoder", *a.encoder, {panels, (a.width + 1) / 2, kPanelFeatures, 2});
  check_shape(kScore, "limits", *a.limits, {3, panels * kPanelFeatures});
  check_type(kScore, "encoder", *a.encoder, ScalarType::Short);
  check_type(kScore, "limits", *a.limits, ScalarType::Float);
  STD_TORCH_CHECK(a.width <= kMostWidth, kScore, ": encoder may be up to ", kMostWidth, " wide, got ", a.width);
  check_type(kScore, "W_enc_t", a.w_enc_t, ScalarType::Float);  // which the encoder was rounded from
  for (auto [name, t] : {std::pair{"encoder", &*a.encoder}, {"limits", &*a.limits}}) check_cpu(kScore, name, *t);
}

inline void check_score(const Arguments& a) {
  const ScalarType type = a.x.scalar_type(), weights = a.w_enc_t.scalar_type();
  check_shape(kScore, "W_enc_t", a.w_enc_t, {a.features, a.width});
  check_shape(kScore, "W_dec", a.w_dec, {a.features, a.width});
  check_shape(kScore, "bias", a.bias, {a.features});
  check_shape(kScore, "g", a.g, {a.rows, a.patches, a.width});
  check_type(kScore, "g", a.g, type);
  check_type(kScore, "W_dec", a.w_dec, weights);
  check_type(kScore, "bias", a.bias, weights);
  STD_TORCH_CHECK(weights == type || weights == statistic_type(type), kScore, ": W_enc_t is ", name_of(weights),
                  " for x of ", name_of(type), "; it must have the dtype of x, or float32 for 16-bit x");
  for (auto [name, t] :
       {std::pair{"x", &a.x}, {"g", &a.g}, {"W_enc_t", &a.w_enc_t}, {"bias", &a.bias}, {"W_dec", &a.w_dec}})
    check_cpu(kScore, name, *t);
  check_vector("theta", a.theta, has_threshold(a.activation), a.features, weights);
  check_vector("gate_scale", a.gate_scale, a.activation == Activation::gated, a.features, weights);
  check_vector("mag_bias", a.mag_bias, a.activation == Activation::gated, a.features, weights);
  if (a.permutation) check_permutation(*a.permutation, a.features);
  check_rounded(a);
  STD_TORCH_CHECK(!chooses_k(a.activation) || a.k >= 1, kScore, ": k must be at least 1 for topk, got ", a.k);
  STD_TORCH_CHECK(a.top >= 0 && a.top <= a.features, kScore, ": top_features must lie in 0 to ", a.features, ", got ",
                  a.top);
  STD_TORCH_CHECK(a.image || a.rows == a.images, kScore, ": g has ", a.rows, " rows for ", a.images,
                  " images; give image [M] to say which row belongs to which");
  if (!a.image) return;
  check_shape(kScore, "image", *a.image, {a.rows});
  check_type(kScore, "image", *a.image, ScalarType::Long);
  check_cpu(kScore, "image", *a.image);
}

}  // namespace
}  // namespace fga
