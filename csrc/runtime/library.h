#pragma once

#include <string>

namespace fga {

// Makes fga_fast::* known to the dispatcher, once a process; nothing is loaded where they are known already, as beside
// the Python package. `ops_library` empty: libfga_ops.so beside this library. cuda: torch's CUDA half and
// libfga_ops_cuda.so beside libfga_ops.so are loaded too.
void load_ops(const std::string& ops_library, bool cuda);

}  // namespace fga
