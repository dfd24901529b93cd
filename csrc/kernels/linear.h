// What the linear kernels share: blocking parameters, prepared activations, and the arithmetic that every path must do alike.
#pragma once
#include "paceline/tile.h"
#include "rows.h"

namespace paceline {
namespace PL_ISA {
namespace {

// ---- blocking, in one place ----
constexpr int64_t kTaskBytes = 256 << 10;   // weight bytes of a task: about 15 us
constexpr int64_t kWakeBytes = 16 << 10;    // weight bytes worth waking a thread for: about 1 us
constexpr int64_t kStrip = 4;               // lane blocks whose weights all rows pass over before the next
constexpr int64_t kPrefetch = 2048;         // bytes ahead in each block's weight stream
constexpr int64_t kVnniRows = 4;            // int4 and int8 by row on AMX machines: up to this many rows the vector kernels are faster
constexpr int64_t kHeadOutputs = 1 << 15;   // AMX: a matrix of so many outputs is a head
constexpr int64_t kFewRows = 32;            // AMX: two row blocks, whose sums stay in tiles
constexpr int64_t kPanelRows = 256;         // AMX: rows a task takes through its strip
constexpr int64_t kPanelUnpacked = 512;     // AMX: the same where weights are unpacked for each panel
constexpr int64_t kMaxStrip = 16;           // AMX: lane blocks of a strip
constexpr int64_t kChunkMany = 16;          // AMX: at most so many k tiles in a chunk where rows are many: 2 lane blocks of them in L1
constexpr int64_t kPanelBytes = 768 << 10;   // AMX: activations of a panel that stay in L2 beside the rest
constexpr int64_t kStreamBytes = 2 << 20;   // AMX: outputs from this size on are written past the caches
constexpr int64_t kTasksPerThread = 4;      // AMX: for balance

constexpr bool is_float(Format f) { return f == Format::f32 || f == Format::f16 || f == Format::bf16; }

// k's a weight row is padded to.
PL_INLINE int64_t padded_k(const Weight& w) {
  if (w.format == Format::f32) return w.n_in;
  if (is_float(w.format)) return round_up(w.n_in, 32);
  return round_up(w.n_in, w.group > 64 ? w.group : 64);
}

// How many equal tasks n pieces of `bytes` each make: one where they are not worth waking a thread, else as many for each thread.
PL_INLINE int64_t even_tasks(const Ctx& c, int64_t n, int64_t bytes) {
  const int64_t threads = pool_size(c.pool), total = n * bytes;
  if (total < 2 * kWakeBytes || n < threads) return 1;
  return min_of(n, round_up(ceil_div(total, kTaskBytes), threads));
}

// Bytes of one block of 16 outputs.
PL_INLINE int64_t block_bytes(const Weight& w) {
  const int64_t k = padded_k(w);
  return w.format == Format::f32 ? k * 64 : is_float(w.format) ? k * 32 : w.format == Format::int8 ? k * 16 : k * 8;  // int4 of either kind
}

// k's that share a scale of the activations: those of a group of weights, or all (0) where the integer sums run over all of K.
PL_INLINE int64_t scaled_group(const Weight& w) { return w.format == Format::int4 ? 0 : w.group; }

// On tiles int8 with a float scale per group of k's multiplies as bfloat16; else activations of codes become codes too. A head stays on
// vectors: it sees few rows, which unpacking would slow down.
PL_INLINE bool as_floats(const Weight& w) { return w.format == Format::int8 && w.group != 0 && w.n_out < kHeadOutputs; }
PL_INLINE bool on_codes(const Weight& w, bool for_tiles) { return !is_float(w.format) && !(for_tiles && as_floats(w)); }

// Activations in the order the kernels read them.
//   floats     row r at x + r * ldx
//   tiles      64 bytes (32 bfloat16 or 64 int8) of row r and k tile t at q + (((r / mr) * wide + t) * mr + r % mr) * 64
// Codes have a scale per row and group of k's (one group for int4), and per row and group of the weights' k's where integer sums start
// (`start_of`) and the plain sum of the codes.
struct Rows {
  const float* x;
  int64_t ldx;
  const uint8_t* q;
  int64_t mr, n_tiles, wide, n_scales, n_sums;
  const float* scale;    // (row / mr, n_scales, mr): `scale_at`
  const int32_t *start, *sum;  // (n_rows, n_sums)
  PL_INLINE const uint8_t* row(int64_t r) const { return q + ((r / mr) * wide * mr + r % mr) * 64; }
  PL_INLINE int64_t scale_at(int64_t r, int64_t g) const { return (r / mr * n_scales + g) * mr + r % mr; }
};

struct Job {
  Weight w;
  Mat out, add;
  const float* bias;
  Rows a;
  int64_t n_rows, k, block;  // padded k, bytes of a block
  int64_t n_blocks;
  int64_t n_groups;          // of the weights
  bool gate, streams;        // streams: outputs go past the caches
  Act kind;
  // Blocks that are handled together lie `apart` blocks, `step` bytes from each other: neighbours, or a block of gates and its ups.
  // `n_lead` of them come first in such a set.
  int64_t apart, step, n_lead;
  PL_INLINE const uint8_t* weights(int64_t b) const { return static_cast<const uint8_t*>(w.data) + b * block; }
};

// What a block's stream will need next, from `offset` on: near its end that is the beginning of the block that takes its place.
template <int NB> PL_INLINE int64_t ahead_of(const Job& j, int64_t offset) {
  return offset + kPrefetch < j.block || j.gate ? kPrefetch : kPrefetch + (NB - 1) * j.block;
}

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
constexpr bool kHalves = false;
constexpr int32_t kOffset8 = 128;  // vpdpbusd wants one side unsigned: w + 128, taken back where the sum starts
PL_INLINE I weight8(I w) { return {_mm512_xor_si512(w.v, _mm512_set1_epi8(-128))}; }
PL_INLINE I dot8(I acc, I w, I x) { return {_mm512_dpbusd_epi32(acc.v, w.v, x.v)}; }
PL_INLINE I dot4(I acc, I w, I x) { return {_mm512_dpbusd_epi32(acc.v, w.v, x.v)}; }
PL_INLINE I dot4_short(I acc, I w, I x) { return dot4(acc, w, x); }
PL_INLINE I load_factors(const int8_t* p) {
  return {_mm512_maskz_mov_epi16(0x55555555, _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
PL_INLINE I times_factor(I acc, I dot, I factor) { return {_mm512_dpwssd_epi32(acc.v, dot.v, factor.v)}; }  // the low halves hold it all
#else
constexpr bool kHalves = true;
constexpr int32_t kOffset8 = 0;
PL_INLINE I weight8(I w) { return w; }
PL_INLINE I dot4(I acc, I w, I x) {  // w in 0..15: the sums of two products fit int16
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(_mm512_maddubs_epi16(w.v, x.v), _mm512_set1_epi16(1)))};
}
PL_INLINE I dot8(I acc, I w, I x) {  // |w| * (x with w's sign): at most 2 * 128 * 127
  const __m512i signed_x = _mm512_mask_sub_epi8(x.v, _mm512_movepi8_mask(w.v), _mm512_setzero_si512(), x.v);
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_abs_epi8(w.v), signed_x), _mm512_set1_epi16(1)))};
}
PL_INLINE I dot4_short(I acc, I w, I x) { return {_mm512_add_epi16(acc.v, _mm512_maddubs_epi16(w.v, x.v))}; }
PL_INLINE I load_factors(const int8_t* p) {
  const __m512i f = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm512_or_si512(_mm512_slli_epi32(f, 16), _mm512_maskz_mov_epi16(0x55555555, f))};
}
PL_INLINE I times_factor(I acc, I dot, I factor) { return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(dot.v, factor.v))}; }
#endif
#elif PL_AVX2
constexpr bool kHalves = true;
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
PL_INLINE I dot4_short(I acc, I w, I x) {
  return {_mm256_add_epi16(acc.a, _mm256_maddubs_epi16(w.a, x.a)), _mm256_add_epi16(acc.b, _mm256_maddubs_epi16(w.b, x.b))};
}
PL_INLINE __m256i pair_factors(__m128i f) {
  const __m256i w = _mm256_cvtepi8_epi32(f);
  return _mm256_or_si256(_mm256_slli_epi32(w, 16), _mm256_and_si256(w, _mm256_set1_epi32(0xffff)));
}
PL_INLINE I load_factors(const int8_t* p) {
  const __m128i f = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {pair_factors(f), pair_factors(_mm_srli_si128(f, 8))};
}
PL_INLINE I times_factor(I acc, I dot, I factor) {
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(dot.a, factor.a)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(dot.b, factor.b))};
}
#else
constexpr bool kHalves = false;
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
PL_INLINE I dot4_short(I acc, I w, I x) { return dot8(acc, w, x); }
PL_INLINE I load_factors(const int8_t* p) { I r; for (int n = 0; n < 16; ++n) r.i[n] = p[n]; return r; }
PL_INLINE I times_factor(I acc, I dot, I factor) { for (int n = 0; n < 16; ++n) acc.i[n] += dot.i[n] * factor.i[n]; return acc; }
#endif

