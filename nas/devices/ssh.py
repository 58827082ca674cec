"""The system's OpenSSH as a program: the user's keys, configuration and jump hosts count, host keys are checked.

Nothing is ever asked on the terminal (BatchMode), and what fails is told with the command that mends it. All
connections of one `Ssh` share the first one (ControlMaster) through a socket in a private folder; nothing goes on after
`close`.

For a jump host (ProxyJump, -J) ssh starts another ssh, to which it hands its -F file and none of its -o options. So
what has to hold there too stands in a file of ours, which includes the user's. Where a ProxyCommand starts a program
that knows neither, that has no terminal and no askpass to ask with.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nas.core.errors import DeviceError, UsageError

CONNECT_TIMEOUT_S = 15
ALIVE_INTERVAL_S, ALIVE_COUNT = 15, 3  # a link that is silent for so long is taken for cut
_CONFIGS = (Path("~/.ssh/config"), Path("/etc/ssh/ssh_config"))  # what ssh reads where no file is named
_MOST_SOCKET_PATH = 80  # bytes; the kernel takes 108, and ssh adds 17 while it makes the socket

_EVERYWHERE = (  # jump hosts are hosts, too
    "BatchMode yes",
    "StrictHostKeyChecking yes",
    f"ConnectTimeout {CONNECT_TIMEOUT_S}",
    f"ServerAliveInterval {ALIVE_INTERVAL_S}",
    f"ServerAliveCountMax {ALIVE_COUNT}",
)
_OPTIONS = (
    "ControlMaster=auto",
    "ControlPersist=no",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "PermitLocalCommand=no",
    "RemoteCommand=none",
    "RequestTTY=no",
    "EscapeChar=none",
    "LogLevel=INFO",  # what is said decides which error it is
)


class RemoteError(DeviceError):
    """A device behind SSH that cannot be used now."""


class NoSshError(RemoteError):
    """This machine has no OpenSSH client."""


class HostUnknownError(RemoteError):
    """No address for this name."""


class HostKeyUnknownError(RemoteError):
    """The host's key is not among the known ones."""


class HostKeyChangedError(RemoteError):
    """The host's key is another one than before."""


class LoginRefusedError(RemoteError):
    """The host does not accept this user's keys."""


class NoPythonError(RemoteError):
    """No usable python3 on the host."""


class StateChangedError(RemoteError):
    """The board is in another state than when the work began: booted, or another power mode or clocks."""


class DiskFullError(RemoteError):
    """No space left on the host."""


class LinkCutError(RemoteError):
    """The host cannot be reached, or the connection to it broke: the only one that is worth another try."""


@dataclass(frozen=True, slots=True)
class SshAddress:
    """Where to log in: `destination` is what ssh takes, an alias of the user's configuration or `user@host`.

    `config` is a configuration file that replaces the user's; `python` the interpreter on the host.
    """

    destination: str
    port: int | None = None
    config: Path | None = None
    python: str = "python3"

    def __post_init__(self) -> None:
        # A name that began with a dash would be an option of ssh; other marks would be the shell's on the host.
        if not re.fullmatch(r"([A-Za-z0-9_][A-Za-z0-9._+-]*@)?[A-Za-z0-9_:][A-Za-z0-9._:%-]*", self.destination):
            raise UsageError(
                f"ssh address {self.destination!r}: give an alias of your ssh configuration, a host or user@host, in "
                "letters, digits, dots, dashes and underscores. Such as ssh:me@jetson.local"
            )
        if self.port is not None and not 1 <= self.port <= 65535:
            raise UsageError(f"ssh address {self.destination}: the port must be from 1 to 65535, got {self.port}")
        if not re.fullmatch(r"~?[A-Za-z0-9_./-]*[A-Za-z0-9_.]", self.python) or self.python.startswith("-"):
            raise UsageError(
                f"ssh address {self.destination}: python={self.python!r}: give the path of an interpreter on the host, "
                "without spaces, such as python=~/venv/bin/python"
            )

    @property
    def shown(self) -> str:
        """For people: the destination, with the port where one was given."""
        return self.destination if self.port is None else f"{self.destination}, port {self.port}"

    @property
    def by_hand(self) -> str:
        """The command that logs in by hand, the first thing to try when it fails here."""
        port = [] if self.port is None else ["-p", str(self.port)]
        config = [] if self.config is None else ["-F", str(self.config)]
        return shlex.join(["ssh", *config, *port, self.destination])


