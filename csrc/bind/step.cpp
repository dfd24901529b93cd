#include <nanobind/stl/tuple.h>

#include "bind.h"

namespace paceline {
namespace {

// The KV pools of one group: fixed while the engine lives, so bound once.
struct Pools {
  std::vector<void*> k, v;
  std::vector<int32_t> heads;
  int64_t n_pages;
  int32_t page_size, dim;
  Dtype dtype;
  std::vector<nb::ndarray<>> owners;
};

Dtype pool_dtype(const Any& a, const std::string& name) {
  const Dtype d = dtype_named(name);
  if (d != Dtype::f32 && d != Dtype::f16 && d != Dtype::bf16 && d != Dtype::i8) fail("pool: entries of " + name + " are unknown");
  if (a.itemsize() != size_of(d)) fail("pool: the array's items are not " + name);
  return d;
}

// int8: the last four items of an entry are the bytes of its scale.
int64_t items_of(const Pools& p) { return p.dtype == Dtype::i8 ? p.dim + 4 : p.dim; }

void* pool_data(const Pools& p, const Any& a, size_t n_heads) {
  if (a.ndim() != 4 || static_cast<int64_t>(a.shape(0)) != p.n_pages || a.shape(1) != n_heads ||
      static_cast<int64_t>(a.shape(2)) != p.page_size || static_cast<int64_t>(a.shape(3)) != items_of(p))
    fail("pool: every layer's pool must have shape (n_pages, n_heads, page_size, dim)");
  return a.data();
}

void init_pools(Pools* self, const std::vector<Any>& k, const std::vector<Any>& v, std::vector<int32_t> heads, const std::string& dtype) {
  if (k.empty() || k.size() != v.size() || k[0].ndim() != 4) fail("pool: one k and one v pool of four axes per layer");
  new (self) Pools();
  self->n_pages = static_cast<int64_t>(k[0].shape(0));
  self->page_size = static_cast<int32_t>(k[0].shape(2));
  self->dim = static_cast<int32_t>(k[0].shape(3));
  self->dtype = pool_dtype(k[0], dtype);
  if (self->dtype == Dtype::i8 && (self->dim -= 4) < 1) fail("pool: int8 entries are dim codes and four bytes of scale");
  for (const Any& a : k) self->k.push_back(pool_data(*self, a, heads.size()));
  for (const Any& a : v) self->v.push_back(pool_data(*self, a, heads.size()));
  self->heads = std::move(heads);
  for (const Any& a : k) self->owners.emplace_back(a.handle());
  for (const Any& a : v) self->owners.emplace_back(a.handle());
}

using Ids = In<int32_t, 1>;
using Group = std::tuple<nb::object, In<int64_t, 1>, In<int32_t, 2>, Ids>;

void check_group(const GroupStep& g, const Step& s, size_t n_slots, size_t n_tables, size_t n_lens) {
  if (static_cast<int64_t>(n_slots) != s.n_rows || static_cast<int64_t>(n_tables) != s.n_seqs || static_cast<int64_t>(n_lens) != s.n_seqs)
    fail("groups: slots are (n_rows), tables (n_seqs, max_pages), lens (n_seqs)");
  const int64_t n_slots_all = g.n_pages * g.page_size;
  for (int64_t r = 0; r < s.n_rows; ++r)
    if (g.slots[r] < 0 || g.slots[r] >= n_slots_all) fail("slots: slot " + std::to_string(g.slots[r]) + " is outside the pool");
  for (int64_t q = 0; q < s.n_seqs; ++q) {
    if (g.lens[q] < s.cu_rows[q + 1] - s.cu_rows[q] || g.lens[q] > g.max_pages * g.page_size)
      fail("lens: " + std::to_string(g.lens[q]) + " entries do not fit the table or this step's rows");
  }
  int32_t low = 0, high = -1;
  for (int64_t i = 0; i < s.n_seqs * g.max_pages; ++i) {
    low = g.tables[i] < low ? g.tables[i] : low;
    high = g.tables[i] > high ? g.tables[i] : high;
  }
  if (low < -1 || high >= g.n_pages) fail("tables: a page id is outside the pool");
}

void check_rows(const Step& s, int64_t n_positions) {
  if (n_positions != s.n_rows) fail("positions: one for every token");
  if (s.n_seqs < 0 || s.cu_rows[0] != 0 || s.cu_rows[s.n_seqs] != s.n_rows) fail("cu_rows: must run from 0 to n_rows");
  for (int64_t q = 0; q < s.n_seqs; ++q)
    if (s.cu_rows[q + 1] < s.cu_rows[q]) fail("cu_rows: must not decrease");
  for (int64_t i = 0; i < s.n_want; ++i)
    if (s.want[i] < 0 || s.want[i] >= s.n_rows) fail("want: row " + std::to_string(s.want[i]) + " does not exist");
}

void add_group(BoundStep* self, const nb::handle& item) {
  Group group;
  if (!nb::try_cast(item, group, false) || !nb::isinstance<Pools>(std::get<0>(group)))
    throw nb::type_error("groups: each is (Pools, slots int64 (n_rows), tables int32 (n_seqs, max_pages), lens int32 (n_seqs)), C-contiguous");
  const auto& [owner, slots, tables, lens] = group;
  const Pools& p = nb::cast<const Pools&>(owner);
  GroupStep g{slots.data(), tables.data(), lens.data(), static_cast<int64_t>(tables.shape(1)), p.n_pages, p.page_size, p.dim,
              static_cast<int32_t>(p.heads.size()), p.dtype, p.heads.data(), p.k.data(), p.v.data()};
  check_group(g, self->step, slots.shape(0), tables.shape(0), lens.shape(0));
  self->groups.push_back(g);
  self->owners.push_back(nb::borrow(item));
}

void check_layers(const BoundStep& b) {
  const Step& s = b.step;
  for (int64_t l = 0; l < s.n_layers; ++l)
    for (int32_t i = s.cu_layer[l]; i < s.cu_layer[l + 1]; ++i) {
      const LayerAt& at = s.layer_at[i];
      if (at.group < 0 || at.group >= s.n_groups || at.at < 0) fail("layers: no such group");
      const Pools& p = nb::cast<const Pools&>(nb::handle(PyTuple_GetItem(b.owners[static_cast<size_t>(at.group)].ptr(), 0)));
      if (static_cast<size_t>(at.at) >= p.k.size()) fail("layers: the group has no such layer");
    }
}

void add_adapters(BoundStep* self, const nb::list& adapters, const Ids& adapter_of) {
  Step& s = self->step;
  for (const nb::handle item : adapters) {
    if (!nb::isinstance<BoundAdapter>(item)) throw nb::type_error("adapters: must be what Adapter() gave");
    self->adapters.push_back(&nb::cast<const BoundAdapter&>(item).adapter);
    self->owners.push_back(nb::borrow(item));
  }
  s.adapters = self->adapters.data(), s.n_adapters = static_cast<int32_t>(self->adapters.size()), s.adapter_of = adapter_of.data();
  if (static_cast<int64_t>(adapter_of.shape(0)) != s.n_seqs) fail("adapter_of: one for each sequence");
  for (int64_t q = 0; q < s.n_seqs; ++q)
    if (s.adapter_of[q] < -1 || s.adapter_of[q] >= s.n_adapters) fail("adapter_of: adapter " + std::to_string(s.adapter_of[q]) + " does not exist");
  self->arrays.emplace_back(adapter_of.handle());
}

void init_step(BoundStep* self, const Ids& tokens, const Ids& positions, const Ids& cu_rows, const Ids& want, const nb::list& groups,
               const Ids& cu_layer, const In<int32_t, 2>& layer_at, const std::optional<In<uint64_t, 1>>& mask, const std::optional<Ids>& tail,
               const nb::list& adapters, const std::optional<Ids>& adapter_of) {
  new (self) BoundStep();
  Step& s = self->step;
  s.n_rows = static_cast<int64_t>(tokens.shape(0)), s.n_seqs = static_cast<int64_t>(cu_rows.shape(0)) - 1;
  s.n_want = static_cast<int64_t>(want.shape(0));
  s.tokens = tokens.data(), s.positions = positions.data(), s.cu_rows = cu_rows.data(), s.want = want.data();
  check_rows(s, static_cast<int64_t>(positions.shape(0)));
  for (const nb::handle item : groups) add_group(self, item);
  s.groups = self->groups.data(), s.n_groups = static_cast<int64_t>(self->groups.size());
  s.n_layers = static_cast<int64_t>(cu_layer.shape(0)) - 1, s.cu_layer = cu_layer.data();
  static_assert(sizeof(LayerAt) == 2 * sizeof(int32_t));
  s.layer_at = reinterpret_cast<const LayerAt*>(layer_at.data());
  if (s.n_layers < 0 || layer_at.shape(1) != 2 || cu_layer.data()[s.n_layers] != static_cast<int64_t>(layer_at.shape(0))) fail("layers: cu_layer and layer_at disagree");
  check_layers(*self);
  if (mask.has_value() != tail.has_value()) fail("mask and tail: give both or none");
  if (mask) {
    if (static_cast<int64_t>(mask->shape(0)) != s.n_rows || static_cast<int64_t>(tail->shape(0)) != s.n_seqs) fail("mask is (n_rows), tail (n_seqs)");
    s.mask = mask->data(), s.tail = tail->data();
    self->arrays.emplace_back(mask->handle()), self->arrays.emplace_back(tail->handle());
  }
  if (adapter_of) add_adapters(self, adapters, *adapter_of);
  for (const Ids* a : {&tokens, &positions, &cu_rows, &want, &cu_layer}) self->arrays.emplace_back(a->handle());
  self->arrays.emplace_back(layer_at.handle());
}

}  // namespace

void bind_step(nb::module_& m) {
  nb::class_<Pools>(m, "Pools", "The K and V pools of a group's layers.")
      .def("__init__", &init_pools, nb::arg("k").noconvert(), nb::arg("v").noconvert(), nb::arg("heads"), nb::arg("dtype"));
  nb::class_<BoundStep>(m, "Step", "A Batch bound to native pointers; keeps its arrays alive. ValueError where they contradict each other.")
      .def("__init__", &init_step, nb::arg("tokens").noconvert(), nb::arg("positions").noconvert(), nb::arg("cu_rows").noconvert(),
           nb::arg("want").noconvert(), nb::arg("groups"), nb::arg("cu_layer").noconvert(), nb::arg("layer_at").noconvert(),
           nb::arg("mask").noconvert().none(), nb::arg("tail").noconvert().none(), nb::arg("adapters"), nb::arg("adapter_of").noconvert().none())
      .def_prop_ro("n_rows", [](const BoundStep& b) { return b.step.n_rows; });
}

}  // namespace paceline
