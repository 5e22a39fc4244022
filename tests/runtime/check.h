// A few lines of test framework: cases register themselves, a failed check is printed and the run goes on.
#pragma once

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

struct Case {
  const char* name;
  std::function<void()> body;
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
inline int failures = 0;
inline std::string scratch_folder;  // where a test may write

struct Register {
  Register(const char* name, std::function<void()> body) { cases().push_back({name, std::move(body)}); }
};

#define TEST(name)                                    \
  static void name();                                 \
  static const Register register_##name(#name, name); \
  static void name()

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                                  \
    }                                                                              \
  } while (false)

// That a statement throws fga::Error with these words in its message.
#define CHECK_ERROR(statement, words)                                                                  \
  do {                                                                                                 \
    std::string message = "(nothing was thrown)";                                                      \
    try {                                                                                              \
      statement;                                                                                       \
    } catch (const fga::Error& error) {                                                                \
      message = error.what();                                                                          \
    }                                                                                                  \
    if (message.find(words) == std::string::npos) {                                                    \
      std::fprintf(stderr, "%s:%d: expected an error with '%s', got: %s\n", __FILE__, __LINE__, words, \
                   message.c_str());                                                                   \
      ++failures;                                                                                      \
    }                                                                                                  \
  } while (false)
