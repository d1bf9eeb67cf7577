"""Attested TLS: certificates with evidence inside, and connections whose peer has proved what it is before the first byte."""

from __future__ import annotations

from csvfast._extras import need

need("ratstls", "OpenSSL", "cbor2")
