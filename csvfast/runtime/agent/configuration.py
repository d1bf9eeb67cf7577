"""The agent's configuration: whom it asks for keys, where it fetches images, what it does for the host.

It is JSON, and it is measured: in a virtual machine as a second archive of the initrd, elsewhere as part of the launch blob. What
stands in it is therefore what the owner approved, and everybody can read it: no secrets.

    {"version": 1,
     "broker": {"door": "verdictd", "address": "10.0.2.2:1234", "pin": "<SHA-256 of its public key, hexadecimal>"},
               {"door": "kbs", "url": "https://broker:8080", "pin": "<SHA-256 of its certificate>" or "ca": "<PEM>"},
               {"door": "none"}: images that are not encrypted
     "registries": [{"host": "10.0.2.2:*", "plain_http": true}],
     "keys": {"old/key/id": "repository/type/tag"},          key ids of packets -> resources of the broker
     "limits": {"image_bytes": 1073741824, "entries": 100000},
     "policy": {...}}                                         csvfast.runtime.agent_policy

A broker without "pin" or "ca" is refused unless "unattested": true says that anybody may answer: what comes from it is then
decrypted and run all the same, but a man in the middle learns which image it is.

Thread-safety: immutable.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final, Self

from csvfast.errors import ContainerError
from csvfast.runtime.agent_policy import AgentPolicy
from csvfast.runtime.protocol import decode_object

__all__ = ["CONFIGURATION_MAX", "AgentConfiguration"]

CONFIGURATION_MAX: Final = 1 << 20
VERSION: Final = 1
_PIN: Final = re.compile(r"[0-9a-f]{64}\Z")
_BROKER: Final[dict[str, dict[str, type]]] = {
    "verdictd": {"address": str, "pin": str, "unattested": bool, "decrypt": bool},
    "kbs": {"url": str, "pin": str, "ca": str, "unattested": bool},
    "none": {},
}
_REGISTRY: Final[dict[str, type]] = {"host": str, "plain_http": bool}
_MEMBERS: Final[dict[str, type]] = {
    "version": int, "broker": dict, "registries": list, "keys": dict, "limits": dict, "policy": dict,
}  # fmt: skip
_LIMITS: Final = ("image_bytes", "entries", "memory")


class AgentConfiguration:
    """See the module.

    Args: broker: the door, as in the JSON. registries: rules, the first that matches a host counts. keys: where a key id's key
        is found when it is not where its id says. policy: of the agent. limits: of one image.
    Raises: ContainerError "state": something in it is unknown or of another type.
    """

    def __init__(
        self,
        *,
        policy: AgentPolicy,
        broker: Mapping[str, Any] | None = None,
        registries: Sequence[Mapping[str, Any]] = (),
        keys: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        self.policy = policy
        self.broker = _checked_broker({"door": "none"} if broker is None else dict(broker))
        self.registries = tuple(_checked("registries", dict(rule), _REGISTRY) for rule in registries)
        if any("host" not in rule for rule in self.registries):
            raise ContainerError("state", "configuration: a registry without host")
        self.keys = dict(keys or {})
        if not all(isinstance(one, str) for pair in self.keys.items() for one in pair):
            raise ContainerError("state", "configuration: keys: expected texts")
        self.limits = dict(limits or {})
        for name, value in self.limits.items():
            if name not in _LIMITS or type(value) is not int or value <= 0:
                raise ContainerError("state", f"configuration: limits: {name[:40]!r}; expected {', '.join(_LIMITS)}, numbers")

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """From JSON. ContainerError: "state", "policy", "protocol": no JSON object."""
        if len(data) > CONFIGURATION_MAX:
            raise ContainerError("state", f"configuration of {len(data)} bytes; at most {CONFIGURATION_MAX} go")
        document = decode_object(data, "configuration")
        found = _checked("it", document, _MEMBERS)
        if found.pop("version", None) != VERSION:
            raise ContainerError("state", f"configuration: expected version {VERSION}")
        if not all(isinstance(rule, dict) for rule in found.get("registries", ())):
            raise ContainerError("state", "configuration: registries: expected objects")
        return cls(**found | {"policy": AgentPolicy.parse(found.get("policy", {}))})

    def encode(self) -> bytes:
        """JSON: the same configuration gives the same bytes."""
        document: dict[str, Any] = {"version": VERSION, "broker": self.broker, "policy": self.policy.document()}
        for name in ("registries", "keys", "limits"):
            if value := getattr(self, name):
                document[name] = list(value) if isinstance(value, tuple) else value
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()

    def plain_http(self, host: str) -> bool | None:
        """Whether host[:port] is asked without TLS; None: nothing is said about it."""
        for rule in self.registries:
            if fnmatchcase(host, rule["host"]):
                return bool(rule.get("plain_http", False))
        return None


def _checked(where: str, document: dict[str, Any], types: Mapping[str, type]) -> dict[str, Any]:
    for name, value in document.items():
        if name not in types:
            known = ", ".join(types) or "nothing"
            raise ContainerError("state", f"configuration: {where}: {name[:40]!r} is unknown; expected {known}")
        if type(value) is not types[name]:
            raise ContainerError("state", f"configuration: {where}: {name}: expected {types[name].__name__}")
    return document


def _checked_broker(broker: dict[str, Any]) -> dict[str, Any]:
    door = broker.get("door")
    if door not in _BROKER:
        raise ContainerError("state", f"configuration: door {str(door)[:40]!r}; expected {', '.join(_BROKER)}")
    _checked("broker", broker, {"door": str} | _BROKER[door])
    if door == "none":
        return broker
    place = "address" if door == "verdictd" else "url"
    if place not in broker:
        raise ContainerError("state", f"configuration: broker: expected {place}")
    if "pin" in broker and not _PIN.match(broker["pin"]):
        raise ContainerError("state", "configuration: broker: pin: expected 64 lower-case hexadecimal digits")
    if door == "kbs" and not broker["url"].startswith("https://"):
        if not broker["url"].startswith("http://"):
            raise ContainerError("state", "configuration: broker: url: expected http:// or https://")
        if "pin" in broker or "ca" in broker:  # nothing would be compared with them
            raise ContainerError("state", "configuration: broker: pin and ca need an url with https://")
    if not broker.get("unattested") and "pin" not in broker and "ca" not in broker:
        wanted = 'pin, ca or "unattested": true'
        raise ContainerError("state", f"configuration: broker: nothing says which one it is; expected {wanted}")
    return broker
