// Blocks of keys and values, and queries, in the order and type that the products read.
//
//   float   kt (dim, 64) keys as columns, v (64, wide), queries (pairs, dim)
//   Pair    kt (dim / 2, 64) two dimensions a lane, v (32, wide) two keys a lane, queries (pairs, dim / 2) rounded to bfloat16;
//           an odd last dimension stands beside a zero; of each whole 32 dimensions of v, and so of sums, the even ones come first
//
// Values of keys that no row of the unit sees are zeros: their weights are 0, and 0 times what an unused slot holds may be NaN.
#pragma once
#include "attention_product.h"

namespace paceline {
namespace PL_ISA {
namespace {

template <Dtype D> struct ItemOf { using Type = float; };
#if PL_BF16
template <> struct ItemOf<Dtype::bf16> { using Type = Pair; };
template <> struct ItemOf<Dtype::i8> { using Type = Pair; };
#endif

// Dimensions of a query row as items: the stride, and how many the product goes through. Tiles take 16 pairs at a time.
template <class T> PL_INLINE int64_t query_stride(int64_t dim) { return Items<T>::n == 1 ? dim : round_up(dim, 32) / 2; }
template <class T> PL_INLINE int64_t depth(int64_t dim) { return Items<T>::n == 1 ? dim : PL_AMX ? round_up(dim, 32) / 2 : (dim + 1) / 2; }

// The groups of sixteen keys [begin, end) that hold all of `seen`, in units of what a product adds at once.
struct Groups { int begin, end; };
template <class T> PL_INLINE Groups groups_of(uint64_t seen) {
  constexpr int span = PL_AMX && Items<T>::n == 2 ? 2 : 1;
  return {__builtin_ctzll(seen) / (16 * span) * span, (63 - __builtin_clzll(seen)) / (16 * span) * span + span};
}

PL_INLINE float scale_of(const void* row, int64_t dim) {  // of an entry of codes
  float s;
  memcpy(&s, static_cast<const int8_t*>(row) + dim, 4);
  return s;
}

PL_INLINE V load_lanes(Dtype t, const void* p, int64_t i, int64_t n, int64_t dim) {  // n <= 16 items from item i on
  if (t == Dtype::i8) {
    float x[16] = {};
    for (int64_t l = 0; l < n; ++l) x[l] = static_cast<const int8_t*>(p)[i + l];
    return vmul(vload(x), vset(scale_of(p, dim)));
  }
  if (t == Dtype::f32) return n == 16 ? vload(static_cast<const float*>(p) + i) : vload(static_cast<const float*>(p) + i, n);
  const uint16_t* u = static_cast<const uint16_t*>(p) + i;
  if (t == Dtype::f16) return n == 16 ? vload_f16(u) : vload_f16(u, n);
  return n == 16 ? vload_bf16(u) : vload_bf16(u, n);
}

// ---- float ----

// Sixteen keys as columns of kt. Two 16-bit items travel as one lane through the transposition.
template <Dtype D> void transpose_keys(const void* const* key, int64_t dim, float* kt) {
  constexpr bool paired = D == Dtype::f16 || D == Dtype::bf16;
  const int64_t whole = paired ? dim / 2 * 2 : dim, step = paired ? 32 : 16;
  for (int64_t d = 0; d < whole; d += step) {
    V r[16];
    const int64_t n = min_of(whole - d, step);
    for (int i = 0; i < 16; ++i) {
      const uint16_t* u = static_cast<const uint16_t*>(key[i]) + d;
      if (paired) r[i] = n == step ? vload_pairs(u) : vload_pairs(u, n / 2);
      else r[i] = load_lanes(D, key[i], d, n, dim);
    }
    transpose16(r);
    float* out = kt + d * kBlock;
    for (int64_t i = 0; i < (paired ? n / 2 : n); ++i) {
      if (paired) {
        vstore(out + 2 * i * kBlock, D == Dtype::f16 ? vfirst_f16(r[i]) : vfirst_bf16(r[i]));
        vstore(out + (2 * i + 1) * kBlock, D == Dtype::f16 ? vsecond_f16(r[i]) : vsecond_bf16(r[i]));
      } else {
        vstore(out + i * kBlock, r[i]);
      }
    }
  }
  if (whole < dim)  // an odd 16-bit dimension
    for (int i = 0; i < 16; ++i) {
      const uint16_t u = static_cast<const uint16_t*>(key[i])[whole];
      kt[whole * kBlock + i] = D == Dtype::f16 ? load_f16(u) : load_bf16(u);
    }
}

// A row of v, zeros up to a multiple of 16.
template <Dtype D> PL_INLINE void load_values(const void* const* row, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; d += 16) vstore(out + d, load_lanes(D, row[0], d, min_of<int64_t>(16, dim - d), dim));
}

PL_INLINE void load_query(const float* from, float scale, int64_t dim, float* to) {
  for (int64_t i = 0; i < dim; ++i) to[i] = from[i] * scale;
}

PL_INLINE void pad(const float*, int64_t, float*) {}  // nothing to pad
PL_INLINE void out_order(const float*, float*, int64_t) {}

// ---- pairs ----

#if PL_BF16
// An entry of codes as bfloat16, zeros up to whole 32 dimensions: whole vectors, since what two stores wrote no load gets quickly.
PL_INLINE __m512 scaled_codes(const int8_t* p, int64_t n, __m512 scale) {
  const __m128i codes = n >= 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)) : _mm_maskz_loadu_epi8(vmask(max_of<int64_t>(0, n)), p);
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), scale);
}
PL_INLINE void unpack_codes(const void* row, int64_t dim, uint16_t* out) {
  const __m512 scale = _mm512_set1_ps(scale_of(row, dim));
  const auto* p = static_cast<const int8_t*>(row);
  for (int64_t d = 0; d < dim; d += 32) {
    const __m512bh y = _mm512_cvtne2ps_pbh(scaled_codes(p + d + 16, dim - d - 16, scale), scaled_codes(p + d, dim - d, scale));
    _mm512_storeu_si512(out + d, reinterpret_cast<__m512i>(y));
  }
}

