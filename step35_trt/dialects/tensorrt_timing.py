"""What TensorRT measured of its kernels, kept between builds, so that the next one does not measure again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from step35_trt.journal import replacing
from step35_trt.resources import cache_folder

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class TimingCache:
    """A file in TensorRT's own form; it knows which GPU and version it is of, and TensorRT looks.

    TensorRT-RTX chooses kernels when an engine is loaded, and has no use for one: its timing-cache calls are
    deprecated and do nothing since its version 1.2.
    """

    path: Path

    @classmethod
    def of(cls, version: str, capability: str) -> TimingCache:
        """The user's, for one version of TensorRT and one kind of GPU."""
        return cls(cache_folder() / "tensorrt" / f"{version}-sm{capability.replace('.', '')}.timing")

    def attach(self, config: Any) -> None:
        """Let a build take what is known; what does not belong to this machine is left out."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        cache = config.create_timing_cache(content) or config.create_timing_cache(b"")
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)

    def keep(self, config: Any) -> None:
        """Write what is known after a build.

        Raises:
            UsageError: the cache folder cannot be written.
        """
        cache = config.get_timing_cache()
        if cache is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as stream:
            stream.write(bytes(cache.serialize()))
