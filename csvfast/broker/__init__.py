"""The key broker: keys only to virtual machines that prove themselves."""

from __future__ import annotations

from csvfast._extras import need

need("broker", "OpenSSL", "cbor2", "sqlalchemy", "starlette", "uvicorn", "grpc", "google.protobuf", "joserfc", "rfc8785")
