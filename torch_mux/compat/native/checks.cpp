// Checks that Python would make one tensor or dict at a time; see __init__.py beside this file.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <c10/core/TensorImpl.h>

#include <memory>

#include "enqueue.h"
#include "tables.h"
#include "weights.h"

namespace {

using c10::TensorImpl;
using c10::VariableVersion;
using c10::weak_intrusive_ptr;

constexpr const char* kName = "torch_mux.Weights";

void destroy(PyObject* capsule) {
  delete static_cast<Weights*>(PyCapsule_GetPointer(capsule, kName));
}

// Calls `use(impl)` with every tensor of a list of Tensor._cdata; false with an exception set where that fails.
template <typename Use>
bool each(PyObject* list, Use use) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    auto* impl = static_cast<TensorImpl*>(PyLong_AsVoidPtr(PyList_GET_ITEM(list, i)));
    if (impl == nullptr) {
      if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a tensor's address is null");
      return false;
    }
    if (!use(impl)) {
      PyErr_SetString(PyExc_ValueError, "a tensor of inference mode counts no versions");
      return false;
    }
  }
  return true;
}

// weights(counted: list[int], placed: list[int]) -> capsule
PyObject* weights(PyObject*, PyObject* args) {
  PyObject *counted, *placed;
  if (!PyArg_ParseTuple(args, "O!O!", &PyList_Type, &counted, &PyList_Type, &placed)) return nullptr;
  auto found = std::make_unique<Weights>();
  const bool good = each(counted, [&](TensorImpl* impl) {
    const VariableVersion& counter = impl->version_counter();
    if (counter.enabled()) found->counted.push_back({counter, counter.current_version()});
    return counter.enabled();
  }) && each(placed, [&](TensorImpl* impl) {
    auto strong = c10::intrusive_ptr<TensorImpl>::unsafe_reclaim_from_nonowning(impl);
    const c10::Storage& storage = impl->unsafe_storage();
    if (storage) {  // a sparse tensor has none
      found->placed.push_back(
          {weak_intrusive_ptr<TensorImpl>(strong), storage, impl->storage_offset(), storage.data()});
    }
    return true;
  });
  if (!good) return nullptr;
  PyObject* capsule = PyCapsule_New(found.get(), kName, destroy);
  if (capsule != nullptr) found.release();
  return capsule;
}

// changed(capsule) -> bool
PyObject* changed(PyObject*, PyObject* capsule) {
  const Weights* known = torch_mux_weights(capsule);
  return known == nullptr ? nullptr : PyBool_FromLong(known->changed());
}

// Counts writes to watched dicts (PEP 699): a dict is told of before it is written, both under the GIL.
#if PY_VERSION_HEX >= 0x030C0000 && !defined(Py_GIL_DISABLED)
#define TORCH_MUX_WATCHES 1
#endif

int64_t writes = 0;
#ifdef TORCH_MUX_WATCHES
int watcher = -1;

int written(PyDict_WatchEvent, PyObject*, PyObject*, PyObject*) {
  ++writes;
  return 0;
}
#endif

// watch(dicts: tuple[dict, ...]) -> bool
PyObject* watch(PyObject*, PyObject* dicts) {
#ifdef TORCH_MUX_WATCHES
  if (watcher < 0) Py_RETURN_FALSE;
  if (!PyTuple_Check(dicts)) return PyErr_Format(PyExc_TypeError, "expected a tuple of dicts");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(dicts); ++i)
    if (!PyDict_Check(PyTuple_GET_ITEM(dicts, i))) Py_RETURN_FALSE;  // the tables of a scripted module
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(dicts); ++i)
    if (PyDict_Watch(watcher, PyTuple_GET_ITEM(dicts, i)) < 0) return nullptr;
  Py_RETURN_TRUE;
#else
  (void)dicts;
  Py_RETURN_FALSE;
#endif
}

// count() -> int
PyObject* count(PyObject*, PyObject*) { return PyLong_FromLongLong(writes); }

// same(tables: tuple[dict, ...], values: list, empty: tuple[dict, ...], flags: tuple[dict, ...], key: str, wanted: list) -> bool
PyObject* same(PyObject*, PyObject* args) {
  PyObject *tables, *values, *empty, *flags, *key, *wanted;
  if (!PyArg_ParseTuple(args, "O!O!O!O!UO!", &PyTuple_Type, &tables, &PyList_Type, &values, &PyTuple_Type, &empty,
                        &PyTuple_Type, &flags, &key, &PyList_Type, &wanted))
    return nullptr;
  const Py_ssize_t count = PyList_GET_SIZE(values);
  Py_ssize_t at = 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tables); ++i) {
    PyObject *table = PyTuple_GET_ITEM(tables, i), *value = nullptr;
    if (!PyDict_Check(table)) Py_RETURN_FALSE;
    Py_ssize_t place = 0;
    while (PyDict_Next(table, &place, nullptr, &value))
      if (at >= count || PyList_GET_ITEM(values, at++) != value) Py_RETURN_FALSE;
  }
  if (at != count) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(empty); ++i) {
    PyObject* table = PyTuple_GET_ITEM(empty, i);
    if (!PyDict_Check(table) || PyDict_GET_SIZE(table) != 0) Py_RETURN_FALSE;
  }
  if (PyTuple_GET_SIZE(flags) != PyList_GET_SIZE(wanted)) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(flags); ++i) {
    PyObject* table = PyTuple_GET_ITEM(flags, i);
    if (!PyDict_Check(table)) Py_RETURN_FALSE;
    PyObject* value = PyDict_GetItemWithError(table, key);
    if (value == nullptr && PyErr_Occurred()) return nullptr;
    if (value != PyList_GET_ITEM(wanted, i)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyMethodDef methods[] = {
    {"weights", weights, METH_VARARGS, "Remembers version counters and addresses of tensors given by _cdata."},
    {"changed", changed, METH_O, "Whether a counter or an address is another one now."},
    {"watch", watch, METH_O, "Has writes to dicts counted from now on; False where this Python cannot."},
    {"count", count, METH_NOARGS, "Writes to watched dicts so far."},
    {"same", same, METH_VARARGS, "Whether dicts hold the very same objects, flags are as they were, and no hook is there."},
    {"fits", torch_mux_fits, METH_VARARGS, "Whether tensors are laid out as fill expects."},
    {"fill", torch_mux_fill, METH_VARARGS, "Writes the table of one bundle."},
    {"can_enqueue", torch_mux_can_enqueue, METH_NOARGS, "Whether a CUDA runtime is loaded."},
    {"record", torch_mux_record, METH_VARARGS, "Records an event on a stream, both by address."},
    {"enqueue", torch_mux_enqueue, METH_VARARGS, "Puts one captured bundle on a stream."},
    {"await_any", torch_mux_await_any, METH_VARARGS, "Waits until one of some events has been reached."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "torch_mux_checks", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

const Weights* torch_mux_weights(PyObject* capsule) {
  return static_cast<const Weights*>(PyCapsule_GetPointer(capsule, kName));
}

PyMODINIT_FUNC PyInit_torch_mux_checks() {
#ifdef TORCH_MUX_WATCHES
  // 3.13.0 does not tell watchers of attributes (gh-125608).
  if (watcher < 0 && (Py_Version >> 8) != 0x030D00) watcher = PyDict_AddWatcher(written);
  if (watcher < 0) PyErr_Clear();  // others took them all: dicts are compared entry by entry
#endif
  return PyModule_Create(&module);
}
