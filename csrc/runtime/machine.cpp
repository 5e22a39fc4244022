#include "machine.h"

#include <sys/utsname.h>

#include <map>

namespace fga {
namespace {

// By torch's names. Features that are not listed here are not checked.
std::map<std::string, bool> features() {
#if defined(__x86_64__)
  return {{"sse", __builtin_cpu_supports("sse") != 0},
          {"sse2", __builtin_cpu_supports("sse2") != 0},
          {"sse3", __builtin_cpu_supports("sse3") != 0},
          {"ssse3", __builtin_cpu_supports("ssse3") != 0},
          {"sse4_1", __builtin_cpu_supports("sse4.1") != 0},
          {"sse4_2", __builtin_cpu_supports("sse4.2") != 0},
          {"sse4a", __builtin_cpu_supports("sse4a") != 0},
          {"popcnt", __builtin_cpu_supports("popcnt") != 0},
          {"avx", __builtin_cpu_supports("avx") != 0},
          {"avx2", __builtin_cpu_supports("avx2") != 0},
          {"bmi", __builtin_cpu_supports("bmi") != 0},
          {"bmi2", __builtin_cpu_supports("bmi2") != 0},
          {"fma3", __builtin_cpu_supports("fma") != 0},
          {"fma4", __builtin_cpu_supports("fma4") != 0},
          {"avx512_f", __builtin_cpu_supports("avx512f") != 0},
          {"avx512_bw", __builtin_cpu_supports("avx512bw") != 0},
          {"avx512_cd", __builtin_cpu_supports("avx512cd") != 0},
          {"avx512_dq", __builtin_cpu_supports("avx512dq") != 0},
          {"avx512_vl", __builtin_cpu_supports("avx512vl") != 0},
          {"avx512_ifma", __builtin_cpu_supports("avx512ifma") != 0},
          {"avx512_vbmi", __builtin_cpu_supports("avx512vbmi") != 0},
          {"avx512_vbmi2", __builtin_cpu_supports("avx512vbmi2") != 0},
          {"avx512_vnni", __builtin_cpu_supports("avx512vnni") != 0},
          {"avx512_bitalg", __builtin_cpu_supports("avx512bitalg") != 0},
          {"avx512_vpopcntdq", __builtin_cpu_supports("avx512vpopcntdq") != 0}};
#else
  return {};
#endif
}

}  // namespace

std::string architecture() {
  utsname name;
  return uname(&name) == 0 ? name.machine : "";
}

void check_machine(const Metadata& metadata) {
  std::string lacking;
  const auto lacks = [&lacking](const std::string& what) { lacking += (lacking.empty() ? "" : ", ") + what; };
  if (!metadata.architecture.empty() && metadata.architecture != architecture()) lacks(metadata.architecture);
  const auto here = features();
  for (const std::string& feature : metadata.features)
    if (const auto found = here.find(feature); found != here.end() && !found->second) lacks(feature);
  if (!lacking.empty())
    throw Error("package: was compiled for another processor, this one lacks " + lacking +
                "; export it on a machine like this one");
}

}  // namespace fga
