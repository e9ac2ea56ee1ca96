"""``migstream demo``: a busy machine changes its host, and nothing is lost."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from migstream.cli.common import reporting_errors
from migstream.cli.save import tell
from migstream.engines.progress import PassReport, Progress

if TYPE_CHECKING:
    from migstream.guests.model import ModelGuest

MIB = 1 << 20


@click.command(
    epilog="""\b
Examples:
  migstream demo
  migstream demo --guest-type pv --size 64
  migstream demo --pages-per-second 500000
"""
)
@click.option(
    "--size", "size_mib", type=click.IntRange(4, 1 << 20), default=256, show_default=True, metavar="MIB"
)
@click.option("--guest-type", type=click.Choice(["hvm", "pv"]), default="hvm", show_default=True)
@click.option(
    "--pages-per-second",
    type=click.IntRange(min=0),
    default=50_000,
    show_default=True,
    metavar="N",
    help="How many pages the machine's program writes to.",
)
@click.option("--seed", type=click.IntRange(min=0), default=1, help="Another seed, another machine.")
def command(size_mib: int, guest_type: str, pages_per_second: int, seed: int) -> None:
    """Live-migrate a busy machine through a pipe, and compare both page by page.

    The machine is a model in memory; a thread keeps writing to its pages, balloons and loses some while
    they are sent. Precopy ends as Xen's does.

    Exit code: 0 if memory, page types and records are equal, else 1.
    """
    with reporting_errors("demo"):
        from migstream.engines.migrate import migrate
        from migstream.engines.restore import restore
        from migstream.engines.save import save
        from migstream.guests.model import ModelGuest
        from migstream.guests.workload import Workload
        from migstream.records.libxc import GuestType

        n_pages = size_mib * MIB >> 12
        kind = GuestType[guest_type.upper()]
        source = ModelGuest.booted(n_pages, kind, seed=seed)
        target = ModelGuest.empty(n_pages, kind, seed=seed + 1)
        click.echo(f"{kind.name} machine of {size_mib} MiB, {pages_per_second:,} writes a second")
        workload = Workload(
            source, seed=seed, pages_per_second=pages_per_second, working_set=n_pages // 4, turmoil=0.2
        )
        with workload:
            result = migrate(
                source,
                lambda fd, _: save(source, fd, live=True, progress=_PassLines()),
                lambda fd, _: restore(target, fd),
            )
            tell(result.save, err=False)
            click.echo(f"the program wrote to {workload.pages_written:,} pages meanwhile")
        equal = _compare(source, target)
    sys.exit(0 if equal else 1)


class _PassLines(Progress):
    """One line a pass."""

    def end(self, report: PassReport) -> None:
        """Print what the pass sent."""
        rate = f"{report.bandwidth / 1e6:9,.0f} MB/s" if report.bandwidth else ""
        click.echo(f"  {report.kind:14}{report.pages:>9,} pages {1000 * report.seconds:9,.1f} ms{rate}")


def _compare(source: ModelGuest, target: ModelGuest) -> bool:
    from migstream.guests.compare import differing_pfns, differing_records

    pages, records = differing_pfns(source, target), differing_records(source, target)
    click.echo(f"{source.n_pages:,} pages compared: {len(pages):,} differ")
    for pfn in pages[:10].tolist():
        click.echo(f"  PFN {pfn:#x} differs")
    for line in records:
        click.echo(f"  {line}")
    equal = not len(pages) and not records
    click.echo("the machines are equal" if equal else "the machines are NOT equal")
    return equal
