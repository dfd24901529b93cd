// Linear on AMX tiles. A B tile is 1 KiB of the packed layout as it lies in memory: 32 (bf16) or 64 (int8) k's of 16 outputs. int4 is
// unpacked to such tiles first: signed bytes, factors taken in. int8 in groups of k's with a float scale each is unpacked to bfloat16: sums
// of integers would have to leave the tiles after every group, which takes four times as long as the products. int4g has more codes a
// byte, and unpacking takes longer than memory: it stays on vectors. C is two blocks of 16 rows by two of 16 outputs (one by four where rows are few).
//
// Few rows (up to two blocks): bound by memory. Weights pass once, in order, straight into tiles; C stays in tiles over all of K.
//
// Many rows: bound by arithmetic. Tiles are read twice as often as they are multiplied, so half of them must come from L1 (48 KiB):
//   for a strip of outputs and a panel of rows (a task)
//     for a chunk of K                                        A: panel x chunk, 256 KiB, stays in L2
//       for a pair of lane blocks of the strip                B: 2 x chunk, 32 KiB, stays in L1: A is loaded past it
//         for a pair of row blocks of the panel               C += A B; C waits in L2 between chunks
// Meanwhile the next pair's B, the next chunk's A and the rows to be added are fetched into L2. What is written is written once and
// too large to be read from a cache later: it goes past them.
#pragma once
#include "linear.h"

