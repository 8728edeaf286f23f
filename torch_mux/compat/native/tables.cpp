// The table of one bundle written in one call; see __init__.py beside this file.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <c10/core/TensorImpl.h>

#include <exception>

#include "tables.h"

namespace {

// How torch lays out its tensors in Python: its own header takes ten times as long to compile as all of this.
// `fits` says whether that is so.
struct Held {
  PyObject_HEAD
  c10::TensorImpl* impl;
};

PyObject* base = nullptr;  // of every tensor's type

// One section: what there is, then the first again for each padding word.
int64_t* padded(int64_t* to, Py_ssize_t active, Py_ssize_t stride) {
  for (Py_ssize_t i = active; i < stride; ++i) to[i] = to[0];
  return to + stride;
}

}  // namespace

// fits(base: type, tensor: Tensor, impl: int) -> bool
PyObject* torch_mux_fits(PyObject*, PyObject* args) {
  PyObject *type, *tensor;
  unsigned long long impl;
  if (!PyArg_ParseTuple(args, "O!OK", &PyType_Type, &type, &tensor, &impl)) return nullptr;
  const bool large = Py_TYPE(tensor)->tp_basicsize >= static_cast<Py_ssize_t>(sizeof(Held));
  if (!large || !PyObject_TypeCheck(tensor, reinterpret_cast<PyTypeObject*>(type))) Py_RETURN_FALSE;
  if (reinterpret_cast<unsigned long long>(reinterpret_cast<Held*>(tensor)->impl) != impl) Py_RETURN_FALSE;
  Py_XDECREF(base);
  base = Py_NewRef(type);
  Py_RETURN_TRUE;
}

// fill(address: int, slots: int, cap: int, rows: list[int], columns: list[list[Tensor]])
PyObject* torch_mux_fill(PyObject*, PyObject* args) {
  unsigned long long address, slots, cap;
  PyObject *rows, *columns;
  if (!PyArg_ParseTuple(args, "KKKO!O!", &address, &slots, &cap, &PyList_Type, &rows, &PyList_Type, &columns))
    return nullptr;
  if (base == nullptr) return PyErr_Format(PyExc_RuntimeError, "how tensors are laid out is not known");
  const Py_ssize_t active = PyList_GET_SIZE(rows);
  if (active < 1 || static_cast<unsigned long long>(active) > slots)
    return PyErr_Format(PyExc_ValueError, "%zd rows do not fit %llu slots", active, slots);
  const auto stride = static_cast<Py_ssize_t>(slots + slots % 2);
  auto* to = reinterpret_cast<int64_t*>(address);
  *to++ = static_cast<int64_t>(static_cast<unsigned long long>(active) | cap << 32);
  *to++ = static_cast<int64_t>(slots | cap << 32);
  for (Py_ssize_t i = 0; i < active; ++i) {
    to[i] = PyLong_AsLongLong(PyList_GET_ITEM(rows, i));
    if (to[i] == -1 && PyErr_Occurred()) return nullptr;
  }
  to = padded(to, active, stride);
  for (Py_ssize_t column = 0; column < PyList_GET_SIZE(columns); ++column) {
    PyObject* tensors = PyList_GET_ITEM(columns, column);
    if (!PyList_Check(tensors) || PyList_GET_SIZE(tensors) != active)
      return PyErr_Format(PyExc_ValueError, "a column has to be a list of %zd tensors", active);
    for (Py_ssize_t i = 0; i < active; ++i) {
      PyObject* tensor = PyList_GET_ITEM(tensors, i);
      if (!PyObject_TypeCheck(tensor, reinterpret_cast<PyTypeObject*>(base)))
        return PyErr_Format(PyExc_TypeError, "a column holds tensors and nothing else");
      try {
        to[i] = reinterpret_cast<int64_t>(reinterpret_cast<Held*>(tensor)->impl->mutable_data());
      } catch (const std::exception& error) {
        return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
      }
    }
    to = padded(to, active, stride);
  }
  Py_RETURN_NONE;
}
