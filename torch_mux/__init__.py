"""Many models, one GPU: ``torch.compile(model, backend="mux")``.

``import torch_mux`` loads nothing but this file; every public name is imported on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_mux.api import (
        adopt,
        close,
        configure,
        explain,
        gather,
        health,
        refresh,
        remove,
        reset,
        stats,
        warmup,
    )
    from torch_mux.errors import (
        CancelledRequest,
        ClosedError,
        DeadlineExceeded,
        DeadlineUnattainable,
        DeviceFailed,
        DeviceMismatch,
        DispatchFailed,
        ExecutionFailed,
        InvalidQuota,
        InvalidRequest,
        InvalidSetting,
        IsolationUnavailable,
        MemoryQuotaExceeded,
        ModelRemoved,
        MuxError,
        NotCompiled,
        Overloaded,
        Quarantined,
        RateExceeded,
        RefreshNeeded,
        Refused,
        StreamCaptured,
        TooManyInstances,
        UnknownOption,
        UnparsableQuantity,
    )
    from torch_mux.quotas import current_quota, quota
    from torch_mux.sending import submit, submit_all
    from torch_mux.timelines import trace

__version__ = "0.1.0"

__all__ = [
    "CancelledRequest",
    "ClosedError",
    "DeadlineExceeded",
    "DeadlineUnattainable",
    "DeviceFailed",
    "DeviceMismatch",
    "DispatchFailed",
    "ExecutionFailed",
    "InvalidQuota",
    "InvalidRequest",
    "InvalidSetting",
    "IsolationUnavailable",
    "MemoryQuotaExceeded",
    "ModelRemoved",
    "MuxError",
    "NotCompiled",
    "Overloaded",
    "Quarantined",
    "RateExceeded",
    "RefreshNeeded",
    "Refused",
    "StreamCaptured",
    "TooManyInstances",
    "UnknownOption",
    "UnparsableQuantity",
    "__version__",
    "adopt",
    "close",
    "configure",
    "current_quota",
    "explain",
    "gather",
    "health",
    "quota",
    "refresh",
    "remove",
    "reset",
    "stats",
    "submit",
    "submit_all",
    "trace",
    "warmup",
]

_API = frozenset("adopt close configure explain gather health refresh remove reset stats warmup".split())


def _home(name: str) -> str:
    if name in _API:
        return "torch_mux.api"
    if name in ("quota", "current_quota"):
        return "torch_mux.quotas"
    if name in ("submit", "submit_all"):
        return "torch_mux.sending"
    if name == "trace":
        return "torch_mux.timelines"
    return "torch_mux.errors"


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_home(name)), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
