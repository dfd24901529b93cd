#include <string.h>

#include "check.h"
#include "cpu.h"
#include "pool.h"

namespace paceline {
Count count;
#define X(stem) void stem(const Kernels&, Pool*, Workspace*);
PL_TEST_FILES
#undef X
}  // namespace paceline

// native_tests [instruction set...]: all usable ones by default.
int main(int argc, char** argv) {
  using namespace paceline;
  Pool* pool = pool_create(2);
  Workspace ws;
  for (const Isa& isa : instruction_sets()) {
    bool chosen = argc < 2;
    for (int i = 1; i < argc; ++i) chosen |= strcmp(argv[i], isa.name) == 0;
    if (!chosen) continue;
    if (!isa.why_not.empty()) {
      printf("%s: skipped, %s\n", isa.name, isa.why_not.c_str());
      continue;
    }
    Kernels k;
    isa.fill(k);
    const Count before = count;
#define X(stem) stem(k, pool, &ws);
    PL_TEST_FILES
#undef X
    printf("%s: %d passed, %d failed\n", isa.name, count.passed - before.passed, count.failed - before.failed);
  }
  pool_destroy(pool);
  printf("%d passed, %d failed\n", count.passed, count.failed);
  return count.failed != 0 || count.passed == 0;
}
