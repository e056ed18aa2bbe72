"""`omnimix text generate`: a run goes on with the user's text. Nothing of the training stack is imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from ...backbones.decoding import DiffusionConfig, GenerationConfig, Prefix, load_prefix, save_prefix
from ...errors import ConfigError
from ...modalities.text.text_generator import TextGenerator
from ...utils.console import emit, visible
from ...utils.devices import usable_device
from ...utils.options import add_device, add_json, renamed_option
from ...utils.run_folder import RunFolder

# Options of one kind of decoding only.
AUTOREGRESSIVE = ("top_k", "min_p", "repetition_penalty", "num_beams", "chunk")
DIFFUSION = ("steps", "block", "threshold")
TEMPERATURE = 0.8


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="omnimix text generate",
        description="Go on with each prompt; words are shown as they are written. Without a prompt, or with '-', the "
        "prompt is standard input; where that is a terminal, a new document is begun.",
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="the text to go on with; '-' is standard input")
    parser.add_argument("--run", required=True, help="folder of the run, or its name under runs/")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="tokens to generate at most (%(default)s)")
    renamed_option(parser, "--max_tokens", "--max_new_tokens", int)
    parser.add_argument(
        "--temperature", type=float, help=f"0 takes the most probable token ({TEMPERATURE}; with --num_beams 0)"
    )
    parser.add_argument("--top_p", type=float, default=0.95, help="draw from this part of probability (%(default)s)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's message in a conversation")
    parser.add_argument("--echo", action=argparse.BooleanOptionalAction, help="show the prompt; as on a terminal")
    add_device(parser, default="cuda" if torch.cuda.is_available() else "cpu")
    add_json(parser)
    left = parser.add_argument_group("models that write from left to right")
    left.add_argument("--top_k", type=int, help="draw among the k likeliest tokens")
    left.add_argument("--min_p", type=float, help="draw among tokens with this share of the likeliest's probability")
    left.add_argument("--repetition_penalty", type=float, help="above 1: what was written already is less likely")
    left.add_argument(
        "--num_beams", type=int, help="hypotheses of a beam search for the most probable text; shown when found"
    )
    renamed_option(parser, "--beams", "--num_beams", int)
    left.add_argument("--chunk", type=int, help="read prompts in pieces of so many tokens, to bound the memory")
    left.add_argument(
        "--prefix",
        metavar="FILE",
        help="the state after a long text: where FILE is missing the prompt is read and its state written there, "
        "where it exists the prompts stand behind it",
    )
    hidden = parser.add_argument_group("models that write by diffusion")
    hidden.add_argument("--steps", type=int, help="passes through the model; default: one a token")
    hidden.add_argument("--block", type=int, help="tokens that are written at a time; default: the model's choice")
    hidden.add_argument("--threshold", type=float, help="a step reveals all tokens with at least this probability")
    return parser


def main(argv: list[str]) -> int:
    """`omnimix text generate`."""
    options = _parser().parse_args(argv)
    given = Path(options.run)
    folder = given if (given / "model.safetensors").is_file() else RunFolder.finished(options.run).path
    writer = TextGenerator.load(folder, device=usable_device(options.device))
    config = _config(writer, options)
    prompts = _prompts(options.prompts)
    prefix = None
    if options.prefix is not None:
        prefix, prompts = _prefix(writer, Path(options.prefix), prompts, options)
    wrapped: list[Any] = [[{"role": "user", "content": p}] if options.chat else p for p in prompts]
    if options.json is not None:
        results = writer.generate(wrapped, config, stop=options.stop, prefix=prefix)
        rows = [
            {"prompt": prompt, "text": result.text, "tokens": len(result.tokens), "reason": result.reason}
            for prompt, result in zip(prompts, results, strict=True)
        ]
        emit(f"written by {folder}", rows, options.json)
        return 0
    echo = sys.stdout.isatty() if options.echo is None else options.echo
    try:
        for number, (prompt, text) in enumerate(zip(prompts, wrapped, strict=True)):
            if writer.diffusion and sys.stdout.isatty():
                # It clears the lines that it has used: what stays is written afterwards.
                pieces = iter([unmasked(writer, text, config, options.stop, number, Console())])
            else:
                pieces = writer.stream(text, config, stop=options.stop, prefix=prefix, number=number)
            _show(prompt if echo else "")
            for piece in pieces:
                _show(piece)
            _show("\n")
    except KeyboardInterrupt:
        _show("\n")
        return 130
    return 0


def unmasked(
    writer: TextGenerator, prompt: Any, config: DiffusionConfig, stop: Sequence[str], number: int, console: Console
) -> str:
    """What diffusion writes behind a prompt; until it is done the console shows it with its hidden tokens."""
    mask = writer.model.mask_token

    with Live(console=console, auto_refresh=False, transient=True) as live:

        def show(sequences: list[list[int]]) -> None:
            spans = groupby(sequences[0], mask.__eq__)
            shown = ("░" * len(list(ids)) if hidden else writer.tokenizer.decode(list(ids)) for hidden, ids in spans)
            live.update(Text(visible("".join(shown), keep="\n\t")), refresh=True)

        [result] = writer.generate([prompt], config, stop=stop, numbers=[number], watch=show)
    return result.text


def _show(text: str) -> None:
    # A model may have learned escape sequences, which a terminal would obey; a file gets what was written.
    sys.stdout.write(visible(text, keep="\n\t") if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _prompts(words: Sequence[str]) -> list[str]:
    if not words:
        return ["" if sys.stdin.isatty() else sys.stdin.read()]
    if list(words).count("-") > 1:
        raise ConfigError("'-' is given twice; standard input can be read once")
    return [sys.stdin.read() if word == "-" else word for word in words]


def _config(writer: TextGenerator, options: argparse.Namespace) -> GenerationConfig | DiffusionConfig:
    """The options as the model's decoder takes them.

    Raises:
        ConfigError: an option of the other kind of decoding.
    """
    own, other = (DIFFUSION, (*AUTOREGRESSIVE, "prefix")) if writer.diffusion else (AUTOREGRESSIVE, DIFFUSION)
    for name in other:
        if getattr(options, name) is not None:
            way = "by diffusion" if writer.diffusion else "from left to right"
            raise ConfigError(
                f"--{name} does not apply: a model with objective {writer.model.config.objective.type!r} writes {way}, "
                f"with {', '.join(f'--{option}' for option in own)}"
            )
    more = {name: getattr(options, name) for name in own if getattr(options, name) is not None}
    temperature = options.temperature
    if temperature is None:
        temperature = 0.0 if more.get("num_beams", 1) > 1 else TEMPERATURE
    shared = {"temperature": temperature, "top_p": options.top_p, "seed": options.seed}
    if not writer.diffusion:
        return GenerationConfig(max_new_tokens=options.max_new_tokens, **shared, **more)
    if "threshold" in more:
        more["remask"] = "threshold"
    return DiffusionConfig(max_new_tokens=options.max_new_tokens, **shared, **more)


def _prefix(
    writer: TextGenerator, file: Path, prompts: list[str], options: argparse.Namespace
) -> tuple[Prefix, list[str]]:
    """The state in `file` and the prompts behind it; where there is none yet, it is made of the only prompt."""
    if file.exists():
        return load_prefix(file, writer.model), prompts
    if len(prompts) > 1 or options.chat:
        raise ConfigError(f"there is no {str(file)!r} yet; its text is to be the only prompt, and no --chat")
    prefix = writer.read(prompts[0], chunk=options.chunk)
    save_prefix(file, prefix, writer.model)
    return prefix, [""]
