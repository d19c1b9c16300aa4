// softtopk._C.direct: the conditions of softtopk/direct.py, and a plain call of soft_topk from its
// Python arguments to the launcher. Of 8.9 us that a call at 1 x 64 takes on the CPU by way of the
// interpreter, 5.1 are left (torch.softmax: 1.1), 2.5 of them the kernel's.
//
// torch's objects are used as Python uses them, by attributes and calls: the native module is built
// without torch.
#include <cmath>
#include <cstdlib>
#include <initializer_list>

#include "python.h"
#include "softtopk.h"

namespace py = pybind11;

namespace softtopk {
namespace {

py::object owned(PyObject* reference) {
  if (reference == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(reference);
}

py::object name(const char* text) { return owned(PyUnicode_InternFromString(text)); }

template <class... A>
py::object call(const py::object& function, A... arguments) {
  // The first place is the callee's to use.
  PyObject* const given[] = {nullptr, arguments...};
  constexpr size_t count = sizeof...(A) | PY_VECTORCALL_ARGUMENTS_OFFSET;
  return owned(PyObject_Vectorcall(function.ptr(), given + 1, count, nullptr));
}

py::object call_method(PyObject* self, const py::object& name) {
  return owned(PyObject_CallMethodNoArgs(self, name.ptr()));
}

py::object get(PyObject* self, const py::object& name) {
  return owned(PyObject_GetAttr(self, name.ptr()));
}

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

void* address(const py::object& object) { return PyLong_AsVoidPtr(object.ptr()); }

// Only for what is True or False.
bool is_true(const py::object& object) { return object.ptr() == Py_True; }

// What is asked of torch and of softtopk/direct.py, looked up once.
struct Names {
  py::object quiet, plain, default_kernels;  // direct.py's
  py::module_ torch = py::module_::import("torch"), native = torch.attr("_C"),
              forward_ad = py::module_::import("torch.autograd.forward_ad"),
              profiler = py::module_::import("torch.autograd.profiler");
  py::object tensor = torch.attr("Tensor"), parameter = torch.attr("nn").attr("Parameter");
  py::object types[4] = {torch.attr("float32"), torch.attr("float64"), torch.attr("float16"),
                         torch.attr("bfloat16")};  // in the order of Type
  py::object dispatch_keys = native.attr("_dispatch_keys"),
             local_include_set = native.attr("_dispatch_tls_local_include_set"),
             function_modes = native.attr("_len_torch_function_stack"),
             is_grad_enabled = torch.attr("is_grad_enabled"), empty_like = torch.attr("empty_like"),
             num_threads = torch.attr("get_num_threads"),
             current_stream = py::getattr(native, "_cuda_getCurrentRawStream", py::none());
  py::object current_level = name("_current_level"), enabled = name("_is_profiler_enabled"),
             raw_repr = name("raw_repr"), requires_grad = name("requires_grad"),
             is_contiguous = name("is_contiguous"), shape = name("shape"), dtype = name("dtype"),
             data_ptr = name("data_ptr"), get_device = name("get_device");
};
const Names* names = nullptr;

bool in_function_mode() { return integer(call(names->function_modes).ptr()) > 0; }

bool alone() {
  if (in_function_mode()) return false;
  if (integer(get(names->forward_ad.ptr(), names->current_level).ptr()) >= 0) return false;
  if (is_true(get(names->profiler.ptr(), names->enabled))) return false;
  const py::object keys = call_method(call(names->local_include_set).ptr(), names->raw_repr);
  return PySet_Contains(names->quiet.ptr(), keys.ptr()) == 1;
}

bool is_tensor(PyObject* object) {
  const auto kind = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return kind == names->tensor.ptr() || kind == names->parameter.ptr();
}

// A borrowed reference, or null.
PyObject* plain(PyObject* t) {
  if (!is_tensor(t)) return nullptr;
  const py::object keys = call_method(call(names->dispatch_keys, t).ptr(), names->raw_repr);
  return PyDict_GetItem(names->plain.ptr(), keys.ptr());
}

// As os.environ.get does, at a tenth of its time.
bool backend_is_set() {
  const char* backend = std::getenv("SOFTTOPK_BACKEND");
  return backend != nullptr && *backend != '\0';
}

// An int or a float as a number; any other as NaN, which is in no range.
double number(PyObject* object) {
  if (PyFloat_CheckExact(object)) return PyFloat_AS_DOUBLE(object);
  if (!PyLong_CheckExact(object)) return Py_NAN;
  const double value = PyLong_AsDouble(object);
  if (value != -1 || !PyErr_Occurred()) return value;
  PyErr_Clear();  // it is too large
  return Py_NAN;
}

bool is_cuda(PyObject* device) { return PyUnicode_CompareWithASCIIString(device, "cuda") == 0; }

// A contiguous plain tensor of a floating type; of any other the device is null.
struct Memory {
  PyObject* device = nullptr;  // its type, borrowed
  int index = -1;              // of a GPU
  Type type = Type::float32;
  void* data = nullptr;
  py::object shape = {};
  Py_ssize_t rank() const { return PyTuple_GET_SIZE(shape.ptr()); }
  int64_t size(Py_ssize_t i) const { return integer(PyTuple_GET_ITEM(shape.ptr(), i)); }
};

Memory memory_of(PyObject* t) {
  PyObject* const device = plain(t);
  if (device == nullptr || !is_true(call_method(t, names->is_contiguous))) return {};
  const py::object dtype = get(t, names->dtype);
  int type = 0;
  while (type < 4 && !dtype.is(names->types[type])) ++type;
  if (type == 4) return {};
  const int index =
      is_cuda(device) ? static_cast<int>(integer(call_method(t, names->get_device).ptr())) : -1;
  return {device, index, static_cast<Type>(type), address(call_method(t, names->data_ptr)),
          get(t, names->shape)};
}

// A number, or a tensor with a value for each row of x or one for all; false for another argument.
bool per_row(PyObject* given, const Memory& x, PerRow& value) {
  value = {nullptr, Type::float32, 0, 0};
  if (!is_tensor(given)) {
    value.number = number(given);
    return !std::isnan(value.number);
  }
  const Memory t = memory_of(given);
  if (t.device != x.device || t.index != x.index) return false;
  if (t.type != Type::float32 && t.type != Type::float64) return false;
  if (t.rank() != 0 && t.rank() != x.rank() - 1) return false;
  for (Py_ssize_t i = 0; i < t.rank(); ++i) {
    if (t.size(i) != x.size(i)) return false;
  }
  value.data = t.data;
  value.type = t.type;
  value.stride = t.rank() != 0;
  return true;
}

bool needs_gradient(std::initializer_list<PyObject*> arguments) {
  if (!is_true(call(names->is_grad_enabled))) return false;
  for (PyObject* given : arguments) {
    if (is_tensor(given) && is_true(get(given, names->requires_grad))) return true;
  }
  return false;
}

// p; null for a call that softtopk/direct.py does not describe.
py::object soft_topk(PyObject* x, PyObject* k, PyObject* alpha, PyObject* dim, PyObject* largest) {
  if (!is_tensor(x) || !PyLong_CheckExact(dim) || !PyBool_Check(largest)) return {};
  if (in_function_mode()) return {};  // it would see what follows
  if (needs_gradient({x, k, alpha}) || backend_is_set() || !alone()) return {};
  const Memory in = memory_of(x);
  if (in.device == nullptr || call(names->default_kernels, in.device).is_none()) return {};
  const Py_ssize_t last = in.rank() - 1;
  if (last < 0 || !(number(dim) == -1 || number(dim) == static_cast<double>(last))) return {};
  const int64_t n = in.size(last);
  Rows rows = {in.data, in.type, 1, n, n, largest == Py_True};
  for (Py_ssize_t i = 0; i < last; ++i) rows.rows *= in.size(i);
  PerRow budget, scale;
  if (n == 0 || !per_row(k, in, budget) || !per_row(alpha, in, scale)) return {};
  if (!(budget.number >= 0 && budget.number <= static_cast<double>(n))) return {};
  if (scale.data == nullptr && !(scale.number > 0 && scale.number < Py_HUGE_VAL)) return {};

  py::object p = call(names->empty_like, x);
  void* const out = address(call_method(p.ptr(), names->data_ptr));
  if (is_cuda(in.device)) {
#ifdef SOFTTOPK_WITH_CUDA
    const py::object index = owned(PyLong_FromLong(in.index));
    void* const stream = address(call(names->current_stream, index.ptr()));
    const py::gil_scoped_release released;
    cuda::soft_topk_forward(rows, budget, scale, Form::p, out, nullptr, in.index, stream);
#endif
  } else {
    const int threads = static_cast<int>(integer(call(names->num_threads).ptr()));
    const py::gil_scoped_release released;
    cpu::soft_topk_forward(rows, budget, scale, Form::p, out, nullptr, threads);
  }
  return p;
}

PyObject* call_alone(PyObject*, PyObject*) {
  return for_python([] { return PyBool_FromLong(alone()); });
}

PyObject* call_plain(PyObject*, PyObject* t) {
  return for_python([&] {
    PyObject* const device = plain(t);
    return Py_NewRef(device == nullptr ? Py_None : device);
  });
}

PyObject* call_backend_is_set(PyObject*, PyObject*) { return PyBool_FromLong(backend_is_set()); }

PyObject* call_soft_topk(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 5) {
    PyErr_SetString(PyExc_TypeError, "softtopk._C: wrong number of arguments");
    return nullptr;
  }
  return for_python([&] {
    py::object p = soft_topk(given[0], given[1], given[2], given[3], given[4]);
    return p ? p.release().ptr() : Py_NewRef(Py_None);
  });
}

}  // namespace

void define_direct(py::module_ m) {
  m.def("bind", [](py::set quiet, py::dict plain, py::object default_kernels) {
    names = new Names{quiet, plain, default_kernels};  // for as long as the process lives
  });
  static PyMethodDef functions[] = {
      {"alone", call_alone, METH_NOARGS, nullptr},
      {"plain", call_plain, METH_O, nullptr},
      {"backend_is_set", call_backend_is_set, METH_NOARGS, nullptr},
      {"soft_topk", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_soft_topk)),
       METH_FASTCALL, nullptr},
      {}};
  if (PyModule_AddFunctions(m.ptr(), functions)) throw py::error_already_set();
}

}  // namespace softtopk
