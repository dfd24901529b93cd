// Activations into the order, precision and codes the kernels read: once per call, rows in parallel.
#pragma once
#include "linear.h"

namespace paceline {
namespace PL_ISA {
namespace {

// The largest |x| of n floats; NaN where one is NaN (integer order of the magnitudes puts NaN above infinity).
PL_INLINE float largest(const float* x, int64_t n) {
  V m = vzero(), bad = vzero();
  for (int64_t i = 0; i < n; i += 16) {
    const V v = n - i < 16 ? vload(x + i, n - i) : vload(x + i);
    m = vmax(m, vabs(v));
    bad = vfma(v, vzero(), bad);  // NaN for NaN and infinity
  }
  return vsum(bad) == 0.0f ? vhmax(m) : __builtin_nanf("");
}

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

// One row into tiles of 64 codes; `step` bytes between tiles. Zero beyond n.
inline void quantise_row(const float* x, int64_t n, int64_t k, int64_t group, uint8_t* q, int64_t step, float* scale, int32_t* sum) {
  const int64_t size = group ? group : k;
  for (int64_t g = 0; g * size < k; ++g) {
    const int64_t first = g * size, real = max_of<int64_t>(0, min_of(size, n - first));
    const float top = largest(x + first, real);
    scale[g] = top == 0.0f ? 1.0f : top / 127.0f;
    I total = izero();
    const V s = vset(scale[g]);
    for (int64_t i = 0; i < size; i += 16) {
      const int64_t at = first + i;
      const V v = real - i >= 16 ? vload(x + at) : i < real ? vload(x + at, real - i) : vzero();
      total = iadd(total, quantise16(vdiv(v, s), reinterpret_cast<int8_t*>(q + at / 64 * step + at % 64)));
    }
    sum[g] = isum(total);
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

// `tiled`: tiles of mr rows, the last padded with zero rows; otherwise float rows.
inline Rows prepare(const Ctx& c, const LinearArgs& a, int64_t k, int64_t n_groups, bool tiled, int64_t mr) {
  Rows rows = {a.x.p, a.x.stride, nullptr, mr, 0, n_groups, nullptr, nullptr};
  const int64_t n = a.x.cols, n_rows = c.n_rows;
  if (a.w.format == Format::f32) return rows;
  const int64_t per_task = max_of<int64_t>(1, (1 << 16) / max_of<int64_t>(k, 1)), n_tasks = ceil_div(n_rows, per_task);
  if (!tiled) {
    float* to = take<float>(c, n_rows * k);
    rows.x = to, rows.ldx = k;
    parallel(c, n_tasks, [&](int64_t t, int) {
      for (int64_t r = t * per_task; r < min_of(n_rows, (t + 1) * per_task); ++r) copy_row(a.x.row(r), n, k, a.w.format == Format::bf16, to + r * k);
    });
    return rows;
  }
  const bool codes = !is_float(a.w.format);
  rows.n_tiles = k / (codes ? 64 : 32);
  const int64_t n_padded = round_up(n_rows, mr), row_bytes = rows.n_tiles * 64;
  uint8_t* q = take<uint8_t>(c, n_padded * row_bytes);
  float* scale = codes ? take<float>(c, n_padded * n_groups) : nullptr;
  int32_t* sum = codes ? take<int32_t>(c, n_padded * n_groups) : nullptr;
  rows.q = q, rows.scale = scale, rows.sum = sum;
  parallel(c, n_tasks, [&](int64_t t, int) {
    for (int64_t r = t * per_task; r < min_of(n_rows, (t + 1) * per_task); ++r) {
      uint8_t* to = const_cast<uint8_t*>(rows.row(r));
      if (codes) quantise_row(a.x.row(r), n, k, a.w.group, to, mr * 64, scale + r * n_groups, sum + r * n_groups);
      else round_row(a.x.row(r), n, k, to, mr * 64);
    }
  });
  for (int64_t r = n_rows; r < n_padded; ++r) {
    for (int64_t t = 0; t < rows.n_tiles; ++t) memset(const_cast<uint8_t*>(rows.row(r)) + t * mr * 64, 0, 64);
    for (int64_t g = 0; codes && g < n_groups; ++g) scale[r * n_groups + g] = 0.0f, sum[r * n_groups + g] = 0;
  }
  return rows;
}

}  // namespace
}  // namespace PL_ISA
}  // namespace paceline
