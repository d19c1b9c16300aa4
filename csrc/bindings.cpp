// softtopk._C: the launchers of softtopk.h for Python. The only file that includes Python.
//
// Pointers and streams are integers. A batch of rows is the tuple (data, type, rows, n, stride,
// largest), a per-row argument (data, type, stride, number): softtopk/backends/native.py makes both
// from tensors that Python has checked. The GIL is released around every call.
#include <pybind11/pybind11.h>

#include <tuple>

#include "softtopk.h"

namespace py = pybind11;

namespace {

using softtopk::Form;
using softtopk::PerRow;
using softtopk::Rows;
using softtopk::Type;
using RowsTuple = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, bool>;
using PerRowTuple = std::tuple<uintptr_t, int, int64_t, double>;

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

Rows rows(const RowsTuple& from) {
  const auto& [data, type, rows, n, stride, largest] = from;
  return {pointer(data), static_cast<Type>(type), rows, n, stride, largest};
}

PerRow per_row(const PerRowTuple& from) {
  const auto& [data, type, stride, number] = from;
  return {pointer(data), static_cast<Type>(type), stride, number};
}

void define_cpu(py::module_ m) {
  namespace cpu = softtopk::cpu;
  const py::call_guard<py::gil_scoped_release> released;
  m.def(
      "soft_topk_forward",
      [](const RowsTuple& x, const PerRowTuple& k, const PerRowTuple& alpha, int form,
         uintptr_t out, uintptr_t solution, int threads) {
        cpu::soft_topk_forward(rows(x), per_row(k), per_row(alpha), static_cast<Form>(form),
                               pointer(out), pointer(solution), threads);
      },
      released);
  m.def(
      "soft_topk_backward",
      [](const RowsTuple& x, uintptr_t solution, const PerRowTuple& alpha, int form, uintptr_t v,
         int64_t v_stride, uintptr_t grad_x, uintptr_t grad_k, uintptr_t grad_alpha, int threads) {
        cpu::soft_topk_backward(rows(x), pointer(solution), per_row(alpha), static_cast<Form>(form),
                                pointer(v), v_stride, pointer(grad_x), pointer(grad_k),
                                pointer(grad_alpha), threads);
      },
      released);
  m.def(
      "hard_topk_mask",
      [](const RowsTuple& x, const PerRowTuple& k, uintptr_t mask, int threads) {
        cpu::hard_topk_mask(rows(x), per_row(k), pointer(mask), threads);
      },
      released);
  m.def(
      "hard_topk_indices",
      [](const RowsTuple& x, const PerRowTuple& k, int64_t max_k, uintptr_t indices,
         uintptr_t counts, int threads) {
        cpu::hard_topk_indices(rows(x), per_row(k), max_k, static_cast<int64_t*>(pointer(indices)),
                               static_cast<int64_t*>(pointer(counts)), threads);
      },
      released);
}

#ifdef SOFTTOPK_WITH_CUDA
void define_cuda(py::module_ m) {
  namespace cuda = softtopk::cuda;
  const py::call_guard<py::gil_scoped_release> released;
  m.def(
      "soft_topk_forward",
      [](const RowsTuple& x, const PerRowTuple& k, const PerRowTuple& alpha, int form,
         uintptr_t out, uintptr_t solution, int device, uintptr_t stream) {
        cuda::soft_topk_forward(rows(x), per_row(k), per_row(alpha), static_cast<Form>(form),
                                pointer(out), pointer(solution), device, pointer(stream));
      },
      released);
  m.def(
      "soft_topk_backward",
      [](const RowsTuple& x, uintptr_t solution, const PerRowTuple& alpha, int form, uintptr_t v,
         int64_t v_stride, uintptr_t grad_x, uintptr_t grad_k, uintptr_t grad_alpha, int device,
         uintptr_t stream) {
        cuda::soft_topk_backward(rows(x), pointer(solution), per_row(alpha),
                                 static_cast<Form>(form), pointer(v), v_stride, pointer(grad_x),
                                 pointer(grad_k), pointer(grad_alpha), device, pointer(stream));
      },
      released);
  m.def(
      "hard_topk_mask",
      [](const RowsTuple& x, const PerRowTuple& k, uintptr_t mask, int device, uintptr_t stream) {
        cuda::hard_topk_mask(rows(x), per_row(k), pointer(mask), device, pointer(stream));
      },
      released);
  m.def(
      "hard_topk_indices",
      [](const RowsTuple& x, const PerRowTuple& k, int64_t max_k, uintptr_t indices,
         uintptr_t counts, int device, uintptr_t stream) {
        cuda::hard_topk_indices(rows(x), per_row(k), max_k, static_cast<int64_t*>(pointer(indices)),
                                static_cast<int64_t*>(pointer(counts)), device, pointer(stream));
      },
      released);
}
#endif

}  // namespace

// setup.py defines SOFTTOPK_CUDA_ARCHITECTURES ("80;90;120+PTX") with SOFTTOPK_WITH_CUDA, and
// SOFTTOPK_CUDA_REASON (why it was not built) without.
PYBIND11_MODULE(_C, m) {
  define_cpu(m.def_submodule("cpu"));
#ifdef SOFTTOPK_WITH_CUDA
  define_cuda(m.def_submodule("cuda"));
  m.attr("has_cuda") = true;
  m.attr("cuda_architectures") = SOFTTOPK_CUDA_ARCHITECTURES;
  m.attr("cuda_reason") = "";
#else
  m.attr("has_cuda") = false;
  m.attr("cuda_architectures") = "";
  m.attr("cuda_reason") = SOFTTOPK_CUDA_REASON;
#endif
}
