"""What every request passes before its route: key, size of the body, whether the server is open; and how it ends."""

import secrets

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from predict.serving.errors import ApiError
from predict.serving.service import Service

ALWAYS_OPEN = ("/health", "/metrics")  # while the server shuts down


class Gate:
    """An ASGI application in front of ``app``.

    Args:
        app: has the routes.
        service: is told which requests are under way.
        api_key: what every route but /health asks for; None: nothing.
        max_body_bytes: longest body of a request.
        page: the chat page, which asks for the key where it is missing.
    """

    def __init__(self, app: ASGIApp, service: Service, api_key: str | None, max_body_bytes: int, page: bytes):
        self.app, self._service, self._page = app, service, page
        self._key = None if api_key is None else api_key.encode()
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500  # unless a response begins

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, watched_send)
        finally:
            self._service.in_flight.discard(id(scope))
            if (job := scope.get("state", {}).get("job")) is not None:
                self._service.worker.abort(job)
            # The route, not the path: clients can ask for any number of paths.
            route = getattr(scope.get("route"), "path", "none")
            self._service.metrics.requests.labels(route, str(status)).inc()

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            self._check_key(scope["path"], headers)
            self._check_length(headers)
            if scope["path"] not in ALWAYS_OPEN:
                self._service.check_open()
        except ApiError as error:
            response: Response = error.response()
            if error.status_code == 401 and scope["path"] == "/" and "text/html" in headers.get("accept", ""):
                response = HTMLResponse(self._page, 401, error.headers)
            await response(scope, receive, send)
            return
        await self.app(scope, self._limited(scope, receive), send)

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._key is None or path == "/health":
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), self._key):
            found = "is missing" if not given else "is not the server's"
            raise ApiError(
                401,
                f"the API key {found}; send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            raise self._too_large()

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """``receive``, up to the limit; a request is under way once its body has come."""
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body_bytes:
                raise self._too_large()
            if message["type"] == "http.request" and not message.get("more_body"):
                self._service.check_open()
                self._service.in_flight.add(id(scope))
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than the {self._max_body_bytes} bytes this server takes (--max_body_bytes)",
            headers={"Connection": "close"},
        )
