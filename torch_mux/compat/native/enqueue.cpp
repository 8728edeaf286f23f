// One bundle's work put on a stream in one call; see __init__.py beside this file.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>
#include <time.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "enqueue.h"
#include "weights.h"

namespace {

// Of the CUDA runtime that torch has loaded: a machine without CUDA has none, and headers are not needed.
struct Runtime {
  int (*wait)(void* stream, void* event, unsigned flags);
  int (*record)(void* event, void* stream);
  int (*copy)(void* to, const void* from, size_t bytes, int kind, void* stream);
  int (*launch)(void* graph, void* stream);
  int (*query)(void* event);
  const char* (*explain)(int error);
  int (*forget)();

  template <typename Function>
  static void find(Function& function, const char* name) {
    function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  }

  Runtime() {
    find(wait, "cudaStreamWaitEvent");
    find(record, "cudaEventRecord");
    find(copy, "cudaMemcpyAsync");
    find(launch, "cudaGraphLaunch");
    find(query, "cudaEventQuery");
    find(explain, "cudaGetErrorString");
    find(forget, "cudaGetLastError");
  }

  bool found() const { return wait && record && copy && launch && query && explain && forget; }
};

const Runtime& runtime() {
  static const Runtime found;
  return found;
}

constexpr int kHostToDevice = 1;
constexpr int kNotReady = 600;
// Seconds between two looks: a part of what was waited already, so that long waits take few.
constexpr double kShortest = 20e-6, kLongest = 100e-6, kPart = 1.0 / 16;

// While it lives the kernel ends this thread's sleeps within a microsecond. Linux puts them off by 50 us else, to
// wake up for several timers at once, and sleeps of 20 us would last 70 or more.
class Punctual {
#ifdef __linux__
 public:
  Punctual() : before_(prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0)) { prctl(PR_SET_TIMERSLACK, 1000UL, 0, 0, 0); }
  ~Punctual() {
    if (before_ > 0) prctl(PR_SET_TIMERSLACK, static_cast<unsigned long>(before_), 0, 0, 0);
  }

 private:
  const int before_;
#endif
};

double now() {
  timespec moment;
  clock_gettime(CLOCK_MONOTONIC, &moment);
  return static_cast<double>(moment.tv_sec) + 1e-9 * static_cast<double>(moment.tv_nsec);
}

// The error is told here: the next kernel of this thread, which may be another tenant's, must not find it.
PyObject* failed(int error) {
  runtime().forget();
  return PyErr_Format(PyExc_RuntimeError, "CUDA error: %s", runtime().explain(error));
}

}  // namespace

// can_enqueue() -> bool
PyObject* torch_mux_can_enqueue(PyObject*, PyObject*) { return PyBool_FromLong(runtime().found()); }

// record(event: int, stream: int)
PyObject* torch_mux_record(PyObject*, PyObject* args) {
  unsigned long long event, stream;
  if (!PyArg_ParseTuple(args, "KK", &event, &stream)) return nullptr;
  if (!runtime().found()) return PyErr_Format(PyExc_RuntimeError, "no CUDA runtime is loaded");
  int error = 0;
  Py_BEGIN_ALLOW_THREADS;  // a stream whose queue is full blocks
  error = runtime().record(reinterpret_cast<void*>(event), reinterpret_cast<void*>(stream));
  Py_END_ALLOW_THREADS;
  if (error != 0) return failed(error);
  Py_RETURN_NONE;
}

// enqueue(stream: int, marks: list[int], start: int, table: int, host: int, bytes: int, graph: int, end: int,
//         watched: list[capsule]) -> bool
PyObject* torch_mux_enqueue(PyObject*, PyObject* args) {
  unsigned long long stream, start, table, host, bytes, graph, end;
  PyObject *marks, *watched;
  if (!PyArg_ParseTuple(args, "KO!KKKKKKO!", &stream, &PyList_Type, &marks, &start, &table, &host, &bytes, &graph, &end,
                        &PyList_Type, &watched))
    return nullptr;
  std::vector<const Weights*> weights;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(watched); ++i) {
    const Weights* one = torch_mux_weights(PyList_GET_ITEM(watched, i));
    if (one == nullptr) return nullptr;
    weights.push_back(one);
  }
  const Runtime& cuda = runtime();
  if (!cuda.found()) return PyErr_Format(PyExc_RuntimeError, "no CUDA runtime is loaded");
  auto* on = reinterpret_cast<void*>(stream);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(marks); ++i) {
    void* mark = PyLong_AsVoidPtr(PyList_GET_ITEM(marks, i));
    if (mark == nullptr && PyErr_Occurred()) return nullptr;
    if (const int error = cuda.wait(on, mark, 0)) return failed(error);
  }
  int error = 0;
  bool changed = false;
  Py_BEGIN_ALLOW_THREADS;
  error = cuda.record(reinterpret_cast<void*>(start), on);
  if (!error)
    error = cuda.copy(reinterpret_cast<void*>(table), reinterpret_cast<const void*>(host), bytes, kHostToDevice, on);
  if (!error) error = cuda.launch(reinterpret_cast<void*>(graph), on);
  if (!error) error = cuda.record(reinterpret_cast<void*>(end), on);
  // Some hundred counters a model, while the device works and other threads have the interpreter. Nothing here
  // is freed meanwhile: the caller's list holds it.
  for (const Weights* one : weights) changed = changed || one->changed();
  Py_END_ALLOW_THREADS;
  if (error) return failed(error);
  return PyBool_FromLong(changed);
}

// await_any(events: list[int], seconds: float, flag: int) -> bool
PyObject* torch_mux_await_any(PyObject*, PyObject* args) {
  PyObject* given;
  double seconds;
  unsigned long long address;
  if (!PyArg_ParseTuple(args, "O!dK", &PyList_Type, &given, &seconds, &address)) return nullptr;
  const auto* flag = reinterpret_cast<const std::atomic<int32_t>*>(address);
  const Runtime& cuda = runtime();
  if (!cuda.found()) return PyErr_Format(PyExc_RuntimeError, "no CUDA runtime is loaded");
  std::vector<void*> events;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(given); ++i) {
    void* event = PyLong_AsVoidPtr(PyList_GET_ITEM(given, i));
    if (event == nullptr && PyErr_Occurred()) return nullptr;
    events.push_back(event);
  }
  int error = kNotReady;
  Py_BEGIN_ALLOW_THREADS;
  const Punctual punctual;
  const double begin = now();
  while (true) {
    for (void* event : events)
      if ((error = cuda.query(event)) != kNotReady) break;
    const double waited = now() - begin;
    if (error != kNotReady || waited >= seconds) break;
    if (flag != nullptr && flag->load(std::memory_order_acquire) != 0) break;
    const timespec glance{0, static_cast<long>(1e9 * std::clamp(kPart * waited, kShortest, kLongest))};
    nanosleep(&glance, nullptr);
  }
  Py_END_ALLOW_THREADS;
  cuda.forget();  // that one was not reached is no error, but the runtime remembers it as the last
  return PyBool_FromLong(error != kNotReady);
}
