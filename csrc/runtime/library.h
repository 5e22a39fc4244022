#pragma once

#include <string>

namespace fga {

// Loads torch's libraries, so that compiled models find them.
void load_torch(bool cuda);

// Registers the operators fga_fast::* once per process. Loads nothing if they are registered already, for example by
// the Python package. ops_library: empty means libfga_ops.so beside this library. cuda: also loads libfga_ops_cuda.so
// beside libfga_ops.so.
void load_ops(const std::string& ops_library, bool cuda);

}  // namespace fga
