// Every format and odd shape against plain loops in double, and one row at a time against many, on exactly sized heap blocks so that
// the sanitizers see every read and write beyond an end.
#include <math.h>
#include <string.h>

#include <vector>

#include "check.h"

namespace paceline {
namespace {

uint16_t half_of(float f) {  // positive normal numbers of few bits only
  uint32_t u;
  memcpy(&u, &f, 4);
  return static_cast<uint16_t>(((u >> 23) - 112) << 10 | (u >> 13 & 1023));
}

struct Packed {
  Format format;
  int64_t n, k, kp, group, n_groups, n_blocks;
  std::vector<uint8_t> data;
  std::vector<uint16_t> scales, mins;
  std::vector<float> scales32;
  std::vector<int8_t> factors;
  std::vector<double> value;  // (n, kp)
  bool with_mins;

  Weight weight() const {
    const bool per_output = format == Format::int4 || group == 0;
    const void* s = per_output ? static_cast<const void*>(scales32.data()) : scales.data();
    return {format, n, k, group, data.data(), s, with_mins ? mins.data() : nullptr, format == Format::int4 ? factors.data() : nullptr};
  }
};

// Random weights that every format holds exactly: small integers times a power of two.
Packed make(Random& random, Format format, int64_t n, int64_t k, int64_t group, bool with_mins) {
  Packed p = {format, n, k, 0, group, 1, (n + 15) / 16, {}, {}, {}, {}, {}, {}, with_mins};
  const bool codes = format == Format::int8 || format == Format::int4 || format == Format::int4g;
  const int64_t align = format == Format::f32 ? 1 : codes ? (group > 64 ? group : 64) : 32;
  p.kp = (k + align - 1) / align * align;
  p.n_groups = group ? p.kp / group : 1;
  const int64_t rows = p.n_blocks * 16, bytes_x2 = format == Format::f32 ? 8 : codes ? (format == Format::int8 ? 2 : 1) : 4;
  p.data.resize(static_cast<size_t>(rows * p.kp * bytes_x2 / 2));
  p.value.resize(static_cast<size_t>(rows * p.kp));
  for (int64_t i = 0; i < rows * p.n_groups; ++i) {
    p.scales.push_back(half_of(ldexpf(1.0f, static_cast<int>(random.below(4)) - 8)));
    p.scales32.push_back(0.0078125f);
    p.mins.push_back(half_of(0.03125f));
    p.factors.push_back(static_cast<int8_t>(random.below(31) - 15));
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < p.kp; ++c) {
      const int64_t b = r / 16, lane = r % 16, g = group ? c / group : 0;
      const size_t s = static_cast<size_t>((b * p.n_groups + g) * 16 + lane);
      const auto scale = [&] { return ldexp(1.0, (p.scales[s] >> 10) - 15); };
      double& v = p.value[static_cast<size_t>(r * p.kp + c)];
      if (!codes) {
        const float f = static_cast<float>(1 + random.below(8)) * 0.125f;
        v = f;
        uint32_t u;
        memcpy(&u, &f, 4);
        const uint16_t h = format == Format::f16 ? half_of(f) : static_cast<uint16_t>(u >> 16);
        if (format == Format::f32) memcpy(&p.data[static_cast<size_t>(((b * p.kp + c) * 16 + lane) * 4)], &f, 4);
        else memcpy(&p.data[static_cast<size_t>((((b * p.kp / 2 + c / 2) * 16 + lane) * 2 + c % 2) * 2)], &h, 2);
      } else if (format == Format::int8) {
        const auto q = static_cast<int8_t>(random.below(255) - 127);
        v = q * (group ? scale() : 0.0078125);
        memcpy(&p.data[static_cast<size_t>(((b * p.kp / 4 + c / 4) * 16 + lane) * 4 + c % 4)], &q, 1);
      } else {
        const int64_t q = random.below(16), in = c % 64 % 32;
        const double step = format == Format::int4 ? 0.0078125 * p.factors[s] : scale();
        v = step * static_cast<double>(with_mins ? q : q - 8) + (with_mins ? 0.03125 : 0.0);
        const size_t at = static_cast<size_t>((((b * p.kp / 64 + c / 64) * 8 + in / 4) * 16 + lane) * 4 + in % 4);
        p.data[at] = static_cast<uint8_t>(p.data[at] | (c % 64 < 32 ? q : q << 4));
      }
    }
  return p;
}

std::vector<float> run(const Kernels& k, Pool* pool, Workspace* ws, const Packed& p, const std::vector<float>& x, int64_t first, int64_t rows,
                       const float* bias) {
  const std::vector<float> in(x.begin() + first * p.k, x.begin() + (first + rows) * p.k);
  std::vector<float> out(static_cast<size_t>(rows * p.n), NAN);
  ws->reset();
  const Ctx c = {pool, ws, &k, nullptr, rows};
  k.linear(c, {{const_cast<float*>(in.data()), p.k, p.k}, {out.data(), p.n, p.n}, p.weight(), bias});
  return out;
}

void check_one(const Kernels& k, Pool* pool, Workspace* ws, const Packed& p, int64_t rows) {
  Random random;
  std::vector<float> x(static_cast<size_t>(rows * p.k)), bias(static_cast<size_t>(p.n));
  // Integers up to 127 with a 127 in every group quantise to themselves.
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<int64_t>(i) % p.k % 32 == 0 ? 127.0f : static_cast<float>(random.below(255) - 127);
  for (float& b : bias) b = random.unit();
  const std::vector<float> y = run(k, pool, ws, p, x, 0, rows, bias.data());
  double worst = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t n = 0; n < p.n; ++n) {
      double sum = bias[static_cast<size_t>(n)], size = 1;
      for (int64_t i = 0; i < p.k; ++i) {
        const double t = static_cast<double>(x[static_cast<size_t>(r * p.k + i)]) * p.value[static_cast<size_t>(n * p.kp + i)];
        sum += t, size += fabs(t);
      }
      worst = fmax(worst, fabs(sum - static_cast<double>(y[static_cast<size_t>(r * p.n + n)])) / size);
      if (y[static_cast<size_t>(r * p.n + n)] != y[static_cast<size_t>(r * p.n + n)]) worst = INFINITY;
    }
  const auto f = static_cast<int>(p.format);
  CHECK(worst < 2e-6, "format %d group %d mins %d, M %d N %d K %d: error %g", f, int(p.group), int(p.with_mins), int(rows), int(p.n), int(p.k), worst);
  for (int64_t r = 0; r < rows; r += 7) {
    const std::vector<float> alone = run(k, pool, ws, p, x, r, 1, bias.data());
    CHECK(memcmp(alone.data(), y.data() + r * p.n, alone.size() * 4) == 0, "format %d group %d: row %d of %d differs alone", f, int(p.group), int(r), int(rows));
  }
}

}  // namespace

void test_linear(const Kernels& k, Pool* pool, Workspace* ws) {
  struct Case { Format format; int64_t group; bool mins; };
  std::vector<Case> cases = {{Format::f32, 0, false}, {Format::f16, 0, false}, {Format::bf16, 0, false}, {Format::int8, 0, false}};
  for (int64_t g : {32, 64, 128}) cases.insert(cases.end(), {{Format::int8, g, false}, {Format::int4g, g, false}, {Format::int4g, g, true}});
  cases.push_back({Format::int4, 32, false});
  Random random;
  for (const Case& c : cases)
    for (const auto& shape : {std::pair<int64_t, int64_t>{1, 1}, {3, 17}, {33, 64}, {100, 100}, {16, 700}, {70, 4480}}) {
      const Packed p = make(random, c.format, shape.first, shape.second, c.group, c.mins);
      for (int64_t rows : {1, 3, 5, 16, 17, 40, 70}) check_one(k, pool, ws, p, rows);
    }
}

}  // namespace paceline
