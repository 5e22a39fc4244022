// What every function of the runtime throws, and the mark of what its library exports.
#pragma once

#include <stdexcept>

#define FGA_API __attribute__((visibility("default")))

namespace fga {

// The message names the argument, what was expected, what came and what to do, in the words of the Python package.
class FGA_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace fga
