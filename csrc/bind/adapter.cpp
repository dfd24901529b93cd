// Adapters bound to native pointers, every size checked.
#include <nanobind/stl/tuple.h>

#include "bind.h"

namespace paceline {
namespace {

using Part = std::tuple<AnyIn, int64_t, int64_t>;                           // b (ceil(n / 16), rank, 16), col, n
using Site = std::tuple<AnyIn, In<float, 1>, std::vector<Part>>;            // a (rank, k), scale (rank), parts

bool is_bf16(const AnyIn& a) { return a.itemsize() == 2; }

AdapterPart part_of(const Part& part, int64_t first, bool bf16) {
  const auto& [b, col, n] = part;
  if (b.ndim() != 3 || b.shape(2) != 16 || b.shape(1) == 0 || is_bf16(b) != bf16) fail("adapter: b is (ceil(n / 16), rank, 16), of a's type");
  if (col < 0 || n < 1 || n > int64_t{1} << 31 || static_cast<int64_t>(b.shape(0)) != (n + 15) / 16) fail("adapter: b has other columns than n");
  return {b.data(), first, static_cast<int64_t>(b.shape(1)), col, n};
}

void add_site(BoundAdapter* self, const Site& site) {
  const auto& [a, scale, parts] = site;
  std::vector<AdapterPart> bound;
  if (a.ndim() != 2 || (a.itemsize() != 4 && a.itemsize() != 2) || scale.shape(0) != a.shape(0)) fail("adapter: a is (rank, k) float32 or bfloat16, scale (rank)");
  int64_t rank = 0;
  for (const Part& part : parts) {
    bound.push_back(part_of(part, rank, is_bf16(a)));
    rank += bound.back().rank;
    self->owners.push_back(std::get<0>(part));
  }
  if (rank != static_cast<int64_t>(a.shape(0))) fail("adapter: the parts' ranks do not add up to a's");
  self->owners.push_back(a), self->owners.emplace_back(scale.handle());
  self->parts.push_back(std::move(bound));
  self->sites.push_back({a.data(), scale.data(), rank, static_cast<int64_t>(a.shape(1)), is_bf16(a), static_cast<int64_t>(parts.size()), nullptr});
}

void init_adapter(BoundAdapter* self, const std::vector<Site>& sites) {
  new (self) BoundAdapter();
  for (const Site& site : sites) add_site(self, site);
  for (size_t i = 0; i < self->sites.size(); ++i) self->sites[i].parts = self->parts[i].data();
  self->adapter = {static_cast<int64_t>(self->sites.size()), self->sites.data()};
}

}  // namespace

void bind_adapter(nb::module_& m) {
  nb::class_<BoundAdapter>(m, "Adapter", "Low-rank updates by site: (a, scale, [(b, col, n)]) each, as csrc/kernels/adapt.cpp wants them (bfloat16 as uint16).")
      .def("__init__", &init_adapter, nb::arg("sites").noconvert());
}

}  // namespace paceline
