"""Fuzz targets of the gRPC doors: ocicrypt's JSON, annotation packets, parameters, OpenPGP keyrings."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path

from csvfast.broker.clientapi.messages import read_csv_data, write_csv_data
from csvfast.broker.clientapi.openpgp import read_keyring, write_keyring
from csvfast.broker.grpc_messages import METHODS
from csvfast.broker.keyprovider.messages import (
    parse_parameters,
    read_packet,
    read_unwrap_request,
    read_wrap_request,
    unwrap_request,
    wrap_options,
    wrap_request,
)
from csvfast.broker.model import ResourcePath
from csvfast.crypto import Secret
from csvfast.errors import AuthenticationError, RequestError
from fuzz.target import Target

__all__ = ["KeyProviderTarget", "KeyringTarget", "PacketTarget", "ParametersTarget"]

KEK = Secret(bytes(range(32)))
PATH = ResourcePath.parse("default/key/images")
OPTIONS = Secret(b'{"symkey":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="}')
VECTORS = Path(__file__).parents[1] / "vectors" / "openpgp"


def words(error: RequestError) -> str:
    """What kind of error it is: its text without what it quotes."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|[0-9]+", "", str(error))[:80]


class KeyProviderTarget(Target):
    """Requests of the key provider, as protobuf."""

    def __init__(self) -> None:
        super().__init__()
        self.methods = [METHODS[f"/keyprovider.KeyProviderService/{name}"] for name in ("WrapKey", "UnWrapKey")]
        packet = wrap_options(PATH, KEK, OPTIONS).encode()
        for request in (
            wrap_request("attestation-agent", [b"images", b"keyid=images"], OPTIONS),
            wrap_request("attestation-agent", [b""], OPTIONS),
            unwrap_request("attestation-agent", [b"x"], packet),
        ):
            self.seeds.append(self.methods[0].write_request(KeyProviderKeyWrapProtocolInput=request))

    def handle(self, data: bytes) -> Hashable:
        try:
            request = self.methods[0].read_request(data).bytes("KeyProviderKeyWrapProtocolInput")
            if b"keyunwrap" in request[:24]:
                return "unwrap", len(read_unwrap_request(request))
            read = read_wrap_request(request)
        except RequestError as error:
            return words(error)
        assert "symkey" not in repr(read)
        return "wrap", len(read.parameters)


class PacketTarget(Target):
    """Annotation packets, opened."""

    text = True

    def __init__(self) -> None:
        super().__init__()
        self.seeds = [wrap_options(PATH, KEK, OPTIONS, style).encode() for style in ("coco", "coco-v2", "verdictd")]
        self.known = {read_packet(seed).wrapped_data for seed in self.seeds}

    def handle(self, data: bytes) -> Hashable:
        try:
            packet = read_packet(data)
            assert read_packet(packet.encode()) == packet
            opened = packet.open(KEK)
        except RequestError as error:
            return words(error)
        except AuthenticationError:
            return packet.style, "closed"
        assert packet.wrapped_data in self.known, "a changed packet was opened"
        assert opened.equals(OPTIONS)
        return packet.style, "opened"


class ParametersTarget(Target):
    """Parameters behind provider:NAME:, and csvData documents."""

    text = True

    def __init__(self) -> None:
        super().__init__()
        self.seeds = [
            b"images", b"kbs:///default/key/images", b"keyid=default/key/images::packet=verdictd::algorithm=A256GCM",
            b"keyid=images::keypath=/etc/shadow", b"sample=false::packet=coco", b'{"measure":["' + b"A" * 43 + b'="]}',
        ]  # fmt: skip

    def handle(self, data: bytes) -> Hashable:
        try:
            if data[:1] == b"{":
                values = read_csv_data(data)
                assert read_csv_data(write_csv_data(values)) == values
                return "csvData", len(values)
            read = parse_parameters(data)
        except RequestError as error:
            return words(error)
        assert read.path is None or not {"..", "."} & set(read.path)
        return read.path is None, read.style


class KeyringTarget(Target):
    """OpenPGP keyrings, binary and armored."""

    def __init__(self) -> None:
        super().__init__()
        armored = [(VECTORS / name).read_bytes() for name in ("one.asc", "two.asc")]
        keys = [key for block in armored for key in read_keyring(block)]
        self.seeds = [*armored, write_keyring(keys), keys[0].encoded]

    def handle(self, data: bytes) -> Hashable:
        keys = read_keyring(data)
        assert read_keyring(write_keyring(keys)) == keys
        return tuple((key.version, key.algorithm, len(key.user_ids)) for key in keys)
