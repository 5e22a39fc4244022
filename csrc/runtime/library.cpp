#include "library.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <filesystem>
#include <mutex>

#include <fga_fast/error.h>

namespace fga {
namespace {

bool is_known() {
  return c10::Dispatcher::singleton().findSchema({"fga_fast::score", ""}).has_value();
}

bool has_cuda_kernels() {
  const auto op = c10::Dispatcher::singleton().findSchema({"fga_fast::attention", ""});
  return op.has_value() && op->hasKernelForDispatchKey(c10::DispatchKey::CUDA);
}

// The symbols are global, as the compiled model and libfga_ops_cuda.so look them up by name.
void load(const std::string& path) {
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr)
    throw Error("session: cannot load " + path + ": " + dlerror());
}

std::string beside_this_library() {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&load_ops), &info) == 0 || info.dli_fname == nullptr)
    throw Error("ops_library: give the path of libfga_ops.so, this library does not know where it lies itself");
  return std::filesystem::path(info.dli_fname).parent_path() / "libfga_ops.so";
}

}  // namespace

void load_torch(bool cuda) {
  // Compiled models name libtorch.so as what they need, without saying where it lies. It is not linked instead, as
  // whoever links this library would then need all that a CUDA build of torch is made of.
  load("libtorch.so");
  if (cuda) load("libtorch_cuda.so");  // its devices register themselves as it loads
}

void load_ops(const std::string& ops_library, bool cuda) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::filesystem::path path = ops_library.empty() ? beside_this_library() : ops_library;
  if (!is_known()) {
    load(path);
    if (!is_known()) throw Error("ops_library: " + path.string() + " has no operators of fga_fast in it");
  }
  const std::filesystem::path beside = path.parent_path() / "libfga_ops_cuda.so";
  if (cuda && !has_cuda_kernels() && std::filesystem::exists(beside)) load(beside);
}

}  // namespace fga
