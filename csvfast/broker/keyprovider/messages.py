"""What travels in the key provider protocol: JSON requests and replies, parameters, annotation packets.

    WrapKey     private options of a layer (its key, nonce, digest) + parameters  ->  annotation packet
    UnWrapKey   annotation packet                                                 ->  the same private options, bit for bit

Byte strings in replies are arrays of integers, which every client reads; on input base64 text is read as well. Members that are
not known are ignored, since clients of other versions send more; the known ones are checked.

Annotation packets come in three forms, and are told apart by their members:

    coco       {"kid":"kbs:///r/t/t","wrapped_data":b64,"iv":b64,"wrap_type":"A256GCM"}
    coco-v2    the same with "version" or "provider"
    verdictd   {"kid":"...","wrapped_data":[..],"iv":[..],"algorithm":"AES","key_length":256}

Source: containers/ocicrypt keywrap/keyprovider/keyprovider.go; confidential-containers/guest-components
confidential-data-hub/hub/src/image/annotation_packet and attestation-agent/coco_keyprovider/src/enc_mods;
inclavare-containers/verdictd src/client_api/annotation.rs.
Thread-safety: immutable objects, functions without state. Secrets are held in csvfast.crypto.Secret; the copies that JSON makes
of them on the way in and out are Python's, and freed without being wiped.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from csvfast.broker.json_input import loads, member
from csvfast.broker.model import VERDICTD_KEYS, ResourcePath, for_kid
from csvfast.crypto import Secret
from csvfast.errors import AuthenticationError, RequestError

if TYPE_CHECKING:
    from csvfast._core import BytesLike

__all__ = [
    "KEK_BYTES",
    "OPTIONS_LIMIT",
    "PACKET_LIMIT",
    "AnnotationPacket",
    "PacketStyle",
    "WrapParameters",
    "WrapRequest",
    "choose_parameters",
    "parse_parameters",
    "read_packet",
    "read_unwrap_reply",
    "read_unwrap_request",
    "read_wrap_reply",
    "read_wrap_request",
    "unwrap_reply",
    "unwrap_request",
    "wrap_options",
    "wrap_reply",
    "wrap_request",
]

KEK_BYTES: Final = 32
OPTIONS_LIMIT: Final = 64 << 10
"""Bytes of private options; they have some 200."""
PACKET_LIMIT: Final = 512 << 10
"""Bytes of an annotation packet: options of OPTIONS_LIMIT as integers."""

MESSAGE_LIMIT: Final = 4 << 20
"""Bytes of a message, as csvfast.broker.grpc_messages has it, which guests do without."""

_PARAMETER_LIMIT: Final = 4096
_PARAMETERS: Final = 64
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_COUNTER_BYTES: Final = 16

PacketStyle = Literal["coco", "coco-v2", "verdictd"]


# ---- Requests and replies


@dataclass(frozen=True, slots=True)
class WrapRequest:
    """WrapKey: what to wrap, and what stood behind provider:NAME: on the command line, by NAME."""

    parameters: Mapping[str, Sequence[bytes]]
    options: Secret = field(repr=False)


def read_wrap_request(data: bytes) -> WrapRequest:
    """RequestError."""
    what = "WrapKey request"
    parameters = member(_request(data, what, "keywrap"), "keywrapparams", dict, what)
    options = _bytes(parameters.get("optsdata"), f"{what}: optsdata", OPTIONS_LIMIT)
    if not options:
        raise RequestError(f"{what}: optsdata is empty; expected the private options of a layer")
    configuration = parameters.get("ec")
    if configuration is not None and type(configuration) is not dict:
        raise RequestError(f"{what}: ec is no object")
    return WrapRequest(_parameters((configuration or {}).get("Parameters"), what), Secret(options))


def read_unwrap_request(data: bytes) -> bytes:
    """The annotation packet of an UnWrapKey request. RequestError.

    Its parameters say how to reach a provider, e.g. "eaa_kbc::192.0.2.1:1122", and are ignored.
    """
    what = "UnWrapKey request"
    parameters = member(_request(data, what, "keyunwrap"), "keyunwrapparams", dict, what)
    return _bytes(parameters.get("annotation"), f"{what}: annotation", PACKET_LIMIT)


def wrap_reply(packet: bytes) -> bytes:
    """The reply to WrapKey."""
    return _json({"keywrapresults": {"annotation": list(packet)}})


def unwrap_reply(options: Secret) -> bytes:
    """The reply to UnWrapKey."""
    return _json({"keyunwrapresults": {"optsdata": list(memoryview(options))}})


def wrap_request(provider: str, parameters: Sequence[BytesLike], options: Secret) -> bytes:
    """A WrapKey request as skopeo writes it."""
    given = {provider: [_b64(one) for one in parameters]}
    return _json(
        {
            "op": "keywrap",
            "keywrapparams": {"ec": {"Parameters": given, "DecryptConfig": {"Parameters": {}}}, "optsdata": _b64(options)},
            "keyunwrapparams": {"dc": None, "annotation": None},
        }
    )


def unwrap_request(provider: str, parameters: Sequence[BytesLike], packet: bytes) -> bytes:
    """An UnWrapKey request as skopeo writes it."""
    given = {provider: [_b64(one) for one in parameters]}
    return _json(
        {
            "op": "keyunwrap",
            "keywrapparams": {"ec": None, "optsdata": None},
            "keyunwrapparams": {"dc": {"Parameters": given}, "annotation": _b64(packet)},
        }
    )


def read_wrap_reply(data: bytes) -> bytes:
    """The annotation packet. RequestError."""
    what = "WrapKey reply"
    results = member(_object(data, what), "keywrapresults", dict, what)
    return _bytes(results.get("annotation"), f"{what}: annotation", PACKET_LIMIT)


def read_unwrap_reply(data: bytes) -> Secret:
    """The private options. RequestError."""
    what = "UnWrapKey reply"
    results = member(_object(data, what), "keyunwrapresults", dict, what)
    options = _bytes(results.get("optsdata"), f"{what}: optsdata", 2 * OPTIONS_LIMIT)  # a JWE of them is longer
    if not options:
        raise RequestError(f"{what}: optsdata is empty; expected private options")
    return Secret(options)


# ---- Parameters


@dataclass(frozen=True, slots=True)
class WrapParameters:
    """Text behind provider:NAME:, read: which key (None: a new one), and which form of packet (None: as configured)."""

    path: ResourcePath | None = None
    style: Literal["coco", "verdictd"] | None = None


def parse_parameters(text: bytes) -> WrapParameters:
    """From a key id, a path, a resource URI, or key=value pairs joined by "::". Nothing: a new key. RequestError.

    keyid=ID, packet=coco|verdictd, algorithm=A256GCM. keypath is refused: a provider does not read files that a request names.
    """
    if len(text) > _PARAMETER_LIMIT or not text.isascii():
        raise RequestError(f"parameters of {len(text)} bytes: expected at most {_PARAMETER_LIMIT}, ASCII")
    decoded = text.decode("ascii")
    if not decoded:
        return WrapParameters()
    if "=" not in decoded:
        return WrapParameters(_path(decoded))
    path: ResourcePath | None = None
    style: Literal["coco", "verdictd"] | None = None
    seen = set()
    for pair in decoded.split("::"):
        name, equals, value = pair.partition("=")
        if not equals or name in seen:
            raise RequestError(f"parameters: {_shown(name)}; expected key=value joined by '::', each key once")
        seen.add(name)
        if name == "keyid":
            path = _path(value)
        elif name == "packet" and value in ("coco", "verdictd"):
            style = cast('Literal["coco", "verdictd"]', value)
        elif name == "algorithm" and value in ("A256GCM", "AES"):
            pass
        elif name == "algorithm":
            raise RequestError(f"parameters: algorithm {_shown(value)}; expected A256GCM, the one that authenticates")
        elif name == "keypath":
            raise RequestError("parameters: keypath; expected keyid: this provider reads no key from a file that a request names")
        elif not (name == "sample" and value == "false"):
            raise RequestError(f"parameters: {_shown(pair)}; expected keyid=, packet=coco|verdictd or algorithm=A256GCM")
    return WrapParameters(path, style)


def choose_parameters(parameters: Mapping[str, Sequence[bytes]], provider: str) -> WrapParameters:
    """What the one provider that we are was given. RequestError when that is not clear.

    A request holds the parameters of all providers without saying which of them is asked. It has one answer, so several keys for
    one provider cannot all be served.
    """
    if provider in parameters:
        given = parameters[provider]
    elif len(parameters) <= 1:
        given = next(iter(parameters.values()), ())
    else:
        raise RequestError(f"parameters of {len(parameters)} providers, none of them {_shown(provider)}")
    found = {parse_parameters(one) for one in given}
    if len(found) > 1:
        raise RequestError(f"{len(found)} different keys for one provider; expected one: a reply holds one annotation packet")
    return found.pop() if found else WrapParameters()


def _path(kid: str) -> ResourcePath:
    if kid.startswith("/"):  # coco_keyprovider reads "/repository/type/tag", too
        return ResourcePath.parse(kid[1:])
    return for_kid(kid)


# ---- Annotation packets


@dataclass(frozen=True, slots=True)
class AnnotationPacket:
    """A wrapped key, in whichever form it came.

    style          which form
    path           the key-encryption key
    wrapped_data   ciphertext and tag
    iv             12 bytes; 16 for A256CTR
    wrap_type      A256GCM, or A256CTR, which is read on demand only
    """

    style: PacketStyle
    path: ResourcePath
    wrapped_data: bytes
    iv: bytes
    wrap_type: Literal["A256GCM", "A256CTR"] = "A256GCM"

    def encode(self) -> bytes:
        """JSON, members in the originals' order."""
        if self.style == "verdictd":
            repository, kind, tag = self.path
            return _json(
                {
                    "kid": tag if (repository, kind) == VERDICTD_KEYS else str(self.path),
                    "wrapped_data": list(self.wrapped_data),
                    "iv": list(self.iv),
                    "algorithm": "AES",
                    "key_length": 256,
                }
            )
        kid, data, iv = self.path.uri, _b64(self.wrapped_data), _b64(self.iv)
        if self.style == "coco":
            return _json({"kid": kid, "wrapped_data": data, "iv": iv, "wrap_type": self.wrap_type})
        return _json(
            {
                "version": "0.1.0",
                "kid": kid,
                "wrapped_data": data,
                "provider": "kbs",
                "iv": iv,
                "wrap_type": self.wrap_type,
                "provider_settings": {},
                "annotations": {},
            }
        )

    def open(self, kek: Secret, *, allow_unauthenticated: bool = False) -> Secret:
        """What was wrapped. AuthenticationError: another key, or a packet that has been changed. RequestError.

        In: allow_unauthenticated   open A256CTR. Whoever can change an image's manifest can turn an authenticated packet into one
                                    of these and choose, bit by bit, what comes out.
        """
        _check_kek(kek, self.path)
        if self.wrap_type == "A256CTR":
            if not allow_unauthenticated:
                raise RequestError("annotation packet: wrap_type A256CTR is not authenticated; expected A256GCM")
            opener = Cipher(algorithms.AES(memoryview(kek)), modes.CTR(self.iv)).decryptor()
            return Secret(opener.update(self.wrapped_data) + opener.finalize())
        try:
            return Secret(AESGCM(memoryview(kek)).decrypt(self.iv, self.wrapped_data, None))
        except InvalidTag:
            raise AuthenticationError(f"annotation packet: does not open with the key {self.path}") from None


