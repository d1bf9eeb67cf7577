"""`csvfast image`: container images, encrypted and clear."""

from __future__ import annotations

import typer

from csvfast.cli import image_encryption as _encryption
from csvfast.cli import image_registry as _registry
from csvfast.cli import image_unpack as _unpack

__all__ = ["app"]

app = typer.Typer(help="Container images, encrypted and clear.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _image() -> None:
    """Container images, encrypted and clear."""


_registry.register(app)
_encryption.register(app)
_unpack.register(app)
