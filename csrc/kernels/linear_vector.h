// Linear on vector registers: MR rows times NB blocks of 16 outputs; each output adds up in the order of k.
#pragma once
#include "linear.h"

namespace paceline {
namespace PL_ISA {
namespace {

#if PL_AVX512
constexpr int kMaxRows = 4;
constexpr int wide(int mr) { return mr <= 2 ? 4 : 2; }  // blocks at once
#else
constexpr int kMaxRows = 2;
constexpr int wide(int mr) { return mr == 1 ? 2 : 1; }
#endif

PL_INLINE void ahead(const uint8_t* p) { __builtin_prefetch(p, 0, 3); }

// Two consecutive k's of 16 outputs from 64 bytes of 16-bit floats.
struct Pair { V even, odd; };
template <Format F> PL_INLINE Pair load_pair(const uint8_t* p) {
#if PL_AVX512
  const __m512i u = _mm512_loadu_si512(p);
  if (F == Format::bf16) return {{_mm512_castsi512_ps(_mm512_slli_epi32(u, 16))}, {_mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(-65536)))}};
  return {{_mm512_cvtph_ps(_mm512_cvtepi32_epi16(u))}, {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(u, 16)))}};
#elif PL_AVX2
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32));
  if (F == Format::bf16) {
    const __m256i high = _mm256_set1_epi32(-65536);
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high))}};
  }
  const __m256i low = _mm256_set1_epi32(0xffff);
  const __m256i e = _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_and_si256(a, low), _mm256_and_si256(b, low)), 0xd8);
  const __m256i o = _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16)), 0xd8);
  return {{_mm256_cvtph_ps(_mm256_castsi256_si128(e)), _mm256_cvtph_ps(_mm256_extracti128_si256(e, 1))},
          {_mm256_cvtph_ps(_mm256_castsi256_si128(o)), _mm256_cvtph_ps(_mm256_extracti128_si256(o, 1))}};
#else
  uint16_t h[32], e[16], o[16];
  memcpy(h, p, 64);
  for (int i = 0; i < 16; ++i) e[i] = h[2 * i], o[i] = h[2 * i + 1];
  return F == Format::bf16 ? Pair{vload_bf16(e), vload_bf16(o)} : Pair{vload_f16(e), vload_f16(o)};
#endif
}

template <Format F, int MR, int NB> void float_rows(const Job& j, int64_t row, int64_t block) {
  V acc[MR][NB];
  for (int r = 0; r < MR; ++r)
    for (int b = 0; b < NB; ++b) acc[r][b] = vzero();
  const uint8_t* w = j.weights(block);
#if PL_BF16
  if (F == Format::bf16) {
    const uint8_t* x[MR];
    for (int r = 0; r < MR; ++r) x[r] = j.a.row(row + r);
    for (int64_t k = 0; k < j.k; k += 2) {
      const int64_t next = ahead_of<NB>(j, k * 32);
      for (int b = 0; b < NB; ++b) {
        const uint8_t* p = w + b * j.step + k * 32;
        ahead(p + next);
        const __m512bh wv = reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
        for (int r = 0; r < MR; ++r) {
          int32_t pair;
          memcpy(&pair, x[r] + k / 32 * (j.a.mr * 64) + k % 32 * 2, 4);
          acc[r][b].v = _mm512_dpbf16_ps(acc[r][b].v, wv, reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)));
        }
      }
    }
    store_rows(j, row, block, acc);
    return;
  }
#endif
  const float* x = j.a.x + row * j.a.ldx;
  if (F == Format::f32) {
    for (int64_t k = 0; k < j.k; ++k) {
      const int64_t next = ahead_of<NB>(j, k * 64);
      for (int b = 0; b < NB; ++b) {
        const uint8_t* p = w + b * j.step + k * 64;
        ahead(p + next);
        const V wv = vload(reinterpret_cast<const float*>(p));
        for (int r = 0; r < MR; ++r) acc[r][b] = vfma(vset(x[r * j.a.ldx + k]), wv, acc[r][b]);
      }
    }
  } else {
    for (int64_t k = 0; k < j.k; k += 2) {
      const int64_t next = ahead_of<NB>(j, k * 32);
      for (int b = 0; b < NB; ++b) {
        const uint8_t* p = w + b * j.step + k * 32;
        ahead(p + next);
        const Pair wv = load_pair<F>(p);
        for (int r = 0; r < MR; ++r) {
          acc[r][b] = vfma(vset(x[r * j.a.ldx + k]), wv.even, acc[r][b]);
          acc[r][b] = vfma(vset(x[r * j.a.ldx + k + 1]), wv.odd, acc[r][b]);
        }
      }
    }
  }
  store_rows(j, row, block, acc);
}