// Where the sum over a group begins so that offset codes count as signed ones: -offset * sum x. With kHalves a lane holds two int16
// sums, of the first and last two of each four k's (`dot4_short` of at most 32 k's: with the start taken in they fit; until then they
// may wrap).
struct Sums { int32_t first, last; };
PL_INLINE Sums sums_of(I codes) {  // lanes 4 i + j, k by k
  int32_t lane[16];
  memcpy(lane, &codes, sizeof lane);
  Sums s = {0, 0};
  for (int i = 0; i < 16; ++i) (i % 4 < 2 ? s.first : s.last) += lane[i];
  return s;
}
PL_INLINE int32_t start_of(Sums s, int32_t offset, bool halves) {
  if (!halves) return -offset * (s.first + s.last);
  return static_cast<int32_t>((static_cast<uint32_t>(-offset * s.first) & 0xffff) | static_cast<uint32_t>(-offset * s.last) << 16);
}

// ---- the float part of a quantised product, the same on every path ----

struct Scales { V scale, min; };

PL_INLINE Scales scales_of(const Weight& w, int64_t n_groups, int64_t block, int64_t g) {
  if (scaled_group(w) == 0) return {vload(static_cast<const float*>(w.scales) + block * 16), vzero()};
  const int64_t at = (block * n_groups + g) * 16;
  return {vload_f16(static_cast<const uint16_t*>(w.scales) + at), w.mins ? vload_f16(static_cast<const uint16_t*>(w.mins) + at) : vzero()};
}

