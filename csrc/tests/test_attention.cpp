// Ragged paged attention of odd shapes against plain loops in double, on exactly sized heap blocks so that the sanitizers see every
// read and write beyond an end; slots not in use hold NaN.
#include <math.h>
#include <string.h>

#include <vector>

#include "check.h"
#include "cpu.h"

namespace paceline {
namespace {

struct Shape {
  int32_t n_heads, n_kv, dim, page_size, window;
  float softcap;
  Dtype dtype;
};

size_t entry_bytes(Dtype t, size_t dim) { return t == Dtype::i8 ? dim + 4 : dim * (t == Dtype::f32 ? 4 : 2); }

struct Problem {
  Shape s;
  std::vector<int32_t> cu, lens, tables, heads;
  std::vector<int64_t> slots;
  std::vector<float> q, k, v, out;
  std::vector<uint8_t> pool_k, pool_v;
  int64_t max_pages = 0, n_pages = 0;
};

// Every sequence whole in one step, pages handed out from the last to the first.
Problem make(Random& random, const Shape& s, const std::vector<int32_t>& lens) {
  Problem p;
  p.s = s, p.lens = lens, p.cu = {0};
  for (int32_t n : lens) {
    p.cu.push_back(p.cu.back() + n);
    const int64_t pages = (n + s.page_size - 1) / s.page_size;
    p.n_pages += pages;
    p.max_pages = pages > p.max_pages ? pages : p.max_pages;
  }
  int32_t next = static_cast<int32_t>(p.n_pages);
  for (int32_t n : lens) {
    const size_t at = p.tables.size();
    p.tables.resize(at + static_cast<size_t>(p.max_pages), -1);
    for (int32_t i = 0; i < n; ++i) {
      int32_t& page = p.tables[at + static_cast<size_t>(i / s.page_size)];
      if (i % s.page_size == 0) page = --next;
      p.slots.push_back(int64_t{page} * s.page_size + i % s.page_size);
    }
  }
  for (int32_t h = 0; h < s.n_kv; ++h) p.heads.push_back(h);
  const auto rows = static_cast<size_t>(p.cu.back());
  const auto fill = [&](std::vector<float>& a, int32_t heads) {
    a.resize(rows * static_cast<size_t>(heads * s.dim));
    for (float& f : a) f = static_cast<float>(random.below(65) - 32) / 32.0f;  // exact in every type
  };
  fill(p.q, s.n_heads), fill(p.k, s.n_kv), fill(p.v, s.n_kv);
  p.out.resize(p.q.size());
  const size_t bytes = static_cast<size_t>(p.n_pages * s.n_kv * s.page_size) * entry_bytes(s.dtype, static_cast<size_t>(s.dim));
  p.pool_k.assign(bytes, 0xff), p.pool_v.assign(bytes, 0xff);  // NaN in all types; of codes the scale is
  return p;
}

void run(const Kernels& kernels, Pool* pool, Workspace* ws, Problem& p) {
  const Shape& s = p.s;
  void *pk = p.pool_k.data(), *pv = p.pool_v.data();
  const GroupStep g = {p.slots.data(), p.tables.data(), p.lens.data(), p.max_pages, p.n_pages, s.page_size, s.dim, s.n_kv, s.dtype,
                       p.heads.data(), &pk, &pv};
  const int32_t cu_layer[] = {0, 1};
  const LayerAt at = {0, 0};
  Step step{};
  step.n_rows = p.cu.back(), step.n_seqs = static_cast<int64_t>(p.lens.size()), step.n_groups = 1, step.n_layers = 1;
  step.cu_rows = p.cu.data(), step.groups = &g, step.cu_layer = cu_layer, step.layer_at = &at;
  const int64_t wide = int64_t{s.n_heads} * s.dim, narrow = int64_t{s.n_kv} * s.dim;
  ws->reset();
  const Ctx c = {pool, ws, &kernels, &step, step.n_rows};
  kernels.attention(c, {{p.q.data(), wide, wide}, {p.k.data(), narrow, narrow}, {p.v.data(), narrow, narrow}, {p.out.data(), wide, wide},
                        0, s.n_heads, s.n_kv, s.dim, s.window, 0.25f, s.softcap});
}

// Whether these kernels multiply pairs of bfloat16, so that queries and weights are rounded.
bool on_pairs(const Kernels& kernels, Dtype t) {
  for (const Isa& isa : instruction_sets()) {
    Kernels k;
    isa.fill(k);
    if (k.attention == kernels.attention) return (t == Dtype::bf16 || t == Dtype::i8) && (!strcmp(isa.name, "avx512_bf16") || !strncmp(isa.name, "amx", 3));
  }
  return false;
}

double to_bf16(float f) {  // nearest even
  uint32_t u;
  memcpy(&u, &f, 4);
  u = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u;
  memcpy(&f, &u, 4);
  return static_cast<double>(f);
}

// Keys or values as a pool of codes holds them, and as pairs are multiplied.
void as_stored(std::vector<float>& a, size_t dim, bool pairs) {
  for (size_t at = 0; at < a.size(); at += dim) {
    float top = 0;
    for (size_t d = at; d < at + dim; ++d) top = fmaxf(top, fabsf(a[d]));
    const float scale = top == 0 ? 1 : top / 127, inverse = 1 / scale;
    for (size_t d = at; d < at + dim; ++d) {
      a[d] = scale * rintf(a[d] * inverse);
      if (pairs) a[d] = static_cast<float>(to_bf16(a[d]));
    }
  }
}

// Largest difference from the definition beyond what rounding may cause: 1e-5, and for pairs the weighted mean distance of the values
// from the result times u / (1 - u), u = 2^-8, since every weight is rounded, and their sum is of the rounded ones.
double worst(const Problem& p, bool pairs) {
  const Shape& s = p.s;
  const int32_t per = s.n_heads / s.n_kv;
  const float factor = s.softcap != 0 ? 0.25f / s.softcap : 0.25f * 1.44269504f;
  double error = -1;
  for (size_t seq = 0; seq < p.lens.size(); ++seq)
    for (int32_t i = 0; i < p.lens[seq]; ++i)
      for (int32_t h = 0; h < s.n_heads; ++h) {
        const auto row = [&](const std::vector<float>& a, int32_t index, int32_t heads, int32_t head) {
          return a.data() + (int64_t{p.cu[seq] + index} * heads + head) * s.dim;
        };
        const int32_t first = s.window && i >= s.window ? i - s.window + 1 : 0;
        std::vector<double> weight;
        double mass = 0;
        for (int32_t j = first; j <= i; ++j) {
          double score = 0;
          for (int32_t d = 0; d < s.dim; ++d) {
            const float q = row(p.q, i, s.n_heads, h)[d];
            score += 0.25 * (pairs ? to_bf16(q * factor) / factor : q) * row(p.k, j, s.n_kv, h / per)[d];
          }
          weight.push_back(exp(s.softcap != 0 ? s.softcap * tanh(score / s.softcap) : score));
          mass += weight.back();
        }
        const auto value = [&](int32_t j, int32_t d) { return static_cast<double>(row(p.v, j, s.n_kv, h / per)[d]); };
        for (int32_t d = 0; d < s.dim; ++d) {
          double want = 0, spread = 0;
          for (int32_t j = first; j <= i; ++j) want += weight[static_cast<size_t>(j - first)] / mass * value(j, d);
          for (int32_t j = first; j <= i; ++j) spread += weight[static_cast<size_t>(j - first)] / mass * fabs(value(j, d) - want);
          const double e = fabs(want - row(p.out, i, s.n_heads, h)[d]) - 1e-5 - (pairs ? spread / 255 : 0);
          error = e > error || e != e ? e : error;
        }
      }
  return error;
}

}  // namespace

void test_attention(const Kernels& kernels, Pool* pool, Workspace* ws) {
  Random random;
  const Shape shapes[] = {{4, 2, 8, 1, 0, 0, Dtype::f32},     {3, 3, 7, 3, 0, 0, Dtype::bf16},    {6, 2, 40, 16, 9, 0, Dtype::f16},
                          {5, 1, 80, 32, 0, 3, Dtype::bf16},  {2, 1, 33, 5, 70, 0, Dtype::f32},   {9, 3, 64, 64, 0, 0, Dtype::f16},
                          {9, 3, 64, 64, 0, 0, Dtype::bf16},  {8, 1, 16, 1, 33, 0, Dtype::bf16},  {7, 1, 33, 5, 70, 2, Dtype::bf16},
                          {4, 2, 128, 16, 0, 0, Dtype::bf16}, {2, 1, 255, 64, 0, 0, Dtype::bf16}, {40, 1, 48, 7, 65, 0, Dtype::bf16},
                          {4, 2, 64, 16, 0, 0, Dtype::i8},    {3, 3, 7, 3, 0, 0, Dtype::i8},      {40, 1, 33, 5, 70, 2, Dtype::i8}};
  for (const Shape& s : shapes) {
    Problem p = make(random, s, {1, 17, 130, 64, 2});
    run(kernels, pool, ws, p);
    const bool pairs = on_pairs(kernels, s.dtype);
    if (s.dtype == Dtype::i8)
      for (auto* a : {&p.k, &p.v}) as_stored(*a, static_cast<size_t>(s.dim), pairs);
    const double error = worst(p, pairs);
    CHECK(error <= 0, "dim %d, dtype %d: off by %g more than allowed", s.dim, static_cast<int>(s.dtype), error);
  }
}

}  // namespace paceline