template <Dtype D> void transpose_keys(const void* const* key, int64_t dim, Pair* kt) {
  const int64_t whole = dim / 2;
  for (int64_t d = 0; d < whole; d += 16) {
    V r[16];
    const int64_t n = min_of<int64_t>(whole - d, 16);
    for (int i = 0; i < 16; ++i) {
      const uint16_t* u = static_cast<const uint16_t*>(key[i]) + 2 * d;
      r[i] = n == 16 ? vload_pairs(u) : vload_pairs(u, n);
    }
    transpose16(r);
    if (n == 16) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_ps(kt + (d + i) * kBlock, r[i].v);
    } else {
      for (int64_t i = 0; i < n; ++i) _mm512_storeu_ps(kt + (d + i) * kBlock, r[i].v);
    }
  }
  if (dim % 2)
    for (int i = 0; i < 16; ++i) kt[whole * kBlock + i].bits = static_cast<const uint16_t*>(key[i])[dim - 1];
}

PL_INLINE __m512i load_items(const uint16_t* p, int64_t n) {  // n <= 16 items, one in the low half of each lane
  return _mm512_cvtepu16_epi32(n == 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)) : load_u16(p, n));
}

// Whole 32 dimensions: the 16 even ones, then the 16 odd ones (`out_order` puts them back), which takes no permutation.
template <Dtype D> PL_INLINE void load_values(const void* const* row, int64_t dim, Pair* out) {
  const auto *first = static_cast<const uint16_t*>(row[0]), *second = static_cast<const uint16_t*>(row[1]);
  int64_t d = 0;
  for (; d + 32 <= dim; d += 32) {
    const __m512i a = _mm512_loadu_si512(first + d), b = _mm512_loadu_si512(second + d);
    _mm512_storeu_si512(out + d, _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16)));
    _mm512_storeu_si512(out + d + 16, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b));
  }
  for (; d < dim; d += 16) {
    const int64_t n = min_of<int64_t>(16, dim - d);
    _mm512_storeu_si512(out + d, _mm512_or_si512(load_items(first + d, n), _mm512_slli_epi32(load_items(second + d, n), 16)));
  }
}