// y + x_scale * w_scale * dot (+ x_scale * min * x_sum)
template <bool kMins> PL_INLINE V fold(V y, I dot, float x_scale, int32_t x_sum, const Scales& s) {
  const V xs = vset(x_scale);
  y = vfma(ifloat(dot), vmul(xs, s.scale), y);
  if (kMins) y = vfma(vset(static_cast<float>(x_sum)), vmul(xs, s.min), y);
  return y;
}

PL_INLINE void store_lanes([[maybe_unused]] const Job& j, float* out, V y) {
#if PL_AMX
  if (j.streams) return vstream(out, y);
#endif
  vstore(out, y);
}

PL_INLINE void store_block(const Job& j, int64_t row, int64_t block, V y) {
  const int64_t n = block * 16, left = j.w.n_out - n;
  float* out = j.out.row(row) + n;
  if (left >= 16) {
    if (j.bias) y = vadd(y, vload(j.bias + n));
    if (j.add.p) y = vadd(vload(j.add.row(row) + n), y);
    store_lanes(j, out, y);
  } else {
    if (j.bias) y = vadd(y, vload(j.bias + n, left));
    if (j.add.p) y = vadd(vload(j.add.row(row) + n, left), y);
    vstore(out, y, left);
  }
}

// The result of a pair of blocks, `block` of the gates and its ups; act: the activation.
template <class A> PL_INLINE void store_gated(const Job& j, int64_t row, int64_t block, V gate, V up, A act) {
  const int64_t n = block * 16;
  if (j.bias) gate = vadd(gate, vload(j.bias + n)), up = vadd(up, vload(j.bias + j.w.n_out / 2 + n));
  store_lanes(j, j.out.row(row) + n, vmul(act(gate), up));
}
__attribute__((noinline)) inline void store_gated(const Job& j, int64_t row, int64_t block, V gate, V up) {
  with_act(j.kind, [&](auto act) { store_gated(j, row, block, gate, up, act); });
}

// Rows [row, row + MR) of the blocks from `block` on.
template <int MR, int NB> PL_INLINE void store_rows(const Job& j, int64_t row, int64_t block, const V (&y)[MR][NB]) {
  for (int r = 0; r < MR; ++r) {
    if (NB == 2 && j.gate) {
      store_gated(j, row + r, block, y[r][0], y[r][NB - 1]);
    } else {
      for (int b = 0; b < NB; ++b) store_block(j, row + r, block + b, y[r][b]);
    }
  }
}

}  // namespace
}  // namespace PL_ISA
}  // namespace paceline
