"""Peak speeds of devices."""

from __future__ import annotations

from collections.abc import Mapping

PEAK_TFLOPS: Mapping[str, float] = {
    "A100": 312, "A800": 312, "H100 PCIe": 756, "H100": 989, "H800": 989, "H200": 989, "H20": 148, "L40S": 362,
    "A40": 149.7, "A6000": 154.8, "B200": 2250, "GB200": 2500, "MI300X": 1307,
}  # fmt: skip
"""Dense bf16 peak by name of the device, from the vendors' data sheets."""


def peak_flops(device_name: str) -> float | None:
    """Peak of a device in FLOP/s; None when unknown, so that nobody reads a utilisation of 0."""
    names = sorted((name for name in PEAK_TFLOPS if name in device_name), key=len)
    return PEAK_TFLOPS[names[-1]] * 1e12 if names else None
