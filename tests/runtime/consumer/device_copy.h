// Device memory by the driver's own interface, which comes with the driver: a program that uses fga_fast on CUDA need
// not be built with the CUDA toolkit.
#pragma once

#include <fga_fast/error.h>

#include <dlfcn.h>

#include <cstddef>
#include <string>

// A copy on the first device, in the context that torch uses too; it lives as long as the process.
class DeviceCopy {
 public:
  DeviceCopy(const void* from, size_t bytes) {
    if (driver_ == nullptr) throw fga::Error("no CUDA driver");
    int device = 0;
    void* context = nullptr;
    call("cuInit", 0U);
    call("cuDeviceGet", &device, 0);
    call("cuDevicePrimaryCtxRetain", &context, device);
    call("cuCtxSetCurrent", context);
    call("cuMemAlloc_v2", &address_, bytes);
    call("cuMemcpyHtoD_v2", address_, from, bytes);
  }

  const float* values() const { return reinterpret_cast<const float*>(address_); }

 private:
  template <class... Arguments>
  void call(const char* name, Arguments... arguments) const {
    const auto function = reinterpret_cast<int (*)(Arguments...)>(dlsym(driver_, name));
    if (function == nullptr) throw fga::Error(std::string("the CUDA driver has no ") + name);
    const int status = function(arguments...);
    if (status != 0) throw fga::Error(std::string(name) + " failed with " + std::to_string(status));
  }

  void* driver_ = dlopen("libcuda.so.1", RTLD_NOW);
  unsigned long long address_ = 0;
};
