// What is done to one row of activations, by itself or on the way into a linear.
//
// A row's sums run over four vectors of sixteen lanes in the order of its columns, so it has the same bits wherever it is computed.
#pragma once
#include "paceline/math.h"

namespace paceline {
namespace PL_ISA {
namespace {

// f(vectors) on every lane of a row; partial vectors see zeros.
template <class F> PL_INLINE void map(const float* x, float* out, int64_t n, F f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) vstore(out + i, f(vload(x + i), i));
  if (i < n) vstore(out + i, f(vload(x + i, n - i), i), n - i);
}

PL_INLINE V load_to(const float* p, int64_t i, int64_t n) { return n - i >= 16 ? vload(p + i) : vload(p + i, n - i); }

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

// Sum of f(x) over a row; f(0) must be 0 or `i` and `n` used to exclude what lies beyond.
template <class F> PL_INLINE float reduce(const float* x, int64_t n, F f) {
  V s[4] = {vzero(), vzero(), vzero(), vzero()};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) s[u] = f(vload(x + i + 16 * u), s[u]);
  for (int u = 0; i < n; i += 16, ++u) s[u] = f(load_to(x, i, n), s[u]);
  return vsum(vadd(vadd(s[0], s[1]), vadd(s[2], s[3])));
}

PL_INLINE float inverse_root(float x) { return 1.0f / __builtin_sqrtf(x); }

// y = x / sqrt(mean(x^2) + eps) * (offset + w)
PL_INLINE void rms_norm_run(const float* x, float* out, const float* weight, int64_t n, float eps, float offset) {
  const float mean = reduce(x, n, [](V v, V s) { return vfma(v, v, s); }) / static_cast<float>(n);
  const V inverse = vset(inverse_root(mean + eps)), plus = vset(offset);
  map(x, out, n, [&](V v, int64_t i) { return vmul(vmul(v, inverse), vadd(plus, load_to(weight, i, n))); });
}

template <class F> PL_INLINE void with_act(Act kind, F f) {
  switch (kind) {
    case Act::silu: return f([](V x) { return vsilu(x); });
    case Act::gelu: return f([](V x) { return vgelu(x); });
    case Act::gelu_tanh: return f([](V x) { return vgelu_tanh(x); });
    case Act::relu: return f([](V x) { return vrelu(x); });
  }
}

// act(gate) * up; x = [gate | up], n columns each
PL_INLINE void gated_row(const float* x, float* out, int64_t n, Act kind) {
  with_act(kind, [&](auto g) { map(x, out, n, [&](V v, int64_t i) { return vmul(g(v), load_to(x + n, i, n)); }); });
}

}  // namespace
}  // namespace PL_ISA
}  // namespace paceline
