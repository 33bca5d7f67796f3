"""tersor run: generate from a prompt, or chat."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor.cli import options

if TYPE_CHECKING:
    from collections.abc import Generator

    from tersor.engine import Generation, Model, Request


def command(
    context: typer.Context,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Hugging Face directory, .gguf file or hub id.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Answer this and stop; without it, chat line by line.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message of the chat.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as plain text, without the chat template.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", metavar="N", help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", metavar="X", help="0 = always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", metavar="N", help="Sample among this many likeliest tokens; 0 = all.")] = 0,
    top_p: Annotated[
        float, typer.Option("--top-p", metavar="X", help="Sample among the likeliest tokens of this total probability.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option("--min-p", metavar="X", help="Drop tokens below this share of the likeliest one's probability.")
    ] = 0.0,
    repeat_penalty: Annotated[float, typer.Option("--repeat-penalty", metavar="X", help="Above 1 makes seen tokens less likely.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the sampling.")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="String that ends the answer; may be repeated.")] = None,
    lookup: Annotated[
        int,
        typer.Option("--lookup", metavar="N", help="Draft up to N tokens, at most 15, from earlier text; the same answer, often sooner."),
    ] = 0,
    activations: options.Activations = "int8",
    kv: options.Kv = "f16",
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Answer a prompt, or chat.

    Generates with PATH: the answer to a prompt, or a chat when there is none.
    The answer goes to stdout as it is made, tokens per second to stderr.
    """
    from tersor.cli.printing import print_json
    from tersor.engine import Request, load
    from tersor.errors import RecipeError

    if temperature == 0:
        options.refuse_given(context, ("top_k", "top_p", "min_p"), "chooses among tokens to draw from; give --temperature above 0")
    request = Request(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        repeat_penalty=repeat_penalty,
        stop=tuple(stop or ()),
        lookup=lookup,
    )
    if prompt is None and (raw or json):
        raise RecipeError(f"run {'--raw' if raw else '--json'} needs a prompt; give -p")
    if raw and system is not None:
        raise RecipeError("run --raw uses no chat template, so --system has no place; drop one of them")
    model = load(path, threads=threads, activations=activations, kv=kv)
    templated = model.tokenizer.chat_template is not None and not raw
    if (prompt is None or system is not None) and not templated:
        raise RecipeError(f"run: {path} has no chat template; give a plain prompt with -p and no --system")
    messages = [{"role": "system", "content": system}] if system is not None else []
    if prompt is None:
        _chat(model, request, messages)
        return
    session = model.session()
    stream = session.stream([*messages, {"role": "user", "content": prompt}] if templated else prompt, request)
    result = _show(stream, quiet=json)
    if json:
        print_json(vars(result) | {"prefill_rate": result.prefill_rate, "decode_rate": result.decode_rate})


def _chat(model: Model, request: Request, messages: list[dict[str, str]]) -> None:
    """Answers line by line until the input ends; the conversation stays in the cache."""
    session = model.session()
    terminal = sys.stdin.isatty()
    if terminal:
        print("Chat; an empty line or Ctrl-D ends it.", file=sys.stderr)
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        messages.append({"role": "user", "content": line})
        result = _show(session.stream(messages, request))
        messages.append({"role": "assistant", "content": result.text})


def _show(stream: Generator[str, None, Generation], quiet: bool = False) -> Generation:
    """Prints the pieces as they come and the rates at the end."""
    pieces: Any = stream
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            result: Generation = end.value
            break
        if not quiet:
            print(piece, end="", flush=True)
    if not quiet:
        print(flush=True)
    prefill = f"prefill {result.prompt_tokens - result.cached_tokens} tokens at {result.prefill_rate:.0f} t/s"
    drafts = f", {result.accepted} of {result.drafted} drafted were right" if result.drafted else ""
    print(f"{prefill}, decode {len(result.tokens)} at {result.decode_rate:.0f} t/s{drafts}, ended by {result.finish}", file=sys.stderr)
    return result
