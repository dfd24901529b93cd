#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
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
constexpr size_t kFetch = 384 << 10;                   // bytes to fetch ahead at most: they must not push each other out of L2

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
  alignas(64) std::atomic<uint32_t> bell{0};
  std::atomic<int> n_sleeping{0};
  std::atomic<bool> stop{false};
  TaskFn fn = nullptr;
  void* arg = nullptr;
  struct alignas(64) Range { std::atomic<int64_t> next{0}; int64_t end = 0; };
  std::unique_ptr<Range[]> ranges;  // of tasks, by thread
  struct alignas(64) Expected { std::atomic<const char*> data{nullptr}; std::atomic<size_t> bytes{0}; } expected;
  std::mutex entry;
#ifndef __linux__
  std::mutex sleep_lock;
  std::condition_variable sleep_cv;
#endif
  int n_threads = 1;
  pid_t pid = getpid();
  std::vector<std::thread> workers;
  struct Fetch { const char *data = nullptr, *at = nullptr, *end = nullptr; };  // a thread's way through its part of what is expected
  Fetch ahead;  // the caller's

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
    for (int i = 0; i < n_threads; ++i) {  // the own range first
      Range& r = ranges[(thread + i) % n_threads];
      for (int64_t t = r.next.fetch_add(1); t < r.end; t = r.next.fetch_add(1)) fn(arg, t, thread);
    }
    inside_task = false;
  }

  // A few more cache lines; false when there are none. Fetching an address that is no longer mapped does nothing.
  bool fetch(Fetch& f, int thread) {
    const char* data = expected.data.load(std::memory_order_relaxed);
    if (data != f.data) {
      const size_t part = expected.bytes.load(std::memory_order_relaxed) / static_cast<size_t>(n_threads);
      f.data = data, f.at = data + static_cast<size_t>(thread) * part, f.end = f.at + (part < kFetch ? part : kFetch);
    }
    if (f.at >= f.end) return false;
    for (int i = 0; i < 4; ++i, f.at += 64) __builtin_prefetch(f.at, 0, 2);
    return true;
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
    Fetch ahead;
    while (true) {
      const uint32_t heard = bell.load();
      const auto deadline = Clock::now() + kSpin;
      bool joined = join(seen);
      for (int i = 1; !joined && !stop.load(std::memory_order_relaxed); ++i) {
        if (!fetch(ahead, thread)) relax();
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
  p->ranges = std::make_unique<Pool::Range[]>(static_cast<size_t>(p->n_threads));
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
  p->fn = fn, p->arg = arg;
  for (int t = 0; t < p->n_threads; ++t) {
    p->ranges[t].next.store(n_tasks * t / p->n_threads, std::memory_order_relaxed);
    p->ranges[t].end = n_tasks * (t + 1) / p->n_threads;
  }
  const uint64_t job = (p->state.load(std::memory_order_relaxed) >> 32) + 1;
  p->state.store((job & 0xffffffffu) << 32 | Pool::kOpen, std::memory_order_release);
  p->ring();
  p->drain(0);
  p->state.fetch_and(~Pool::kOpen, std::memory_order_acq_rel);
  for (int i = 0; (p->state.load(std::memory_order_acquire) & 0x7fffffffu) != 0; ++i) {
    if (p->fetch(p->ahead, 0)) continue;
    if (i < 4096) relax(); else std::this_thread::yield();
  }
}

void pool_expect(Pool* p, const void* data, size_t bytes) {
  if (p->n_threads == 1) return;
  p->expected.bytes.store(bytes, std::memory_order_relaxed);
  p->expected.data.store(static_cast<const char*>(data), std::memory_order_relaxed);
}

}  // namespace paceline
