// A folder of a test's own, which goes with it.
#pragma once

#include <stdlib.h>  // mkdtemp is of POSIX, <cstdlib> need not have it

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>

class Scratch {
 public:
  Scratch() : folder_((std::filesystem::temp_directory_path() / "fga_runtime_tests.XXXXXX").string()) {
    if (mkdtemp(folder_.data()) == nullptr) throw std::filesystem::filesystem_error("mkdtemp", folder_, last_error());
  }
  ~Scratch() {
    std::error_code ignored;  // a destructor must not throw
    std::filesystem::remove_all(folder_, ignored);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  std::string path(const std::string& name) const { return folder_ + "/" + name; }

  std::string write(const std::string& name, const std::string& content) const {
    std::ofstream file(path(name), std::ios::binary);
    file << content;
    if (!file.flush()) throw std::filesystem::filesystem_error("write", path(name), last_error());
    return path(name);
  }

 private:
  static std::error_code last_error() { return {errno, std::generic_category()}; }

  std::string folder_;
};
