"""`pvirq fetch` and `pvirq cache`: the kernels and the busybox that pvirq keeps."""

from __future__ import annotations

import click

from pvirq.cli.messages import Messages

BUSYBOX = "busybox"


@click.command(
    epilog="""\b
Examples:
  pvirq fetch                     the small kernel and busybox: all that `pvirq boot` needs
  pvirq fetch generic             the distribution's ordinary kernel, for `pvirq boot generic`
  pvirq fetch linux-image-6.1.0-9-amd64
"""
)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("-q", "--quiet", is_flag=True, help="Print the paths only.")
def fetch(names: tuple[str, ...], quiet: bool) -> None:
    """Fetch kernels and busybox into the cache, and print where they are.

    NAME is "cloud" (the distribution's small kernel for virtual machines), "generic" (its ordinary one), "busybox",
    or the full name of a kernel package; without any, "cloud" and "busybox". The distribution's own tools fetch
    them (apt-get or dnf); nothing is installed, and what is in the cache already isn't fetched again.
    """
    from pvirq.toolstack.kernels import fetch_kernel, find_busybox

    say = Messages(quiet)
    for name in names or ("cloud", BUSYBOX):
        path = find_busybox(say.note) if name == BUSYBOX else fetch_kernel(name, say.note).path
        click.echo(path)


@click.command()
@click.option("--clear", is_flag=True, help="Remove everything from the cache.")
def cache(clear: bool) -> None:
    """List what the cache holds and where it is, or clear it.

    The names, and those in parentheses, are what `pvirq boot` takes as KERNEL. The environment variable PVIRQ_CACHE
    chooses another directory.
    """
    from pvirq.toolstack.cache import Cache

    store = Cache()
    if clear:
        click.echo(f"{_mebibytes(store.clear())} freed in {store.root}")
        return
    entries = store.entries()
    click.echo(f"{store.root}: {_mebibytes(sum(entry.size for entry in entries))}")
    for entry in entries:
        also = f" ({', '.join(entry.aliases)})" if entry.aliases else ""
        click.echo(f"  {entry.kind + '/' + entry.name + also:60} {_mebibytes(entry.size):>10}")


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
