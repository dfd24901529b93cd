// Logits in two passes: all of them from a coarse copy of the head, then the most promising once more from the head itself.
//
//     y = x Wc^T;   in each row the kRescored blocks of 16 outputs with the largest max(y) (ties: the lower block) become x Wf^T
//
// Bytes: the coarse matrix once, and of the fine one the blocks that some row chose: 2 MiB for a row of int8 at K = 2048. FLOPs:
// 2 M K (N + 16 kRescored). Finding the blocks of a row takes 30 us for 128k outputs on two threads.
//
// Batch-invariant: a row's choice looks at that row alone, and a block's product is the one that `linear` has for a single row of that
// matrix. Rows are grouped by block, so that a block that many rows chose is read once.
#include "linear_amx.h"
#include "linear_prepare.h"
#include "linear_vector.h"

namespace paceline {
namespace PL_ISA {
namespace {

constexpr int64_t kMaximaBytes = 1 << 17;  // logits of a task that looks for maxima: about 10 us

// ---- which blocks ----

// The largest logit of each block in [first, last) of a row. What is no number counts as infinite, so that the order is total.
void maxima(const float* y, int64_t n_out, int64_t first, int64_t last, float* best) {
  const V inf = vset(__builtin_inff());
  for (int64_t b = first; b < last; ++b) {
    float ends[16];
    const float* p = y + b * 16;
    if (n_out - b * 16 < 16) {
      for (int64_t i = 0; i < 16; ++i) ends[i] = b * 16 + i < n_out ? p[i] : -__builtin_inff();
      p = ends;
    }
    const V v = vload(p);
    best[b] = vhmax(vless(v, inf, v, inf));
  }
}

// The `n_chosen` largest of n numbers, ties to the lower place. Hardly any number passes the least of those held so far, once there are
// some: a vector of sixteen costs one comparison. `best` ends with a whole vector.
void choose(const float* best, int64_t n, int64_t n_chosen, int32_t* chosen) {
  float held[kRescored];
  int64_t n_held = 0;
  for (int64_t i = 0; i < n; i += 16) {
    if (n_held == n_chosen && !(vhmax(vload(best + i)) > held[n_held - 1])) continue;
    for (int64_t b = i; b < min_of(n, i + 16); ++b) {
      if (n_held == n_chosen && !(best[b] > held[n_held - 1])) continue;
      int64_t at = n_held < n_chosen ? n_held++ : n_held - 1;
      for (; at > 0 && best[b] > held[at - 1]; --at) held[at] = held[at - 1], chosen[at] = chosen[at - 1];
      held[at] = best[b], chosen[at] = static_cast<int32_t>(b);
    }
  }
}

// Each row's blocks (n_rows, n_chosen), in no order that matters.
const int32_t* choices(const Ctx& c, const Mat& y, int64_t n_out, int64_t n_chosen) {
  const int64_t n = ceil_div(n_out, 16), wide = round_up(n, 16), parts = ceil_div(n * 64, kMaximaBytes);
  float* best = take<float>(c, c.n_rows * wide);
  int32_t* chosen = take<int32_t>(c, c.n_rows * n_chosen);
  parallel(c, c.n_rows * parts, [&](int64_t t, int) {
    const int64_t r = t / parts, part = t % parts;
    maxima(y.row(r), n_out, n * part / parts, n * (part + 1) / parts, best + r * wide);
  });
  const int64_t tasks = even_tasks(c, c.n_rows, n * 4);
  parallel(c, tasks, [&](int64_t t, int) {
    for (int64_t r = c.n_rows * t / tasks; r < c.n_rows * (t + 1) / tasks; ++r) {
      for (int64_t b = n; b < wide; ++b) best[r * wide + b] = -__builtin_inff();
      choose(best + r * wide, n, n_chosen, chosen + r * n_chosen);
    }
  });
  return chosen;
}

// Blocks that were chosen, ascending, block[i] by rows[cu[i] : cu[i + 1]].
struct Chosen {
  int64_t n;
  const int32_t *block, *cu, *rows;
};

Chosen by_block(const Ctx& c, const int32_t* chosen, int64_t n_chosen, int64_t n_blocks) {
  const int64_t n = c.n_rows * n_chosen, most = min_of(n, n_blocks);
  int32_t *at = take<int32_t>(c, n_blocks), *block = take<int32_t>(c, most), *cu = take<int32_t>(c, most + 1), *rows = take<int32_t>(c, n);
  for (int64_t b = 0; b < n_blocks; ++b) at[b] = 0;
  for (int64_t i = 0; i < n; ++i) ++at[chosen[i]];
  int64_t used = 0;
  int32_t total = 0;
  for (int64_t b = 0; b < n_blocks; ++b) {
    if (at[b] == 0) continue;
    block[used] = static_cast<int32_t>(b), cu[used++] = total;
    total += at[b], at[b] = total - at[b];
  }
  cu[used] = total;
  for (int64_t i = 0; i < n; ++i) rows[at[chosen[i]]++] = static_cast<int32_t>(i / n_chosen);
  return {used, block, cu, rows};
}

// ---- their products ----

// f(i, thread) for every block chosen.
template <class F> PL_INLINE void each_block(const Ctx& c, const Job& j, const Chosen& chosen, F f) {
  const int64_t tasks = even_tasks(c, chosen.n, j.block);
  parallel(c, tasks, [&](int64_t t, int thread) { f(chosen.n * t / tasks, chosen.n * (t + 1) / tasks, thread); });
}

// The beginning of a block and its scales: the kernels fetch ahead within a block only.
PL_INLINE void fetch_block(const Job& j, int64_t b) {
  const uint8_t* w = j.weights(b);
  for (int64_t i = 0; i < min_of(kPrefetch, j.block); i += 64) __builtin_prefetch(w + i, 0, 3);
  if (scaled_group(j.w) == 0) return;
  const uint8_t* scales = static_cast<const uint8_t*>(j.w.scales) + b * j.n_groups * 32;
  for (int64_t i = 0; i < j.n_groups * 32; i += 64) __builtin_prefetch(scales + i, 0, 3);
}

void rescore_vectors(const Ctx& c, const Job& j, const Chosen& chosen) {
  each_block(c, j, chosen, [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; ++i) {
      if (i + 1 < last) fetch_block(j, chosen.block[i + 1]);
      for (int32_t k = chosen.cu[i]; k < chosen.cu[i + 1]; ++k) rows_of<1, 1>(j, chosen.rows[k], chosen.block[i]);
    }
  });
}

#if PL_AMX
// Rows chosen[k], k < n, as the rows of tiles at `to`.
PL_INLINE void gather_tiles(const Job& j, const int32_t* rows, int64_t n, int64_t mr, uint8_t* to) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t t = 0; t < j.a.n_tiles; ++t) memcpy(to + (t * mr + r) * 64, j.a.row(rows[r]) + t * 64, 64);
}