def wrap_options(path: ResourcePath, kek: Secret, options: Secret, style: PacketStyle = "coco") -> AnnotationPacket:
    """Wraps private options with a key-encryption key of 32 bytes. RequestError when it has another length.

    The nonce is random: one key serves 2**32 layers (NIST SP 800-38D, 8.3).
    """
    _check_kek(kek, path)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return AnnotationPacket(style, path, AESGCM(memoryview(kek)).encrypt(nonce, memoryview(options), None), nonce)


def read_packet(data: bytes) -> AnnotationPacket:
    """From JSON of any of the three forms. RequestError."""
    what = "annotation packet"
    if len(data) > PACKET_LIMIT:
        raise RequestError(f"{what}: {len(data)} bytes; expected at most {PACKET_LIMIT}")
    packet = _object(data, what)
    path = for_kid(member(packet, "kid", str, what))
    style: PacketStyle
    wrap_type: Any = "A256GCM"
    if "algorithm" in packet:
        style = "verdictd"
        if packet["algorithm"] not in ("AES", "A256GCM") or packet.get("key_length", 256) != 256:
            raise RequestError(f"{what}: algorithm and key_length; expected AES and 256")
    else:
        style = "coco-v2" if "version" in packet or "provider" in packet else "coco"
        if style == "coco-v2" and (packet.get("version", "0.1.0"), packet.get("provider", "kbs")) != ("0.1.0", "kbs"):
            raise RequestError(f"{what}: version and provider; expected 0.1.0 and kbs")
        wrap_type = packet.get("wrap_type")
        if wrap_type not in ("A256GCM", "A256CTR"):
            raise RequestError(f"{what}: wrap_type; expected A256GCM or A256CTR")
    iv_bytes = _COUNTER_BYTES if wrap_type == "A256CTR" else _NONCE_BYTES
    iv = _bytes(packet.get("iv"), f"{what}: iv", iv_bytes)
    if len(iv) != iv_bytes:
        raise RequestError(f"{what}: iv of {len(iv)} bytes; expected {iv_bytes}")
    wrapped = _bytes(packet.get("wrapped_data"), f"{what}: wrapped_data", OPTIONS_LIMIT + _TAG_BYTES)
    least = 1 if wrap_type == "A256CTR" else _TAG_BYTES + 1
    if len(wrapped) < least:
        raise RequestError(f"{what}: wrapped_data of {len(wrapped)} bytes; expected {least} or more")
    return AnnotationPacket(style, path, wrapped, iv, wrap_type)


