// Heads in two passes on exactly sized heap blocks: each block of 16 outputs has the bits of the coarse or of the fine product, the fine
// ones are those with the largest coarse logits, and a row alone has the bits it has among others.
#include <string.h>

#include <algorithm>
#include <vector>

#include "check.h"

namespace paceline {
namespace {

// A packed matrix with its arrays. Formats here: int4, int8 in groups of 32, bf16.
struct Matrix {
  Weight w;
  std::vector<uint8_t> data, scales;
  std::vector<int8_t> factors;
};

void pack(const Kernels& k, Pool* pool, Workspace* ws, const std::vector<float>& values, Format format, int64_t n, int64_t n_in, Matrix* m) {
  const bool codes = format != Format::bf16, int4 = format == Format::int4;
  const int64_t kp = codes ? (n_in + 63) / 64 * 64 : (n_in + 31) / 32 * 32, lanes = (n + 15) / 16 * 16, group = codes ? 32 : 0;
  m->data.resize(static_cast<size_t>(int4 ? lanes * kp / 2 : codes ? lanes * kp : lanes * kp * 2));
  m->scales.resize(static_cast<size_t>(int4 ? lanes * 4 : codes ? lanes * kp / 16 : 0));
  m->factors.resize(static_cast<size_t>(int4 ? lanes * kp / 32 : 0));
  m->w = {format, n, n_in, group, m->data.data(), codes ? m->scales.data() : nullptr, nullptr, int4 ? m->factors.data() : nullptr};
  int32_t flags = -1;
  ws->reset();
  k.pack({pool, ws, &k, nullptr, n}, {values.data(), Dtype::f32, m->w, &flags});
  CHECK(flags == 0);
}

struct Logits {
  const Kernels& k;
  Pool* pool;
  Workspace* ws;
  const std::vector<float>& x;
  int64_t n_in;

  template <class F> std::vector<float> run(int64_t first, int64_t rows, int64_t n, F f) const {
    std::vector<float> in(x.begin() + first * n_in, x.begin() + (first + rows) * n_in), out(static_cast<size_t>(rows * n), -1e30f);
    ws->reset();
    f(Ctx{pool, ws, &k, nullptr, rows}, Mat{in.data(), n_in, n_in}, Mat{out.data(), n, n});
    return out;
  }
  std::vector<float> linear(const Matrix& m, int64_t rows) const {
    return run(0, rows, m.w.n_out, [&](const Ctx& c, Mat in, Mat out) { k.linear(c, {in, out, m.w, nullptr}); });
  }
  std::vector<float> rescored(const Matrix& coarse, const Matrix& fine, int64_t first, int64_t rows) const {
    return run(first, rows, fine.w.n_out, [&](const Ctx& c, Mat in, Mat out) { k.rescored(c, {in, out, coarse.w, fine.w}); });
  }
};

// Which blocks of a row are computed again: by sorting.
std::vector<bool> chosen(const float* y, int64_t n) {
  const int64_t n_blocks = (n + 15) / 16;
  std::vector<int64_t> order;
  for (int64_t b = 0; b < n_blocks; ++b) order.push_back(b);
  const auto best = [&](int64_t b) { return *std::max_element(y + b * 16, y + std::min(n, b * 16 + 16)); };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return best(a) > best(b); });
  std::vector<bool> found(static_cast<size_t>(n_blocks), false);
  for (int64_t i = 0; i < std::min(n_blocks, kRescored); ++i) found[static_cast<size_t>(order[static_cast<size_t>(i)])] = true;
  return found;
}

}  // namespace

void test_head(const Kernels& k, Pool* pool, Workspace* ws) {
  Random random;
  for (const auto& shape : {std::pair<int64_t, int64_t>{1, 1}, {40, 100}, {1030, 33}, {1500, 130}, {(1 << 15) + 5, 17}})
    for (const Format format : {Format::int8, Format::bf16}) {
      const auto [n, n_in] = shape;
      std::vector<float> values(static_cast<size_t>(n * n_in)), x(static_cast<size_t>(33 * n_in));
      for (float& v : values) v = static_cast<float>(random.below(7) - 3);  // few values: many ties
      for (float& v : x) v = random.unit();
      Matrix coarse, fine;
      pack(k, pool, ws, values, Format::int4, n, n_in, &coarse);
      for (float& v : values) v += random.unit();
      pack(k, pool, ws, values, format, n, n_in, &fine);
      const Logits logits = {k, pool, ws, x, n_in};
      for (const int64_t rows : {1, 2, 8, 33}) {
        const std::vector<float> y = logits.rescored(coarse, fine, 0, rows), a = logits.linear(coarse, rows), b = logits.linear(fine, rows);
        int64_t wrong = 0;
        for (int64_t r = 0; r < rows; ++r) {
          const std::vector<bool> again = chosen(a.data() + r * n, n);
          for (int64_t i = 0; i < n; ++i)
            wrong += memcmp(&y[static_cast<size_t>(r * n + i)], &(again[static_cast<size_t>(i / 16)] ? b : a)[static_cast<size_t>(r * n + i)], 4) != 0;
        }
        CHECK(wrong == 0, "format %d, M %d N %d K %d: %d wrong", int(format), int(rows), int(n), int(n_in), int(wrong));
        for (int64_t r = 0; r < rows; r += 7) {
          const std::vector<float> alone = logits.rescored(coarse, fine, r, 1);
          CHECK(memcmp(alone.data(), y.data() + r * n, alone.size() * 4) == 0, "format %d: row %d of %d differs alone", int(format), int(r), int(rows));
        }
      }
    }
}

}  // namespace paceline
