#include "memory.h"

#include <stdlib.h>

#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace paceline {
namespace {
constexpr size_t kHuge = size_t{2} << 20;
constexpr size_t kFirstBlock = size_t{1} << 20;
}  // namespace

void* block_alloc(size_t bytes) {
  const size_t align = bytes >= 2 * kHuge ? kHuge : kAlign;
  if (bytes > SIZE_MAX - align) throw std::bad_alloc();
  const size_t rounded = bytes == 0 ? align : (bytes + align - 1) / align * align;
  void* p = nullptr;
  if (posix_memalign(&p, align, rounded) != 0) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (align == kHuge) madvise(p, rounded, MADV_HUGEPAGE);
#endif
  return p;
}

void block_free(void* p) { free(p); }

Workspace::~Workspace() {
  for (const Block& b : blocks) block_free(b.p);
}

void Workspace::reset() {
  used = 0;
  if (blocks.size() < 2) return;
  size_t total = 0;
  for (const Block& b : blocks) {
    total += b.size;
    block_free(b.p);
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
