"""Every GPU kernel checked and timed in one run: `python -m benchmarks.kernels`, under 8 minutes on one GPU.

Without a GPU, `TRITON_INTERPRET=1 python -m benchmarks.kernels --smoke` runs the same checks on the CPU at a
small size, without times.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from step35_trt.dialects.torch_kernels import present_target
from step35_trt.kernels import interpreter, tactics
from step35_trt.kernels.checks import check
from step35_trt.kernels.targets import TARGETS
from step35_trt.kernels.timing import Card, eager_seconds, seconds
from step35_trt.kernels.workloads import published, small, workloads

if TYPE_CHECKING:
    from step35_trt.kernels.checks import Check
    from step35_trt.kernels.workloads import Workload


@dataclass(frozen=True)
class Times:
    """Of one workload.

    Attributes:
        microseconds: Of ours.
        plain_microseconds: Of plain torch, called eagerly where it waits for the device.
        gigabytes_per_second: What must be moved, over the time.
        share: Of what bounds it: of the copy bandwidth or the matmul rate reached, or how many times longer
            than an empty launch or as torch's attention it takes.
        share_of: Which of these.
    """

    microseconds: float
    plain_microseconds: float
    gigabytes_per_second: float
    share: float
    share_of: str


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="small sizes, checks only, in the interpreter")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.smoke and not interpreter.wanted():
        parser.error("--smoke interprets the kernels: set TRITON_INTERPRET=1")
    device = torch.device("cpu" if options.smoke else "cuda")
    target = TARGETS["sm_90"] if options.smoke else present_target(device)
    card = None if options.smoke else Card.measure(device)
    if card and not options.json:
        print(
            f"{card.name}: copies at {card.copy_bandwidth / 1e9:.0f} GB/s, multiplies bf16 at "
            f"{card.matmul_rate / 1e12:.0f} TFLOP/s, launches in {card.launch_seconds * 1e6:.1f} µs"
        )
    results, failed = [], 0
    with torch.inference_mode():
        for make in workloads(small() if options.smoke else published(), device):
            workload = make()
            if options.only not in workload.name:
                continue
            entries = tactics.load(workload.plugin, target.capability).entries
            checked = check(workload, entries)
            times = measure(workload, entries, card) if card else None
            failed += not checked.passed
            results.append({"workload": workload.name, **asdict(checked)} | (asdict(times) if times else {}))
            if not options.json:
                print(line(workload, checked, times), flush=True)
            del workload
    if options.json:
        print(json.dumps({"card": asdict(card) if card else None, "results": results}))
    if failed or not results:
        sys.exit(f"{failed} of {len(results)} workloads fail their checks")


def measure(workload: Workload, entries: tuple[tactics.Tactic, ...], card: Card) -> Times:
    """Ours against the bound and against plain torch."""
    ours = seconds(lambda: workload.run(entries))
    plain = (eager_seconds if workload.plugin == "sparse_moe" else seconds)(workload.plain)
    share, share_of = {
        "bandwidth": (workload.bytes / ours / card.copy_bandwidth, "of the copy bandwidth"),
        "matmul": (workload.operations / ours / card.matmul_rate, "of the bf16 matmul rate"),
        "launch": (ours / card.launch_seconds, "times an empty launch"),
        "attention": (ours / plain, "times torch's attention"),
    }[workload.bound]
    return Times(ours * 1e6, plain * 1e6, workload.bytes / ours / 1e9, share, share_of)


def line(workload: Workload, checked: Check, times: Times | None) -> str:
    """One line for people."""
    bits = "same bits" if checked.repeats and checked.independent else "BITS DIFFER"
    said = f"{workload.name}: error {checked.error:.1e} of {checked.tolerance:.0e}, {bits}"
    if times:
        said += (
            f"; {times.microseconds:.1f} µs, {times.gigabytes_per_second:.0f} GB/s, "
            f"{times.share:.2f} {times.share_of}, "
            f"{times.plain_microseconds / times.microseconds:.1f}x as fast as plain torch"
        )
    return said if checked.passed else f"FAILED {said}"


if __name__ == "__main__":
    main()