#if PL_AMX
namespace paceline {
namespace PL_ISA {
namespace {

constexpr int64_t kTile = 1024;

enum class Kind { bf16, int8 };  // bfloat16, or signed bytes: one sum over all of K either way

struct Plan {
  Kind kind;
  bool unpacks;            // B comes from scratch
  int64_t mr;              // rows of an A tile
  int64_t n_tiles, chunk;  // k tiles, and how many make a chunk
  int64_t strip, panel;    // leading lane blocks, rows
  int64_t n_strips, n_panels;
  uint8_t* scratch;        // per thread
  int64_t scratch_size, unpacked_at;
};

// Where tiles come from: rows of A at `a`, lane blocks of B at `b`; steps from one row block, lane block and k tile to the next.
struct Operands { const uint8_t* a; int64_t a_block, a_step; const uint8_t* b; int64_t b_block; };

// What is fetched while a product runs: at each step `lines` more cache lines of `n_blocks` streams, into L2; or stream by stream into L1.
struct Fetch {
  const uint8_t* p;
  int64_t block, n_blocks, lines;
  PL_INLINE void block_step(int64_t b, int64_t t) const {
    for (int64_t i = 0; b < n_blocks && i < lines; ++i) __builtin_prefetch(p + b * block + (t * lines + i) * 64, 0, 3);
  }
  PL_INLINE void step(int64_t t) const {
    for (int64_t b = 0; b < n_blocks; ++b)
      for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(p + b * block + (t * lines + i) * 64, 0, 2);
  }
};

#define PL_TDP(c, a, b)                                                                             \
  do {                                                                                              \
    if constexpr (kKind == Kind::bf16) _tile_dpbf16ps(c, a, b);                                     \
    else _tile_dpbssd(c, a, b);                                                                     \
  } while (0)

#define PL_LOAD_A(t, p)                               \
  do {                                                \
    if constexpr (kPast) _tile_stream_loadd(t, p, 64); \
    else _tile_loadd(t, p, 64);                       \
  } while (0)

// Weights and activations that are multiplied next, and the rows that are added to this product's result, `per_step` at each step.
struct Ahead {
  Fetch b, a;
  const float* add;
  int64_t stride, per_step;
  PL_INLINE void rows(int64_t t) const {
    for (int64_t r = t * per_step; r < (t + 1) * per_step; ++r) __builtin_prefetch(add + r * stride, 0, 2), __builtin_prefetch(add + r * stride + 16, 0, 2);
  }
};

// C tiles 0..3 += A B over n steps, A in tiles 4 and 5, B in 6 and 7. Two row blocks: C = 2 r + b. One: C = b.
// kPast: A is loaded past L1, which keeps B there.
template <Kind kKind, int kRows, int kBlocks, bool kPast> PL_INLINE void accumulate(const Operands& o, int64_t n, const Ahead& ahead) {
  for (int64_t t = 0; t < n; ++t) {
    const uint8_t *a = o.a + t * o.a_step, *b = o.b + t * kTile;
    if constexpr (kPast) ahead.b.step(t), ahead.a.step(t), ahead.rows(t);
    if constexpr (kRows == 2) {
      _tile_loadd(6, b, 64);
      PL_LOAD_A(4, a);
      PL_TDP(0, 4, 6);
      if constexpr (kBlocks > 1) { _tile_loadd(7, b + o.b_block, 64); PL_TDP(1, 4, 7); }
      PL_LOAD_A(5, a + o.a_block);
      PL_TDP(2, 5, 6);
      if constexpr (!kPast) ahead.b.block_step(0, t);
      if constexpr (kBlocks > 1) PL_TDP(3, 5, 7);
      if constexpr (!kPast && kBlocks > 1) ahead.b.block_step(1, t);
    } else {
      PL_LOAD_A(4, a);
      _tile_loadd(6, b, 64);
      PL_TDP(0, 4, 6);
      if constexpr (!kPast) ahead.b.block_step(0, t);
      if constexpr (kBlocks > 1) { _tile_loadd(7, b + o.b_block, 64); PL_TDP(1, 4, 7); }
      if constexpr (!kPast && kBlocks > 1) ahead.b.block_step(1, t);
      if constexpr (kBlocks > 2) { _tile_loadd(6, b + 2 * o.b_block, 64); PL_TDP(2, 4, 6); }
      if constexpr (!kPast && kBlocks > 2) ahead.b.block_step(2, t);
      if constexpr (kBlocks > 3) { _tile_loadd(7, b + 3 * o.b_block, 64); PL_TDP(3, 4, 7); }
      if constexpr (!kPast && kBlocks > 3) ahead.b.block_step(3, t);
    }
  }
}

template <int kRows, int kBlocks> PL_INLINE void zero_tiles() {
  _tile_zero(0);
  if constexpr (kBlocks > 1) _tile_zero(1);
  if constexpr (kRows == 2 || kBlocks > 2) _tile_zero(2);
  if constexpr (kRows * kBlocks == 4) _tile_zero(3);
}

// Tile c (row block c / kBlocks, block c % kBlocks) of the tile numbering in `accumulate`, at p + c KiB.
template <int kRows, int kBlocks> PL_INLINE void load_tiles(const uint8_t* p) {
  publish(p);
  _tile_loadd(0, p, 64);
  if constexpr (kBlocks > 1) _tile_loadd(1, p + kTile, 64);
  if constexpr (kRows == 2) _tile_loadd(2, p + kBlocks * kTile, 64);
  if constexpr (kRows == 2 && kBlocks > 1) _tile_loadd(3, p + 3 * kTile, 64);
  if constexpr (kRows == 1 && kBlocks > 2) _tile_loadd(2, p + 2 * kTile, 64);
  if constexpr (kRows == 1 && kBlocks > 3) _tile_loadd(3, p + 3 * kTile, 64);
}

template <int kRows, int kBlocks> PL_INLINE void store_tiles(uint8_t* p) {
  _tile_stored(0, p, 64);
  if constexpr (kBlocks > 1) _tile_stored(1, p + kTile, 64);
  if constexpr (kRows == 2) _tile_stored(2, p + kBlocks * kTile, 64);
  if constexpr (kRows == 2 && kBlocks > 1) _tile_stored(3, p + 3 * kTile, 64);
  if constexpr (kRows == 1 && kBlocks > 2) _tile_stored(2, p + 2 * kTile, 64);
  if constexpr (kRows == 1 && kBlocks > 3) _tile_stored(3, p + 3 * kTile, 64);
  publish(p);
}

// ---- codes into tiles ----

// Byte kAt of each lane's four, put into the mantissa of 32768, gives 32768 + byte: times the scale, less 32896 scales, it is the scaled
// weight of code byte - 128, exactly.
template <int kAt> PL_INLINE __m512i scaled_weights(__m512i v, __m512 scale, __m512 back) {
  const __m512i from = _mm512_set4_epi32((12 + kAt) << 8, (8 + kAt) << 8, (4 + kAt) << 8, kAt << 8), one = _mm512_set1_epi32(0x47000000);
  const __m512i f = _mm512_mask_shuffle_epi8(one, 0x2222222222222222, v, from);
  return _mm512_castps_si512(_mm512_fmsub_ps(_mm512_castsi512_ps(f), scale, back));
}

// Two vectors as bfloat16 in pairs, ties away from zero: a conversion and a permutation would take twice as long.
PL_INLINE __m512i rounded_pairs(__m512i first, __m512i second) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_add_epi32(first, half), 16), _mm512_add_epi32(second, half));
}

