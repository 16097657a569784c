"""Exchange one request with a server that may be slow, endless or hostile."""

from __future__ import annotations

import asyncio

import httpx2  # what the openai library sends its requests with

MOST_OF_AN_ERROR = 2**16  # bytes of an error's body that are read
OF_THE_BODY = ("content-encoding", "content-length", "transfer-encoding")  # headers that say how it was sent


class BoundedClient(httpx2.AsyncClient):
    """A client of which each exchange, from the connection to the last byte of the body, has a limit.

    It follows no redirect, so that only the given address gets the key and the images.

    seconds: of one exchange.
    max_bytes: of the body of an answer. Of an error, the first `MOST_OF_AN_ERROR` bytes are read.
    settings: of the client.
    """

    def __init__(self, seconds: float, max_bytes: int, **settings: object):
        super().__init__(**settings, follow_redirects=False)
        self._seconds, self._max_bytes = seconds, max_bytes

    async def send(self, request: httpx2.Request, *, stream: bool = False, **settings: object) -> httpx2.Response:
        """Return the whole response.

        stream: is of no effect.

        Raises:
            httpx2.ReadTimeout: it took more than `seconds`.
            ValueError: the body is too long, or compressed, which was not asked for.
        """
        try:
            return await asyncio.wait_for(self._exchange(request, **settings), self._seconds)
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise httpx2.ReadTimeout(f"the answer took more than {self._seconds} s", request=request) from error

    async def _exchange(self, request: httpx2.Request, **settings: object) -> httpx2.Response:
        response = await super().send(request, stream=True, **settings)
        try:
            body = await self._body(response)
        finally:
            await response.aclose()
        headers = [(name, value) for name, value in response.headers.multi_items() if name not in OF_THE_BODY]
        return httpx2.Response(response.status_code, headers=headers, content=body, request=request)

    async def _body(self, response: httpx2.Response) -> bytes:
        packed, body = response.headers.get("content-encoding", "identity"), bytearray()
        if response.is_success and packed != "identity":
            raise ValueError(
                f"the answer is compressed ({packed}), which was not asked for; switch that off in the server or its "
                "proxy"
            )
        async for piece in response.aiter_raw():
            body += piece
            if response.is_success and len(body) > self._max_bytes:
                raise ValueError(f"the answer has more than {self._max_bytes} bytes")
            if len(body) > MOST_OF_AN_ERROR and not response.is_success:
                break
        return bytes(body)
