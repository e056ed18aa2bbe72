"""The command `omnimix`. It imports only what the chosen command needs, so that `--help` answers at once."""

from __future__ import annotations

import errno
import gc
import io
import os
import sys
from importlib import import_module

# Command -> the function that runs it with the remaining arguments, and what it does.
COMMANDS = {
    "vision fit": (".recipes.vision.recipe:fit", "train an image classifier (default: handwritten digits)"),
    "vision validate": (".recipes.vision.recipe:validate", "evaluate a run on the validation split"),
    "vision test": (".recipes.vision.recipe:test", "evaluate a run on the test split"),
    "vision predict": (".recipes.vision.predict:main", "classify image files with a run"),
    "video fit": (".recipes.video.recipe:fit", "train a video classifier (default: moving digits)"),
    "video validate": (".recipes.video.recipe:validate", "evaluate a run on the validation split"),
    "video test": (".recipes.video.recipe:test", "evaluate a run on the test split, from several views"),
    "video predict": (".recipes.video.predict:main", "classify clips, or label long videos over time"),
    "audio fit": (".recipes.audio.recipe:fit", "train an audio classifier (default: vowels and notes)"),
    "audio validate": (".recipes.audio.recipe:validate", "evaluate a run on the validation split"),
    "audio test": (".recipes.audio.recipe:test", "evaluate a run on the test split"),
    "audio predict": (".recipes.audio.predict:main", "classify audio files with a run, or label recordings over time"),
    "text eval": (".recipes.text.evaluate:main", "evaluate a language model on lm-eval tasks"),
    "text fit": (".recipes.text.recipe:fit", "train a language model (default: the standard library's sources)"),
    "text validate": (".recipes.text.recipe:validate", "evaluate a run in bits per byte on the validation split"),
    "text generate": (".recipes.text.generate:main", "continue a prompt or standard input with a run"),
    "data shard": (".cli.shard:main", "write folders of labelled files into tar shards"),
    "compare": (".recipes.compare:main", "compare runs: numbers, curves, and what each gets right"),
    "export": (
        ".recipes.export:main",
        "write a run's model as ONNX or in other formats, and compare",
    ),
    "list mixers": (".cli.commands:list_mixers", "the sequence mixers"),
    "list objectives": (".cli.commands:list_objectives", "what language models are trained for"),
    "list models": (".cli.commands:list_models", "the models that create_model builds by name"),
    "list recipes": (".cli.commands:list_recipes", "the training recipes and their configurations"),
    "env": (".cli.commands:env", "versions, devices, and the backend of every kernel with the reason"),
    "mixers check": (
        ".cli.mixers_check:main",
        "run all that concerns one mixer: lint, documentation, laws, compilation",
    ),
    "kernels check": (".cli.check_kernels:main", "compare every kernel with the float64 oracle on this device"),
    "kernels compile": (".cli.compile_kernels:main", "compile the Triton kernels ahead of time for named GPUs"),
    "kernels explain": (".cli.commands:explain", "which backend serves an op, and why"),
    "bench kernels": (".cli.bench_kernels:main", "time the kernels"),
    "bench blocks": (".cli.bench_blocks:main", "time blocks, compared with other packages"),
    "bench models": (".cli.bench_models:main", "time whole models, compared with other packages"),
    "bench reading": (".cli.bench_reading:main", "time reading images from shards, compared with torchvision"),
    "bench decode": (".cli.bench_decode:main", "time decoding against the length of the context"),
}

# What the system says of files where a user, and no change to the program, can help -> how.
REMEDIES = {
    errno.ENOSPC: "make room on its disk, or name another place",
    errno.EDQUOT: "make room within the quota of its disk, or name another place",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or name another place",
    errno.EACCES: "change the rights to it, or name another place",
    errno.EROFS: "name another place",
    errno.ENOTDIR: "a file stands where a directory is needed; name another place",
}
# What shells report of a program that a closed pipe has ended: 128 + SIGPIPE.
CLOSED = 141


def usage(group: str | None = None) -> str:
    rows = [(name, text) for name, (_, text) in COMMANDS.items() if group is None or name.split()[0] == group]
    width = max(len(name) for name, _ in rows)
    lines = [f"  omnimix {name:<{width}}  {text}" for name, text in rows]
    return "\n".join(
        [
            "usage: omnimix COMMAND [OPTIONS]        (omnimix COMMAND --help for its options)",
            "",
            *lines,
            "",
            "  --debug    show the traceback of an error",
            "  --version  print the version",
        ]
    )