// 32 k's of 16 outputs of int8 in groups: four k's a vector.
PL_INLINE void unpack_scaled(const uint8_t* from, V scale, uint8_t* to) {
  const __m512 s = scale.v, back = _mm512_mul_ps(s, _mm512_set1_ps(32896.0f));
  const __m512i flip = _mm512_set1_epi8(-128);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512i v = _mm512_xor_si512(_mm512_loadu_si512(from + i * 64), flip);
    _mm512_store_si512(to + i * 128, rounded_pairs(scaled_weights<0>(v, s, back), scaled_weights<1>(v, s, back)));
    _mm512_store_si512(to + i * 128 + 64, rounded_pairs(scaled_weights<2>(v, s, back), scaled_weights<3>(v, s, back)));
  }
}

// Factors of one group as words: their sizes, all bits where they are negative, and what is added to every byte for the 8 that codes are
// less.
struct Factors { __m512i size, negative, add; };
PL_INLINE Factors spread_factors(const int8_t* p) {
  const __m512i f = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), size = _mm512_abs_epi32(f);
  const __m512i words = _mm512_or_si512(size, _mm512_slli_epi32(size, 16)), negative = _mm512_srai_epi32(f, 31);
  const __m512i eight = _mm512_slli_epi16(_mm512_or_si512(words, _mm512_slli_epi16(words, 8)), 3);  // at most 120: none spills
  // -8 size, or where negative 8 size + 1 = ~(-8 size) + 2
  const __m512i less = _mm512_sub_epi8(_mm512_setzero_si512(), eight);
  const __m512i add = _mm512_sub_epi8(_mm512_xor_si512(less, negative), _mm512_add_epi8(negative, negative));
  return {words, negative, add};
}

// (code - 8) * factor of two codes a word, 0..15 in each byte: a product of at most 15 * 15 does not reach the byte above. With a
// negative factor -x is ~x + 1.
PL_INLINE __m512i times_factors(__m512i codes, const Factors& f) {
  return _mm512_add_epi8(_mm512_xor_si512(_mm512_mullo_epi16(codes, f.size), f.negative), f.add);
}

// 64 k's of the factored format: two groups.
PL_INLINE void unpack_factored(const uint8_t* from, const int8_t* factors, uint8_t* to) {
  const Factors f0 = spread_factors(factors), f1 = spread_factors(factors + 16);
  const __m512i nibbles = _mm512_set1_epi8(15);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512i v = _mm512_loadu_si512(from + i * 64);
    _mm512_store_si512(to + i * 64, times_factors(_mm512_and_si512(v, nibbles), f0));
    _mm512_store_si512(to + 512 + i * 64, times_factors(_mm512_and_si512(_mm512_srli_epi16(v, 4), nibbles), f1));
  }
}

