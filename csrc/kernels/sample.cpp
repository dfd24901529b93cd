// Choosing tokens: `sample` and `logprobs` over rows of logits (n_rows, n_vocab), contiguous float32.
//
//     w_i = e^((x_i - max) / temperature)        in descending order (ties: lower id) cut to top_k, then to the shortest prefix with
//     mass >= top_p of that, then to w >= min_p; the id at which the cumulative mass first exceeds u of what is left.
//
// No sort: every cut is a prefix of the descending order, and a weighted quickselect finds where a prefix reaches a mass. It works on
// candidates: one pass over the row weighs what lies within 0.5, 1.5, 4, 8 and 14 units of the maximum, the next collects the smallest such
// set that is certain to hold the answer. Two or three passes of 4 bytes and about 30 FLOP per token of vocabulary, one thread per
// row. Weights are float32 (relative error below 2e-6), sums run in float64 in an order fixed by the row alone.
#include "paceline/math.h"

namespace paceline {
namespace PL_ISA {
namespace {

constexpr float kLog2e = 1.44269504f, kGreedyBelow = 1e-5f;
constexpr int64_t kBlock = 1024;
constexpr int kLevels = 5;
constexpr float kLevel[kLevels] = {-0.5f * kLog2e, -1.5f * kLog2e, -4.0f * kLog2e, -8.0f * kLog2e, -14.0f * kLog2e};
constexpr double kMargin = 1.0 + 1e-5;  // masses of a pass (float32 within a block) and of candidates (float64) differ by less

PL_INLINE V load_to(const float* x, int64_t i, int64_t n) {  // -inf beyond the end
  if (n - i >= 16) return vload(x + i);
  float t[16];
  for (int64_t j = 0; j < 16; ++j) t[j] = i + j < n ? x[i + j] : -__builtin_inff();
  return vload(t);
}

struct Top {
  float max;
  int64_t at;  // lowest place of the maximum; -1 where the row has NaN or +inf, or -inf only
};

Top top_of(const float* x, int64_t n) {
  Top top = {-__builtin_inff(), -1};
  V bad = vzero();  // turns NaN with the first NaN or +inf
  for (int64_t b = 0; b < n; b += kBlock) {
    V m = vset(-__builtin_inff());
    for (int64_t i = b; i < min_of(n, b + kBlock); i += 16) {
      const V v = load_to(x, i, n), finite = vmax(vset(-3.4e38f), v);
      bad = vadd(bad, vsub(finite, finite));
      m = vmax(m, v);
    }
    const float best = vhmax(m);
    if (best > top.max) top = {best, b};
  }
  const float check = vsum(bad);
  if (check != check || top.at < 0) return {top.max, -1};
  while (x[top.at] != top.max) ++top.at;
  return top;
}

// Logits as exponents of two below the maximum.
struct Scaled {
  const float* x;
  int64_t n;
  V max, factor;
  V at(int64_t i) const { return vmul(vsub(load_to(x, i, n), max), factor); }
};

Scaled scaled(const float* x, int64_t n, float max, float temperature) {
  return {x, n, vset(max), vset(max_of(kLog2e / temperature, 1e-37f))};
}

struct Mass { double all, level[kLevels]; };

double total_of(V v) {
  float lanes[16];
  vlanes(v, lanes);
  double s = 0;
  for (float f : lanes) s += static_cast<double>(f);
  return s;
}

// What lies at or above each level: weights, or (counted) how many.
template <bool kCounted> Mass weigh(const Scaled& s) {
  Mass m = {};
  for (int64_t b = 0; b < s.n; b += kBlock) {
    V all = vzero(), level[kLevels];
    for (V& l : level) l = vzero();
    for (int64_t i = b; i < min_of(s.n, b + kBlock); i += 16) {
      const V d = s.at(i), w = kCounted ? vset(1.0f) : vexp2_below0(d);
      all = vadd(all, w);
#pragma GCC unroll 8
      for (int l = 0; l < kLevels; ++l) level[l] = vadd(level[l], vless(d, vset(kLevel[l]), vzero(), w));
    }
    m.all += total_of(all);
    for (int l = 0; l < kLevels; ++l) m.level[l] += total_of(level[l]);
  }
  return m;
}

float level_for(const Mass& m, double need, float lowest) {
  for (int l = 0; l < kLevels; ++l)
    if (m.level[l] >= need) return kLevel[l];
  return lowest;
}

struct Item {
  float x, w;
  int32_t id;
};

PL_INLINE bool before(const Item& a, const Item& b) { return a.x > b.x || (a.x == b.x && a.id < b.id); }

// Everything at or above `level`.
int64_t collect(const Scaled& s, float level, Item* out) {
  int64_t n = 0;
  for (int64_t i = 0; i < s.n; i += 64) {
    V d[4], top = vset(-__builtin_inff());
    const int parts = static_cast<int>(min_of<int64_t>(4, ceil_div(s.n - i, 16)));
    for (int u = 0; u < parts; ++u) {
      d[u] = s.at(i + 16 * u);
      top = vmax(top, d[u]);
    }
    if (!(vhmax(top) >= level)) continue;
    for (int u = 0; u < parts; ++u) {
      float lanes[16], w[16];
      vlanes(d[u], lanes);
      vlanes(vexp2_below0(d[u]), w);
      for (int64_t j = i + 16 * u, l = 0; l < 16 && j < s.n; ++l, ++j)
        if (lanes[l] >= level) out[n++] = {s.x[j], w[l], static_cast<int32_t>(j)};
    }
  }
  return n;
}

// Puts a pivot chosen by `seed` where it belongs in the order; returns its place.
int64_t partition(Item* it, int64_t lo, int64_t hi, uint64_t& seed) {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  const int64_t at = lo + static_cast<int64_t>((seed >> 33) % static_cast<uint64_t>(hi - lo));
  const Item pivot = it[at];
  it[at] = it[hi - 1];
  int64_t p = lo;
  for (int64_t i = lo; i < hi - 1; ++i) {
    const Item x = it[i];
    const bool first = before(x, pivot);
    it[i] = it[p];
    it[p] = x;
    p += first;
  }
  it[hi - 1] = it[p];
  it[p] = pivot;
  return p;
}

// Reorders so that the first m items are the shortest prefix of the descending order with mass >= target (beyond it when `strictly`);
// item m - 1 is the last of them. At least one; all where the mass does not suffice. `counted`: every item weighs 1.
int64_t prefix(Item* it, int64_t n, double target, bool strictly, bool counted) {
  const auto reached = [&](double mass) { return strictly ? mass > target : mass >= target && mass > 0; };
  const auto weight = [&](const Item& i) { return counted ? 1.0 : static_cast<double>(i.w); };
  int64_t lo = 0, hi = n;
  double below = 0;
  uint64_t seed = static_cast<uint64_t>(n);
  while (lo < hi) {
    const int64_t p = partition(it, lo, hi, seed);
    double mass = below;
    for (int64_t i = lo; i < p; ++i) mass += weight(it[i]);
    if (reached(mass)) {
      hi = p;
    } else if (reached(mass += weight(it[p]))) {
      return p + 1;
    } else {
      below = mass, lo = p + 1;
    }
  }
  return lo;
}

void sort(Item* it, int64_t lo, int64_t hi, uint64_t& seed) {
  while (hi - lo > 1) {
    const int64_t p = partition(it, lo, hi, seed);
    if (p - lo < hi - p - 1) {
      sort(it, lo, p, seed);
      lo = p + 1;
    } else {
      sort(it, p + 1, hi, seed);
      hi = p;
    }
  }
}

double mass_of(const Item* it, int64_t n) {
  double s = 0;
  for (int64_t i = 0; i < n; ++i) s += static_cast<double>(it[i].w);
  return s;
}

struct Cuts { float temperature; int64_t top_k; double top_p, min_p, u; };

constexpr float kLowest = -126.0f;  // below: no weight

int64_t draw(const float* x, int64_t n, const Cuts& c, Item* it) {
  const Top top = top_of(x, n);
  if (top.at < 0 || !(c.temperature >= kGreedyBelow) || c.top_k == 1) return top.at;
  const Scaled s = scaled(x, n, top.max, c.temperature);
  int64_t m;
  double mass = 0;  // of what the cuts so far leave; 0: of the candidates
  if (c.top_k > 0 && c.top_k < n) {
    const auto k = static_cast<double>(c.top_k);
    m = collect(s, level_for(weigh<true>(s), k, kLowest), it);
    m = prefix(it, m, k, false, true);
    mass = mass_of(it, m);
  } else if (c.top_p < 1.0 || c.min_p <= 0.0) {
    const Mass w = weigh<false>(s);
    mass = w.all;
    m = collect(s, level_for(w, mass * (c.top_p < 1.0 ? c.top_p : c.u) * kMargin, kLowest), it);
  } else {
    m = collect(s, max_of(kLowest, static_cast<float>(__builtin_log2(c.min_p)) - 1e-3f), it);
  }
  if (c.top_p < 1.0) {
    m = prefix(it, m, c.top_p * mass, false, false);
    mass = mass_of(it, m);
  }
  if (c.min_p > 0.0) {
    int64_t kept = 0;
    for (int64_t i = 0; i < m; ++i)
      if (static_cast<double>(it[i].w) >= min_of(c.min_p, 1.0)) it[kept++] = it[i];
    m = kept;
    mass = mass_of(it, m);
  }
  return it[prefix(it, m, c.u * mass, true, false) - 1].id;
}

void sample(const Ctx& c, const SampleArgs& a) {
  Item* items = take<Item>(c, a.n_vocab * pool_size(c.pool));
  parallel(c, c.n_rows, [&](int64_t r, int thread) {
    const Cuts cuts = {a.temperature[r], a.top_k[r], static_cast<double>(a.top_p[r]), static_cast<double>(a.min_p[r]), a.u[r]};
    a.out[r] = draw(a.logits + r * a.n_vocab, a.n_vocab, cuts, items + thread * a.n_vocab);
  });
}

void logprobs_row(const LogprobsArgs& a, int64_t r, Item* it) {
  const float* x = a.logits + r * a.n_vocab;
  int64_t* ids = a.top_ids + r * a.n_top;
  float* top = a.top + r * a.n_top;
  const Top best = top_of(x, a.n_vocab);
  if (best.at < 0) {
    a.own[r] = __builtin_nanf("");
    for (int64_t i = 0; i < a.n_top; ++i) ids[i] = i, top[i] = __builtin_nanf("");
    return;
  }
  const Scaled s = scaled(x, a.n_vocab, best.max, 1.0f);
  const Mass w = weigh<false>(s);
  const double norm = static_cast<double>(best.max) + __builtin_log(w.all);
  a.own[r] = static_cast<float>(static_cast<double>(x[a.ids[r]]) - norm);
  if (a.n_top == 0) return;
  const auto n = static_cast<double>(a.n_top);
  const int64_t m = prefix(it, collect(s, level_for(weigh<true>(s), n, -__builtin_inff()), it), n, false, true);
  uint64_t seed = 1;
  sort(it, 0, m, seed);
  for (int64_t i = 0; i < a.n_top; ++i) ids[i] = it[i].id, top[i] = static_cast<float>(static_cast<double>(it[i].x) - norm);
}

void logprobs(const Ctx& c, const LogprobsArgs& a) {
  Item* items = take<Item>(c, a.n_vocab * pool_size(c.pool));
  parallel(c, c.n_rows, [&](int64_t r, int thread) { logprobs_row(a, r, items + thread * a.n_vocab); });
}

}  // namespace

void fill_sample(Kernels& k) { k.sample = sample, k.logprobs = logprobs; }

}  // namespace PL_ISA
}  // namespace paceline
