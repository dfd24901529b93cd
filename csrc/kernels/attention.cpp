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
// Work: a unit is (sequence, KV head, block of rows); its (row, query head) pairs, up to kPairs, share every K and V block. Heads of few
// pairs (decode) go together: they lie side by side in a page, and memory is read in longer stretches. A block is 64 consecutive
// indices, aligned; its keys are transposed and its values laid out for the products (attention_blocks.h) in L1, and then small panels
// of pairs pass over it: scores, weights, values (attention_unit.h). K and V are read once per unit: decode of one sequence reads its
// cache exactly once, 2 * dim * size bytes per index and KV head, at 4 * dim FLOP per index and query head; prefill is bound by
// arithmetic. While a block's keys are worked on its values are fetched, and then the next block's keys (`Ahead`).
//
// Arithmetic: float32, but for bfloat16 and int8 pools where there are bfloat16 instructions: then scaled queries (and int8 entries, times
// their scale) and weights are rounded to
// bfloat16 too and products are added in float32 (attention_product.h, attention_amx.h). The rounded weights are also what is summed
// up below the fraction, so they still add to one.
//
// Same bits always: what a row adds up is fixed by its own indices alone. A score adds over dim in order; the maximum and the sum of
// lane i take the indices i mod 16 in order; values add in the order of the indices. A key that a row does not see has a weight of
// exactly 0, which changes no sum but for the sign of a zero, and that is lost at the end; where such a key's values are not
// finite, the rows go one by one. So whatever lies in slots a row does not see cannot matter. The running softmax starts anew every
// 1024 indices (a chunk) and chunks are merged in order, whether one thread does them or many: a unit much longer than the others has
// one task per chunk.
#include "attention_plan.h"
#include "rows.h"

namespace paceline {
namespace PL_ISA {
namespace {

constexpr int64_t kSmall = 1 << 19;  // work (see each_unit) that is not worth waking threads for: 7 us on a Zen 4 core

// ---- pools ----

// Codes in [-127, 127], then their scale: the largest magnitude / 127, or 1 for zeros.
void store_codes(int8_t* to, const float* x, int64_t n) {
  const float top = largest(x, n), scale = top == 0.0f ? 1.0f : top / 127.0f;
  const V inverse = vset(1.0f / scale);
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t m = min_of<int64_t>(16, n - i);
    float y[16];
    vstore(y, vround(vmul(vload(x + i, m), inverse)));
    for (int64_t l = 0; l < m; ++l) to[i + l] = static_cast<int8_t>(y[l] >= -127.0f && y[l] <= 127.0f ? y[l] : 0.0f);  // NaN: the scale is NaN
  }
  memcpy(to + n, &scale, 4);
}

void store_row(Dtype t, void* to, const float* x, int64_t n) {
  if (t == Dtype::i8) return store_codes(static_cast<int8_t*>(to), x, n);
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
        const int64_t to = ((page * g.n_heads + h) * g.page_size + offset) * entry_bytes(g.dtype, g.dim);
        const int64_t from = int64_t{g.heads[h]} * g.dim;
        store_row(g.dtype, static_cast<char*>(g.k[at]) + to, a.k.row(r) + from, g.dim);
        store_row(g.dtype, static_cast<char*>(g.v[at]) + to, a.v.row(r) + from, g.dim);
      }
    }
  });
}

// ---- units ----

// Walks the unit's chunks, in every block all heads: they lie side by side. The result goes to `out`, or chunk by chunk to `parts`.
template <Dtype D> void attend(const Job& j, const Unit& u, int thread) {
  using T = typename ItemOf<D>::Type;
  Scratch s = scratch_of(j, thread);
  const State own = s.chunk;
  const Sight sight(j.step, j.a.window, j.step.groups[u.group], u.seq);
  const Entries first(j.step.groups[u.group], u);
  const Sight::Range range = sight.range(u.row, u.n_rows);
  s.pairs = u.n_rows * j.n_query, s.alone = u.n_heads == 1;
  const int64_t pairs = u.n_heads * s.pairs;
  prepare<T>(j, u, s);
  if (u.part < 0) clear(s.total, pairs, j.wide);
  int64_t offsets[2][kBlock];
  const int64_t end = min_of((u.chunk + u.n_chunks) * kChunk, range.end), per_chunk = kChunk / kBlock;
  int64_t b = max_of(u.chunk * kChunk, range.begin) / kBlock;
  first.offsets(b * kBlock, offsets[b & 1]);
  for (int64_t chunk = u.chunk; chunk < u.chunk + u.n_chunks; ++chunk) {
    s.chunk = u.part < 0 ? own : j.state(j.parts + (u.part + chunk - u.chunk) * j.state_floats);
    clear(s.chunk, pairs, j.wide);
    for (; b < (chunk + 1) * per_chunk && b * kBlock < end; ++b) {
      int64_t* next = offsets[(b + 1) & 1];
      first.offsets((b + 1) * kBlock, next);
      block<D>(j, u, sight, {first, u.n_heads, offsets[b & 1], (b + 1) * kBlock < end ? next : nullptr}, b, s);
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
  const Tiles tiles(u.n_rows * j.n_query);
#endif
  if (j.step.groups[u.group].dtype == Dtype::i8) return attend<Dtype::i8>(j, u, thread);
  attend<Dtype::bf16>(j, u, thread);
}

void join(const Job& j, const Unit& u, int thread) {  // the parts of one unit, all its chunks, in order
  const State total = scratch_of(j, thread).total;
  const int64_t pairs = u.n_heads * u.n_rows * j.n_query;
  clear(total, pairs, j.wide);
  for (int64_t c = 0; c < u.n_chunks; ++c) merge(total, j.state(j.parts + (u.part + c) * j.state_floats), pairs, j.wide);
  const Dtype dtype = j.step.groups[u.group].dtype;
  if (dtype == Dtype::bf16 || dtype == Dtype::i8) store_out<typename ItemOf<Dtype::bf16>::Type>(j, u, total);
  else store_out<float>(j, u, total);
}

// ---- the op ----

void attention(const Ctx& c, const AttentionArgs& a) {
  const Step& step = *c.step;
  if (c.n_rows == 0) return;
  for (int32_t l = step.cu_layer[a.layer]; l < step.cu_layer[a.layer + 1]; ++l)
    kv_write(c, a, step.groups[step.layer_at[l].group], step.layer_at[l].at);
  Job j{a, step, round_up(a.dim, 16), 0, 0, 0, 0, nullptr, nullptr, a.n_heads / a.n_kv_heads};
  const Plan p = plan(c, j);
  for (int64_t i = 0; i < p.n_units; ++i) {
    j.max_heads = max_of<int64_t>(j.max_heads, p.units[i].n_heads);
    j.max_pairs = max_of(j.max_pairs, round_up(p.units[i].n_heads * p.units[i].n_rows * j.n_query, 16));
  }
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
