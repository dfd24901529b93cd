// Sixteen float lanes, the same on every instruction set: one AVX-512 register, two AVX2 registers, or an array. Lane order and the
// order of every reduction are fixed, so a kernel written with these gives the same bits on all of them.
#pragma once
#include <string.h>

#include "paceline/isa.h"
#if PL_AVX2 || PL_AVX512
#include <immintrin.h>
#endif

namespace paceline {
namespace PL_ISA {

#if PL_AVX512

struct V { __m512 v; };
PL_INLINE V vload(const float* p) { return {_mm512_loadu_ps(p)}; }
PL_INLINE __mmask16 vmask(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }  // n in 0..16
PL_INLINE V vload(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(vmask(n), p)}; }  // first n lanes, rest 0
PL_INLINE void vstore(float* p, V a) { _mm512_storeu_ps(p, a.v); }
PL_INLINE void vstore(float* p, V a, int64_t n) { _mm512_mask_storeu_ps(p, vmask(n), a.v); }
PL_INLINE void vstream(float* p, V a) { _mm512_stream_ps(p, a.v); }  // past the caches, to 64 aligned bytes; ends with vfence
PL_INLINE void vfence() { _mm_sfence(); }
PL_INLINE V vset(float x) { return {_mm512_set1_ps(x)}; }
PL_INLINE V vzero() { return {_mm512_setzero_ps()}; }
PL_INLINE V vadd(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
PL_INLINE V vsub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
PL_INLINE V vmul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
PL_INLINE V vdiv(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
PL_INLINE V vfma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c, rounded once
PL_INLINE V vmax(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
PL_INLINE V vmin(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
PL_INLINE V vabs(V a) { return {_mm512_abs_ps(a.v)}; }
PL_INLINE V vsqrt(V a) { return {_mm512_sqrt_ps(a.v)}; }
PL_INLINE V vround(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
PL_INLINE V vfloor(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
// a < b ? x : y, lane by lane
PL_INLINE V vless(V a, V b, V x, V y) { return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)}; }
// a * 2^n for integral n; a and the result normal
PL_INLINE V vscale2(V a, V n) {
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(_mm512_cvtps_epi32(n.v), 23)))};
}
PL_INLINE V vload_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
PL_INLINE V vload_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}
PL_INLINE void vstore_f16(uint16_t* p, V a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PL_INLINE __m256i vto_bf16(V a) {  // nearest even; NaN stays NaN
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  r = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), r, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(r);
}
PL_INLINE void vstore_bf16(uint16_t* p, V a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), vto_bf16(a)); }
PL_INLINE void vlanes(V a, float* out) { _mm512_storeu_ps(out, a.v); }

#elif PL_AVX2

