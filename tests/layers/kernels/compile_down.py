"""Writes the Triton IR of the second product with packed weights, for Hopper; needs no GPU.

    python compile_down.py counted|not-counted

Whether somebody counted the tiles decides what may be read before the kernel waits.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moezoo.layers.kernels.down_weight_only import _down_weight_only_kernel as kernel

POINTERS = {"tiles_ptr": "i32", "num_tiles_ptr": "i32", "scales_ptr": "bf16", "w": "i16"}
CONSTANTS = {
    "FORMAT": "int8",
    "WAYS": 2,
    "HAS_ZEROS": False,
    "GROUP": 0,
    "SCALES_ALIGNED": 1,
    "SLICES": 1,
    "CHAIN": False,
    "SCALES_AT_ONCE": False,
    "HAS_BIAS": False,
    "DESCRIPTORS": False,
    "EVEN_K": True,
    "PAIRS": True,
    "DIRECT": True,
    "FLATTEN": False,
    "GROUP_M": 8,
    "TAIL": 0,
    "BLOCK_M": 16,
    "BLOCK_N": 64,
    "BLOCK_W": 32,
    "OVERLAP": True,
    "zeros_ptr": None,
    "bias_ptr": None,
}


def main(counted: str) -> None:
    constants = CONSTANTS | ({} if counted == "counted" else {"num_tiles_ptr": None})
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = "*" + POINTERS[name]
        else:
            signature[name] = "*bf16" if name in ("h", "h_tail", "y_ptr") else "i32"
    source = ASTSource(kernel, signature, constants, {})
    sys.stdout.write(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"])


if __name__ == "__main__":
    main(sys.argv[1])
