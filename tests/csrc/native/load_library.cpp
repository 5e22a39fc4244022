// Loads the shared libraries named on the command line, in order, as a C++ service would: every symbol must resolve
// without Python in the process, and the operator registrations run. Exit status 1 and the loader's message otherwise.
#include <dlfcn.h>

#include <cstdio>

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (dlopen(argv[i], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      std::fprintf(stderr, "cannot load %s: %s\n", argv[i], dlerror());
      return 1;
    }
    std::printf("loaded %s\n", argv[i]);
  }
  return 0;
}
