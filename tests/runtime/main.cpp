// runtime_tests FOLDER: runs all cases; the folder is theirs to write to.
#include <exception>

#include "check.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  scratch_folder = argv[1];
  for (const Case& test : cases()) try {
      test.body();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: threw %s\n", test.name, error.what());
      ++failures;
    }
  std::printf("%zu cases, %d failures\n", cases().size(), failures);
  return failures == 0 ? 0 : 1;
}
