// softtopk._C: the launchers of softtopk.h for Python; the calls of direct.cpp apart.
//
// A launcher takes numbers alone, in the order of its prototype: pointers and streams are integers,
// a batch of rows is (data, type, rows, n, stride, largest), a per-row argument (data, type,
// stride, number), other structs their members; softtopk/backends/native.py and native_sparse.py
// make them from tensors that Python has checked. They are read from the interpreter's own array of
// arguments (METH_FASTCALL): for a small call pybind11's conversions take as long as the kernel.
// The GIL is released around every launcher.
#include <tuple>
#include <type_traits>

#include "python.h"
#include "softtopk.h"

namespace py = pybind11;

namespace {

using softtopk::Activation;
using softtopk::Code;
using softtopk::PerRow;
using softtopk::Rows;

// The arguments of one call, from left to right. A wrong type is a Python error, to be looked for
// once all have been taken.
class Arguments {
 public:
  Arguments(PyObject* const* first, Py_ssize_t count) : next_(first), left_(count) {}

  template <typename T>
  T take() {
    if constexpr (std::is_same_v<T, Rows>) {
      return {take<const void*>(), take<softtopk::Type>(), take<int64_t>(),
              take<int64_t>(),     take<int64_t>(),        take<bool>()};
    } else if constexpr (std::is_same_v<T, PerRow>) {
      return {take<const void*>(), take<softtopk::Type>(), take<int64_t>(), take<double>()};
    } else if constexpr (std::is_same_v<T, Activation>) {
      return {take<const void*>(), take<const float*>(), take<double>()};
    } else if constexpr (std::is_same_v<T, Code>) {
      return {take<void*>(),    take<int32_t*>(), take<void*>(),
              take<int32_t*>(), take<void*>(),    take<int64_t>()};
    } else {
      if (left_-- <= 0) return {};
      PyObject* const given = *next_++;
      if constexpr (std::is_pointer_v<T>) {
        return static_cast<T>(PyLong_AsVoidPtr(given));
      } else if constexpr (std::is_same_v<T, double>) {
        return PyFloat_AsDouble(given);
      } else {
        return static_cast<T>(PyLong_AsLongLong(given));
      }
    }
  }

  // Whether every argument has been taken, and no other is there; otherwise a Python error is set.
  bool complete() const {
    if (left_ != 0) PyErr_SetString(PyExc_TypeError, "softtopk._C: wrong number of arguments");
    return !PyErr_Occurred();
  }

