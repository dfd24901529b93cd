// The running softmax: weights of a block, the state they are summed up in, and how states join.
#pragma once
#include "attention_product.h"
#include "paceline/math.h"

namespace paceline {
namespace PL_ISA {
namespace {

// Softmax in progress of some pairs (row, query head): values (pairs, wide), lane sums (pairs, 16), both times 2^-max; -inf: nothing
// seen.
struct State { float *acc, *sum, *max; };

// How far scores may lie above the number that is taken for their maximum before sums are scaled down. For pairs that hardly happens
// after the first block; else it is a branch that nobody can predict.
template <class T> constexpr float slack() { return Items<T>::n == 2 ? 8.0f : 0.0f; }

// Weights 2^(s - max) of N groups of sixteen keys, exactly 0 where bits say unseen; stored, and added to `sum` as stored.
template <int N> PL_INLINE void exponentiate(const float* s, uint64_t bits, float max, float* w, float* sum) {
  V total = vload(sum);
#pragma GCC unroll 4
  for (int t = 0; t < N; ++t) {
    const V x = vpick(static_cast<uint32_t>(bits >> 16 * t & 0xffff), vsub(vload(s + 16 * t), vset(max)), vset(-__builtin_inff()));
    const V y = vexp2_below0(x);
    vstore(w + 16 * t, y);
    total = vadd(total, y);
  }
  vstore(sum, total);
}

#if PL_BF16
// For pairs 2^x is 2^n P(x - n), n the nearest integer: within 3e-6, a thousandth of what the rounding to bfloat16 (ties away from 0)
// loses; below -120 it is 2^-120. n comes from the last bits of x + 1.5 * 2^23.
PL_INLINE __m512i rounded_exp2(__m512 x, __mmask16 seen) {
  constexpr float c[] = {0.9999992847442627f, 0.6931217908859253f, 0.240247443318367f, 0.05591785907745361f, 0.009570102207362652f};
  const __m512 magic = _mm512_set1_ps(12582912.0f), z = _mm512_max_ps(_mm512_set1_ps(-120.0f), x), t = _mm512_add_ps(z, magic);
  const V f = {_mm512_sub_ps(z, _mm512_sub_ps(t, magic))};
  const __m512i p = _mm512_add_epi32(_mm512_castps_si512(horner(f, c).v), _mm512_set1_epi32(0x8000));
  const __m512i y = _mm512_add_epi32(p, _mm512_slli_epi32(_mm512_castps_si512(t), 23));
  return _mm512_maskz_and_epi32(seen, y, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}

alignas(64) constexpr uint16_t kUpperHalves[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                   33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};

template <int N> PL_INLINE void exponentiate(const float* s, uint64_t bits, float max, Pair* w, float* sum) {
  const __m512i upper = _mm512_load_si512(kUpperHalves);
  __m512 total = _mm512_loadu_ps(sum);
  __m512i y[N + 1];
#pragma GCC unroll 4
  for (int t = 0; t < N; ++t) {
    y[t] = rounded_exp2(_mm512_sub_ps(_mm512_loadu_ps(s + 16 * t), _mm512_set1_ps(max)), static_cast<__mmask16>(bits >> 16 * t));
    total = _mm512_add_ps(total, _mm512_castsi512_ps(y[t]));
  }
  y[N] = y[N - 1];
#pragma GCC unroll 4
  for (int t = 0; t < N; t += 2) {  // the upper halves of two groups
    const __m512i both = _mm512_permutex2var_epi16(y[t], upper, y[t + 1]);
    if (t + 1 < N) _mm512_storeu_si512(w + 8 * t, both);
    else _mm256_storeu_si256(reinterpret_cast<__m256i*>(w + 8 * t), _mm512_castsi512_si256(both));
  }
  _mm512_storeu_ps(sum, total);
}
#endif

// The running maximum of one pair takes in N groups of scores, which are capped in place; what came before is scaled to it.
template <class T, int N> PL_INLINE void raise(float* s, uint64_t bits, float cap, int64_t wide, float* acc, float* sum, float* max) {
  const V none = vset(-__builtin_inff());
  V top = none;
#pragma GCC unroll 4
  for (int t = 0; t < N; ++t) {
    V x = vload(s + 16 * t);
    if (cap != 0.0f) vstore(s + 16 * t, x = vmul(vtanh(x), vset(cap)));
    top = vmax(top, vpick(static_cast<uint32_t>(bits >> 16 * t & 0xffff), x, none));
  }
  const float best = vhmax(top), old = *max;
  if (!(old + slack<T>() < best)) return;
  *max = best;
  if (old == -__builtin_inff()) return;  // before the first key there is nothing to scale
  const V shrink = vexp2_below0(vset(old - best));
  vstore(sum, vmul(vload(sum), shrink));
  for (int64_t d = 0; d < wide; d += 16) vstore(acc + d, vmul(vload(acc + d), shrink));
}

// Scores of m pairs (m, 64), from pair p of the state on, at N groups -> weights w, `stride` items from one pair to the next. bits[i]:
// the keys that pair i sees; where there are none its weights are 0. All maxima first: the pairs' chains of operations overlap.
template <class T, int N>
void weigh_groups(float* s, int64_t p, int64_t m, const uint64_t* bits, float cap, int64_t wide, T* w, int64_t stride, const State& state, Ahead& ahead) {
  for (int64_t i = 0; i < m; ++i)
    if (bits[i]) raise<T, N>(s + i * kBlock, bits[i], cap, wide, state.acc + (p + i) * wide, state.sum + (p + i) * 16, state.max + p + i);
  const int64_t share = Ahead::share(m);
  for (int64_t i = 0; i < m; ++i) {
    ahead.more(share);
    if (bits[i]) exponentiate<N>(s + i * kBlock, bits[i], state.max[p + i], w + i * stride, state.sum + (p + i) * 16);
    else memset(w + i * stride, 0, static_cast<size_t>(16 * N / Items<T>::n) * sizeof(T));
  }
}

template <class T>
PL_INLINE void weigh(float* s, int64_t p, int64_t m, const uint64_t* bits, int n_groups, float cap, int64_t wide, T* w, int64_t stride, const State& state, Ahead& ahead) {
  switch (n_groups) {
    case 4: return weigh_groups<T, 4>(s, p, m, bits, cap, wide, w, stride, state, ahead);
    case 3: return weigh_groups<T, 3>(s, p, m, bits, cap, wide, w, stride, state, ahead);
    case 2: return weigh_groups<T, 2>(s, p, m, bits, cap, wide, w, stride, state, ahead);
    default: return weigh_groups<T, 1>(s, p, m, bits, cap, wide, w, stride, state, ahead);
  }
}

inline void clear(const State& s, int64_t pairs, int64_t wide) {
  memset(s.acc, 0, static_cast<size_t>(pairs * wide) * 4);
  memset(s.sum, 0, static_cast<size_t>(pairs) * 64);
  for (int64_t p = 0; p < pairs; ++p) s.max[p] = -__builtin_inff();
}

// `to` followed by `from`.
inline void merge(const State& to, const State& from, int64_t pairs, int64_t wide) {
  for (int64_t p = 0; p < pairs; ++p) {
    if (from.max[p] == -__builtin_inff()) continue;
    float *acc = to.acc + p * wide, *sum = to.sum + 16 * p;
    const float *acc2 = from.acc + p * wide, *sum2 = from.sum + 16 * p;
    if (to.max[p] == -__builtin_inff()) {
      memcpy(acc, acc2, static_cast<size_t>(wide) * 4);
      memcpy(sum, sum2, 64);
      to.max[p] = from.max[p];
      continue;
    }
    const float m = to.max[p] > from.max[p] ? to.max[p] : from.max[p];
    const V x = vexp2_below0(vset(to.max[p] - m)), y = vexp2_below0(vset(from.max[p] - m));
    for (int64_t d = 0; d < wide; d += 16) vstore(acc + d, vfma(vload(acc2 + d), y, vmul(vload(acc + d), x)));
    vstore(sum, vfma(vload(sum2), y, vmul(vload(sum), x)));
    to.max[p] = m;
  }
}

}  // namespace
}  // namespace PL_ISA
}  // namespace paceline
