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
ROWS = {"CAPPED": False, "BLOCK": rows.BLOCK}
KERNELS = {
    "cross_entropy": (rows.cross_entropy_kernel, {**ROWS, "SMOOTHED": False}),
    "cross_entropy_capped_smoothed": (rows.cross_entropy_kernel, {**ROWS, "CAPPED": True, "SMOOTHED": True}),
    "forward_kl": (rows.forward_kl_kernel, ROWS),
    "forward_kl_capped": (rows.forward_kl_kernel, {**ROWS, "CAPPED": True}),
    "statistics": (rows.statistics_kernel, ROWS),
    "scale": (rows.scale_kernel, {"BLOCK": rows.SCALE_BLOCK}),
}
POINTERS = {
    "outputs": "*fp32", "reference": "*fp32", "gradient": "*bf16", "targets": "*i64", "coefficients": "*fp32",
    "smoothing": "*fp32", "losses": "*fp32", "logps": "*fp32", "entropies": "*fp32", "tops": "*i8",
    "tensor": "*bf16", "factor": "*fp32",
}  # fmt: skip
SCALARS = {"scale": "fp32", "softcap": "fp32"}
# Strides always are (workspace.py), the vocabularies of Llama and SmolLM2 too: what Triton itself would find.
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
        for name, (kernel, constants) in KERNELS.items():
            binary = compiled(kernel, constants, 4 if name == "scale" else rows.NUM_WARPS, capability)
            print(json.dumps({"kernel": name, "capability": capability, **described(binary)}), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
