// What was remembered of an instance's tensors.
#pragma once
#include <Python.h>

#include <c10/core/TensorImpl.h>

#include <vector>

struct Counted {
  c10::VariableVersion counter;  // shares the counter itself: the tensor may go
  uint32_t seen;
};

// The tensor itself may go; its storage is held, so that both can be looked at without counting references.
struct Placed {
  c10::weak_intrusive_ptr<c10::TensorImpl> tensor;
  c10::Storage storage;
  int64_t offset;
  const void* seen;

  bool moved() const {
    const c10::TensorImpl* now = tensor._unsafe_get_target();
    return now->unsafe_storage().unsafeGetStorageImpl() != storage.unsafeGetStorageImpl() ||
        now->storage_offset() != offset || storage.data() != seen;
  }
};

struct Weights {
  std::vector<Counted> counted;
  std::vector<Placed> placed;

  // A tensor that was collected with its model has not changed. Needs no interpreter.
  bool changed() const {
    for (const Counted& one : counted)
      if (one.counter.current_version() != one.seen) return true;
    bool moved = false;
    for (const Placed& one : placed) moved = moved || one.moved();
    if (moved)
      for (const Placed& one : placed)
        if (one.tensor.expired()) return false;
    return moved;
  }
};

// Of a capsule, or null with an exception set.
const Weights* torch_mux_weights(PyObject* capsule);