// Tile t of lane block b. `ahead`: bytes to what is fetched meanwhile.
PL_INLINE void unpack_tile(const Job& j, int64_t b, int64_t t, uint8_t* to, int64_t ahead) {
  const uint8_t* from = j.weights(b) + t * 512;
  for (int i = 0; i < 8; ++i) __builtin_prefetch(from + ahead + i * 64, 0, 3);
  if (j.w.format == Format::int4) {
    const int8_t* factors = j.w.factors + (b * j.n_groups + 2 * t) * 16;  // a byte for 16 of codes
    __builtin_prefetch(factors + ahead / 16, 0, 3);
    return unpack_factored(from, factors, to);
  }
  unpack_scaled(from, scales_of(j.w, j.n_groups, b, t * 32 / j.w.group).scale, to);
}

// ---- C of kRows row blocks from `row` and kBlocks lane blocks from `block`, over k tiles [t0, t0 + n) ----

struct Micro { int64_t row, block, t0, n; Operands o; uint8_t* sums; Ahead ahead; };

// The finished sums at `from` (tiles of C) to the output.
template <Kind kKind, int kRows, int kBlocks> PL_INLINE void finish(const Job& j, const Plan& p, const Micro& m, const uint8_t* from) {
  Scales s[kBlocks];
  for (int b = 0; b < kBlocks; ++b) s[b] = kKind == Kind::int8 ? scales_of(j.w, 1, m.block + b * j.apart, 0) : Scales{vzero(), vzero()};
  const auto each_row = [&](auto store) {
    for (int rb = 0; rb < kRows; ++rb) {
      const int64_t row = m.row + rb * p.mr, rows = min_of(p.mr, j.n_rows - row);
      const float* xs = kKind == Kind::int8 ? j.a.scale + j.a.scale_at(row, 0) : nullptr;
      const uint8_t* c = from + rb * kBlocks * kTile;
      for (int64_t r = 0; r < rows; ++r, c += 64) {
        V y[kBlocks];
        for (int b = 0; b < kBlocks; ++b) {
          if constexpr (kKind == Kind::int8) y[b] = fold<false>(vzero(), iload(c + b * kTile), xs[r], 0, s[b]);
          else y[b] = vload(reinterpret_cast<const float*>(c + b * kTile));
        }
        store(row + r, y);
      }
    }
  };
  if constexpr (kBlocks == 2)
    if (j.gate) return with_act(j.kind, [&](auto act) { each_row([&](int64_t row, const V(&y)[kBlocks]) { store_gated(j, row, m.block, y[0], y[1], act); }); });
  each_row([&](int64_t row, const V(&y)[kBlocks]) {
    for (int b = 0; b < kBlocks; ++b) store_block(j, row, m.block + b, y[b]);
  });
}

// One sum in float32 (bf16) or int32 over all of K; it waits at `sums` between chunks.
template <Kind kKind, int kRows, int kBlocks> void micro_plain(const Job& j, const Plan& p, const Micro& m) {
  if (m.t0 == 0) zero_tiles<kRows, kBlocks>();
  else load_tiles<kRows, kBlocks>(m.sums);
  accumulate<kKind, kRows, kBlocks, true>(m.o, m.n, m.ahead);
  store_tiles<kRows, kBlocks>(m.sums);
  if (m.t0 + m.n == p.n_tiles) finish<kKind, kRows, kBlocks>(j, p, m, m.sums);
}

template <int kRows, int kBlocks> PL_INLINE void micro(const Job& j, const Plan& p, const Micro& m) {
  if (p.kind == Kind::bf16) micro_plain<Kind::bf16, kRows, kBlocks>(j, p, m);
  else micro_plain<Kind::int8, kRows, kBlocks>(j, p, m);
}

// ---- few rows ----

