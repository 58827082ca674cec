"""The sub-networks of a step shared by two processes, as torchrun starts them: the weights that one process gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from test_supernet_scorer import LOSS, SHORT, _equal, _space, _targets, _weights

from nas.recipe.processes import Processes, started_processes
from nas.recipe.supernet import train_supernet

PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_supernet_scorer import LOSS, SHORT, _space, _targets
from nas.recipe.processes import started_processes
from nas.recipe.supernet import train_supernet
with started_processes() as processes:
    done = train_supernet(_space([8]), {{8: _targets(8)}}, LOSS, SHORT, Path(sys.argv[1]), processes=processes)
    print(processes.rank, processes.count, done.steps)
"""


def test_without_torchrun_this_process_is_alone() -> None:
    with started_processes() as processes:
        assert processes == Processes(0, 1)
        assert processes.writes
        assert processes.agreed(7) == 7


def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    shared |= {"TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "two")],
            env={**shared, "RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    told = [process.communicate(timeout=120)[0].strip() for process in started]
    assert told == [f"0 2 {SHORT.steps}", f"1 2 {SHORT.steps}"]
    train_supernet(_space([8]), {8: _targets(8)}, LOSS, SHORT, tmp_path / "one")
    two, one = _weights(tmp_path / "two"), _weights(tmp_path / "one")
    assert _equal(two, one)
    assert not list((tmp_path / "two").glob("*.ckpt"))
