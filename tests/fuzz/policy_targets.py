"""Policies and reference values of the key broker, as administrators might mistype them."""

from __future__ import annotations

import base64
import json
from collections.abc import Hashable

from csvfast.broker.policy import Decision, References, compile_policy, default_policies, dry_run
from csvfast.broker.policy.references import build_message, parse_message
from csvfast.errors import FormatError, RequestError
from fuzz.target import Target

__all__ = ["ReferenceMessageTarget", "RulesTarget"]

_OPERATORS = (
    "equals = 1", 'not_equals = "a"', "in = [1, 2]", "min = 1", "max = 1", "mask = 3\nvalue = 1", 'version_min = "1.3"',
    'matches = "a*b"', 'reference = "r"', 'min_reference = "r"', 'version_min_reference = "r"\noptional = true',
)  # fmt: skip
_DOCUMENT = {"tee": "csv", "plugin": "resource", "resource": "default/key/a", "status": "affirming", "x": {"b": [1, "1.3"]}}


class RulesTarget(Target):
    """TOML rules of both kinds: what is read says why it decides, of a document as of none, and nothing is allowed by no rule."""

    text = True

    def __init__(self) -> None:
        super().__init__()
        head = 'name = "fuzz"\nversion = "1"\n'
        for operator in _OPERATORS:
            rule = f'name = "it"\nclaim = "x.b.0"\n{operator}\n'
            self.seeds.append(f"{head}[[rule]]\n{rule}trust = {{ hardware = 2 }}\nwhen = {{ tee = 'c*' }}\n".encode())
            self.seeds.append(f'{head}[[allow]]\nresource = "default/*/*"\n[[allow.rule]]\n{rule}'.encode())
        self.seeds.append(f'{head}[[rule]]\nname = "or"\nany = [{{ claim = "tee", equals = "csv" }}]\n'.encode())
        self.seeds += [text.encode() for _kind, _name, _engine, text in default_policies()]

    def handle(self, data: bytes) -> Hashable:
        text = data.decode("utf-8", "replace")
        kind = "resource" if "[[allow" in text else "appraisal"
        try:
            policy = compile_policy(kind, "rules", text)
        except FormatError as error:
            return error.expected  # not the field: rules have any name
        nothing = References()
        decision = policy.evaluate(_DOCUMENT, nothing, 0.0)
        assert decision.checked or not decision.allowed
        assert Decision.from_dict(json.loads(json.dumps(decision.to_dict()))) == decision
        assert dry_run(policy, _DOCUMENT, nothing, 0.0)
        assert not policy.evaluate({}, nothing, 0.0).allowed
        return kind, decision.allowed, decision.status


class ReferenceMessageTarget(Target):
    """Messages that register reference values, and the payload inside by itself."""

    text = True

    def __init__(self) -> None:
        super().__init__()
        self.payloads = [b'{"csv_measure":["aa","bb"]}', b'{"svn":3,"a":[true,{"b":1.5}]}', b'{"csv_min_api":"1.3"}', b'{"a":[]}']
        self.seeds = [build_message(json.loads(payload)) for payload in self.payloads] + self.payloads
        self.seeds.append(b'{"type":"sample","payload":"e30="}')

    def handle(self, data: bytes) -> Hashable:
        if b"payload" not in data:
            data = b'{"version":"0.1.0","type":"sample","payload":"%s"}' % base64.b64encode(data)
        try:
            found = parse_message(data, 1e9)
        except FormatError as error:
            return error.expected
        except RequestError as error:
            return str(error).partition(";")[0][:40]
        again = parse_message(build_message({name: one.for_rego() for name, one in found.items()}), 1e9)
        assert again == found
        return tuple((len(one.items), one.single) for one in found.values())
