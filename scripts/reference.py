"""Writes the reference of the commands from their declarations: docs/cli.md, and a man page for each command.

``scripts/docs`` runs it, with the page and the folder for man pages as arguments. One walk makes the entries,
and two writers show them. Neither depends on the terminal or the day.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from textwrap import dedent
from typing import Final, NamedTuple

import click

from kms_api.main import parser as service_parser
from kms_cli.command_line import LazyGroup, group, topics
from kms_cli.commands.completion import EXIT_CODES, topic
from kms_cli.plugin.main import USAGE as PLUGIN_USAGE
from kms_protocol import __version__
from kms_worker.main import parser as worker_parser

ROOT: Final = Path(__file__).parents[1]
ANYWHERE: Final = "These options may also stand after the name of a command. The later one wins."
INTRODUCTION: Final = """\
# Reference of the commands

Every command and option of `kms`, and of the programs beside it. `scripts/docs` writes this page and the man
pages from the code; [terminal.md](terminal.md#man-pages) says how to read those.
[recipes.md](recipes.md) shows the commands at work, [kms.example.toml](kms.example.toml) has the settings,
[contract.md](contract.md#settings-and-environment) the other variables of the environment.
"""
PROGRAMS: Final = {  # what man pages say after the dash
    "kms": "encrypt, decrypt and run encryption jobs",
    "kms-service": "the HTTP API of the key management service",
    "kms-worker": "run jobs of the key management service",
    "age-plugin-kms": "encrypt and decrypt for age, rage and sops with keys of the service",
}
HELP: Final = "kms help"
Pairs = tuple[tuple[str, str], ...]


class Entry(NamedTuple):
    """A program, a command or a topic: ``text`` has paragraphs, the pairs have names and what they mean.

    A paragraph that is indented keeps its lines.
    """

    name: str
    summary: str
    usage: str
    text: tuple[str, ...]
    options: Pairs = ()
    environment: Pairs = ()
    commands: Pairs = ()
    topics: Pairs = ()
    exit_codes: Pairs = ()
    epilog: str = ""


# -- the walk ---------------------------------------------------------------------------------------------


def entries() -> list[Entry]:
    """``kms``, its commands in the order of ``kms --help``, the topics, and the other programs."""
    top = group()
    context = click.Context(top, info_name="kms")
    return [*of_command(top, context, PROGRAMS["kms"]), *of_topics(), *other_programs()]


def of_command(command: click.Command, context: click.Context, summary: str) -> Iterator[Entry]:
    shown = [each for each in command.params if isinstance(each, click.Option) and not each.hidden]
    variables = [(str(each.envvar), f"The default of {each.opts[0]}.") for each in shown if each.envvar]
    listed = command.commands_from("") if isinstance(command, LazyGroup) else []
    top = context.parent is None
    yield Entry(
        context.command_path,
        summary,
        " ".join([context.command_path, *command.collect_usage_pieces(context)]),
        (*paragraphs(command.help or ""), *([ANYWHERE] if top else [])),
        tuple(option_help(each, context) for each in shown),
        tuple(variables),
        tuple((item.value, item.help or "") for item in listed),
        tuple((name, text.partition("\n")[0]) for name, text in topics().items())
        if command.name == "help"
        else (),
        tuple((str(code), f"{text}.") for code, text in EXIT_CODES.items()) if top else (),
        command.epilog or "",
    )
    for item in listed:
        if isinstance(command, click.Group) and (found := command.get_command(context, item.value)):
            inner = click.Context(found, info_name=item.value, parent=context)
            yield from of_command(found, inner, item.help or "")


def option_help(option: click.Option, context: click.Context) -> tuple[str, str]:
    names, text = option.get_help_record(context) or ("", "")
    return names, re.sub(r" +\[env var: [^]]+\]", "", " ".join(text.split()))


def paragraphs(text: str) -> tuple[str, ...]:
    parts = re.split(r"\n\s*\n", inspect.cleandoc(text))
    return tuple(" ".join(part.split()) for part in parts if part.strip())


def of_topics() -> Iterator[Entry]:
    for name in topics():
        summary, *parts = topic(name).split("\n\n")
        text = tuple(part if part.startswith(" ") else " ".join(part.split()) for part in parts)
        yield Entry(f"{HELP} {name}", summary, "", text)


def other_programs() -> Iterator[Entry]:
    for made in (service_parser(), worker_parser()):
        options = tuple(
            (f"{each.option_strings[-1]} {each.dest.upper()}", f"{each.help[0].upper()}{each.help[1:]}.")
            for each in made._actions  # noqa: SLF001 -- argparse has no other list of them
            if each.help and each.help != argparse.SUPPRESS and each.dest != "help"
        )
        text = (made.description or "", "kms up starts it on one machine.")
        yield Entry(made.prog, PROGRAMS[made.prog], f"{made.prog} [OPTIONS]", text, options)
    first, second, *commands = PLUGIN_USAGE.splitlines()
    named = (each.strip().partition("  ") for each in commands)
    pairs = tuple((name, " ".join(text.split())) for name, _, text in named)
    name = "age-plugin-kms"
    yield Entry(name, PROGRAMS[name], name, (f"{first} {second}",), commands=pairs)


# -- Markdown ---------------------------------------------------------------------------------------------


def markdown(made: list[Entry]) -> str:
    """The page of all entries."""
    return "\n".join([INTRODUCTION, *map(markdown_of, made)])


def markdown_of(entry: Entry) -> str:
    level = "#" * min(3, 2 + entry.name.count(" "))
    parts = [f"{level} {entry.name}", *map(paragraph, entry.text)]
    parts += [fenced(entry.usage)] if entry.usage else []
    for title, pairs in sections(entry):
        links = title in {"Commands", "Topics"} and entry.name.startswith("kms")
        lines = [
            f"- {f'[`{name}`](#{hyphened(entry.name)}-{name})' if links else f'`{name}`'}: {prose(text)}"
            for name, text in pairs
        ]
        parts += [f"{title}:", "\n".join(lines)]
    example = entry.epilog.removeprefix("Example: ")
    if entry.epilog:
        parts.append(prose(entry.epilog) if example == entry.epilog else f"Example: `{example}`")
    return "\n\n".join(parts) + "\n"


def sections(entry: Entry) -> Iterator[tuple[str, Pairs]]:
    titled = {
        "Options": entry.options,
        "Environment": entry.environment,
        "Commands": entry.commands,
        "Topics": entry.topics,
        "Exit codes": entry.exit_codes,
    }
    return ((title, pairs) for title, pairs in titled.items() if pairs)


def hyphened(name: str) -> str:
    """The name of a man page, and the anchor of a heading."""
    return name.replace(" ", "-")


def paragraph(text: str) -> str:
    return fenced(dedent(text)) if text.startswith(" ") else prose(text)


def fenced(text: str) -> str:
    return f"```text\n{text}\n```"


def prose(text: str) -> str:
    """Text with what Markdown would read as markup escaped, outside its spans of code."""
    spans = re.split(r"(`[^`]+`)", text)
    plain = (re.sub(r"([\\*\[])", r"\\\1", span).replace("<", "&lt;") for span in spans[::2])
    return "".join(part for pair in zip_longest(plain, spans[1::2], fillvalue="") for part in pair)


# -- man pages --------------------------------------------------------------------------------------------


def man(entry: Entry, names: list[str], day: str) -> str:
    """A page in the man macros of roff. ``names`` are those of all entries."""
    name = hyphened(entry.name)
    lines = [f'.TH {name.upper()} 1 "{day}" "kms {__version__}"', ".SH NAME"]
    lines += [
        rf"{roff(name)} \- {roff(entry.summary.rstrip('.'))}",
        ".SH SYNOPSIS",
        ".nf",
        roff(entry.usage or entry.name),
        ".fi",
    ]
    lines.append(".SH DESCRIPTION")
    for at, text in enumerate(entry.text):
        lines += [".PP"] if at else []
        is_block = text.startswith(" ")
        lines += [".nf", *map(roff, dedent(text).splitlines()), ".fi"] if is_block else [roff(text)]
    for title, pairs in sections(entry):
        lines.append(f".SH {'EXIT STATUS' if title == 'Exit codes' else title.upper()}")
        for term, text in pairs:
            lines += [".TP", rf"\fB{roff(term)}\fR", roff(text)]
    if entry.epilog:
        example = entry.epilog.removeprefix("Example: ")
        lines += [".SH EXAMPLES" if example != entry.epilog else ".SH NOTES", roff(example)]
    related = [each for each in names if is_related(each, entry.name)]
    lines += [".SH SEE ALSO", ",\n".join(rf"\fB{roff(hyphened(each))}\fR(1)" for each in related)]
    return "\n".join(lines) + "\n"


def is_related(name: str, to: str) -> bool:
    """Whether it is the command above, one below, or beside a program another."""
    above = to.rpartition(" ")[0] or ("kms" if to != "kms" else "")
    return name == above or name.rpartition(" ")[0] == to or (to == "kms" and " " not in name and name != to)


def roff(text: str) -> str:
    special = {"\\": r"\e", "-": r"\-", "'": r"\(aq", "`": "", "^": r"\(ha", "~": r"\(ti"}
    plain = "".join(special.get(each, each if each.isascii() else rf"\[u{ord(each):04X}]") for each in text)
    return rf"\&{plain}" if plain.startswith(".") else plain


def main(page: Path, folder: Path) -> None:
    """Write the page, and all man pages into the folder ``man1`` below ``folder``."""
    made = entries()
    page.write_text(markdown(made), "utf-8")
    dated = re.search(r"^## \[[\d.]+\] - (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    day = dated[1] if dated else datetime.now(UTC).date().isoformat()  # no version has been published
    target = folder / "man1"
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*kms*.1"):
        old.unlink()
    for each in made:
        text = man(each, [other.name for other in made], day)
        (target / f"{hyphened(each.name)}.1").write_text(text, "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
