// Aligned memory: single blocks, and the scratch space of a program.
#pragma once
#include <vector>

#include "paceline/kernels.h"

namespace paceline {

constexpr size_t kAlign = 64;

// 64-byte aligned; from 4 MiB on aligned to 2 MiB and offered huge pages. Throws std::bad_alloc.
void* block_alloc(size_t bytes);
void block_free(void*);

// Scratch memory handed out upwards and taken back all at once; what `workspace_take` draws from.
struct Workspace {
  ~Workspace();
  void reset();  // everything taken becomes free; merges blocks so that the next round fits in one
  struct Block { char* p; size_t size; };
  std::vector<Block> blocks;
  size_t used = 0;  // of the last block
};

}  // namespace paceline
