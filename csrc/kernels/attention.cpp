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
// Work: a unit is (sequence, KV head, block of rows); its (row, query head) pairs, up to 64, share every K and V block. A block is
// 64 consecutive indices, aligned: K transposed to (dim, 64) and V as (64, dim), both float32 in L2, then two small matrix products
// pairs x dim x 64. K and V are read once per unit: decode of one sequence reads its cache exactly once, 2 * dim * size bytes per
// index and KV head, at 4 * dim FLOP per index and query head; prefill is bound by arithmetic.
//
// Same bits always: what a row adds up is fixed by its own indices alone. A score adds over dim in order; the maximum and the sum of
// lane i take the indices i mod 16 in order; values add in the order of the indices; masked keys take part in no arithmetic, so
// whatever lies in unused slots cannot matter. The running softmax starts anew every 1024 indices (a chunk) and chunks are merged in
// order, whether one thread does them or many: a unit much longer than the others has one task per chunk.
#include "paceline/lanes.h"
#include "paceline/math.h"

namespace paceline {
namespace PL_ISA {
namespace {

constexpr int64_t kBlock = 64, kChunk = 1024, kPairs = 64;
constexpr int64_t kSmall = 1 << 21;  // multiply-adds that are not worth waking threads for
constexpr float kLog2e = 1.44269504f;

// The block after this one, fetched evenly while this one is worked on: a burst would fill the line buffers and stall. A block has
// four phases (keys, values, scores, sums); each touches every second line of the next block's key or value rows.
struct Ahead {
  const char* const* row;  // of kBlock indices
  int64_t first, bytes;    // where to begin in a row, and its length

