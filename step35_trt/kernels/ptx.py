"""What is read from PTX text: parameters of the entry and the instructions that decide a kernel's speed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_trt.errors import Step35Error

if TYPE_CHECKING:
    from collections.abc import Sequence

_ENTRY = re.compile(r"\.visible \.entry (?P<name>\w+)\(\n(?P<body>.*?)\n\)", re.DOTALL)
_TYPE = re.compile(r"\.param \.(\w+)")

_WIDE = r"[\w.:]*\.(?:v4\.\w32|v2\.\w64)\b"
# PTX ISA, section "Instruction Set". ptxas makes one or more machine instructions of its kind of each.
INSTRUCTIONS = {
    "wgmma": re.compile(r"\bwgmma\.mma_async\b"),
    "tcgen05": re.compile(r"\btcgen05\.mma\b"),
    "mma": re.compile(r"(?<!\.)\bmma\.sync\b"),
    "ldmatrix": re.compile(r"\bldmatrix\b"),
    "cp.async": re.compile(r"\bcp\.async\.c[ag]\b"),
    "tma": re.compile(r"\bcp\.async\.bulk\.tensor\b"),
    "ld.128": re.compile(r"\bld\.global" + _WIDE),
    "ld": re.compile(r"\bld\.global(?!" + _WIDE + ")"),
    "st.128": re.compile(r"\bst\.global" + _WIDE),
    "st": re.compile(r"\bst\.global(?!" + _WIDE + ")"),
    "atomic": re.compile(r"\b(?:atom|red)\.\w"),
}


_TRAP = re.compile(r"^\s*(?:@%\w+ )?trap;", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """The kernel function of a PTX module: its name and its parameters' declarations, in order."""

    name: str
    parameters: tuple[str, ...]

    @property
    def types(self) -> tuple[str, ...]:
        """PTX types of the parameters, `u64` for a pointer."""
        return tuple(_TYPE.search(text)[1] for text in self.parameters)  # type: ignore[index]


def entry(ptx: str) -> Entry:
    """The only entry of `ptx`.

    Raises:
        Step35Error: there is none, or more than one.
    """
    found = list(_ENTRY.finditer(ptx))
    if len(found) != 1:
        raise Step35Error(f"a PTX module has {len(found)} entries where one is expected")
    return Entry(found[0]["name"], tuple(line.strip().rstrip(",") for line in found[0]["body"].splitlines()))


def arranged(ptx: str, order: Sequence[int | None], name: str) -> str:
    """`ptx` whose entry is called `name` and takes its parameters in another order.

    The body refers to parameters by name, so declarations alone decide the order of a launch. None stands for
    a 64-bit parameter that nothing reads; parameters that `order` leaves out are dropped.

    Raises:
        Step35Error: the body reads a parameter that is left out.
    """
    found = entry(ptx)
    for index in set(range(len(found.parameters))) - set(order):
        if f"[{found.parameters[index].split()[-1]}" in ptx:
            raise Step35Error(f"{found.name} reads its parameter {index}, which a launch would not pass")
    body = ",\n".join(
        f"\t.param .u64 unread_{place}" if index is None else f"\t{found.parameters[index]}"
        for place, index in enumerate(order)
    )
    ptx = _ENTRY.sub(lambda match: f".visible .entry {match['name']}(\n{body}\n)", ptx, count=1)
    return re.sub(rf"\b{found.name}\b", name, ptx)


def instructions(ptx: str) -> dict[str, int]:
    """How often each kind of `INSTRUCTIONS` stands in the text; kinds that do not occur are left out."""
    counts = {kind: len(pattern.findall(ptx)) for kind, pattern in INSTRUCTIONS.items()}
    return {kind: count for kind, count in counts.items() if count}


def traps(ptx: str) -> bool:
    """Whether the code stops by itself: what Triton leaves of a kernel that has no room in tensor memory."""
    return _TRAP.search(ptx) is not None
