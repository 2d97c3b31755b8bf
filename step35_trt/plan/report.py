"""A plan as tables, for the terminal and the page alike, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from step35_trt.pages.table import Table, several
from step35_trt.plan.parameters import MTP_GROUPS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from step35_trt.build_estimate import BuildEstimate
    from step35_trt.plan.parameters import GroupCount
    from step35_trt.plan.plan import Plan
    from step35_trt.plan.roofline import Step

GB, GIB = 1e9, 2.0**30


def heading(plan: Plan) -> str:
    """What is planned, in a line."""
    spec, limits = plan.spec, plan.limits
    load = f"{several(limits.sequences, 'sequence')} of {limits.context:,} tokens"
    if limits.cached:
        load += f", {limits.cached:,} together"
    drafts = several(limits.drafts, "MTP module")
    return f"{spec.devices} x {plan.hardware.name}, recipe {spec.recipe}; {load}, {drafts}"


def verdict(plan: Plan) -> str:
    """Whether the engine fits, in a sentence."""
    needed, capacity = plan.memory.needed / GB, plan.memory.capacity / GB
    if plan.fits:
        return f"It fits: a device needs {needed:.1f} of {capacity:.1f} GB."
    return f"It does not fit: a device needs {needed:.1f} GB and has {capacity:.1f} GB."


def tables(plan: Plan) -> tuple[Table, ...]:
    """Everything a plan says in figures."""
    hardware = plan.hardware
    title = f"Tokens per second at the roofline, {_rate(hardware.bandwidth)}"
    speeds = [_speed_table(plan, title, reachable=False)]
    if hardware.reachable_bandwidth:
        title = f"The same at {_rate(hardware.reachable_bandwidth)}, which kernels have been seen to reach"
        speeds.append(_speed_table(plan, title, reachable=True))
    memory, rest = (_weights(plan), _memory(plan), _caches(plan)), (_splits(plan), _formats(plan))
    build = (_build(plan.build),) if plan.build else ()
    return (*memory, *speeds, _steps(plan), *build, *rest)


def refusals(plan: Plan) -> tuple[str, ...]:
    """Every refused split with its reason."""
    return tuple(f"{s.part}, {s.way}, {s.ranks} devices: {s.refusal}" for s in plan.splits if s.refusal)


def as_json(plan: Plan) -> dict[str, object]:
    """The plan as plain data; bytes, seconds and tokens per second, all projected."""
    main = sum(w.nbytes for w in plan.weights if w.group not in MTP_GROUPS)
    return {
        "projection": True,
        "engine": plan.spec.model_dump(mode="json"),
        "limits": asdict(plan.limits),
        "fits": plan.fits,
        "alternatives": list(plan.alternatives),
        "parameters": {
            "main": plan.parameter_count,
            "active": plan.active_parameters,
            "with_modules": sum(count.parameters for count in plan.parameters),
            "groups": [asdict(count) for count in plan.parameters],
        },
        "weights": {
            "main": main,
            "with_modules": sum(w.nbytes for w in plan.weights),
            "groups": [asdict(w) for w in plan.weights],
        },
        "published_formats": [asdict(f) for f in plan.formats],
        "memory": asdict(plan.memory) | {"needed": plan.memory.needed, "free": plan.memory.free},
        "kv_cache": {"value_bytes": plan.kv_bytes, "contexts": [asdict(c) for c in plan.caches]},
        "most_sequences": [asdict(r) for r in plan.reach],
        "acceptance": list(plan.acceptance),
        "steps": [
            asdict(speed.step)
            | {
                "seconds": speed.step.seconds,
                "tokens_per_second": speed.step.tokens_per_second,
                "tokens_per_second_reachable": speed.reachable,
                "fits": speed.fits,
            }
            for speed in plan.speeds
        ],
        "build": _build_json(plan),
        "splits": [asdict(split) for split in plan.splits],
        "shared": [asdict(split) for split in plan.shares.splits],
        "assumptions": list(plan.assumptions),
    }


def building(plan: Plan) -> str:
    """What a build takes, in a sentence; empty where that is not known."""
    if plan.build:
        ready = " before the target finishes it" if any(part.later for part in plan.build.parts) else ""
        return (
            f"Building it takes {plan.build.nbytes / GB:.1f} GB of disk and about {_time(plan.build.seconds)}"
            f"{ready}, on {plan.build.machine} (projected)."
        )
    return f"This version does not build it: {plan.not_built}." if plan.not_built else ""


def _build_json(plan: Plan) -> dict[str, object] | None:
    if plan.build is None:
        return {"refused": plan.not_built} if plan.not_built else None
    return asdict(plan.build) | {"nbytes": plan.build.nbytes, "seconds": plan.build.seconds}


def tokens(count: float) -> str:
    """A number of tokens as people say it: 8K for 8192."""
    return f"{count / 1024:g}K" if count >= 1024 and count % 1024 == 0 else f"{count:g}"


def figure(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rate(bandwidth: float) -> str:
    return f"{bandwidth / 1e12:g} TB/s" if bandwidth >= 1e12 else f"{bandwidth / GB:g} GB/s"


def _gb(nbytes: float) -> str:
    return f"{nbytes / GB:,.2f}"


def _weights(plan: Plan) -> Table:
    stored = {w.group: w for w in plan.weights}

    def line(name: str, units: str, counts: Sequence[GroupCount]) -> tuple[str, ...]:
        number = sum(count.parameters for count in counts)
        whole = sum(stored[count.group].nbytes for count in counts)
        part = sum(stored[count.group].on_device for count in counts)
        return (name, units, f"{number:,}", _gb(whole), _gb(part))

    modules = [count for count in plan.parameters if count.group in MTP_GROUPS]
    decoder = [count for count in plan.parameters if count.group not in MTP_GROUPS]
    rows = [line(count.group, str(count.units), [count]) for count in decoder]
    rows.append(line("main model", "", decoder))
    if modules:
        rows += [line(count.group, str(count.units), [count]) for count in modules]
        rows.append(line("with MTP modules", "", plan.parameters))
    return Table(
        f"Parameters, and their bytes in recipe {plan.spec.recipe}",
        ("group", "units", "parameters", "GB", "GB a device"),
        tuple(rows),
        f"{plan.active_parameters:,} parameters are read for a token: {plan.config.moe_top_k} experts of a "
        "layer, and no embedding.",
    )


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    lines = [(item.what, item.nbytes) for item in memory.items]
    lines += [("needed", memory.needed), ("there is", memory.capacity), ("left", memory.free)]
    return Table(
        "Memory of one device",
        ("what", "GB", "GiB"),
        tuple((what, _gb(nbytes), f"{nbytes / GIB:,.2f}") for what, nbytes in lines),
    )


def _caches(plan: Plan) -> Table:
    rows = []
    for cache, reach in zip(plan.caches, plan.reach, strict=True):
        rows.append(
            (
                tokens(cache.context),
                f"{cache.nbytes / GIB:.3f}",
                f"{cache.all_full / GIB:.3f}",
                f"{cache.nbytes / cache.all_full:.3f}",
                f"{reach.sequences:,}",
            )
        )
    columns = ("context", "GiB a sequence", "if no layer had a window", "ratio", "sequences that fit")
    return Table(
        f"Keys and values, {plan.kv_bytes} bytes a number, on all devices together", columns, tuple(rows)
    )


def _speed_table(plan: Plan, title: str, *, reachable: bool) -> Table:
    drafts = sorted({speed.step.drafts for speed in plan.speeds})
    cells: dict[tuple[int, int], list[str]] = {}
    for speed in plan.speeds:
        value = speed.reachable if reachable and speed.reachable else speed.step.tokens_per_second
        text = figure(value) if speed.fits else f"({figure(value)})"
        cells.setdefault((speed.step.context, speed.step.sequences), []).append(text)
    rows = tuple((tokens(context), str(sequences), *row) for (context, sequences), row in cells.items())
    note = "K modules draft for every sequence; all sequences together."
    if any(not speed.fits for speed in plan.speeds):
        note += " In brackets: the memory does not hold so many sequences of that context."
    return Table(title, ("context", "sequences", *(f"K = {k}" for k in drafts)), rows, note)


def _steps(plan: Plan) -> Table:
    rows = []
    for step in (speed.step for speed in plan.speeds if not speed.step.drafts):
        parts = (step.traffic.dense, step.traffic.experts, step.traffic.kv, step.traffic.total)
        case = (tokens(step.context), str(step.sequences), f"{step.distinct_experts:.1f}")
        rows.append((*case, *map(_gb, parts), f"{step.seconds * 1e3:.2f}", bound(step)))
    columns = (
        "context",
        "sequences",
        "experts a layer",
        "dense GB",
        "experts GB",
        "KV GB",
        "GB",
        "ms",
        "bound",
    )
    return Table("What a device reads in a step without drafts", columns, tuple(rows))


def _build(build: BuildEstimate) -> Table:
    rows = []
    for part in build.parts:
        seconds = "on the target" if part.later else "not measured"
        if part.seconds is not None:
            seconds = _time(part.seconds)
        rows.append((part.what, str(part.count), _gb(part.nbytes), seconds))
    rows.append(("all", "", _gb(build.nbytes), _time(build.seconds)))
    return Table(
        "Disk and time of a build, projected",
        ("what", "number", "GB", "time"),
        tuple(rows),
        f"From a quantised checkpoint, on {build.machine}; the rates are from {build.source}.",
    )


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def bound(step: Step) -> str:
    """What a step's time is spent on."""
    return "memory" if step.memory_seconds >= step.arithmetic_seconds else "arithmetic"


def _splits(plan: Plan) -> Table:
    ranks = sorted({split.ranks for split in plan.splits})
    cells: dict[tuple[str, str], list[str]] = {}
    for split in plan.splits:
        cells.setdefault((split.part, split.way), []).append("no" if split.refusal else "yes")
    rows = tuple((f"{part}, {way}", *row) for (part, way), row in cells.items())
    return Table("What so many devices could share", ("part and way", *map(str, ranks)), rows)


def _formats(plan: Plan) -> Table:
    return Table(
        "The same model in formats that others publish",
        ("format", "GB", "GiB", "GB with MTP in BF16"),
        tuple(
            (f.name, f"{f.main / GB:.1f}", f"{f.main / GIB:.1f}", f"{f.with_modules / GB:.1f}")
            for f in plan.formats
        ),
    )
