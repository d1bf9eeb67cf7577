"""CoCo's Key Broker Service over HTTP: attestation, resources, administration."""

from __future__ import annotations
