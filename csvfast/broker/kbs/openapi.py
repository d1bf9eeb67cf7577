"""The HTTP interface as an OpenAPI document, served at /kbs/v0/openapi.json.

It says what is accepted and answered, so that it can be tested against the server; the prose is in docs/broker-kbs.md.

Source: OpenAPI 3.1.1; confidential-containers/trustee kbs/docs/kbs.yaml. Thread-safety: functions without state.
"""

from __future__ import annotations

from typing import Any, Final

from csvfast import __version__

__all__ = ["openapi"]

_SEGMENT: Final = "[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}"
_NAME: Final = "^[A-Za-z0-9._-]{1,128}$"
_STRING: Final = {"type": "string"}
_ADMINISTRATOR: Final[list[dict[str, list[str]]]] = [{"administrator": []}]
_VERSION: Final = {"type": "integer", "minimum": 1, "maximum": 2147483647}
_EXPIRES: Final = {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1 << 39}


def openapi() -> dict[str, Any]:
    """The document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "csvfast key broker",
            "version": __version__,
            "description": "CoCo's Key Broker Service (/kbs/v0) and csvfast's administration (/csvfast/v0).",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {**_guests(), **_coco_administration(), **_administration(), **_operations()},
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "session": {"type": "apiKey", "in": "cookie", "name": "kbs-session-id"},
                "token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
                "administrator": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None, *, closed: bool = True) -> dict[str, Any]:
    properties = {**required, **(optional or {})}
    schema: dict[str, Any] = {"type": "object", "properties": properties, "required": list(required)}
    return {**schema, "additionalProperties": False} if closed else schema


def _list(item: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": item, **more}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _answer(text: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"description": text} if schema is None else {"description": text, "content": _json(schema)}


def _body(schema: dict[str, Any], *, required: bool = True) -> dict[str, Any]:
    return {"required": required, "content": _json(schema)}


def _bytes_body() -> dict[str, Any]:
    return {"required": True, "content": {"application/octet-stream": {"schema": {"type": "string", "minLength": 1}}}}


def _parameter(name: str, schema: dict[str, Any], place: str = "path") -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": schema}


def _kbs(summary: str, answers: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An operation with CoCo's errors."""
    errors = {str(code): _answer("refused", _ref("KbsError")) for code in (400, 401, 404, 413, 431)}
    return {"summary": summary, "responses": {**errors, **answers}, **more}


