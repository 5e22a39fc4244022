// The exception of the runtime, and the macro for symbols that its library exports.
#pragma once

#include <stdexcept>

#define FGA_API __attribute__((visibility("default")))

namespace fga {

// As in the Python package, the message names the argument, what was expected, what came and what to do.
class FGA_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace fga
