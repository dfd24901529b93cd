// Which units an attention has, and which of them are cut into their chunks.
#pragma once
#include "attention_unit.h"

namespace paceline {
namespace PL_ISA {
namespace {

struct Plan {
  Unit *units, *cut;  // what is attended, in order of tasks; the cut units as wholes
  int64_t n_units = 0, n_cut = 0, n_parts = 0, work = 0;
};

// Calls f(unit, work, whether it is cut into its chunks). `target`: the work of a task; what is longer is cut, and heads of few pairs
// go together up to it, for the sake of longer stretches of memory.
template <class F> void each_unit(const Job& j, int64_t target, F f) {
  const AttentionArgs& a = j.a;
  const int64_t rows_per_unit = max_of<int64_t>(1, kPairs / j.n_query);
  for (int32_t l = j.step.cu_layer[a.layer]; l < j.step.cu_layer[a.layer + 1]; ++l) {
    const LayerAt at = j.step.layer_at[l];
    const GroupStep& g = j.step.groups[at.group];
    for (int32_t s = 0; s < j.step.n_seqs; ++s) {
      const Sight sight(j.step, j.a.window, g, s);
      for (int64_t end = j.step.cu_rows[s + 1]; end > sight.row0; end -= rows_per_unit) {  // the longest first
        const int64_t row = max_of(sight.row0, end - rows_per_unit), n_rows = end - row, pairs = n_rows * j.n_query;
        const Sight::Range keys = sight.range(row, n_rows);
        const int64_t from = keys.begin / kChunk, n_chunks = ceil_div(keys.end, kChunk) - from;
        const int64_t work = (keys.end - keys.begin) * j.a.dim * (8 + 2 * pairs);
        const bool few = pairs <= kFewPairs;
        const bool cut = n_chunks > 1 && (few ? g.n_heads * work : work) > target;
        const int64_t together = !few ? 1 : max_of<int64_t>(1, min_of(kPairs / pairs, target / (cut ? work / n_chunks : work)));
        for (int32_t h = 0; h < g.n_heads;) {
          const auto n = static_cast<int32_t>(min_of<int64_t>(together, g.n_heads - h));
          f(Unit{at.group, at.at, s, h, n, row, n_rows, from, n_chunks, -1}, n * work, cut);
          h += n;
        }
      }
    }
  }
}

Plan plan(const Ctx& c, const Job& j) {
  Plan p;
  const int n_threads = pool_size(c.pool);
  each_unit(j, 0, [&](const Unit&, int64_t work, bool) { p.work += work; });
  const int64_t target = n_threads == 1 ? p.work : p.work / (4 * n_threads);
  int64_t n_whole = 0, n_pieces = 0;
  each_unit(j, target, [&](const Unit& u, int64_t, bool cut) { ++n_whole, n_pieces += cut ? u.n_chunks : 1; });
  p.units = take<Unit>(c, n_pieces);
  p.cut = take<Unit>(c, n_whole);
  each_unit(j, target, [&](Unit u, int64_t, bool cut) {
    if (!cut) {
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

}  // namespace
}  // namespace PL_ISA
}  // namespace paceline
