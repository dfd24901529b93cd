// Aligned memory: single blocks, and the scratch space of a program.
#pragma once
#include <vector>

#include "paceline/kernels.h"

namespace paceline {

constexpr size_t kAlign = 64;

// 64-byte aligned; from 4 MiB on aligned to 2 MiB and offered huge pages. Throws std::bad_alloc.
// small_pages: of the beginning, where the block is large.
void* block_alloc(size_t bytes, size_t small_pages = 0);
// `bytes` as asked for. The large blocks freed last are kept for the next of their size: results of a step have the sizes of the step
// before, and fresh pages would cost more than the kernel that writes them.
void block_free(void*, size_t bytes);

// Scratch memory handed out upwards and taken back all at once; what `workspace_take` draws from.
struct Workspace {
  ~Workspace();
  void reset();  // everything taken becomes free; merges blocks so that the next round fits in one
  struct Block { char* p; size_t size; };
  std::vector<Block> blocks;
  size_t used = 0;  // of the last block
};

}  // namespace paceline
