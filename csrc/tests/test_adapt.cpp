// Adapters on exactly sized heap blocks: close to a sum in double precision, a row alone has the bits it has among others, rows without
// an adapter and columns outside the parts are not touched.
#include <math.h>
#include <string.h>

#include <vector>

#include "check.h"

namespace paceline {
namespace {

// One adapter with one site.
struct Made {
  int64_t k;
  std::vector<float> a, scale;
  std::vector<std::vector<float>> b;
  std::vector<AdapterPart> parts;
  AdapterSite site;
  Adapter adapter;

  Made(Random& random, int64_t k_, const std::vector<AdapterPart>& wanted) : k(k_), parts(wanted) {
    int64_t rank = 0;
    for (AdapterPart& p : parts) {
      p.first = rank, rank += p.rank;
      b.emplace_back(static_cast<size_t>((p.n + 15) / 16 * 16 * p.rank));
      for (float& v : b.back()) v = random.unit();
    }
    for (size_t i = 0; i < parts.size(); ++i) parts[i].b = b[i].data();
    a.resize(static_cast<size_t>(rank * k)), scale.resize(static_cast<size_t>(rank));
    for (float& v : a) v = random.unit();
    for (float& v : scale) v = 2 * random.unit();
    site = {a.data(), scale.data(), rank, k, false, static_cast<int64_t>(parts.size()), parts.data()};
    adapter = {1, &site};
  }
  Made(const Made&) = delete;

  void add(const float* x, double* y) const {
    for (size_t i = 0; i < parts.size(); ++i)
      for (int64_t j = 0; j < parts[i].rank; ++j) {
        double h = 0;
        for (int64_t n = 0; n < k; ++n) h += double{x[n]} * a[static_cast<size_t>((parts[i].first + j) * k + n)];
        h *= scale[static_cast<size_t>(parts[i].first + j)];
        for (int64_t n = 0; n < parts[i].n; ++n) y[parts[i].col + n] += h * b[i][static_cast<size_t>((n / 16 * parts[i].rank + j) * 16 + n % 16)];
      }
  }
};

}  // namespace

void test_adapt(const Kernels& k, Pool* pool, Workspace* ws) {
  Random random;
  for (const int64_t n_in : {1, 16, 100}) {
    const int64_t n_out = 77;
    const Made first(random, n_in, {{nullptr, 0, 9, 0, n_out}}), second(random, n_in, {{nullptr, 0, 3, 5, 16}, {nullptr, 0, 1, 40, 37}}), none(random, n_in, {});
    const Adapter* adapters[] = {&first.adapter, &none.adapter, &second.adapter};
    const Made* made[] = {&first, &none, &second};
    const int32_t cu_rows[] = {0, 3, 4, 41, 42, 50}, of[] = {0, -1, 2, 1, 0};
    const int64_t n_rows = 50;
    std::vector<float> x(static_cast<size_t>(n_rows * n_in)), y(static_cast<size_t>(n_rows * n_out));
    for (float& v : x) v = random.unit();
    for (float& v : y) v = random.unit();
    const std::vector<float> before = y;
    Step step = {};
    step.n_rows = n_rows, step.n_seqs = 5, step.cu_rows = cu_rows, step.n_adapters = 3, step.adapters = adapters, step.adapter_of = of;
    ws->reset();
    k.adapt({pool, ws, &k, &step, n_rows}, {{x.data(), n_in, n_in}, {y.data(), n_out, n_out}, 0});
    int64_t wrong = 0, touched = 0, differing = 0;
    for (int64_t q = 0; q < 5; ++q)
      for (int64_t r = cu_rows[q]; r < cu_rows[q + 1]; ++r) {
        const float *now = y.data() + r * n_out, *was = before.data() + r * n_out;
        std::vector<double> want(was, was + n_out);
        if (of[q] >= 0) made[of[q]]->add(x.data() + r * n_in, want.data());
        else touched += memcmp(now, was, static_cast<size_t>(n_out) * 4) != 0;
        for (int64_t i = 0; i < n_out; ++i) wrong += !(fabs(now[i] - want[static_cast<size_t>(i)]) < 1e-4);
        std::vector<float> in(x.begin() + r * n_in, x.begin() + (r + 1) * n_in), alone(was, was + n_out);
        const int32_t one[] = {0, 1};
        Step single = step;
        single.n_rows = single.n_seqs = 1, single.cu_rows = one, single.adapter_of = of + q;
        ws->reset();
        k.adapt({pool, ws, &k, &single, 1}, {{in.data(), n_in, n_in}, {alone.data(), n_out, n_out}, 0});
        differing += memcmp(alone.data(), now, static_cast<size_t>(n_out) * 4) != 0;
      }
    CHECK(wrong == 0, "K %d: %d wrong", int(n_in), int(wrong));
    CHECK(touched == 0 && differing == 0, "K %d: %d rows touched, %d differ alone", int(n_in), int(touched), int(differing));
  }
}

}  // namespace paceline
