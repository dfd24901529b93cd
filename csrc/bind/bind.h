// What the binding files share. Only this folder sees Python.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "program.h"

namespace nb = nanobind;

namespace paceline {

template <class T, int N> using In = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <class T, int N> using InOut = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using AnyIn = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Any = nb::ndarray<nb::c_contig, nb::device::cpu>;

// An aligned array that Python sees through the buffer protocol (bf16 as uint16) and DLPack.
struct Buffer {
  Buffer(std::vector<int64_t> shape, Dtype dtype, size_t small_pages = 0);
  ~Buffer() { block_free(data, nbytes); }
  Buffer(const Buffer&) = delete;
  std::vector<int64_t> shape;
  std::vector<Py_ssize_t> shape_py, strides_py;
  Dtype dtype;
  size_t nbytes;
  void* data;
};

size_t size_of(Dtype);
Dtype dtype_named(const std::string& name);  // std::invalid_argument

// An adapter with the owners of its arrays.
struct BoundAdapter {
  Adapter adapter{};
  std::vector<AdapterSite> sites;
  std::vector<std::vector<AdapterPart>> parts;
  std::vector<AnyIn> owners;
};

// A step with the owners of its arrays.
struct BoundStep {
  Step step{};
  std::vector<GroupStep> groups;
  std::vector<std::vector<void*>> pools;
  std::vector<nb::object> owners;  // one (Pools, slots, tables, lens) per group, then the adapters
  std::vector<nb::ndarray<>> arrays;
  std::vector<const Adapter*> adapters;
};

// Packed weights with the owners of their arrays.
struct BoundWeight {
  Weight w{};
  std::vector<AnyIn> owners;
  std::string format{};
};

// Format, shape and sizes of packed arrays, checked; ValueError where they contradict each other.
Weight checked_weight(const std::string& format, int64_t n_out, int64_t n_in, int64_t group, size_t data_bytes, std::optional<size_t> scale_bytes,
                      std::optional<size_t> min_bytes, std::optional<size_t> factor_bytes);

void bind_buffer(nb::module_&);
void bind_adapter(nb::module_&);
void bind_step(nb::module_&);
void bind_program(nb::module_&);
void bind_device(nb::module_&);

[[noreturn]] void fail(const std::string& what);  // ValueError

}  // namespace paceline
