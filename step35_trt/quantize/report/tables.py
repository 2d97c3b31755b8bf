"""The report as sentences and tables, for the terminal and the page alike."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from step35_trt.pages.table import Table
from step35_trt.quantize.report.layers import stage_lines

if TYPE_CHECKING:
    from step35_trt.quantize.report.data import Quality, QuantizationReport

MOST_NAMED = 12  # experts in a cell
MISSING = "-"


def heading(report: QuantizationReport) -> str:
    """What was done."""
    before, after = (sum(getattr(g, side) for g in report.groups) for side in ("before", "after"))
    return (
        f"Recipe {report.recipe.name}: {size(before)} became {size(after)}, {after / before:.1%} of the "
        "original."
    )


def verdict(report: QuantizationReport) -> str:
    """How the predictions changed, in a sentence; empty where that was not measured."""
    if report.quality is None:
        return ""
    decoder = report.quality.agreements[0]
    change = decoder.perplexity_after / decoder.perplexity_before - 1
    return (
        f"Held-out perplexity {decoder.perplexity_before:.4f} became {decoder.perplexity_after:.4f} "
        f"({change:+.2%}); mean KL {decoder.mean_kl:.4g} nats, the recipe allows "
        f"{report.recipe.max_mean_kl:g}."
    )


def within(report: QuantizationReport) -> bool:
    """Whether the decoder's mean KL is what the recipe allows; a NaN is not."""
    return report.quality is None or report.quality.agreements[0].mean_kl <= report.recipe.max_mean_kl


def basis(report: QuantizationReport) -> tuple[str, ...]:
    """What the figures rest on."""
    lines = ["Errors are relative in the Frobenius norm, a stage's weights weighed by their bytes before."]
    if report.compared < 1:
        lines.append(
            f"Weight errors are computed from {report.compared:.1%} of the weights, spread over every matrix."
        )
    if report.seen:
        text = "the calibration text" if report.calibrated else "the held-out text"
        lines.append(f"Output errors, routing and coverage are from {report.seen:,} tokens of {text}.")
        lines.append(
            "Output error is one stage's own: quantised weights on the original's hidden states, beside what "
            "the stage adds to them."
        )
        lines.append(
            "A routing flip is beyond rounding where the scores of the last chosen expert and the first one "
            "left out lie further apart than rounding the router's input to bf16 once can move them."
        )
    else:
        lines.append("Nothing was run: --evaluate measures outputs, routing and predictions.")
    if report.quality:
        lines.append(_text(report.quality))
        lines.append(
            "Drift is how far the quantised model's hidden states have moved from the original's, all "
            "earlier stages quantised as well."
        )
        if report.recipe.activations == "fp8":
            lines.append("Activations are rounded to FP8 with one scale a token where the weights are FP8.")
        if report.recipe.activations == "int8":
            lines.append("Activations are not rounded here; the engine rounds them to int8 as well.")
    return tuple(lines)


def tables(report: QuantizationReport) -> tuple[Table, ...]:
    """Everything the report says in figures."""
    found = [_predictions(report.quality)] if report.quality else []
    found += [_bytes(report), _stages(report)]
    if any(stage.coverage for stage in report.stages):
        found.append(_coverage(report))
    return tuple(found)


def size(nbytes: float) -> str:
    """Bytes with three digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}" if nbytes < 100 * scale else f"{nbytes / scale:,.0f} {unit}"
    return f"{nbytes / 1e3:.3g} kB"


def _text(quality: Quality) -> str:
    line = (
        f"Predictions are compared on {quality.sequences} sequences of {quality.length} tokens from "
        f"{quality.text}."
    )
    if quality.in_calibration is not None:
        line += f" {quality.in_calibration:.2%} of its runs of 32 tokens occur in the calibration text."
    return line


def _predictions(quality: Quality) -> Table:
    rows = []
    for part in quality.agreements:
        perplexities = (part.perplexity_before, part.perplexity_after)
        accepted = (part.accepted_before, part.accepted_after)
        rows.append(
            (
                part.part,
                f"{part.mean_kl:.4g}",
                f"{part.max_kl:.3g}",
                f"{part.same_top:.1%}",
                *(MISSING if part.part != "decoder" else f"{value:.4f}" for value in perplexities),
                *(MISSING if share is None else f"{share:.1%}" for share in accepted),
            )
        )
    columns = ("part", "mean KL", "max KL", "same top", "PPL before", "after", "drafts before", "after")
    return Table(
        "Predictions on held-out text",
        columns,
        tuple(rows),
        "KL in nats. PPL: perplexity of a token. Drafts: share of rows where a module says what the decoder "
        "of the same model says there.",
    )


def _bytes(report: QuantizationReport) -> Table:
    rows = [
        (
            group.group,
            f"{group.parameters:,}",
            ", ".join(group.codings),
            size(group.before),
            size(group.after),
            f"{group.after / group.before:.3f}",
        )
        for group in report.groups
    ]
    before, after = (sum(getattr(g, side) for g in report.groups) for side in ("before", "after"))
    count = sum(group.parameters for group in report.groups)
    rows.append(("all", f"{count:,}", "", size(before), size(after), f"{after / before:.3f}"))
    columns = ("group", "parameters", "stored as", "before", "after", "ratio")
    return Table("Bytes on disk, scales included", columns, tuple(rows))


def _stages(report: QuantizationReport) -> Table:
    rows = []
    for line in stage_lines(report):
        figures = (line.output_error, line.drift)
        shares = (line.flips, line.beyond)
        rows.append(
            (
                line.name,
                f"{line.weight_error:.4f}",
                *(MISSING if value is None else f"{value:.4f}" for value in figures),
                *(MISSING if value is None else f"{value:.2%}" for value in shares),
                size(line.before),
                size(line.after),
            )
        )
    columns = (
        "stage",
        "weight error",
        "output error",
        "drift",
        "routing flips",
        "beyond rounding",
        "before",
        "after",
    )
    return Table("Stages", columns, tuple(rows))


def _coverage(report: QuantizationReport) -> Table:
    rows = []
    for stage in report.stages:
        if stage.coverage is None:
            continue
        tokens, fallback = stage.coverage.tokens, stage.coverage.fallback
        named = ", ".join(map(str, fallback[:MOST_NAMED]))
        if len(fallback) > MOST_NAMED:
            named += f" and {len(fallback) - MOST_NAMED} more"
        rows.append(
            (
                stage.name,
                str(min(tokens)),
                f"{statistics.median(tokens):g}",
                str(max(tokens)),
                str(tokens.count(0)),
                str(len(fallback)) if report.calibrated else MISSING,
                (named or MISSING) if report.calibrated else MISSING,
            )
        )
    columns = ("stage", "fewest tokens", "median", "most", "never chosen", "fallback", "which experts")
    note = ""
    if report.calibrated:
        least = next(stage.coverage.least for stage in report.stages if stage.coverage)
        note = (
            f"Experts with fewer than {least} tokens fall back: they are quantised from their weights alone."
        )
    return Table("Expert coverage", columns, tuple(rows), note)
