"""One HTML page from a report's template: no scripts, nothing from a network, dark and light, any width."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from step35_trt import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from markupsafe import Markup

    from step35_trt.pages.chart import Line


@dataclass(frozen=True)
class Figure:
    """A drawing with its title, the names of its colours and a remark."""

    title: str
    drawing: Markup
    keys: tuple[tuple[int, str], ...]
    note: str = ""


def keys(series: Sequence[Line]) -> tuple[tuple[int, str], ...]:
    """The names of lines by their colours."""
    return tuple((n, line.name) for n, line in enumerate(series))


def render(template: Path, context: Mapping[str, object]) -> str:
    """The page of a template that extends `base.html.jinja`, which shows `figures` and `tables`."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render({**context, "version": __version__})
