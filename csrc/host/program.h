// A traced function as a list of instructions over registers, run by one call.
//
// A register is a float32 matrix with the step's rows. Arena registers are planned by ops/record.py: register at `base` floats per row
// starts at arena + base * n_rows, so one plan serves any number of rows. External registers are the program's inputs and outputs.
#pragma once
#include <chrono>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "memory.h"
#include "paceline/kernels.h"

namespace paceline {

// Adds the time it lives to `ns`.
class Timer {
 public:
  explicit Timer(int64_t& ns) : ns_(ns), start_(Clock::now()) {}
  ~Timer() { ns_ += std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start_).count(); }
  Timer(const Timer&) = delete;

 private:
  using Clock = std::chrono::steady_clock;
  int64_t& ns_;
  Clock::time_point start_;
};

// Everything a process needs to run programs: an instruction set, threads, scratch. Calls are serialised by `lock`.
struct Device {
  Device(const std::string& isa, int n_threads);  // std::invalid_argument names what is available
  ~Device();
  Device(const Device&) = delete;

  float* arena(size_t n_floats);  // grows on demand; contents are lost

  std::string isa;
  Kernels kernels{};
  Pool* pool;
  Workspace ws;
  std::mutex lock;

  // Where the time goes: in all programs and kernels so far, and by kind of instruction, which is counted only while `profiling`.
  struct Spent { int64_t calls = 0, ns = 0; };
  int64_t busy_ns = 0;
  bool profiling = false;
  std::map<std::string, Spent> spent;

 private:
  float* arena_ = nullptr;
  size_t arena_size_ = 0;
};

struct Ref {
  int32_t slot;  // -1: arena; otherwise the index of an external register
  bool wanted;   // has the step's wanted rows instead of all
  int64_t base, stride, col, cols;
};

struct Frame {
  float* arena;
  int64_t n_rows;
  const Mat* external;
  Mat mat(const Ref& r) const;
};

struct Instr {
  std::string name;  // "add", "linear 960x576 int4"
  bool wanted;
  std::function<void(const Ctx&, const Frame&)> run;
  const void* weights = nullptr;  // what it streams from memory, if much
  size_t weight_bytes = 0;
};

struct Program {
  int64_t width = 0;  // arena floats per row
  std::vector<Instr> code;
  size_t next_weights(size_t i) const;  // the first instruction after i, cyclically, that streams weights (i itself if no other)
  void run(Device& device, const Step* step, int64_t n_rows, const Mat* external) const;
};

}  // namespace paceline
