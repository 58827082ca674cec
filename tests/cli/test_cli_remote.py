"""The whole way over a real OpenSSH server: rows, a search, its package there, and what that teaches the table."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nas.cli.main import run
from nas.latency.estimate import Estimator
from nas.latency.fitting import fit_again
from nas.latency.table import LatencyTable
from nas.testing import SshServer, requires_openssh


def test_measure_search_deploy_and_feedback_over_ssh(tiny_experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
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

        before = LatencyTable.read(table)
        assert run(["deploy", str(package), "--device", name, "--json", "--budget-ms", "1s"]) == 0
        deployed = json.loads(capsys.readouterr().out)
        assert deployed["verdict"] == "good" and deployed["device"]["name"] == measured["device"]["name"]
        assert [(s["script"], s["code"]) for s in deployed["scripts"]] == [("parity.py", 0), ("bench.py", 0)]
        assert Path(deployed["table"]) == table and deployed["stored"] not in before.networks
        taught = LatencyTable.read(table)
        network = taught.networks[deployed["stored"]]
        correction = taught.correction()
        assert correction is not None
        assert deployed["stored"] in {n.key for fit in correction.fits for n in fit.networks}
        plain = Estimator(before).estimate(network.candidate)
        corrected = Estimator(taught, fit_again(taught, correction)).estimate(network.candidate)
        off = [abs(e.worst_ms - network.measurement.latency_ms) for e in (plain, corrected)]
        assert off[1] < off[0], "the next estimate does not use what was deployed"

        assert run(["bench", str(package), "--device", "ssh:board?config=/nowhere"]) == 4
        assert "ssh does not accept its configuration" in capsys.readouterr().err
        until = time.monotonic() + 10
        while server.agents() and time.monotonic() < until:
            time.sleep(0.05)
        assert not server.agents(), "an agent runs on after the command that started it"
