"""What a calibration found, stage by stage, as data."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ScaleReport(BaseModel):
    """One searched input scale.

    Attributes:
        consumers: The matrices that share the input.
        expert: Whose, for routed experts' own scales.
        alpha: AWQ's exponent; None where no scale was better than any.
        error: Relative squared error of the products with it, summed over the kinds of consumers.
        unscaled: The same without a scale.
    """

    model_config = ConfigDict(frozen=True)
    consumers: tuple[str, ...]
    expert: int | None = None
    alpha: float | None
    error: float
    unscaled: float


class MatrixReport(BaseModel):
    """One matrix. Errors are relative in the Frobenius norm, in the coordinates of the original model.

    Attributes:
        name: As published.
        coding: How it is stored.
        weight_error: `|W' - W| / |W|`.
        output_error: `|X W'^T - X W^T| / |X W^T|` over a sample of the inputs; None without inputs.
        experts: The weight error of each stacked expert.
        clipped: Share of the groups that are clipped.
        bytes_before: On disk, scales included.
        bytes_after: As `coding` stores it, scales included.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    coding: str
    weight_error: float
    output_error: float | None
    experts: tuple[float, ...] = ()
    clipped: float = 0.0
    bytes_before: int
    bytes_after: int


class RoutingReport(BaseModel):
    """Choices of experts in the quantised stage against the original one, on the same states.

    A token flips where the set of chosen experts differs. A flip counts as `beyond_rounding` where the
    original scores of the last chosen expert and the first one left out lie further apart than rounding the
    router's input to bf16 once can move them: what no bf16 engine can be blamed for is not counted.
    """

    model_config = ConfigDict(frozen=True)
    tokens: int
    flips: int
    beyond_rounding: int


class Coverage(BaseModel):
    """How the calibration text reached the experts of one layer.

    Attributes:
        tokens: Of each expert.
        least: Tokens an expert needs to be calibrated by its inputs.
        fallback: Experts with fewer. They are quantised by their weights alone: no scale of their own for
            `down_proj`, and groups clipped by the error of the weights.
    """

    model_config = ConfigDict(frozen=True)
    tokens: tuple[int, ...]
    least: int
    fallback: tuple[int, ...]


class StageReport(BaseModel):
    """One stage.

    Attributes:
        name: `embedding`, `layer-i`, `head` or `mtp-k`.
        output_error: Of the stage quantised as a whole: a layer's is relative to what it adds to its input, a
            module's to its output. None for the embedding and the head.
        matrices: Each matrix.
        scales: Each searched scale.
        coverage: Of a layer with experts.
        routing: Of a layer with experts.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    output_error: float | None
    matrices: tuple[MatrixReport, ...]
    scales: tuple[ScaleReport, ...] = ()
    coverage: Coverage | None = None
    routing: RoutingReport | None = None