def unknown(words: list[str]) -> int:
    import difflib

    tried = " ".join(words)
    near = difflib.get_close_matches(tried, COMMANDS, n=1) or difflib.get_close_matches(
        words[0], [*COMMANDS, *{name.split()[0] for name in COMMANDS}], n=1
    )
    hint = f"did you mean 'omnimix {near[0]}'?" if near else "see omnimix --help"
    complain(f"unknown command {tried!r}; {hint}")
    return 2


def run(argv: list[str]) -> int:
    words = argv[:2]
    name = next((name for name in (" ".join(words), words[0]) if name in COMMANDS), None)
    if name is None:
        groups = {command.split()[0] for command in COMMANDS}
        if words[0] in groups and (len(words) == 1 or words[1] in {"-h", "--help"}):
            print(usage(words[0]), file=sys.stdout if len(words) > 1 else sys.stderr)
            return 0 if len(words) > 1 else 2
        return unknown([word for word in words if not word.startswith("-")] or words)
    module, function = COMMANDS[name][0].split(":")
    from .utils.cache import name_caches_without_home

    name_caches_without_home()
    # What these imports make lives to the end: looking for garbage among it takes a fifth of the start.
    gc.disable()
    command = getattr(import_module(module, package=__package__), function)
    gc.freeze()
    gc.enable()
    from .utils.log import printed
    from .utils.options import underscored

    with printed():
        return command(underscored(argv[len(name.split()) :])) or 0


def answer(argv: list[str]) -> int:
    if not argv or argv[0] in {"-h", "--help", "help"}:
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        from . import __version__

        print(f"omnimix {__version__}")
        return 0
    return run(argv)


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    for output in (sys.stdout, sys.stderr):
        # A console of another encoding than UTF-8 shows the escapes of what it lacks.
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")
    from .errors import OmnimixError

    try:
        try:
            return answer([word for word in argv if word != "--debug"])
        finally:
            # What cannot be written is to fail here, and not where the interpreter ends.
            sys.stdout.flush()
    except OmnimixError as error:
        if debug:
            raise
        complain(error)
        return 2
    except OSError as error:
        lost = output_is_lost()
        if lost and isinstance(error, BrokenPipeError):
            return CLOSED
        text = of_the_system(error, lost)
        if debug or text is None:
            raise
        complain(text)
        return 2
    except SystemExit as error:
        # So rich ends a program whose reader is gone.
        if isinstance(error.__context__, BrokenPipeError):
            return CLOSED
        raise
    except KeyboardInterrupt:
        return 130


def complain(error: object) -> None:
    from .utils.console import say

    say(f"omnimix: error: {error}", error=True, keep="\n")


def output_is_lost() -> bool:
    """Whether standard output takes no more: its reader, such as `head`, has enough, or its disk is full.

    It is then turned to nowhere, so that the interpreter's own flush at the end does not fail again.
    """
    try:
        sys.stdout.flush()
        if not reader_is_gone():
            return False
    except OSError:
        pass
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return True


def reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads; of an unbuffered one a flush, with nothing to write, does
    not tell."""
    import select

    try:
        asked = select.poll()
        asked.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))
    except (AttributeError, OSError):
        return False  # a system without poll, or an output that is no file


def of_the_system(error: OSError, lost: bool) -> str | None:
    """What a user can be told of an error of the system; None where it may be a mistake of the program.

    Args:
        lost: whether standard output takes no more.
    """
    # Where two files are named, as for a copy, the second is the one that is written.
    name = error.filename2 or error.filename
    if name is None and lost:
        name = "standard output"
    if error.errno not in REMEDIES or (name is None and error.errno in (errno.EACCES, errno.EROFS)):
        return None
    return f"{error.strerror}{'' if name is None else f': {str(name)!r}'}; {REMEDIES[error.errno]}"


def without_the_current_folder() -> None:
    """Import nothing from the current folder, which `python -m` puts in front of all packages.

    The files of a stranger's run may lie there. Where omnimix itself does, its user's packages do too.
    """
    here = os.getcwd()
    if getattr(sys.flags, "safe_path", False) or os.path.dirname(os.path.dirname(os.path.abspath(__file__))) == here:
        return
    sys.path[:1] = [] if sys.path[:1] in ([""], [here]) else sys.path[:1]
    # The processes that are started read it.
    os.environ["PYTHONSAFEPATH"] = "1"


if __name__ == "__main__":
    without_the_current_folder()
    sys.exit(main())
