// Activations into the order, precision and codes the kernels read: once per call, rows in parallel.
#pragma once
#include "linear.h"

namespace paceline {
namespace PL_ISA {
namespace {

// Sixteen codes to q, and as int32 lanes.
PL_INLINE I quantise16(V v, int8_t* q) {
#if PL_AVX512
  const __m128i b = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v.v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), b);
  return {_mm512_cvtepi8_epi32(b)};
#elif PL_AVX2
  const __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)), 0xd8);
  const __m128i b = _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), b);
  return {_mm256_cvtepi8_epi32(b), _mm256_cvtepi8_epi32(_mm_srli_si128(b, 8))};
#else
  I r;
  for (int l = 0; l < 16; ++l) {
    const float f = __builtin_rintf(v.f[l]);
    r.i[l] = f >= -127.0f && f <= 127.0f ? static_cast<int32_t>(f) : -128;  // only NaN scales lead outside
    q[l] = static_cast<int8_t>(r.i[l]);
  }
  return r;
#endif
}

// How rows become codes: scales over `group` k's (0: all), sums over `sum_group`, starts as `start_of` says.
struct Coding8 { int64_t group, sum_group; int32_t offset; bool halves; };

// Row r into tiles of 64 codes; `step` bytes between tiles. Zero beyond n.
inline void quantise_row(const float* x, int64_t n, int64_t k, const Coding8& how, const Rows& rows, int64_t r) {
  const int64_t size = how.group ? how.group : k, part = how.sum_group ? how.sum_group : k, step = rows.mr * 64;
  uint8_t* q = const_cast<uint8_t*>(rows.row(r));
  float* scale = const_cast<float*>(rows.scale) + rows.scale_at(r, 0);
  int32_t *start = const_cast<int32_t*>(rows.start) + r * rows.n_sums, *sum = const_cast<int32_t*>(rows.sum) + r * rows.n_sums;
  for (int64_t g = 0; g * size < k; ++g) {
    const int64_t first = g * size, real = max_of<int64_t>(0, min_of(size, n - first));
    const float top = largest(x + first, real);
    scale[g * rows.mr] = top == 0.0f ? 1.0f : top / 127.0f;
    const V inverse = vset(1.0f / scale[g * rows.mr]);  // division would take longer than all the rest
    for (int64_t begin = 0; begin < size; begin += part) {
      I total = izero();
      for (int64_t i = begin; i < begin + part; i += 16) {
        const int64_t at = first + i;
        const V v = real - i >= 16 ? vload(x + at) : i < real ? vload(x + at, real - i) : vzero();
        total = iadd(total, quantise16(vmul(v, inverse), reinterpret_cast<int8_t*>(q + at / 64 * step + at % 64)));
      }
      const Sums t = sums_of(total);
      *start++ = start_of(t, how.offset, how.halves);
      *sum++ = t.first + t.last;
    }
  }
}

// bfloat16 tiles of 32.
inline void round_row(const float* x, int64_t n, int64_t k, uint8_t* q, int64_t step) {
  for (int64_t i = 0; i < k; i += 16) {
    const int64_t left = max_of<int64_t>(0, min_of<int64_t>(16, n - i));
    vstore_bf16(reinterpret_cast<uint16_t*>(q + i / 32 * step) + i % 32, vload(x + (left ? i : 0), left));
  }
}

// Floats: a padded copy, rounded to bfloat16 when `round`.
inline void copy_row(const float* x, int64_t n, int64_t k, bool round, float* to) {
  for (int64_t i = 0; i < k; i += 16) {
    const int64_t left = max_of<int64_t>(0, min_of<int64_t>(16, n - i));
    V v = vload(x + (left ? i : 0), left);
    if (round) {
      uint16_t h[16];
      vstore_bf16(h, v);
      v = vload_bf16(h);
    }
    vstore(to + i, v);
  }
}

// f(row r, its n values) for every row as it comes into the product, in equal tasks.
template <class F> PL_INLINE void each_input(const Ctx& c, const LinearArgs& a, F f) {
  const int64_t n = a.w.n_in, wide = round_up(n, 16) + 16, tasks = even_tasks(c, c.n_rows, n * 8);
  const Norm& norm = a.norm;
  float* buffers = norm.weight ? take<float>(c, wide * pool_size(c.pool)) : nullptr;
  parallel(c, tasks, [&](int64_t t, int thread) {
    float* own = buffers + thread * wide;
    for (int64_t r = c.n_rows * t / tasks; r < c.n_rows * (t + 1) / tasks; ++r) {
      const float* x = a.x.row(r);
      if (norm.weight) rms_norm_run(x, own, norm.weight, n, norm.eps, norm.offset);
      f(r, norm.weight ? own : x);
    }
  });
}