def _check_kek(kek: Secret, path: ResourcePath) -> None:
    if len(kek) != KEK_BYTES:
        raise RequestError(f"resource {path}: {len(kek)} bytes; expected {KEK_BYTES}, as a key-encryption key has")


# ---- JSON


def _request(data: bytes, what: str, operation: str) -> dict[str, Any]:
    request = _object(data, what)
    if request.get("op") != operation:
        raise RequestError(f"{what}: op; expected {operation}")
    return request


def _object(data: bytes, what: str) -> dict[str, Any]:
    value = loads(data, what, limit=MESSAGE_LIMIT)
    if type(value) is not dict:
        raise RequestError(f"{what}: expected an object")
    return value


def _parameters(value: Any, what: str) -> dict[str, tuple[bytes, ...]]:
    if value is None:
        return {}
    if type(value) is not dict or len(value) > _PARAMETERS:
        raise RequestError(f"{what}: Parameters; expected an object of at most {_PARAMETERS} members")
    result = {}
    for name, values in value.items():
        if values is not None and (type(values) is not list or len(values) > _PARAMETERS):
            raise RequestError(f"{what}: Parameters of a provider; expected a list of at most {_PARAMETERS} byte strings")
        result[name] = tuple(_bytes(one, f"{what}: a parameter", MESSAGE_LIMIT) for one in values or ())
    return result


def _bytes(value: Any, what: str, limit: int) -> bytes:
    """A byte string as Go or Rust write it: base64 text, or an array of integers."""
    if type(value) is str:
        if len(value) > (limit + 2) // 3 * 4:
            raise RequestError(f"{what}: {len(value)} characters of base64; expected at most {limit} bytes")
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise RequestError(f"{what}: text that is no base64") from None
    if type(value) is list:
        if len(value) > limit:
            raise RequestError(f"{what}: {len(value)} bytes; expected at most {limit}")
        # bool is an int for isinstance, but not here
        if all(type(one) is int and 0 <= one <= 255 for one in value):
            return bytes(value)
        raise RequestError(f"{what}: a list; expected integers 0 to 255")
    raise RequestError(f"{what}: {'missing' if value is None else type(value).__name__}; expected base64 or a list of integers")


def _b64(data: BytesLike) -> str:
    return base64.b64encode(memoryview(cast(Any, data))).decode("ascii")


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _shown(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
