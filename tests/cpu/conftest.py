from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

# A busy machine draws slowly, which says nothing about a strategy; the suite has ten minutes.
settings.register_profile(
    "suite", max_examples=20, suppress_health_check=[HealthCheck.too_slow], deadline=None
)
settings.load_profile("suite")

# A process of its own that a test starts would compile the package's sources anew each time.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Where this was started in the background, processes that tests start and interrupt would not hear of it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# One thread a library: pytest-xdist uses the cores.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
# Triton reads this when it is first imported; what is compiled for a GPU is compiled in processes of its own.
os.environ["TRITON_INTERPRET"] = "1"

from tests.synthetic import raw_config, write_checkpoint  # noqa: E402 - after the environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Window smaller and larger than a test's prompt; 8:1 and 12:1 heads on one KV head and on two.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "small-window": {},
    "large-window": {
        "layers": 5,
        "heads": (16, 24),
        "groups": 2,
        "head_dim": 32,
        "sliding_window": 64,
        "hidden_size": 96,
        "intermediate_size": 160,
        "vocab_size": 131,
        "moe_num_experts": 17,
        "moe_top_k": 4,
        "moe_intermediate_size": 48,
        "share_expert_dim": 64,
    },
}


@pytest.hookimpl(trylast=True)  # after the order was drawn
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long go first."""
    items.sort(key=lambda item: item.get_closest_marker("early") is None)


@pytest.fixture(scope="session", autouse=True)
def _interpreted_faster() -> Iterator[None]:
    """Where tests that were collected interpret kernels."""
    with pytest.MonkeyPatch.context() as patch:
        if "triton" in sys.modules:
            from tests.interpreter import remember_types

            remember_types(patch)
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random checkpoint of each geometry."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        name: write_checkpoint(root / name, raw_config(**changes), seed=i)
        for i, (name, changes) in enumerate(GEOMETRIES.items())
    }


@pytest.fixture(scope="session", params=list(GEOMETRIES))
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Path:
    """Each geometry in turn."""
    return checkpoints[request.param]
