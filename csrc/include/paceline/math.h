// Elementary functions on sixteen lanes; relative errors of 1 to 3 units in the last place, the same bits on every instruction set.
// Polynomials are our own minimax fits (Remez). NaN in, NaN out; results below the smallest normal number become 0.
#pragma once
#include "paceline/vec.h"

namespace paceline {
namespace PL_ISA {

template <int N> PL_INLINE V horner(V x, const float (&c)[N]) {  // c[0] + c[1] x + ...
  V p = vset(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) p = vfma(p, x, vset(c[i]));
  return p;
}

// 2^x for x <= 0 (-inf gives exactly 0, 0 exactly 1): 2^n (1 + f P(f)), x = n + f.
PL_INLINE V vexp2_below0(V x) {
  constexpr float c[] = {0.6931471824645996f,   0.24022650718688965f,   0.055503301322460175f,
                         0.009618005715310574f, 0.0013399614254012704f, 0.00015475905092898756f};
  const V z = vmax(vset(-126.0f), x), n = vround(z), f = vsub(z, n);
  return vless(x, vset(-126.0f), vzero(), vscale2(vfma(f, horner(f, c), vset(1.0f)), n));
}

// e^x: 2^n e^r, r = x - n ln 2 in two parts, e^r = 1 + r + r^2 P(r).
PL_INLINE V vexp(V x) {
  constexpr float low = -87.33654f, high = 88.72283f;
  constexpr float c[] = {0.5f, 0.1666651964187622f, 0.04166620597243309f, 0.008368875831365585f, 0.001395046478137374f};
  const V z = vmin(vset(high), vmax(vset(low), x)), n = vround(vmul(z, vset(1.44269504f)));
  const V r = vfma(n, vset(2.12194440e-4f), vfma(n, vset(-0.693359375f), z));
  const V e = vscale2(vadd(vfma(vmul(r, r), horner(r, c), r), vset(1.0f)), n);
  return vless(x, vset(low), vzero(), vless(vset(high), x, vset(__builtin_inff()), e));
}

// Below 0.625: x + x^3 P(x^2); above: 1 - 2 / (e^2x + 1).
PL_INLINE V vtanh(V x) {
  constexpr float c[] = {-0.3333328366279602f, 0.13331492245197296f, -0.053743552416563034f, 0.02065066620707512f, -0.0057170516811311245f};
  const V a = vabs(x), t = vmul(x, x);
  const V small = vfma(vmul(x, t), horner(t, c), x);
  const V large = vsub(vset(1.0f), vdiv(vset(2.0f), vadd(vexp(vadd(a, a)), vset(1.0f))));
  return vless(a, vset(0.625f), small, vless(x, vzero(), vsub(vzero(), large), large));
}

// erf(x) for |x| <= 1: x P(x^2).
PL_INLINE V verf_small(V x) {
  constexpr float c[] = {1.1283791065216064f,    -0.3761262595653534f,   0.11283600330352783f,  -0.026854440569877625f,
                         0.0051895263604819775f, -0.0008020751411095262f, 7.888792606536299e-05f};
  return vmul(x, horner(vmul(x, x), c));
}

// The upper tail of the normal distribution, erfc(x / sqrt 2) / 2, for x >= 1.4: e^(-x^2 / 2) t P(t), t = 1 / (x / sqrt 2 + 2). What
// the square loses in rounding is put right, so the relative error stays small far out.
PL_INLINE V vnormal_tail(V x) {
  constexpr float c[] = {0.564197301864624f,  1.128138542175293f, 1.9760370254516602f,  2.857630968093872f,
                         1.9663957357406616f, 5.236450672149658f, -28.898887634277344f, 23.894155502319336f};
  const V near = vmin(vset(1e18f), x), t = vdiv(vset(1.0f), vfma(near, vset(0.70710678f), vset(2.0f)));
  const V square = vmul(near, near), lost = vfma(near, near, vsub(vzero(), square));
  const V e = vexp(vmul(square, vset(-0.5f))), scale = vfma(lost, vset(-0.5f), vset(1.0f));
  return vless(vset(14.0f), x, vzero(), vmul(vmul(e, scale), vmul(vset(0.5f), vmul(t, horner(t, c)))));
}

// x Phi(x), Phi the normal distribution function: accurate in both tails.
PL_INLINE V vgelu(V x) {
  const V z = vmul(x, vset(0.70710678f)), a = vabs(x);
  const V near = vfma(verf_small(z), vset(0.5f), vset(0.5f));
  const V tail = vnormal_tail(vmax(vset(1.4f), a));
  const V far = vless(x, vzero(), tail, vsub(vset(1.0f), tail));
  return vmul(x, vless(a, vset(1.414f), near, far));
}

PL_INLINE V vsigmoid_times(V x, V y) { return vdiv(x, vadd(vset(1.0f), vexp(vsub(vzero(), y)))); }  // x / (1 + e^-y)
PL_INLINE V vsilu(V x) { return vsigmoid_times(x, x); }

// x / 2 (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
PL_INLINE V vgelu_tanh(V x) {
  const V cubic = vfma(vmul(vmul(x, x), x), vset(0.044715f), x);
  return vsigmoid_times(x, vmul(cubic, vset(1.5957691216f)));
}

PL_INLINE V vrelu(V x) { return vless(x, vzero(), vzero(), x); }

}  // namespace PL_ISA
}  // namespace paceline