 private:
  PyObject* const* next_;
  Py_ssize_t left_;
};

template <auto launcher>
struct Call;

// A number that Python asks for.
template <typename... A, int64_t (*function)(A...)>
struct Call<function> {
  static PyObject* from_python(PyObject*, PyObject* const* first, Py_ssize_t count) {
    Arguments arguments(first, count);
    const std::tuple<std::decay_t<A>...> taken{arguments.take<std::decay_t<A>>()...};
    if (!arguments.complete()) return nullptr;
    return softtopk::for_python([&] { return PyLong_FromLongLong(std::apply(function, taken)); });
  }
};

template <typename... A, void (*launcher)(A...)>
struct Call<launcher> {
  static PyObject* from_python(PyObject*, PyObject* const* first, Py_ssize_t count) {
    Arguments arguments(first, count);
    // Braces: taken in this order.
    const std::tuple<std::decay_t<A>...> taken{arguments.take<std::decay_t<A>>()...};
    if (!arguments.complete()) return nullptr;
    return softtopk::for_python([&] {
      {
        const py::gil_scoped_release released;
        std::apply(launcher, taken);
      }
      return Py_NewRef(Py_None);
    });
  }
};

template <auto launcher>
PyMethodDef method(const char* name) {
  const auto function = reinterpret_cast<void (*)()>(&Call<launcher>::from_python);
  return {name, reinterpret_cast<PyCFunction>(function), METH_FASTCALL, nullptr};
}

// The launchers of both namespaces, and after them others.
#define SOFTTOPK_LAUNCHERS(device, ...)                                        \
  {                                                                            \
    method<&softtopk::device::soft_topk_forward>("soft_topk_forward"),         \
        method<&softtopk::device::soft_topk_backward>("soft_topk_backward"),   \
        method<&softtopk::device::hard_topk_mask>("hard_topk_mask"),           \
        method<&softtopk::device::hard_topk_indices>("hard_topk_indices"),     \
        method<&softtopk::device::select_workspace>("select_workspace"),       \
        method<&softtopk::device::code_forward>("code_forward"),               \
        method<&softtopk::device::code_backward>("code_backward"),             \
        method<&softtopk::device::transpose_workspace>("transpose_workspace"), \
        method<&softtopk::device::transpose>("transpose"),                     \
        method<&softtopk::device::decode>("decode"),                           \
        method<&softtopk::device::gradients_workspace>("gradients_workspace"), \
        method<&softtopk::device::latent_gradients>("latent_gradients"),       \
        __VA_ARGS__ PyMethodDef {}                                             \
  }

// Those of cuda alone.
#define SOFTTOPK_CUDA_LAUNCHERS                                                  \
  method<&softtopk::cuda::relu_dot>("relu_dot"),                                 \
      method<&softtopk::cuda::expand_mask_parts>("expand_mask_parts"),           \
      method<&softtopk::cuda::expand_mask>("expand_mask"),                       \
      method<&softtopk::cuda::scale_gradient>("scale_gradient"),                 \
      method<&softtopk::cuda::adam_flat>("adam_flat"),                           \
      method<&softtopk::cuda::adam_rows>("adam_rows"),                           \
      method<&softtopk::cuda::clip_blocks>("clip_blocks"),                       \
      method<&softtopk::cuda::clip_factors>("clip_factors"),                     \
      method<&softtopk::cuda::budget_forward>("budget_forward"),                 \
      method<&softtopk::cuda::budget_backward>("budget_backward"),               \
      method<&softtopk::cuda::budget_excess>("budget_excess"),                   \
      method<&softtopk::cuda::most_latents>("most_latents"),                     \
      method<&softtopk::cuda::latents_activity>("latents_activity"),             \
      method<&softtopk::cuda::codes_activity>("codes_activity"),                 \
      method<&softtopk::cuda::gate_forward>("gate_forward"),                     \
      method<&softtopk::cuda::gate_backward>("gate_backward"),                   \
      method<&softtopk::cuda::squared_error_blocks>("squared_error_blocks"),     \
      method<&softtopk::cuda::squared_error_forward>("squared_error_forward"),   \
      method<&softtopk::cuda::squared_error_backward>("squared_error_backward"), \
      method<&softtopk::cuda::shift_rows>("shift_rows"),

void define(py::module_ m, PyMethodDef* launchers) {
  if (PyModule_AddFunctions(m.ptr(), launchers)) throw py::error_already_set();
}

}  // namespace

// setup.py defines SOFTTOPK_CUDA_ARCHITECTURES ("80;90;120+PTX") with SOFTTOPK_WITH_CUDA, and
// SOFTTOPK_CUDA_REASON (why it was not built) without.
PYBIND11_MODULE(_C, m) {
  static PyMethodDef cpu[] = SOFTTOPK_LAUNCHERS(cpu, );
  define(m.def_submodule("cpu"), cpu);
  softtopk::define_direct(m.def_submodule("direct"));
#ifdef SOFTTOPK_WITH_CUDA
  static PyMethodDef cuda[] = SOFTTOPK_LAUNCHERS(cuda, SOFTTOPK_CUDA_LAUNCHERS);
  define(m.def_submodule("cuda"), cuda);
  m.attr("has_cuda") = true;
  m.attr("cuda_architectures") = SOFTTOPK_CUDA_ARCHITECTURES;
  m.attr("cuda_reason") = "";
#else
  m.attr("has_cuda") = false;
  m.attr("cuda_architectures") = "";
  m.attr("cuda_reason") = SOFTTOPK_CUDA_REASON;
#endif
}
