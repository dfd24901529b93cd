// Low-rank adapters (LoRA, arXiv:2106.09685) of the rows that have one, many adapters in one batch (Punica, arXiv:2310.18547):
//
//     y[r, col : col + n] += B_p h_p,   h = scale * (A x_r)      for every part p of row r's adapter at this site
//
// A site is a linear of the program; its parts are the modules fused in it (q, k, v), each with its own B and columns of y; their A's lie
// below each other:
//
//     a      (rank, k) row-major, float32 or bfloat16     scale  (rank) float32
//     b      per part (ceil(n / 16), rank_p, 16), the outputs in lanes, zeros beyond n, of the same type
//
// Products and sums are float32; bfloat16 is widened, which is exact. Rows of one adapter are taken together, kRows at a time, so that its
// matrices are read once for them: 4 or 2 bytes times rank (k + n) per adapter and step, 2 rank (k + n) FLOPs per row. With few rows
// memory is the bound, with many the float32 arithmetic.
//
// Same bits for a row whatever the other rows are: element (row, rank) of h adds up sixteen lanes over k in steps of 16, then the lanes
// (`vsum`); an output adds up over the rank in order, and is then added to y. Rows without an adapter are not touched.
#include "paceline/lanes.h"
#include "paceline/vec.h"

namespace paceline {
namespace PL_ISA {
namespace {

constexpr int64_t kRows = 32;               // rows of a task
constexpr int64_t kRanks = 8;               // rows of A of a task
constexpr int64_t kBlocks = 32;             // blocks of 16 outputs of a task
constexpr int64_t kAlone = 1 << 14;         // multiply-adds that one thread does as fast as several
#if PL_AVX512
constexpr int kTile = 4;                    // rows, and ranks or blocks, whose sums stay in registers
#else
constexpr int kTile = 2;
#endif

struct F32 {
  using T = float;
  static PL_INLINE V load(const float* p) { return vload(p); }
  static PL_INLINE V load(const float* p, int64_t n) { return vload(p, n); }
};
struct Bf16 {
  using T = uint16_t;
  static PL_INLINE V load(const uint16_t* p) { return vload_bf16(p); }
  static PL_INLINE V load(const uint16_t* p, int64_t n) { return vload_bf16(p, n); }
};

// Rows of one adapter: x and y are those of the site, `rows` (n) of them; h (n, site->rank).
struct Some {
  const AdaptArgs* args;
  const AdapterSite* site;
  const int32_t* rows;
  int64_t n;
  float* h;
};

// h of MR rows and NR ranks
template <class D, int MR, int NR> PL_INLINE void shrink_tile(const Some& s, int64_t row, int64_t rank) {
  const int64_t k = s.site->k;
  const auto* a = static_cast<const typename D::T*>(s.site->a) + rank * k;
  const float* x[MR];
  V acc[MR][NR];
  for (int m = 0; m < MR; ++m) {
    x[m] = s.args->x.row(s.rows[row + m]);
    for (int r = 0; r < NR; ++r) acc[m][r] = vzero();
  }
  const auto add = [&](auto load_x, auto load_a) __attribute__((always_inline)) {
    V xv[MR];
    for (int m = 0; m < MR; ++m) xv[m] = load_x(x[m]);
    for (int r = 0; r < NR; ++r) {
      const V av = load_a(a + r * k);
      for (int m = 0; m < MR; ++m) acc[m][r] = vfma(xv[m], av, acc[m][r]);
    }
  };
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) add([&](const float* p) { return vload(p + i); }, [&](const typename D::T* p) { return D::load(p + i); });
  if (i < k) add([&](const float* p) { return vload(p + i, k - i); }, [&](const typename D::T* p) { return D::load(p + i, k - i); });
  for (int m = 0; m < MR; ++m)
    for (int r = 0; r < NR; ++r) s.h[(row + m) * s.site->rank + rank + r] = s.site->scale[rank + r] * vsum(acc[m][r]);
}

template <class D> void shrink(const Some& s, int64_t first, int64_t last) {
  int64_t row = 0;
  for (; row + kTile <= s.n; row += kTile) {
    int64_t r = first;
    for (; r + kTile <= last; r += kTile) shrink_tile<D, kTile, kTile>(s, row, r);
    for (; r < last; ++r) shrink_tile<D, kTile, 1>(s, row, r);
  }
  for (; row < s.n; ++row) {
    int64_t r = first;
    for (; r + 2 * kTile <= last; r += 2 * kTile) shrink_tile<D, 1, 2 * kTile>(s, row, r);
    for (; r < last; ++r) shrink_tile<D, 1, 1>(s, row, r);
  }
}

// MR rows and NB blocks of a part's outputs
template <class D, int MR, int NB> PL_INLINE void expand_tile(const Some& s, const AdapterPart& p, int64_t row, int64_t block) {
  const auto* b = static_cast<const typename D::T*>(p.b) + block * p.rank * 16;
  const float* h = s.h + row * s.site->rank + p.first;
  V acc[MR][NB];
  for (int m = 0; m < MR; ++m)
    for (int i = 0; i < NB; ++i) acc[m][i] = vzero();
  for (int64_t j = 0; j < p.rank; ++j)
    for (int i = 0; i < NB; ++i) {
      const V bv = D::load(b + (i * p.rank + j) * 16);
      for (int m = 0; m < MR; ++m) acc[m][i] = vfma(vset(h[m * s.site->rank + j]), bv, acc[m][i]);
    }
  for (int m = 0; m < MR; ++m) {
    float* y = s.args->y.row(s.rows[row + m]) + p.col;
    for (int i = 0; i < NB; ++i) {
      const int64_t at = (block + i) * 16, left = p.n - at;
      if (left >= 16) vstore(y + at, vadd(vload(y + at), acc[m][i]));
      else vstore(y + at, vadd(vload(y + at, left), acc[m][i]), left);
    }
  }
}

template <class D> void expand(const Some& s, const AdapterPart& p, int64_t first, int64_t last) {
  int64_t row = 0;
  for (; row + kTile <= s.n; row += kTile) {
    int64_t b = first;
    for (; b + kTile <= last; b += kTile) expand_tile<D, kTile, kTile>(s, p, row, b);
    for (; b < last; ++b) expand_tile<D, kTile, 1>(s, p, row, b);
  }
  for (; row < s.n; ++row) {
    int64_t b = first;
    for (; b + 2 * kTile <= last; b += 2 * kTile) expand_tile<D, 1, 2 * kTile>(s, p, row, b);
    for (; b < last; ++b) expand_tile<D, 1, 1>(s, p, row, b);
  }
}

// One task of either half: blocks [first, last) of ranks (shrink) or of a part's outputs (expand).
struct Task {
  Some some;
  const AdapterPart* part;
  int64_t first, last;
};

// Rows by adapter: cu (n_adapters + 1), rows (cu[n_adapters]) ascending within each.
void group_rows(const Step& s, int32_t* cu, int32_t* rows) {
  for (int32_t i = 0; i <= s.n_adapters; ++i) cu[i] = 0;
  for (int64_t q = 0; q < s.n_seqs; ++q)
    if (s.adapter_of[q] >= 0) cu[s.adapter_of[q] + 1] += s.cu_rows[q + 1] - s.cu_rows[q];
  for (int32_t i = 0; i < s.n_adapters; ++i) cu[i + 1] += cu[i];
  for (int64_t q = 0; q < s.n_seqs; ++q)
    if (s.adapter_of[q] >= 0)
      for (int32_t r = s.cu_rows[q]; r < s.cu_rows[q + 1]; ++r) rows[cu[s.adapter_of[q]]++] = r;
  for (int32_t i = s.n_adapters; i > 0; --i) cu[i] = cu[i - 1];
  cu[0] = 0;
}

void adapt(const Ctx& c, const AdaptArgs& a) {
  const Step& s = *c.step;
  if (!s.adapter_of) return;
  auto *cu = take<int32_t>(c, s.n_adapters + 1), *rows = take<int32_t>(c, s.n_rows);
  group_rows(s, cu, rows);
  int64_t n_h = 0, n_shrink = 0, n_expand = 0, work = 0;
  for (int32_t i = 0; i < s.n_adapters; ++i) {
    const AdapterSite& site = s.adapters[i]->sites[a.site];
    const int64_t n = cu[i + 1] - cu[i], n_chunks = ceil_div(n, kRows);
    n_h += n * site.rank, n_shrink += n_chunks * ceil_div(site.rank, kRanks), work += n * site.rank * site.k;
    for (int64_t p = 0; p < site.n_parts; ++p)
      n_expand += n_chunks * ceil_div(ceil_div(site.parts[p].n, 16), kBlocks), work += n * site.parts[p].rank * site.parts[p].n;
  }
  if (work == 0) return;
  float* h = take<float>(c, n_h);
  Task *shrinks = take<Task>(c, n_shrink), *expands = take<Task>(c, n_expand), *to = shrinks, *then = expands;
  for (int32_t i = 0; i < s.n_adapters; ++i) {
    const AdapterSite& site = s.adapters[i]->sites[a.site];
    for (int64_t r = cu[i]; r < cu[i + 1]; r += kRows) {
      const Some some = {&a, &site, rows + r, min_of<int64_t>(kRows, cu[i + 1] - r), h};
      h += some.n * site.rank;
      for (int64_t j = 0; j < site.rank; j += kRanks) *to++ = {some, nullptr, j, min_of(site.rank, j + kRanks)};
      for (int64_t p = 0; p < site.n_parts; ++p) {
        const int64_t n_blocks = ceil_div(site.parts[p].n, 16);
        for (int64_t b = 0; b < n_blocks; b += kBlocks) *then++ = {some, site.parts + p, b, min_of(n_blocks, b + kBlocks)};
      }
    }
  }
  const auto half = [&](const Task* tasks, int64_t n, auto run) {
    const int64_t each = work < 2 * kAlone ? n : 1;
    parallel(c, ceil_div(n, each), [&](int64_t t, int) {
      for (int64_t i = t * each; i < min_of(n, (t + 1) * each); ++i) run(tasks[i]);
    });
  };
  half(shrinks, n_shrink, [](const Task& t) { t.some.site->bf16 ? shrink<Bf16>(t.some, t.first, t.last) : shrink<F32>(t.some, t.first, t.last); });
  half(expands, n_expand, [](const Task& t) {
    t.some.site->bf16 ? expand<Bf16>(t.some, *t.part, t.first, t.last) : expand<F32>(t.some, *t.part, t.first, t.last);
  });
}

}  // namespace

void fill_adapt(Kernels& k) { k.adapt = adapt; }

}  // namespace PL_ISA
}  // namespace paceline
