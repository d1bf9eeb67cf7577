"""`csvfast runtime`: confidential containers, by the OCI runtime's commands."""

from __future__ import annotations

import typer

__all__ = ["app"]

app = typer.Typer(help="Confidential containers, by the OCI runtime's commands.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _runtime() -> None:
    """Confidential containers, by the OCI runtime's commands."""