PL_INLINE I four_codes(const uint8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return iset(x);
}

// Sums of a group begin at the rows' starts.
template <int MR, int NB> PL_INLINE void start_group(const Job& j, int64_t row, int64_t g, I (&dot)[MR][NB]) {
  for (int r = 0; r < MR; ++r) {
    const I start = iset(j.a.start[(row + r) * j.n_groups + g]);
    for (int b = 0; b < NB; ++b) dot[r][b] = start;
  }
}

template <bool kMins, int MR, int NB>
PL_INLINE void fold_group(const Job& j, int64_t row, int64_t block, int64_t g, const I (&dot)[MR][NB], V (&acc)[MR][NB]) {
  for (int b = 0; b < NB; ++b) {
    const Scales s = scales_of(j.w, j.n_groups, block + b * j.apart, g);
    for (int r = 0; r < MR; ++r)
      acc[r][b] = fold<kMins>(acc[r][b], dot[r][b], j.a.scale[j.a.scale_at(row + r, g)], j.a.sum[(row + r) * j.n_groups + g], s);
  }
}

template <int MR, int NB> void int8_rows(const Job& j, int64_t row, int64_t block) {
  V acc[MR][NB];
  const uint8_t *x[MR], *w = j.weights(block);
  for (int r = 0; r < MR; ++r) {
    x[r] = j.a.row(row + r);
    for (int b = 0; b < NB; ++b) acc[r][b] = vzero();
  }
  const int64_t size = j.w.group ? j.w.group : j.k;
  for (int64_t g = 0; g < j.n_groups; ++g) {
    I dot[MR][NB];
    start_group(j, row, g, dot);
    for (int64_t k = g * size; k < (g + 1) * size; k += 4) {
      const int64_t next = ahead_of<NB>(j, k * 16);
      for (int b = 0; b < NB; ++b) {
        const uint8_t* p = w + b * j.step + k * 16;
        ahead(p + next);
        const I wv = weight8(iload(p));
        for (int r = 0; r < MR; ++r) dot[r][b] = dot8(dot[r][b], wv, four_codes(x[r] + k / 64 * (j.a.mr * 64) + k % 64));
      }
    }
    fold_group<false>(j, row, block, g, dot, acc);
  }
  store_rows(j, row, block, acc);
}

// Adds the products of one block of 64 k's: the low nibbles (k 0..31), the high ones (32..63), or both.
template <bool kLow, bool kHigh, int MR, int NB>
PL_INLINE void int4_block(const Job& j, const uint8_t* w, const uint8_t* const (&x)[MR], int64_t kb, I (&dot)[MR][NB]) {
  const int64_t next = ahead_of<NB>(j, kb * 512);
  for (int i = 0; i < 8; ++i)
    for (int b = 0; b < NB; ++b) {
      const uint8_t* p = w + b * j.step + kb * 512 + i * 64;
      if (kLow) ahead(p + next);
      const I wv = iload(p);
      for (int r = 0; r < MR; ++r) {
        const uint8_t* q = x[r] + kb * (j.a.mr * 64) + i * 4;
        if (kLow) dot[r][b] = dot4(dot[r][b], low_nibbles(wv), four_codes(q));
        if (kHigh) dot[r][b] = dot4(dot[r][b], high_nibbles(wv), four_codes(q + 32));
      }
    }
}

template <bool kMins, int MR, int NB> void int4g_rows(const Job& j, int64_t row, int64_t block) {
  V acc[MR][NB];
  const uint8_t *x[MR], *w = j.weights(block);
  for (int r = 0; r < MR; ++r) {
    x[r] = j.a.row(row + r);
    for (int b = 0; b < NB; ++b) acc[r][b] = vzero();
  }
  for (int64_t g = 0; g < j.n_groups; ++g) {
    I dot[MR][NB];
    start_group(j, row, g, dot);
    if (j.w.group == 32) {
      if (g % 2 == 0) int4_block<true, false>(j, w, x, g / 2, dot);
      else int4_block<false, true>(j, w, x, g / 2, dot);
    } else {
      for (int64_t kb = g * j.w.group / 64; kb < (g + 1) * j.w.group / 64; ++kb) int4_block<true, true>(j, w, x, kb, dot);
    }
    fold_group<kMins>(j, row, block, g, dot, acc);
  }
  store_rows(j, row, block, acc);
}

