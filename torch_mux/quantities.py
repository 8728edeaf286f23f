"""Durations and sizes as people write them: ``"20ms"``, ``"4GiB"``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import timedelta
from fractions import Fraction
from types import MappingProxyType
from typing import Final

from torch_mux.errors import UnparsableQuantity

__all__ = ["BYTES", "SECONDS", "parse_duration", "parse_size"]

SECONDS: Final[Mapping[str, Fraction]] = MappingProxyType(
    {"ns": Fraction(1, 10**9), "us": Fraction(1, 10**6), "µs": Fraction(1, 10**6), "μs": Fraction(1, 10**6)}
    | {"ms": Fraction(1, 1000), "s": Fraction(1), "min": Fraction(60), "h": Fraction(3600)}
)
BYTES: Final[Mapping[str, Fraction]] = MappingProxyType(
    {"b": Fraction(1)}
    | {f"{prefix}b": Fraction(1000**power) for power, prefix in enumerate("kmgtp", 1)}
    | {f"{prefix}ib": Fraction(1024**power) for power, prefix in enumerate("kmgtp", 1)}
)
QUANTITY = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d{1,3}))?\s*([A-Za-zµμ]+)\s*")


def _number(value: str, units: Mapping[str, Fraction], kind: str, example: str) -> Fraction:
    """``value``, a number below 1e18 followed by one of ``units``, exactly, in the base unit."""
    match = QUANTITY.fullmatch(value)
    unit = match.group(3) if match else ""
    scale = units.get(unit, units.get(unit.lower()))
    if match is None or scale is None:
        raise UnparsableQuantity(value=value, kind=kind, example=example)
    number = Fraction(f"{match.group(1)}e{match.group(2) or 0}")
    if number >= 10**18:
        raise UnparsableQuantity(value=value, kind=kind, example=example)
    return number * scale


def parse_duration(value: str | float | timedelta) -> float:
    """Seconds of ``"20ms"``, ``"1.5s"``, ``"200us"``, a ``timedelta``, or a number of seconds.

    Raises:
        UnparsableQuantity: no unit, an unknown unit, a negative or a non-finite value.
    """
    example = "'20ms', '1.5s', a timedelta or a number of seconds"
    if isinstance(value, str):
        return float(_number(value, SECONDS, "duration", example))
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value)
    else:
        raise UnparsableQuantity(value=value, kind="duration", example=example)
    if not math.isfinite(seconds) or seconds < 0:
        raise UnparsableQuantity(value=value, kind="duration", example=example)
    return seconds


def parse_size(value: str | int) -> int:
    """Bytes of ``"4GiB"`` (1024 ** 3), ``"512MB"`` (1000 ** 2), or a number of bytes.

    Raises:
        UnparsableQuantity: no unit, an unknown unit, a negative value or a float.
    """
    example = "'4GiB', '512MB' or a number of bytes"
    if isinstance(value, str):
        return round(_number(value, BYTES, "size", example))
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UnparsableQuantity(value=value, kind="size", example=example)
    return value
