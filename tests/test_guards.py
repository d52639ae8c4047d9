"""What keeps a POST from being sent twice below the decisions: connections, commits, the lock."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

import teckochecker as tc

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """A server that gives each request the same answer, or none."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.connections = 0
        self.requests: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while line := await reader.readline():
            if line.startswith((b"GET", b"POST")):
                self.requests.append(line.decode().split()[1])
            if line == b"\r\n":
                await reader.readexactly(4 if self.requests[-1] == "/jobs" else 0)
                writer.write(self.answer)
                await writer.drain()
                if not self.answer:
                    break
        writer.close()


def ask(server: Server, use: Callable[[tc.Http, str], Awaitable[Any]]) -> Any:  # noqa: ANN401
    """Run the server on a port of its own, and the program's client against it."""

    async def run() -> Any:  # noqa: ANN401
        config = tc.Config(Path("c"), "", Path("s"), Path("k"))
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        http = tc.Http(config, tc.Redactor())
        try:
            return await use(http, f"http://127.0.0.1:{port}")
        finally:
            await http.close()
            listening.close()
            await asyncio.sleep(0.01)

    return asyncio.run(run())


async def post(http: tc.Http, url: str) -> tc.Answer | tc.ApiError:
    try:
        return await http.post(f"{url}/jobs", {}, "body")
    except tc.ApiError as error:
        return error


def test_fresh_connection() -> None:
    """Each POST has a connection of its own, also after a GET that left one open."""

    async def use(http: tc.Http, url: str) -> None:
        await http.get(f"{url}/x", {}, {}, 5)
        await http.get(f"{url}/x", {}, {}, 5)
        await post(http, url)
        await post(http, url)

    server = Server(OK)
    ask(server, use)
    assert (server.connections, len(server.requests)) == (3, 4)


def test_no_redirect() -> None:
    """A redirect is an answer: nothing, and no token, follows it."""
    server = Server(b"HTTP/1.1 307 X\r\nLocation: /other\r\nContent-Length: 0\r\n\r\n")
    came = ask(server, post)
    assert (came.status, server.requests) == (307, ["/jobs"])


def test_sent() -> None:
    """What was sent without an answer is sent; where nobody listens, nothing was."""
    came = ask(Server(b""), post)
    assert isinstance(came, tc.ApiError)
    assert came.sent
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        came = ask(Server(b""), lambda http, _: post(http, url))
    assert isinstance(came, tc.ApiError)
    assert not came.sent


def test_cancellation_passes() -> None:
    """A retried request that is cancelled ends."""
    tries: list[float] = []

    async def attempt(left_s: float) -> None:
        tries.append(left_s)
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(tc.Client.retried(attempt))
    assert len(tries) == 1


@contextmanager
def opened(directory: Path) -> Iterator[tc.Store]:
    store = tc.Store.open(directory / "state.db")
    try:
        yield store
    finally:
        store.close()


def test_commits_are_synced(tmp_path: Path) -> None:
    """Power loss takes no commit back: synchronous is FULL, which is 2."""
    with opened(tmp_path) as store:
        assert store.one("PRAGMA synchronous") == 2
        assert store.one("PRAGMA journal_mode") == "wal"


def test_all_or_nothing(tmp_path: Path) -> None:
    """A transaction that fails leaves nothing of it."""
    with opened(tmp_path) as store:
        statements: list[tc.Statement] = [tc.Store.meta_statement("a", 1), ("nonsense", ())]
        with pytest.raises(tc.StorageError):
            store.execute(statements)
        assert store.meta("a") is None
        run = tc.Run(3, "j", tc.Target("u", "c", "7"), batches=(tc.Batch("b"),), next_at=math.inf)
        store.commit([(None, run)], [tc.Event.of("retry_taken", run)], 5.0)
        assert store.runs("1") == [run]


def test_one_acts(tmp_path: Path) -> None:
    """The lock is one process's, and remembers the last POST for the next."""
    lock = tc.StateLock(tmp_path / "s", "daemon", 1.0)
    with pytest.raises(tc.LockedError, match="another instance holds"):
        tc.StateLock(tmp_path / "s", "--once", 1.0)
    lock.note_post(tc.BootTime(5.0, "boot", 6.0))
    assert lock.is_in_place()
    lock.close()
    again = tc.StateLock(tmp_path / "s", "--once", 1.0)
    assert again.last_post == tc.BootTime(5.0, "boot", 6.0)
    again.path.unlink()
    assert not again.is_in_place()
    again.close()


@pytest.mark.parametrize(
    ("boot", "uptime_s", "wall", "passed_s"),
    [
        ("a", 150.0, 9e9, 50.0),  # the same boot: whatever the clock shows
        ("a", 150.0, 0.0, 50.0),
        ("b", 20.0, 9e9, 20.0),  # another: not more than it has been up for
        ("b", 20.0, 1005.0, 5.0),
        ("", 0.0, 1005.0, 5.0),
    ],
)
def test_boot_time(boot: str, uptime_s: float, wall: float, passed_s: float) -> None:
    """What has passed for certain, whatever the clock was set to."""
    before, now = tc.BootTime(1000.0, "a", 100.0), tc.BootTime(wall, boot, uptime_s)
    assert before.until_s(now) == passed_s
