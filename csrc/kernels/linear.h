// What the linear kernels share: blocking parameters, prepared activations, and the arithmetic that every path must do alike.
#pragma once
#include "paceline/tile.h"

namespace paceline {
namespace PL_ISA {
namespace {

// ---- blocking, in one place ----
constexpr int64_t kTaskBytes = 128 << 10;   // weight bytes that make a task worth waking a thread for (about 10 us)
constexpr int64_t kPrefetch = 2048;         // bytes ahead in each block's weight stream
constexpr int64_t kVnniRows = 4;            // int8, int4 on AMX machines: up to this many rows the vector kernels are faster
constexpr int64_t kVnniRows32 = 16;         // the same for int4 in groups of 32, where folding the groups outweighs the tiles
constexpr int64_t kPanelRows = 512;         // AMX: rows a task takes through its strip
constexpr int64_t kMaxStrip = 16;           // AMX: lane blocks of a strip; with kChunkMany tiles of 1 KiB each, 1 MiB stays in L2
constexpr int64_t kChunkMany = 64;          // AMX: k tiles of a chunk where rows are many (even: a group spans up to two tiles)
constexpr int64_t kChunkFew = 8;            // AMX: k tiles of int4 unpacked at once where rows are few, so that they stay in L1
constexpr int64_t kTasksPerThread = 4;      // AMX: for balance

constexpr bool is_float(Format f) { return f == Format::f32 || f == Format::f16 || f == Format::bf16; }

// k's a weight row is padded to.
PL_INLINE int64_t padded_k(const Weight& w) {
  if (w.format == Format::f32) return w.n_in;
  if (is_float(w.format)) return round_up(w.n_in, 32);
  return round_up(w.n_in, w.group > 64 ? w.group : 64);
}

// Bytes of one block of 16 outputs.
PL_INLINE int64_t block_bytes(const Weight& w) {
  const int64_t k = padded_k(w);
  return w.format == Format::f32 ? k * 64 : is_float(w.format) ? k * 32 : w.format == Format::int8 ? k * 16 : k * 8;
}

// Activations in the order the kernels read them.
//   floats     row r at x + r * ldx
//   tiles      64 bytes (32 bfloat16 or 64 int8) of row r and k tile t at q + (((r / mr) * n_tiles + t) * mr + r % mr) * 64
// Quantised activations have a scale and the sum of their codes per row and group.
struct Rows {
  const float* x;
  int64_t ldx;
  const uint8_t* q;
  int64_t mr, n_tiles, n_groups;
  const float* scale;   // (n_rows, n_groups)
  const int32_t* sum;   // (n_rows, n_groups)
  PL_INLINE const uint8_t* row(int64_t r) const { return q + ((r / mr) * n_tiles * mr + r % mr) * 64; }
};

struct Job {
  Weight w;
  Mat out;
  const float* bias;
  Rows a;
  int64_t n_rows, k, block;  // padded k, bytes of a block
  int64_t n_blocks;
  int64_t n_groups;
  PL_INLINE const uint8_t* weights(int64_t b) const { return static_cast<const uint8_t*>(w.data) + b * block; }
};

// ---- sixteen int32 lanes ----

#if PL_AVX512
struct I { __m512i v; };
PL_INLINE I izero() { return {_mm512_setzero_si512()}; }
PL_INLINE I iload(const void* p) { return {_mm512_loadu_si512(p)}; }
PL_INLINE I iset(int32_t x) { return {_mm512_set1_epi32(x)}; }
PL_INLINE I iadd(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
PL_INLINE I isub(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
PL_INLINE V ifloat(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
PL_INLINE I low_nibbles(I a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
PL_INLINE I high_nibbles(I a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
#if PL_VNNI
constexpr int32_t kOffset8 = 128;  // vpdpbusd wants one side unsigned: w + 128, taken back through the sum of x
PL_INLINE I weight8(I w) { return {_mm512_xor_si512(w.v, _mm512_set1_epi8(-128))}; }
PL_INLINE I dot8(I acc, I w, I x) { return {_mm512_dpbusd_epi32(acc.v, w.v, x.v)}; }
PL_INLINE I dot4(I acc, I w, I x) { return {_mm512_dpbusd_epi32(acc.v, w.v, x.v)}; }
#else
constexpr int32_t kOffset8 = 0;
PL_INLINE I weight8(I w) { return w; }
PL_INLINE I dot4(I acc, I w, I x) {  // w in 0..15: the sums of two products fit int16
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(_mm512_maddubs_epi16(w.v, x.v), _mm512_set1_epi16(1)))};
}
PL_INLINE I dot8(I acc, I w, I x) {  // |w| * (x with w's sign): at most 2 * 128 * 127
  const __m512i signed_x = _mm512_mask_sub_epi8(x.v, _mm512_movepi8_mask(w.v), _mm512_setzero_si512(), x.v);
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_abs_epi8(w.v), signed_x), _mm512_set1_epi16(1)))};
}
#endif
#elif PL_AVX2
struct I { __m256i a, b; };
PL_INLINE __m256i load256(const void* p, int half) { return _mm256_loadu_si256(static_cast<const __m256i*>(p) + half); }
PL_INLINE I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
PL_INLINE I iload(const void* p) { return {load256(p, 0), load256(p, 1)}; }
PL_INLINE I iset(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
PL_INLINE I iadd(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
PL_INLINE I isub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
PL_INLINE V ifloat(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
PL_INLINE I low_nibbles(I x) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
PL_INLINE I high_nibbles(I x) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), m), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), m)};
}
constexpr int32_t kOffset8 = 0;
PL_INLINE I weight8(I w) { return w; }
PL_INLINE __m256i dot_half(__m256i acc, __m256i u, __m256i s) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}
PL_INLINE I dot4(I acc, I w, I x) { return {dot_half(acc.a, w.a, x.a), dot_half(acc.b, w.b, x.b)}; }
PL_INLINE I dot8(I acc, I w, I x) {  // |w| * (x with w's sign): at most 2 * 128 * 127, which int16 holds
  return {dot_half(acc.a, _mm256_abs_epi8(w.a), _mm256_sign_epi8(x.a, w.a)), dot_half(acc.b, _mm256_abs_epi8(w.b), _mm256_sign_epi8(x.b, w.b))};
}
#else
struct I { int32_t i[16]; };
PL_INLINE I izero() { return {}; }
PL_INLINE I iload(const void* p) { I r; memcpy(r.i, p, 64); return r; }
PL_INLINE I iset(int32_t x) { I r; for (int n = 0; n < 16; ++n) r.i[n] = x; return r; }
PL_INLINE I iadd(I a, I b) { for (int n = 0; n < 16; ++n) a.i[n] += b.i[n]; return a; }
PL_INLINE I isub(I a, I b) { for (int n = 0; n < 16; ++n) a.i[n] -= b.i[n]; return a; }
PL_INLINE V ifloat(I a) { V r; for (int n = 0; n < 16; ++n) r.f[n] = static_cast<float>(a.i[n]); return r; }
PL_INLINE I low_nibbles(I a) { for (int n = 0; n < 16; ++n) a.i[n] &= 0x0f0f0f0f; return a; }
PL_INLINE I high_nibbles(I a) { for (int n = 0; n < 16; ++n) a.i[n] = a.i[n] >> 4 & 0x0f0f0f0f; return a; }
constexpr int32_t kOffset8 = 0;
PL_INLINE I weight8(I w) { return w; }
PL_INLINE I dot8(I acc, I w, I x) {
  int8_t a[64], b[64];
  memcpy(a, w.i, 64), memcpy(b, x.i, 64);
  for (int n = 0; n < 64; ++n) acc.i[n / 4] += int32_t{a[n]} * b[n];
  return acc;
}
PL_INLINE I dot4(I acc, I w, I x) { return dot8(acc, w, x); }
#endif

