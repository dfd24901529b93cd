// The running softmax: weights of a block, the state they are summed up in, and how states join.
#pragma once
#include "attention_product.h"
#include "paceline/math.h"

namespace paceline {
namespace PL_ISA {
namespace {

// Softmax in progress of some pairs (row, query head): values (pairs, wide), lane sums (pairs, 16), maxima in units of log 2 (-inf:
// nothing seen).
struct State { float *acc, *sum, *max; };

// 2^x for x <= 0, for weights of type T; -inf gives exactly 0, 0 exactly 1.
template <class T> PL_INLINE V exp2_weight(V x) { return vexp2_below0(x); }
#if PL_BF16
// 2^floor(x) P(x - floor(x)): within 3e-6, a thousandth of what the rounding to bfloat16 loses.
template <> PL_INLINE V exp2_weight<Pair>(V x) {
  constexpr float c[] = {1.0f, 0.6930448412895203f, 0.2412802129983902f, 0.052242472767829895f, 0.013426685705780983f};
  const V f = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};  // of -inf: 0
  return {_mm512_scalef_ps(horner(f, c).v, x.v)};
}
#endif

// Stores sixteen weights; returns them as stored, since only those that multiply the values may be summed up.
PL_INLINE V store_weights(float* to, V x) {
  vstore(to, x);
  return x;
}
#if PL_BF16
PL_INLINE V store_weights(Pair* to, V x) {
  const __m256i h = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), h);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
#endif

// Scores of one pair at N groups of sixteen keys -> weights, exactly 0 where bits say unseen. Scales what came before.
template <class T, int N> void weigh_groups(const float* s, uint64_t bits, float cap, int64_t wide, T* w, float* acc, float* sum, float* max) {
  const V none = vset(-__builtin_inff());
  V x[N], top = none;
#pragma GCC unroll 4
  for (int t = 0; t < N; ++t) {
    x[t] = vload(s + 16 * t);
    if (cap != 0.0f) x[t] = vmul(vtanh(x[t]), vset(cap));
    const auto b = static_cast<uint32_t>(bits >> 16 * t & 0xffff);
    if (b != 0xffff) x[t] = vpick(b, x[t], none);
    top = vmax(top, x[t]);
  }
  const float best = vhmax(top), m = *max < best ? best : *max;
  V total = vload(sum);
  if (m != *max) {  // otherwise the factor is 1; before the first key there is nothing to scale
    if (*max != -__builtin_inff()) {
      const V shrink = vexp2_below0(vset(*max - m));
      total = vmul(total, shrink);
      for (int64_t d = 0; d < wide; d += 16) vstore(acc + d, vmul(vload(acc + d), shrink));
    }
    *max = m;
  }
#pragma GCC unroll 4
  for (int t = 0; t < N; ++t) total = vadd(total, store_weights(w + 16 / Items<T>::n * t, exp2_weight<T>(vsub(x[t], vset(m)))));
  vstore(sum, total);
}

// The same for n_groups groups; a pair that sees none of their keys has weights of 0.
template <class T> PL_INLINE void weigh(const float* s, uint64_t bits, int n_groups, float cap, int64_t wide, T* w, float* acc, float* sum, float* max) {
  if (!bits) {
    memset(w, 0, static_cast<size_t>(n_groups * 16 / Items<T>::n) * sizeof(T));
    return;
  }
  switch (n_groups) {
    case 4: return weigh_groups<T, 4>(s, bits, cap, wide, w, acc, sum, max);
    case 3: return weigh_groups<T, 3>(s, bits, cap, wide, w, acc, sum, max);
    case 2: return weigh_groups<T, 2>(s, bits, cap, wide, w, acc, sum, max);
    default: return weigh_groups<T, 1>(s, bits, cap, wide, w, acc, sum, max);
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
