// Attention over paged ragged batches, fused: scores, softmax and values block by block, nothing of size rows x keys in memory.
//
//     s_j = scale q . k_j        (then softcap * tanh(s_j / softcap))          j over the indices that the row sees
//     out = sum_j e^(s_j - m) v_j / sum_j e^(s_j - m)
//
// First the step's k and v rows are stored in the pools' type (nearest even) at their slots; then rows read only the pools, so a
// row's own key counts as rounded as later rows will see it.
//
// Memory: pools (n_pages, heads of the group, page_size, dim); index i of a sequence lies in page tables[i / page_size] at offset
// i % page_size. q (rows, n_heads * dim); query head h reads KV head h / (n_heads / n_kv_heads).
//
// Work: a unit is (sequence, KV head, block of rows); its (row, query head) pairs, up to kPairs, share every K and V block. A block is
// 64 consecutive indices, aligned; its keys are transposed and its values laid out for the products (attention_blocks.h) in L1, and
// then small panels of pairs pass over it: scores, weights, values. K and V are read once per unit: decode of one sequence reads its
// cache exactly once, 2 * dim * size bytes per index and KV head, at 4 * dim FLOP per index and query head; prefill is bound by
// arithmetic.
//
// Arithmetic: float32, but for bfloat16 pools where there are bfloat16 instructions: then scaled queries and weights are rounded to
// bfloat16 too and products are added in float32 (attention_product.h, attention_amx.h). The rounded weights are also what is summed
// up below the fraction, so they still add to one.
//
// Same bits always: what a row adds up is fixed by its own indices alone. A score adds over dim in order; the maximum and the sum of
// lane i take the indices i mod 16 in order; values add in the order of the indices. A key that a row does not see has a weight of
// exactly 0, which changes no sum but for the sign of a zero, and that is lost at the end; where such a key's values are not
// finite, the rows go one by one. So whatever lies in slots a row does not see cannot matter. The running softmax starts anew every
// 1024 indices (a chunk) and chunks are merged in order, whether one thread does them or many: a unit much longer than the others has
// one task per chunk.
#include "attention_amx.h"
#include "attention_blocks.h"
#include "attention_softmax.h"