struct V { __m256 a, b; };
PL_INLINE V vload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
PL_INLINE __m256i vmask8(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
PL_INLINE V vload(const float* p, int64_t n) {
  return {_mm256_maskload_ps(p, vmask8(n)), n > 8 ? _mm256_maskload_ps(p + 8, vmask8(n - 8)) : _mm256_setzero_ps()};
}
PL_INLINE void vstore(float* p, V x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
PL_INLINE void vstore(float* p, V x, int64_t n) {
  _mm256_maskstore_ps(p, vmask8(n), x.a);
  if (n > 8) _mm256_maskstore_ps(p + 8, vmask8(n - 8), x.b);
}
PL_INLINE V vset(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
PL_INLINE V vzero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
PL_INLINE V vadd(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
PL_INLINE V vsub(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
PL_INLINE V vmul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
PL_INLINE V vdiv(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
PL_INLINE V vfma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
PL_INLINE V vmax(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
PL_INLINE V vmin(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
PL_INLINE V vabs(V x) {
  const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
PL_INLINE V vsqrt(V x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
PL_INLINE V vround(V x) {
  return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
PL_INLINE V vfloor(V x) { return {_mm256_floor_ps(x.a), _mm256_floor_ps(x.b)}; }
PL_INLINE V vless(V a, V b, V x, V y) {
  return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(a.a, b.a, _CMP_LT_OQ)), _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(a.b, b.b, _CMP_LT_OQ))};
}
PL_INLINE __m256 scale2(__m256 a, __m256 n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}
PL_INLINE V vscale2(V x, V n) { return {scale2(x.a, n.a), scale2(x.b, n.b)}; }
PL_INLINE V vload_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
PL_INLINE __m256 from_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
PL_INLINE V vload_bf16(const uint16_t* p) {
  return {from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
PL_INLINE void vstore_f16(uint16_t* p, V x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, mode));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, mode));
}
PL_INLINE __m256i bf16_bits(__m256 a) {  // nearest even in the low halves; NaN stays NaN
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
}
PL_INLINE __m256i vto_bf16(V x) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(bf16_bits(x.a), bf16_bits(x.b)), 0xd8);
}
PL_INLINE void vstore_bf16(uint16_t* p, V x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), vto_bf16(x)); }
PL_INLINE void vlanes(V x, float* out) { vstore(out, x); }

#else

struct V { float f[16]; };
#define PL_EACH(expr) V r; for (int i = 0; i < 16; ++i) r.f[i] = (expr); return r
PL_INLINE V vload(const float* p) { PL_EACH(p[i]); }
PL_INLINE V vload(const float* p, int64_t n) { PL_EACH(i < n ? p[i] : 0.0f); }
PL_INLINE void vstore(float* p, V a) { memcpy(p, a.f, sizeof a.f); }
PL_INLINE void vstore(float* p, V a, int64_t n) { memcpy(p, a.f, static_cast<size_t>(n) * 4); }
PL_INLINE V vset(float x) { PL_EACH(x); }
PL_INLINE V vzero() { PL_EACH(0.0f); }
PL_INLINE V vadd(V a, V b) { PL_EACH(a.f[i] + b.f[i]); }
PL_INLINE V vsub(V a, V b) { PL_EACH(a.f[i] - b.f[i]); }
PL_INLINE V vmul(V a, V b) { PL_EACH(a.f[i] * b.f[i]); }
PL_INLINE V vdiv(V a, V b) { PL_EACH(a.f[i] / b.f[i]); }
PL_INLINE V vfma(V a, V b, V c) { PL_EACH(__builtin_fmaf(a.f[i], b.f[i], c.f[i])); }  // may be a library call: slow, but one rounding
PL_INLINE V vmax(V a, V b) { PL_EACH(a.f[i] > b.f[i] ? a.f[i] : b.f[i]); }
PL_INLINE V vmin(V a, V b) { PL_EACH(a.f[i] < b.f[i] ? a.f[i] : b.f[i]); }
PL_INLINE V vabs(V a) { PL_EACH(__builtin_fabsf(a.f[i])); }
PL_INLINE V vsqrt(V a) { PL_EACH(__builtin_sqrtf(a.f[i])); }
PL_INLINE V vround(V a) { PL_EACH(__builtin_rintf(a.f[i])); }
PL_INLINE V vfloor(V a) { PL_EACH(__builtin_floorf(a.f[i])); }
PL_INLINE V vless(V a, V b, V x, V y) { PL_EACH(a.f[i] < b.f[i] ? x.f[i] : y.f[i]); }
PL_INLINE float bits_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
PL_INLINE uint32_t float_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
PL_INLINE V vscale2(V a, V n) { PL_EACH(bits_float(float_bits(a.f[i]) + (static_cast<uint32_t>(static_cast<int32_t>(n.f[i])) << 23))); }
PL_INLINE float half_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
  if (e == 31) return bits_float(sign | 0x7f800000u | m << 13);
  if (e) return bits_float(sign | (e + 112) << 23 | m << 13);
  const float f = static_cast<float>(m) * 0x1p-24f;
  return sign ? -f : f;
}
PL_INLINE uint16_t float_half(float f) {
  const uint32_t u = float_bits(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (a >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (a < 0x38800000) return static_cast<uint16_t>(sign | static_cast<uint32_t>(__builtin_rintf(bits_float(a) * 0x1p24f)));
  return static_cast<uint16_t>(sign | ((a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13));
}
PL_INLINE uint16_t float_bf16(float f) {
  const uint32_t u = float_bits(f);
  return f != f ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
PL_INLINE V vload_f16(const uint16_t* p) { PL_EACH(half_float(p[i])); }
PL_INLINE V vload_bf16(const uint16_t* p) { PL_EACH(bits_float(static_cast<uint32_t>(p[i]) << 16)); }
PL_INLINE void vstore_f16(uint16_t* p, V a) { for (int i = 0; i < 16; ++i) p[i] = float_half(a.f[i]); }
PL_INLINE void vstore_bf16(uint16_t* p, V a) { for (int i = 0; i < 16; ++i) p[i] = float_bf16(a.f[i]); }
PL_INLINE void vlanes(V a, float* out) { memcpy(out, a.f, sizeof a.f); }
#undef PL_EACH

#endif

// Reductions halve the register: lane i meets i + 8, then i + 4, i + 2, i + 1.
PL_INLINE float vsum(V a) {
#if PL_AVX512 || PL_AVX2
#if PL_AVX512
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
#else
  const __m256 h = _mm256_add_ps(a.a, a.b);
#endif
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
#else
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; ++i) a.f[i] += a.f[i + n];
  return a.f[0];
#endif
}
PL_INLINE float vhmax(V a) {
#if PL_AVX512 || PL_AVX2
#if PL_AVX512
  const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
#else
  const __m256 h = _mm256_max_ps(a.a, a.b);
#endif
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
#else
  float m = a.f[0];
  for (int i = 1; i < 16; ++i) m = a.f[i] > m ? a.f[i] : m;
  return m;
#endif
}

// One number of a stored format.
PL_INLINE float load_f16(uint16_t h) {
#if PL_AVX2 || PL_AVX512
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
#else
  return half_float(h);
#endif
}
PL_INLINE float load_bf16(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

}  // namespace PL_ISA
}  // namespace paceline
