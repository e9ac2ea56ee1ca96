"""The command line: one file a subcommand, imported when it is called.

``migstream --help`` has to answer at once, so this file needs nothing but the table below; a test compares
each line with the command's own help.
"""

from __future__ import annotations

import sys

__all__ = ["COMMANDS", "help_text", "main"]

#: Command -> its line in ``migstream --help``. Its module has its name and defines ``command``.
COMMANDS = {
    "inspect": "Show what is in a stream: layers, records, pages, passes, config.",
    "verify": "Check a stream against the specification.",
    "convert": "Write the stream IN (a file, '-' for standard input, or fd:N) to OUT in another form.",
    "extract": "Write the memory in the stream IN to OUT as an image, and other contents to files.",
    "diff": "Compare two streams or images: headers, records and their fields, then pages by PFN.",
    "save": "Save GUEST as a migration stream to OUT: a file, '-' for standard output, or fd:N.",
    "restore": "Restore the stream IN (a file, '-' for standard input, or fd:N) into GUEST.",
    "migrate": "Migrate SRC to DST: another guest, or 'migstream receive' at HOST:PORT or unix:PATH.",
    "receive": "Receive one migration at PORT, HOST:PORT or unix:PATH into GUEST.",
    "fuzz": "Run a program on mutated streams, and keep what crashes, hangs or disagrees.",
    "conformance": "Run a stream reader on the conformance vectors, and score it.",
    "demo": "Live-migrate a busy machine through a pipe, and compare both page by page.",
}


def help_text() -> str:
    """Return what ``migstream --help`` prints."""
    width = max(map(len, COMMANDS)) + 2
    commands = "".join(f"  {name:{width}}{line}\n" for name, line in COMMANDS.items())
    return f"""\
Usage: migstream [OPTIONS] COMMAND [ARGS]...

  Read, check, convert, build, run and fuzz Xen migration streams.

  A stream is what Xen writes when a domain is saved, checkpointed or migrated: an xl save file, a save
  image of libvirt or xapi, a libxl stream or a bare libxc image. The layers are detected. A file may be '-'
  for standard input, and may be compressed by zstd, gzip or xz.

Commands:
{commands}
Options:
  -V, --version  Show the version and exit.
  -h, --help     Show this message and exit.

'migstream COMMAND --help' has the options and examples of a command.
"""


def main() -> None:
    """Run the command line."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        sys.stdout.write(help_text())
        return
    from migstream.cli.group import group

    group(prog_name="migstream")
