// Sampling on exactly sized heap blocks, for vocabularies around the widths of vectors and blocks.
#include <math.h>

#include <vector>

#include "check.h"

namespace paceline {
namespace {

int64_t draw(const Kernels& kernels, Pool* pool, Workspace* ws, const std::vector<float>& x, float temperature, int32_t top_k, float top_p, double u) {
  const float min_p = 0;
  int64_t id = -2;
  ws->reset();
  kernels.sample({pool, ws, &kernels, nullptr, 1}, {x.data(), static_cast<int64_t>(x.size()), &temperature, &top_k, &top_p, &min_p, &u, &id});
  return id;
}

}  // namespace

void test_sample(const Kernels& kernels, Pool* pool, Workspace* ws) {
  Random random;
  for (int64_t n : {1, 15, 16, 17, 65, 1023, 1024, 1025, 5000}) {
    std::vector<float> x(static_cast<size_t>(n));
    for (float& f : x) f = 4 * random.unit();
    int64_t best = 0;
    for (int64_t i = 0; i < n; ++i) best = x[static_cast<size_t>(i)] > x[static_cast<size_t>(best)] ? i : best;
    CHECK(draw(kernels, pool, ws, x, 0, 0, 1, 0.5) == best, "greedy, n %d", static_cast<int>(n));
    CHECK(draw(kernels, pool, ws, x, 1, 0, 1e-6f, 0.999) == best, "top_p, n %d", static_cast<int>(n));
    CHECK(draw(kernels, pool, ws, x, 1, 1, 1, 0.999) == best, "top_k, n %d", static_cast<int>(n));
    CHECK(draw(kernels, pool, ws, x, 1, 0, 1, 0.0) == best, "u = 0, n %d", static_cast<int>(n));
    for (int i = 0; i < 20; ++i) {
      const int64_t id = draw(kernels, pool, ws, x, 0.1f + static_cast<float>(i), i % 3 * 7, i % 2 ? 0.9f : 1.0f, 0.05 * i);
      CHECK(id >= 0 && id < n, "n %d gave %d", static_cast<int>(n), static_cast<int>(id));
    }
    x[static_cast<size_t>(n - 1)] = NAN;
    CHECK(draw(kernels, pool, ws, x, 1, 0, 1, 0.5) == -1, "NaN, n %d", static_cast<int>(n));
    CHECK(draw(kernels, pool, ws, x, 0, 0, 1, 0.5) == -1, "NaN, greedy, n %d", static_cast<int>(n));
  }
}

}  // namespace paceline
