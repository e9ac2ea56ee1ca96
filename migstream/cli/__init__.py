"""The command line: one file a subcommand, imported when it is called.

`migstream --help` has to answer at once, so the table below holds each command's one-line help; a test
compares it with the command's own.
"""

from __future__ import annotations

import importlib

import click

from migstream._version import __version__

__all__ = ["COMMANDS", "main"]

#: Command -> its line in ``migstream --help``. Its module has its name and defines ``command``.
COMMANDS = {
    "inspect": "Show what is in a stream: layers, records, pages, passes, config.",
    "verify": "Check a stream against the specification.",
    "save": "Save GUEST as a libxc stream to OUT: a file, '-' for standard output, or fd:N.",
    "restore": "Restore the stream IN (a file, '-' for standard input, or fd:N) into GUEST.",
    "migrate": "Migrate SRC to DST, two guests such as model:64M or raw:FILE, live unless told otherwise.",
    "demo": "Live-migrate a busy machine through a pipe, and compare both page by page.",
}


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"migstream.cli.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="FILE may be '-' for standard input, and may be compressed by zstd, gzip or xz. "
    "'migstream COMMAND --help' has the options and examples of a command.",
)
@click.version_option(__version__, "-V", "--version", prog_name="migstream")
def main() -> None:
    """Read, check, build and run Xen migration streams.

    A stream is what Xen writes when a domain is saved, checkpointed or migrated: an xl save file, a libxl
    stream or a bare libxc image. The layers are detected.
    """
