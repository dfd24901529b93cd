// What the rows of a step see, and where it lies in the pools.
#pragma once
#include "paceline/vec.h"

namespace paceline {
namespace PL_ISA {
namespace {

constexpr int64_t kBlock = 64, kChunk = 1024;

// An entry in a pool: its numbers, or for int8 codes and behind them their float32 scale.
PL_INLINE int64_t entry_bytes(Dtype t, int64_t dim) { return t == Dtype::i8 ? dim + 4 : t == Dtype::f32 ? 4 * dim : 2 * dim; }

struct Unit {
  int32_t group, at, seq;
  int32_t head, n_heads;           // KV heads of the group: one, or several of few pairs each
  int64_t row, n_rows;             // rows of the step
  int64_t chunk, n_chunks;         // the range of chunks to be walked
  int64_t part;                    // -1, or where in `parts` the state of the first of them goes
};

PL_INLINE uint64_t low_bits(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// What the rows of a sequence see. A row of a draft tree sees the entries below `tail` and those its mask names; it counts them in
// order (their rank), as if the others were not there: the indices they have once the draft is settled. So a tree row gives the bits
// that the same text gives without drafting. A mask of 0 means causal.
struct Sight {
  int64_t row0, first;  // the sequence's first row of this step and its index
  int64_t window;       // 0: none
  const uint64_t* mask;
  int64_t tail;

  Sight(const Step& step, int64_t window, const GroupStep& g, int32_t seq) : row0(step.cu_rows[seq]), window(window), mask(step.mask) {
    first = g.lens[seq] - (step.cu_rows[seq + 1] - row0);
    // `tail` counts as the first group does; groups that retain other numbers of entries see the same draft at their own end
    tail = mask ? step.tail[seq] + g.lens[seq] - step.groups[0].lens[seq] : 0;
  }
  uint64_t drafts(int64_t row) const { return mask ? mask[row] : 0; }
  bool is_tree(int64_t row) const { return drafts(row) & (drafts(row) + 1); }  // else rank is index
  int64_t end(int64_t row) const {  // how many entries the row sees, or has behind its window
    return drafts(row) ? tail + __builtin_popcountll(drafts(row)) : first + row - row0 + 1;
  }
  int64_t begin(int64_t row) const { return window ? max_of<int64_t>(0, end(row) - window) : 0; }
  uint64_t bits(int64_t row, int64_t block) const {  // bit i: the entry of rank block + i
    return low_bits(end(row) - block) & ~low_bits(begin(row) - block);
  }
  struct Range { int64_t begin, end; };
  Range range(int64_t row, int64_t n_rows) const {  // of all the rows' ranks
    Range r = {begin(row), end(row + n_rows - 1)};
    for (int64_t i = row; mask && i < row + n_rows; ++i) r = {min_of(r.begin, begin(i)), max_of(r.end, end(i))};
    return r;
  }
};

// Where the entries of a KV head lie.
struct Entries {
  const int32_t* table;
  int64_t n, page_size, stride, row_bytes, head_bytes;  // n: entries the table covers; stride: bytes per page
  const char *k, *v;
  Dtype dtype;

  Entries(const GroupStep& g, const Unit& u)
      : table(g.tables + u.seq * g.max_pages), n(g.max_pages * g.page_size), page_size(g.page_size), dtype(g.dtype) {
    row_bytes = entry_bytes(g.dtype, g.dim);
    head_bytes = page_size * row_bytes;
    stride = g.n_heads * head_bytes;
    k = static_cast<const char*>(g.k[u.at]) + u.head * head_bytes;
    v = static_cast<const char*>(g.v[u.at]) + u.head * head_bytes;
  }

  // Byte offsets, in every head, of indices [i, i + kBlock); -1 where there is no page.
  void offsets(int64_t i, int64_t* out) const {
    for (int64_t j = 0; j < kBlock;) {
      const int64_t page = (i + j) / page_size, at = (i + j) % page_size, m = min_of(kBlock - j, page_size - at);
      const int64_t id = i + j < n ? table[page] : -1, base = id * stride + at * row_bytes;
      for (int64_t l = 0; l < m; ++l) out[j + l] = id < 0 ? -1 : base + l * row_bytes;
      j += m;
    }
  }

  // The same for the ranks of a tree row.
  void offsets(int64_t i, const Sight& sight, int64_t row, int64_t* out) const {
    uint64_t left = sight.drafts(row);
    for (int64_t rank = sight.tail; left && rank < i; ++rank) left &= left - 1;
    for (int64_t j = 0; j < kBlock; ++j) {
      int64_t index = i + j;
      if (index >= sight.tail) {
        index = left ? sight.tail + __builtin_ctzll(left) : n;
        left &= left - 1;
      }
      const int64_t id = index < n ? table[index / page_size] : -1;
      out[j] = id < 0 ? -1 : id * stride + index % page_size * row_bytes;
    }
  }
};

// The values of a block, all heads, fetched while its keys are worked on; with its values the next block's keys. Evenly: a burst would fill
// the line buffers and stall, and while nothing is asked for the memory stands idle. A quarter of the rows each in four streams: the
// processor's own prefetcher runs ahead of every stream, but only to the end of its 4 KiB, so several at once hide more.
struct Ahead {
  static constexpr int64_t kLoaded = 40, kStreams = 4;  // how far it is once a head's keys or values are in the products' order
  const char* p;
  const int64_t* offset;       // null: nothing to fetch
  int64_t n_rows, head_bytes, bytes;  // kBlock rows a head; bytes of a row
  int64_t at, begun;  // the next row in the order of fetching; where the head that is worked on began

  Ahead(const char* p, const int64_t* offset, int64_t n_heads, int64_t head_bytes, int64_t bytes)
      : p(p), offset(offset), n_rows(offset ? n_heads * kBlock : 0), head_bytes(head_bytes), bytes(bytes), at(0), begun(0) {}

  PL_INLINE void next_head() { until(kBlock), begun += kBlock; }
  PL_INLINE void until(int64_t end) {  // how far the work on a head's keys or values has come, of kBlock
    end = min_of(begun + min_of(end, kBlock), n_rows);
    if (at + kStreams <= end) fetch(end);
  }
  __attribute__((noinline)) void fetch(int64_t end) {
    for (; at + kStreams <= end; at += kStreams) {
      for (int64_t row = at / kStreams; row < n_rows; row += n_rows / kStreams) {
        const char* q = p + row / kBlock * head_bytes + max_of<int64_t>(0, offset[row % kBlock]);  // without a page any address will do
        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(q + b, 0, 2);
      }
    }
  }
  static int64_t share(int64_t steps) { return (kBlock - kLoaded + steps - 1) / steps; }  // in loops that know their length
  PL_INLINE void more(int64_t n) { until(at - begun + n); }
};

}  // namespace
}  // namespace PL_ISA
}  // namespace paceline
