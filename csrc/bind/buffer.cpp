#include "bind.h"

namespace paceline {

void fail(const std::string& what) { throw nb::value_error(what.c_str()); }

namespace {
struct Name { const char* name; const char* format; Dtype dtype; size_t size; };
constexpr Name kNames[] = {
    {"float32", "f", Dtype::f32, 4}, {"float16", "e", Dtype::f16, 2}, {"bfloat16", "H", Dtype::bf16, 2}, {"int8", "b", Dtype::i8, 1},
    {"uint8", "B", Dtype::u8, 1},    {"int32", "i", Dtype::i32, 4},   {"int64", "q", Dtype::i64, 8},    {"uint64", "Q", Dtype::u64, 8},
};

const Name& entry(Dtype d) {
  for (const Name& n : kNames)
    if (n.dtype == d) return n;
  fail("unknown dtype");
}
}  // namespace

size_t size_of(Dtype d) { return entry(d).size; }

Dtype dtype_named(const std::string& name) {
  std::string known;
  for (const Name& n : kNames) {
    if (name == n.name) return n.dtype;
    known += std::string(known.empty() ? "" : ", ") + n.name;
  }
  fail("dtype = '" + name + "': known are " + known);
}

Buffer::Buffer(std::vector<int64_t> shape_, Dtype dtype_, size_t small_pages) : shape(std::move(shape_)), dtype(dtype_), nbytes(size_of(dtype_)) {
  strides_py.resize(shape.size());
  for (size_t i = shape.size(); i-- > 0;) {
    if (shape[i] < 0 || (shape[i] > 0 && nbytes > (size_t{1} << 46) / static_cast<size_t>(shape[i]))) fail("shape is negative or too large");
    strides_py[i] = static_cast<Py_ssize_t>(nbytes);
    nbytes *= static_cast<size_t>(shape[i]);
  }
  shape_py.assign(shape.begin(), shape.end());
  data = block_alloc(nbytes, small_pages);
}

namespace {

int get_buffer(PyObject* self, Py_buffer* view, int flags) {
  Buffer* b = nb::inst_ptr<Buffer>(self);
  view->buf = b->data;
  view->obj = self;
  Py_INCREF(self);
  view->len = static_cast<Py_ssize_t>(b->nbytes);
  view->itemsize = static_cast<Py_ssize_t>(size_of(b->dtype));
  view->readonly = 0;
  view->ndim = static_cast<int>(b->shape.size());
  view->format = flags & PyBUF_FORMAT ? const_cast<char*>(entry(b->dtype).format) : nullptr;
  view->shape = b->shape_py.data();
  view->strides = b->strides_py.data();
  view->suboffsets = nullptr;
  view->internal = nullptr;
  return 0;
}

PyType_Slot slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(&get_buffer)}, {0, nullptr}};

nb::dlpack::dtype dlpack_dtype(Dtype d) {
  switch (d) {
    case Dtype::f32: case Dtype::f16: return {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), static_cast<uint8_t>(size_of(d) * 8), 1};
    case Dtype::bf16: return {static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
    case Dtype::u8: case Dtype::u64: return {static_cast<uint8_t>(nb::dlpack::dtype_code::UInt), static_cast<uint8_t>(size_of(d) * 8), 1};
    default: return {static_cast<uint8_t>(nb::dlpack::dtype_code::Int), static_cast<uint8_t>(size_of(d) * 8), 1};
  }
}

nb::object to_dlpack(nb::handle self, const nb::kwargs&) {
  Buffer* b = nb::inst_ptr<Buffer>(self);
  std::vector<size_t> shape(b->shape.begin(), b->shape.end());
  nb::ndarray<> array(b->data, shape.size(), shape.data(), self, nullptr, dlpack_dtype(b->dtype));
  return nb::cast(array);  // of no framework: a DLPack capsule
}

}  // namespace

void bind_buffer(nb::module_& m) {
  nb::class_<Buffer>(m, "Buffer", nb::type_slots(slots), "An aligned, uninitialised array; np.asarray(buffer) is a view (bfloat16 as uint16).")
      .def("__init__", [](Buffer* self, std::vector<int64_t> shape, const std::string& dtype, size_t small_pages) {
        new (self) Buffer(std::move(shape), dtype_named(dtype), small_pages);
      }, nb::arg("shape"), nb::arg("dtype"), nb::arg("small_pages") = size_t{0})
      .def_prop_ro("shape", [](const Buffer& b) { return nb::tuple(nb::cast(b.shape)); })
      .def_prop_ro("nbytes", [](const Buffer& b) { return b.nbytes; })
      .def_prop_ro("dtype", [](const Buffer& b) { return std::string(entry(b.dtype).name); })
      .def("__len__", [](const Buffer& b) { return b.shape.empty() ? int64_t{0} : b.shape[0]; })
      .def("__dlpack__", &to_dlpack)
      .def("__dlpack_device__", [](const Buffer&) { return std::pair<int, int>(nb::device::cpu::value, 0); });
}

}  // namespace paceline
