// The matrix product of both halves of attention, C (m, 16 nv) = [C +] A (m, n) B (n, 16 nv) in float32, blocked for registers.
//
// An item of A and B is a float, or on bfloat16 instructions a Pair: two neighbouring dimensions or keys in one lane, both multiplied
// and added by one instruction at twice the rate. Items add in order, so a sum depends on its own row of A and column of B alone.
#pragma once
#include "attention_view.h"
#include "paceline/lanes.h"

namespace paceline {
namespace PL_ISA {
namespace {

struct Pair { uint32_t bits; };  // the first item in the low half

template <class T> struct Items;  // of a lane
template <> struct Items<float> { static constexpr int64_t n = 1; };
template <> struct Items<Pair> { static constexpr int64_t n = 2; };

PL_INLINE V lanes_of(const float* p) { return vload(p); }
PL_INLINE V all_of(const float* p) { return vset(*p); }
template <class T> PL_INLINE V multiply_add(V a, V b, V c) { return vfma(a, b, c); }

#if PL_BF16
PL_INLINE V lanes_of(const Pair* p) { return {_mm512_loadu_ps(p)}; }
PL_INLINE V all_of(const Pair* p) { return {_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(p->bits)))}; }
template <> PL_INLINE V multiply_add<Pair>(V a, V b, V c) {
  return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
#endif

template <class T, int MR, int NV>
void panel(const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, int64_t n, bool add, Ahead& ahead) {
  V s[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) s[i][j] = add ? vload(c + i * ldc + 16 * j) : vzero();
  for (int64_t k = 0; k < n; ++k) {
    if (k % 2) ahead.more(1);
    V x[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) x[j] = lanes_of(b + k * ldb + 16 * j);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const V y = all_of(a + i * lda + k);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) s[i][j] = multiply_add<T>(y, x[j], s[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) vstore(c + i * ldc + 16 * j, s[i][j]);
}

// Registers: MR * NV sums, NV loads and a broadcast.
constexpr int kRows = PL_AVX512 ? 6 : 4, kCols = PL_AVX512 ? 4 : 1;

template <class T, int NV>
void rows_of_panels(const T* a, int64_t lda, int64_t m, const T* b, int64_t ldb, float* c, int64_t ldc, int64_t n, bool add, Ahead& ahead) {
  if (m == kRows) return panel<T, kRows, NV>(a, lda, b, ldb, c, ldc, n, add, ahead);
  switch (m) {
    case 5: return panel<T, 5, NV>(a, lda, b, ldb, c, ldc, n, add, ahead);
    case 4: return panel<T, 4, NV>(a, lda, b, ldb, c, ldc, n, add, ahead);
    case 3: return panel<T, 3, NV>(a, lda, b, ldb, c, ldc, n, add, ahead);
    case 2: return panel<T, 2, NV>(a, lda, b, ldb, c, ldc, n, add, ahead);
    default: return panel<T, 1, NV>(a, lda, b, ldb, c, ldc, n, add, ahead);
  }
}

// m <= kRows
template <class T>
void vector_product(const T* a, int64_t lda, int64_t m, const T* b, int64_t ldb, int64_t nv, float* c, int64_t ldc, int64_t n, bool add,
                    Ahead& ahead) {
  for (; nv >= kCols; nv -= kCols, b += 16 * kCols, c += 16 * kCols) rows_of_panels<T, kCols>(a, lda, m, b, ldb, c, ldc, n, add, ahead);
  for (; nv > 0; --nv, b += 16, c += 16) rows_of_panels<T, 1>(a, lda, m, b, ldb, c, ldc, n, add, ahead);
}

}  // namespace
}  // namespace PL_ISA
}  // namespace paceline
