// What every kernel file sees: plain structs, and one table of function pointers per instruction set.
//
// Only plain C types and free functions cross from kernels to the host, so that no inline standard-library code is compiled with
// the flags of one instruction set and linked into another.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace paceline {

enum class Dtype : int32_t { f32, f16, bf16, i8, u8, i32, i64, u64 };

// The weight formats of src/paceline/ops/packed.py.
enum class Format : int32_t { f32, f16, bf16, int8, int4, int4g };

// A float32 activation matrix: row r starts at p + r * stride (a column range of a wider matrix after a split).
struct Mat {
  float* p;
  int64_t stride;  // floats
  int64_t cols;
  float* row(int64_t r) const { return p + r * stride; }
};

// A `Packed` matrix (n_out, n_in) in tile layout.
struct Weight {
  Format format;
  int64_t n_out, n_in;
  int64_t group;  // 0: per channel
  const void* data;
  const void* scales;  // float16 (NB, G, 16); int4 and per channel float32 (NB, 1, 16); null for floats
  const void* mins;    // float16 (NB, G, 16) or null
  const int8_t* factors;  // (NB, G, 16) of int4, or null
};

// ---- one step (core/batch.py), prebuilt by begin() ----

struct GroupStep {
  const int64_t* slots;  // (n_rows)
  const int32_t* tables; // (n_seqs, max_pages), -1: no page
  const int32_t* lens;   // (n_seqs)
  int64_t max_pages;
  int64_t n_pages;       // of the pools
  int32_t page_size, dim, n_heads;
  Dtype dtype;
  const int32_t* heads;  // (n_heads) which KV heads of the layer live here, ascending
  void* const* k;        // per layer of the group: (n_pages, n_heads, page_size, dim)
  void* const* v;
};

struct LayerAt {         // where one layer's KV lives: groups[group], pools k[at], v[at]
  int32_t group, at;
};

// An adapter in the layout of kernels/adapt.cpp: one entry per site of the model, of rank 0 where it has nothing.
struct AdapterPart { const void* b; int64_t first, rank, col, n; };  // rows [first, first + rank) of h to columns [col, col + n) of y
struct AdapterSite { const void* a; const float* scale; int64_t rank, k; bool bf16; int64_t n_parts; const AdapterPart* parts; };
struct Adapter { int64_t n_sites; const AdapterSite* sites; };

struct Step {
  int64_t n_rows, n_seqs, n_want, n_groups, n_layers;
  const int32_t *tokens, *positions, *cu_rows, *want;
  const GroupStep* groups;
  const int32_t* cu_layer;  // layer l is held by layer_at[cu_layer[l] : cu_layer[l + 1]]
  const LayerAt* layer_at;
  const uint64_t* mask;     // (n_rows) or null: causal
  const int32_t* tail;      // (n_seqs), with mask
  int32_t n_adapters;
  const Adapter* const* adapters;
  const int32_t* adapter_of;  // (n_seqs) into adapters, -1: none; or null: nobody has one
};

// ---- threads and memory ----

struct Pool;
using TaskFn = void (*)(void* arg, int64_t task, int thread);
// Runs fn(arg, task, thread) for every task in [0, n_tasks); returns when all are done. `thread` < pool_size. Each thread begins with
// its own equal range of tasks and then takes what others have left: what a task computes must depend on `task` alone. One task runs
// inline without waking anybody.
void pool_run(Pool* pool, int64_t n_tasks, TaskFn fn, void* arg);
int pool_size(const Pool* pool);

struct Workspace;
// 64-byte aligned, uninitialised, valid until the kernel returns. Call from the kernel's own thread only, never inside a task.
void* workspace_take(Workspace* ws, size_t bytes);

struct Kernels;
struct Ctx {
  Pool* pool;
  Workspace* ws;
  const Kernels* kernels;
  const Step* step;  // null for kernels that take no batch
  int64_t n_rows;    // rows of every Mat below, unless said otherwise
};

// ---- arguments of the kernels; `out` never overlaps an input ----

enum class Act : int32_t { silu, gelu, gelu_tanh, relu };

