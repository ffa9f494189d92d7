"""Speeds of devices: specified and achievable matrix products, and memory."""

from __future__ import annotations

from collections.abc import Mapping

PEAK_TFLOPS: Mapping[str, float] = {
    "A100": 312, "A800": 312, "H100 PCIe": 756, "H100": 989, "H800": 989, "H200": 989, "H20": 148, "L40S": 362,
    "A40": 149.7, "A6000": 154.8, "B200": 2250, "GB200": 2500, "MI300X": 1307,
}  # fmt: skip
"""Dense bf16 peak by name of the device, from the vendors' data sheets."""

ACHIEVABLE_TFLOPS: Mapping[str, float] = {
    "A100": 271.2, "A800": 271.2, "H100": 794.5, "H800": 794.5, "H200": 794.5, "B200": 1745, "MI300X": 668,
}  # fmt: skip
"""The fastest bf16 product that was found on it, over many shapes: Bekman, Machine Learning Engineering, "Maximum
achievable matmul FLOPS" (SXM cards; the A800, H800 and H200 multiply as the A100 and H100 do)."""

MEMORY_TB_PER_SECOND: Mapping[str, float] = {
    "A100-40G": 1.555, "A100-80G": 2.039, "A800": 2.039, "H100": 3.35, "H800": 3.35, "H200": 4.8, "H20": 4.0,
    "B200": 8.0, "MI300X": 5.3,
}  # fmt: skip
"""Peak memory bandwidth, from the vendors' data sheets (SXM cards)."""


def peak_flops(device_name: str) -> float | None:
    """Specified peak of a device in FLOP/s; None when unknown, so that nobody reads a utilisation of 0."""
    return _of(device_name, PEAK_TFLOPS)


def achievable_flops(device_name: str) -> float | None:
    """What the fastest product reaches on a device, in FLOP/s; None when nobody has said."""
    return _of(device_name, ACHIEVABLE_TFLOPS)


def memory_name(device_name: str) -> str | None:
    """Name of a device in ``MEMORY_TB_PER_SECOND``; None for one that is not there. An A100 tells its memory itself."""
    plain = device_name.replace("A100-SXM4-80GB", "A100-80G").replace("A100-SXM4-40GB", "A100-40G")
    names = sorted((name for name in MEMORY_TB_PER_SECOND if name in plain), key=len)
    return names[-1] if names and "PCIe" not in device_name else None


def _of(device_name: str, table: Mapping[str, float]) -> float | None:
    # Of the names that fit the longest, so that an H100 PCIe is no H100.
    names = sorted((name for name in PEAK_TFLOPS if name in device_name), key=len)
    return table[names[-1]] * 1e12 if names and names[-1] in table else None
