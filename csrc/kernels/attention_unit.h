// A unit of work on one block: scores, weights and sums of all its heads and pairs, on a thread's scratch.
#pragma once
#include "attention_amx.h"
#include "attention_blocks.h"
#include "attention_softmax.h"

namespace paceline {
namespace PL_ISA {
namespace {

// Pairs of a unit at most; up to how many keys are taken by rows on tiles; up to how many heads go together.
constexpr int64_t kPairs = 128, kByRows = 16, kFewPairs = 64;
constexpr float kLog2e = 1.44269504f;

struct Job {
  const AttentionArgs& a;
  const Step& step;
  int64_t wide;       // dim rounded up to lanes
  int64_t max_pairs, max_heads, state_floats, scratch_floats;  // of a unit
  float *parts, *scratch;
  int64_t n_query;    // query heads per KV head

  State state(float* p) const { return {p, p + max_pairs * wide, p + max_pairs * (wide + 16)}; }
};

// Pairs that pass over a block together.
constexpr int64_t kTilePanel = 32;
template <class T> constexpr int64_t panel_rows() { return PL_AMX && Items<T>::n == 2 ? kTilePanel : kRows; }

// Of one thread; sized for floats and for pairs.
struct Scratch {
  float *q, *kt, *v, *s, *w, *zero, *edge;
  float *qt, *stage, *st;  // few pairs on tiles: queries as columns, keys from several places or of codes, scores by key
  State chunk, total;
  int64_t pairs;  // of a head
  bool alone;     // one head: the rows behind its pairs, up to a multiple of 16, are nobody's
};

// Calls f(pointer, floats) for each part.
template <class F> void each_part(const Job& j, Scratch& s, F f) {
  const int64_t panel = PL_AMX ? kTilePanel : kRows, dim = round_up(j.a.dim, 32);
  f(&s.q, (j.max_pairs + panel) * dim);  // tiles read whole row blocks
  f(&s.kt, dim * kBlock);
  f(&s.v, kBlock * j.wide);
  f(&s.s, panel * kBlock);
  f(&s.w, (min_of(j.max_pairs, kPairs) + panel) * kBlock);
  f(&s.zero, dim);
  f(&s.edge, PL_AMX ? 16 * max_of(j.wide, kBlock) : 0);
  f(&s.qt, PL_AMX ? 8 * dim * j.max_heads : 0);
  f(&s.stage, PL_BF16 ? 4 * 8 * dim : 0);
  f(&s.st, PL_AMX ? 16 * kBlock : 0);
  f(&s.chunk.acc, j.state_floats);
  f(&s.total.acc, j.state_floats);
}

int64_t scratch_size(const Job& j) {
  Scratch s;
  int64_t total = 0;
  each_part(j, s, [&](float**, int64_t n) { total += round_up(n, 16); });
  return total;
}

Scratch scratch_of(const Job& j, int thread) {
  Scratch s;
  float* p = j.scratch + thread * j.scratch_floats;
  each_part(j, s, [&](float** at, int64_t n) { *at = p, p += round_up(n, 16); });
  s.chunk = j.state(s.chunk.acc), s.total = j.state(s.total.acc);
  return s;
}

template <class T>
PL_INLINE void product(const T* a, int64_t lda, int64_t m, const T* b, int64_t ldb, int64_t nv, float* c, int64_t ldc, int64_t n, bool add,
                       [[maybe_unused]] float* edge, Ahead& ahead) {
#if PL_AMX
  if constexpr (Items<T>::n == 2) {
    return tile_product({a, lda, b, ldb, c, ldc}, m, nv, n, add, edge);
  }
#endif
  vector_product(a, lda, m, b, ldb, nv, c, ldc, n, add, ahead);
}

// Units of at most 16 pairs on tiles take keys as they lie in the pool.
template <class T> PL_INLINE bool by_rows([[maybe_unused]] const Scratch& s) { return PL_AMX && Items<T>::n == 2 && s.pairs <= kByRows; }

#if PL_AMX
// The queries of a unit by rows, as columns.
void turn_queries(int64_t pairs, int64_t dim, const Pair* q, Pair* qt) {
  const int64_t stride = query_stride<Pair>(dim);
  for (int64_t d = 0; d < stride; d += 16) {
    V r[16];
    for (int64_t i = 0; i < 16; ++i) r[i] = i < pairs ? vload(reinterpret_cast<const float*>(q + i * stride + d)) : vzero();
    transpose16(r);
    for (int64_t i = 0; i < 16; ++i) vstore(reinterpret_cast<float*>(qt + (d + i) * 16), r[i]);
  }
}

// Sixteen keys where they lie side by side and fill whole steps, else copied to `stage`, with zeros for what is missing.
template <Dtype D> KeyRows key_rows(const Entries& e, const int64_t* offset, int64_t dim, Pair* stage) {
  bool together = D == Dtype::bf16 && dim % 32 == 0 && offset[0] >= 0;
  for (int i = 1; i < 16; ++i) together &= offset[i] - offset[0] == i * e.row_bytes;
  if (together) return {e.k + offset[0], e.row_bytes};
  const int64_t stride = query_stride<Pair>(dim);
  for (int i = 0; i < 16; ++i) {
    memset(stage + i * stride, 0, static_cast<size_t>(stride) * 4);
    if (offset[i] < 0) continue;
    if (D == Dtype::i8) unpack_codes(e.k + offset[i], dim, reinterpret_cast<uint16_t*>(stage + i * stride));
    else memcpy(stage + i * stride, e.k + offset[i], static_cast<size_t>(e.row_bytes));
  }
  publish(stage);
  return {reinterpret_cast<const char*>(stage), stride * 4};
}

// Scores of all the unit's pairs at a block's keys, (pairs, 64).
template <Dtype D> void scores_by_rows(const Job& j, const Entries& e, const int64_t* offset, uint64_t seen, const Scratch& s, Ahead& ahead) {
  const Groups g = groups_of<Pair>(seen);
  KeyRows keys[4];
  const int64_t stride = query_stride<Pair>(j.a.dim);
  for (int t = g.begin; t < g.end; ++t) {
    keys[t] = key_rows<D>(e, offset + 16 * t, j.a.dim, reinterpret_cast<Pair*>(s.stage) + t * 16 * stride);
  }
  tile_scores(keys, g.begin, g.end, reinterpret_cast<const Pair*>(s.qt), stride / 16, s.st, ahead);
  for (int t = g.begin; t < g.end; ++t) {
    V r[16];
    ahead.until(Ahead::kLoaded / 2 + Ahead::kLoaded / 8 * t);
    for (int i = 0; i < 16; ++i) r[i] = vload(s.st + (16 * t + i) * 16);
    transpose16(r);
    for (int64_t i = 0; i < s.pairs; ++i) vstore(s.s + i * kBlock + 16 * t, r[i]);
  }
}
#endif

// A block as some of the unit's rows see it, the same for all its heads: rows [begin, end), bits[r]: the keys that row r sees.
struct View {
  const int64_t* offset;
  const uint64_t* bits;
  int64_t begin, end;
  uint64_t seen = 0, by_all = ~uint64_t{0};