PL_INLINE int32_t isum(I a) {
  int32_t lane[16], total = 0;
  memcpy(lane, &a, sizeof lane);
  for (int32_t x : lane) total += x;
  return total;
}

// ---- the float part of a quantised product, the same on every path ----

struct Scales { V scale, min; };

PL_INLINE Scales scales_of(const Weight& w, int64_t n_groups, int64_t block, int64_t g) {
  if (w.group == 0) return {vload(static_cast<const float*>(w.scales) + block * 16), vzero()};
  const int64_t at = (block * n_groups + g) * 16;
  return {vload_f16(static_cast<const uint16_t*>(w.scales) + at), w.mins ? vload_f16(static_cast<const uint16_t*>(w.mins) + at) : vzero()};
}

// y + x_scale * w_scale * (dot - offset * x_sum) (+ x_scale * min * x_sum)
template <bool kMins> PL_INLINE V fold(V y, I dot, int32_t offset, float x_scale, int32_t x_sum, const Scales& s) {
  const V xs = vset(x_scale);
  if (offset) dot = isub(dot, iset(static_cast<int32_t>(static_cast<uint32_t>(offset) * static_cast<uint32_t>(x_sum))));
  y = vfma(ifloat(dot), vmul(xs, s.scale), y);
  if (kMins) y = vfma(vset(static_cast<float>(x_sum)), vmul(xs, s.min), y);
  return y;
}

PL_INLINE void store_block(const Job& j, int64_t row, int64_t block, V y) {
  const int64_t n = block * 16, left = j.w.n_out - n;
  float* out = j.out.row(row) + n;
  if (left >= 16) {
    vstore(out, j.bias ? vadd(y, vload(j.bias + n)) : y);
  } else {
    vstore(out, j.bias ? vadd(y, vload(j.bias + n, left)) : y, left);
  }
}

}  // namespace
}  // namespace PL_ISA
}  // namespace paceline
