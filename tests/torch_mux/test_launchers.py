"""Launchers of different kernels are C modules of one name; each keeps its own function."""

import pytest
from triton.runtime.build import compile_module_from_src

import torch_mux.lowering.kernels.common  # noqa: F401 keeps launchers apart

SOURCE = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
static PyObject *launch(PyObject *self, PyObject *args) { return PyLong_FromLong(%d); }
static PyMethodDef methods[] = {{"launch", launch, METH_NOARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "__mux_test_launcher", NULL, -1, methods};
PyMODINIT_FUNC PyInit___mux_test_launcher(void) { return PyModule_Create(&module); }
"""


def loaded(number: int):
    return compile_module_from_src(SOURCE % number, "__mux_test_launcher")


def test_a_launcher_loaded_again_does_not_change_another(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    first = loaded(1)
    second = loaded(2)
    assert loaded(1).launch() == 1
    assert second.launch() == 2
    assert first.launch() == 1
