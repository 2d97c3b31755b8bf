"""A recipe applied to a checkpoint: calibrated where it asks for that, then converted."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_trt.checkpoint import Checkpoint
from step35_trt.errors import UsageError
from step35_trt.quantize.convert import conversion_key, convert, is_there

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from step35_trt.progress import Progress
    from step35_trt.quantize.recipe import Recipe

REPORT = "reports/calibration.json"


@dataclass(frozen=True)
class CalibrationOptions:
    """What a user may set for one run.

    Attributes:
        text: Plain text or JSON lines to calibrate on; None: the program's own.
        min_expert_tokens: As in the recipe, which it overrides.
        max_host_memory: Bytes of address space.
    """

    text: Path | None = None
    min_expert_tokens: int | None = None
    max_host_memory: int | None = None

    @property
    def given(self) -> bool:
        """Whether anything is set."""
        return self != CalibrationOptions()


@dataclass(frozen=True)
class Job:
    """A conversion with all that its result depends on.

    Attributes:
        source: The checkpoint.
        recipe: The precisions.
        options: The user's.
        token_ids: What is calibrated on, `[sequences, length]`; None without calibration.
        key: Tells the result from every other.
    """

    source: Checkpoint
    recipe: Recipe
    options: CalibrationOptions
    token_ids: NDArray[np.int64] | None
    key: str

    @classmethod
    def of(cls, checkpoint: Path, recipe: Recipe, options: CalibrationOptions) -> Job:
        """Open the checkpoint and the text; nothing is computed.

        Raises:
            Step35Error: one of its kinds.
        """
        source = Checkpoint.open(checkpoint)
        if recipe.calibration is None:
            if options.given:
                raise UsageError(
                    f"recipe {recipe.name} is not calibrated", "Leave the calibration options out."
                )
            return cls(source, recipe, options, None, conversion_key(source, recipe))
        ids = _token_ids(source, recipe, options)
        inputs = [hashlib.blake2b(ids.tobytes()).hexdigest(), str(ids.shape), str(options.min_expert_tokens)]
        return cls(source, recipe, options, ids, conversion_key(source, recipe, inputs))

    def run(self, out: Path, progress: Progress | None = None) -> bool:
        """Write the converted checkpoint; interrupted work goes on where it stopped.

        Returns:
            False where the very same result was there already.

        Raises:
            Step35Error: one of its kinds; what was finished stays for the next run.
        """
        if is_there(out, self.key):
            return False
        work = out.with_name(out.name + ".calibration")
        if self.token_ids is None:
            convert(self.source, out, self.recipe, self.key, progress=progress)
            return True
        from step35_trt.quantize.calibration import calibrate

        found = calibrate(
            self.source,
            self.recipe,
            self.token_ids,
            work,
            max_host_memory=self.options.max_host_memory,
            min_expert_tokens=self.options.min_expert_tokens,
            progress=progress,
        )
        stages = [stage.model_dump(mode="json") for stage in found.stages]
        more = {REPORT: (json.dumps(stages, indent=1) + "\n").encode()}
        convert(self.source, out, self.recipe, self.key, found.folding, more, progress)
        shutil.rmtree(work, ignore_errors=True)
        return True


def _token_ids(source: Checkpoint, recipe: Recipe, options: CalibrationOptions) -> NDArray[np.int64]:
    from step35_trt.quantize.calibration.texts import calibration_tokens
    from step35_trt.runtime.dialogue.text import Text

    assert recipe.calibration is not None
    if not (source.directory / "tokenizer.json").is_file():
        raise UsageError(
            f"recipe {recipe.name} is calibrated on text and {source.directory} has no tokenizer.json",
            "Put the model's tokenizer beside its weights.",
        )
    text = Text.load(source.directory)
    length = min(recipe.calibration.sequence, source.config.max_position_embeddings)
    return calibration_tokens(text, options.text, recipe.calibration.tokens, length)
