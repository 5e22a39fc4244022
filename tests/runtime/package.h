// The metadata of a package, and files that look like one.
#pragma once

#include <string>

#include "scratch.h"

inline const std::string kMetadata = R"({
  "format": "fga_fast package", "format_version": 5, "device": "cpu", "dtype": "float32", "batch": 2,
  "channels": 3, "height": 32, "width": 48, "grid": [2, 3], "classes": 5, "class_names": null,
  "preprocessing": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "interpolation": "bilinear", "crop_pct": 0.9},
  "target_mode": "predicted", "gated_blocks": [6],
  "outputs": [{"name": "logits", "shape": [2, 5], "dtype": "float32"},
              {"name": "targets", "shape": [2], "dtype": "int64"}, {"name": "values", "shape": [2], "dtype": "float32"},
              {"name": "relevance", "shape": [2, 6], "dtype": "float32"},
              {"name": "scores.6", "shape": [2, 6], "dtype": "float32"},
              {"name": "gates.6", "shape": [2, 6], "dtype": "float32"}],
  "machine": {"architecture": "x86_64", "features": ["avx2"]}, "backend": "native", "method": "rollout",
  "backward": "exact", "gate": {"mode": "combined"}, "versions": {"torch": "2.11.0"}})";

// The text with one part of it, which must be there, replaced.
inline std::string replaced(std::string text, const std::string& part, const std::string& other) {
  return text.replace(text.find(part), part.size(), other);
}
