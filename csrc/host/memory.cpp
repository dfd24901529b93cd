#include "memory.h"

#include <stdlib.h>

#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace paceline {
namespace {
constexpr size_t kHuge = size_t{2} << 20;
constexpr size_t kFirstBlock = size_t{1} << 20;
constexpr size_t kSpareFrom = size_t{256} << 10, kSpareAll = size_t{32} << 20;

// Freed blocks, the oldest first.
struct Spares {
  struct Block { void* p; size_t size; };
  std::mutex lock;
  std::vector<Block> blocks;
  size_t total = 0;

  void* take(size_t size) {
    const std::lock_guard<std::mutex> guard(lock);
    for (size_t i = blocks.size(); i-- > 0;) {
      if (blocks[i].size != size) continue;
      void* p = blocks[i].p;
      blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(i));
      total -= size;
      return p;
    }
    return nullptr;
  }

  void keep(void* p, size_t size) {
    const std::lock_guard<std::mutex> guard(lock);
    blocks.push_back({p, size});
    total += size;
    while (total > kSpareAll) {
      total -= blocks.front().size;
      free(blocks.front().p);
      blocks.erase(blocks.begin());
    }
  }
};

Spares& spares() {
  static Spares* s = new Spares;  // never destroyed: buffers may be freed while the process ends
  return *s;
}

size_t alignment(size_t bytes) { return bytes >= 2 * kHuge ? kHuge : kAlign; }

size_t rounded_up(size_t bytes) {
  const size_t align = alignment(bytes);
  if (bytes > SIZE_MAX - align) throw std::bad_alloc();
  return bytes == 0 ? align : (bytes + align - 1) / align * align;
}

}  // namespace

void* block_alloc(size_t bytes, size_t small_pages) {
  const size_t align = alignment(bytes), rounded = rounded_up(bytes);
  void* p = rounded >= kSpareFrom && small_pages == 0 ? spares().take(rounded) : nullptr;
  if (p) return p;
  if (posix_memalign(&p, align, rounded) != 0) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (align == kHuge) {
    const size_t small = small_pages < rounded ? (small_pages + kHuge - 1) / kHuge * kHuge : rounded;
    if (small) madvise(p, small, MADV_NOHUGEPAGE);
    if (small < rounded) madvise(static_cast<char*>(p) + small, rounded - small, MADV_HUGEPAGE);
  }
#endif
  return p;
}

void block_free(void* p, size_t bytes) {
  const size_t rounded = rounded_up(bytes);
  if (p && rounded >= kSpareFrom && rounded <= kSpareAll) spares().keep(p, rounded);
  else free(p);
}

Workspace::~Workspace() {
  for (const Block& b : blocks) block_free(b.p, b.size);
}

void Workspace::reset() {
  used = 0;
  if (blocks.size() < 2) return;
  size_t total = 0;
  for (const Block& b : blocks) {
    total += b.size;
    block_free(b.p, b.size);
  }
  blocks.clear();
  blocks.push_back({static_cast<char*>(block_alloc(total)), total});
}

void* workspace_take(Workspace* ws, size_t bytes) {
  bytes = (bytes + kAlign - 1) / kAlign * kAlign;
  if (ws->blocks.empty() || ws->used + bytes > ws->blocks.back().size) {
    const size_t last = ws->blocks.empty() ? kFirstBlock : 2 * ws->blocks.back().size;
    const size_t size = bytes > last ? bytes : last;
    ws->blocks.push_back({static_cast<char*>(block_alloc(size)), size});
    ws->used = 0;
  }
  void* p = ws->blocks.back().p + ws->used;
  ws->used += bytes;
  return p;
}

}  // namespace paceline
