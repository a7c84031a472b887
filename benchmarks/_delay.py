"""A TCP proxy that holds what passes, either way, for a while: ``python _delay.py LISTEN PORT SECONDS``.

A process of its own, so that it takes nobody's lock. What passes stays in Linux's kernel (splice), and waits in pipes: copied,
it would take a good part of the cores that the proxy shares with the server and with what is measured.
"""

from __future__ import annotations

import fcntl
import os
import resource
import select
import socket
import sys
import time
from collections import deque

_PIPE_BYTES = 1 << 20  # 256 places of up to 32 kB: so much a connection may have under way, each way
_EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET


class _Way:
    """One way of a connection: what was read waits in a pipe until it is due."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self._source, self._target = source, target
        self._out, self._into = os.pipe2(os.O_NONBLOCK)
        fcntl.fcntl(self._into, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._due = 0
        self._read_all = self._ends = self.over = False

    def read(self) -> list[int]:
        """Take what has come; return how many bytes, piece by piece, and a 0 at the end."""
        taken: list[int] = []
        while not self._read_all and not self.over:
            try:
                taken.append(os.splice(self._source.fileno(), self._into, _PIPE_BYTES))
            except BlockingIOError:  # nothing has come, or the pipe is full
                break
            except OSError:
                taken.append(0)
            self._read_all = not taken[-1]
        return taken

    def write(self, due: int | None) -> None:
        """Pass on what is due, and so many bytes more from now on; 0 is the end."""
        self._ends = self._ends or due == 0
        self._due += due or 0
        try:
            while self._due and not self.over:
                self._due -= os.splice(self._out, self._target.fileno(), self._due)
            if self._ends and not self.over:
                self.over = True
                self._target.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:  # nobody listens there
            self.over = True

    def close(self) -> None:
        self.over = True
        self._source.close()
        os.close(self._out)
        os.close(self._into)


class _Proxy:
    def __init__(self, listen: int, port: int, seconds: float) -> None:
        self._port, self._seconds = port, seconds
        self._listening = socket.create_server(("127.0.0.1", listen), backlog=512)
        self._events = select.epoll()
        self._events.register(self._listening, select.EPOLLIN)
        # Of each socket the way that begins there, and the one that ends there.
        self._ways: dict[int, tuple[_Way, _Way]] = {}
        self._waiting: deque[tuple[float, _Way, int]] = deque()

    def run(self) -> None:
        while True:
            wait = max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else None
            for number, _ in self._events.poll(wait):
                if number == self._listening.fileno():
                    self._accept()
                elif number in self._ways:
                    self._pass(number)
            while self._waiting and self._waiting[0][0] <= time.monotonic():
                _, way, nbytes = self._waiting.popleft()
                way.write(nbytes)
                self._read(way)  # its pipe has room again

    def _read(self, way: _Way) -> None:
        due = time.monotonic() + self._seconds
        self._waiting.extend((due, way, nbytes) for nbytes in way.read())

    def _pass(self, number: int) -> None:
        begins, ends = self._ways[number]
        self._read(begins)
        ends.write(None)
        self._read(ends)
        if begins.over and ends.over:
            for one in [n for n, ways in self._ways.items() if begins in ways]:
                del self._ways[one]
            begins.close()
            ends.close()

    def _accept(self) -> None:
        here, _ = self._listening.accept()
        there = socket.create_connection(("127.0.0.1", self._port))
        out, back = _Way(here, there), _Way(there, here)
        self._ways |= {here.fileno(): (out, back), there.fileno(): (back, out)}
        for one in (here, there):
            one.setblocking(False)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._events.register(one, _EVENTS)


if __name__ == "__main__":
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    proxy = _Proxy(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
    print("ready", flush=True)
    proxy.run()