namespace paceline {
namespace PL_ISA {
namespace {

constexpr int64_t kPairs = 128;
constexpr int64_t kSmall = 1 << 19;  // work (see each_unit) that is not worth waking threads for: 7 us on a Zen 4 core
constexpr float kLog2e = 1.44269504f;

// ---- pools ----

void store_row(Dtype t, void* to, const float* x, int64_t n) {
  if (t == Dtype::f32) {
    memcpy(to, x, static_cast<size_t>(n) * 4);
    return;
  }
  auto* p = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; i += 16) {
    uint16_t tail[16];
    uint16_t* out = n - i < 16 ? tail : p + i;
    const V v = n - i < 16 ? vload(x + i, n - i) : vload(x + i);
    if (t == Dtype::f16) vstore_f16(out, v); else vstore_bf16(out, v);
    if (out == tail) memcpy(p + i, tail, static_cast<size_t>(n - i) * 2);
  }
}

void kv_write(const Ctx& c, const AttentionArgs& a, const GroupStep& g, int32_t at) {
  constexpr int64_t kPiece = 1 << 14;  // floats per task
  const int64_t step = max_of<int64_t>(1, kPiece / (g.n_heads * g.dim));
  parallel(c, ceil_div(c.n_rows, step), [&](int64_t task, int) {
    for (int64_t r = task * step; r < min_of(c.n_rows, (task + 1) * step); ++r) {
      const int64_t page = g.slots[r] / g.page_size, offset = g.slots[r] % g.page_size;
      for (int32_t h = 0; h < g.n_heads; ++h) {
        const size_t to = static_cast<size_t>(((page * g.n_heads + h) * g.page_size + offset) * g.dim) * width(g.dtype);
        const int64_t from = int64_t{g.heads[h]} * g.dim;
        store_row(g.dtype, static_cast<char*>(g.k[at]) + to, a.k.row(r) + from, g.dim);
        store_row(g.dtype, static_cast<char*>(g.v[at]) + to, a.v.row(r) + from, g.dim);
      }
    }
  });
}

// ---- a unit of work ----

struct Job {
  const AttentionArgs& a;
  const Step& step;
  int64_t wide;       // dim rounded up to lanes
  int64_t max_pairs, state_floats, scratch_floats;
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
  float *qt, *stage, *st;  // few pairs on tiles: queries as columns, keys from several places, scores by key
  State chunk, total;
  int64_t pairs;  // of the unit; the rows behind them, up to a multiple of 16, are nobody's
};

// Calls f(pointer, floats) for each part.
template <class F> void each_part(const Job& j, Scratch& s, F f) {
  const int64_t panel = PL_AMX ? kTilePanel : kRows, dim = round_up(j.a.dim, 32);
  f(&s.q, (j.max_pairs + panel) * dim);  // tiles read whole row blocks
  f(&s.kt, dim * kBlock);
  f(&s.v, kBlock * j.wide);
  f(&s.s, panel * kBlock);
  f(&s.w, panel * kBlock);
  f(&s.zero, dim);
  f(&s.edge, PL_AMX ? 16 * max_of(j.wide, kBlock) : 0);
  f(&s.qt, PL_AMX ? 8 * dim : 0);
  f(&s.stage, PL_AMX ? 4 * 8 * dim : 0);
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
                       [[maybe_unused]] float* edge, const Ahead* ahead) {
#if PL_AMX
  if constexpr (Items<T>::n == 2) {
    return tile_product({a, lda, b, ldb, c, ldc}, m, nv, n, add, edge);
  }
#endif
  vector_product(a, lda, m, b, ldb, nv, c, ldc, n, add, ahead);
}

// Units of at most 16 pairs on tiles take keys as they lie in the pool.
template <class T> PL_INLINE bool by_rows([[maybe_unused]] const Scratch& s) { return PL_AMX && Items<T>::n == 2 && s.pairs <= 16; }

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
KeyRows key_rows(const Entries& e, const int64_t* offset, int64_t dim, Pair* stage) {
  bool together = dim % 32 == 0 && offset[0] >= 0;
  for (int i = 1; i < 16; ++i) together &= offset[i] - offset[0] == i * e.row_bytes;
  if (together) return {e.k + offset[0], e.row_bytes};
  const int64_t stride = query_stride<Pair>(dim);
  for (int i = 0; i < 16; ++i) {
    memset(stage + i * stride, 0, static_cast<size_t>(stride) * 4);
    if (offset[i] >= 0) memcpy(stage + i * stride, e.k + offset[i], static_cast<size_t>(e.row_bytes));
  }
  publish(stage);
  return {reinterpret_cast<const char*>(stage), stride * 4};
}

// Scores of all the unit's pairs at a block's keys, (pairs, 64).
void scores_by_rows(const Job& j, const Entries& e, const int64_t* offset, uint64_t seen, const Scratch& s, const Ahead* ahead) {
  const Groups g = groups_of<Pair>(seen);
  KeyRows keys[4];
  const int64_t stride = query_stride<Pair>(j.a.dim);
  for (int t = g.begin; t < g.end; ++t) {
    for (int i = 0; i < 16 && ahead; ++i) ahead[0].touch(16 * t + i);
    keys[t] = key_rows(e, offset + 16 * t, j.a.dim, reinterpret_cast<Pair*>(s.stage) + t * 16 * stride);
  }
  tile_scores(keys, g.begin, g.end, reinterpret_cast<const Pair*>(s.qt), stride / 16, s.st);
  for (int t = g.begin; t < g.end; ++t) {
    V r[16];
    for (int i = 0; i < 16; ++i) r[i] = vload(s.st + (16 * t + i) * 16);
    transpose16(r);
    for (int64_t i = 0; i < s.pairs; ++i) vstore(s.s + i * kBlock + 16 * t, r[i]);
  }
}
#endif

// A block whose keys and values are loaded, for m pairs from pair p on; bits[r]: what row r sees.
template <class T> void panel_of_pairs(const Job& j, const uint64_t* bits, int64_t p, int64_t m, const Scratch& s, const Ahead* ahead) {
  const int64_t dim = j.a.dim, wide = j.wide, nq = j.n_query;
  const int64_t stride = query_stride<T>(dim), n = depth<T>(dim), per_row = kBlock / Items<T>::n;
  uint64_t seen = 0;
  for (int64_t r = p / nq; r <= (p + m - 1) / nq; ++r) seen |= bits[r];
  if (!seen) return;
  const Groups g = groups_of<T>(seen);
  const int n_groups = g.end - g.begin;
  const int64_t first = 16 / Items<T>::n * g.begin, n_items = 16 / Items<T>::n * n_groups;
  const auto *q = reinterpret_cast<const T*>(s.q) + p * stride, *kt = reinterpret_cast<const T*>(s.kt) + 16 * g.begin;
  const auto* v = reinterpret_cast<const T*>(s.v) + first * wide;
  T* w = reinterpret_cast<T*>(s.w) + first;
  const int64_t padded = PL_AMX && Items<T>::n == 2 ? round_up(m, 16) : m;
  float* scores = s.s + 16 * g.begin;
  if (by_rows<T>(s)) {
    scores += p * kBlock;
  } else {
    product(q, stride, padded, kt, kBlock, n_groups, scores, kBlock, n, false, s.edge, ahead ? ahead + 2 : nullptr);
    if (ahead && !(PL_AMX && Items<T>::n == 2)) ahead[2].rest(n * Items<T>::n);
  }
  uint64_t sees[kTilePanel];
  for (int64_t i = 0, row = p / nq, head = p % nq; i < m; ++i) {
    sees[i] = bits[row] >> 16 * g.begin;
    if (++head == nq) head = 0, ++row;
  }
  weigh(scores, p, m, sees, n_groups, j.a.softcap * kLog2e, wide, w, per_row, s.chunk);
  product(w, per_row, p + m == s.pairs && p % 16 == 0 ? padded : m, v, wide, wide / 16, s.chunk.acc + p * wide, wide, n_items, true, s.edge, ahead ? ahead + 3 : nullptr);
}

// One block of keys for the unit's rows [r0, r1).
template <Dtype D>
void block(const Job& j, const Entries& e, const int64_t* offset, const uint64_t* bits, int64_t r0, int64_t r1, const Scratch& s, const Ahead* ahead) {
  using T = typename ItemOf<D>::Type;
  while (r0 < r1 && !bits[r0]) ++r0;
  while (r0 < r1 && !bits[r1 - 1]) --r1;
  if (r0 == r1) return;
  uint64_t seen = 0, by_all = ~uint64_t{0};
  for (int64_t r = r0; r < r1; ++r) seen |= bits[r], by_all &= bits[r];
  T* v = reinterpret_cast<T*>(s.v);
#if PL_AMX
  if (by_rows<T>(s)) scores_by_rows(j, e, offset, seen, s, ahead);
  else
#endif
    load_keys<D>(e, offset, seen, j.a.dim, s.zero, reinterpret_cast<T*>(s.kt), ahead);
  load_all_values<D>(e, offset, seen, j.a.dim, j.wide, s.zero, v, ahead);
  if (seen != by_all) {
    const Groups g = groups_of<T>(seen);
    const int64_t first = 16 / Items<T>::n * g.begin, n = 16 / Items<T>::n * (g.end - g.begin);
    if (!all_finite(v + first * j.wide, n * j.wide)) {
      for (int64_t r = r0; r < r1; ++r) block<D>(j, e, offset, bits, r, r + 1, s, nullptr);
      return;
    }
  }
  for (int64_t p = r0 * j.n_query, end = r1 * j.n_query; p < end; p += panel_rows<T>(), ahead = nullptr)
    panel_of_pairs<T>(j, bits, p, min_of(panel_rows<T>(), end - p), s, ahead);
}

template <class T> void load_queries(const Job& j, const Unit& u, const GroupStep& g, T* q) {
  const AttentionArgs& a = j.a;
  const float scale = a.softcap != 0.0f ? a.scale / a.softcap : a.scale * kLog2e;
  for (int64_t r = 0; r < u.n_rows; ++r)
    for (int64_t h = 0; h < j.n_query; ++h, q += query_stride<T>(a.dim))
      load_query(a.q.row(u.row + r) + (g.heads[u.head] * j.n_query + h) * a.dim, scale, a.dim, q);
}

template <class T> void store_out(const Job& j, const Unit& u, const State& s) {
  const GroupStep& g = j.step.groups[u.group];
  const int64_t dim = j.a.dim;
  for (int64_t p = 0; p < u.n_rows * j.n_query; ++p) {
    float* out = j.a.out.row(u.row + p / j.n_query) + (g.heads[u.head] * j.n_query + p % j.n_query) * dim;
    const V sum = vset(vsum(vload(s.sum + 16 * p)));
    out_order(static_cast<const T*>(nullptr), s.acc + p * j.wide, dim);
    for (int64_t d = 0; d < dim; d += 16) {
      const V x = vadd(vdiv(vload(s.acc + p * j.wide + d), sum), vzero());  // -0 becomes 0
      vstore(out + d, x, min_of<int64_t>(16, dim - d));
    }
  }
}

// Block b of the unit: most rows together, tree rows that see part of a draft one by one.
template <Dtype D>
void blocks(const Job& j, const Unit& u, const Sight& sight, const Entries& e, const int64_t* offset, int64_t b, const Scratch& s, const Ahead* ahead) {
  uint64_t bits[kPairs], alone[kPairs];
  const bool drafts = sight.mask && (b + 1) * kBlock > sight.tail;
  for (int64_t r = 0; r < u.n_rows; ++r) {
    bits[r] = sight.bits(u.row + r, b * kBlock);
    alone[r] = drafts && sight.is_tree(u.row + r) ? bits[r] : 0;
    bits[r] ^= alone[r];
  }
  block<D>(j, e, offset, bits, 0, u.n_rows, s, ahead);
  for (int64_t r = 0; drafts && r < u.n_rows; ++r) {
    if (!alone[r]) continue;
    int64_t own[kBlock];
    e.offsets(b * kBlock, sight, u.row + r, own);
    block<D>(j, e, own, alone, r, r + 1, s, nullptr);
  }
}

// Walks the unit's chunks; the result goes to `out`, or chunk by chunk to `parts`.
template <Dtype D> void attend(const Job& j, const Unit& u, int thread) {
  using T = typename ItemOf<D>::Type;
  const GroupStep& g = j.step.groups[u.group];
  Scratch s = scratch_of(j, thread);
  const State own = s.chunk;
  const Sight sight(j.step, j.a.window, g, u.seq);
  const Entries entries(g, u);
  const Sight::Range range = sight.range(u.row, u.n_rows);
  const int64_t pairs = s.pairs = u.n_rows * j.n_query;
  memset(s.zero, 0, static_cast<size_t>(j.wide) * 4);
  load_queries(j, u, g, reinterpret_cast<T*>(s.q));
#if PL_AMX
  if (by_rows<T>(s)) turn_queries(pairs, j.a.dim, reinterpret_cast<const Pair*>(s.q), reinterpret_cast<Pair*>(s.qt));
#endif
  pad(reinterpret_cast<T*>(s.q), j.a.dim, reinterpret_cast<T*>(s.kt));
  if (u.part < 0) clear(s.total, pairs, j.wide);
  int64_t offsets[2][kBlock];
  const char* rows[2 * kBlock];
  const int64_t bytes = entries.row_bytes;
  constexpr bool tiles = PL_AMX && Items<T>::n == 2;
  constexpr int64_t step = tiles ? 64 : 128;
  const int64_t late = tiles ? 0 : bytes;
  const Ahead ahead[4] = {
      {rows, 0, step, bytes}, {tiles ? rows + kBlock : rows, tiles ? 0 : 64, step, bytes}, {rows + kBlock, 0, step, late}, {rows + kBlock, 64, step, late}};
  const int64_t end = min_of((u.chunk + u.n_chunks) * kChunk, range.end), per_chunk = kChunk / kBlock;
  int64_t b = max_of(u.chunk * kChunk, range.begin) / kBlock;
  entries.offsets(b * kBlock, offsets[b & 1]);
  for (int64_t chunk = u.chunk; chunk < u.chunk + u.n_chunks; ++chunk) {
    s.chunk = u.part < 0 ? own : j.state(j.parts + (u.part + chunk - u.chunk) * j.state_floats);
    clear(s.chunk, pairs, j.wide);
    for (; b < (chunk + 1) * per_chunk && b * kBlock < end; ++b) {
      int64_t* next = offsets[(b + 1) & 1];
      entries.offsets((b + 1) * kBlock, next);
      entries.rows(next, rows);
      blocks<D>(j, u, sight, entries, offsets[b & 1], b, s, (b + 1) * kBlock < end ? ahead : nullptr);
    }
    if (u.part < 0) merge(s.total, s.chunk, pairs, j.wide);
  }
  if (u.part < 0) store_out<T>(j, u, s.total);
}

void attend(const Job& j, const Unit& u, int thread) {
  switch (j.step.groups[u.group].dtype) {
    case Dtype::f32: return attend<Dtype::f32>(j, u, thread);
    case Dtype::f16: return attend<Dtype::f16>(j, u, thread);
    default: break;
  }
#if PL_AMX
  const Tiles tiles;
#endif
  attend<Dtype::bf16>(j, u, thread);
}

void join(const Job& j, const Unit& u, int thread) {  // the parts of one unit, all its chunks, in order
  const State total = scratch_of(j, thread).total;
  clear(total, u.n_rows * j.n_query, j.wide);
  for (int64_t c = 0; c < u.n_chunks; ++c) merge(total, j.state(j.parts + (u.part + c) * j.state_floats), u.n_rows * j.n_query, j.wide);
  if (j.step.groups[u.group].dtype == Dtype::bf16) store_out<typename ItemOf<Dtype::bf16>::Type>(j, u, total);
  else store_out<float>(j, u, total);
}

// ---- the plan: which units there are, which of them are cut ----

struct Plan {
  Unit *units, *cut;  // what is attended, in order of tasks; the cut units as wholes
  int64_t n_units = 0, n_cut = 0, n_parts = 0, work = 0;
};

template <class F> void each_unit(const Job& j, F f) {
  const AttentionArgs& a = j.a;
  const int64_t rows_per_unit = max_of<int64_t>(1, kPairs / j.n_query);
  for (int32_t l = j.step.cu_layer[a.layer]; l < j.step.cu_layer[a.layer + 1]; ++l) {
    const LayerAt at = j.step.layer_at[l];
    const GroupStep& g = j.step.groups[at.group];
    for (int32_t s = 0; s < j.step.n_seqs; ++s) {
      const Sight sight(j.step, j.a.window, g, s);
      for (int64_t end = j.step.cu_rows[s + 1]; end > sight.row0; end -= rows_per_unit) {  // the longest first
        const int64_t row = max_of(sight.row0, end - rows_per_unit);
        const Sight::Range keys = sight.range(row, end - row);
        const int64_t from = keys.begin / kChunk, to = ceil_div(keys.end, kChunk);
        const int64_t work = (keys.end - keys.begin) * j.a.dim * (8 + 2 * j.n_query * (end - row));
        for (int32_t h = 0; h < g.n_heads; ++h) f(Unit{at.group, at.at, s, h, row, end - row, from, to - from, -1}, work);
      }
    }
  }
}

Plan plan(const Ctx& c, const Job& j) {
  Plan p;
  int64_t n_whole = 0, n_pieces = 0;
  each_unit(j, [&](const Unit&, int64_t work) { p.work += work, ++n_whole; });
  const int n_threads = pool_size(c.pool);
  const auto long_one = [&](const Unit& u, int64_t work) { return n_threads > 1 && u.n_chunks > 1 && work * 4 * n_threads > p.work; };
  each_unit(j, [&](const Unit& u, int64_t work) { n_pieces += long_one(u, work) ? u.n_chunks : 1; });
  p.units = take<Unit>(c, n_pieces);
  p.cut = take<Unit>(c, n_whole);
  each_unit(j, [&](Unit u, int64_t work) {
    if (!long_one(u, work)) {
      p.units[p.n_units++] = u;
      return;
    }
    u.part = p.n_parts;
    p.cut[p.n_cut++] = u;
    for (int64_t i = 0; i < u.n_chunks; ++i) {
      Unit piece = u;
      piece.chunk = u.chunk + i, piece.n_chunks = 1, piece.part = u.part + i;
      p.units[p.n_units++] = piece;
    }
    p.n_parts += u.n_chunks;
  });
  return p;
}

void attention(const Ctx& c, const AttentionArgs& a) {
  const Step& step = *c.step;
  if (c.n_rows == 0) return;
  for (int32_t l = step.cu_layer[a.layer]; l < step.cu_layer[a.layer + 1]; ++l)
    kv_write(c, a, step.groups[step.layer_at[l].group], step.layer_at[l].at);
  Job j{a, step, round_up(a.dim, 16), 0, 0, 0, nullptr, nullptr, a.n_heads / a.n_kv_heads};
  const Plan p = plan(c, j);
  int64_t rows = 1;
  for (int64_t i = 0; i < p.n_units; ++i) rows = max_of(rows, p.units[i].n_rows);
  j.max_pairs = round_up(rows * j.n_query, 16);
  j.state_floats = j.max_pairs * (j.wide + 17);
  j.scratch_floats = scratch_size(j);
  j.scratch = take<float>(c, j.scratch_floats * pool_size(c.pool));
  j.parts = take<float>(c, j.state_floats * p.n_parts);
  if (p.work < kSmall) {
    for (int64_t i = 0; i < p.n_units; ++i) attend(j, p.units[i], 0);
    for (int64_t i = 0; i < p.n_cut; ++i) join(j, p.cut[i], 0);
    return;
  }
  parallel(c, p.n_units, [&](int64_t i, int thread) { attend(j, p.units[i], thread); });
  parallel(c, p.n_cut, [&](int64_t i, int thread) { join(j, p.cut[i], thread); });
}

}  // namespace

void fill_attention(Kernels& k) { k.attention = attention; }

}  // namespace PL_ISA
}  // namespace paceline
