"""From a job's deltas to the response: collected into one, or streamed as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event

from predict.llm import Collector, Completion
from predict.serving.answers import CachedTokens, ChatFormat, CompletionFormat, Usage
from predict.serving.errors import ApiError
from predict.serving.protocol import StreamOptions
from predict.serving.worker import Job

CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody reads it but the metrics
Format = CompletionFormat | ChatFormat


async def reply(
    http: Request, job: Job, answer: Format, header: dict[str, Any], stream: bool, options: StreamOptions | None
) -> Any:
    """The response to a request whose job the engine has: a whole answer, or a stream.

    Args:
        http: tells when the client has gone.
        header: "id", "created" and "model" of the response, or of each chunk.
        stream, options: what the request has of these names.
    """
    http.state.job = job  # the gate ends it with the request, however that ends
    if stream:
        chunks = _stream(job, answer, header, options)
        return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    collected = asyncio.ensure_future(_collect(job))
    gone = asyncio.ensure_future(_disconnect(http))
    try:
        await asyncio.wait([collected, gone], return_when=asyncio.FIRST_COMPLETED)
        if not collected.done():
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        completions, cached = collected.result()
    finally:
        collected.cancel()
        gone.cancel()
    usage = _usage(job, sum(len(completion.token_ids) for completion in completions), cached)
    return answer.response(header, completions, usage)


async def _collect(job: Job) -> tuple[list[Completion], int]:
    """Every choice, in order, and the prompt tokens found in the cache."""
    choices = [Collector(ids, index) for ids in job.prompts for index in range(job.params.n)]
    cached = [0] * len(job.prompts)
    async for prompt, delta in job.deltas():
        choices[prompt * job.params.n + delta.index].add(delta)
        cached[prompt] = delta.num_cached_tokens
    return [choice.completion() for choice in choices], sum(cached)


async def _disconnect(http: Request) -> None:
    """Returns when the client has gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    job: Job, answer: Format, header: dict[str, Any], options: StreamOptions | None
) -> AsyncIterator[bytes]:
    """Server-sent events: a chunk for each delta that shows something, then "[DONE]"."""
    header = {**header, "object": answer.chunk_object}
    include_usage = options is not None and bool(options.include_usage)
    continuous = options is not None and bool(options.continuous_usage_stats)
    generated, cached = 0, [0] * len(job.prompts)

    def event(choices: list[dict[str, Any]], counts: bool) -> bytes:
        chunk = {**header, "choices": choices}
        if include_usage or continuous:
            chunk["usage"] = _usage(job, generated, sum(cached)).model_dump() if counts else None
        return _event(chunk)

    try:
        for index in range(len(job.prompts) * job.params.n):
            if (opening := answer.opening(index)) is not None:
                yield event([opening], False)
        async for prompt, delta in job.deltas():
            generated += len(delta.token_ids)
            cached[prompt] = delta.num_cached_tokens
            if delta.text or delta.finish_reason or answer.top is not None or continuous:
                choice = answer.chunk(prompt * job.params.n + delta.index, delta)
                yield event([choice], continuous)
                await asyncio.sleep(0)  # others' turn, and that of the news that the client has gone
        if include_usage:
            yield event([], True)
        yield format_sse_event(data_str="[DONE]")
    except ApiError as error:
        yield _event(error.body())


def _event(content: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=json.dumps(content, ensure_ascii=False, separators=(",", ":")))


def _usage(job: Job, generated: int, cached: int) -> Usage:
    prompt = sum(map(len, job.prompts))
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=generated,
        total_tokens=prompt + generated,
        prompt_tokens_details=CachedTokens(cached_tokens=cached),
    )
