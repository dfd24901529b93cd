// Row-major weights into tile layout, quantised by rounding to nearest where the format has codes: the arithmetic, bit for bit, of
// src/paceline/ops/formats (which is normative), at memory speed.
//
// Bytes: the source once, the packed form once. A task takes one block of 16 outputs: each row is converted and quantised into a string
// of 4-byte words along k, then sixteen strings are laid side by side.
#include "linear_prepare.h"

namespace paceline {
namespace PL_ISA {
namespace {

PL_INLINE bool finite16(uint16_t h) { return (h & 0x7c00) != 0x7c00; }

PL_INLINE uint16_t to_f16(float x) {
  uint16_t h[16];
  vstore_f16(h, vset(x));
  return h[0];
}

// Row `r` as floats, zero up to k. False where it is not finite.
PL_INLINE bool load_row(const PackArgs& a, int64_t r, int64_t k, float* to) {
  const int64_t n = a.w.n_in;
  V bad = vzero();
  for (int64_t i = 0; i < k; i += 16) {
    const int64_t left = max_of<int64_t>(0, min_of<int64_t>(16, n - i));
    V v = vzero();
    if (a.source == Dtype::f32) {
      if (left) v = vload(static_cast<const float*>(a.src) + r * n + i, left);
    } else {
      uint16_t h[16] = {};
      memcpy(h, static_cast<const uint16_t*>(a.src) + r * n + (left ? i : 0), static_cast<size_t>(left) * 2);
      v = a.source == Dtype::f16 ? vload_f16(h) : vload_bf16(h);
    }
    bad = vfma(v, vzero(), bad);
    vstore(to + i, v, min_of<int64_t>(16, k - i));
  }
  return vsum(bad) == 0.0f;
}

struct Coding { float scale, low; };  // what the codes are relative to, as stored

// Scale and minimum of n real values; written to lane `at` of scales and mins. False where float16 cannot hold them.
PL_INLINE bool code_group(const PackArgs& a, const float* x, int64_t n, int64_t at, Coding* c) {
  *c = {0.0f, 0.0f};
  float scale = 0.0f;
  if (a.w.mins) {
    V low = vset(x[0]), high = low;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) low = vmin(low, vload(x + i)), high = vmax(high, vload(x + i));
    for (; i < n; ++i) low = vmin(low, vset(x[i])), high = vmax(high, vset(x[i]));
    const float least = -vhmax(vsub(vset(-0.0f), low));
    const uint16_t h = to_f16(least);
    static_cast<uint16_t*>(const_cast<void*>(a.w.mins))[at] = h;
    c->low = load_f16(h);
    scale = (vhmax(high) - least) / 15.0f;
    if (!finite16(h)) return false;
  } else {
    const float top = largest(x, n);
    if (a.w.format == Format::int8) {
      scale = top / 127.0f;
    } else {
      int64_t i = 0;
      while (__builtin_fabsf(x[i]) != top) ++i;
      scale = x[i] / -8.0f;
    }
  }
  if (a.w.group == 0) {
    static_cast<float*>(const_cast<void*>(a.w.scales))[at] = c->scale = scale;
    return true;
  }
  const uint16_t h = to_f16(scale);
  static_cast<uint16_t*>(const_cast<void*>(a.w.scales))[at] = h;
  c->scale = load_f16(h);
  return finite16(h);
}

// Codes of one row, `bytes` long when done; block and lane say where its scales go. False where float16 cannot hold a scale.
inline bool code_row(const PackArgs& a, const float* x, int64_t k, int64_t n_groups, int64_t block, int64_t lane, int8_t* codes) {
  const int64_t size = a.w.group ? a.w.group : k, n = a.w.n_in;
  const bool wide = a.w.format == Format::int8;
  const V low_code = vset(wide ? -127.0f : 0.0f), high_code = vset(wide ? 127.0f : 15.0f), shift = vset(wide || a.w.mins ? 0.0f : 8.0f);
  bool ok = true;
  for (int64_t g = 0; g * size < n; ++g) {
    Coding c;
    ok &= code_group(a, x + g * size, min_of(size, n - g * size), (block * n_groups + g) * 16 + lane, &c);
    const V by = vset(c.scale == 0.0f ? __builtin_inff() : c.scale), low = vset(c.low);
    for (int64_t i = g * size; i < min_of(n, (g + 1) * size); i += 16) {
      const V q = vround(vdiv(a.w.mins ? vsub(vload(x + i), low) : vload(x + i), by));
      quantise16(vmin(vmax(a.w.mins || wide ? q : vadd(q, shift), low_code), high_code), codes + i);
    }
  }
  memset(codes + n, 0, static_cast<size_t>(k - n));
  return ok;
}

// ---- int4: groups of 32 whose scale is a whole multiple of the output's ----

constexpr int64_t kFactored = 32;
constexpr float kMostFactor = 15.0f;

// The element of largest magnitude of a group, the first on ties.
PL_INLINE float widest(const float* x, int64_t n) {
  const float top = largest(x, n);
  int64_t i = 0;
  while (__builtin_fabsf(x[i]) != top) ++i;
  return x[i];
}

// Codes (less 8) of one group for a step, and their squared error in the order vsum gives.
PL_INLINE float code_with(const float* x, float step, V (&q)[2]) {
  const V by = vset(step == 0.0f ? __builtin_inff() : step), low = vset(-8.0f), high = vset(7.0f);
  V error[2];
  for (int h = 0; h < 2; ++h) {
    const V v = vload(x + 16 * h);
    q[h] = vmin(vmax(vround(vdiv(v, by)), low), high);
    const V d = vsub(vmul(q[h], vset(step)), v);
    error[h] = vmul(d, d);
  }
  return vsum(vadd(error[0], error[1]));
}

// The factor nearest to the one that gives the widest element the code -8, or one of its neighbours where their error is less.
PL_INLINE float best_factor(const float* x, float widest_one, float scale, V (&best)[2]) {
  const float ideal = scale == 0.0f ? 0.0f : widest_one / -8.0f / scale, size = __builtin_rintf(__builtin_fabsf(ideal));
  float factor = 0.0f, least = __builtin_inff();
  constexpr float kBy[3] = {0.0f, 1.0f, -1.0f};
  for (const float by : kBy) {
    const float magnitude = min_of(kMostFactor, max_of(1.0f, size + by)), f = ideal < 0.0f ? -magnitude : magnitude;
    V q[2];
    const float error = code_with(x, scale * f, q);
    if (!(error < least)) continue;
    least = error, factor = f, best[0] = q[0], best[1] = q[1];
  }
  return factor;
}

// One row, zero up to k.
inline void factor_row(const PackArgs& a, const float* x, int64_t k, int64_t block, int64_t lane, int8_t* codes) {
  const int64_t n_groups = k / kFactored, n = a.w.n_in;
  float top = 0.0f;
  for (int64_t g = 0; g * kFactored < n; ++g) top = max_of(top, largest(x + g * kFactored, min_of(kFactored, n - g * kFactored)));
  const float scale = top / (8.0f * kMostFactor);
  static_cast<float*>(const_cast<void*>(a.w.scales))[block * 16 + lane] = scale;
  for (int64_t g = 0; g * kFactored < n; ++g) {
    const float* group = x + g * kFactored;
    V q[2] = {vzero(), vzero()};
    const float most = widest(group, kFactored), factor = most == 0.0f ? 0.0f : best_factor(group, most, scale, q);
    const_cast<int8_t*>(a.w.factors)[(block * n_groups + g) * 16 + lane] = static_cast<int8_t>(factor);
    for (int h = 0; h < 2; ++h) quantise16(vadd(q[h], vset(8.0f)), codes + g * kFactored + 16 * h);
  }
  memset(codes + n, 0, static_cast<size_t>(k - n));
}

// Sixteen strings of words side by side.
inline void interleave(const uint32_t* words, int64_t n_words, uint32_t* to) {
  for (int64_t i = 0; i < n_words; ++i)
    for (int64_t lane = 0; lane < 16; ++lane) to[i * 16 + lane] = words[lane * n_words + i];
}

// One row as the words of its format. Flags: 1 not finite, 2 beyond the format's range.
inline int32_t row_words(const PackArgs& a, int64_t block, int64_t lane, int64_t k, float* x, int8_t* codes, uint32_t* words) {
  const int64_t n_groups = a.w.group ? k / a.w.group : 1;
  if (!load_row(a, block * 16 + lane, round_up(k, 16), x)) return 1;
  if (a.w.format == Format::f32) {
    memcpy(words, x, static_cast<size_t>(k) * 4);
  } else if (is_float(a.w.format)) {
    auto* h = reinterpret_cast<uint16_t*>(words);
    bool ok = true;
    for (int64_t i = 0; i < k; i += 16) {
      if (a.w.format == Format::f16) vstore_f16(h + i, vload(x + i));
      else vstore_bf16(h + i, vload(x + i));
    }
    const uint16_t inf = a.w.format == Format::f16 ? 0x7c00 : 0x7f80;
    for (int64_t i = 0; i < k; ++i) ok &= (h[i] & inf) != inf;
    return ok ? 0 : 2;
  } else {
    if (a.w.format == Format::int4) factor_row(a, x, k, block, lane, codes);
    else if (!code_row(a, x, k, n_groups, block, lane, codes)) return 2;
    if (a.w.format == Format::int8) {
      memcpy(words, codes, static_cast<size_t>(k));
    } else {
      auto* bytes = reinterpret_cast<uint8_t*>(words);
      for (int64_t i = 0; i < k; i += 64)
        for (int64_t l = 0; l < 32; ++l) bytes[i / 2 + l] = static_cast<uint8_t>(codes[i + l] | codes[i + 32 + l] << 4);
    }
  }
  return 0;
}

void pack(const Ctx& c, const PackArgs& a) {
  const int64_t k = padded_k(a.w), block = block_bytes(a.w), n_words = block / 64, n_groups = a.w.group ? k / a.w.group : 1;
  const int64_t n_blocks = ceil_div(a.w.n_out, 16), row = round_up(k, 16) + 16, per_thread = row * 5 + n_words * 64;  // floats and codes of a row, words of sixteen
  uint8_t* scratch = take<uint8_t>(c, round_up(per_thread, 64) * pool_size(c.pool));
  int32_t* flags = take<int32_t>(c, n_blocks);
  parallel(c, n_blocks, [&](int64_t b, int thread) {
    uint8_t* mine = scratch + round_up(per_thread, 64) * thread;
    auto* words = reinterpret_cast<uint32_t*>(mine);
    auto* x = reinterpret_cast<float*>(mine + n_words * 64);
    auto* codes = reinterpret_cast<int8_t*>(mine + n_words * 64 + row * 4);
    flags[b] = 0;
    if (scaled_group(a.w)) memset(static_cast<uint16_t*>(const_cast<void*>(a.w.scales)) + b * n_groups * 16, 0, static_cast<size_t>(n_groups) * 32);
    else if (a.w.scales) memset(static_cast<float*>(const_cast<void*>(a.w.scales)) + b * 16, 0, 64);
    if (a.w.mins) memset(static_cast<uint16_t*>(const_cast<void*>(a.w.mins)) + b * n_groups * 16, 0, static_cast<size_t>(n_groups) * 32);
    if (a.w.factors) memset(const_cast<int8_t*>(a.w.factors) + b * n_groups * 16, 0, static_cast<size_t>(n_groups) * 16);
    for (int64_t lane = 0; lane < 16; ++lane) {
      if (b * 16 + lane < a.w.n_out) flags[b] |= row_words(a, b, lane, k, x, codes, words + lane * n_words);
      else memset(words + lane * n_words, 0, static_cast<size_t>(n_words) * 4);
    }
    interleave(words, n_words, reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(const_cast<void*>(a.w.data)) + b * block));
  });
  *a.flags = 0;
  for (int64_t b = 0; b < n_blocks; ++b) *a.flags |= flags[b];
}

}  // namespace

void fill_pack(Kernels& k) { k.pack = pack; }

}  // namespace PL_ISA
}  // namespace paceline
