#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

namespace paceline {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kSpin = std::chrono::microseconds(50);  // longer than the gaps between kernels of one program

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

thread_local bool inside_task = false;  // a kernel called from a task runs its tasks inline

}  // namespace

// `state` holds a job: number (high half), open bit, and how many workers joined it. A worker that wakes up late finds the job
// closed and goes back to sleep, so the caller waits only for workers that really took part.
struct Pool {
  static constexpr uint64_t kOpen = 1u << 31;
  alignas(64) std::atomic<uint64_t> state{0};
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<uint32_t> bell{0};
  std::atomic<int> n_sleeping{0};
  std::atomic<bool> stop{false};
  TaskFn fn = nullptr;
  void* arg = nullptr;
  int64_t n_tasks = 0;
  std::mutex entry;
#ifndef __linux__
  std::mutex sleep_lock;
  std::condition_variable sleep_cv;
#endif
  int n_threads = 1;
  pid_t pid = getpid();
  std::vector<std::thread> workers;

  void sleep(uint32_t seen) {
    n_sleeping.fetch_add(1);
#ifdef __linux__
    if (bell.load() == seen) syscall(SYS_futex, &bell, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
    std::unique_lock<std::mutex> lock(sleep_lock);
    sleep_cv.wait(lock, [&] { return bell.load() != seen; });
#endif
    n_sleeping.fetch_sub(1);
  }

  void ring() {
    bell.fetch_add(1);
    if (n_sleeping.load() == 0) return;
#ifdef __linux__
    syscall(SYS_futex, &bell, FUTEX_WAKE_PRIVATE, n_threads, nullptr, nullptr, 0);
#else
    std::lock_guard<std::mutex> lock(sleep_lock);
    sleep_cv.notify_all();
#endif
  }

  void drain(int thread) {
    inside_task = true;
    for (int64_t t = next.fetch_add(1); t < n_tasks; t = next.fetch_add(1)) fn(arg, t, thread);
    inside_task = false;
  }

  bool join(uint64_t& seen) {
    uint64_t s = state.load(std::memory_order_acquire);
    while ((s & kOpen) && (s >> 32) != seen)
      if (state.compare_exchange_weak(s, s + 1, std::memory_order_acq_rel)) {
        seen = s >> 32;
        return true;
      }
    return false;
  }

  void work(int thread) {
    uint64_t seen = 0;
    while (true) {
      const uint32_t heard = bell.load();
      const auto deadline = Clock::now() + kSpin;
      bool joined = join(seen);
      for (int i = 1; !joined && !stop.load(std::memory_order_relaxed); ++i) {
        relax();
        joined = join(seen);
        if (i % 32 == 0 && Clock::now() > deadline) break;
      }
      if (stop.load()) return;
      if (!joined) {
        sleep(heard);
        continue;
      }
      drain(thread);
      state.fetch_sub(1, std::memory_order_release);
    }
  }
};

Pool* pool_create(int n_threads) {
  Pool* p = new Pool;
  p->n_threads = n_threads < 1 ? 1 : n_threads;
  for (int t = 1; t < p->n_threads; ++t) p->workers.emplace_back([p, t] { p->work(t); });
  return p;
}

void pool_destroy(Pool* p) {
  if (p->pid != getpid()) {  // a forked child has no workers to join
    for (auto& w : p->workers) w.detach();
  } else {
    p->stop.store(true);
    p->ring();
    for (auto& w : p->workers) w.join();
  }
  delete p;
}

int pool_size(const Pool* p) { return p->n_threads; }

void pool_run(Pool* p, int64_t n_tasks, TaskFn fn, void* arg) {
  if (n_tasks <= 1 || p->n_threads == 1 || inside_task) {
    for (int64_t t = 0; t < n_tasks; ++t) fn(arg, t, 0);
    return;
  }
  std::lock_guard<std::mutex> lock(p->entry);
  p->fn = fn, p->arg = arg, p->n_tasks = n_tasks;
  p->next.store(0, std::memory_order_relaxed);
  const uint64_t job = (p->state.load(std::memory_order_relaxed) >> 32) + 1;
  p->state.store((job & 0xffffffffu) << 32 | Pool::kOpen, std::memory_order_release);
  p->ring();
  p->drain(0);
  p->state.fetch_and(~Pool::kOpen, std::memory_order_acq_rel);
  for (int i = 0; (p->state.load(std::memory_order_acquire) & 0x7fffffffu) != 0; ++i)
    if (i < 4096) relax(); else std::this_thread::yield();
}

}  // namespace paceline
