"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, one short sentence each."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel

LONGEST_MESSAGE = 600  # characters; what a client sent is quoted, and can be long
RETRY_AFTER_S = 5
UNKNOWN, NOT_SERVED = "unknown_field", "not_served"  # types of errors of predict.serving.protocol


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """What every failed request is answered with."""

    error: ErrorDetail


class ApiError(HTTPException):
    """A request that cannot be answered.

    Args:
        status: the HTTP status.
        message: one sentence that says what was found and what is needed.
        param: the field of the request at fault.
        code: OpenAI's word for it, where it has one.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """The error as JSON, for a response or an event of a stream."""
        message = self.detail
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[:LONGEST_MESSAGE]} ..."
        # What cannot be encoded (a lone surrogate that was quoted) is shown as its number.
        message = message.encode(errors="backslashreplace").decode()
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        detail = {"message": message, "type": kind, "param": self.param, "code": self.code}
        return {"error": detail}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


def unavailable(message: str) -> ApiError:
    """503: the server is going down; another one may answer in a moment."""
    return ApiError(503, message, headers={"Retry-After": str(RETRY_AFTER_S)})


def refused(error: ValueError, request: type[BaseModel] | None) -> ApiError:
    """400 for a ValueError whose sentence may begin with the name of one of the ``request``'s fields."""
    first = re.match(r"(the )?(\w*)", str(error))
    name = first.group(2) if first else ""
    return ApiError(400, str(error), param=name if request is not None and name in request.model_fields else None)


def invalid(errors: Sequence[Mapping[str, Any]], request: type[BaseModel] | None) -> ApiError:
    """400 for what pydantic found wrong with a request, in one sentence.

    Args:
        errors: pydantic's, each with its place ("loc"), type and the value found.
        request: the model that was validated; the descriptions of its fields say what is needed.
    """
    # Of the alternatives a field has, the one that fits best was followed into its own fields.
    error, names, needed = max(((e, *_place(e, request)) for e in errors), key=lambda found: len(found[1]))
    if error["type"] == "value_error":  # by a validator of ours, whose sentence is complete
        return refused(error["ctx"]["error"], request)
    if error["type"] in (UNKNOWN, NOT_SERVED):
        wrong = "is not a field this server knows" if error["type"] == UNKNOWN else "is not supported by this server"
        return ApiError(400, f"{'.'.join(names):.80} {wrong}; leave it out", param=names[0][:80])
    found = _shown(error["input"])
    if not names:
        return ApiError(400, f"the body is {'missing' if error['type'] == 'missing' else found}, needs a JSON object")
    wrong = "missing" if error["type"] == "missing" else found
    message = f"{'.'.join(names)} is {wrong}, needs {needed or error['msg']}"
    return ApiError(400, message, param=names[0].partition("[")[0])


def _place(error: Mapping[str, Any], request: type[BaseModel] | None) -> tuple[list[str], str]:
    """The fields that lead to an error, as ["messages[1]", "role"], and what belongs there."""
    names: list[str] = []
    needed, model = "", request
    for part in error["loc"]:
        if isinstance(part, int) and names:
            names[-1] += f"[{part}]"
        elif model is not None and part in model.model_fields:
            names.append(part)
            needed = model.model_fields[part].description or needed
            model = next(iter(_models(model.model_fields[part].annotation)), None)
    if error["type"] in (UNKNOWN, NOT_SERVED):
        field = error["ctx"]["field"]
        names.append(field if field.isidentifier() else json.dumps(field))
    return names, needed


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models in an annotation such as list[Message] | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]


def _shown(value: Any) -> str:
    """A value as its sender wrote it, or what kind of value it is."""
    if isinstance(value, (str, int, float, type(None))):
        return f"{json.dumps(value, ensure_ascii=False):.80}"
    return "a list" if isinstance(value, list) else "an object"
