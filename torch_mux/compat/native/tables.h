#pragma once
#include <Python.h>

PyObject* torch_mux_fits(PyObject*, PyObject*);
PyObject* torch_mux_fill(PyObject*, PyObject*);
