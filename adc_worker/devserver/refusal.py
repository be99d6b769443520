"""Reading what a request says, and refusing it with the status and the words that Antenna uses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

import orjson

if TYPE_CHECKING:
    from aiohttp import web

REQUIRED = "This field is required."


class RefusedError(Exception):
    """The request ends here, with `status` and `body` as its answer."""

    def __init__(self, status: int, body: object) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body


def forbidden() -> NoReturn:
    raise RefusedError(403, {"detail": "You do not have permission to perform this action."})


def not_found() -> NoReturn:
    raise RefusedError(404, {"detail": "Not found."})


def integer(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


async def read_body(request: web.Request) -> dict[str, Any]:
    raw = await request.read()
    if request.content_type != "application/json":
        raise RefusedError(415, {"detail": f'Unsupported media type "{request.content_type}" in request.'})
    try:
        body = orjson.loads(raw)
    except ValueError:
        body = _parse_again(raw)
    if not isinstance(body, dict):
        kind = type(body).__name__
        words = f"Invalid data. Expected a dictionary, but got {kind}."
        raise RefusedError(400, {"non_field_errors": [words]})
    return body


def _parse_again(raw: bytes) -> Any:
    """What orjson would not read, by the parser that Antenna uses: for the words of its error."""

    def refuse(constant: str) -> NoReturn:
        message = f"Out of range float values are not JSON compliant: {constant!r}"
        raise ValueError(message)

    try:
        return json.loads(raw, parse_constant=refuse)
    except ValueError as error:
        raise RefusedError(400, {"detail": f"JSON parse error - {error}"}) from None


def list_field(body: dict[str, Any], name: str) -> list[Any]:
    if name not in body:
        raise RefusedError(400, {name: [REQUIRED]})
    if not isinstance(body[name], list):
        problem = {"loc": ["__root__"], "msg": "value is not a valid list", "type": "type_error.list"}
        raise RefusedError(400, {name: [problem]})
    entries: list[Any] = body[name]
    return entries


def positive_integer(body: dict[str, Any], name: str) -> int:
    value = body.get(name)
    if name not in body:
        raise RefusedError(400, {name: [REQUIRED]})
    if value is None:
        raise RefusedError(400, {name: ["This field may not be null."]})
    if isinstance(value, bool) or not isinstance(value, int):
        raise RefusedError(400, {name: ["A valid integer is required."]})
    if value < 1:
        raise RefusedError(400, {name: ["Ensure this value is greater than or equal to 1."]})
    return value
