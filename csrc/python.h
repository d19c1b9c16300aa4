// What the files that speak to Python share.
#pragma once

#include <pybind11/pybind11.h>

#include <new>

namespace softtopk {

// The result of f(), a new reference; an exception as Python's.
template <class F>
PyObject* for_python(F f) {
  try {
    return f();
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// In direct.cpp: the functions of softtopk._C.direct.
void define_direct(pybind11::module_ m);

}  // namespace softtopk
