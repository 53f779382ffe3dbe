"""The routes: OpenAI's under /v1, /tokenize and /detokenize, /health, /metrics and the chat page."""

import asyncio
import time
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from predict.serving.answers import (
    ChatCompletionResponse,
    ChatFormat,
    CompletionFormat,
    CompletionResponse,
)
from predict.serving.errors import ApiError, ErrorResponse, invalid
from predict.serving.gate import Gate
from predict.serving.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from predict.serving.reply import reply
from predict.serving.service import READY, Service

PAGE = files("predict.serving") / "chat.html"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "what the request has and what it needs",
        401: "no API key, or another one",
        404: "another model",
        413: "a body larger than the server takes",
        500: "the engine failed",
        503: "the server is shutting down",
    }.items()
}


STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "the answer, whole or as a stream of chunks", "content": {"text/event-stream": {}}}
}


class _JsonRequest(Request):
    """Reads JSON as its standard defines it: no NaN, no Infinity, UTF-8, and no deeper than a parser's stack."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not valid JSON: {error}") from None


class _JsonRoute(APIRoute):
    def get_route_handler(self):
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


class ModelCard(BaseModel):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "paddle-mixtral"
    max_model_len: int


class ModelList(BaseModel):
    object: str = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: str


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeResponse(BaseModel):
    prompt: str


def create_app(service: Service, api_key: str | None = None, max_body_bytes: int = 4 * 2**20) -> Gate:
    """The server as an ASGI application.

    Args:
        service: the model that answers.
        api_key: what clients must send as a bearer token on every route but /health.
        max_body_bytes: longest body of a request.
    """
    app = FastAPI(title="paddle-mixtral", docs_url=None, redoc_url=None)
    app.include_router(_router(service), responses=ERRORS)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    return Gate(app, service, api_key, max_body_bytes, PAGE.read_bytes())


async def _on_http_error(request: Request, error: Any) -> Response:
    if not isinstance(error, ApiError):  # the framework's own: no such route, or method
        wrong = "is not a route of this server"
        if error.status_code == 405:
            wrong = f"is not allowed; this route needs {(error.headers or {}).get('Allow', 'another method')}"
        elif error.status_code != 404:
            wrong = f"is refused: {error.detail}"
        message = f"{request.method:.20} {request.url.path:.80} {wrong}"
        error = ApiError(error.status_code, message, headers=error.headers)
    return error.response()


async def _on_bug(_: Request, error: Exception) -> Response:
    """The framework prints the traceback; the client is told no more than it needs."""
    return ApiError(500, f"the server failed at this request ({type(error).__name__}): a bug").response()


async def _on_invalid(request: Request, error: Any) -> Response:
    errors = error.errors()
    if isinstance(errors[0].get("input"), bytes):
        kind = request.headers.get("content-type", "")
        message = f"the content-type of the body is {kind[:80]!r}, needs application/json"
        return ApiError(400, f"{message} (curl: -H 'Content-Type: application/json')").response()
    model = request.scope["route"].body_field.field_info.annotation
    return invalid(errors, model).response()


def _router(service: Service) -> APIRouter:
    router = APIRouter(route_class=_JsonRoute)

    @router.post("/v1/completions", response_model=CompletionResponse, responses=STREAM)
    async def completions(request: CompletionRequest, http: Request) -> Any:
        """Continues each prompt."""
        service.check_model(request.model)
        job = await service.completion_job(request)
        answer = CompletionFormat(service.llm.tokenizer, request.logprobs)
        header = {"id": f"cmpl-{job.name}", "created": int(time.time()), "model": service.name}
        return await reply(http, job, answer, header, bool(request.stream), request.stream_options)

    @router.post("/v1/chat/completions", response_model=ChatCompletionResponse, responses=STREAM)
    async def chat_completions(request: ChatCompletionRequest, http: Request) -> Any:
        """Answers a conversation."""
        service.check_model(request.model)
        job = await service.chat_job(request)
        top = (request.top_logprobs or 0) if request.logprobs else None
        answer = ChatFormat(service.llm.tokenizer, top)
        header = {"id": f"chatcmpl-{job.name}", "created": int(time.time()), "model": service.name}
        return await reply(http, job, answer, header, bool(request.stream), request.stream_options)

    @router.get("/v1/models")
    async def models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[card()])

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        """The model that is served, if it has that name."""
        service.check_model(name)
        return card()

    def card() -> ModelCard:
        return ModelCard(id=service.name, created=service.created, max_model_len=service.llm.total_max_length)

    @router.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> TokenizeResponse:
        """The token ids of a prompt, or of a conversation."""
        service.check_model(request.model)
        if request.messages is not None:
            tokens = await asyncio.to_thread(service.encode_messages, request.messages)
        else:
            tokens = await asyncio.to_thread(
                service.encode, request.prompt or "", request.add_special_tokens is not False
            )
        return TokenizeResponse(count=len(tokens), max_model_len=service.llm.total_max_length, tokens=tokens)

    @router.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> DetokenizeResponse:
        """The text of token ids."""
        service.check_model(request.model)
        service.check_token_ids("tokens", request.tokens)
        return DetokenizeResponse(prompt=await asyncio.to_thread(service.llm.tokenizer.decode, request.tokens))

    @router.get("/health", responses={503: {"model": Health, "description": "shutting down, or failed"}})
    async def health() -> Health:
        """Whether requests are answered."""
        state = Health(status=service.state)
        return state if service.state == READY else JSONResponse(state.model_dump(), 503)  # type: ignore[return-value]

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_bytes())

    return router
