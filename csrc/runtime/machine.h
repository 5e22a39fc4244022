#pragma once

#include <string>

#include <fga_fast/session.h>

namespace fga {

// The architecture of this processor, with the same name as Python's platform.machine().
std::string architecture();

// Refuses a package compiled for features that this processor lacks: running it would crash the process.
void check_machine(const Metadata& metadata);

}  // namespace fga
