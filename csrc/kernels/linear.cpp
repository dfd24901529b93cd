// y[M, N] = x[M, K] W^T + bias, W in the tile layout of src/paceline/ops/packed.py.
//
// Bytes: the weights once (K N times 4, 2, 2, 1, 1/2 bytes, plus scales: 2 bytes per group and output), x and y: 4 M (K + N).
// FLOPs: 2 M N K. Weights / FLOPs fix the regime: at M = 1 every format is bound by memory (time = bytes / bandwidth); with B bytes per
// weight the crossing to arithmetic lies at M = peak * B / (2 * bandwidth), about 200 rows for bf16 and int8 on two AMX cores.
//
// Batch-invariant: an output adds up its products in the order of k, on the same instruction whatever M is. On AMX machines what is
// multiplied as bfloat16 (bf16, int8 in groups but for heads) always runs on tiles, since TDPBF16PS adds pairs in another order
// than VDPBF16PS. Integer sums are exact, so int4 and int8 by row may switch between tiles and vectors; their float part is `fold` on
// both. int4 has whole factors instead of float scales for its groups of 32, so that all of K is one integer sum.
#include "linear_amx.h"
#include "linear_prepare.h"
#include "linear_vector.h"

namespace paceline {
namespace PL_ISA {
namespace {

void run_vector(const Ctx& c, Job& j) {
  const int64_t unit = j.n_rows == 1 ? 1 : kStrip, n_units = ceil_div(j.n_lead, unit);  // the balance of one row counts most
  const int64_t n = even_tasks(c, n_units, unit * (j.gate ? 2 : 1) * j.block * max_of<int64_t>(1, j.n_rows / 4));
  parallel(c, n, [&](int64_t t, int) { vector_strip(j, n_units * t / n * unit, min_of(j.n_lead, n_units * (t + 1) / n * unit)); });
}

void linear(const Ctx& c, const LinearArgs& a) {
  Job j = job_of(c, a);
#if PL_AMX
  const bool sums_freely = !is_float(a.w.format) && scaled_group(a.w) == 0;
  if (on_tiles(a.w) || (sums_freely && j.n_rows > kVnniRows)) {
    j.streams = streams(j);
    j.a = prepare_tiles(c, a, j.k, j.n_groups, min_of<int64_t>(16, j.n_rows), true);
    return run_amx(c, j);
  }
#endif
  j.a = prepare_vectors(c, a, j);
  run_vector(c, j);
}

}  // namespace

void fill_linear(Kernels& k) { k.linear = linear; }

}  // namespace PL_ISA
}  // namespace paceline
