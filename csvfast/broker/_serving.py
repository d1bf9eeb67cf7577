"""Imported before anything that only a broker needs: says which packages are missing, and the command that brings them."""

from __future__ import annotations

from csvfast._extras import need

need("broker", "OpenSSL", "cbor2", "sqlalchemy", "starlette", "uvicorn", "grpc", "google.protobuf", "joserfc", "rfc8785")
