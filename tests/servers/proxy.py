"""What lies between a client and a server: a TCP proxy that delays, cuts and stalls what passes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Proxy:
    """A proxy on the loopback, before a server there. Its settings hold for what passes from now on.

    Attributes
    ----------
    cut_after
        Connections break when so many bytes have come from the server; None for never.
    cut_sending_after
        The same of bytes to the server.
    stalled
        Bytes from the server no longer arrive, and connections stay.
    cuts
        How many were broken.

    """

    def __init__(self, port: int) -> None:
        self._server_port = port
        self.cut_after: int | None = None
        self.cut_sending_after: int | None = None
        self.stalled = False
        self.cuts = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        self.port = self._server.sockets[0].getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    async def _start(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            writer.close()
            return
        ways = [
            asyncio.create_task(self._pass(reader, back, "cut_sending_after")),
            asyncio.create_task(self._pass(there, writer, "cut_after")),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        for end in (writer, back):
            with suppress(OSError, RuntimeError):
                end.transport.abort()

    async def _pass(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, limit: str) -> None:
        passed = 0
        with suppress(OSError):
            while data := await source.read(16384):
                while self.stalled and limit == "cut_after":  # noqa: ASYNC110 - another thread sets it
                    await asyncio.sleep(0.05)
                passed += len(data)
                most = getattr(self, limit)
                if most is not None and passed > most:
                    target.write(data[: max(0, most - passed + len(data))])
                    await target.drain()
                    self.cuts += 1
                    return
                target.write(data)
                await target.drain()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def proxy(port: int) -> Iterator[Proxy]:
    made = Proxy(port)
    try:
        yield made
    finally:
        made.close()
