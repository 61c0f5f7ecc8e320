// What the C++ tests share: checks that stay in every build, and a random source that is the same
// everywhere (the standard library's distributions are not).
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <string>
#include <utility>

namespace disagg::test {

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  std::exit(1);
}

// Ends the test with its place and the condition if that is false.
#define CHECK(condition) \
  ((condition) ? void() : ::disagg::test::fail(__FILE__, __LINE__, "failed: " #condition))

// Ends the test with the evidence if an audit found anything.
#define CHECK_SOUND(structure)                                                  \
  do {                                                                          \
    const std::string broken = (structure).audit();                             \
    if (!broken.empty()) ::disagg::test::fail(__FILE__, __LINE__, broken);      \
  } while (false)

// Marsaglia's xorshift64*.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ULL + 1) {}
  std::uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1dULL;
  }
  // In [0, bound). Requires: bound > 0.
  std::uint64_t below(std::uint64_t bound) { return next() % bound; }

 private:
  std::uint64_t state_;
};

// Runs named tests in order; the last name printed is the one that failed.
inline int run(std::initializer_list<std::pair<const char*, std::function<void()>>> tests) {
  for (const auto& [name, test] : tests) {
    std::printf("%s\n", name);
    std::fflush(stdout);
    test();
  }
  return 0;
}

}  // namespace disagg::test
