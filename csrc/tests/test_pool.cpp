// The thread pool: every task runs exactly once, nested runs are inline, thousands of jobs in a row do not lose one.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <vector>

#include "check.h"
#include "pool.h"

namespace paceline {
namespace {
struct Tally {
  std::vector<std::atomic<int>> runs;
  std::atomic<int> bad_thread{0};
  Pool* pool;
};

void count_task(void* arg, int64_t task, int thread) {
  auto* t = static_cast<Tally*>(arg);
  t->runs[static_cast<size_t>(task)].fetch_add(1);
  if (thread < 0 || thread >= pool_size(t->pool)) t->bad_thread.fetch_add(1);
}

void nest_task(void* arg, int64_t, int) {
  auto* t = static_cast<Tally*>(arg);
  pool_run(t->pool, 3, [](void* a, int64_t task, int thread) { count_task(a, task, thread); }, arg);
}
}  // namespace

void test_pool(const Kernels&, Pool* pool, Workspace* ws) {
  bool once = true;
  for (int round = 0; round < 2000; ++round) {
    const int64_t n = round % 7;
    Tally t{std::vector<std::atomic<int>>(8), {0}, pool};
    pool_run(pool, n, count_task, &t);
    for (int64_t i = 0; i < 8; ++i) once &= t.runs[static_cast<size_t>(i)].load() == (i < n ? 1 : 0);
    once &= t.bad_thread.load() == 0;
    if (round % 500 == 0) usleep(1000);  // workers fall asleep
  }
  CHECK(once);
  Tally nested{std::vector<std::atomic<int>>(3), {0}, pool};
  pool_run(pool, 5, nest_task, &nested);
  for (auto& r : nested.runs) CHECK(r.load() == 5);
  Pool* mine = pool_create(3);
  const pid_t child = fork();
  if (child == 0) {  // no workers live here: the caller does all of the work, and destruction does not wait for them
    Tally t{std::vector<std::atomic<int>>(4), {0}, mine};
    pool_run(mine, 4, count_task, &t);
    pool_destroy(mine);
    _exit(t.runs[3].load() == 1 ? 0 : 1);
  }
  int status = 1;
  CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
  pool_destroy(mine);

  ws->reset();
  char* a = static_cast<char*>(workspace_take(ws, 100));
  char* b = static_cast<char*>(workspace_take(ws, size_t{3} << 20));
  a[99] = b[(size_t{3} << 20) - 1] = 1;
  CHECK(reinterpret_cast<uintptr_t>(a) % 64 == 0 && reinterpret_cast<uintptr_t>(b) % 64 == 0);
  ws->reset();
  CHECK(ws->blocks.size() == 1);
}

}  // namespace paceline
