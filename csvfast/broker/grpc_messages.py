"""The gRPC methods of the key provider and of Verdictd's client API, with their protobuf messages.

The messages are few and flat, so their descriptors are made here, at run time, from the tables below, instead of by a code
generator at build time. They live in a descriptor pool of their own: a program that uses the originals' generated code does not
collide.

Fields that are not known are ignored, as protobuf wants it; a message that is none, or longer than MESSAGE_LIMIT, is refused.

Source: containers/ocicrypt utils/keyprovider/keyprovider.proto; inclavare-containers/verdictd proto/clientapi.proto.
Thread-safety: functions without state; the tables are made once, at import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import csvfast.broker._serving  # noqa: F401 it says what is missing

# isort: split
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from csvfast.errors import RequestError

if TYPE_CHECKING:
    from google.protobuf.message import Message

__all__ = ["CLIENT_API", "KEY_PROVIDER", "MESSAGE_LIMIT", "METHODS", "Fields", "Method", "Value"]

MESSAGE_LIMIT: Final = 4 << 20
"""Bytes of one message."""

Value = bytes | bool

KEY_PROVIDER: Final = "keyprovider.KeyProviderService"
CLIENT_API: Final = "clientapi"

# Names of fields in the order of their numbers, from 1 on; bytes, unless the name is followed by "?", which is a bool.
_STATUS: Final = "status"
_CONTENT: Final = "status content"
_CLIENT_API_SERVICES: Final[Mapping[str, Mapping[str, tuple[str, str]]]] = {
    "KeyManagerService": {
        "CreateKey": ("", "status uuid"),
        "GetKey": ("uuid", "status key"),
        "DeleteKey": ("uuid", _STATUS),
    },
    "OpaService": {
        "SetOpaPolicy": ("name content", _STATUS),
        "exportOpaPolicy": ("name", _CONTENT),
        "setOpaReference": ("name content", _STATUS),
        "exportOpaReference": ("name", _CONTENT),
        "TestOpa": ("policyname policycontent policylocal? referencename referencecontent referencelocal? input", _STATUS),
    },
    "GpgService": {
        "listGpgKeys": ("", "keys"),
        "importGpgKey": ("key", _STATUS),
        "deleteGpgKey": ("keyid", _STATUS),
        "exportGpgKeyring": ("", _CONTENT),
    },
    "ImageService": {
        "exportImageSigstore": ("", _CONTENT),
        "setImageSigstore": ("content", _STATUS),
        "exportImagePolicy": ("", _CONTENT),
        "setImagePolicy": ("content", _STATUS),
    },
}


class Fields:
    """A message that has been read. Absent fields are empty, or False."""

    __slots__ = ("_message",)

    def __init__(self, message: Message) -> None:
        self._message = message

    def bytes(self, name: str) -> bytes:
        """A field of bytes."""
        value = getattr(self._message, name)
        assert isinstance(value, bytes)
        return value

    def text(self, name: str) -> str:
        """A field of bytes that are UTF-8. RequestError."""
        try:
            return self.bytes(name).decode()
        except UnicodeDecodeError:
            raise RequestError(f"{self._message.DESCRIPTOR.name}: {name} is not UTF-8") from None

    def flag(self, name: str) -> bool:
        """A field that is a bool."""
        return bool(getattr(self._message, name))


class Method(NamedTuple):
    """One method: its path on the wire, and what it takes and answers.

    request, reply   protobuf message classes
    """

    path: str
    request: type[Message]
    reply: type[Message]

    def read_request(self, data: bytes) -> Fields:
        """RequestError: no such message, or too long."""
        return _read(self.request, data)

    def read_reply(self, data: bytes) -> Fields:
        """As read_request."""
        return _read(self.reply, data)

    def write_request(self, **fields: Value) -> bytes:
        """The encoded request."""
        return self.request(**fields).SerializeToString()

    def write_reply(self, **fields: Value) -> bytes:
        """The encoded reply."""
        return self.reply(**fields).SerializeToString()


def _read(kind: type[Message], data: bytes) -> Fields:
    if len(data) > MESSAGE_LIMIT:
        raise RequestError(f"{kind.DESCRIPTOR.name}: {len(data)} bytes; expected at most {MESSAGE_LIMIT}")
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise RequestError(f"{kind.DESCRIPTOR.name}: {len(data)} bytes that are no such protobuf message") from None
    return Fields(message)


def _file(package: str, messages: Mapping[str, str]) -> FileDescriptorProto:
    file = FileDescriptorProto(name=f"csvfast/{package}.proto", package=package, syntax="proto3")
    for name, names in messages.items():
        message = file.message_type.add(name=name)
        for number, text in enumerate(names.split(), start=1):
            kind = FieldDescriptorProto.TYPE_BOOL if text.endswith("?") else FieldDescriptorProto.TYPE_BYTES
            message.field.add(
                name=text.removesuffix("?"), number=number, type=kind, label=FieldDescriptorProto.LABEL_OPTIONAL
            )
    return file


def _methods() -> dict[str, Method]:
    pool = DescriptorPool()
    wrap_input, wrap_output = "KeyProviderKeyWrapProtocolInput", "KeyProviderKeyWrapProtocolOutput"
    pool.Add(_file("keyprovider", {wrap_input: wrap_input, wrap_output: wrap_output}))
    messages: dict[str, str] = {}
    for methods in _CLIENT_API_SERVICES.values():
        for name, (request, reply) in methods.items():
            messages |= {f"{_capital(name)}Request": request, f"{_capital(name)}Response": reply}
    pool.Add(_file(CLIENT_API, messages))

    def found(name: str) -> Any:
        return GetMessageClass(pool.FindMessageTypeByName(name))

    result = {}
    for name in ("WrapKey", "UnWrapKey"):
        path = f"/{KEY_PROVIDER}/{name}"
        result[path] = Method(path, found(f"keyprovider.{wrap_input}"), found(f"keyprovider.{wrap_output}"))
    for service, methods in _CLIENT_API_SERVICES.items():
        for name in methods:
            path = f"/{CLIENT_API}.{service}/{name}"
            request, reply = (found(f"{CLIENT_API}.{_capital(name)}{end}") for end in ("Request", "Response"))
            result[path] = Method(path, request, reply)
    return result


def _capital(name: str) -> str:
    return name[0].upper() + name[1:]


METHODS: Final[Mapping[str, Method]] = _methods()
"""By path: "/package.Service/Method", case and all as the originals have it."""
