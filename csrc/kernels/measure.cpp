// What the machine can do at most: the two ceilings of every roofline.
//
//   read   one pass over memory, all threads: bytes / time is the bandwidth a weight stream can reach
//   peak   the densest instruction of a kind on registers alone: FLOP/s (a multiply-add counts two)
#include <time.h>

#include "linear.h"

namespace paceline {
namespace PL_ISA {
namespace {

double read(Pool* pool, const void* data, size_t bytes) {
  constexpr int64_t kPiece = 1 << 20;  // bytes per task
  const int64_t n = static_cast<int64_t>(bytes) / kPiece;
  struct Job { const char* p; double sum[64]; } job = {static_cast<const char*>(data), {}};
  pool_run(pool, n, [](void* arg, int64_t task, int thread) {
    Job& j = *static_cast<Job*>(arg);
    const float* p = reinterpret_cast<const float*>(j.p + task * kPiece);
    V s[4] = {vzero(), vzero(), vzero(), vzero()};
    for (int64_t i = 0; i < kPiece / 4; i += 64)
      for (int u = 0; u < 4; ++u) {
        __builtin_prefetch(p + i + u * 16 + 1024);
        s[u] = vmax(s[u], vload(p + i + u * 16));
      }
    j.sum[thread & 63] += static_cast<double>(vhmax(vmax(vmax(s[0], s[1]), vmax(s[2], s[3]))));
  }, &job);
  double total = 0;
  for (double x : job.sum) total += x;
  return total;
}

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

constexpr int kRounds = 4096;
constexpr int kChains = 8;  // enough independent sums to hide the latency

// FLOPs of kRounds rounds; `sink` keeps the work alive.
double fma_rounds(float* sink) {
  V s[kChains];
  for (int i = 0; i < kChains; ++i) s[i] = vset(static_cast<float>(i));
  const V a = vset(1.0f + sink[0] * 1e-9f), b = vset(1e-9f);
  for (int r = 0; r < kRounds; ++r)
    for (int i = 0; i < kChains; ++i) s[i] = vfma(s[i], a, b);
  for (int i = 1; i < kChains; ++i) s[0] = vadd(s[0], s[i]);
  sink[0] = vsum(s[0]) * 1e-30f;
  return 2.0 * 16 * kChains * kRounds;
}

#if PL_AMX
template <bool kInt> double tile_rounds() {
  alignas(64) uint8_t zeros[1024] = {};
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
  publish(&config);
  publish(zeros);
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, zeros, 64);
  _tile_loadd(5, zeros, 64);
  _tile_loadd(6, zeros, 64);
  _tile_loadd(7, zeros, 64);
  for (int r = 0; r < kRounds; ++r) {
    if constexpr (kInt) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_release();
  return 2.0 * 16 * 16 * (kInt ? 64 : 32) * 4 * kRounds;
}
#endif

double bf16_rounds(float* sink) {
#if PL_AMX
  (void)sink;
  return tile_rounds<false>();
#elif PL_BF16
  __m512 s[kChains];
  for (int i = 0; i < kChains; ++i) s[i] = _mm512_set1_ps(sink[0]);
  const __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(sink[0])));
  for (int r = 0; r < kRounds; ++r)
    for (int i = 0; i < kChains; ++i) s[i] = _mm512_dpbf16_ps(s[i], a, a);
  for (int i = 1; i < kChains; ++i) s[0] = _mm512_add_ps(s[0], s[i]);
  sink[0] = vsum({s[0]}) * 1e-30f;
  return 2.0 * 32 * kChains * kRounds;
#else
  return fma_rounds(sink);
#endif
}

double int8_rounds(float* sink) {
#if PL_AMX
  (void)sink;
  return tile_rounds<true>();
#else
  I s[kChains];
  for (int i = 0; i < kChains; ++i) s[i] = iset(i);
  const I a = iset(static_cast<int32_t>(sink[0]) + 0x01010101);
  for (int r = 0; r < kRounds; ++r)
    for (int i = 0; i < kChains; ++i) s[i] = dot8(s[i], a, isub(s[i], a));
  V total = ifloat(s[0]);
  for (int i = 1; i < kChains; ++i) total = vadd(total, ifloat(s[i]));
  sink[0] = vsum(total) * 1e-30f;
  return 2.0 * 64 * kChains * kRounds;
#endif
}

double peak(Pool* pool, int32_t kind, double seconds) {
  struct Run { int32_t kind; double until; struct alignas(64) { double flops; float sink; } of[64]; } run = {kind, now() + seconds, {}};
  const double start = now();
  const int64_t n = pool_size(pool) < 64 ? pool_size(pool) : 64;
  pool_run(pool, n, [](void* arg, int64_t task, int) {
    Run& r = *static_cast<Run*>(arg);
    auto& mine = r.of[task];
    while (now() < r.until)
      mine.flops += r.kind == 0 ? fma_rounds(&mine.sink) : r.kind == 1 ? bf16_rounds(&mine.sink) : int8_rounds(&mine.sink);
  }, &run);
  const double took = now() - start;
  double flops = 0;
  for (int64_t i = 0; i < n; ++i) flops += run.of[i].flops;
  return flops / took;
}

}  // namespace

void fill_measure(Kernels& k) { k.read = read, k.peak = peak; }

}  // namespace PL_ISA
}  // namespace paceline
