"""Does drafting pay: tokens/s of every depth against none, on nano, greedy, held-out text, in one run."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.nano import prompts, session
from step35_trt.runtime.decoding.depth import DepthController
from step35_trt.runtime.decoding.generate import generate
from step35_trt.runtime.decoding.generation_stats import GenerationStats
from step35_trt.runtime.decoding.sampling import SamplingParams

DEPTHS = (0, 1, 2, 3, "auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="cpu-int4")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = session(options.engine, Path(directory))
        rates: dict[str, list[float]] = {str(depth): [] for depth in DEPTHS}
        lengths: dict[str, list[float]] = {str(depth): [] for depth in DEPTHS}
        drafted, accepted = np.zeros(3), np.zeros(3)
        learned = DepthController(
            model.config.num_nextn_predict_layers
        )  # kept between prompts, as in a batch
        for number, prompt in enumerate(prompts(options.prompts + 1, 64)):
            for depth in DEPTHS:  # interleaved: a change of the machine's speed meets all alike
                stats = GenerationStats()
                chunks = generate(
                    model,
                    prompt,
                    SamplingParams(),
                    max_tokens=options.tokens,
                    draft_tokens=learned if isinstance(depth, str) else depth,
                    stats=stats,
                )
                for _ in chunks:
                    pass
                if number:  # the first round warms up
                    rates[str(depth)].append(stats.tokens_per_second)
                    lengths[str(depth)].append(stats.mean_accepted_length)
                    if depth == 3:
                        drafted += stats.drafted
                        accepted += stats.accepted
    rows = {
        depth: {
            "tokens_per_second": round(float(np.median(values)), 1),
            "quartiles": [round(float(q), 1) for q in np.quantile(values, (0.25, 0.75))],
            # Of neighbours in time: the median ratio of a prompt's runs.
            "ratio_to_no_drafts": round(float(np.median(np.divide(values, rates["0"]))), 3),
            "mean_accepted_length": round(float(np.mean(lengths[depth])), 3),
        }
        for depth, values in rates.items()
    }
    acceptance = [round(float(share), 3) for share in accepted / np.maximum(drafted, 1)]
    if options.json:
        print(json.dumps({"engine": options.engine, "depths": rows, "acceptance_by_head": acceptance}))
        return
    print(
        f"nano, {options.engine}, {options.prompts} prompts x {options.tokens} tokens, greedy, held-out text"
    )
    for depth, row in rows.items():
        print(
            f"drafts {depth:>4}: {row['tokens_per_second']:7.1f} tokens/s {row['quartiles']}, "
            f"{row['ratio_to_no_drafts']:.2f}x none, mean accepted length {row['mean_accepted_length']:.2f}"
        )
    print(f"acceptance of head 1, 2, 3 (each given the ones before): {acceptance}")


if __name__ == "__main__":
    main()
