"""Compile the Triton kernels for GPUs that are not here, and print what each became as JSON lines.

A process of its own: in the tests' process kernels are interpreted. ``python ahead_of_time.py CAPABILITY...``
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unlearn_ds.kernels import rows_triton as rows

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
VARIANTS = {
    "losses": {"HAS_KL": True, "CAPPED": False, "SMOOTHED": False},
    "losses_capped_smoothed": {"HAS_KL": True, "CAPPED": True, "SMOOTHED": True},
}
POINTERS = {
    "outputs": "*fp32", "reference": "*fp32", "gradient": "*bf16", "targets": "*i64", "coefficients": "*fp32",
    "smoothing": "*fp32", "losses": "*fp32", "logps": "*fp32", "entropies": "*fp32", "tops": "*i8",
    "tensor": "*bf16", "factor": "*fp32",
}  # fmt: skip
SCALARS = {"scale": "fp32", "softcap": "fp32"}
# Rows of one token, strides and vocabularies of the models at hand are multiples of 16; what Triton itself would find.
ALIGNED = {"output_stride", "reference_stride", "gradient_stride", "vocab", "numel"}


def compiled(kernel, constants: dict, num_warps: int, capability: int):
    """A kernel as the launcher would have it for pointers and strides that are multiples of 16."""
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: POINTERS.get(name) or SCALARS.get(name, "i32") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in names
        if name in POINTERS or name in ALIGNED
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})


def described(binary) -> dict:
    """Registers, bytes of spilled registers, and how often each instruction of interest occurs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        run = {"capture_output": True, "text": True, "check": True}
        usage = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", file.name], **run).stdout
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], **run).stdout
    count = {name: len(re.findall(name.replace(".", r"[\w.]*\."), code)) for name in ("LDG.128", "MUFU.EX2")}
    count |= {name: len(re.findall(rf"\b{name}\b", code)) for name in ("STL", "LDL", "BAR", "STG")}
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]), "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        **count,
    }  # fmt: skip


def main(capabilities: list[int]) -> None:
    for capability in capabilities:
        for name, flags in VARIANTS.items():
            binary = compiled(rows.losses_kernel, {**flags, "BLOCK": rows.BLOCK}, rows.NUM_WARPS, capability)
            print(json.dumps({"kernel": name, "capability": capability, **described(binary)}), flush=True)
        constants = {"CAPPED": False, "BLOCK": rows.BLOCK}
        binary = compiled(rows.statistics_kernel, constants, rows.NUM_WARPS, capability)
        print(json.dumps({"kernel": "statistics", "capability": capability, **described(binary)}), flush=True)
        binary = compiled(rows.scale_kernel, {"BLOCK": rows.SCALE_BLOCK}, 4, capability)
        print(json.dumps({"kernel": "scale", "capability": capability, **described(binary)}), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
