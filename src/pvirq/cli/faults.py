"""`pvirq faults`: which faults there are, for --fault and for programs."""

from __future__ import annotations

from typing import Final

import click

from pvirq.lab.faults.kinds import KINDS, FaultKind, Param, find_kind

WIDTH: Final = 12


@click.command()
@click.argument("kind", required=False)
def faults(kind: str | None) -> int:
    """List the faults that --fault takes; with a KIND, what that one takes."""
    if kind is None:
        for known in KINDS.values():
            click.echo(f"{known.name:{WIDTH}}{known.does}\n{'':{WIDTH}}  {known.example}")
        click.echo("\n`pvirq faults KIND` has what each takes. Several rules: the first that fires decides.")
        return 0
    click.echo(describe(find_kind(kind)))
    return 0


def describe(kind: FaultKind) -> str:
    """A kind's synopsis, its parameters and an example."""
    words = [kind.name]
    for param in kind.params:
        if param.positional:
            words.append(param.form.shown if param.required else f"[{param.form.shown}]")
    if any(not param.positional for param in kind.all_params):
        words.append("[NAME=VALUE ...]")
    parts = [f"{' '.join(words)}\n\n{kind.does[0].upper()}{kind.does[1:]}.\n"]
    for title, params in (("", kind.params), ("Where", kind.where), ("When", kind.when)):
        if params:
            parts.append("\n".join([*([f"{title}:"] if title else []), *map(_line, params)]) + "\n")
    return "\n".join([*parts, f"Example:\n  {kind.example}"])


def _line(param: Param) -> str:
    name = param.form.shown if param.positional else f"{param.name}={param.form.shown}"
    default = "" if param.default is None else f" (default: {param.form.write(param.default)})"
    return f"  {name:24} {param.does}{default}"