  View(const int64_t* offset, const uint64_t* bits, int64_t r0, int64_t r1) : offset(offset), bits(bits), begin(r0), end(r1) {
    while (begin < end && !bits[begin]) ++begin;
    while (begin < end && !bits[end - 1]) --end;
    for (int64_t r = begin; r < end; ++r) seen |= bits[r], by_all &= bits[r];
  }
};

// m pairs from pair p on, and the groups of keys that any of them sees.
template <class T> struct Panel {
  int64_t p, m;
  Groups g = {0, 0};

  Panel(const Job& j, const View& view, int64_t p, int64_t m) : p(p), m(m) {
    uint64_t seen = 0;
    for (int64_t r = p / j.n_query; r <= (p + m - 1) / j.n_query; ++r) seen |= view.bits[r];
    if (seen) g = groups_of<T>(seen);
  }
  bool empty() const { return g.end == 0; }
  int64_t first() const { return 16 / Items<T>::n * g.begin; }  // items of the block's keys
  int64_t items() const { return 16 / Items<T>::n * (g.end - g.begin); }
};

template <class T, class F> PL_INLINE void each_panel(const Job& j, const View& view, int64_t r0, int64_t r1, F f) {
  for (int64_t p = r0 * j.n_query, end = r1 * j.n_query; p < end; p += panel_rows<T>()) {
    const Panel<T> panel(j, view, p, min_of(panel_rows<T>(), end - p));
    if (!panel.empty()) f(panel);
  }
}

// How many rows a product may write for m pairs of a unit from p on.
template <class T> PL_INLINE int64_t padded(const Scratch& s, int64_t m) { return PL_AMX && Items<T>::n == 2 && !by_rows<T>(s) ? round_up(m, 16) : m; }

template <Dtype D> void load_keys(const Job& j, const Entries& e, const View& view, const Scratch& s, Ahead& ahead) {
  using T = typename ItemOf<D>::Type;
#if PL_AMX
  if constexpr (Items<T>::n == 2)
    if (by_rows<T>(s)) return scores_by_rows<D>(j, e, view.offset, view.seen, s, ahead);
#endif
  load_keys<D>(e, view.offset, view.seen, j.a.dim, s.zero, s.stage, reinterpret_cast<T*>(s.kt), ahead);
}

template <class T> PL_INLINE T* weights_of(const Scratch& s, int64_t p) { return reinterpret_cast<T*>(s.w) + p * (kBlock / Items<T>::n); }

// Scores at the loaded keys -> weights.
template <class T> void weigh_panel(const Job& j, const View& view, const Panel<T>& p, const Scratch& s, T* w, Ahead& ahead) {
  const int64_t stride = query_stride<T>(j.a.dim), per_row = kBlock / Items<T>::n;
  const int n_groups = p.g.end - p.g.begin;
  float* scores = s.s + 16 * p.g.begin;
  if (by_rows<T>(s)) {
    scores += p.p * kBlock;
  } else {
    const auto *q = reinterpret_cast<const T*>(s.q) + p.p * stride, *kt = reinterpret_cast<const T*>(s.kt) + 16 * p.g.begin;
    product(q, stride, padded<T>(s, p.m), kt, kBlock, n_groups, scores, kBlock, depth<T>(j.a.dim), false, s.edge, ahead);
  }
  uint64_t sees[kTilePanel];
  for (int64_t i = 0, row = p.p / j.n_query, head = p.p % j.n_query; i < p.m; ++i) {
    sees[i] = view.bits[row] >> 16 * p.g.begin;
    if (++head == j.n_query) head = 0, ++row;
  }
  weigh(scores, p.p, p.m, sees, n_groups, j.a.softcap * kLog2e, j.wide, w + p.first(), per_row, s.chunk, ahead);
}

// The values that `seen` names; whether they may be multiplied by the weights of rows that do not see them, which are 0.
template <Dtype D> bool load_values(const Job& j, const Entries& e, const View& view, uint64_t seen, const Scratch& s, Ahead& ahead) {
  using T = typename ItemOf<D>::Type;
  const Groups g = groups_of<T>(view.seen);
  T* v = reinterpret_cast<T*>(s.v);
  load_all_values<D>(e, view.offset, seen, g, j.a.dim, j.wide, s.zero, s.stage, v, ahead);
  const int64_t per_group = 16 / Items<T>::n * j.wide;
  return seen == view.by_all || all_finite(v + per_group * g.begin, per_group * (g.end - g.begin));
}

// Weights by loaded values, onto the sums.
template <class T> void add_panel(const Job& j, const Panel<T>& p, const Scratch& s, const T* w, Ahead& ahead) {
  const int64_t wide = j.wide, per_row = kBlock / Items<T>::n;
  const T* v = reinterpret_cast<const T*>(s.v) + p.first() * wide;
  float* acc = s.chunk.acc + p.p * wide;
#if PL_AMX
  if constexpr (Items<T>::n == 2)
    if (by_rows<T>(s) && p.m == s.pairs) return tile_values(w + p.first(), per_row, v, wide, p.items() / 16, acc, wide / 16, ahead);
#endif
  const int64_t m = s.alone && p.p + p.m == s.pairs && p.p % 16 == 0 ? padded<T>(s, p.m) : p.m;
  product(w + p.first(), per_row, m, v, wide, wide / 16, acc, wide, p.items(), true, s.edge, ahead);
}

// The same where some row must not see a value: row by row.
template <Dtype D> void add_rows(const Job& j, const Entries& e, const View& view, const Scratch& s, Ahead& ahead) {
  using T = typename ItemOf<D>::Type;
  for (int64_t r = view.begin; r < view.end; ++r) {
    if (!view.bits[r]) continue;
    load_values<D>(j, e, view, view.bits[r], s, ahead);
    each_panel<T>(j, view, r, r + 1, [&](const Panel<T>& p) { add_panel(j, p, s, weights_of<T>(s, p.p), ahead); });
  }
}

template <class T> void load_queries(const Job& j, const Unit& u, const GroupStep& g, int32_t head, T* q) {
  const AttentionArgs& a = j.a;
  const float scale = a.softcap != 0.0f ? a.scale / a.softcap : a.scale * kLog2e;
  for (int64_t r = 0; r < u.n_rows; ++r)
    for (int64_t h = 0; h < j.n_query; ++h, q += query_stride<T>(a.dim))
      load_query(a.q.row(u.row + r) + (g.heads[head] * j.n_query + h) * a.dim, scale, a.dim, q);
}

template <class T> void store_out(const Job& j, const Unit& u, const State& s) {
  const GroupStep& g = j.step.groups[u.group];
  const int64_t dim = j.a.dim, pairs = u.n_rows * j.n_query;
  for (int64_t i = 0; i < u.n_heads * pairs; ++i) {
    const int64_t p = i % pairs, head = u.head + i / pairs;
    float* out = j.a.out.row(u.row + p / j.n_query) + (g.heads[head] * j.n_query + p % j.n_query) * dim;
    const V sum = vset(vsum(vload(s.sum + 16 * i)));
    out_order(static_cast<const T*>(nullptr), s.acc + i * j.wide, dim);
    for (int64_t d = 0; d < dim; d += 16) {
      const V x = vadd(vdiv(vload(s.acc + i * j.wide + d), sum), vzero());  // -0 becomes 0
      vstore(out + d, x, min_of<int64_t>(16, dim - d));
    }
  }
}

// The part of the scratch that is a head's own: its queries, weights and state.
template <class T> Scratch of_head(const Job& j, Scratch s, int64_t head) {
  const int64_t p = head * s.pairs, per_lane = Items<T>::n;
  s.q += p * query_stride<T>(j.a.dim);
  s.w += p * kBlock / per_lane;
  s.qt += head * 8 * round_up(j.a.dim, 32);
  s.chunk = {s.chunk.acc + p * j.wide, s.chunk.sum + p * 16, s.chunk.max + p};
  return s;
}

// The order in which a unit reads a block, and so what is fetched meanwhile: values behind keys, the next block's keys behind values.
struct Order {
  const Entries& first;
  int32_t n_heads;
  const int64_t *offset, *next;  // of this block and the next; null: there is none