// A row of sums as `load_values` orders dimensions -> in their order.
PL_INLINE void out_order(const Pair*, float* row, int64_t dim) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0), high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t d = 0; d + 32 <= dim; d += 32) {
    const __m512 even = _mm512_loadu_ps(row + d), odd = _mm512_loadu_ps(row + d + 16);
    _mm512_storeu_ps(row + d, _mm512_permutex2var_ps(even, low, odd));
    _mm512_storeu_ps(row + d + 16, _mm512_permutex2var_ps(even, high, odd));
  }
}

PL_INLINE void load_query(const float* from, float scale, int64_t dim, Pair* to) {  // zeros up to the stride
  for (int64_t d = 0; d < round_up(dim, 32); d += 16) {
    const int64_t n = max_of<int64_t>(0, min_of<int64_t>(16, dim - d));
    const __m256bh h = _mm512_cvtneps_pbh(vmul(vload(from + d, n), vset(scale)).v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d / 2), reinterpret_cast<__m256i>(h));
  }
}

PL_INLINE void pad(const Pair*, int64_t dim, Pair* kt) {  // what tiles multiply beyond the dimension
  const int64_t from = (dim + 1) / 2, to = depth<Pair>(dim);
  memset(kt + from * kBlock, 0, static_cast<size_t>((to - from) * kBlock) * 4);
}
#endif

// ---- both ----

// Rows [i] for products of pairs: codes are unpacked to `stage` (n rows of whole 32 dimensions), others stay where they are.
template <Dtype D, class T> PL_INLINE void stage_rows([[maybe_unused]] const void** row, [[maybe_unused]] int64_t n, [[maybe_unused]] int64_t dim, [[maybe_unused]] float* stage) {
#if PL_BF16
  if constexpr (D == Dtype::i8) {
    auto* to = reinterpret_cast<uint16_t*>(stage);
    for (int64_t i = 0; i < n; ++i, to += round_up(dim, 32)) unpack_codes(row[i], dim, to), row[i] = to;
  }
#endif
}

// The groups of a block that hold the keys `seen`, at byte offsets `offset`; `zero`: a row of zeros. Keys outside `seen` hold anything.
template <Dtype D, class T>
void load_keys(const Entries& e, const int64_t* offset, uint64_t seen, int64_t dim, const void* zero, float* stage, T* kt, Ahead& ahead) {
  const Groups g = groups_of<T>(seen);
  for (int t = g.begin; t < g.end; ++t) {
    const void* key[16];
    ahead.until(Ahead::kLoaded * t / 4);
    for (int i = 0; i < 16; ++i) key[i] = seen >> (16 * t + i) & 1 && offset[16 * t + i] >= 0 ? e.k + offset[16 * t + i] : zero;
    stage_rows<D, T>(key, 16, dim, stage);
    transpose_keys<D>(key, dim, kt + 16 * t);
  }
}

template <Dtype D, class T>
void load_all_values(const Entries& e, const int64_t* offset, uint64_t seen, const Groups& g, int64_t dim, int64_t wide, const void* zero, float* stage,
                     T* v, Ahead& ahead) {
  for (int i = 16 * g.begin; i < 16 * g.end; i += Items<T>::n) {
    const void* row[Items<T>::n];
    ahead.until(Ahead::kLoaded * i / kBlock);
    for (int l = 0; l < Items<T>::n; ++l) {
      row[l] = seen >> (i + l) & 1 && offset[i + l] >= 0 ? e.v + offset[i + l] : zero;
    }
    stage_rows<D, T>(row, Items<T>::n, dim, stage);
    load_values<D>(row, dim, v + i / Items<T>::n * wide);
  }
}

PL_INLINE V times_zero(const float* p, V sum) { return vfma(vload(p), vzero(), sum); }
#if PL_BF16
PL_INLINE V times_zero(const Pair* p, V sum) {
  const V x = lanes_of(p);
  return vfma(vfirst_bf16(x), vzero(), vfma(vsecond_bf16(x), vzero(), sum));
}
#endif

// No NaN and no infinity among n items.
template <class T> bool all_finite(const T* v, int64_t n) {
  V sum = vzero();
  for (int64_t i = 0; i < n; i += 16) sum = times_zero(v + i, sum);
  return vsum(sum) == 0.0f;
}

}  // namespace
}  // namespace PL_ISA
}  // namespace paceline
