// The packer on exactly sized heap blocks: what it packs, linear with unit rows reads back.
#include <math.h>

#include <vector>

#include "check.h"

namespace paceline {

void test_pack(const Kernels& k, Pool* pool, Workspace* ws) {
  Random random;
  struct Case { Format format; int64_t group; bool mins; double step; };
  for (const Case c : {Case{Format::f32, 0, false, 0}, {Format::f16, 0, false, 1e-3}, {Format::bf16, 0, false, 8e-3}, {Format::int8, 0, false, 1e-2},
                       {Format::int8, 32, false, 1e-2}, {Format::int8, 128, false, 1e-2}, {Format::int4, 32, false, 0.15}, {Format::int4g, 32, false, 0.15}, {Format::int4g, 64, true, 0.15}})
    for (const auto& shape : {std::pair<int64_t, int64_t>{1, 1}, {17, 33}, {40, 130}}) {
      const auto [n, n_in] = shape;
      const bool factored = c.format == Format::int4, nibbles = factored || c.format == Format::int4g, codes = nibbles || c.format == Format::int8;
      const int64_t align = c.format == Format::f32 ? 1 : codes ? (c.group > 64 ? c.group : 64) : 32, kp = (n_in + align - 1) / align * align;
      const int64_t lanes = (n + 15) / 16 * 16, groups = c.group ? kp / c.group : 1;
      const double bytes = c.format == Format::f32 ? 4 : c.format == Format::int8 ? 1 : nibbles ? 0.5 : 2;
      std::vector<float> w(static_cast<size_t>(n * n_in)), unit(static_cast<size_t>(n_in * n_in), 0.0f), y(static_cast<size_t>(n_in * n));
      for (float& x : w) x = random.unit();
      for (int64_t i = 0; i < n_in; ++i) unit[static_cast<size_t>(i * n_in + i)] = 127.0f;
      std::vector<uint8_t> data(static_cast<size_t>(static_cast<double>(lanes * kp) * bytes)), scales(factored ? static_cast<size_t>(lanes) * 4 : static_cast<size_t>(lanes * groups) * (c.group ? 2 : 4));
      std::vector<uint8_t> mins(scales.size());
      std::vector<int8_t> factors(static_cast<size_t>(lanes * groups));
      const Weight packed = {c.format, n, n_in, c.group, data.data(), codes ? scales.data() : nullptr, c.mins ? mins.data() : nullptr,
                             factored ? factors.data() : nullptr};
      const auto pack = [&] {
        int32_t flags = -1;
        ws->reset();
        k.pack({pool, ws, &k, nullptr, n}, {w.data(), Dtype::f32, packed, &flags});
        return flags;
      };
      CHECK(pack() == 0);
      ws->reset();
      k.linear({pool, ws, &k, nullptr, n_in}, {{unit.data(), n_in, n_in}, {y.data(), n, n}, packed, nullptr});
      double worst = 0;
      for (int64_t r = 0; r < n; ++r)
        for (int64_t i = 0; i < n_in; ++i)
          worst = fmax(worst, fabs(static_cast<double>(y[static_cast<size_t>(i * n + r)]) / 127.0 - static_cast<double>(w[static_cast<size_t>(r * n_in + i)])));
      CHECK(worst <= c.step + 1e-6, "format %d group %d: %g", int(c.format), int(c.group), worst);
      w.back() = NAN;
      CHECK(pack() == 1);
    }
}

}  // namespace paceline
