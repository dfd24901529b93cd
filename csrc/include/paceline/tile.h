// AMX tile instructions. With PL_EMULATE_AMX the same names work on arrays, so that tile kernels are tested on machines without AMX:
// slow, but tile by tile what the instructions do (Intel SDM, TILELOADD, TDPBF16PS, TDPBSSD, TDPBSUD, TDPBUSD). Denormals are kept.
#pragma once
#include "paceline/vec.h"

#if PL_AMX
namespace paceline {
namespace PL_ISA {

// The operand of _tile_loadconfig, palette 1: tiles of up to 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row
  uint8_t rows[16] = {};
};

// Tile instructions do not tell the compiler what memory they read: everything behind p is written out before it goes on.
PL_INLINE void publish(const void* p) { asm volatile("" ::"r"(p) : "memory"); }

#if defined(PL_EMULATE_AMX)
namespace emulated {

struct Tiles {
  TileConfig config;
  alignas(64) uint8_t data[8][16][64];
};
inline Tiles& tiles() {
  static thread_local Tiles t;
  return t;
}
inline void configure(const void* c) {
  memcpy(&tiles().config, c, sizeof(TileConfig));
  memset(tiles().data, 0, sizeof tiles().data);
}
inline void zero(int t) { memset(tiles().data[t], 0, 1024); }
inline void load(int t, const void* p, int64_t stride) {
  Tiles& s = tiles();
  zero(t);
  for (int r = 0; r < s.config.rows[t]; ++r) memcpy(s.data[t][r], static_cast<const uint8_t*>(p) + r * stride, s.config.bytes[t]);
}
inline void store(int t, void* p, int64_t stride) {
  const Tiles& s = tiles();
  for (int r = 0; r < s.config.rows[t]; ++r) memcpy(static_cast<uint8_t*>(p) + r * stride, s.data[t][r], s.config.bytes[t]);
}
template <class A, class B> void dot8(int c, int a, int b) {  // A, B: int8_t or uint8_t
  Tiles& s = tiles();
  for (int m = 0; m < s.config.rows[c]; ++m)
    for (int n = 0; n < s.config.bytes[c] / 4; ++n) {
      int32_t sum;
      memcpy(&sum, s.data[c][m] + 4 * n, 4);
      for (int k = 0; k < s.config.bytes[a]; ++k) sum += int32_t{static_cast<A>(s.data[a][m][k])} * static_cast<B>(s.data[b][k / 4][4 * n + k % 4]);
      memcpy(s.data[c][m] + 4 * n, &sum, 4);
    }
}
inline float at(const uint8_t* row, int i) {
  uint16_t u;
  memcpy(&u, row + 2 * i, 2);
  return load_bf16(u);
}
inline void dot_bf16(int c, int a, int b) {
  Tiles& s = tiles();
  for (int m = 0; m < s.config.rows[c]; ++m)
    for (int n = 0; n < s.config.bytes[c] / 4; ++n) {
      float sum, even = 0.0f, odd = 0.0f;
      for (int k = 0; k < s.config.bytes[a] / 4; ++k) {
        even = __builtin_fmaf(at(s.data[a][m], 2 * k), at(s.data[b][k], 2 * n), even);
        odd = __builtin_fmaf(at(s.data[a][m], 2 * k + 1), at(s.data[b][k], 2 * n + 1), odd);
      }
      memcpy(&sum, s.data[c][m] + 4 * n, 4);
      sum += even + odd;
      memcpy(s.data[c][m] + 4 * n, &sum, 4);
    }
}

}  // namespace emulated
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig(p) emulated::configure(p)
#define _tile_release() ((void)0)
#define _tile_zero(t) emulated::zero(t)
#define _tile_loadd(t, p, stride) emulated::load(t, p, stride)
#define _tile_stream_loadd(t, p, stride) emulated::load(t, p, stride)
#define _tile_stored(t, p, stride) emulated::store(t, p, stride)
#define _tile_dpbssd(c, a, b) emulated::dot8<int8_t, int8_t>(c, a, b)
#define _tile_dpbf16ps(c, a, b) emulated::dot_bf16(c, a, b)
#endif

}  // namespace PL_ISA
}  // namespace paceline
#endif