// Lane blocks [at, at + kBlocks) over all of K, from the weights as they lie in memory. Sums stay in tiles.
template <Kind kKind, int kRows, int kBlocks> PL_INLINE void few_packed(const Job& j, const Plan& p, int64_t at) {
  const uint8_t* b = j.weights(at);
  const Operands o = {j.a.row(0), j.a.wide * 16 * 64, j.a.mr * 64, b, j.step};
  const Fetch fetch = Fetch{b + kTile, j.step, kBlocks, 16};
  accumulate<kKind, kRows, kBlocks, false>(o, p.n_tiles, {fetch, {}, nullptr, 0, 0});
}

// The same for weights that must be unpacked: each product overlaps with the unpacking of the next k tile, on other ports.
template <Kind kKind, int kRows, int kBlocks> PL_INLINE void few_unpacked(const Job& j, const Plan& p, int64_t at, uint8_t* scratch) {
  const auto unpack = [&](int b, int64_t t) { unpack_tile(j, at + b * j.apart, t, scratch + (t % 2 * kBlocks + b) * kTile, ahead_of<kBlocks>(j, t * 512)); };
  for (int b = 0; b < kBlocks; ++b) unpack(b, 0);
  for (int64_t t = 0; t < p.n_tiles; ++t) {
    const bool more = t + 1 < p.n_tiles;
    const uint8_t *a = j.a.row(0) + t * j.a.mr * 64, *tiles = scratch + t % 2 * kBlocks * kTile;
    publish(tiles);
    _tile_loadd(4, a, 64);
    if constexpr (kRows == 2) _tile_loadd(5, a + j.a.wide * 16 * 64, 64);
    _tile_loadd(6, tiles, 64);
    PL_TDP(0, 4, 6);
    if constexpr (kRows == 2) PL_TDP(2, 5, 6);
    if (more) unpack(0, t + 1);
    if constexpr (kBlocks > 1) {
      _tile_loadd(7, tiles + kTile, 64);
      PL_TDP(1, 4, 7);
      if constexpr (kRows == 2) PL_TDP(3, 5, 7);
      if (more) unpack(1, t + 1);
    }
    if constexpr (kBlocks > 2) {
      _tile_loadd(6, tiles + 2 * kTile, 64);
      PL_TDP(2, 4, 6);
      if (more) unpack(2, t + 1);
    }
    if constexpr (kBlocks > 3) {
      _tile_loadd(7, tiles + 3 * kTile, 64);
      PL_TDP(3, 4, 7);
      if (more) unpack(3, t + 1);
    }
  }
}

template <Kind kKind, int kRows, int kBlocks> void few_blocks(const Job& j, const Plan& p, int64_t at, uint8_t* scratch) {
  zero_tiles<kRows, kBlocks>();
  if (p.unpacks) few_unpacked<kKind, kRows, kBlocks>(j, p, at, scratch + p.unpacked_at);
  else few_packed<kKind, kRows, kBlocks>(j, p, at);
  store_tiles<kRows, kBlocks>(scratch);
  finish<kKind, kRows, kBlocks>(j, p, {0, at, 0, p.n_tiles, {}, scratch, {}}, scratch);
}

template <int kRows, int kBlocks> void few_blocks(const Job& j, const Plan& p, int64_t at, uint8_t* scratch) {
  if (p.kind == Kind::bf16) few_blocks<Kind::bf16, kRows, kBlocks>(j, p, at, scratch);
  else few_blocks<Kind::int8, kRows, kBlocks>(j, p, at, scratch);
}

inline void few_rows(const Job& j, const Plan& p, int64_t first, int64_t last, uint8_t* scratch) {
  publish(j.a.q);
  const bool two = j.n_rows > 16;
  for (int64_t at = first; at < last;) {
    const int64_t left = last - at;
    if (j.gate) {
      if (two) few_blocks<2, 2>(j, p, at, scratch);
      else few_blocks<1, 2>(j, p, at, scratch);
      at += 1;
    } else if (two) {
      if (left >= 2) few_blocks<2, 2>(j, p, at, scratch), at += 2;
      else few_blocks<2, 1>(j, p, at, scratch), at += 1;
    } else {
      if (left >= 4) few_blocks<1, 4>(j, p, at, scratch), at += 4;
      else if (left >= 2) few_blocks<1, 2>(j, p, at, scratch), at += 2;
      else few_blocks<1, 1>(j, p, at, scratch), at += 1;
    }
  }
}

