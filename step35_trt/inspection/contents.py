"""What lies in a bundle: files by kind, and the graphs of one for the CPU."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from step35_trt.bundle import KERNELS, SEGMENTS, TOKENIZER, WEIGHTS
from step35_trt.pages.table import Table, several

if TYPE_CHECKING:
    from step35_trt.bundle import Bundle, Manifest
    from step35_trt.program import Program

FOLDERS = (WEIGHTS, SEGMENTS, KERNELS, TOKENIZER)
REST = "program and graphs"


def size(nbytes: float) -> str:
    """Bytes in the unit that suits them."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def summary(bundle: Bundle) -> str:
    """How much it is, in a line."""
    manifest = bundle.manifest
    total = sum(record.size for record in manifest.files.values())
    return f"{several(len(manifest.files), 'file')}, {size(total)}; up to {manifest.max_tokens} tokens"


def files(manifest: Manifest) -> Table:
    """Files and bytes by folder."""
    counts, sizes = Counter[str](), Counter[str]()
    for name, record in manifest.files.items():
        folder = name.split("/")[0]
        kind = folder if folder in FOLDERS else REST
        counts[kind] += 1
        sizes[kind] += record.size
    rows = [(kind, str(counts[kind]), size(sizes[kind])) for kind in (*FOLDERS, REST) if counts[kind]]
    rows.append(("all", str(counts.total()), size(sizes.total())))
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return Table("what lies in it", ("kind", "files", "size"), tuple(rows), f"built with {versions}")


def graphs(program: Program) -> Table:
    """The segments of a CPU bundle."""
    rows = []
    for segment in (segment for segments in (program.decoder, *program.mtp) for segment in segments):
        window = sum(cache.window > 0 for cache in segment.caches)
        per_token = sum(cache.row_bytes for cache in segment.caches if not cache.window)
        rows.append(
            (
                segment.file,
                segment.backend,
                f"{len(segment.caches) - window} full, {window} window",
                f"{segment.bytes_per_token / 1e6:.1f}",
                f"{per_token / 1e3:.1f}",
            )
        )
    columns = ("step", "back end", "caches", "MB read a token", "KV kB a token")
    return Table("program", columns, tuple(rows))