  Ahead values() const { return {first.v, offset, n_heads, first.head_bytes, first.row_bytes}; }
  Ahead next_keys() const { return {first.k, next, n_heads, first.head_bytes, first.row_bytes}; }
};

// All heads of a unit over one view of a block: first all keys, then all values, each in the order of memory.
template <Dtype D> void heads(const Job& j, const Order& order, const View& view, const Scratch& s) {
  using T = typename ItemOf<D>::Type;
  Entries e = order.first;
  Ahead ahead = order.values(), next = order.next_keys();
  for (int32_t h = 0; h < order.n_heads; ++h, e.k += e.head_bytes, ahead.next_head()) {
    const Scratch own = of_head<T>(j, s, h);
    load_keys<D>(j, e, view, own, ahead);
    each_panel<T>(j, view, view.begin, view.end, [&](const Panel<T>& p) { weigh_panel(j, view, p, own, weights_of<T>(own, p.p), ahead); });
  }
  for (int32_t h = 0; h < order.n_heads; ++h, e.v += e.head_bytes, next.next_head()) {
    const Scratch own = of_head<T>(j, s, h);
    if (load_values<D>(j, e, view, view.seen, own, next))
      each_panel<T>(j, view, view.begin, view.end, [&](const Panel<T>& p) { add_panel(j, p, own, weights_of<T>(own, p.p), next); });
    else add_rows<D>(j, e, view, own, next);
  }
}

// One head of many pairs: weights are used while they are in L1.
template <Dtype D> void head(const Job& j, const Order& order, const View& view, const Scratch& s) {
  using T = typename ItemOf<D>::Type;
  if (view.begin == view.end) return;
  Ahead ahead = order.values(), next = order.next_keys();
  load_keys<D>(j, order.first, view, s, ahead);
  ahead.until(kBlock);
  if (!load_values<D>(j, order.first, view, view.seen, s, next)) {
    for (int64_t r = view.begin; r < view.end; ++r) head<D>(j, order, View(view.offset, view.bits, r, r + 1), s);
    return;
  }
  each_panel<T>(j, view, view.begin, view.end, [&](const Panel<T>& p) {
    weigh_panel(j, view, p, s, weights_of<T>(s, 0), next);
    add_panel(j, p, s, weights_of<T>(s, 0), next);
  });
  next.until(kBlock);
}

template <Dtype D> void see(const Job& j, const Order& order, const View& view, const Scratch& s) {
  if (view.begin == view.end) return;
  if (s.pairs > kFewPairs) head<D>(j, order, view, s);
  else heads<D>(j, order, view, s);
}

// Block b of the unit: most rows together, tree rows that see part of a draft one by one.
template <Dtype D> void block(const Job& j, const Unit& u, const Sight& sight, const Order& order, int64_t b, const Scratch& s) {
  uint64_t bits[kPairs], alone[kPairs];
  const bool drafts = sight.mask && (b + 1) * kBlock > sight.tail;
  for (int64_t r = 0; r < u.n_rows; ++r) {
    bits[r] = sight.bits(u.row + r, b * kBlock);
    alone[r] = drafts && sight.is_tree(u.row + r) ? bits[r] : 0;
    bits[r] ^= alone[r];
  }
  see<D>(j, order, View(order.offset, bits, 0, u.n_rows), s);
  for (int64_t r = 0; drafts && r < u.n_rows; ++r) {
    if (!alone[r]) continue;
    int64_t own[kBlock];
    order.first.offsets(b * kBlock, sight, u.row + r, own);
    see<D>(j, {order.first, order.n_heads, own, nullptr}, View(own, alone, r, r + 1), s);
  }
}

template <class T> void prepare(const Job& j, const Unit& u, const Scratch& s) {
  memset(s.zero, 0, static_cast<size_t>(j.wide) * 4);
  for (int32_t h = 0; h < u.n_heads; ++h) {
    const Scratch own = of_head<T>(j, s, h);
    load_queries(j, u, j.step.groups[u.group], u.head + h, reinterpret_cast<T*>(own.q));
#if PL_AMX
    if (by_rows<T>(s)) turn_queries(s.pairs, j.a.dim, reinterpret_cast<const Pair*>(own.q), reinterpret_cast<Pair*>(own.qt));
#endif
  }
  pad(reinterpret_cast<T*>(s.q), j.a.dim, reinterpret_cast<T*>(s.kt));
}

}  // namespace
}  // namespace PL_ISA
}  // namespace paceline
