// Moving lanes about: 16 x 16 transposition, choice by bits, partial and paired 16-bit loads. No arithmetic.
#pragma once
#include "paceline/vec.h"

namespace paceline {
namespace PL_ISA {

#if PL_AVX512

// bit i of `bits` set: lane i of x, otherwise of y
PL_INLINE V vpick(uint32_t bits, V x, V y) { return {_mm512_mask_blend_ps(static_cast<__mmask16>(bits), y.v, x.v)}; }

// The first n of sixteen 16-bit items (the rest 0).
PL_INLINE __m256i load_u16(const uint16_t* p, int64_t n) { return _mm256_maskz_loadu_epi16(vmask(n), p); }
PL_INLINE V vload_f16(const uint16_t* p, int64_t n) { return {_mm512_cvtph_ps(load_u16(p, n))}; }
PL_INLINE V vload_bf16(const uint16_t* p, int64_t n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_u16(p, n)), 16))};
}

// Lanes that hold two 16-bit items each, as they lie in memory; n lanes are read.
PL_INLINE V vload_pairs(const uint16_t* p) { return {_mm512_loadu_ps(p)}; }
PL_INLINE V vload_pairs(const uint16_t* p, int64_t n) { return {_mm512_maskz_loadu_ps(vmask(n), p)}; }
PL_INLINE V vfirst_bf16(V x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 16))}; }
PL_INLINE V vsecond_bf16(V x) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
PL_INLINE V vfirst_f16(V x) { return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_castps_si512(x.v)))}; }
PL_INLINE V vsecond_f16(V x) { return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x.v), 16)))}; }

PL_INLINE __m512 unpack2(__m512 a, __m512 b, bool high) {
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
}

PL_INLINE void transpose16(V (&r)[16]) {
  __m512 s[16], t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    s[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) t[i + j] = unpack2(s[i + j / 2], s[i + 2 + j / 2], j & 1);
  // t[4 g + j], quarter q: column 4 q + j of rows 4 g .. 4 g + 3
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(t[j], t[4 + j], 0x88), b = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(t[j], t[4 + j], 0xdd), d = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0xdd);
    r[j].v = _mm512_shuffle_f32x4(a, b, 0x88), r[8 + j].v = _mm512_shuffle_f32x4(a, b, 0xdd);
    r[4 + j].v = _mm512_shuffle_f32x4(c, d, 0x88), r[12 + j].v = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}

#elif PL_AVX2

PL_INLINE __m256 pick8(uint32_t bits, __m256 x, __m256 y) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(on));
}
PL_INLINE V vpick(uint32_t bits, V x, V y) { return {pick8(bits, x.a, y.a), pick8(bits >> 8, x.b, y.b)}; }

struct Items16 { uint16_t u[16]; };
PL_INLINE Items16 load_u16(const uint16_t* p, int64_t n) {
  Items16 t = {};
  for (int64_t i = 0; i < n; ++i) t.u[i] = p[i];
  return t;
}
PL_INLINE V vload_f16(const uint16_t* p, int64_t n) { return vload_f16(load_u16(p, n).u); }
PL_INLINE V vload_bf16(const uint16_t* p, int64_t n) { return vload_bf16(load_u16(p, n).u); }

PL_INLINE V vload_pairs(const uint16_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_castsi256_ps(_mm256_loadu_si256(q)), _mm256_castsi256_ps(_mm256_loadu_si256(q + 1))};
}
PL_INLINE V vload_pairs(const uint16_t* p, int64_t n) {
  const int* q = reinterpret_cast<const int*>(p);
  return {_mm256_castsi256_ps(_mm256_maskload_epi32(q, vmask8(n))),
          n > 8 ? _mm256_castsi256_ps(_mm256_maskload_epi32(q + 8, vmask8(n - 8))) : _mm256_setzero_ps()};
}
PL_INLINE __m256 first8(__m256 x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16)); }
PL_INLINE __m256 second8(__m256 x) { return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000u)))); }
PL_INLINE V vfirst_bf16(V x) { return {first8(x.a), first8(x.b)}; }
PL_INLINE V vsecond_bf16(V x) { return {second8(x.a), second8(x.b)}; }
PL_INLINE V half_pairs(__m256i a, __m256i b) {  // low halves of the lanes, which have zeros above
  const __m256i h = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
PL_INLINE V vfirst_f16(V x) {
  const __m256i low = _mm256_set1_epi32(0xffff);
  return half_pairs(_mm256_and_si256(_mm256_castps_si256(x.a), low), _mm256_and_si256(_mm256_castps_si256(x.b), low));
}
PL_INLINE V vsecond_f16(V x) {
  return half_pairs(_mm256_srli_epi32(_mm256_castps_si256(x.a), 16), _mm256_srli_epi32(_mm256_castps_si256(x.b), 16));
}

PL_INLINE void transpose8(__m256 (&r)[8]) {
  __m256 s[8], t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      t[i + 2 * j] = _mm256_shuffle_ps(s[i + j], s[i + 2 + j], 0x44);
      t[i + 2 * j + 1] = _mm256_shuffle_ps(s[i + j], s[i + 2 + j], 0xee);
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm256_permute2f128_ps(t[j], t[4 + j], 0x20);
    r[4 + j] = _mm256_permute2f128_ps(t[j], t[4 + j], 0x31);
  }
}
PL_INLINE void transpose16(V (&r)[16]) {
  __m256 q[4][8];  // quadrants
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) q[0][i] = r[i].a, q[1][i] = r[i].b, q[2][i] = r[8 + i].a, q[3][i] = r[8 + i].b;
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) transpose8(q[k]);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i].a = q[0][i], r[i].b = q[2][i], r[8 + i].a = q[1][i], r[8 + i].b = q[3][i];
}

#else

PL_INLINE V vpick(uint32_t bits, V x, V y) {
  for (int i = 0; i < 16; ++i) x.f[i] = bits >> i & 1 ? x.f[i] : y.f[i];
  return x;
}
struct Items16 { uint16_t u[16]; };
PL_INLINE Items16 load_u16(const uint16_t* p, int64_t n) {
  Items16 t = {};
  for (int64_t i = 0; i < n; ++i) t.u[i] = p[i];
  return t;
}
PL_INLINE V vload_f16(const uint16_t* p, int64_t n) { return vload_f16(load_u16(p, n).u); }
PL_INLINE V vload_bf16(const uint16_t* p, int64_t n) { return vload_bf16(load_u16(p, n).u); }
PL_INLINE V vload_pairs(const uint16_t* p, int64_t n) {
  V r = {};
  memcpy(r.f, p, static_cast<size_t>(n) * 4);
  return r;
}
PL_INLINE V vload_pairs(const uint16_t* p) { return vload_pairs(p, 16); }
PL_INLINE V vfirst_bf16(V x) {
  for (float& f : x.f) f = bits_float(float_bits(f) << 16);
  return x;
}
PL_INLINE V vsecond_bf16(V x) {
  for (float& f : x.f) f = bits_float(float_bits(f) & 0xffff0000u);
  return x;
}
PL_INLINE V vfirst_f16(V x) {
  for (float& f : x.f) f = half_float(static_cast<uint16_t>(float_bits(f)));
  return x;
}
PL_INLINE V vsecond_f16(V x) {
  for (float& f : x.f) f = half_float(static_cast<uint16_t>(float_bits(f) >> 16));
  return x;
}
PL_INLINE void transpose16(V (&r)[16]) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < i; ++j) {
      const float t = r[i].f[j];
      r[i].f[j] = r[j].f[i], r[j].f[i] = t;
    }
}

#endif

}  // namespace PL_ISA
}  // namespace paceline
