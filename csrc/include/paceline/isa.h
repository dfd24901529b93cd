// The instruction set this translation unit is compiled for. CMake compiles every file of csrc/kernels once per set, with
// PL_ISA = generic | avx2 | avx512 | avx512_vnni | avx512_bf16 | amx | amx_emulated, and the code lives in namespace paceline::PL_ISA.
#pragma once
#include "paceline/kernels.h"

#ifndef PL_ISA
#error "kernel files are compiled once per instruction set with -DPL_ISA=..."
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define PL_AVX512 1
#else
#define PL_AVX512 0
#endif
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define PL_AVX2 1
#else
#define PL_AVX2 0
#endif
#if PL_AVX512 && defined(__AVX512VNNI__)
#define PL_VNNI 1
#else
#define PL_VNNI 0
#endif
#if PL_VNNI && defined(__AVX512BF16__)
#define PL_BF16 1
#else
#define PL_BF16 0
#endif
#if PL_BF16 && ((defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)) || defined(PL_EMULATE_AMX))
#define PL_AMX 1
#else
#define PL_AMX 0
#endif

#define PL_INLINE inline __attribute__((always_inline))

namespace paceline {
namespace PL_ISA {

// std::min and friends would be shared inline code; these belong to the instruction set's namespace.
template <class T> PL_INLINE T min_of(T a, T b) { return b < a ? b : a; }
template <class T> PL_INLINE T max_of(T a, T b) { return a < b ? b : a; }
PL_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PL_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

template <class F> void call_task(void* arg, int64_t task, int thread) { (*static_cast<F*>(arg))(task, thread); }

// f(task, thread) for every task in [0, n).
template <class F> PL_INLINE void parallel(const Ctx& c, int64_t n, F f) { pool_run(c.pool, n, &call_task<F>, &f); }

template <class T> PL_INLINE T* take(const Ctx& c, int64_t n) {
  return static_cast<T*>(workspace_take(c.ws, static_cast<size_t>(n) * sizeof(T)));
}

}  // namespace PL_ISA
}  // namespace paceline