// A block of 64 k's of the factored int4, two groups: k 0..31 in the low nibbles, 32..63 in the high ones.
template <int MR, int NB>
PL_INLINE void factored_block(const Job& j, int64_t row, const uint8_t* w, const int8_t* factors, const uint8_t* const (&x)[MR], int64_t kb, I (&sum)[MR][NB]) {
  const int64_t next = ahead_of<NB>(j, kb * 512), at = kb * (j.a.mr * 64);
  I low[MR][NB], high[MR][NB];
  start_group(j, row, 2 * kb, low);
  start_group(j, row, 2 * kb + 1, high);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    for (int b = 0; b < NB; ++b) {
      const uint8_t* p = w + b * j.step + kb * 512 + i * 64;
      ahead(p + next);
      const I codes = iload(p), l = low_nibbles(codes), h = high_nibbles(codes);
      for (int r = 0; r < MR; ++r) {
        low[r][b] = dot4_short(low[r][b], l, four_codes(x[r] + at + i * 4));
        high[r][b] = dot4_short(high[r][b], h, four_codes(x[r] + at + 32 + i * 4));
      }
    }
  for (int b = 0; b < NB; ++b) {
    const int8_t* f = factors + (b * j.apart * j.n_groups + 2 * kb) * 16;
    const I fl = load_factors(f), fh = load_factors(f + 16);
    for (int r = 0; r < MR; ++r) sum[r][b] = times_factor(times_factor(sum[r][b], low[r][b], fl), high[r][b], fh);
  }
}

// Codes of groups of 32 times whole factors: integer sums over all of K, one scale at the end.
template <int MR, int NB> void int4_rows(const Job& j, int64_t row, int64_t block) {
  I sum[MR][NB];
  const uint8_t *x[MR], *w = j.weights(block);
  for (int r = 0; r < MR; ++r) {
    x[r] = j.a.row(row + r);
    for (int b = 0; b < NB; ++b) sum[r][b] = izero();
  }
  const int8_t* factors = j.w.factors + block * j.n_groups * 16;
  for (int64_t kb = 0; kb < j.k / 64; ++kb) factored_block(j, row, w, factors, x, kb, sum);
  V y[MR][NB];
  for (int b = 0; b < NB; ++b) {
    const Scales s = scales_of(j.w, 1, block + b * j.apart, 0);
    for (int r = 0; r < MR; ++r) y[r][b] = fold<false>(vzero(), sum[r][b], j.a.scale[j.a.scale_at(row + r, 0)], 0, s);
  }
  store_rows(j, row, block, y);
}

template <int MR, int NB> PL_INLINE void rows_of(const Job& j, int64_t row, int64_t block) {
  switch (j.w.format) {
    case Format::f32: return float_rows<Format::f32, MR, NB>(j, row, block);
    case Format::f16: return float_rows<Format::f16, MR, NB>(j, row, block);
    case Format::bf16: return float_rows<Format::bf16, MR, NB>(j, row, block);
    case Format::int8: return int8_rows<MR, NB>(j, row, block);
    case Format::int4: return int4_rows<MR, NB>(j, row, block);
    case Format::int4g: return j.w.mins ? int4g_rows<true, MR, NB>(j, row, block) : int4g_rows<false, MR, NB>(j, row, block);
  }
}

template <int MR> void some_rows(const Job& j, int64_t row, int64_t first, int64_t last) {
  int64_t b = first;
  for (; j.gate && b < last; ++b) rows_of<MR, 2>(j, row, b);
  for (; b + wide(MR) <= last; b += wide(MR)) rows_of<MR, wide(MR)>(j, row, b);
  if (wide(MR) > 2 && b + 2 <= last) rows_of<MR, 2>(j, row, b), b += 2;
  for (; b < last; ++b) rows_of<MR, 1>(j, row, b);
}

// Leading blocks [first, last) of all rows: a strip at a time, so that its weights are still in L2 for the next rows.
inline void vector_strip(const Job& j, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; b += kStrip) {
    const int64_t end = min_of(last, b + kStrip);
    int64_t r = 0;
    for (; r + kMaxRows <= j.n_rows; r += kMaxRows) some_rows<kMaxRows>(j, r, b, end);
#if PL_AVX512
    if (j.n_rows - r == 3) some_rows<3>(j, r, b, end);
    if (j.n_rows - r == 2) some_rows<2>(j, r, b, end);
#endif
    if (j.n_rows - r == 1) some_rows<1>(j, r, b, end);
  }
}

}  // namespace
}  // namespace PL_ISA
}  // namespace paceline
