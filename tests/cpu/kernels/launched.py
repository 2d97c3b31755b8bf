"""Steps of small models through compiled kernels, over a driver that writes down what it is asked for.

Run as a program, in which Triton cannot be imported, it prints a line of JSON for each launch.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.gpu_sources import RandomSource
from step35_trt.config import Step35Config
from step35_trt.deployment import Deployment
from step35_trt.dialects.slot_kernels import SlotKernels, TritonLaunches
from step35_trt.dialects.torch_kernels import QUERIES, TritonKernels
from step35_trt.engine import EngineSpec
from step35_trt.kernels.artefact import digest
from step35_trt.kernels.cubins import open_cubins
from step35_trt.kernels.launching import type_of
from step35_trt.program import KernelFile
from step35_trt.quantize.recipe import Recipe
from step35_trt.runtime.cache.cache_extent import Extent
from step35_trt.runtime.device.device_pages import DevicePages
from step35_trt.runtime.device.device_runner import DeviceRunner
from step35_trt.runtime.device.device_weights import DeviceWeights
from step35_trt.runtime.programs.orders import StepOrder
from step35_trt.runtime.programs.program_torch import TorchExecutor
from step35_trt.runtime.programs.torch_segments import TorchSegments
from tests.gpu_kernels import uncompiled
from tests.synthetic import raw_config

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from step35_trt.kernels.artefact import CompiledKernel
    from step35_trt.kernels.cubins import CubinLauncher
    from step35_trt.kernels.launching import KernelLaunch

CPU, STREAM, CALL = torch.device("cpu"), 0xABC, 300
WIDTHS = {"hidden_size": 128, "moe_intermediate_size": 128, "moe_num_experts": 8, "moe_top_k": 2}
HEADS = {"heads": (16, 24), "groups": 2}
# Recipe, pages and engine: every coding of dense matrices and of experts, both kinds of pages, and a share.
ENGINES = (
    ("int4-awq", "bf16", "h200-int4"),
    ("int4-experts-fp8", "fp8", "h200-int4"),
    ("fp8-official", "bf16", "h200-int4"),
    ("fp8", "bf16", "h200x2-fp8"),
)
# Graph, rows before, new tokens: decoding, drafts, prompts in each tiling of products and experts.
STEPS = (
    (0, (0,), (1,)),
    (0, (0, 5), (2, 1)),
    (0, (0, 5, 9), (4, 4, 4)),
    (0, (0,), (6,)),
    (0, (0, 3), (40, 2)),
    (0, (0,), (CALL,)),
    (1, (0,), (1,)),
    (1, (0,), (20,)),
)


def written(folder: Path, kernels: Sequence[CompiledKernel]) -> list[KernelFile]:
    """The kernels of a bundle."""
    files = []
    for kernel in kernels:
        stem = f"{kernel.variant.plugin}.{kernel.variant.name}"
        (folder / f"{stem}.cubin").write_bytes(kernel.cubin)
        facts = kernel.facts.model_copy(update={"digests": {"code": digest(kernel.cubin)}})
        (folder / f"{stem}.json").write_text(facts.model_dump_json())
        file = {
            "code": f"{stem}.cubin",
            "launch": f"{stem}.json",
            "constants": dict(kernel.variant.constants),
        }
        read: dict[str, Any] = {"plugin": kernel.variant.plugin, "name": kernel.variant.name, **file}
        # As `program.json` gives it back.
        files.append(KernelFile.model_validate_json(json.dumps(read)))
    return files


@dataclass
class WritingDriver:
    """`Driver` without a device; a function's handle is its place in `loaded`."""

    loaded: list[tuple[bytes, str, int]] = field(default_factory=list)
    launched: list[dict[str, Any]] = field(default_factory=list)

    def load(self, code: bytes, entry: str, shared_bytes: int) -> int:
        """See `Driver`."""
        self.loaded.append((code, entry, shared_bytes))
        return len(self.loaded) - 1

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        parameters: bytes,
    ) -> None:
        """See `Driver`."""
        self.launched.append(
            {
                "code": self.loaded[function][0].decode(),
                "grid": grid,
                "threads": threads,
                "shared_bytes": shared_bytes,
                "stream": stream,
                "parameters": parameters.hex(),
            }
        )


@dataclass
class Noted:
    """`Launcher` that notes what it passes on."""

    inner: CubinLauncher
    asked: list[KernelLaunch] = field(default_factory=list)
    interpreted: bool = False

    def __call__(self, launch: KernelLaunch) -> None:
        """See `Launcher`."""
        self.asked.append(launch)
        self.inner(launch)


def deployment(recipe: str, pages: str, engine: str) -> Deployment:
    """Of a small model on Hopper."""
    raw = raw_config(layers=3, modules=1, moe_layers_enum="1,2", **WIDTHS, **HEADS)
    rules = Recipe.load(recipe).model_copy(update={"kv_cache": pages})
    return Deployment.of(Step35Config.parse(raw), rules, EngineSpec.load(engine))


def launches(made: Deployment) -> Iterator[dict[str, Any]]:
    """What a session of it launches."""
    driver, variants = WritingDriver(), made.kernels()
    with tempfile.TemporaryDirectory() as folder:
        files = written(Path(folder), uncompiled(variants, made.target))
        cubins = open_cubins(Path(folder), files, variants, made.target, driver, lambda: STREAM, "")
    assert len(driver.loaded) == len(variants)
    noted, programs = Noted(cubins), made.programs
    source = RandomSource(programs.forms, made.experts, CPU)
    weights = DeviceWeights(source, programs.forms, CPU, compiled=True, launcher=noted)
    kernels_of = TritonLaunches(TritonKernels(weights, made.target, launcher=noted), made.target)
    pages = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[made.recipe.kv_cache]
    own = made.sharing.config(made.config)
    graphs = [own.layers, own.mtp_layers]
    caches = DevicePages.of(graphs, Extent(3, 400, CALL), pages, CPU)
    executor = TorchExecutor(
        TorchSegments(programs.segments, weights, weights.words),
        weights,
        exchange=lambda *_: None,
        kernels=SlotKernels(caches, kernels_of, QUERIES),
    )
    runner = DeviceRunner(executor, programs.programs, executor.kernels, None, CALL)
    for graph, pasts, lengths in STEPS:
        count = sum(lengths)
        slots = tuple(range(len(lengths)))
        order = StepOrder(graph, slots, pasts, lengths, np.arange(count) % 97, np.arange(count))
        runner.run(order, np.ones((count, WIDTHS["hidden_size"]), np.float32) if graph else None)
    for asked, got in zip(noted.asked, driver.launched, strict=True):
        given = [(type_of(x), x if isinstance(x, int | float) else x.data_ptr()) for x in asked.arguments]
        line = asdict(replace(asked, arguments=(), constants={}))
        yield line | {"arguments": given, "constants": dict(asked.constants), "got": got}


def main() -> None:
    """Print the launches of all recipes."""
    for recipe, *rest in ENGINES:
        for line in launches(deployment(recipe, *rest)):
            print(json.dumps(line | {"recipe": recipe}))
    assert not any(name == "triton" or name.startswith("triton.") for name, m in sys.modules.items() if m)


if __name__ == "__main__":
    sys.modules["triton"] = None  # type: ignore[assignment]
    main()
