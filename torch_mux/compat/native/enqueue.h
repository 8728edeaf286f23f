#pragma once
#include <Python.h>

PyObject* torch_mux_can_enqueue(PyObject*, PyObject*);
PyObject* torch_mux_record(PyObject*, PyObject*);
PyObject* torch_mux_enqueue(PyObject*, PyObject*);
PyObject* torch_mux_await_any(PyObject*, PyObject*);
