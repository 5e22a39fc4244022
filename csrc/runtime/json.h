// A strict JSON parser (RFC 8259) for package metadata: no comments, no NaN, no repeated names, at most 64 levels.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace fga {

struct Json {
  using Array = std::vector<Json>;
  using Object = std::map<std::string, Json>;
  std::variant<std::nullptr_t, bool, double, std::string, Array, Object> value;

  template <class T>
  const T* as() const {
    return std::get_if<T>(&value);
  }
  bool is_null() const { return as<std::nullptr_t>() != nullptr; }
};

// Throws Error with the position in bytes, from 0.
Json parse_json(std::string_view text);

}  // namespace fga
