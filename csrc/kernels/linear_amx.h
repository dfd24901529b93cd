// Linear on AMX tiles. A B tile is 1 KiB of the packed layout as it lies in memory: 32 (bf16) or 64 (int8) k's of 16 outputs; int4 is
// unpacked to such tiles first. A task takes a strip of lane blocks and a panel of rows, chunk of K by chunk of K, so that the strip's
// weights come from memory once and stay in L2 while all rows of the panel pass over them. Between chunks the sums wait in scratch.
#pragma once
#include "linear.h"

#if PL_AMX
namespace paceline {
namespace PL_ISA {
namespace {

enum class Kind { bf16, int8, int4 };  // what the tiles hold: bf16, signed bytes, unsigned codes

constexpr int64_t kTile = 1024;

struct Plan {
  Kind kind;
  bool grouped;            // scaled per group of k's
  int64_t mr;              // rows of an A tile
  int64_t n_tiles, chunk;  // k tiles, and how many make a chunk
  int64_t strip, panel;    // lane blocks, rows (a multiple of 32)
  int64_t n_strips, n_panels;
  uint8_t* scratch;        // per thread
  int64_t scratch_size, unpacked_at, tmp_at;
};

// Rows of A at row block `a`, blocks of B at `b` (`step` bytes from one to the next), tiles [0, n).
struct Operands { const uint8_t* a; int64_t a_block, a_step; const uint8_t* b; int64_t b_block; };

template <int kRows, int kBlocks, bool kStream> PL_INLINE void prefetch_tiles(const Operands& o, int64_t t) {
  if (!kStream) return;
  for (int b = 0; b < kBlocks; ++b)
    for (int i = 0; i < 16; ++i) __builtin_prefetch(o.b + b * o.b_block + t * kTile + 2 * kPrefetch + i * 64, 0, 2);
}

#define PL_TDP(c, a, b)                                               \
  do {                                                                \
    if constexpr (kKind == Kind::bf16) _tile_dpbf16ps(c, a, b);       \
    else if constexpr (kKind == Kind::int8) _tile_dpbssd(c, a, b);    \
    else _tile_dpbsud(c, a, b);                                       \
  } while (0)

// C tiles 0..3 += A B over n steps, A in tiles 4 and 5, B in 6 and 7. Two row blocks: C = 2 r + b. One: C = b.
template <Kind kKind, int kRows, int kBlocks, bool kStream> PL_INLINE void accumulate(const Operands& o, int64_t n, int64_t b_step) {
  for (int64_t t = 0; t < n; ++t) {
    const uint8_t *a = o.a + t * o.a_step, *b = o.b + t * b_step;
    prefetch_tiles<kRows, kBlocks, kStream>(o, t);
    if constexpr (kRows == 2) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a, 64);
      PL_TDP(0, 4, 6);
      if constexpr (kBlocks > 1) { _tile_loadd(7, b + o.b_block, 64); PL_TDP(1, 4, 7); }
      _tile_loadd(5, a + o.a_block, 64);
      PL_TDP(2, 5, 6);
      if constexpr (kBlocks > 1) PL_TDP(3, 5, 7);
    } else {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      PL_TDP(0, 4, 6);
      if constexpr (kBlocks > 1) { _tile_loadd(7, b + o.b_block, 64); PL_TDP(1, 4, 7); }
      if constexpr (kBlocks > 2) { _tile_loadd(6, b + 2 * o.b_block, 64); PL_TDP(2, 4, 6); }
      if constexpr (kBlocks > 3) { _tile_loadd(7, b + 3 * o.b_block, 64); PL_TDP(3, 4, 7); }
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
}

// A group of micro tiles: kRows row blocks from `row`, kBlocks lane blocks from `block`, k tiles [t0, t0 + n), sums at `sums`.
struct Micro { int64_t row, block, t0, n; Operands o; uint8_t *sums, *tmp; };

// One sum in float32 (bf16) or int32 (int8 per channel) over all of K.
template <Kind kKind, int kRows, int kBlocks, bool kStream> void micro_plain(const Job& j, const Plan& p, const Micro& m) {
  if (m.t0 == 0) zero_tiles<kRows, kBlocks>();
  else load_tiles<kRows, kBlocks>(m.sums);
  accumulate<kKind, kRows, kBlocks, kStream>(m.o, m.n, kTile);
  store_tiles<kRows, kBlocks>(m.sums);
  if (m.t0 + m.n < p.n_tiles) return;
  for (int b = 0; b < kBlocks; ++b) {
    const Scales s = kKind == Kind::bf16 ? Scales{vzero(), vzero()} : scales_of(j.w, 1, m.block + b, 0);
    for (int rb = 0; rb < kRows; ++rb) {
      const uint8_t* from = m.sums + (rb * kBlocks + b) * kTile;
      const int64_t row = m.row + rb * p.mr, rows = min_of(p.mr, j.n_rows - row);
      for (int64_t r = 0; r < rows; ++r, from += 64) {
        if constexpr (kKind == Kind::bf16) store_block(j, row + r, m.block + b, vload(reinterpret_cast<const float*>(from)));
        else store_block(j, row + r, m.block + b, fold<false>(vzero(), iload(from), 0, j.a.scale[row + r], j.a.sum[row + r], s));
      }
    }
  }
}

// Int32 sums per group, folded into float32 ones.
template <Kind kKind, bool kMins, int kRows, int kBlocks, bool kStream> void micro_grouped(const Job& j, const Plan& p, const Micro& m) {
  const int64_t group = j.w.group, steps = group > 64 ? group / 64 : 1;
  const int64_t g0 = m.t0 * 64 / group, g1 = (m.t0 + m.n) * 64 / group;
  constexpr int32_t offset = kKind == Kind::int4 && !kMins ? 8 : 0;
  for (int64_t g = g0; g < g1; ++g) {
    const int64_t k = g * group - m.t0 * 64, tile = k / 64, half = k % 64;
    const Operands o = {m.o.a + tile * m.o.a_step + half, m.o.a_block, m.o.a_step, m.o.b + tile * kTile + half * 16, m.o.b_block};
    zero_tiles<kRows, kBlocks>();
    accumulate<kKind, kRows, kBlocks, kStream>(o, steps, kTile);
    store_tiles<kRows, kBlocks>(m.tmp);
    for (int b = 0; b < kBlocks; ++b) {
      const Scales s = scales_of(j.w, j.n_groups, m.block + b, g);
      for (int rb = 0; rb < kRows; ++rb) {
        const uint8_t* dot = m.tmp + (rb * kBlocks + b) * kTile;
        float* sum = reinterpret_cast<float*>(m.sums + (rb * kBlocks + b) * kTile);
        const int64_t row = m.row + rb * p.mr, rows = min_of(p.mr, j.n_rows - row);
        const float* xs = j.a.scale + row * j.n_groups + g;
        const int32_t* xq = j.a.sum + row * j.n_groups + g;
        for (int64_t r = 0; r < rows; ++r, dot += 64, sum += 16, xs += j.n_groups, xq += j.n_groups)
          vstore(sum, fold<kMins>(g == 0 ? vzero() : vload(sum), iload(dot), offset, *xs, *xq, s));
      }
    }
  }
  if (m.t0 + m.n < p.n_tiles) return;
  for (int b = 0; b < kBlocks; ++b)
    for (int rb = 0; rb < kRows; ++rb) {
      const float* sum = reinterpret_cast<const float*>(m.sums + (rb * kBlocks + b) * kTile);
      const int64_t row = m.row + rb * p.mr, rows = min_of(p.mr, j.n_rows - row);
      for (int64_t r = 0; r < rows; ++r, sum += 16) store_block(j, row + r, m.block + b, vload(sum));
    }
}

template <int kRows, int kBlocks, bool kStream> PL_INLINE void micro(const Job& j, const Plan& p, const Micro& m) {
  if (p.kind == Kind::bf16) return micro_plain<Kind::bf16, kRows, kBlocks, kStream>(j, p, m);
  if (p.kind == Kind::int4) return j.w.mins ? micro_grouped<Kind::int4, true, kRows, kBlocks, false>(j, p, m) : micro_grouped<Kind::int4, false, kRows, kBlocks, false>(j, p, m);
  return p.grouped ? micro_grouped<Kind::int8, false, kRows, kBlocks, kStream>(j, p, m) : micro_plain<Kind::int8, kRows, kBlocks, kStream>(j, p, m);
}

template <int kRows, bool kStream> PL_INLINE void micro_blocks(const Job& j, const Plan& p, const Micro& m, int64_t n_blocks) {
  if (n_blocks == 1) return micro<kRows, 1, kStream>(j, p, m);
  if (n_blocks == 2) return micro<kRows, 2, kStream>(j, p, m);
  if constexpr (kRows == 1) {
    if (n_blocks == 3) return micro<1, 3, kStream>(j, p, m);
    return micro<1, 4, kStream>(j, p, m);
  }
}

// Codes of k tiles [t0, t0 + n) of blocks [first, last), one byte each, as B tiles of 64 k's.
inline void unpack_int4(const Job& j, int64_t first, int64_t last, int64_t t0, int64_t n, uint8_t* to) {
  for (int64_t b = first; b < last; ++b) {
    const uint8_t* from = j.weights(b) + t0 * 512;
    for (int64_t t = 0; t < n; ++t, from += 512, to += kTile)
      for (int i = 0; i < 8; ++i) {
        __builtin_prefetch(from + i * 64 + kPrefetch, 0, 3);
        const I v = iload(from + i * 64);
        _mm512_store_si512(to + i * 64, low_nibbles(v).v);
        _mm512_store_si512(to + 512 + i * 64, high_nibbles(v).v);
      }
  }
}

// Row blocks in pairs, lane blocks in pairs; a single row block with four lane blocks at once.
inline void amx_chunk(const Job& j, const Plan& p, int64_t first, int64_t last, int64_t row0, int64_t row1, int64_t t0, int64_t n, uint8_t* scratch) {
  const bool one_chunk = n == p.n_tiles;
  const uint8_t* b = j.weights(first) + t0 * kTile;
  int64_t b_block = j.block;
  if (p.kind == Kind::int4) {
    unpack_int4(j, first, last, t0, n, scratch + p.unpacked_at);
    b = scratch + p.unpacked_at, b_block = n * kTile;
  }
  publish(b);
  int64_t slot = 0;
  for (int64_t row = row0; row < row1;) {
    const bool pair = p.mr == 16 && row1 - row > 16;
    const int64_t most = pair ? 2 : 4;
    for (int64_t at = first; at < last; at += most) {
      const int64_t n_blocks = min_of(most, last - at);
      const uint8_t* a = j.a.row(row) + t0 * j.a.mr * 64;
      const Micro m = {row, at, t0, n, {a, p.n_tiles * 16 * 64, j.a.mr * 64, b + (at - first) * b_block, b_block},
                       scratch + (one_chunk ? 0 : slot), scratch + p.tmp_at};
      if (!pair) row == row0 ? micro_blocks<1, true>(j, p, m, n_blocks) : micro_blocks<1, false>(j, p, m, n_blocks);
      else row == row0 ? micro_blocks<2, true>(j, p, m, n_blocks) : micro_blocks<2, false>(j, p, m, n_blocks);
      slot += (pair ? 2 : 1) * n_blocks * kTile;
    }
    row += pair ? 32 : p.mr;
  }
}

inline void configure(const Plan& p, const Job& j) {
  TileConfig t;
  const int64_t k_bytes = p.grouped && j.w.group == 32 ? 32 : 64;  // of a step
  for (int i = 0; i < 8; ++i) {
    t.bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? k_bytes : 64);
    t.rows[i] = static_cast<uint8_t>(i < 6 ? p.mr : k_bytes / 4);
  }
  publish(&t);
  _tile_loadconfig(&t);
}

inline Plan amx_plan(const Ctx& c, const Job& j) {
  Plan p = {};
  p.kind = j.w.format == Format::bf16 ? Kind::bf16 : j.w.format == Format::int8 ? Kind::int8 : Kind::int4;
  p.grouped = j.w.group != 0;
  p.mr = j.a.mr, p.n_tiles = j.a.n_tiles;
  const bool few = j.n_rows <= 16;
  p.panel = few ? p.mr : kPanelRows;
  p.n_panels = ceil_div(j.n_rows, p.panel);
  const int64_t unpack = few ? kChunkFew : kChunkMany, limit = p.kind == Kind::int4 ? unpack : few ? p.n_tiles : kChunkMany;
  p.chunk = p.n_tiles <= limit + limit / 2 ? p.n_tiles : limit;
  const int64_t share = ceil_div(j.n_blocks * p.n_panels, kTasksPerThread * pool_size(c.pool));
  p.strip = few ? round_up(ceil_div(kTaskBytes, j.block), 4) : round_up(min_of(kMaxStrip, max_of<int64_t>(2, share)), 2);
  p.strip = min_of(p.strip, j.n_blocks);
  p.n_strips = ceil_div(j.n_blocks, p.strip);
  const int64_t row_blocks = ceil_div(min_of(p.panel, j.n_rows), p.mr), n_sums = p.chunk == p.n_tiles ? 4 : row_blocks * p.strip;
  p.unpacked_at = n_sums * kTile;
  p.tmp_at = p.unpacked_at + (p.kind == Kind::int4 ? p.strip * p.chunk * kTile : 0);
  p.scratch_size = p.tmp_at + 4 * kTile;
  p.scratch = take<uint8_t>(c, p.scratch_size * pool_size(c.pool));
  return p;
}

inline void run_amx(const Ctx& c, const Job& j) {
  const Plan p = amx_plan(c, j);
  parallel(c, p.n_strips * p.n_panels, [&](int64_t task, int thread) {
    const int64_t first = task % p.n_strips * p.strip, row0 = task / p.n_strips * p.panel;
    configure(p, j);
    for (int64_t t0 = 0; t0 < p.n_tiles; t0 += p.chunk)
      amx_chunk(j, p, first, min_of(j.n_blocks, first + p.strip), row0, min_of(j.n_rows, row0 + p.panel), t0,
                min_of(p.chunk, p.n_tiles - t0), p.scratch + thread * p.scratch_size);
    _tile_release();
  });
}

}  // namespace
}  // namespace PL_ISA
}  // namespace paceline
#endif
