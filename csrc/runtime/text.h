// Writes shapes and lists like the messages of the Python package.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fga {

inline std::string shown(const std::vector<int64_t>& numbers) {
  std::string text = "[";
  for (const int64_t n : numbers) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
  return text + "]";
}

}  // namespace fga