// ---- many rows ----

// A task: leading lane blocks [first, last) of rows [row0, row1).
struct Task { int64_t first, last, row0, row1; };
inline Task task_of(const Job& j, const Plan& p, int64_t i) {
  const int64_t first = i % p.n_strips * p.strip, row0 = i / p.n_strips * p.panel;
  return {first, min_of(j.n_lead, first + p.strip), row0, min_of(j.n_rows, row0 + p.panel)};
}

// A pair of lane blocks (or the last one) for all rows of a panel, over k tiles [t0, t0 + n). Meanwhile come the next pair's weights and
// this pair's share of the activations of the next chunk: `share` lines of each k tile, from the first row block of the panel at `a`.
struct Stage { int64_t at, t0, n; const uint8_t *next_b, *next_a; int64_t share; uint8_t* sums; };

template <int kBlocks> void panel_rows(const Job& j, const Plan& p, const Task& task, const Stage& g, uint8_t* scratch) {
  Operands o = {nullptr, j.a.wide * kTile, kTile, j.weights(g.at) + g.t0 * kTile, j.step};
  if (p.unpacks) {
    o.b = scratch + p.unpacked_at, o.b_block = p.chunk * kTile;
    for (int b = 0; b < kBlocks; ++b)
      for (int64_t t = 0; t < g.n; ++t) unpack_tile(j, g.at + b * j.apart, g.t0 + t, scratch + p.unpacked_at + (b * p.chunk + t) * kTile, kPrefetch);
  }
  publish(o.b);
  const int64_t lines = min_of<int64_t>(4, ceil_div(16 * 32, task.row1 - task.row0));  // so that all of the next pair's chunk comes
  const bool adds = j.add.p && g.t0 + g.n == p.n_tiles;
  uint8_t* sums = g.sums;
  for (int64_t row = task.row0; row < task.row1; row += 32, sums += 2 * kBlocks * kTile) {
    const int64_t pair = (row - task.row0) / 32;
    o.a = j.a.row(row) + g.t0 * kTile;
    const Fetch fetch_b = {g.next_b + pair * g.n * lines * 64, j.step, p.unpacks ? 0 : kBlocks, lines};
    const Fetch fetch_a = {g.next_a + 2 * pair * o.a_block, o.a_block, 2, g.share};
    const float* add = adds ? j.add.row(row) + g.at * 16 : nullptr;
    const Micro m = {row, g.at, g.t0, g.n, o, sums, {fetch_b, fetch_a, add, j.add.stride, adds ? ceil_div(32, g.n) : 0}};
    if (task.row1 - row > 16) micro<2, kBlocks>(j, p, m);
    else micro<1, kBlocks>(j, p, m);
  }
}

inline void many_rows(const Job& j, const Plan& p, const Task& task, const Task& next, uint8_t* scratch) {
  publish(j.a.q);
  const int64_t lead = j.gate ? 1 : 2, n_pairs = ceil_div(task.last - task.first, lead);  // leading blocks of a pair
  const int64_t pair_sums = ceil_div(task.row1 - task.row0, 32) * 4 * kTile, panel_bytes = (task.row1 - task.row0) * 64 * p.n_tiles;
  const int64_t share = panel_bytes <= kPanelBytes ? 0 : min_of<int64_t>(4, ceil_div(16, n_pairs));
  for (int64_t t0 = 0; t0 < p.n_tiles; t0 += p.chunk) {
    const int64_t n = min_of(p.chunk, p.n_tiles - t0), t1 = t0 + n;
    const bool last = t1 == p.n_tiles;
    const uint8_t* next_a = j.a.row(last ? next.row0 : task.row0) + (last ? 0 : t1) * kTile;
    for (int64_t i = 0; i < n_pairs; ++i) {
      const int64_t at = task.first + i * lead;
      const uint8_t* next_b = i + 1 < n_pairs ? j.weights(at + lead) + t0 * kTile : last ? j.weights(next.first) : j.weights(task.first) + t1 * kTile;
      const Stage g = {at, t0, n, next_b, next_a + i * share * n * 64, share, scratch + (p.chunk == p.n_tiles ? 0 : i * pair_sums)};
      if (j.gate || task.last - at > 1) panel_rows<2>(j, p, task, g, scratch);
      else panel_rows<1>(j, p, task, g, scratch);
    }
  }
}

