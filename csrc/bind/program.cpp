// Building and running programs. Method `op` appends one instruction: (out, inputs..., arguments...).
#include "bind.h"

namespace paceline {
namespace {

using Vector = In<float, 1>;
using MaybeVector = std::optional<Vector>;

struct BoundProgram {
  nb::object device_owner;
  Device* device;
  int64_t n_inputs;
  std::vector<int64_t> in_cols, out_cols;
  std::vector<bool> out_wanted;
  bool batched = false;  // needs a step
  Program program;
  std::vector<nb::ndarray<>> owners;
  std::vector<nb::object> weights;

  const float* keep(const Vector& v, int64_t n, const char* what) {
    if (static_cast<int64_t>(v.shape(0)) != n) fail(std::string(what) + ": has " + std::to_string(v.shape(0)) + " elements, needs " + std::to_string(n));
    owners.emplace_back(v.handle());
    return v.data();
  }
  const Weight& keep(const nb::object& w) {
    weights.push_back(w);
    return nb::cast<const BoundWeight&>(w).w;
  }
  template <class K> K need(K kernel, const char* name) const {
    if (!kernel) fail(std::string("kernel '") + name + "' is not in this build");
    return kernel;
  }
  template <class F> void add(std::string name, const Ref& out, F f) { program.code.push_back({std::move(name), out.wanted, std::move(f), nullptr, 0}); }
  // The last instruction reads all of w.
  void streams(const BoundWeight& w) { program.code.back().weights = w.w.data, program.code.back().weight_bytes = w.owners[0].nbytes(); }
};

void need(bool ok, const char* what) {
  if (!ok) fail(what);
}

Act act_named(const std::string& kind) {
  if (kind == "silu") return Act::silu;
  if (kind == "gelu") return Act::gelu;
  if (kind == "gelu_tanh") return Act::gelu_tanh;
  if (kind == "relu") return Act::relu;
  fail("kind = '" + kind + "': known are silu, gelu, gelu_tanh, relu");
}

std::string text_of(const Weight& w) { return std::to_string(w.n_out) + "x" + std::to_string(w.n_in); }
const std::string& format_of(const nb::object& w) { return nb::cast<const BoundWeight&>(w).format; }

// ---- one method per op ----

void linear(BoundProgram& p, Ref out, Ref x, const nb::object& weight, const MaybeVector& bias) {
  const Weight w = p.keep(weight);
  need(x.cols == w.n_in && out.cols == w.n_out, "linear: x has other columns than the weight");
  const float* b = bias ? p.keep(*bias, w.n_out, "bias") : nullptr;
  const auto kernel = p.need(p.device->kernels.linear, "linear");
  p.add("linear " + text_of(w) + " " + format_of(weight), out, [=](const Ctx& c, const Frame& f) { kernel(c, {f.mat(x), f.mat(out), w, b}); });
  p.streams(nb::cast<const BoundWeight&>(weight));
}

// linear with what surrounds it (ops/fuse.py): see LinearArgs. `adds` says whether `add` is more than a placeholder.
void fused_linear(BoundProgram& p, Ref out, Ref x, Ref add, const nb::object& weight, const MaybeVector& bias, bool adds, const MaybeVector& norm,
                  float eps, float offset, const std::optional<std::string>& gate) {
  const Weight w = p.keep(weight);
  need(x.cols == w.n_in && out.cols * (gate ? 2 : 1) == w.n_out && (!adds || add.cols == w.n_out), "fused_linear: columns do not fit the weight");
  need(!gate || (!adds && w.n_out % 32 == 0), "fused_linear: a gate needs whole blocks, and nothing to add");
  const float* b = bias ? p.keep(*bias, w.n_out, "bias") : nullptr;
  const Norm before = norm ? Norm{p.keep(*norm, w.n_in, "weight"), eps, offset} : Norm{};
  const Act kind = gate ? act_named(*gate) : Act::silu;
  const bool gated = gate.has_value();
  const auto kernel = p.need(p.device->kernels.linear, "linear");
  p.add("linear " + text_of(w) + " " + format_of(weight), out, [=](const Ctx& c, const Frame& f) {
    kernel(c, {f.mat(x), f.mat(out), w, b, adds ? f.mat(add) : Mat{}, before, gated, kind});
  });
  p.streams(nb::cast<const BoundWeight&>(weight));
}

// Logits of a head that is kept twice (RescoredArgs); `norm` as in fused_linear.
void rescored(BoundProgram& p, Ref out, Ref x, const nb::object& coarse, const nb::object& fine, const MaybeVector& norm, float eps, float offset) {
  const Weight c_w = p.keep(coarse), f_w = p.keep(fine);
  need(x.cols == f_w.n_in && out.cols == f_w.n_out && c_w.n_in == f_w.n_in && c_w.n_out == f_w.n_out, "rescored: both matrices must fit x and the result");
  const Norm before = norm ? Norm{p.keep(*norm, f_w.n_in, "weight"), eps, offset} : Norm{};
  const auto kernel = p.need(p.device->kernels.rescored, "rescored");
  p.need(p.device->kernels.linear, "linear");
  const std::string name = "rescored " + text_of(f_w) + " " + format_of(coarse) + " " + format_of(fine);
  p.add(name, out, [=](const Ctx& c, const Frame& f) { kernel(c, {f.mat(x), f.mat(out), c_w, f_w, before}); });
  p.streams(nb::cast<const BoundWeight&>(coarse));
}

void embed(BoundProgram& p, Ref out, const nb::object& table, bool by_position) {
  const Weight w = p.keep(table);
  need(out.cols == w.n_in, "embed: the table has other columns than the result");
  const auto kernel = p.need(p.device->kernels.embed, "embed");
  p.batched = true;
  p.add("embed", out, [=](const Ctx& c, const Frame& f) {
    const int32_t* ids = by_position ? c.step->positions : c.step->tokens;
    for (int64_t r = 0; r < c.n_rows; ++r)
      if (ids[r] < 0 || ids[r] >= w.n_out)
        fail("embed: id " + std::to_string(ids[r]) + " is outside the table of " + std::to_string(w.n_out) + " rows");
    kernel(c, {f.mat(out), w, ids});
  });
}

void rms_norm(BoundProgram& p, Ref out, Ref x, const Vector& weight, float eps, float offset) {
  const int64_t n = static_cast<int64_t>(weight.shape(0));
  need(n > 0 && x.cols % n == 0 && out.cols == x.cols, "rms_norm: columns must be a multiple of len(weight)");
  const float* w = p.keep(weight, n, "weight");
  const auto kernel = p.need(p.device->kernels.rms_norm, "rms_norm");
  p.add("rms_norm", out, [=](const Ctx& c, const Frame& f) { kernel(c, {f.mat(x), f.mat(out), w, n, eps, offset}); });
}

void layer_norm(BoundProgram& p, Ref out, Ref x, const Vector& weight, const MaybeVector& bias, float eps) {
  need(out.cols == x.cols, "layer_norm: columns differ");
  const float* w = p.keep(weight, x.cols, "weight");
  const float* b = bias ? p.keep(*bias, x.cols, "bias") : nullptr;
  const auto kernel = p.need(p.device->kernels.layer_norm, "layer_norm");
  p.add("layer_norm", out, [=](const Ctx& c, const Frame& f) { kernel(c, {f.mat(x), f.mat(out), w, b, eps}); });
}

void rope(BoundProgram& p, Ref out, Ref x, const In<float, 2>& cos, const In<float, 2>& sin, int64_t dim, int64_t head_dim, bool interleaved) {
  need(out.cols == x.cols && head_dim > 0 && x.cols % head_dim == 0 && dim <= head_dim && dim % 2 == 0, "rope: dim and head_dim do not fit the columns");
  const int64_t n = static_cast<int64_t>(cos.shape(0));
  need(static_cast<int64_t>(cos.shape(1)) * 2 == dim && sin.shape(0) == cos.shape(0) && sin.shape(1) == cos.shape(1), "rope: tables are (n_positions, dim / 2)");
  p.owners.emplace_back(cos.handle()), p.owners.emplace_back(sin.handle());
  const float *cp = cos.data(), *sp = sin.data();
  const auto kernel = p.need(p.device->kernels.rope, "rope");
  p.batched = true;
  p.add("rope", out, [=](const Ctx& c, const Frame& f) {
    for (int64_t r = 0; r < c.n_rows; ++r)
      if (c.step->positions[r] < 0 || c.step->positions[r] >= n)
        fail("rope: position " + std::to_string(c.step->positions[r]) + " is outside the table of " + std::to_string(n));
    kernel(c, {f.mat(x), f.mat(out), cp, sp, n, dim, head_dim, interleaved});
  });
}

void act(BoundProgram& p, Ref out, Ref x, const std::string& kind) {
  need(out.cols == x.cols, "act: columns differ");
  const Act a = act_named(kind);
  const auto kernel = p.need(p.device->kernels.act, "act");
  p.add("act", out, [=](const Ctx& c, const Frame& f) { kernel(c, {f.mat(x), f.mat(out), a}); });
}

void gated(BoundProgram& p, Ref out, Ref x, const std::string& kind) {
  need(2 * out.cols == x.cols, "gated: the result has half the columns");
  const Act a = act_named(kind);
  const auto kernel = p.need(p.device->kernels.gated, "gated");
  p.add("gated", out, [=](const Ctx& c, const Frame& f) { kernel(c, {f.mat(x), f.mat(out), a}); });
}

void add(BoundProgram& p, Ref out, Ref x, Ref y) {
  need(out.cols == x.cols && x.cols == y.cols, "add: columns differ");
  const auto kernel = p.need(p.device->kernels.add, "add");
  p.add("add", out, [=](const Ctx& c, const Frame& f) { kernel(c, {f.mat(x), f.mat(y), f.mat(out)}); });
}

void scale(BoundProgram& p, Ref out, Ref x, float s) {
  need(out.cols == x.cols, "scale: columns differ");
  const auto kernel = p.need(p.device->kernels.scale, "scale");
  p.add("scale", out, [=](const Ctx& c, const Frame& f) { kernel(c, {f.mat(x), f.mat(out), s}); });
}

void softcap(BoundProgram& p, Ref out, Ref x, float cap) {
  need(out.cols == x.cols && cap > 0, "softcap: columns differ or cap is not positive");
  const auto kernel = p.need(p.device->kernels.softcap, "softcap");
  p.add("softcap", out, [=](const Ctx& c, const Frame& f) { kernel(c, {f.mat(x), f.mat(out), cap}); });
}

void wanted(BoundProgram& p, Ref out, Ref x) {
  need(out.cols == x.cols && out.wanted && !x.wanted, "wanted: takes all rows, gives the wanted ones");
  const auto kernel = p.need(p.device->kernels.gather, "gather");
  p.batched = true;
  p.add("wanted", out, [=](const Ctx& c, const Frame& f) { kernel(c, {f.mat(x), f.mat(out), c.step->want, c.step->n_want}); });
}

void copy(BoundProgram& p, Ref out, Ref x) {
  need(out.cols == x.cols, "copy: columns differ");
  p.add("copy", out, [=](const Ctx& c, const Frame& f) {
    const Mat from = f.mat(x), to = f.mat(out);
    for (int64_t r = 0; r < c.n_rows; ++r)
      for (int64_t i = 0; i < to.cols; ++i) to.row(r)[i] = from.row(r)[i];
  });
}

void check_attention(const Step& s, const AttentionArgs& a) {
  need(a.layer >= 0 && a.layer < s.n_layers, "attention: the batch has no KV for this layer");
  int64_t n_heads = 0;
  for (int32_t i = s.cu_layer[a.layer]; i < s.cu_layer[a.layer + 1]; ++i) {
    const GroupStep& g = s.groups[s.layer_at[i].group];
    need(g.dim == a.dim, "attention: the pool has another head dimension");
    for (int32_t h = 0; h < g.n_heads; ++h) need(g.heads[h] >= 0 && g.heads[h] < a.n_kv_heads, "attention: the pool has a KV head the layer lacks");
    n_heads += g.n_heads;
  }
  need(n_heads == a.n_kv_heads, "attention: the layer's groups do not hold all of its KV heads");
}

void attention(BoundProgram& p, Ref out, Ref q, Ref k, Ref v, int32_t layer, int32_t n_heads, int32_t n_kv_heads, int32_t dim, float scale,
               int32_t window, float softcap) {
  need(n_heads > 0 && n_kv_heads > 0 && n_heads % n_kv_heads == 0 && dim > 0 && window >= 0, "attention: n_heads must be a multiple of n_kv_heads");
  need(q.cols == int64_t{n_heads} * dim && out.cols == q.cols && k.cols == int64_t{n_kv_heads} * dim && v.cols == k.cols, "attention: columns must be heads * dim");
  const auto kernel = p.need(p.device->kernels.attention, "attention");
  p.batched = true;
  p.add("attention", out, [=](const Ctx& c, const Frame& f) {
    const AttentionArgs a{f.mat(q), f.mat(k), f.mat(v), f.mat(out), layer, n_heads, n_kv_heads, dim, window, scale, softcap};
    check_attention(*c.step, a);
    kernel(c, a);
  });
}

void check_adapters(const Step& s, const AdaptArgs& a) {
  for (int32_t i = 0; i < s.n_adapters; ++i) {
    need(a.site < s.adapters[i]->n_sites, "adapt: the adapter lacks this site");
    const AdapterSite& site = s.adapters[i]->sites[a.site];
    need(site.n_parts == 0 || site.k == a.x.cols, "adapt: x has other columns than a");
    for (int64_t p = 0; p < site.n_parts; ++p) need(site.parts[p].col + site.parts[p].n <= a.y.cols, "adapt: a part lies beyond the columns of y");
  }
}

void adapt(BoundProgram& p, Ref out, Ref y, Ref x, int64_t site) {
  need(out.slot == y.slot && out.base == y.base && out.col == y.col && out.cols == y.cols && !y.wanted && !x.wanted && site >= 0, "adapt: changes all rows of y in place");
  const auto kernel = p.need(p.device->kernels.adapt, "adapt");
  p.batched = true;
  p.add("adapt", out, [=](const Ctx& c, const Frame& f) {
    const AdaptArgs a{f.mat(x), f.mat(y), site};
    if (!c.step->adapter_of) return;
    check_adapters(*c.step, a);
    kernel(c, a);
  });
}

void moe(BoundProgram& p, Ref out, Ref x, Ref router, const std::vector<nb::object>& gate_up, const std::vector<nb::object>& down,
         int32_t n_active, const std::string& kind, bool normalise) {
  std::vector<Weight> up, dn;
  for (const auto& w : gate_up) up.push_back(p.keep(w));
  for (const auto& w : down) dn.push_back(p.keep(w));
  const auto n = static_cast<int32_t>(up.size());
  need(n > 0 && dn.size() == up.size() && router.cols == n && n_active > 0 && n_active <= n, "moe: one gate_up, down and router column per expert");
  for (size_t e = 0; e < up.size(); ++e)
    need(up[e].n_in == x.cols && dn[e].n_out == out.cols && up[e].n_out == 2 * dn[e].n_in && up[e].n_out == up[0].n_out, "moe: an expert's shapes do not fit");
  const Act a = act_named(kind);
  const auto kernel = p.need(p.device->kernels.moe, "moe");
  p.need(p.device->kernels.linear, "linear"), p.need(p.device->kernels.gated, "gated");
  p.add("moe", out, [=](const Ctx& c, const Frame& f) { kernel(c, {f.mat(x), f.mat(router), f.mat(out), up.data(), dn.data(), n, n_active, a, normalise}); });
}

// ---- running ----

struct Input { const void* data; int64_t n_rows, cols; };

Input input_of(const nb::handle h) {
  if (nb::isinstance<Buffer>(h)) {
    const Buffer* b = nb::inst_ptr<Buffer>(h);
    if (b->shape.size() != 2 || b->dtype != Dtype::f32) fail("input: must be float32 with two axes");
    return {b->data, b->shape[0], b->shape[1]};
  }
  In<float, 2> a;
  if (!nb::try_cast(h, a, false)) fail("input: must be a C-contiguous float32 matrix");
  return {a.data(), static_cast<int64_t>(a.shape(0)), static_cast<int64_t>(a.shape(1))};  // the caller's tuple keeps it alive
}

nb::object run(const BoundProgram& p, const BoundStep* step, const nb::args& inputs) {
  if (static_cast<int64_t>(inputs.size()) != p.n_inputs) fail("takes " + std::to_string(p.n_inputs) + " inputs, got " + std::to_string(inputs.size()));
  if (p.batched && !step) fail("this program needs a step");
  Mat external[16];
  int64_t n_rows = step ? step->step.n_rows : -1;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Input in = input_of(inputs[i]);
    if (n_rows < 0) n_rows = in.n_rows;
    if (in.cols != p.in_cols[i] || in.n_rows != n_rows)
      fail("input " + std::to_string(i) + ": shape (" + std::to_string(in.n_rows) + ", " + std::to_string(in.cols) + ") instead of (" +
           std::to_string(n_rows) + ", " + std::to_string(p.in_cols[i]) + ")");
    external[i] = {static_cast<float*>(const_cast<void*>(in.data)), in.cols, in.cols};
  }
  nb::object results[8];
  for (size_t o = 0; o < p.out_cols.size(); ++o) {
    auto* b = new Buffer({p.out_wanted[o] ? step->step.n_want : n_rows, p.out_cols[o]}, Dtype::f32);
    results[o] = nb::cast(b, nb::rv_policy::take_ownership);
    external[inputs.size() + o] = {static_cast<float*>(b->data), p.out_cols[o], p.out_cols[o]};
  }
  {
    nb::gil_scoped_release nogil;
    p.program.run(*p.device, step ? &step->step : nullptr, n_rows, external);
  }
  if (p.out_cols.size() == 1) return results[0];
  nb::list all;
  for (size_t o = 0; o < p.out_cols.size(); ++o) all.append(results[o]);
  return nb::tuple(all);
}

void init_program(BoundProgram* self, const nb::object& device, int64_t width, std::vector<int64_t> in_cols,
                  const std::vector<std::pair<int64_t, bool>>& outs) {
  if (in_cols.size() > 8 || outs.empty() || outs.size() > 8) fail("a program has at most 8 inputs and 1 to 8 outputs");
  new (self) BoundProgram();
  self->device_owner = device;
  self->device = &nb::cast<Device&>(device);
  self->n_inputs = static_cast<int64_t>(in_cols.size());
  self->in_cols = std::move(in_cols);
  for (const auto& [cols, is_wanted] : outs) {
    self->out_cols.push_back(cols);
    self->out_wanted.push_back(is_wanted);
    self->batched |= is_wanted;
  }
  self->program.width = width;
}

size_t item_size(Format f) {
  return f == Format::f32 ? 4 : f == Format::f16 || f == Format::bf16 ? 2 : 1;
}

// Elements of one lane block's data, for each of the formats of ops/packed.py.
int64_t block_elements(Format f, int64_t k, int64_t group) {
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b * b; };
  switch (f) {
    case Format::f32: return k * 16;
    case Format::f16: case Format::bf16: return up(k, 32) * 16;
    case Format::int8: return up(k, group > 64 ? group : 64) * 16;
    default: return up(k, group > 64 ? group : 64) * 8;
  }
}

