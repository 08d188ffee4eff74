"""A server on this machine for as long as it is needed: started by a command, waited for, and stopped."""

import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def running_server(
    command: Sequence[str],
    log: Path,
    variables: Mapping[str, str],
    *,
    place: Path | None = None,
    seconds: float = 600,
) -> Iterator[str]:
    """The address of a server; stopped at the end, killed if it does not stop.

    Args:
        command: that starts it, with `--port` and a number.
        log: where it says what it says.
        variables: its environment.
        place: its working directory.
        seconds: in which it must answer `/health`.

    Raises:
        RuntimeError: it did not start; the message ends as its log does.
    """
    with log.open("w") as file:
        process = subprocess.Popen(command, env=variables, cwd=place, stdout=file, stderr=file, start_new_session=True)
    address = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
    until = time.monotonic() + seconds
    try:
        while not _answers(f"{address}/health"):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not start: {log.read_text()[-5000:]}")
            time.sleep(0.5)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5)
    except (urllib.error.URLError, ConnectionError):
        return False
    return True
