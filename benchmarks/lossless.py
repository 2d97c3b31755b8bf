"""Greedy output with drafts equals output without, token for token: 200 prompts x 128 tokens, fp32 engine."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.nano import prompts, session
from step35_trt.runtime.decoding.generate import generate
from step35_trt.runtime.decoding.sampling import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory() as directory:
        model = session("cpu-fp32", Path(directory))
        for number, prompt in enumerate(prompts(options.prompts, 48)):
            answers = [
                [
                    token
                    for chunk in generate(
                        model, prompt, SamplingParams(), max_tokens=options.tokens, draft_tokens=depth
                    )
                    for token in chunk
                ]
                for depth in (0, 1, 2, 3, "auto")
            ]
            for depth, answer in zip((1, 2, 3, "auto"), answers[1:], strict=True):
                if answer != answers[0]:
                    different += 1
                    print(f"prompt {number}, drafts {depth}: differs from no drafts")
            if number % 20 == 19:
                print(f"{number + 1} prompts, {different} differences", file=sys.stderr)
    print(
        f"{options.prompts} prompts x {options.tokens} tokens, drafts 1, 2, 3, auto: {different} differences"
    )
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