void init_weight(BoundWeight* self, const std::string& format, int64_t n_out, int64_t n_in, int64_t group, const AnyIn& data,
                 const std::optional<AnyIn>& scales, const std::optional<AnyIn>& mins, const std::optional<AnyIn>& factors) {
  const auto bytes = [](const std::optional<AnyIn>& a) { return a ? std::optional<size_t>(a->nbytes()) : std::nullopt; };
  const Weight w = checked_weight(format, n_out, n_in, group, data.nbytes(), bytes(scales), bytes(mins), bytes(factors));
  new (self) BoundWeight{w, {data}};
  self->w.data = data.data();
  for (const auto* a : {&scales, &mins, &factors})
    if (*a) self->owners.push_back(**a);
  self->format = format;
  self->w.scales = scales ? scales->data() : nullptr;
  self->w.mins = mins ? mins->data() : nullptr;
  self->w.factors = factors ? static_cast<const int8_t*>(factors->data()) : nullptr;
}

}  // namespace

Weight checked_weight(const std::string& format, int64_t n_out, int64_t n_in, int64_t group, size_t data_bytes, std::optional<size_t> scale_bytes,
                      std::optional<size_t> min_bytes, std::optional<size_t> factor_bytes) {
  static const std::pair<const char*, Format> known[] = {
      {"f32", Format::f32}, {"f16", Format::f16}, {"bf16", Format::bf16}, {"int8", Format::int8}, {"int4", Format::int4}, {"int4g", Format::int4g}};
  Weight w = {};
  bool found = false;
  for (const auto& [name, f] : known)
    if (format == name) w.format = f, found = true;
  if (!found) fail("format = '" + format + "': known are f32, f16, bf16, int8, int4, int4g");
  const bool factored = w.format == Format::int4, nibbles = factored || w.format == Format::int4g, quantised = nibbles || w.format == Format::int8;
  need(n_out > 0 && n_in > 0 && n_out < (int64_t{1} << 31) && n_in < (int64_t{1} << 31), "weight: n_out and n_in must be positive and below 2^31");
  const bool known_group = factored ? group == 32 : group == 32 || group == 64 || group == 128 || (group == 0 && w.format == Format::int8);
  need(quantised ? known_group : group == 0, "group: 32 for int4; 32, 64 or 128 for int4g and int8; 0 (per channel) for int8 and floats");
  need(!quantised || (group && !factored) || n_in <= int64_t{1} << 17, "weight: n_in beyond 131072 needs float scales per group, or its sums overflow");
  w.n_out = n_out, w.n_in = n_in, w.group = group;
  const int64_t n_blocks = (n_out + 15) / 16, elements = block_elements(w.format, n_in, group);
  const int64_t k = nibbles ? elements / 8 : elements / 16, n_groups = group ? k / group : 1;
  const auto n_groups_of_lanes = static_cast<size_t>(n_blocks * n_groups * 16), n_scales = factored ? static_cast<size_t>(n_blocks * 16) : n_groups_of_lanes;
  need(data_bytes == static_cast<size_t>(n_blocks * elements) * item_size(w.format), "weight: data has another size than format and shape say");
  need(quantised == scale_bytes.has_value() && (!min_bytes || w.format == Format::int4g) && factored == factor_bytes.has_value(),
       "weight: scales belong to formats of codes, mins to int4g, factors to int4");
  need(!scale_bytes || *scale_bytes == n_scales * (group && !factored ? 2 : 4), "weight: scales have another size than (NB, G, 16), or (NB, 1, 16) for int4");
  need(!min_bytes || *min_bytes == n_groups_of_lanes * 2, "weight: mins have another size than (NB, G, 16)");
  need(!factor_bytes || *factor_bytes == n_groups_of_lanes, "weight: factors have another size than (NB, G, 16)");
  return w;
}

