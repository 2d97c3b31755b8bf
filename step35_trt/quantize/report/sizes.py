"""Bytes before and after, from the headers of two checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from step35_trt.plan.parameters import parameters
from step35_trt.quantize.report.data import GroupBytes

if TYPE_CHECKING:
    from step35_trt.checkpoint import Checkpoint
    from step35_trt.quantize.formats import Coding


def stored_bytes(checkpoint: Checkpoint, name: str) -> int:
    """Bytes of a parameter on disk, scales included."""
    scales = checkpoint.codings[name].scale_name(name)
    return sum(checkpoint.tensors[part].nbytes for part in (name, scales) if part)


def spelled(coding: Coding) -> str:
    """A coding in a word."""
    return f"{coding.kind}/{coding.block}" if coding.block else coding.kind


def group_bytes(before: Checkpoint, after: Checkpoint) -> tuple[GroupBytes, ...]:
    """Every parameter's bytes by part of the model, in the model's order."""
    found: dict[str, GroupBytes] = {}
    for parameter in parameters(before.config):
        name, group = parameter.name, parameter.group
        old = found.get(group) or GroupBytes(group=group, parameters=0, codings=(), before=0, after=0)
        coding = spelled(after.codings[name])
        found[group] = GroupBytes(
            group=group,
            parameters=old.parameters + parameter.count,
            codings=old.codings if coding in old.codings else (*old.codings, coding),
            before=old.before + stored_bytes(before, name),
            after=old.after + stored_bytes(after, name),
        )
    return tuple(found.values())
