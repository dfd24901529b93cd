// A thread pool as an object: no process-global state.
#pragma once
#include "paceline/kernels.h"

namespace paceline {

// n_threads counts the caller. Workers spin briefly, then sleep. After fork() the child's pool runs on its caller alone.
Pool* pool_create(int n_threads);
void pool_destroy(Pool*);

// What the threads will read next, in equal parts by thread. A thread with nothing to do fetches some of its part into its cache.
void pool_expect(Pool*, const void* data, size_t bytes);

}  // namespace paceline
