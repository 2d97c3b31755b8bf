"""Every GPU kernel checked and timed in one run: `python -m benchmarks.kernels`, under 8 minutes on one GPU.

Without a GPU, `TRITON_INTERPRET=1 python -m benchmarks.kernels --smoke` runs the same checks on the CPU at a
small size, without times. `--peer` times a public implementation of the experts as well: `peer_vllm.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import peer_vllm
from step35_trt.dialects.torch_kernels import present_target
from step35_trt.errors import Step35Error
from step35_trt.kernels import interpreter, tactics
from step35_trt.kernels.catalogue import deployment
from step35_trt.kernels.checks import check
from step35_trt.kernels.targets import TARGETS
from step35_trt.kernels.timing import Card, eager_seconds, seconds
from step35_trt.kernels.workloads import published, small, workloads

if TYPE_CHECKING:
    from step35_trt.kernels.checks import Check
    from step35_trt.kernels.workloads import Workload

MINUTES = 7.5
# What is expected before anything is measured: seconds to compile a kernel on one core, and to make a
# workload's tensors, check it and time it. They decide nothing but the estimate.
COMPILING, WORKING, PEER = 3.0, 3.0, 6.0
# It rounds each product to bf16, and activations to e4m3 where weights are.
PEER_TOLERANCE = {"bf16": 1e-2, "int4": 1e-2, "fp8_block": 1e-1}


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


@dataclass(frozen=True)
class PeerResult:
    """A public implementation of the same.

    Attributes:
        peer_error: Largest difference from the definition over the definition's largest magnitude.
        peer_passed: Whether that is what its roundings explain.
        peer_tiling: Its fastest; without times, the first.
        peer_microseconds: None without a GPU.
    """

    peer_error: float
    peer_passed: bool
    peer_tiling: str
    peer_microseconds: float | None


@dataclass
class Budget:
    """Time that the run may take: a workload is begun if one as long as the longest so far would fit."""

    minutes: float
    started: float = field(default_factory=time.monotonic)
    longest: float = 0.0

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def admits_another(self) -> bool:
        """Whether there is time for one more workload."""
        return self.spent + self.longest <= 60 * self.minutes

    def took(self, seconds: float) -> None:
        """Note a workload's time."""
        self.longest = max(self.longest, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="small sizes, checks only, in the interpreter")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--peer", type=Path, metavar="FILE", help="vLLM's fused_moe.py, run beside ours")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"left out is what takes longer: {MINUTES}"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.smoke and not interpreter.wanted():
        parser.error("--smoke interprets the kernels: set TRITON_INTERPRET=1")
    try:
        run(options)
    except Step35Error as error:
        sys.exit(f"{error.message} {error.hint or ''}".strip())


def run(options: argparse.Namespace) -> None:
    budget = Budget(options.minutes)
    device = torch.device("cpu" if options.smoke else "cuda")
    target = TARGETS["sm_90"] if options.smoke else present_target(device)
    scale = small() if options.smoke else published()
    peer = peer_vllm.load(options.peer) if options.peer else None
    makers = workloads(scale, device)
    if not options.smoke:
        compiled, peers = len(deployment(scale.config, target)), len(makers) // 2 if peer else 0
        expected = compiled * COMPILING + len(makers) * WORKING + peers * PEER
        print(
            f"{len(makers)} workloads, {compiled} kernels to compile: about {expected / 60:.0f} minutes "
            f"expected, at most {budget.minutes:g} taken",
            file=sys.stderr,
        )
    card = None if options.smoke else Card.measure(device)
    if card and not options.json:
        print(
            f"{card.name}: copies at {card.copy_bandwidth / 1e9:.0f} GB/s, multiplies bf16 at "
            f"{card.matmul_rate / 1e12:.0f} TFLOP/s, launches in {card.launch_seconds * 1e6:.1f} µs"
        )
    results: list[dict[str, Any]] = []
    failed, left_out = 0, 0
    with torch.inference_mode():
        for make in makers:
            if not budget.admits_another():
                left_out += 1
                continue
            begun = budget.spent
            workload = make()
            if options.only not in workload.name:
                continue
            entries = tactics.load(workload.plugin, target.capability).entries
            checked = check(workload, entries)
            times = measure(workload, entries, card) if card else None
            beside = measure_peer(peer, workload, card) if peer and comparable(workload) else None
            failed += not checked.passed or (beside is not None and not beside.peer_passed)
            results.append(
                {"workload": workload.name, **asdict(checked)}
                | (asdict(times) if times else {})
                | (asdict(beside) if beside else {})
            )
            if not options.json:
                print(line(workload, checked, times, beside), flush=True)
            del workload
            budget.took(budget.spent - begun)
    if options.json:
        card_facts = asdict(card) if card else None
        print(json.dumps({"card": card_facts, "results": results, "left_out": left_out}))
    if left_out:
        print(f"{left_out} workloads left out after {budget.spent / 60:.1f} minutes", file=sys.stderr)
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


def comparable(workload: Workload) -> bool:
    """Whether the peer has kernels for it."""
    return workload.experts is not None and workload.experts.geometry.format in peer_vllm.FORMATS


def measure_peer(kernels: dict[str, Any], workload: Workload, card: Card | None) -> PeerResult:
    """The peer's fastest tiling, held against the same definition as ours."""
    call = workload.experts
    assert call is not None
    want = workload.definition()
    tried = [(tiling, peer_vllm.step(kernels, call, tiling)) for tiling in peer_vllm.tilings(call)]
    tried = tried if card else tried[:1]
    got = tried[0][1]()[: len(want)].float()
    error = ((got - want).abs().max() / want.abs().max()).item()
    passed = error <= PEER_TOLERANCE[call.geometry.format]
    if card is None:
        return PeerResult(error, passed, str(tried[0][0]), None)
    fastest, tiling = min((seconds(step), str(tiling)) for tiling, step in tried)
    return PeerResult(error, passed, tiling, fastest * 1e6)


def line(workload: Workload, checked: Check, times: Times | None, beside: PeerResult | None) -> str:
    """One line for people."""
    bits = "same bits" if checked.repeats and checked.independent else "BITS DIFFER"
    said = f"{workload.name}: error {checked.error:.1e} of {checked.tolerance:.0e}, {bits}"
    if times:
        said += (
            f"; {times.microseconds:.1f} µs, {times.gigabytes_per_second:.0f} GB/s, "
            f"{times.share:.2f} {times.share_of}, "
            f"{times.plain_microseconds / times.microseconds:.1f}x as fast as plain torch"
        )
    if beside:
        said += f"; vLLM's kernels{'' if beside.peer_passed else ' FAILED'}: error {beside.peer_error:.1e}"
        if times and beside.peer_microseconds:
            ratio = beside.peer_microseconds / times.microseconds
            said += f", {beside.peer_microseconds:.1f} µs ({beside.peer_tiling}), ours {ratio:.1f}x as fast"
    return said if checked.passed else f"FAILED {said}"


if __name__ == "__main__":
    main()