// A linear with what may surround it, bit for bit as the kernels of those names:
//   norm.weight   x goes through rms_norm first
//   gate          y = [gate | up] becomes act(gate) * up, of n_out / 2 columns; both halves are whole blocks of 16
//   add.p         the result is added to `add`; not together with gate
struct Norm { const float* weight = nullptr; float eps = 0, offset = 0; };
struct LinearArgs {
  Mat x, out;
  Weight w;
  const float* bias;  // (n_out) or null
  Mat add = {};
  Norm norm = {};
  bool gate = false;
  Act kind = Act::silu;
};
// Logits of a head that is kept twice: those of `coarse`, and in each row the kRescored blocks of 16 outputs with the largest of them
// again from `fine`, of the same shape. norm: as in LinearArgs.
constexpr int64_t kRescored = 64;
struct RescoredArgs { Mat x, out; Weight coarse, fine; Norm norm = {}; };
struct EmbedArgs { Mat out; Weight table; const int32_t* ids; }; // out row r = row ids[r] of table, dequantised; ids are in range
struct RmsNormArgs { Mat x, out; const float* weight; int64_t n; float eps, offset; };  // runs of n columns; x.cols % n == 0
struct LayerNormArgs { Mat x, out; const float *weight, *bias; float eps; };             // bias or null
struct RopeArgs { Mat x, out; const float *cos, *sin; int64_t n_positions, dim, head_dim; bool interleaved; };  // step->positions
struct ActArgs { Mat x, out; Act kind; };
struct GatedArgs { Mat x, out; Act kind; };                      // x [gate | up], out act(gate) * up
struct AddArgs { Mat x, y, out; };
struct ScaleArgs { Mat x, out; float s; };
struct SoftcapArgs { Mat x, out; float cap; };
struct GatherArgs { Mat x, out; const int32_t* rows; int64_t n; };  // out row i = x row rows[i], i < n (n replaces n_rows)

struct AdaptArgs { Mat x, y; int64_t site; };  // y is changed in place; rows without an adapter are not

struct AttentionArgs {
  Mat q, k, v, out;
  int32_t layer, n_heads, n_kv_heads, dim;
  int32_t window;  // 0: none
  float scale;
  float softcap;   // 0: none
};

// Pool rows (heads, page_size, dim) of every page: entries src[i] -> dst[i], all read before any is written.
struct MoveArgs { void* pool; Dtype dtype; int64_t n_pages, n_heads, page_size, dim; const int64_t *src, *dst; int64_t n; };

struct MoeArgs {
  Mat x, router, out;
  const Weight *gate_up, *down;  // (n_experts)
  int32_t n_experts, n_active;
  Act kind;
  bool normalise;
};

struct SampleArgs {  // n_rows rows of logits (n_vocab, contiguous)
  const float* logits; int64_t n_vocab;
  const float* temperature; const int32_t* top_k; const float *top_p, *min_p; const double* u;
  int64_t* out;      // (n_rows); -1 where the logits are unusable (NaN, +inf, or all -inf)
};

struct LogprobsArgs {
  const float* logits; int64_t n_vocab;
  const int64_t* ids; int64_t n_top;
  float* own; int64_t* top_ids; float* top;  // (n_rows), (n_rows, n_top), (n_rows, n_top)
};

// Row-major src (n_out, n_in) of f32, f16 or bf16 into w's tile layout; w's arrays are written.
// *flags: 1 where a value is not finite, 2 where the format cannot hold a value or scale (the result is then void).
struct PackArgs { const void* src; Dtype source; Weight w; int32_t* flags; };

// A kernel file fills the entries it provides; the rest stay null.
struct Kernels {
  void (*linear)(const Ctx&, const LinearArgs&);
  void (*rescored)(const Ctx&, const RescoredArgs&);
  void (*embed)(const Ctx&, const EmbedArgs&);
  void (*rms_norm)(const Ctx&, const RmsNormArgs&);
  void (*layer_norm)(const Ctx&, const LayerNormArgs&);
  void (*rope)(const Ctx&, const RopeArgs&);
  void (*act)(const Ctx&, const ActArgs&);
  void (*gated)(const Ctx&, const GatedArgs&);
  void (*add)(const Ctx&, const AddArgs&);
  void (*scale)(const Ctx&, const ScaleArgs&);
  void (*softcap)(const Ctx&, const SoftcapArgs&);
  void (*gather)(const Ctx&, const GatherArgs&);
  void (*adapt)(const Ctx&, const AdaptArgs&);
  void (*attention)(const Ctx&, const AttentionArgs&);
  void (*move)(const Ctx&, const MoveArgs&);
  void (*moe)(const Ctx&, const MoeArgs&);
  void (*sample)(const Ctx&, const SampleArgs&);
  void (*logprobs)(const Ctx&, const LogprobsArgs&);
  void (*pack)(const Ctx&, const PackArgs&);
  // measurements
  double (*peak)(Pool*, int32_t kind, double seconds);     // FLOP/s (see kernels/measure.cpp)
  double (*read)(Pool*, const void* data, size_t bytes);   // checksum of a pass over memory
};

}  // namespace paceline