  PL_INLINE void touch(int64_t j) const {
    if (j >= kBlock) return;
    for (int64_t b = first; b < bytes; b += 128) __builtin_prefetch(row[j] + b, 0, 2);
  }
  void rest(int64_t j) const {
    for (; j < kBlock; ++j) touch(j);
  }
};

// ---- the matrix product of both halves: C (m, 16 nv) = [C +] A (m, n) B (n, 16 nv), adding over n in order ----

template <int MR, int NV>
void panel(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t n, bool add, const Ahead* ahead) {
  V s[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) s[i][j] = add ? vload(c + i * ldc + 16 * j) : vzero();
  for (int64_t k = 0; k < n; ++k) {
    if (ahead) ahead->touch(k);
    V x[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) x[j] = vload(b + k * ldb + 16 * j);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const V y = vset(a[i * lda + k]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) s[i][j] = vfma(y, x[j], s[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) vstore(c + i * ldc + 16 * j, s[i][j]);
}

// Registers: MR * NV sums, NV loads and a broadcast.
constexpr int kRows = PL_AVX512 ? 6 : 4, kCols = PL_AVX512 ? 4 : 1;

template <int NV>
void rows_of_panels(const float* a, int64_t lda, int64_t m, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t n, bool add, const Ahead* ahead) {
  for (; m >= kRows; m -= kRows, a += kRows * lda, c += kRows * ldc, ahead = nullptr) panel<kRows, NV>(a, lda, b, ldb, c, ldc, n, add, ahead);
  switch (m) {
    case 5: return panel<5, NV>(a, lda, b, ldb, c, ldc, n, add, ahead);
    case 4: return panel<4, NV>(a, lda, b, ldb, c, ldc, n, add, ahead);
    case 3: return panel<3, NV>(a, lda, b, ldb, c, ldc, n, add, ahead);
    case 2: return panel<2, NV>(a, lda, b, ldb, c, ldc, n, add, ahead);
    case 1: return panel<1, NV>(a, lda, b, ldb, c, ldc, n, add, ahead);
    default: return;
  }
}

void product(const float* a, int64_t lda, int64_t m, const float* b, int64_t ldb, int64_t nv, float* c, int64_t ldc, int64_t n, bool add,
             const Ahead* ahead) {
  for (; nv >= kCols; nv -= kCols, b += 16 * kCols, c += 16 * kCols, ahead = nullptr) rows_of_panels<kCols>(a, lda, m, b, ldb, c, ldc, n, add, ahead);
  for (; nv > 0; --nv, b += 16, c += 16, ahead = nullptr) rows_of_panels<1>(a, lda, m, b, ldb, c, ldc, n, add, ahead);
}

// ---- pools ----

PL_INLINE size_t width(Dtype t) { return t == Dtype::f32 ? 4 : 2; }

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

PL_INLINE V load_lanes(Dtype t, const void* p, int64_t i, int64_t n) {  // n <= 16 items from item i on
  if (t == Dtype::f32) return n == 16 ? vload(static_cast<const float*>(p) + i) : vload(static_cast<const float*>(p) + i, n);
  const uint16_t* u = static_cast<const uint16_t*>(p) + i;
  if (t == Dtype::f16) return n == 16 ? vload_f16(u) : vload_f16(u, n);
  return n == 16 ? vload_bf16(u) : vload_bf16(u, n);
}

// Sixteen keys as columns of kt (dim, kBlock). Two 16-bit items travel as one lane through the transposition.
template <Dtype T> void transpose_keys(const void* const* key, int64_t dim, float* kt) {
  constexpr bool paired = T != Dtype::f32;
  const int64_t whole = paired ? dim / 2 * 2 : dim, step = paired ? 32 : 16;
  for (int64_t d = 0; d < whole; d += step) {
    V r[16];
    const int64_t n = min_of(whole - d, step);
    for (int i = 0; i < 16; ++i) {
      const uint16_t* u = static_cast<const uint16_t*>(key[i]) + d;
      if (paired) r[i] = n == step ? vload_pairs(u) : vload_pairs(u, n / 2);
      else r[i] = load_lanes(T, key[i], d, n);
    }
    transpose16(r);
    float* out = kt + d * kBlock;
    for (int64_t i = 0; i < (paired ? n / 2 : n); ++i) {
      if (paired) {
        vstore(out + 2 * i * kBlock, T == Dtype::f16 ? vfirst_f16(r[i]) : vfirst_bf16(r[i]));
        vstore(out + (2 * i + 1) * kBlock, T == Dtype::f16 ? vsecond_f16(r[i]) : vsecond_bf16(r[i]));
      } else {
        vstore(out + i * kBlock, r[i]);
      }
    }
  }
  if (whole < dim)  // an odd 16-bit dimension
    for (int i = 0; i < 16; ++i) {
      const uint16_t u = static_cast<const uint16_t*>(key[i])[whole];
      kt[whole * kBlock + i] = T == Dtype::f16 ? load_f16(u) : load_bf16(u);
    }
}

template <Dtype T> void widen(const void* row, int64_t dim, float* out) {  // zeros up to a multiple of 16
  for (int64_t d = 0; d < dim; d += 16) vstore(out + d, load_lanes(T, row, d, min_of<int64_t>(16, dim - d)));
}

// ---- a unit of work ----

struct Unit {
  int32_t group, at, seq, head;    // head: of the group
  int64_t row, n_rows;             // rows of the step
  int64_t chunk, n_chunks;         // the range of chunks to be walked
  int64_t part;                    // -1, or where in `parts` the state of the first of them goes
};

// Softmax in progress of some pairs: values (pairs, wide), lane sums (pairs, 16), maxima in units of log 2 (-inf: nothing seen).
struct State { float *acc, *sum, *max; };

struct Job {
  const AttentionArgs& a;
  const Step& step;
  int64_t wide;       // dim rounded up to lanes
  int64_t max_pairs, state_floats, scratch_floats;
  float *parts, *scratch;
  int64_t n_query;    // query heads per KV head

  State state(float* p) const { return {p, p + max_pairs * wide, p + max_pairs * (wide + 16)}; }
};

struct Scratch {
  float *q, *s, *kt, *v, *zero;
  State chunk, total;
};

Scratch scratch_of(const Job& j, int thread) {
  float* p = j.scratch + thread * j.scratch_floats;
  const auto next = [&](int64_t n) {
    float* at = p;
    p += round_up(n, 16);
    return at;
  };
  Scratch s;
  s.q = next(j.max_pairs * j.a.dim), s.s = next(j.max_pairs * kBlock), s.kt = next(j.a.dim * kBlock), s.v = next(kBlock * j.wide);
  s.zero = next(j.wide);
  s.chunk = j.state(next(j.state_floats)), s.total = j.state(next(j.state_floats));
  return s;
}

int64_t scratch_size(const Job& j) {
  return round_up(j.max_pairs * j.a.dim, 16) + j.max_pairs * kBlock + j.a.dim * kBlock + kBlock * j.wide + j.wide + 2 * j.state_floats;
}

PL_INLINE uint64_t low_bits(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// What the rows of a sequence see. A row of a draft tree sees the entries below `tail` and those its mask names; it counts them in
// order (their rank), as if the others were not there: the indices they have once the draft is settled. So a tree row gives the bits
// that the same text gives without drafting. A mask of 0 means causal.
struct Sight {
  int64_t row0, first;  // the sequence's first row of this step and its index
  int64_t window;       // 0: none
  const uint64_t* mask;
  int64_t tail;

  Sight(const Job& j, const GroupStep& g, int32_t seq) : row0(j.step.cu_rows[seq]), window(j.a.window), mask(j.step.mask) {
    first = g.lens[seq] - (j.step.cu_rows[seq + 1] - row0);
    // `tail` counts as the first group does; groups that retain other numbers of entries see the same draft at their own end
    tail = mask ? j.step.tail[seq] + g.lens[seq] - j.step.groups[0].lens[seq] : 0;
  }
  uint64_t drafts(int64_t row) const { return mask ? mask[row] : 0; }
  bool is_tree(int64_t row) const { return drafts(row) & (drafts(row) + 1); }  // else rank is index
  int64_t end(int64_t row) const {  // how many entries the row sees, or has behind its window
    return drafts(row) ? tail + __builtin_popcountll(drafts(row)) : first + row - row0 + 1;
  }
  int64_t begin(int64_t row) const { return window ? max_of<int64_t>(0, end(row) - window) : 0; }
  uint64_t bits(int64_t row, int64_t block) const {  // bit i: the entry of rank block + i
    return low_bits(end(row) - block) & ~low_bits(begin(row) - block);
  }
  struct Range { int64_t begin, end; };
  Range range(int64_t row, int64_t n_rows) const {  // of all the rows' ranks
    Range r = {begin(row), end(row + n_rows - 1)};
    for (int64_t i = row; mask && i < row + n_rows; ++i) r = {min_of(r.begin, begin(i)), max_of(r.end, end(i))};
    return r;
  }
};

// Where the entries of a unit's KV head lie.
struct Entries {
  const int32_t* table;
  int64_t n, page_size, stride, row_bytes, head_bytes;  // n: entries the table covers; stride: bytes per page
  const char *k, *v;
  Dtype dtype;

  Entries(const GroupStep& g, const Unit& u)
      : table(g.tables + u.seq * g.max_pages), n(g.max_pages * g.page_size), page_size(g.page_size), dtype(g.dtype) {
    row_bytes = g.dim * static_cast<int64_t>(width(g.dtype));
    head_bytes = page_size * row_bytes;
    stride = g.n_heads * head_bytes;
    k = static_cast<const char*>(g.k[u.at]) + u.head * head_bytes;
    v = static_cast<const char*>(g.v[u.at]) + u.head * head_bytes;
  }

  // Byte offsets of indices [i, i + kBlock); -1 where there is no page.
  void offsets(int64_t i, int64_t* out) const {
    for (int64_t j = 0; j < kBlock;) {
      const int64_t page = (i + j) / page_size, at = (i + j) % page_size, m = min_of(kBlock - j, page_size - at);
      const int64_t id = i + j < n ? table[page] : -1, base = id * stride + at * row_bytes;
      for (int64_t l = 0; l < m; ++l) out[j + l] = id < 0 ? -1 : base + l * row_bytes;
      j += m;
    }
  }

  // The same for the ranks of a tree row.
  void offsets(int64_t i, const Sight& sight, int64_t row, int64_t* out) const {
    uint64_t left = sight.drafts(row);
    for (int64_t rank = sight.tail; left && rank < i; ++rank) left &= left - 1;
    for (int64_t j = 0; j < kBlock; ++j) {
      int64_t index = i + j;
      if (index >= sight.tail) {
        index = left ? sight.tail + __builtin_ctzll(left) : n;
        left &= left - 1;
      }
      const int64_t id = index < n ? table[index / page_size] : -1;
      out[j] = id < 0 ? -1 : id * stride + index % page_size * row_bytes;
    }
  }

  // Rows of the offsets, for `Ahead`; where there is no page any address will do.
  void rows(const int64_t* offset, const char** out) const {
    for (int64_t j = 0; j < kBlock; ++j) {
      const int64_t o = max_of<int64_t>(0, offset[j]);
      out[j] = k + o, out[kBlock + j] = v + o;
    }
  }
};

template <Dtype T>
void load_block(const Entries& e, const int64_t* offset, uint64_t seen, int64_t dim, int64_t wide, const Scratch& s, const Ahead* ahead) {
  for (int t = 0; t < 4; ++t) {
    if (!(seen >> 16 * t & 0xffff)) continue;
    const void* key[16];
    for (int i = 0; i < 16 && ahead; ++i) ahead[0].touch(16 * t + i);
    for (int i = 0; i < 16; ++i) key[i] = offset[16 * t + i] < 0 ? static_cast<const void*>(s.zero) : e.k + offset[16 * t + i];
    transpose_keys<T>(key, dim, s.kt + 16 * t);
  }
  for (uint64_t left = seen; left; left &= left - 1) {
    const int i = __builtin_ctzll(left);
    if (ahead) ahead[1].touch(i);
    widen<T>(offset[i] < 0 ? static_cast<const void*>(s.zero) : e.v + offset[i], dim, s.v + i * wide);
  }
}

// Scores of one pair -> weights in place; only the groups of sixteen indices [t0, t1) hold any. Scales what came before.
void softmax_block(float* s, uint64_t bits, int t0, int t1, float cap, int64_t wide, float* acc, float* sum, float* max) {
  const V none = vset(-__builtin_inff());
  V x[4], top = none;
  for (int t = t0; t < t1; ++t) {
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
  for (int t = t0; t < t1; ++t) {
    x[t] = vexp2_below0(vsub(x[t], vset(m)));
    vstore(s + 16 * t, x[t]);
    total = vadd(total, x[t]);
  }
  vstore(sum, total);
}

void clear(const State& s, int64_t pairs, int64_t wide) {
  memset(s.acc, 0, static_cast<size_t>(pairs * wide) * 4);
  memset(s.sum, 0, static_cast<size_t>(pairs) * 64);
  for (int64_t p = 0; p < pairs; ++p) s.max[p] = -__builtin_inff();
}

// `to` followed by `from`.
void merge(const State& to, const State& from, int64_t pairs, int64_t wide) {
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

// One block of keys for the unit's rows [r0, r1); bits[r] say what row r sees.
void block(const Job& j, const Entries& e, const int64_t* offset, const uint64_t* bits, int64_t r0, int64_t r1, const Scratch& s, const Ahead* ahead) {
  uint64_t seen = 0;
  for (int64_t r = r0; r < r1; ++r) seen |= bits[r];
  if (!seen) return;
  const int64_t dim = j.a.dim, wide = j.wide, nq = j.n_query;
  switch (e.dtype) {
    case Dtype::f32: load_block<Dtype::f32>(e, offset, seen, dim, wide, s, ahead); break;
    case Dtype::f16: load_block<Dtype::f16>(e, offset, seen, dim, wide, s, ahead); break;
    default: load_block<Dtype::bf16>(e, offset, seen, dim, wide, s, ahead);
  }
  while (!bits[r0]) ++r0;
  while (!bits[r1 - 1]) --r1;
  const int t0 = __builtin_ctzll(seen) / 16, t1 = (63 - __builtin_clzll(seen)) / 16 + 1;
  product(s.q + r0 * nq * dim, dim, (r1 - r0) * nq, s.kt + 16 * t0, kBlock, t1 - t0, s.s + r0 * nq * kBlock + 16 * t0, kBlock, dim, false,
          ahead ? ahead + 2 : nullptr);
  if (ahead) ahead[2].rest(dim);
  const float cap = j.a.softcap * kLog2e;
  for (int64_t r = r0; r < r1; ++r)
    for (int64_t p = r * nq; bits[r] && p < (r + 1) * nq; ++p)
      softmax_block(s.s + p * kBlock, bits[r], t0, t1, cap, wide, s.chunk.acc + p * wide, s.chunk.sum + 16 * p, s.chunk.max + p);
  for (int64_t r = r0, next; r < r1; r = next) {  // rows that see the same keys together, one run of keys at a time
    for (next = r + 1; next < r1 && bits[next] == bits[r]; ++next) {}
    for (uint64_t left = bits[r]; left;) {
      const int lo = __builtin_ctzll(left);
      const uint64_t gaps = ~(left >> lo);
      const int n = gaps ? __builtin_ctzll(gaps) : 64 - lo, length = n < 64 - lo ? n : 64 - lo;
      product(s.s + r * nq * kBlock + lo, kBlock, (next - r) * nq, s.v + lo * wide, wide, wide / 16, s.chunk.acc + r * nq * wide, wide, length, true,
              ahead && lo == 0 ? ahead + 3 : nullptr);
      left &= ~(low_bits(length) << lo);
    }
  }
}

void load_queries(const Job& j, const Unit& u, const GroupStep& g, float* q) {
  const AttentionArgs& a = j.a;
  const float scale = a.softcap != 0.0f ? a.scale / a.softcap : a.scale * kLog2e;
  for (int64_t r = 0; r < u.n_rows; ++r) {
    const float* from = a.q.row(u.row + r) + g.heads[u.head] * j.n_query * a.dim;
    float* to = q + r * j.n_query * a.dim;
    for (int64_t i = 0; i < j.n_query * a.dim; ++i) to[i] = from[i] * scale;
  }
}

void store_out(const Job& j, const Unit& u, const State& s) {
  const GroupStep& g = j.step.groups[u.group];
  const int64_t dim = j.a.dim;
  for (int64_t p = 0; p < u.n_rows * j.n_query; ++p) {
    float* out = j.a.out.row(u.row + p / j.n_query) + (g.heads[u.head] * j.n_query + p % j.n_query) * dim;
    const V sum = vset(vsum(vload(s.sum + 16 * p)));
    for (int64_t d = 0; d < dim; d += 16) vstore(out + d, vdiv(vload(s.acc + p * j.wide + d), sum), min_of<int64_t>(16, dim - d));
  }
}

// Block b of the unit: most rows together, tree rows that see part of a draft one by one.
void blocks(const Job& j, const Unit& u, const Sight& sight, const Entries& e, const int64_t* offset, int64_t b, const Scratch& s, const Ahead* ahead) {
  uint64_t bits[kPairs], alone[kPairs];
  const bool drafts = sight.mask && (b + 1) * kBlock > sight.tail;
  for (int64_t r = 0; r < u.n_rows; ++r) {
    bits[r] = sight.bits(u.row + r, b * kBlock);
    alone[r] = drafts && sight.is_tree(u.row + r) ? bits[r] : 0;
    bits[r] ^= alone[r];
  }
  block(j, e, offset, bits, 0, u.n_rows, s, ahead);
  for (int64_t r = 0; drafts && r < u.n_rows; ++r) {
    if (!alone[r]) continue;
    int64_t own[kBlock];
    e.offsets(b * kBlock, sight, u.row + r, own);
    block(j, e, own, alone, r, r + 1, s, nullptr);
  }
}

// Walks the unit's chunks; the result goes to `out`, or chunk by chunk to `parts`.
void attend(const Job& j, const Unit& u, int thread) {
  const GroupStep& g = j.step.groups[u.group];
  Scratch s = scratch_of(j, thread);
  const State own = s.chunk;
  const Sight sight(j, g, u.seq);
  const Entries entries(g, u);
  const Sight::Range range = sight.range(u.row, u.n_rows);
  const int64_t pairs = u.n_rows * j.n_query;
  memset(s.zero, 0, static_cast<size_t>(j.wide) * 4);
  load_queries(j, u, g, s.q);
  if (u.part < 0) clear(s.total, pairs, j.wide);
  int64_t offsets[2][kBlock];
  const char* rows[2 * kBlock];
  const int64_t bytes = entries.row_bytes;
  const Ahead ahead[4] = {{rows, 0, bytes}, {rows, 64, bytes}, {rows + kBlock, 0, bytes}, {rows + kBlock, 64, bytes}};
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
      blocks(j, u, sight, entries, offsets[b & 1], b, s, (b + 1) * kBlock < end ? ahead : nullptr);
    }
    if (u.part < 0) merge(s.total, s.chunk, pairs, j.wide);
  }
  if (u.part < 0) store_out(j, u, s.total);
}

void join(const Job& j, const Unit& u, int thread) {  // the parts of one unit, all its chunks, in order
  const State total = scratch_of(j, thread).total;
  clear(total, u.n_rows * j.n_query, j.wide);
  for (int64_t c = 0; c < u.n_chunks; ++c) merge(total, j.state(j.parts + (u.part + c) * j.state_floats), u.n_rows * j.n_query, j.wide);
  store_out(j, u, total);
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
      const Sight sight(j, g, s);
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