// What the vector kernels take back from their codes.
PL_INLINE Coding8 coding_of(const Weight& w, bool for_tiles) {
  const int32_t offset = w.format == Format::int8 ? (for_tiles ? 0 : kOffset8) : w.mins ? 0 : 8;
  const bool factored = w.format == Format::int4;
  return {scaled_group(w), factored && for_tiles ? 0 : w.group, offset, factored && kHalves};
}

// Rows as floats, padded to k and rounded when the weights are bfloat16.
inline Rows prepare_floats(const Ctx& c, const LinearArgs& a, int64_t k) {
  Rows rows = {a.x.p, a.x.stride, nullptr, 1, 0, 0, 0, 0, nullptr, nullptr, nullptr};
  if (a.w.format == Format::f32 && !a.norm.weight) return rows;
  const int64_t wide = round_up(k, 16);
  float* to = take<float>(c, c.n_rows * wide);
  rows.x = to, rows.ldx = wide;
  each_input(c, a, [&](int64_t r, const float* x) { copy_row(x, a.w.n_in, k, a.w.format == Format::bf16, to + r * wide); });
  return rows;
}

// Rows in tiles of mr rows, the last padded with zero rows. Many blocks of rows lie a chunk more than their size apart: at powers of two
// their parts of a chunk of k's would fall on the same few sets of L2.
inline Rows prepare_tiles(const Ctx& c, const LinearArgs& a, int64_t k, int64_t n_groups, int64_t mr, bool for_tiles) {
  const bool codes = on_codes(a.w, for_tiles);
  const int64_t n_tiles = k / (codes ? 64 : 32), n_padded = round_up(c.n_rows, mr), n_scales = codes && scaled_group(a.w) ? n_groups : 1;
  const int64_t wide = n_tiles + (n_padded > kFewRows && for_tiles ? kChunkMany : 0);
  if (for_tiles && a.w.format == Format::int4) n_groups = 1;  // tiles hold signed weights: nothing to take back
  uint8_t* q = take<uint8_t>(c, n_padded * wide * 64);
  float* scale = codes ? take<float>(c, n_padded * n_scales) : nullptr;
  int32_t* sums = codes ? take<int32_t>(c, 2 * n_padded * n_groups) : nullptr;
  const Rows rows = {a.x.p, a.x.stride, q, mr, n_tiles, wide, n_scales, n_groups, scale, sums, codes ? sums + n_padded * n_groups : nullptr};
  const Coding8 how = coding_of(a.w, for_tiles);
  each_input(c, a, [&](int64_t r, const float* x) {
    if (codes) quantise_row(x, a.w.n_in, k, how, rows, r);
    else round_row(x, a.w.n_in, k, const_cast<uint8_t*>(rows.row(r)), mr * 64);
  });
  for (int64_t r = c.n_rows; r < n_padded; ++r) {
    for (int64_t t = 0; t < n_tiles; ++t) memset(const_cast<uint8_t*>(rows.row(r)) + t * mr * 64, 0, 64);
    for (int64_t g = 0; codes && g < n_scales; ++g) scale[rows.scale_at(r, g)] = 0.0f;
    for (int64_t g = 0; codes && g < n_groups; ++g) sums[r * n_groups + g] = sums[(n_padded + r) * n_groups + g] = 0;
  }
  return rows;
}

// ---- a product, as `linear` and what else multiplies with its kernels begin it ----

// Everything but the activations.
inline Job job_of(const Ctx& c, const LinearArgs& a) {
  Job j = {};
  j.w = a.w, j.out = a.out, j.add = a.add, j.bias = a.bias;
  j.n_rows = c.n_rows, j.k = padded_k(a.w), j.block = block_bytes(a.w), j.n_blocks = ceil_div(a.w.n_out, 16);
  j.n_groups = a.w.group ? j.k / a.w.group : 1;
  j.gate = a.gate, j.kind = a.kind, j.n_lead = a.gate ? j.n_blocks / 2 : j.n_blocks;
  j.apart = a.gate ? j.n_lead : 1, j.step = j.apart * j.block;
  return j;
}

// Whether this matrix multiplies on tiles however few the rows are.
PL_INLINE bool on_tiles([[maybe_unused]] const Weight& w) {
#if PL_AMX
  return w.format == Format::bf16 || as_floats(w);
#else
  return false;
#endif
}

// Rows for the vector kernels.
inline Rows prepare_vectors(const Ctx& c, const LinearArgs& a, const Job& j) {
  const bool tiled = !is_float(a.w.format) || (PL_BF16 && a.w.format == Format::bf16);
  return tiled ? prepare_tiles(c, a, j.k, j.n_groups, 1, false) : prepare_floats(c, a, j.k);
}

}  // namespace
}  // namespace PL_ISA
}  // namespace paceline
