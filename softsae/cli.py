"""The command line: softsae demo | collect | train | sweep | eval | encode | recipes | info.

Every command is a dataclass of options (softsae/options.py) and a function (softsae/commands.py, demo.py,
sweep_command.py). Options come from --config FILE and --section.field VALUE, later ones win. What the user
can put right is told in one line, `softsae: error: ...`, with exit status 2; SOFTSAE_TRACEBACK=1 shows
where it was raised. Interrupted commands exit with 130.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
from pathlib import Path

from softsae.plugins import import_plugin

# Command -> (module of its function, what it does). Modules are imported when a command runs.
COMMANDS = {
    "demo": ("demo", "train SoftSAE and TopK on a real language model and show what they found"),
    "collect": ("commands", "write a language model's activations to a folder of shards"),
    "train": ("commands", "train a sparse autoencoder on activations"),
    "sweep": ("sweep_command", "train several autoencoders on one stream of activations and compare them"),
    "eval": ("commands", "evaluate a trained autoencoder on held-out activations and text"),
    "encode": ("encode", "write the codes of activations, their active latents, to a folder of shards"),
    "recipes": ("recipes", "list the recipes for softsae train --recipe, or print one"),
    "info": ("commands", "describe a run, a folder of activations, or this installation"),
}
# The option that a first word without a name stands for.
POSITIONAL = {"eval": "run", "encode": "run", "recipes": "name", "info": "path"}
USAGE = "usage: softsae [-h] [--version] COMMAND ..."


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        from softtopk import __version__

        print(f"softsae {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        return fail(f"unknown command {argv[0]!r}; choose one of {', '.join(COMMANDS)}")
    try:
        return run(argv[0], argv[1:])
    except KeyboardInterrupt as interruption:
        print(f"\nsoftsae: {interruption or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `softsae info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except tuple(user_errors()) as error:
        if os.environ.get("SOFTSAE_TRACEBACK"):
            raise
        return fail(str(error) or type(error).__name__)


def run(command: str, argv: list[str]) -> int:
    if command in POSITIONAL and argv and not argv[0].startswith("-"):
        argv = [f"--{POSITIONAL[command]}", *argv]
    argv = resumed(command, argv) + argv
    files = config_files(argv)
    argv = recipe_of(command, argv, files) + argv
    check_spelling(command, argv, files)
    parser = make_parser(command)
    try:
        parsed = parser.parse_args(argv)
        plugins = parsed.get("plugin") or []
        for plugin in [plugins] if isinstance(plugins, str) else plugins:
            import_plugin(plugin)  # before a configuration names what it registers
        options = vars(parser.instantiate(parsed))
    except argparse.ArgumentError as error:
        raise ValueError(f"{one_line(str(error))} (softsae {command} --help lists the options)") from None
    except ValueError as error:
        given = config_files(argv)
        raise ValueError(f"{error} (with {' and '.join(map(str, given))})" if given else str(error)) from None
    names = {field.name for field in dataclasses.fields(options_class(command))}
    options = options_class(command)(**{name: options[name] for name in names})
    module = importlib.import_module(f"softsae.{COMMANDS[command][0]}")
    getattr(module, "evaluate" if command == "eval" else command)(options)
    return 0


def make_parser(command: str):
    """The parser of one command, from its dataclass of options; booleans become flags."""
    from docstring_parser import parse_from_object
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    place = f"[{POSITIONAL[command].upper()}] " if command in POSITIONAL else ""
    parser = ArgumentParser(
        prog=f"softsae {command}",
        usage=f"%(prog)s {place}[--config FILE] [--option VALUE ...]",
        description=f"{COMMANDS[command][1]}.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="a YAML or JSON file with options")
    options = options_class(command)
    flags = {field.name for field in dataclasses.fields(options) if field.type == "bool"}
    documented = {entry.arg_name: entry.description for entry in parse_from_object(options).params}
    for name in sorted(flags):
        parser.add_argument(f"--{name}", action="store_true", help=documented[name])
    parser.add_class_arguments(options, skip=flags)
    return parser


def resumed(command: str, argv: list[str]) -> list[str]:
    """With --resume, the options of the run in --out, which those on the command line override."""
    wanted = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    wanted.add_argument("--out", default="runs/demo")
    wanted.add_argument("--resume", action="store_true")
    known, _ = wanted.parse_known_args(argv)
    if not known.resume:
        return []
    from softsae.runs import saved_options

    return ["--config", str(saved_options(Path(known.out), command))]


def config_files(argv: list[str]) -> list[Path]:
    """The files given to --config; the parser says what is wrong with a file that is not there."""
    wanted = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    wanted.add_argument("--config", action="append", default=[])
    try:
        files = wanted.parse_known_args(argv)[0].config
    except argparse.ArgumentError:
        return []
    return [Path(file) for file in files if Path(file).is_file()]


def recipe_of(command: str, argv: list[str], files: list[Path]) -> list[str]:
    """The recipe that the command line or a file names, as the first --config, so that others win."""
    if command != "train" or "--resume" in argv:
        return []
    from softsae import recipes
    from softsae.keys import read_yaml

    wanted = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    wanted.add_argument("--recipe")
    try:
        name = wanted.parse_known_args(argv)[0].recipe
    except argparse.ArgumentError:
        return []
    for file in reversed(files):
        values = read_yaml(file)
        name = name or (values.get("recipe") if isinstance(values, dict) else None)
    return [] if name is None else ["--config", str(recipes.file_of(name))]


def check_spelling(command: str, argv: list[str], files: list[Path]) -> None:
    """Raises ValueError, with the nearest option, for one in a file or on the command line that is none."""
    from softsae.keys import check_keys, keys_of, read_yaml, unknown

    options = options_class(command)
    for file in files:
        check_keys(options, read_yaml(file), str(file))
    known = keys_of(options)
    for word in argv:
        key = word[2:].partition("=")[0].removesuffix("+")  # + appends to a list
        inside = any(key.startswith(f"{name}.") for name, section in known.items() if not section)
        plain = {"config", "print_config", "help", *known}
        if word.startswith("--") and key and key not in plain and not inside:
            raise ValueError(f"{unknown(key, known, '--')} (softsae {command} --help lists the options)")


def options_class(command: str) -> type:
    from softsae import options

    return getattr(options, f"{command.capitalize()}Options")


def user_errors() -> list[type[Exception]]:
    """What a user's input can cause. Imported late: torch is not needed to print --help."""
    errors: list[type[Exception]] = [ValueError, TypeError, OSError, ImportError]
    if "softtopk.dispatch" in sys.modules:
        errors.append(sys.modules["softtopk.dispatch"].BackendUnavailable)
    return errors


def fail(message: str) -> int:
    print(f"softsae: error: {message}", file=sys.stderr)
    return 2


def one_line(message: str) -> str:
    return " ".join(message.split())


def overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            USAGE,
            "",
            "Adaptive sparse autoencoders on the activations of language models.",
            "",
            "commands:",
            *lines,
            "",
            "softsae COMMAND --help lists a command's options. Start with: softsae demo",
        ]
    )
