// The product of attention_product.h on AMX tiles. A tile of A is 16 rows of 16 pairs, one of B 16 pairs of 16 lanes, straight from the
// layout that vectors read too; C is 16 x 16 float32. Two by two: C in tiles 0..3, A in 4 and 5, B in 6 and 7. A step of 16 pairs adds
// its even and its odd items apart and then both to C: bits of its own, but the same for every row, however many share the tile, and
// whether a row of queries meets columns of keys or rows of keys meet a column of queries.
#pragma once
#include "attention_product.h"
#include "paceline/tile.h"

#if PL_AMX
namespace paceline {
namespace PL_ISA {
namespace {

constexpr int64_t kTileRows = 16;

// Tiles configured as long as this lives: those of `tile_values` with the rows of a unit's pairs, if they are few.
struct Tiles {
  explicit Tiles(int64_t pairs) {
    TileConfig t;
    for (int i = 0; i < 8; ++i) t.bytes[i] = 64, t.rows[i] = kTileRows;
    if (pairs < kTileRows) t.rows[2] = t.rows[3] = t.rows[5] = static_cast<uint8_t>(pairs);
    publish(&t);
    _tile_loadconfig(&t);
  }
  ~Tiles() { _tile_release(); }
};

// Row blocks and column blocks of one pass; strides in items, A and B of pairs.
struct TileOperands { const Pair* a; int64_t lda; const Pair* b; int64_t ldb; float* c; int64_t ldc; };

template <int R, int N> void tile_pass(const TileOperands& o, int64_t steps, bool add) {
  const int64_t row = kTileRows * o.ldc, lda = o.lda * 4, ldb = o.ldb * 4, ldc = o.ldc * 4;
  if (add) {
    _tile_loadd(0, o.c, ldc);
    if constexpr (N > 1) _tile_loadd(1, o.c + 16, ldc);
    if constexpr (R > 1) _tile_loadd(2, o.c + row, ldc);
    if constexpr (R > 1 && N > 1) _tile_loadd(3, o.c + row + 16, ldc);
  } else {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && N > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; ++k) {
    const Pair *a = o.a + k * 16, *b = o.b + k * 16 * o.ldb;
    _tile_loadd(4, a, lda);
    _tile_loadd(6, b, ldb);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) { _tile_loadd(7, b + 16, ldb); _tile_dpbf16ps(1, 4, 7); }
    if constexpr (R > 1) { _tile_loadd(5, a + kTileRows * o.lda, lda); _tile_dpbf16ps(2, 5, 6); }
    if constexpr (R > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, o.c, ldc);
  if constexpr (N > 1) _tile_stored(1, o.c + 16, ldc);
  if constexpr (R > 1) _tile_stored(2, o.c + row, ldc);
  if constexpr (R > 1 && N > 1) _tile_stored(3, o.c + row + 16, ldc);
}

template <int R> void tile_columns(TileOperands o, int64_t nv, int64_t steps, bool add) {
  for (; nv >= 2; nv -= 2, o.b += 32, o.c += 32) tile_pass<R, 2>(o, steps, add);
  if (nv) tile_pass<R, 1>(o, steps, add);
}

// m <= 32, n a multiple of 16. The last row block of A is read whole, whatever its last rows hold. `edge`, 16 rows of 16 nv floats,
// stands in for rows of C beyond m, which are not the caller's.
inline void tile_product(const TileOperands& o, int64_t m, int64_t nv, int64_t n, bool add, float* edge) {
  publish(o.a), publish(o.b), publish(o.c);
  const int64_t whole = m / kTileRows, rest = m % kTileRows, steps = n / 16, wide = 16 * nv;
  if (whole == 2) tile_columns<2>(o, nv, steps, add);
  else if (whole == 1) tile_columns<1>(o, nv, steps, add);
  if (rest) {
    float* c = o.c + whole * kTileRows * o.ldc;
    const auto bytes = static_cast<size_t>(wide) * 4;
    for (int64_t i = 0; add && i < rest; ++i) memcpy(edge + i * wide, c + i * o.ldc, bytes);
    publish(edge);
    tile_columns<1>({o.a + whole * kTileRows * o.lda, o.lda, o.b, o.ldb, edge, wide}, nv, steps, add);
    publish(edge);
    for (int64_t i = 0; i < rest; ++i) memcpy(c + i * o.ldc, edge + i * wide, bytes);
  }
  publish(o.c);
}

// Keys as rows of A, just as they lie in the pool: with few pairs it would take longer to transpose keys than to multiply them.
// Scores (16 keys, 16 pairs) of each group [begin, end) of keys go to `scores`, as (64, 16); qt: (steps * 16, 16), queries as columns.
struct KeyRows { const char* p; int64_t stride; };  // sixteen keys
inline void tile_scores(const KeyRows* keys, int begin, int end, const Pair* qt, int64_t steps, float* scores, Ahead& ahead) {
  publish(qt);
  const int64_t share = (Ahead::kLoaded / 4 + steps - 1) / steps;
  for (int t = begin; t < end; t += 2) {  // whole pairs of groups, as `groups_of` gives them
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < steps; ++k) {
      ahead.more(share);
      _tile_loadd(6, qt + k * 256, 64);
      _tile_loadd(4, keys[t].p + k * 64, keys[t].stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, keys[t + 1].p + k * 64, keys[t + 1].stride);
      _tile_dpbf16ps(1, 7, 6);
    }
    _tile_stored(0, scores + t * 256, 64);
    _tile_stored(1, scores + (t + 1) * 256, 64);
  }
  publish(scores);
}

// acc (pairs, 16 nv) += w (pairs, 16 steps) v (16 steps, 16 nv), for as many pairs as the tiles are configured for.
inline void tile_values(const Pair* w, int64_t ldw, const Pair* v, int64_t ldv, int64_t steps, float* acc, int64_t nv, Ahead& ahead) {
  publish(w), publish(v), publish(acc);
  const int64_t share = Ahead::share((nv + 1) / 2 * steps);
  for (int64_t n = 0; n < nv; n += 2) {
    const bool two = n + 1 < nv;
    float* c = acc + 16 * n;
    _tile_loadd(2, c, 64 * nv);
    if (two) _tile_loadd(3, c + 16, 64 * nv);
    for (int64_t k = 0; k < steps; ++k) {
      ahead.more(share);
      _tile_loadd(5, w + 16 * k, 4 * ldw);
      _tile_loadd(6, v + 16 * k * ldv + 16 * n, 4 * ldv);
      _tile_dpbf16ps(2, 5, 6);
      if (!two) continue;
      _tile_loadd(7, v + 16 * k * ldv + 16 * n + 16, 4 * ldv);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(2, c, 64 * nv);
    if (two) _tile_stored(3, c + 16, 64 * nv);
  }
  publish(acc);
}

}  // namespace
}  // namespace PL_ISA
}  // namespace paceline
#endif
