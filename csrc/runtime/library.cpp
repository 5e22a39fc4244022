#include "library.h"

#include <ATen/Parallel.h>
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

void load(const std::filesystem::path& path, int scope, const char* advice = "") {
  if (dlopen(path.c_str(), RTLD_NOW | scope) == nullptr)
    throw Error("session: cannot load " + path.string() + ": " + dlerror() + advice);
}

// The folder of the library that contains a function.
template <class F>
std::filesystem::path folder_of(F* function) {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(function), &info) == 0 || info.dli_fname == nullptr)
    throw Error(
        "session: cannot find the folder of its libraries; give ops_library, and torch's folder in LD_LIBRARY_PATH");
  return std::filesystem::path(info.dli_fname).parent_path();
}

}  // namespace

void load_torch(bool cuda) {
  // Compiled models need libtorch.so but do not say where it is. We do not link it: then every program that links this
  // library would also need all libraries of a CUDA build of torch.
  const std::filesystem::path torch = folder_of(&at::get_num_threads);
  load(torch / "libtorch.so", RTLD_LOCAL);
  if (!cuda) return;
  const std::filesystem::path devices = torch / "libtorch_cuda.so";  // registers CUDA when it loads
  if (!std::filesystem::exists(devices))
    throw Error("package: was exported for cuda, but the torch in " + torch.string() +
                " is built without CUDA; export one on the CPU, or build the session with a CUDA build of torch");
  load(devices, RTLD_LOCAL);
}

void load_ops(const std::string& ops_library, bool cuda) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  std::filesystem::path path = ops_library;
  if (path.empty()) path = folder_of(&load_ops) / "libfga_ops.so";
  // RTLD_GLOBAL, because libfga_ops_cuda.so looks up its symbols by name.
  if (!is_known()) {
    load(path, RTLD_GLOBAL, "; give ops_library, the path of libfga_ops.so");
    if (!is_known()) throw Error("ops_library: " + path.string() + " has no operators of fga_fast in it");
  }
  const std::filesystem::path beside = path.parent_path() / "libfga_ops_cuda.so";
  if (cuda && !has_cuda_kernels() && std::filesystem::exists(beside)) load(beside, RTLD_GLOBAL);
}

}  // namespace fga
