"""The OpenAI completions form over HTTP: ``model`` names the adapter, "base" is the model itself."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prometheus_client as prometheus
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.engine import BASE, Engine, Refused, Request


def _error(status: int, message: str) -> JSONResponse:
    kind = {404: "not_found", 429: "rate_limit"}.get(status, "invalid_request_error")
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)


def _asked(body: Any, tokenizer: Any, told: Any, known: Any) -> Request:
    """The request that a body asks for, or `Refused`."""
    if not isinstance(body, dict):
        raise Refused(400, "the body is not a JSON object")
    prompt, new, temperature = body.get("prompt"), body.get("max_tokens", 16), body.get("temperature", 1.0)
    if isinstance(prompt, str):
        prompt = tokenizer.encode(prompt)
    if not isinstance(prompt, list) or not all(type(x) is int and 0 <= x < tokenizer.vocab for x in prompt):
        raise Refused(400, "prompt is neither a string nor a list of token numbers")
    if type(new) is not int or new < 1:
        raise Refused(400, "max_tokens is not a positive integer")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature <= 2:
        raise Refused(400, "temperature is not a number from 0 to 2")
    model = body.get("model")
    if not isinstance(model, str) or not (model == BASE or known(model)):
        raise Refused(404, f"there is no adapter {model!r}")
    return Request(model, prompt, new, float(temperature), told, tokenizer.stop)


def pieces(decode: Callable[[list[int]], str]) -> Callable[[int | None], str]:
    """Builds ``piece(token)``, the text that a token adds, and ``piece(None)``, what is left at the end.

    A character of several tokens comes with the last of them; until then it decodes to U+FFFD.
    """
    made: list[int] = []
    sent = 0

    def piece(token):
        nonlocal sent
        made.extend([] if token is None else [token])
        text = decode(made)
        if token is not None and text.endswith("\ufffd"):
            return ""
        new, sent = text[sent:], len(text)
        return new

    return piece


def make_app(engine: Engine, tokenizer: Any, folder: Path) -> Starlette:
    """The application; adapters are the folders in ``folder``, which may come while it runs."""
    registry = prometheus.CollectorRegistry()
    answers = prometheus.Counter("requests", "Requests by HTTP status.", ["status"], registry=registry)
    gauges = {
        "tokens": lambda: engine.tokens,
        "steps": lambda: engine.steps,
        "swaps": lambda: engine.adapters.swaps,
        "waiting": lambda: len(engine.waiting),
        "rows_busy": lambda: sum(row is not None for row in engine.rows),
    }
    for name, value in gauges.items():
        prometheus.Gauge(f"serve_{name}", name, registry=registry).set_function(value)

    def known(name: str) -> bool:
        return name == Path(name).name and not name.startswith(".") and (folder / name).is_dir()

    async def hung_up(http, request, told):
        """Ends the request where its client hangs up: in the queue, at the prompt or while it is answered."""
        while not await http.is_disconnected():
            await asyncio.sleep(0.05)
        request.cancelled = True
        told.put_nowait(None)

    async def completions(http):
        loop, told = asyncio.get_running_loop(), asyncio.Queue()
        try:
            try:
                body = json.loads(await http.body())
            except ValueError as failure:
                raise Refused(400, f"the body is not JSON: {failure}") from None
            request = _asked(body, tokenizer, lambda x: loop.call_soon_threadsafe(told.put_nowait, x), known)
            engine.submit(request)
            watch = asyncio.create_task(hung_up(http, request, told))
            first = await told.get()
            if isinstance(first, Refused):
                watch.cancel()
                raise first
        except Refused as refused:
            answers.labels(refused.status).inc()
            return _error(refused.status, str(refused))
        answers.labels(200).inc()
        head = {
            "id": "cmpl",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.adapter,
        }

        def part(text, finish):
            return head | {"choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}]}

        async def tokens():
            token = first
            try:
                while token is not None:
                    yield token
                    token = await told.get()
                    if isinstance(token, Refused):
                        raise token
            finally:
                request.cancelled = True  # also where the client of a stream hung up: its row becomes free

        async def events():
            piece = pieces(tokenizer.decode)
            async for token in tokens():
                if new := piece(token):
                    yield f"data: {json.dumps(part(new, None))}\n\n"
            finish = "length" if request.made == request.new else "stop"
            yield f"data: {json.dumps(part(piece(None), finish))}\n\ndata: [DONE]\n\n"

        if body.get("stream"):
            watch.cancel()  # from here on the response itself notices
            return StreamingResponse(events(), media_type="text/event-stream")
        try:
            made = [token async for token in tokens()]
        except Refused as refused:
            return _error(refused.status, str(refused))
        finally:
            watch.cancel()
        usage = {"prompt_tokens": len(request.prompt), "completion_tokens": len(made)}
        usage["total_tokens"] = sum(usage.values())
        finish = "length" if len(made) == request.new else "stop"
        return JSONResponse(part(tokenizer.decode(made), finish) | {"usage": usage})

    async def models(http):
        names = [BASE, *sorted(path.name for path in folder.iterdir() if known(path.name))]
        return JSONResponse({"object": "list", "data": [{"id": n, "object": "model"} for n in names]})

    async def metrics(http):
        return Response(prometheus.generate_latest(registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/metrics", metrics),
        ]
    )