void bind_program(nb::module_& m) {
  using nb::arg;
  nb::class_<Ref>(m, "Ref", "A register: slot -1 lies in the arena, others are inputs, then outputs.")
      .def("__init__", [](Ref* self, int32_t slot, bool is_wanted, int64_t base, int64_t stride, int64_t col, int64_t cols) {
        new (self) Ref{slot, is_wanted, base, stride, col, cols};
      }, arg("slot"), arg("wanted"), arg("base"), arg("stride"), arg("col"), arg("cols"));
  nb::class_<BoundWeight>(m, "Weight", "A Packed matrix bound to native pointers (floats as uint16 where 16 bits wide).")
      .def("__init__", &init_weight, arg("format"), arg("n_out"), arg("n_in"), arg("group"), arg("data").noconvert(),
           arg("scales").noconvert().none(), arg("mins").noconvert().none(), arg("factors").noconvert().none());
  nb::class_<BoundProgram>(m, "Program", "Instructions over registers. Each method appends one: (out, inputs..., arguments...).")
      .def("__init__", &init_program, arg("device"), arg("width"), arg("in_cols"), arg("outs"))
      .def("run", &run, arg("step").none(), arg("inputs"))
      .def("linear", &linear, arg(), arg(), arg(), arg().noconvert().none())
      .def("fused_linear", &fused_linear, arg(), arg(), arg(), arg(), arg().noconvert().none(), arg("adds"), arg("norm").noconvert().none(),
           arg("eps"), arg("offset"), arg("gate").none())
      .def("rescored", &rescored, arg(), arg(), arg(), arg(), arg("norm").noconvert().none(), arg("eps"), arg("offset"))
      .def("embed", &embed)
      .def("rms_norm", &rms_norm, arg(), arg(), arg().noconvert(), arg(), arg())
      .def("layer_norm", &layer_norm, arg(), arg(), arg().noconvert(), arg().noconvert().none(), arg())
      .def("rope", &rope, arg(), arg(), arg().noconvert(), arg().noconvert(), arg(), arg(), arg())
      .def("act", &act).def("gated", &gated).def("add", &add).def("scale", &scale).def("softcap", &softcap)
      .def("adapt", &adapt).def("wanted", &wanted).def("copy", &copy).def("attention", &attention).def("moe", &moe);
}

}  // namespace paceline
