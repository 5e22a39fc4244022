#pragma once

#include <string>

namespace fga {

// Makes torch's libraries known to the loader of compiled models.
void load_torch(bool cuda);

// Makes fga_fast::* known to the dispatcher, once a process; nothing is loaded where they are known already, as beside
// the Python package. `ops_library` empty: libfga_ops.so beside this library. cuda: libfga_ops_cuda.so
// beside libfga_ops.so is loaded too.
void load_ops(const std::string& ops_library, bool cuda);

}  // namespace fga
