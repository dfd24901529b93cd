// A mixture of gated MLPs, experts resident.
//
//     p = softmax(router);  E = the n_active largest p, descending (ties: lower id);  w_e = p_e, or p_e / sum of E when normalised
//     y = sum_{e in E} w_e down_e (act(gate_e x) * up_e x)
//
// Rows are gathered by expert, so that every expert that is used reads its weights once; then each row adds its experts in
// descending order of weight. Bytes: the weights of the experts used, and about 8 (3 d + 3 d_ff) per row and active expert; FLOPs:
// 6 d d_ff per row and active expert. Same bits for a row whatever the other rows: linear and gated keep that, and the sum's order is
// the row's own.
#include "paceline/math.h"

namespace paceline {
namespace PL_ISA {
namespace {

// Router logits of one row -> ids and weights (n_active). Scratch p: n rounded up to lanes. NaN logits give NaN weights of valid experts.
void route(const float* logits, int64_t n, int64_t n_active, bool normalise, float* p, int32_t* ids, float* weights) {
  const int64_t wide = round_up(n, 16);
  for (int64_t i = 0; i < wide; ++i) p[i] = i < n ? logits[i] : -__builtin_inff();
  V top = vload(p);
  for (int64_t i = 16; i < wide; i += 16) top = vmax(top, vload(p + i));
  const V best = vset(vhmax(top));
  V total = vzero();
  for (int64_t i = 0; i < wide; i += 16) {
    const V e = vexp(vsub(vload(p + i), best));
    vstore(p + i, e);
    total = vadd(total, e);
  }
  const float sum = vsum(total);
  for (int64_t i = 0; i < n; ++i) p[i] /= sum;
  float chosen = 0.0f;
  for (int64_t a = 0; a < n_active; ++a) {
    int64_t id = -1;
    for (int64_t i = 0; i < n; ++i) {
      bool taken = false;
      for (int64_t b = 0; b < a; ++b) taken |= ids[b] == i;
      if (!taken && (id < 0 || p[i] > p[id])) id = i;
    }
    ids[a] = static_cast<int32_t>(id);
    weights[a] = p[id];
    chosen += p[id];
  }
  for (int64_t a = 0; a < n_active && normalise; ++a) weights[a] /= chosen;
}

// Where each (row, place) goes when grouped by expert: at[row * n_active + place]; cu (n_experts + 1); `rows` the row of each.
void group_by_expert(const int32_t* ids, int64_t n_rows, const MoeArgs& a, int32_t* cu, int32_t* at, int32_t* rows) {
  const int64_t n = n_rows * a.n_active;
  for (int32_t e = 0; e <= a.n_experts; ++e) cu[e] = 0;
  for (int64_t i = 0; i < n; ++i) ++cu[ids[i] + 1];
  for (int32_t e = 0; e < a.n_experts; ++e) cu[e + 1] += cu[e];
  for (int64_t i = 0; i < n; ++i) {
    at[i] = cu[ids[i]]++;
    rows[at[i]] = static_cast<int32_t>(i / a.n_active);
  }
  for (int32_t e = a.n_experts; e > 0; --e) cu[e] = cu[e - 1];
  cu[0] = 0;
}

void combine(const MoeArgs& a, int64_t r, const float* y, const int32_t* at, const float* weights) {
  const int64_t d = a.out.cols;
  float* out = a.out.row(r);
  for (int64_t i = 0; i < d; i += 16) {
    const int64_t n = min_of<int64_t>(16, d - i);
    V s = vmul(vload(y + at[0] * d + i, n), vset(weights[0]));
    for (int32_t j = 1; j < a.n_active; ++j) s = vadd(s, vmul(vload(y + at[j] * d + i, n), vset(weights[j])));
    vstore(out + i, s, n);
  }
}

void moe(const Ctx& c, const MoeArgs& a) {
  const int64_t n_rows = c.n_rows, n = n_rows * a.n_active, d = a.x.cols, d_ff = a.down[0].n_in;
  auto *ids = take<int32_t>(c, n), *at = take<int32_t>(c, n), *rows = take<int32_t>(c, n), *cu = take<int32_t>(c, a.n_experts + 1);
  float *weights = take<float>(c, n), *p = take<float>(c, round_up(a.n_experts, 16));
  for (int64_t r = 0; r < n_rows; ++r)
    route(a.router.row(r), a.n_experts, a.n_active, a.normalise, p, ids + r * a.n_active, weights + r * a.n_active);
  group_by_expert(ids, n_rows, a, cu, at, rows);
  int64_t most = 0;
  for (int32_t e = 0; e < a.n_experts; ++e) most = max_of<int64_t>(most, cu[e + 1] - cu[e]);
  float* y = take<float>(c, n * a.out.cols);
  const Mat x = {take<float>(c, most * d), d, d}, h = {take<float>(c, most * 2 * d_ff), 2 * d_ff, 2 * d_ff};
  const Mat g = {take<float>(c, most * d_ff), d_ff, d_ff};
  for (int32_t e = 0; e < a.n_experts; ++e) {
    Ctx own = c;
    own.step = nullptr, own.n_rows = cu[e + 1] - cu[e];
    if (own.n_rows == 0) continue;
    c.kernels->gather(own, {a.x, x, rows + cu[e], own.n_rows});
    c.kernels->linear(own, {x, h, a.gate_up[e], nullptr});
    c.kernels->gated(own, {h, g, a.kind});
    c.kernels->linear(own, {g, {y + cu[e] * a.out.cols, a.out.cols, a.out.cols}, a.down[e], nullptr});
  }
  const int64_t step = max_of<int64_t>(1, (1 << 15) / (d * a.n_active));
  parallel(c, ceil_div(n_rows, step), [&](int64_t task, int) {
    for (int64_t r = task * step; r < min_of(n_rows, (task + 1) * step); ++r) combine(a, r, y, at + r * a.n_active, weights + r * a.n_active);
  });
}

}  // namespace

void fill_moe(Kernels& k) { k.moe = moe; }

}  // namespace PL_ISA
}  // namespace paceline