// ---- the plan ----

inline void configure(const Plan& p) {
  TileConfig t;
  for (int i = 0; i < 8; ++i) t.bytes[i] = 64, t.rows[i] = static_cast<uint8_t>(i < 6 ? p.mr : 16);
  publish(&t);
  _tile_loadconfig(&t);
}

inline Plan amx_plan(const Ctx& c, const Job& j) {
  Plan p = {};
  p.kind = on_codes(j.w, true) ? Kind::int8 : Kind::bf16;
  p.unpacks = j.w.format == Format::int4 || as_floats(j.w);
  p.mr = j.a.mr, p.n_tiles = j.a.n_tiles;
  const bool few = j.n_rows <= kFewRows;
  const int64_t limit = few ? p.n_tiles : kChunkMany;
  p.chunk = ceil_div(p.n_tiles, ceil_div(p.n_tiles, limit));
  p.panel = few ? j.n_rows : p.unpacks ? kPanelUnpacked : kPanelRows;
  p.n_panels = ceil_div(j.n_rows, p.panel);
  const int64_t lead = j.gate ? 1 : 2;  // leading blocks of a pair
  const int64_t share = ceil_div(j.n_lead * p.n_panels, kTasksPerThread * pool_size(c.pool));
  p.strip = few ? ceil_div(j.n_lead, even_tasks(c, j.n_lead, j.block * 2 / lead)) : min_of(kMaxStrip * lead / 2, max_of(lead, share));
  p.strip = round_up(p.strip, lead);
  p.n_strips = ceil_div(j.n_lead, p.strip);
  const int64_t n_pairs = p.chunk == p.n_tiles ? 1 : p.strip / lead, row_pairs = ceil_div(min_of(p.panel, j.n_rows), 32);
  p.unpacked_at = (few ? 1 : n_pairs * row_pairs) * 4 * kTile;
  p.scratch_size = p.unpacked_at + (!p.unpacks ? 0 : few ? 8 * kTile : 4 * p.chunk * kTile);
  p.scratch = take<uint8_t>(c, p.scratch_size * pool_size(c.pool));
  return p;
}

// Whether outputs are too many to stay in a cache, and in whole lines.
inline bool streams(const Job& j) {
  const int64_t cols = j.n_lead * 16;
  const bool lines = reinterpret_cast<uintptr_t>(j.out.p) % 64 == 0 && j.out.stride % 16 == 0;
  return lines && !j.add.p && j.n_rows > kFewRows && j.n_rows * cols * 4 >= kStreamBytes;
}

inline void run_amx(const Ctx& c, const Job& j) {
  const Plan p = amx_plan(c, j);
  const int64_t n = p.n_strips * p.n_panels;
  parallel(c, n, [&](int64_t i, int thread) {
    const Task task = task_of(j, p, i);
    uint8_t* scratch = p.scratch + thread * p.scratch_size;
    configure(p);
    if (j.n_rows <= kFewRows) few_rows(j, p, task.first, task.last, scratch);
    else many_rows(j, p, task, task_of(j, p, i + 1 < n ? i + 1 : i), scratch);
    _tile_release();
    if (j.streams) vfence();
  });
}

}  // namespace
}  // namespace PL_ISA
}  // namespace paceline
#endif
