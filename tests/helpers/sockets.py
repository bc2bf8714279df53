"""The listening sockets of a process and all that it started."""

import threading
import time
from contextlib import contextmanager, suppress

import psutil


def listening(pid: int) -> set[tuple[str, str]]:
    """Address and command line of what listens now in a process and its descendants."""
    found = set()
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                for socket in process.net_connections(kind="inet"):
                    # A UDP socket that is connected to nobody takes from everybody.
                    if socket.status == "LISTEN" or (socket.status == "NONE" and not socket.raddr):
                        found.add((socket.laddr.ip, " ".join(process.cmdline())))
    return found


@contextmanager
def watched(pid: int):
    """Looks at the sockets of a process and its descendants all the time; yields the set that grows."""
    seen: set[tuple[str, str]] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            seen.update(listening(pid))
            time.sleep(0.25)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


def open_to_others(seen: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of them that other machines reach."""
    return [one for one in sorted(seen) if not one[0].removeprefix("::ffff:").startswith("127.") and one[0] != "::1"]
