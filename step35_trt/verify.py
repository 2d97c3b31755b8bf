"""Does a bundle compute what its checkpoint says?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.bundle import Bundle
from step35_trt.errors import UnsupportedError, UsageError
from step35_trt.evaluate import Difference, differences, evaluate
from step35_trt.program import SteppedProgram
from step35_trt.runtime.load import load_text, open_session
from step35_trt.runtime.placement import check_alone

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from step35_trt.config import Step35Config
    from step35_trt.interpret.verify import Comparison
    from step35_trt.runtime.session import Session

RANDOM_TOKENS = 96  # where there is no tokenizer: as many random ids

SAMPLE = """\
A compiler reads a description of a computation and writes another that a machine can execute. What it must
not do is change the answer. So the two are run side by side on a text such as this one, and the predictions
are compared word for word:

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)
"""


@dataclass(frozen=True)
class Report:
    """The comparison on `tokens` tokens; `max_mean_kl` is the recipe's limit in nats."""

    recipe: str
    tokens: int
    max_mean_kl: float
    differences: tuple[Difference, ...]

    @property
    def worst(self) -> str:
        """The part that is furthest off."""
        return max(self.differences, key=lambda d: d.mean_kl).name

    @property
    def passed(self) -> bool:
        """Whether every part is within the limit; a NaN is not."""
        return all(d.mean_kl <= self.max_mean_kl for d in self.differences)


def compare(directory: Path, reference: Session, ids: Sequence[int] | None = None) -> Report:
    """Run the same tokens through a bundle and its reference; of a GPU bundle the program, on the CPU.

    Raises:
        UsageError: an id lies outside the vocabulary.
        UnsupportedError: the bundle is of another model.
    """
    bundle = Bundle.open(directory)
    tokens = _tokens(bundle, reference.config, ids)
    if _for_gpu(bundle):
        from step35_trt.interpret.stored import stored_session

        session: Session = stored_session(bundle)
    else:
        session = open_session(bundle)
    found = differences(evaluate(reference, tokens), evaluate(session, tokens))
    recipes = [r for r in (bundle.manifest.quantized, bundle.manifest.recipe) if r]
    limit = max(recipe.max_mean_kl for recipe in recipes)
    return Report(", ".join(recipe.name for recipe in recipes), len(tokens), limit, tuple(found))


@dataclass(frozen=True)
class StepReport:
    """A GPU bundle's program beside the definition, value by value, on `tokens` tokens."""

    recipe: str
    tokens: int
    comparison: Comparison

    @property
    def off(self) -> str:
        """The first module that departs from the definition, in a sentence; empty where none does."""
        found = self.comparison.first_off
        if found is None:
            return ""
        reason = f"{found.name} is off by {found.error:.1e}, {found.limits[0]:.0e} is allowed"
        if found.error <= found.limits[0]:
            reason = (
                f"a row of {found.name} is off by {found.worst_row:.1e}, {found.limits[1]:.0e} is allowed"
            )
        if found.unexplained:
            reason += f", and {found.unexplained} tokens go to other experts"
        ranks = {finding.rank for finding in self.comparison.findings}
        where = f"{found.graph} on rank {found.rank}" if len(ranks) > 1 else found.graph
        return f"{found.path} of {where} is the first that is wrong: {reason}"

    def table(self) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        """Columns and a row for each graph: what was compared and what is furthest off."""
        rows: list[tuple[object, ...]] = []
        for graph in dict.fromkeys(finding.graph for finding in self.comparison.findings):
            own = [finding for finding in self.comparison.findings if finding.graph == graph]
            worst = max(own, key=lambda finding: finding.error)
            flips = sum(finding.flips for finding in own)
            failed = sum(not finding.passed for finding in own)
            rows.append((graph, len(own), failed, f"{worst.error:.2e}", worst.name, flips))
        columns = ("graph", "values", "off", "largest error", "where", "routing turned by rounding")
        return columns, rows

    def as_json(self) -> dict[str, object]:
        """For `--json`."""
        columns, rows = self.table()
        graphs = [dict(zip(columns, row, strict=True)) for row in rows]
        return {
            "recipe": self.recipe,
            "tokens": self.tokens,
            "passed": not self.off,
            "off": self.off,
            "graphs": graphs,
        }


def compare_program(directory: Path, checkpoint: Path, ids: Sequence[int] | None = None) -> StepReport | None:
    """Run a GPU bundle's program on the CPU step by step beside the definition.

    Segments run as the networks that engines are built of, plugins by their definition; weights are the
    bundle's files.

    Returns:
        None where that says nothing: the bundle runs on the CPU, or the reference's weights are not in the
        bundle's codes, so that values differ by more than rounding.

    Raises:
        UsageError: an id lies outside the vocabulary, or several processes were started.
        UnsupportedError: the bundle is of another model.
    """
    bundle = Bundle.open(directory)
    if not _for_gpu(bundle):
        return None
    check_alone(f"verify runs all ranks of {directory} in one process")
    from step35_trt.checkpoint import Checkpoint
    from step35_trt.gpu_forms import as_kernels_scale, deployed_forms, not_quantised
    from step35_trt.interpret.stored import stored_session
    from step35_trt.interpret.verify import compare_steps
    from step35_trt.interpret.weights import FormedWeights

    reference = Checkpoint.open(checkpoint)
    tokens = _tokens(bundle, reference.config, ids)
    forms, _ = deployed_forms(bundle.manifest.recipe, bundle.config)
    if not_quantised(reference, forms) is not None:
        return None
    wanted = FormedWeights(as_kernels_scale(reference), forms)
    calls = np.split(tokens, [len(tokens) - 5, len(tokens) - 4]) if len(tokens) > 5 else [tokens]
    found = compare_steps(stored_session(bundle), wanted, calls)
    return StepReport(bundle.manifest.recipe.name, len(tokens), found)


def _for_gpu(bundle: Bundle) -> bool:
    """Whether a bundle's program was compiled, and only an interpreter runs it here."""
    return isinstance(bundle.program, SteppedProgram) and bundle.manifest.engine.target != "torch"


def _tokens(bundle: Bundle, config: Step35Config, ids: Sequence[int] | None) -> NDArray[np.int64]:
    """The ids to compare on; where none are given, a text of the program's own."""
    if not bundle.config.same_model(config):
        raise UnsupportedError(f"{bundle.directory} was built from another model than the reference")
    vocabulary = bundle.config.vocab_size
    if ids is None:
        text = load_text(bundle.directory, required=False)
        rng = np.random.default_rng(0)
        ids = text.encode(SAMPLE) if text else rng.integers(0, vocabulary, RANDOM_TOKENS).tolist()
    if not ids or not all(0 <= i < vocabulary for i in ids):
        raise UsageError(f"token ids must lie in the vocabulary of {vocabulary}")
    return np.array(ids[: bundle.manifest.max_tokens])
