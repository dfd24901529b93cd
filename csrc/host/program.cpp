#include "program.h"

#include <stdexcept>

#include "cpu.h"
#include "pool.h"

namespace paceline {

Device::Device(const std::string& name, int n_threads) {
  std::string known;
  for (const Isa& candidate : instruction_sets()) {
    known += (known.empty() ? "" : ", ") + std::string(candidate.name);
    if (name != candidate.name) continue;
    if (!candidate.why_not.empty()) throw std::invalid_argument(candidate.why_not);
    isa = name;
    candidate.fill(kernels);
  }
  if (isa.empty()) throw std::invalid_argument("unknown instruction set; known are " + known);
  pool = pool_create(n_threads);
}

Device::~Device() {
  pool_destroy(pool);
  block_free(arena_, arena_size_ * sizeof(float));
}

float* Device::arena(size_t n_floats) {
  if (n_floats > arena_size_) {
    block_free(arena_, arena_size_ * sizeof(float));
    arena_ = nullptr, arena_size_ = 0;
    arena_ = static_cast<float*>(block_alloc(n_floats * sizeof(float)));
    arena_size_ = n_floats;
  }
  return arena_;
}

Mat Frame::mat(const Ref& r) const {
  if (r.slot >= 0) return {external[r.slot].p + r.col, external[r.slot].stride, r.cols};
  return {arena + r.base * n_rows + r.col, r.stride, r.cols};
}

size_t Program::next_weights(size_t i) const {
  for (size_t n = 1; n < code.size(); ++n)
    if (code[(i + n) % code.size()].weights) return (i + n) % code.size();
  return i;
}

void Program::run(Device& device, const Step* step, int64_t n_rows, const Mat* external) const {
  std::lock_guard<std::mutex> guard(device.lock);
  const Timer whole(device.busy_ns);
  const Frame frame{device.arena(static_cast<size_t>(width * n_rows)), n_rows, external};
  Ctx ctx{device.pool, &device.ws, &device.kernels, step, n_rows};
  for (size_t i = 0; i < code.size(); ++i) {
    const Instr& instr = code[i];
    const Instr& next = code[next_weights(i)];
    if (next.weights) pool_expect(device.pool, next.weights, next.weight_bytes);
    ctx.n_rows = instr.wanted ? step->n_want : n_rows;
    if (ctx.n_rows == 0) continue;
    device.ws.reset();
    if (!device.profiling) {
      instr.run(ctx, frame);
      continue;
    }
    Device::Spent& spent = device.spent[instr.name];
    ++spent.calls;
    const Timer timer(spent.ns);
    instr.run(ctx, frame);
  }
}

}  // namespace paceline
