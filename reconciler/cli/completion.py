"""What a shell offers where a name belongs: read from the files alone, and silent where they cannot be read."""

from __future__ import annotations

from collections.abc import Iterable

import typer

from reconciler.errors import ReconcilerError, SpecError


def endpoints(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of endpoints that begin so."""
    return _beginning(incomplete, _named(ctx)[0])


def overlays(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of overlays that begin so."""
    return _beginning(incomplete, _named(ctx)[1])


def subjects(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of either that begin so."""
    return _beginning(incomplete, (name for names in _named(ctx) for name in names))


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})


def _named(ctx: typer.Context) -> tuple[list[str], list[str]]:
    """Endpoints and overlays, by the keys and the names of files: nothing is checked."""
    from reconciler.cli.wiring import Options, setpoints_path
    from reconciler.spec.document import parse
    from reconciler.spec.texts import read_texts
    from reconciler.spec.tree import Map, child

    given = ctx.find_root().params
    try:
        texts = read_texts(setpoints_path(Options(given.get("setpoints"), given.get("state_dir"))))
    except (ReconcilerError, OSError):
        return [], []
    try:
        listed = child(parse(texts.setpoints.text, texts.setpoints.path), "endpoints")
    except SpecError:
        listed = None
    return list(listed.entries) if isinstance(listed, Map) else [], [o.name for o in texts.overlays or ()]
