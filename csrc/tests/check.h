// A test is a function that calls CHECK; no framework. Each tests/test_<stem>.cpp defines test_<stem>, called once per usable
// instruction set; the last line of output counts.
#pragma once
#include <stdio.h>

#include "memory.h"
#include "paceline/kernels.h"

namespace paceline {

struct Count { int passed = 0, failed = 0; };
extern Count count;

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (condition) {                                                       \
      ++::paceline::count.passed;                                          \
    } else if (++::paceline::count.failed <= 20) {                         \
      fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);      \
      fprintf(stderr, "" __VA_ARGS__);                                     \
      fputc('\n', stderr);                                                 \
    }                                                                      \
  } while (0)

// A small deterministic generator of floats in [-1, 1).
struct Random {
  uint64_t s = 0x9e3779b97f4a7c15u;
  uint64_t bits() {
    s ^= s << 13, s ^= s >> 7, s ^= s << 17;
    return s;
  }
  float unit() { return static_cast<float>(static_cast<int64_t>(bits() >> 40) - (1 << 23)) / static_cast<float>(1 << 23); }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
};

}  // namespace paceline