def _desk(summary: str, answers: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An operation with csvfast's errors."""
    errors = {str(code): _answer("refused", _ref("Error")) for code in (400, 401, 403, 404, 409, 413, 429, 431, 503)}
    return {"summary": summary, "responses": {**errors, **answers}, "security": [{"administrator": []}], **more}


def _resource_parameters() -> list[dict[str, Any]]:
    return [_parameter(name, {"type": "string", "pattern": f"^{_SEGMENT}$"}) for name in ("repository", "type", "tag")]


def _guests() -> dict[str, Any]:
    attested = _answer("a session's token", _object({"token": _STRING}))
    return {
        "/kbs/v0/auth": {
            "post": _kbs(
                "Request a challenge",
                {"200": _answer("the challenge, and a session's cookie", _ref("Challenge"))},
                requestBody=_body(_ref("Request")),
            )
        },
        "/kbs/v0/attest": {
            "post": _kbs(
                "Attest a session", {"200": attested}, requestBody=_body(_ref("Attestation")), security=[{"session": []}]
            )
        },
        "/kbs/v0/resource/{repository}/{type}/{tag}": {
            "parameters": _resource_parameters(),
            "get": _kbs(
                "A resource, encrypted to the session's key",
                {"200": _answer("flattened JWE", _ref("Jwe"))},
                parameters=[_parameter("version", {"type": "string", "pattern": "^[0-9]{1,9}$"}, "query")],
                security=[{"session": []}, {"token": []}],
            ),
            "post": _kbs("Set a resource", {"200": _answer("set")}, requestBody=_bytes_body(), security=_ADMINISTRATOR),
            "delete": _kbs("Destroy a resource", {"200": _answer("destroyed")}, security=_ADMINISTRATOR),
        },
    }


def _coco_administration() -> dict[str, Any]:
    policy = _object({"policy": _STRING})
    return {
        "/kbs/v0/resource-policy": {
            "get": _kbs("The resource policy", {"200": _answer("base64url", policy)}, security=_ADMINISTRATOR),
            "post": _kbs("Set it, in Rego", {"200": _answer("set")}, requestBody=_body(policy), security=_ADMINISTRATOR),
        },
        "/kbs/v0/attestation-policy": {
            "post": _kbs(
                "Set an appraisal policy, in Rego",
                {"200": _answer("set")},
                requestBody=_body(_object({"policy_id": _STRING, "policy": _STRING}, {"type": {"const": "rego"}})),
                security=_ADMINISTRATOR,
            )
        },
        "/kbs/v0/reference-value": {
            "post": _kbs(
                "Register reference values", {"200": _answer("set")}, requestBody=_body(_ref("Rvps")), security=_ADMINISTRATOR
            )
        },
        "/kbs/v0/reference-value/{name}": {
            "parameters": [_parameter("name", {"type": "string", "pattern": _NAME})],
            "get": _kbs("Reference values", {"200": _answer("a value, or a list", {})}, security=_ADMINISTRATOR),
        },
    }


def _administration() -> dict[str, Any]:
    version = {"200": _answer("the version's number", _object({"version": _VERSION}))}
    done = {"204": _answer("done")}
    name = [_parameter("name", {"type": "string", "pattern": _NAME})]
    where = _resource_parameters()
    resource = "{repository}/{type}/{tag}"
    octets = {"200": {"description": "the content", "content": {"application/octet-stream": {"schema": _STRING}}}}
    policy = [_parameter("kind", {"enum": ["appraisal", "resource"]}), _parameter("id", {"type": "string", "pattern": _NAME})]
    role = {"enum": ["audit", "keys", "policy"]}
    dry_run = _object(
        {"kind": {"enum": ["appraisal", "resource"]}, "document": {"type": "object"}},
        {"id": _STRING, "text": _STRING, "engine": {"enum": ["rules", "rego"]}},
    )
    paths: dict[str, Any] = {
        "/resources": {
            "get": _desk("Resources", {"200": _answer("versions", _object({"resources": _list(_ref("ResourceRow"))}))})
        },
        f"/resource/{resource}": {
            "parameters": where,
            "post": _desk("A new version", version, requestBody=_bytes_body()),
            "delete": _desk("Destroy all versions", done),
        },
        f"/rotate/{resource}": {"parameters": where, "post": _desk("A new version of random bytes", version)},
        f"/create/{resource}": {"parameters": where, "post": _desk("A new random key", version)},
        f"/retire/{resource}": {
            "parameters": where,
            "post": _desk("Release a version no more", done, requestBody=_body(_object({"version": _VERSION}))),
        },
        f"/read/{resource}": {
            "parameters": where,
            "post": _desk("Export", octets, requestBody=_body(_object({}, {"version": _VERSION}), required=False)),
        },
        "/policies": {"get": _desk("Policies", {"200": _answer("versions", _object({"policies": _list(_ref("PolicyRow"))}))})},
        "/policies/{kind}/{id}": {
            "parameters": policy,
            "get": _desk(
                "A policy",
                {"200": _answer("a version", _ref("PolicyRow"))},
                parameters=[_parameter("version", {"type": "integer", "minimum": 1, "maximum": 1 << 30}, "query")],
            ),
            "put": _desk(
                "A new version", version, requestBody=_body(_object({"text": _STRING}, {"engine": {"enum": ["rules", "rego"]}}))
            ),
            "delete": _desk("Delete", done),
        },
        "/dry-run": {
            "post": _desk(
                "What a policy says of a document",
                {"200": _answer("its decision", _object({"decision": {"type": "object"}, "explanation": _STRING}))},
                requestBody=_body(dry_run),
            )
        },
        "/references": {
            "get": _desk("Reference values", {"200": _answer("all", _object({"references": _list(_ref("ReferenceRow"))}))})
        },
        "/references/{name}": {
            "parameters": name,
            "get": _desk("A reference", {"200": _answer("its values", _ref("ReferenceRow"))}),
            "put": _desk(
                "Set a reference",
                done,
                requestBody=_body(_object({"values": _list({}, minItems=1, maxItems=10000)}, {"expires": _EXPIRES})),
            ),
            "delete": _desk("Withdraw a reference", done),
        },
        "/tokens": {
            "get": _desk("Tokens", {"200": _answer("without their texts", _object({"tokens": _list(_ref("TokenRow"))}))}),
            "post": _desk(
                "A new token",
                {"201": _answer("its text, this once", _object({"token": _STRING}))},
                requestBody=_body(
                    _object(
                        {"name": {"type": "string", "pattern": _NAME}, "roles": _list(role, minItems=1)},
                        {"scope": {"type": "string", "pattern": "^[ -~]{1,512}$"}, "expires": _EXPIRES},
                    )
                ),
            ),
        },
        "/tokens/{name}": {"parameters": name, "delete": _desk("Revoke a token", done)},
        "/audit": {
            "get": _desk(
                "Audit records; further parameters are members that must be equal",
                {"200": _answer("in order", _object({"records": _list(_ref("AuditRow"))}))},
                parameters=[
                    _parameter("after", {"type": "integer", "minimum": 0, "maximum": 1 << 62}, "query"),
                    _parameter("limit", {"type": "integer", "minimum": 1, "maximum": 1000}, "query"),
                ],
            )
        },
        "/audit/verification": {"get": _desk("Verify the log", {"200": _answer("what was found", _ref("AuditVerification"))})},
        "/audit/key": {"get": _desk("Key of the log's heads", {"200": _answer("SM2 point", _object({"point": _STRING}))})},
    }
    return {f"/csvfast/v0{path}": operations for path, operations in paths.items()}


def _operations() -> dict[str, Any]:
    status = _object({"status": {"enum": ["ok", "unavailable"]}})
    page = {"200": {"description": "Prometheus text", "content": {"text/plain": {"schema": _STRING}}}}
    return {
        "/kbs/v0/openapi.json": {"get": _kbs("This document", {"200": _answer("OpenAPI", {"type": "object"})})},
        "/kbs/v0/jwks.json": {
            "get": _kbs("Keys of tokens", {"200": _answer("JWK set", _object({"keys": _list({"type": "object"})}))})
        },
        "/healthz": {
            "get": {
                "summary": "Is the store reachable and writable?",
                "responses": {
                    "200": _answer("yes", status), "503": _answer("no", status),
                    **{str(code): _answer("refused", _ref("KbsError")) for code in (400, 413, 431)},
                },
            }
        },
        "/metrics": {
            "get": {
                "summary": "Counters",
                "responses": {**page, **{str(code): _answer("refused", _ref("KbsError")) for code in (400, 413, 431)}},
            }
        },
    }  # fmt: skip


def _schemas() -> dict[str, Any]:
    base64url = {"type": "string", "pattern": "^[A-Za-z0-9_-]*$"}
    time = {"type": "number"}
    versioned = {"version": _VERSION, "created": time}
    key = _object({"kty": {"enum": ["EC", "RSA"]}, "alg": {"enum": ["ECDH-ES+A256KW", "RSA-OAEP-256"]}}, closed=False)
    return {
        "Request": _object(
            {"version": {"const": "0.4.0"}, "tee": {"const": "csv"}},
            {"extra-params": {"type": ["string", "object"]}},
            closed=False,
        ),
        "Challenge": _object({"nonce": _STRING, "extra-params": {"const": ""}}),
        "Attestation": _object(
            {
                "runtime-data": _object({"nonce": _STRING, "tee-pubkey": key}, closed=False),
                "tee-evidence": _object(
                    {"primary_evidence": {"type": "object"}, "additional_evidence": _STRING}, closed=False
                ),
            },
            {"init-data": {"type": ["object", "null"]}},
            closed=False,
        ),
        "Jwe": _object(dict.fromkeys(("protected", "encrypted_key", "iv", "ciphertext", "tag"), base64url)),
        "Rvps": _object({"type": {"const": "sample"}, "payload": _STRING}, {"version": {"const": "0.1.0"}}),
        "KbsError": _object({"type": {"type": "string", "format": "uri"}, "detail": _STRING}),
        "Error": _object({"error": _STRING, "detail": _STRING, "correlation": _STRING}),
        "ResourceRow": _object({"path": _STRING, "state": _STRING, "changed": time, **versioned}),
        "PolicyRow": _object(
            {"kind": _STRING, "id": _STRING, "engine": _STRING, "text": _STRING, "deleted": {"type": "boolean"}, **versioned}
        ),
        "ReferenceRow": _object(
            {
                "name": _STRING, "values": _list({}), "expires": {"type": ["number", "null"]}, "created": time,
                "deleted": {"type": "boolean"},
            }
        ),
        "TokenRow": _object(
            {"name": _STRING, "roles": _list(_STRING), "scope": _STRING, "created": time, "expires": {"type": ["number", "null"]}}
        ),
        "AuditRow": _object(
            {
                "sequence": {"type": "integer"}, "time": {"type": "integer"}, "subject": {"type": "object"},
                "policy": {"type": "object"}, "resource_version": {"type": ["integer", "null"]},
                **dict.fromkeys(
                    ("correlation", "door", "action", "outcome", "actor", "address", "resource", "reason"), _STRING
                ),
            }
        ),
        "AuditVerification": _object(
            {
                "count": {"type": "integer"}, "bad": {"type": ["integer", "null"]}, "problem": _STRING,
                "head": {"type": "boolean"},
            },
            closed=False,
        ),
    }  # fmt: skip