// Up to 16 of a block's rows at a time, as a product of that block alone.
void rescore_tiles(const Ctx& c, const Job& j, const Chosen& chosen) {
  const int64_t mr = min_of<int64_t>(16, j.n_rows), size = j.a.n_tiles * mr * 64;
  Job some = j;
  some.n_rows = mr, some.a.mr = mr, some.a.wide = j.a.n_tiles;
  const Plan p = amx_plan(c, some);
  uint8_t* gathered = take<uint8_t>(c, size * pool_size(c.pool));
  each_block(c, j, chosen, [&](int64_t first, int64_t last, int thread) {
    alignas(64) float y[16 * 16];
    Job one = some;
    one.a.q = gathered + thread * size, one.out = {y, 16, 16};
    configure(p);
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = chosen.block[i], n_out = min_of<int64_t>(16, j.w.n_out - b * 16);
      one.w.data = j.weights(b), one.w.n_out = n_out;
      if (j.w.scales) one.w.scales = static_cast<const uint16_t*>(j.w.scales) + b * j.n_groups * 16;
      for (int32_t k = chosen.cu[i]; k < chosen.cu[i + 1]; k += static_cast<int32_t>(mr)) {
        one.n_rows = min_of<int64_t>(mr, chosen.cu[i + 1] - k);
        gather_tiles(j, chosen.rows + k, one.n_rows, mr, gathered + thread * size);
        publish(one.a.q);
        few_blocks<1, 1>(one, p, 0, p.scratch + thread * p.scratch_size);
        for (int64_t r = 0; r < one.n_rows; ++r) memcpy(j.out.row(chosen.rows[k + r]) + b * 16, y + r * 16, static_cast<size_t>(n_out) * 4);
      }
    }
    _tile_release();
  });
}
#endif

void rescored(const Ctx& c, const RescoredArgs& a) {
  LinearArgs coarse = {a.x, a.out, a.coarse, nullptr}, fine = {a.x, a.out, a.fine, nullptr};
  coarse.norm = fine.norm = a.norm;
  c.kernels->linear(c, coarse);
  Job j = job_of(c, fine);
  const int64_t n_chosen = min_of(kRescored, j.n_blocks);
  const Chosen chosen = by_block(c, choices(c, a.out, a.fine.n_out, n_chosen), n_chosen, j.n_blocks);
#if PL_AMX
  if (on_tiles(a.fine)) {
    j.a = prepare_tiles(c, fine, j.k, j.n_groups, 1, true);
    return rescore_tiles(c, j, chosen);
  }
#endif
  j.a = prepare_vectors(c, fine, j);
  rescore_vectors(c, j, chosen);
}

}  // namespace

void fill_head(Kernels& k) { k.rescored = rescored; }

}  // namespace PL_ISA
}  // namespace paceline
