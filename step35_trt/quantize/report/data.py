"""The report as data; `reports/quantization.json` is this."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from step35_trt.quantize.calibration.report import StageReport


class GroupBytes(BaseModel):
    """Weights of one part of the model: how they are stored, and bytes on disk with scales."""

    model_config = ConfigDict(frozen=True)
    group: str
    parameters: int
    codings: tuple[str, ...]
    before: int
    after: int


class Agreement(BaseModel):
    """Predictions of the decoder or of one MTP module, both models given the same text.

    Attributes:
        part: `decoder` or `mtp-k`.
        tokens: Rows that were compared.
        mean_kl: Mean of KL(reference || quantised), nats.
        max_kl: Largest of them.
        same_top: Share of rows with the same most likely token.
        perplexity_before: Of a token, by the reference.
        perplexity_after: By the quantised model.
        accepted_before: Share of rows where the reference's module says what its decoder says there; None for
            the decoder.
        accepted_after: The same within the quantised model.
    """

    model_config = ConfigDict(frozen=True)
    part: str
    tokens: int
    mean_kl: float
    max_kl: float
    same_top: float
    perplexity_before: float
    perplexity_after: float
    accepted_before: float | None = None
    accepted_after: float | None = None


class Quality(BaseModel):
    """The written checkpoint against the original, end to end.

    Attributes:
        text: Where the text comes from.
        sequences: How many.
        length: Tokens of each.
        in_calibration: Share of the text's windows of 32 tokens that calibration saw; None without any.
        drift: By stage, how far hidden states are from the original's, relative in the Frobenius norm.
        agreements: The decoder, then the modules.
    """

    model_config = ConfigDict(frozen=True)
    text: str
    sequences: int
    length: int
    in_calibration: float | None
    drift: dict[str, float]
    agreements: tuple[Agreement, ...]


class Recipe(BaseModel):
    """The recipe's part that the report shows."""

    model_config = ConfigDict(frozen=True)
    name: str
    summary: str
    activations: str
    max_mean_kl: float


class QuantizationReport(BaseModel):
    """Everything that is known of one conversion.

    Attributes:
        key: What it was made from; another key's report is made again.
        version: Of step35-trt.
        recipe: What was applied.
        seen: Tokens that `stages` were measured on; 0: weights only.
        compared: Share of the weights that weight errors are computed from.
        calibrated: Whether those tokens chose scales and clips as well.
        groups: Bytes.
        stages: By layer, head and module.
        quality: None where no held-out text was asked for.
    """

    model_config = ConfigDict(frozen=True)
    key: str
    version: str
    recipe: Recipe
    seen: int
    compared: float
    calibrated: bool
    groups: tuple[GroupBytes, ...]
    stages: tuple[StageReport, ...]
    quality: Quality | None
