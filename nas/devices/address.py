"""The name of a board behind SSH: where it is, and what to measure with there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nas.core.errors import UsageError, did_you_mean
from nas.devices.ssh import SshAddress

_OPTIONS = ("runner", "threads", "python", "config")


@dataclass(frozen=True, slots=True)
class RemoteAddress:
    """What stands behind `ssh:` in a device's name.

    `runner` is the runtime on the board, empty for the first that it has; `threads` those of one inference, where the
    runtime computes on the processor.
    """

    ssh: SshAddress
    runner: str = ""
    threads: int = 1

    @property
    def name(self) -> str:
        """The name of the device, as `parse_address` reads it."""
        ssh = self.ssh
        user, at, host = ssh.destination.rpartition("@")
        place = f"{user}{at}[{host}]" if ":" in host else ssh.destination
        options = {
            "runner": self.runner,
            "threads": "" if self.threads == 1 else str(self.threads),
            "python": "" if ssh.python == "python3" else ssh.python,
            "config": "" if ssh.config is None else str(ssh.config),
        }
        tail = "&".join(f"{key}={value}" for key, value in options.items() if value)
        return f"ssh:{place}{'' if ssh.port is None else f':{ssh.port}'}{f'?{tail}' if tail else ''}"


def parse_address(name: str) -> RemoteAddress:
    """The address in a device's name: `ssh:[USER@]HOST[:PORT][?runner=NAME&threads=N&python=PATH&config=FILE]`.

    Raises:
        UsageError: it does not fit; the message says what does.
    """
    text = name.removeprefix("ssh:")
    place, mark, tail = text.partition("?")
    options: dict[str, str] = {}
    for part in tail.split("&") if mark else ():
        key, equals, value = part.partition("=")
        if key not in _OPTIONS or not equals or not value or key in options:
            raise UsageError(
                f"device {name!r}: behind ? come {', '.join(f'{x}=...' for x in _OPTIONS)}, joined by &, such as "
                f"ssh:me@jetson?runner=onnxruntime; got {part!r}{did_you_mean(key, _OPTIONS)}"
            )
        options[key] = value
    found = re.fullmatch(r"((?:[^@\[\]]*@)?)(?:\[([0-9A-Fa-f:.%\w]+)\]|([^:\[\]]*))(?::(\d{1,5}))?", place)
    if found is None or not (found[2] or found[3]):
        raise UsageError(
            f"device {name!r}: give ssh:HOST, ssh:USER@HOST or ssh:USER@HOST:PORT, where HOST may be an alias of your "
            "ssh configuration"
        )
    threads = options.get("threads", "1")
    if not re.fullmatch("[1-9][0-9]{0,2}", threads):
        raise UsageError(f"device {name!r}: threads must be a number from 1 to 999, got {threads!r}")
    address = SshAddress(
        destination=found[1] + (found[2] or found[3]),
        port=int(found[4]) if found[4] else None,
        config=Path(options["config"]) if "config" in options else None,
        python=options.get("python", "python3"),
    )
    return RemoteAddress(address, options.get("runner", ""), int(threads))
