"""The whole way over a real OpenSSH server: rows, a search and its package are measured by another user's agent."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nas.cli.main import run
from nas.testing import SshServer, requires_openssh


def test_measure_search_and_bench_over_ssh(tiny_experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SshServer(requires_openssh()) as server:
        name = server.device_name()
        assert run(["measure", "--space", "space.yaml", "--classes", "6", "--device", name, "--json"]) == 0
        measured = json.loads(capsys.readouterr().out)
        assert measured["measured"] == measured["rows"] > 5 and not measured["failed"]
        assert measured["device"]["details"]["address"] == "board"

        assert run(["search", str(tiny_experiment), "--set", f"device={name}", "--json"]) == 0
        capsys.readouterr()
        (package,) = Path("runs/tiny/packages").iterdir()
        manifest = json.loads((package / "manifest.json").read_text())
        assert manifest["latency"]["device"]["details"]["runner"] == "onnxruntime"
        (table,) = Path("latency_tables").iterdir()
        rows = (table / "rows.jsonl").read_text()
        assert len(rows.splitlines()) >= measured["rows"] and '"clock":"thread_cpu"' in rows

        assert run(["bench", str(package), "--device", name, "--json", "--budget-ms", "1s"]) == 0
        bench = json.loads(capsys.readouterr().out)
        assert bench["keeps_budget"] and bench["device"]["name"] == measured["device"]["name"]

        assert run(["bench", str(package), "--device", "ssh:board?config=/nowhere"]) == 4
        assert "ssh does not accept its configuration" in capsys.readouterr().err
        until = time.monotonic() + 10
        while server.agents() and time.monotonic() < until:
            time.sleep(0.05)
        assert not server.agents(), "an agent runs on after the command that started it"
