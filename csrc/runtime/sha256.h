#pragma once

#include <string>

namespace fga {

// SHA-256 (FIPS 180-4) of a file's bytes in lower-case hexadecimal. Throws Error where the file cannot be read.
std::string sha256_of_file(const std::string& path);

}  // namespace fga
