"""What Triton's own launcher would hand to the driver, for launches that come as lines of JSON.

Run as a program without `TRITON_INTERPRET`. It answers a line for each: the types that Triton gives the
arguments, which of them it finds to be multiples of 16, and the parameters as the launcher's C code has them,
in order and with their types.
"""

from __future__ import annotations

import functools
import json
import re
import struct
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.backends.nvidia.driver import make_launcher
from triton.runtime.jit import create_function_from_signature

from step35_trt.kernels import plugin
from step35_trt.kernels.launching import POINTERS

DTYPES = {kind: getattr(torch, name.removeprefix("torch.")) for name, kind in POINTERS.items()}
BACKEND = CUDABackend(GPUTarget("cuda", 90, 32))
C_TYPES = {"CUdeviceptr": "<Q", "int32_t": "<i", "uint32_t": "<f"}  # the last: floats as they are stored


class Pointer:
    """A tensor as far as Triton looks at one."""

    def __init__(self, kind: str, address: int) -> None:
        self.dtype, self.address = DTYPES[kind], address

    def data_ptr(self) -> int:
        return self.address


@functools.cache
def binder(module: str, plugin_name: str, function: str) -> Any:
    found = getattr(plugin.load(plugin_name, module), function)
    return found, create_function_from_signature(found.signature, found.params, BACKEND)


def answer(line: dict[str, Any]) -> dict[str, Any]:
    function, bind = binder(line["module"], line["plugin"], line["function"])
    given = [Pointer(kind, x) if kind.startswith("*") else x for kind, x in line["arguments"]]
    options = {"num_warps": line["num_warps"], "num_stages": line["num_stages"]}
    bound, specialised, options = bind(*given, **line["constants"], **options)
    # As `JITFunction.run` and `CudaLauncher` go on, for the signature that was compiled ahead of time.
    kinds = iter(kind for kind, _ in line["arguments"])
    signature = {i: "constexpr" if p.is_constexpr else next(kinds) for i, p in enumerate(function.params)}
    source = make_launcher({}, signature, None)
    listed = re.search(r"void \*params\[\] = \{ (.*) \};", source)
    assert listed
    values, parameters = list(bound.values()), []
    for name in listed[1].split(", "):
        if name in ("&global_scratch", "&profile_scratch"):
            parameters.append(struct.pack("<Q", 0))
            continue
        place = int(name.removeprefix("&arg"))
        declared = re.search(rf"(\w+) arg{place}\b", source)
        assert declared
        value = values[place]
        number = value.data_ptr() if isinstance(value, Pointer) else value
        parameters.append(struct.pack(C_TYPES[declared[1]], number))
    mine = [pair for pair, p in zip(specialised, function.params, strict=True) if not p.is_constexpr]
    return {
        "types": [kind for kind, _ in mine],
        "aligned": [mark == "D" for _, mark in mine],
        "threads": 32 * BACKEND.parse_options(options).num_warps,
        "parameters": [value.hex() for value in parameters],
    }


if __name__ == "__main__":
    for text in sys.stdin:
        print(json.dumps(answer(json.loads(text))))
