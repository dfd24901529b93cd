// Everything that touches each activation a few times: gathers, norms, rotation, activations, and moving cache entries.
//
//     rms_norm    y = x / sqrt(mean(x^2) + eps) * (offset + w)      over consecutive runs of n columns (a row, or each head)
//     layer_norm  y = (x - mean) / sqrt(var + eps) * w + b
//     rope        (a, b) -> (a cos - b sin, b cos + a sin)          pairs (i, i + dim / 2), or (2 i, 2 i + 1) interleaved
//     gated       y = act(gate) * up                                x = [gate | up]
//
// Memory: rows of float32 with a stride; embed reads one lane of a tile (ops/packed.py), so it touches a cache line per 1 to 8
// values. All are bound by memory: 8 to 12 bytes and 1 to 30 FLOP per value.
//
// A row's sums run over four vectors of sixteen lanes in the order of its columns, whatever the other rows; out-of-range ids and
// positions (the caller refuses them) give NaN rows rather than reads outside the table.
#include "rows.h"

namespace paceline {
namespace PL_ISA {
namespace {

constexpr int64_t kPiece = 1 << 15;  // floats per task

template <class F> PL_INLINE void each_row(const Ctx& c, int64_t n_rows, int64_t cols, F f) {
  const int64_t step = max_of<int64_t>(1, kPiece / max_of<int64_t>(1, cols));
  parallel(c, ceil_div(n_rows, step), [&](int64_t task, int) {
    for (int64_t r = task * step; r < min_of(n_rows, (task + 1) * step); ++r) f(r);
  });
}

// ---- gathers ----

// Row `id` of a table: lane id % 16 of tile id / 16. K is padded as ops/packed.py says.
void embed_row(const Weight& w, int64_t id, float* out) {
  const int64_t nb = id / 16, lane = id % 16, n = w.n_in;
  if (w.format == Format::f32) {
    const float* p = static_cast<const float*>(w.data) + nb * n * 16 + lane;
    for (int64_t k = 0; k < n; ++k) out[k] = p[k * 16];
    return;
  }
  if (w.format == Format::f16 || w.format == Format::bf16) {
    const uint16_t* p = static_cast<const uint16_t*>(w.data) + nb * round_up(n, 32) * 16 + 2 * lane;
    for (int64_t k = 0; k < n; ++k) {
      const uint16_t u = p[k / 2 * 32 + k % 2];
      out[k] = w.format == Format::f16 ? load_f16(u) : load_bf16(u);
    }
    return;
  }
  const int64_t padded = round_up(n, max_of<int64_t>(64, w.group)), groups = w.group ? padded / w.group : 1;
  const auto scale = [&](int64_t k) {
    const int64_t at = (nb * groups + k / max_of<int64_t>(1, w.group)) * 16 + lane;
    return w.group && !w.factors ? load_f16(static_cast<const uint16_t*>(w.scales)[at]) : static_cast<const float*>(w.scales)[nb * 16 + lane];
  };
  if (w.format == Format::int8) {
    const int8_t* p = static_cast<const int8_t*>(w.data) + nb * padded * 16 + 4 * lane;
    for (int64_t k = 0; k < n; ++k) out[k] = scale(k) * static_cast<float>(p[k / 4 * 64 + k % 4]);
    return;
  }
  const uint8_t* p = static_cast<const uint8_t*>(w.data) + nb * padded * 8 + 4 * lane;
  const uint16_t* mins = static_cast<const uint16_t*>(w.mins);
  for (int64_t k = 0; k < n; ++k) {
    const uint8_t byte = p[k / 64 * 512 + k % 32 / 4 * 64 + k % 4];
    const int code = k % 64 < 32 ? byte & 15 : byte >> 4;
    const int factor = w.factors ? w.factors[(nb * groups + k / w.group) * 16 + lane] : 1;
    const float q = static_cast<float>((mins ? code : code - 8) * factor);
    out[k] = scale(k) * q + (mins ? load_f16(mins[(nb * groups + k / w.group) * 16 + lane]) : 0.0f);
  }
}

void fill_nan(float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = __builtin_nanf("");
}

void embed(const Ctx& c, const EmbedArgs& a) {
  each_row(c, c.n_rows, 8 * a.out.cols, [&](int64_t r) {
    if (a.ids[r] < 0 || a.ids[r] >= a.table.n_out) fill_nan(a.out.row(r), a.out.cols);
    else embed_row(a.table, a.ids[r], a.out.row(r));
  });
}

void gather(const Ctx& c, const GatherArgs& a) {
  each_row(c, a.n, a.x.cols, [&](int64_t i) { memcpy(a.out.row(i), a.x.row(a.rows[i]), static_cast<size_t>(a.x.cols) * 4); });
}

// ---- norms and rotation ----

void rms_norm(const Ctx& c, const RmsNormArgs& a) {
  each_row(c, c.n_rows, a.x.cols, [&](int64_t r) {
    for (int64_t at = 0; at < a.x.cols; at += a.n) rms_norm_run(a.x.row(r) + at, a.out.row(r) + at, a.weight, a.n, a.eps, a.offset);
  });
}

void layer_norm(const Ctx& c, const LayerNormArgs& a) {
  const int64_t n = a.x.cols;
  each_row(c, c.n_rows, n, [&](int64_t r) {
    const float* x = a.x.row(r);
    float* out = a.out.row(r);
    const float mean = reduce(x, n, [](V v, V s) { return vadd(v, s); }) / static_cast<float>(n);
    map(x, out, n, [&](V v, int64_t) { return vsub(v, vset(mean)); });  // stored, so that lanes beyond n cannot count below
    const float var = reduce(out, n, [](V v, V s) { return vfma(v, v, s); }) / static_cast<float>(n);
    const V inverse = vset(inverse_root(var + a.eps));
    map(out, out, n, [&](V v, int64_t i) {
      const V y = vmul(vmul(v, inverse), load_to(a.weight, i, n));
      return a.bias ? vadd(y, load_to(a.bias, i, n)) : y;
    });
  });
}

void rope_halves(const float* x, float* out, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t n = min_of<int64_t>(16, half - i);
    const V a = vload(x + i, n), b = vload(x + half + i, n), co = vload(cos + i, n), si = vload(sin + i, n);
    vstore(out + i, vsub(vmul(a, co), vmul(b, si)), n);
    vstore(out + half + i, vadd(vmul(b, co), vmul(a, si)), n);
  }
}

void rope_pairs(const float* x, float* out, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    out[2 * i] = a * cos[i] - b * sin[i];
    out[2 * i + 1] = b * cos[i] + a * sin[i];
  }
}

void rope(const Ctx& c, const RopeArgs& a) {
  const int64_t half = a.dim / 2;
  each_row(c, c.n_rows, 2 * a.x.cols, [&](int64_t r) {
    const int64_t position = c.step->positions[r];
    if (position < 0 || position >= a.n_positions) return fill_nan(a.out.row(r), a.out.cols);
    const float *cos = a.cos + position * half, *sin = a.sin + position * half;
    for (int64_t h = 0; h < a.x.cols; h += a.head_dim) {
      const float* x = a.x.row(r) + h;
      float* out = a.out.row(r) + h;
      if (a.interleaved) rope_pairs(x, out, cos, sin, half);
      else rope_halves(x, out, cos, sin, half);
      memcpy(out + a.dim, x + a.dim, static_cast<size_t>(a.head_dim - a.dim) * 4);
    }
  });
}

// ---- lane by lane ----

void act(const Ctx& c, const ActArgs& a) {
  with_act(a.kind, [&](auto g) {
    each_row(c, c.n_rows, 4 * a.x.cols, [&](int64_t r) { map(a.x.row(r), a.out.row(r), a.out.cols, [&](V x, int64_t) { return g(x); }); });
  });
}

void gated(const Ctx& c, const GatedArgs& a) {
  const int64_t n = a.out.cols;
  each_row(c, c.n_rows, 4 * n, [&](int64_t r) { gated_row(a.x.row(r), a.out.row(r), n, a.kind); });
}

void add(const Ctx& c, const AddArgs& a) {
  each_row(c, c.n_rows, a.out.cols, [&](int64_t r) {
    const float* y = a.y.row(r);
    map(a.x.row(r), a.out.row(r), a.out.cols, [&](V x, int64_t i) { return vadd(x, load_to(y, i, a.out.cols)); });
  });
}

void scale(const Ctx& c, const ScaleArgs& a) {
  const V s = vset(a.s);
  each_row(c, c.n_rows, a.out.cols, [&](int64_t r) { map(a.x.row(r), a.out.row(r), a.out.cols, [&](V x, int64_t) { return vmul(x, s); }); });
}

void softcap(const Ctx& c, const SoftcapArgs& a) {
  const V cap = vset(a.cap);
  each_row(c, c.n_rows, 4 * a.out.cols, [&](int64_t r) {
    map(a.x.row(r), a.out.row(r), a.out.cols, [&](V x, int64_t) { return vmul(cap, vtanh(vdiv(x, cap))); });
  });
}

// ---- cache entries ----

int64_t width(Dtype t) {
  switch (t) {
    case Dtype::i8: case Dtype::u8: return 1;
    case Dtype::f16: case Dtype::bf16: return 2;
    case Dtype::f32: case Dtype::i32: return 4;
    default: return 8;
  }
}

void move(const Ctx& c, const MoveArgs& a) {
  const int64_t bytes = a.dim * width(a.dtype), per_entry = a.n_heads * bytes;
  char *pool = static_cast<char*>(a.pool), *held = take<char>(c, a.n * per_entry);
  const auto copy = [&](const int64_t* slots, bool out) {
    each_row(c, a.n, per_entry / 4, [&](int64_t i) {
      const int64_t page = slots[i] / a.page_size, offset = slots[i] % a.page_size;
      for (int64_t h = 0; h < a.n_heads; ++h) {
        char* entry = pool + ((page * a.n_heads + h) * a.page_size + offset) * bytes;
        char* buffer = held + i * per_entry + h * bytes;
        memcpy(out ? entry : buffer, out ? buffer : entry, static_cast<size_t>(bytes));
      }
    });
  };
  copy(a.src, false);
  copy(a.dst, true);
}

}  // namespace

void fill_elementwise(Kernels& k) {
  k.embed = embed, k.gather = gather;
  k.rms_norm = rms_norm, k.layer_norm = layer_norm, k.rope = rope;
  k.act = act, k.gated = gated, k.add = add, k.scale = scale, k.softcap = softcap;
  k.move = move;
}

}  // namespace PL_ISA
}  // namespace paceline
