#include <chrono>

#include <nanobind/stl/tuple.h>

#include "bind.h"
#include "cpu.h"

namespace paceline {
namespace {

using Clock = std::chrono::steady_clock;

template <class T, class... Shape> nb::ndarray<nb::numpy, T> new_array(Shape... shape) {
  const size_t dims[] = {static_cast<size_t>(shape)...};
  size_t n = 1;
  for (size_t d : dims) n *= d;
  T* data = new T[n ? n : 1];
  return nb::ndarray<nb::numpy, T>(data, sizeof...(shape), dims, nb::capsule(data, [](void* p) noexcept { delete[] static_cast<T*>(p); }));
}

struct Session {  // a kernel outside a program
  Session(Device& d, const char* name, int64_t n_rows) : guard(d.lock), ctx{d.pool, &d.ws, &d.kernels, nullptr, n_rows}, busy(d.busy_ns), own(spent(d, name)) {
    d.ws.reset();
  }
  int64_t& spent(Device& d, const char* name) {
    if (!d.profiling) return unused;
    ++d.spent[name].calls;
    return d.spent[name].ns;
  }
  std::lock_guard<std::mutex> guard;
  Ctx ctx;
  int64_t unused = 0;
  Timer busy, own;
};

nb::object sample(Device& d, const In<float, 2>& logits, const In<float, 1>& temperature, const In<int32_t, 1>& top_k,
                  const In<float, 1>& top_p, const In<float, 1>& min_p, const In<double, 1>& u) {
  const size_t n = logits.shape(0);
  if (!d.kernels.sample) fail("kernel 'sample' is not in this build");
  if (logits.shape(1) == 0) fail("logits: empty vocabulary");
  for (size_t m : {temperature.shape(0), top_k.shape(0), top_p.shape(0), min_p.shape(0), u.shape(0)})
    if (m != n) fail("sample: one value per row of logits");
  auto out = new_array<int64_t>(n);
  if (n) {
    nb::gil_scoped_release nogil;
    Session s(d, "sample", static_cast<int64_t>(n));
    d.kernels.sample(s.ctx, {logits.data(), static_cast<int64_t>(logits.shape(1)), temperature.data(), top_k.data(), top_p.data(), min_p.data(), u.data(), out.data()});
  }
  return nb::cast(out);
}

nb::tuple logprobs(Device& d, const In<float, 2>& logits, const In<int64_t, 1>& ids, int64_t n_top) {
  const size_t n = logits.shape(0);
  const auto n_vocab = static_cast<int64_t>(logits.shape(1));
  if (!d.kernels.logprobs) fail("kernel 'logprobs' is not in this build");
  if (ids.shape(0) != n || n_top < 0 || n_top > n_vocab) fail("logprobs: one id per row, n_top at most the vocabulary");
  for (size_t i = 0; i < n; ++i)
    if (ids.data()[i] < 0 || ids.data()[i] >= n_vocab) fail("ids: " + std::to_string(ids.data()[i]) + " is outside the vocabulary");
  auto own = new_array<float>(n);
  auto top_ids = new_array<int64_t>(n, n_top);
  auto top = new_array<float>(n, n_top);
  if (n) {
    nb::gil_scoped_release nogil;
    Session s(d, "logprobs", static_cast<int64_t>(n));
    d.kernels.logprobs(s.ctx, {logits.data(), n_vocab, ids.data(), n_top, own.data(), top_ids.data(), top.data()});
  }
  return nb::make_tuple(own, top_ids, top);
}

void move(Device& d, const Any& pool, const In<int64_t, 1>& src, const In<int64_t, 1>& dst) {
  if (!d.kernels.move) fail("kernel 'move' is not in this build");
  if (pool.ndim() != 4 || src.shape(0) != dst.shape(0)) fail("move: pool is (n_pages, n_heads, page_size, dim); src and dst are equally long");
  const Dtype dtype = pool.itemsize() == 4 ? Dtype::f32 : pool.itemsize() == 2 ? Dtype::bf16 : Dtype::i8;  // only the width matters
  if (pool.itemsize() != 4 && pool.itemsize() != 2 && pool.itemsize() != 1) fail("move: pool items must be 1, 2 or 4 bytes wide");
  const auto dim = [&](size_t i) { return static_cast<int64_t>(pool.shape(i)); };
  const int64_t n_slots = dim(0) * dim(2), n = static_cast<int64_t>(src.shape(0));
  for (const auto* a : {&src, &dst})
    for (int64_t i = 0; i < n; ++i)
      if (a->data()[i] < 0 || a->data()[i] >= n_slots) fail("move: slot " + std::to_string(a->data()[i]) + " is outside the pool");
  if (n == 0) return;
  nb::gil_scoped_release nogil;
  Session s(d, "move", n);
  d.kernels.move(s.ctx, {pool.data(), dtype, dim(0), dim(1), dim(2), dim(3), src.data(), dst.data(), n});
}

int32_t pack(Device& d, const AnyIn& src, const std::string& source, const std::string& format, int64_t group, const Any& data,
             const std::optional<Any>& scales, const std::optional<Any>& mins, const std::optional<Any>& factors) {
  if (src.ndim() != 2) fail("pack: src must have two axes");
  const auto bytes = [](const std::optional<Any>& a) { return a ? std::optional<size_t>(a->nbytes()) : std::nullopt; };
  Weight w = checked_weight(format, static_cast<int64_t>(src.shape(0)), static_cast<int64_t>(src.shape(1)), group, data.nbytes(), bytes(scales), bytes(mins),
                            bytes(factors));
  const Dtype dtype = dtype_named(source);
  if ((dtype != Dtype::f32 && dtype != Dtype::f16 && dtype != Dtype::bf16) || src.itemsize() != size_of(dtype)) fail("pack: src must be float32, float16 or bfloat16");
  w.data = data.data(), w.scales = scales ? scales->data() : nullptr, w.mins = mins ? mins->data() : nullptr;
  w.factors = factors ? static_cast<const int8_t*>(factors->data()) : nullptr;
  int32_t flags = 0;
  nb::gil_scoped_release nogil;
  Session s(d, "pack", w.n_out);
  d.kernels.pack(s.ctx, {src.data(), dtype, w, &flags});
  return flags;
}

// What was spent since the last call, and whether to go on counting.
std::vector<std::tuple<std::string, int64_t, double>> profile(Device& d, bool on) {
  std::lock_guard<std::mutex> guard(d.lock);
  std::vector<std::tuple<std::string, int64_t, double>> out;
  for (const auto& [name, spent] : d.spent) out.emplace_back(name, spent.calls, 1e-9 * static_cast<double>(spent.ns));
  d.spent.clear();
  d.profiling = on;
  return out;
}

double read_bandwidth(Device& d, int64_t n_bytes, int n_passes) {
  if (n_bytes < (1 << 20) || n_bytes > (int64_t{1} << 36) || n_passes < 1) fail("n_bytes: from 1 MiB to 64 GiB");
  Buffer b({n_bytes / 4}, Dtype::f32);
  nb::gil_scoped_release nogil;
  std::lock_guard<std::mutex> guard(d.lock);
  auto* p = static_cast<float*>(b.data);
  for (int64_t i = 0; i < n_bytes / 4; ++i) p[i] = 1.0f;
  double best = 0, check = 0;
  for (int i = 0; i < n_passes; ++i) {
    const auto start = Clock::now();
    check += d.kernels.read(d.pool, b.data, static_cast<size_t>(n_bytes));
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    const double rate = static_cast<double>(n_bytes >> 20 << 20) / seconds;
    best = rate > best ? rate : best;
  }
  return check > 0 ? best : 0.0;
}

double peak(Device& d, const std::string& kind, double seconds) {
  static const char* const kinds[] = {"f32", "bf16", "int8"};
  if (!(seconds > 0 && seconds <= 60)) fail("seconds: above 0, at most 60");
  for (int32_t i = 0; i < 3; ++i)
    if (kind == kinds[i]) {
      nb::gil_scoped_release nogil;
      std::lock_guard<std::mutex> guard(d.lock);
      return d.kernels.peak(d.pool, i, seconds);
    }
  fail("kind = '" + kind + "': known are f32, bf16, int8");
}

}  // namespace

void bind_device(nb::module_& m) {
  using nb::arg;
  m.def("instruction_sets", [] {
    std::vector<std::pair<std::string, std::string>> out;
    for (const Isa& isa : instruction_sets()) out.emplace_back(isa.name, isa.why_not);
    return out;
  }, "(name, why it cannot run here or '') of every instruction set in the build, best last.");
  m.def("usable_threads", &usable_threads, "Threads the process may keep busy: affinity, bounded by the cgroup quota.");
  nb::class_<Device>(m, "Device", "An instruction set, a thread pool and scratch memory; calls are serialised.")
      .def(nb::init<const std::string&, int>(), arg("isa"), arg("n_threads"))
      .def_ro("isa", &Device::isa)
      .def_prop_ro("n_threads", [](const Device& d) { return pool_size(d.pool); })
      .def("sample", &sample, arg("logits").noconvert(), arg("temperature").noconvert(), arg("top_k").noconvert(), arg("top_p").noconvert(),
           arg("min_p").noconvert(), arg("u").noconvert(), "int64 (n_rows); see Ops.sample.")
      .def("logprobs", &logprobs, arg("logits").noconvert(), arg("ids").noconvert(), arg("n_top"), "See Ops.logprobs.")
      .def("move", &move, arg("pool").noconvert(), arg("src").noconvert(), arg("dst").noconvert())
      .def("pack", &pack, arg("src").noconvert(), arg("source"), arg("format"), arg("group"), arg("data").noconvert(),
           arg("scales").noconvert().none(), arg("mins").noconvert().none(), arg("factors").noconvert().none(),
           "Row-major weights into tiles, quantised to nearest. 0: done; 1: a value is not finite; 2: beyond the format's range.")
      .def_prop_ro("busy", [](const Device& d) { return 1e-9 * static_cast<double>(d.busy_ns); }, "Seconds spent in programs and kernels so far.")
      .def("profile", &profile, arg("on"),
           "Switch counting by kind of instruction on or off; (name, calls, seconds) of everything since the last call.")
      .def("read_bandwidth", &read_bandwidth, arg("n_bytes") = int64_t{1} << 29, arg("n_passes") = 5, "Bytes per second, best pass.")
      .def("peak", &peak, arg("kind"), arg("seconds") = 0.3, "FLOP per second of the densest instruction: f32, bf16 or int8.");
}

}  // namespace paceline
