"""Machines for tests: Linux namespaces of their own for network, host name, files and processes, on one switch.

What runs on one sees its own host name, its own process numbers, its own address and `/etc/hosts`, and the other
machines over Ethernet; the file system is shared, as a cluster's is. Nothing leaves the namespaces: no interface of
the real machine is on the switch. Needs root, util-linux's `unshare` and `nsenter`, and `ip`. Where these machines
cannot be had, their place is taken by process groups of this one that meet on its loopback interface.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

NETWORK = "192.0.2"
"""Of addresses: TEST-NET-1, which no network uses."""
INTERFACE = "fabric0"
"""Name of a machine's network interface."""
SPARE = 8
"""Number of the machine that is switched on for a moment to see whether there can be any."""


def _check(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")


@dataclass
class Holder:
    """The first process of a set of namespaces; they last as long as it."""

    process: subprocess.Popen[bytes]
    pid: int
    """Of its child, process 1 in there; seen from here."""

    @classmethod
    def start(cls, script: str) -> Holder:
        """Run `script` in new namespaces, then wait there until :meth:`kill`, or until this process ends."""
        command = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        process = subprocess.Popen(
            # It reads from a pipe that nobody writes to, and which the end of this process closes, however it comes.
            [*command, "sh", "-ec", f"{script}; echo up; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != b"up\n":
            process.kill()
            raise RuntimeError(f"no namespaces: {process.stderr.read().decode().strip()}")
        [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return cls(process, int(child))

    def inside(self, *words: str) -> list[str]:
        """The command that runs `words` in there."""
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid", "--", *words]

    def kill(self) -> None:
        """End every process in there at once, without a word to any of them."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.wait(10)


@dataclass
class Machine:
    """One machine that is on."""

    name: str
    port: str
    """Of the switch."""
    holder: Holder
    switch: Holder

    environment: ClassVar = {"GLOO_SOCKET_IFNAME": INTERFACE}
    """What torchrun needs to be told here."""

    def start(self, words: list[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a program on it; what it says is added to `log`."""
        with log.open("ab") as out:
            command = self.holder.inside(*words)
            return subprocess.Popen(command, env={**environment, **self.environment}, stdout=out, stderr=out)

    def lose_power(self) -> None:
        """Cable and processes at once: the others get no word, not even that connections are closed."""
        _check(*self.switch.inside("ip", "link", "set", self.port, "down"))
        self.holder.kill()

    def off(self) -> None:
        self.holder.kill()

    def received(self) -> int:
        """Bytes over its interface so far."""
        lines = Path(f"/proc/{self.holder.pid}/net/dev").read_text().splitlines()
        [counters] = [line.split(":")[1] for line in lines if line.strip().startswith(f"{INTERFACE}:")]
        return int(counters.split()[0])


class Rack:
    """A switch and up to eight machines `node0`, `node1`, ... on it."""

    real = True

    def __init__(self, folder: Path) -> None:
        self.switch = Holder.start("ip link set lo up; ip link add br0 type bridge; ip link set br0 up")
        self._hosts = folder / "hosts"
        lines = [f"{NETWORK}.{number + 1} node{number}" for number in range(9)]
        self._hosts.write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        self._machines: list[Machine] = []

    def boot(self, number: int) -> Machine:
        """Switch on `node<number>`, for the first time or again."""
        name, port = f"node{number}", f"port{number}.{len(self._machines)}"
        holder = Holder.start(f"hostname {name}; mount --bind '{self._hosts}' /etc/hosts; ip link set lo up")
        machine = Machine(name, port, holder, self.switch)
        self._machines.append(machine)
        _check(
            *("ip", "link", "add", port, "netns", str(self.switch.pid), "type", "veth"),
            *("peer", "name", INTERFACE, "netns", str(holder.pid)),
        )
        _check(*self.switch.inside("ip", "link", "set", port, "master", "br0", "up"))
        _check(*holder.inside("ip", "addr", "add", f"{NETWORK}.{number + 1}/24", "dev", INTERFACE))
        _check(*holder.inside("ip", "link", "set", INTERFACE, "up"))
        return machine

    def end(self) -> None:
        for machine in self._machines:
            machine.off()
        self.switch.kill()


class Pretended:
    """A process group of this machine in place of a :class:`Machine`."""

    name = "127.0.0.1"
    environment: ClassVar = {"PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, words: list[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            started = subprocess.Popen(
                words, env={**environment, **self.environment}, stdout=out, stderr=out, start_new_session=True
            )
        self._started.append(started)
        return started

    def lose_power(self) -> None:
        self.off()

    def off(self) -> None:
        for process in self._started:
            # torchrun's ranks are sessions of their own.
            ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            children = ranks.read_text().split() if ranks.exists() else []
            for group in (process.pid, *map(int, children)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
            process.wait(10)


class Loopback:
    """What :class:`Rack` is, made of :class:`Pretended`."""

    real = False

    def __init__(self) -> None:
        self._machines: list[Pretended] = []

    def boot(self, number: int) -> Pretended:
        self._machines.append(Pretended())
        return self._machines[-1]

    def end(self) -> None:
        for machine in self._machines:
            machine.off()


@contextlib.contextmanager
def rack(folder: Path) -> Iterator[Rack | Loopback]:
    """Machines for a test, all switched off at its end. A warning where they are pretended."""
    made: Rack | Loopback
    try:
        if missing := [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]:
            raise RuntimeError(f"no {', '.join(missing)}")
        made = Rack(folder)
        try:
            # A switch can be had without the cables to it.
            made.boot(SPARE).off()
        except BaseException:
            made.end()
            raise
    except (RuntimeError, OSError, ValueError) as error:
        warnings.warn(f"two torchrun on the loopback interface instead of two machines: {error}", stacklevel=3)
        made = Loopback()
    try:
        yield made
    finally:
        made.end()


def exit_code(process: subprocess.Popen[bytes], timeout: float, *logs: Path) -> int:
    """Of a program; an error with the end of the logs if it takes longer."""
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        said = "\n".join(log.read_text(errors="replace")[-4000:] for log in logs)
        raise TimeoutError(f"still running after {timeout} s\n{said}") from None


def free_port() -> int:
    """Of this machine, where both torchrun are to be on it; the machines of a :class:`Rack` have all of theirs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