class Ssh:
    """Starts programs on one host. Close it: a context manager."""

    def __init__(self, address: SshAddress) -> None:
        """Makes the private folder of the shared connection; nothing is connected yet.

        Raises:
            NoSshError: there is no program `ssh` on this machine.
            RemoteError: the configuration file of the address is not there.
        """
        program = shutil.which("ssh")
        if program is None:
            raise NoSshError(
                "this machine has no OpenSSH client (the program ssh is not on PATH). On Debian and Ubuntu: "
                "sudo apt-get install openssh-client"
            )
        if address.config is not None and not address.config.is_file():
            told = f"config={address.config}: there is no such file"
            raise RemoteError(f"{address.shown}: ssh does not accept its configuration: {told}")
        self.address = address
        self._program = program
        os.putenv("SSH_ASKPASS_REQUIRE", "never")  # from OpenSSH 8.4 on: without a terminal it would ask in a window
        folder = tempfile.mkdtemp(prefix="nas-ssh-")
        if len(folder) + len("/s") > _MOST_SOCKET_PATH:
            Path(folder).rmdir()
            folder = tempfile.mkdtemp(prefix="nas-ssh-", dir="/tmp")
        self._folder = Path(folder)  # mode 0700, as mkdtemp makes it
        included = [address.config] if address.config is not None else _CONFIGS
        lines = [*_EVERYWHERE, *(f'Include "{path.expanduser().absolute()}"' for path in included if _is_taken(path))]
        (self._folder / "config").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def __enter__(self) -> Ssh:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the shared connection and removes its folder."""
        if (self._folder / "s").exists():
            exit_argv = [*self._options(), "-O", "exit", "--", self.address.destination]
            with contextlib.suppress(subprocess.TimeoutExpired):  # nothing goes on without its socket either
                subprocess.run(exit_argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
        shutil.rmtree(self._folder, ignore_errors=True)

    def argv(self, command: str) -> list[str]:
        """Program and arguments that run a command on the host, whose login shell takes it apart."""
        return [*self._options(), "-T", "--", self.address.destination, command]

    def start(self, command: str) -> subprocess.Popen[bytes]:
        """Starts a command with pipes for its three streams, unbuffered, in a process group of its own.

        Its own group: an interrupt at the terminal is for this program, which then ends the connection in order.
        """
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self.argv(command),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            bufsize=0,
            start_new_session=True,
        )

    def run(self, arguments: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> tuple[int, str, str]:
        """Runs a program on the host to its end; each argument arrives as it is.

        Returns:
            Exit status, output and error output.

        Raises:
            RemoteError: the host cannot be used, or the program did not end in time.
        """
        try:
            done = subprocess.run(
                self.argv(shlex.join(arguments)),
                input=stdin,
                capture_output=True,
                timeout=timeout_s,
                check=False,
                start_new_session=True,  # as in `start`, and so without a terminal to ask on
            )
        except subprocess.TimeoutExpired as e:
            raise LinkCutError(f"{self.address.shown}: {arguments[0]} did not end within {timeout_s:g} s") from e
        said = done.stderr.decode(errors="replace")
        if done.returncode == 255:  # ssh's own: nothing ran
            raise ssh_error(self.address, said)
        return done.returncode, done.stdout.decode(errors="replace"), said

    def _options(self) -> list[str]:
        address = self.address
        options = [*_OPTIONS, f"ControlPath={self._folder / 's'}"]
        return [
            self._program,
            *("-F", str(self._folder / "config")),
            *(["-p", str(address.port)] if address.port is not None else []),
            *(part for option in options for part in ("-o", option)),
        ]


def _is_taken(config: Path) -> bool:
    """Whether ssh includes a file: of the system's it asks no owner, of an included one it does (readconf.c)."""
    if config != _CONFIGS[1]:
        return True  # as ssh asks of a user's own file
    try:
        told = config.stat()
    except OSError:
        return False
    return told.st_uid in (0, os.getuid()) and not told.st_mode & 0o022


def ssh_error(address: SshAddress, said: str) -> RemoteError:
    """The error behind what ssh said when it ended with status 255, with the next command.

    Args:
        address: where it was to log in.
        said: its error output.
    """
    where, told = address.shown, _last_line(said)
    key = f"ssh-keygen -R {shlex.quote(_key_name(address))}"
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in said:
        return HostKeyChangedError(
            f"{where}: the host key is not the one that was known before ({told}). If the board was set up anew, "
            f"forget the old key with: {key}, then log in once by hand and compare the new one: {address.by_hand}. If "
            "not, somebody else may be answering"
        )
    if "Host key verification failed" in said or "host key is known" in said:
        return HostKeyUnknownError(
            f"{where}: its host key is not known on this machine yet, and keys are always checked. Log in once by "
            f"hand, compare the fingerprint and say yes: {address.by_hand}"
        )
    if "Could not resolve hostname" in said or "Name or service not known" in said:
        return HostUnknownError(
            f"{where}: no such host ({told}). Give its address, or an alias from ~/.ssh/config; try: {address.by_hand}"
        )
    if "Permission denied" in said or "Too many authentication failures" in said:
        user = address.destination.rpartition("@")[0]
        copy = f"ssh-copy-id {'' if address.port is None else f'-p {address.port} '}{address.destination}"
        return LoginRefusedError(
            f"{where}: the login was refused ({told}). Nothing is asked here, so a key is needed that works without a "
            f"question{f' for user {user}' if user else ''}. Put yours there with: {copy}"
        )
    if re.search(
        r"Bad (configuration|owner)|terminating, \d+ bad configuration|unknown option|Can't open user config", said
    ):
        return RemoteError(f"{where}: ssh does not accept its configuration ({told}). Try: {address.by_hand}")
    return LinkCutError(f"{where}: no connection ({told or 'ssh gave no reason'}). Try: {address.by_hand}")


def _key_name(address: SshAddress) -> str:
    host = address.destination.rpartition("@")[2]
    return host if address.port in (None, 22) else f"[{host}]:{address.port}"


def _last_line(said: str) -> str:
    """The line that matters: the last one that is not about the shared connection, in printable characters."""
    lines = [" ".join("".join(c if c.isprintable() else " " for c in x).split()) for x in said.splitlines()]
    lines = [x for x in lines if x and not x.startswith(("ControlSocket", "mux_client", "Warning:"))]
    return lines[-1][:300] if lines else ""
