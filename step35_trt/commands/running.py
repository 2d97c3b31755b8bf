"""Commands that run a model: text, batches, logits."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import rich_click as click

from step35_trt import console
from step35_trt.commands import parameters
from step35_trt.commands.parameters import PATH, token_ids
from step35_trt.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.runtime.decoding.generation_stats import GenerationStats

COMPLETION_TOKENS = 128


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--prompt", help="Text to continue.")
@click.option("--chat", "chatting", is_flag=True, help="Talk at the terminal instead.")
@click.option("--prompt-ids", help="Token ids to continue, separated by commas.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="128 unless given; for --chat, the context.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--top-k", default=0, show_default=True, help="0 keeps every token.")
@click.option("--min-p", default=0.0, show_default=True)
@click.option("--seed", type=int, help="Makes sampled output repeatable.")
@click.option("--stop", multiple=True, help="Text that ends the answer; may be given several times.")
@click.option(
    "--draft-tokens", default="auto", show_default=True, help="MTP drafts a round: 0 to 3, or auto."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a stream.")
def generate(
    bundle: Path,
    prompt: str | None,
    chatting: bool,
    prompt_ids: str | None,
    max_tokens: int | None,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    seed: int | None,
    stop: tuple[str, ...],
    draft_tokens: str,
    as_json: bool,
) -> None:
    """Continue a prompt with a bundle, streaming text."""
    from step35_trt.commands.chatting import chat
    from step35_trt.runtime.decoding.generate import generate as run
    from step35_trt.runtime.decoding.generation_stats import GenerationStats
    from step35_trt.runtime.decoding.sampling import SamplingParams
    from step35_trt.runtime.dialogue.answer_text import complete
    from step35_trt.runtime.load import load_text, open_bundle

    if [prompt is not None, prompt_ids is not None, chatting].count(True) != 1:
        raise UsageError("give either --prompt, --prompt-ids or --chat")
    if chatting and as_json:
        raise UsageError("--json is for one answer, not for --chat")
    asked = None if prompt_ids is None else token_ids(prompt_ids)
    sampling = SamplingParams(temperature, top_p, top_k, min_p, seed)
    drafts = parameters.draft_tokens(draft_tokens)
    session = open_bundle(bundle)
    text = load_text(bundle, required=prompt is not None or chatting)
    if text is None and stop:
        raise UsageError(
            f"--stop takes text, and {bundle} has no tokenizer to tell where an answer has it",
            "Leave --stop out: the answer ends at the model's own stop ids or at --max-tokens.",
        )
    if chatting and text is not None:
        chat(
            session,
            text,
            sampling,
            max_tokens=max_tokens or session.max_tokens,
            stop_strings=stop,
            draft_tokens=drafts,
        )
        return
    max_tokens = max_tokens or COMPLETION_TOKENS
    if asked is not None:
        ids = _checked(asked, session.config.vocab_size)
    else:
        assert text is not None
        assert prompt is not None
        ids = text.encode(prompt)
    stats, taken, answer = GenerationStats(), list[int](), list[str]()
    stop_ids = session.config.eos_token_id
    if text is None:
        for chunk in run(
            session, ids, sampling, max_tokens=max_tokens, stop_ids=stop_ids, draft_tokens=drafts, stats=stats
        ):
            taken += chunk
    else:
        for piece in complete(
            session,
            text,
            ids,
            sampling,
            max_tokens=max_tokens,
            stop_ids=stop_ids,
            stop_strings=stop,
            draft_tokens=drafts,
            stats=stats,
            token_ids=taken,
        ):
            answer.append(piece)
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
    if as_json:
        result = {"text": "".join(answer) if text else None, "token_ids": taken}
        console.print_json(result | {"finish_reason": stats.finish_reason, "stats": _summary(stats)})
        return
    sys.stdout.write("\n" if text else ",".join(map(str, taken)) + "\n")
    acceptance = ", ".join(f"{share:.0%}" for share in stats.acceptance)
    console.say(
        f"{stats.generated_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s; "
        f"mean accepted length {stats.mean_accepted_length:.2f}"
        + (f"; acceptance by head {acceptance}" if acceptance else "")
    )


@click.command()
@click.argument("model")
@click.option("--ids", required=True, help="Token ids, separated by commas.")
@click.option("-o", "--output", required=True, type=PATH, help="An .npz file.")
def logits(model: str, ids: str, output: Path) -> None:
    """Write logits, hidden states and MTP logits of given tokens; MODEL is a bundle or a checkpoint."""
    import numpy as np

    from step35_trt.evaluate import evaluate
    from step35_trt.journal import replacing
    from step35_trt.runtime.load import load_any

    session = load_any(model)
    result = evaluate(session, np.array(_checked(token_ids(ids), session.config.vocab_size)))
    with replacing(output) as stream:
        np.savez(stream, logits=result.logits, hidden=result.hidden, mtp_logits=result.mtp_logits)
    console.say(f"{output}: {len(result.logits)} tokens")


def _checked(ids: list[int], vocabulary: int) -> list[int]:
    for token in ids:
        if not 0 <= token < vocabulary:
            raise UsageError(f"token id {token} lies outside the vocabulary of {vocabulary}")
    return ids


def _summary(stats: GenerationStats) -> dict[str, object]:
    return {
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "acceptance": list(stats.acceptance),
        "mean_accepted_length": stats.mean_accepted_length,
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        "tokens_per_second": stats.tokens_per_second,
    }
