#pragma once

#include <string>

#include <fga_fast/session.h>

namespace fga {

// This processor's, as Python's platform.machine() calls it.
std::string architecture();

// Refuses a package that was compiled for a processor with what this one lacks: it would end the process.
void check_machine(const Metadata& metadata);

}  // namespace fga
