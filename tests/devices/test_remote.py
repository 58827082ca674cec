"""A board behind a real OpenSSH server on loopback, where another user's agent measures real ONNX Runtime sessions."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_stream import network

from nas.core.errors import DeviceError, UsageError
from nas.core.records import (
    Measurement,
)
from nas.devices import open_device
from nas.devices.address import parse_address
from nas.devices.base import Device, MeasureJob, StreamJob
from nas.devices.graphs import overhead_job
from nas.devices.link import AgentLink, RefusedRequestError
from nas.devices.onnxruntime_cpu import OnnxRuntimeCpu
from nas.devices.protocol import ProtocolSettings
from nas.devices.remote import RemoteDevice
from nas.devices.ssh import (
    HostKeyChangedError,
    HostKeyUnknownError,
    HostUnknownError,
    LinkCutError,
    LoginRefusedError,
    NoPythonError,
    NoSshError,
    RemoteError,
)
from nas.export.forms import Artefact, measured_paths
from nas.export.graph import network_model, random_weights, segment_models
from nas.measure.stream import measured_stream
from nas.testing import DEVICE_CONTRACT, SshServer, exits_chain, mean_model, requires_openssh

QUICK = ProtocolSettings(
    network_rounds=2,
    network_sessions=2,
    most_network_sessions=3,
    network_round_ms=0.5,
    retries=1,
    wait_ms=0,
    calibration_checks=3,
)


@pytest.fixture(scope="module")
def server() -> Iterator[SshServer]:
    with SshServer(requires_openssh()) as running:
        yield running


@pytest.fixture(scope="module")
def device(server: SshServer) -> Iterator[RemoteDevice]:
    opened = RemoteDevice(parse_address(server.device_name()), settings=QUICK)
    yield opened
    opened.close()


def row(key: str, size: int = 8) -> MeasureJob:
    return MeasureJob(key, "row", "fp32", mean_model(size=size), 1000)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("check", DEVICE_CONTRACT, ids=lambda check: check.__name__)
def test_contract(device: RemoteDevice, check: Callable[[Device], None]) -> None:
    check(device)


def test_the_agent_runs_as_another_user_in_a_private_folder_of_its_home(
    server: SshServer, device: RemoteDevice
) -> None:
    device.measure([row("a")])
    assert len(server.agents()) == 2, "the agent and its worker"
    owner = server.cache.stat()
    assert owner.st_mode & 0o777 == 0o700
    if server.is_other_user:
        assert owner.st_uid != os.geteuid()
    (agent,) = server.cache.glob("agent-*")
    assert agent.stat().st_mode & 0o777 == 0o600
    assert {p.stat().st_mode & 0o777 for p in (server.cache / "blobs").iterdir()} == {0o600}
    outside = [p for p in server.home.rglob("*") if p.is_file() and server.cache not in p.parents]
    assert not outside, "something was written outside of the agent's folder"


def test_nothing_runs_on_and_no_batch_is_left_when_the_device_is_closed(server: SshServer) -> None:
    opened = RemoteDevice(parse_address(server.device_name()), settings=QUICK)
    opened.measure([row("a")])
    before = len(server.agents())
    (socket,) = [Path(x.partition("=")[2]) for x in opened.ssh.argv("") if x.startswith("ControlPath=")]
    assert socket.is_socket() and socket.parent.stat().st_mode & 0o777 == 0o700
    opened.close()
    assert not socket.parent.exists()
    assert wait_until(lambda: len(server.agents()) == before - 2), server.agents()
    assert not list((server.cache / "batches").iterdir())


def test_other_programs_share_the_connection_and_get_their_arguments_as_they_are(
    server: SshServer, device: RemoteDevice
) -> None:
    device.measure([row("a")])
    before = (server.folder / "log").read_text().count("Accepted publickey")
    arguments = ["a b", "$(touch x)", "'", '"', "*", "\\", "ü", ""]
    code, out, _ = device.ssh.run(["printf", "%s\\n", *arguments])
    assert (code, out.split("\n")[:-1]) == (0, arguments)
    assert device.ssh.run(["cat"], stdin=b"given")[1] == "given"
    assert device.ssh.run(["false"])[0] == 1
    with pytest.raises(LinkCutError, match=r"sleep did not end within 0\.2 s"):
        device.ssh.run(["sleep", "5"], timeout_s=0.2)
    assert (server.folder / "log").read_text().count("Accepted publickey") == before


def test_the_agent_and_a_model_travel_once(server: SshServer, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    plain = AgentLink.send
    monkeypatch.setattr(
        AgentLink, "send", lambda self, request, data=b"": sent.append(len(data)) or plain(self, request, data)
    )
    job = row("once", size=13)
    for expected in (True, False):
        opened = RemoteDevice(parse_address(server.device_name()), settings=QUICK)
        opened.measure([job])
        opened.close()
        assert (len(job.model) in sent) is expected
        sent.clear()


def test_images_travel_part_by_part_and_none_stays(
    server: SshServer, device: RemoteDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).uniform(0, 255, (50, 3, 8, 8)).astype(np.float32)
    monkeypatch.setattr("nas.devices.remote.RUN_BYTES", 8 * images[0].nbytes)
    before = {p.name for p in (server.cache / "blobs").iterdir()}
    model = mean_model(factor=3.0)
    (found,) = device.run(model, images)
    assert np.allclose(found, 3 * images.mean((2, 3)), rtol=1e-5)
    left = [p for p in (server.cache / "blobs").iterdir() if p.name not in before]
    assert len(left) == 1 and left[0].stat().st_size < 2 * len(model), "the model alone"


@pytest.mark.parametrize("form", ["if", "chain"])
def test_images_leave_on_a_board_where_their_logits_say_and_take_about_the_sum_over_their_exits(
    device: RemoteDevice, form: str
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
    plain = network(0.5)
    weights, gray = random_weights(plain, 0), ((0.5,) * 3, (0.25,) * 3)
    first = device.run(network_model(plain, weights, *gray, form="logits", batch=None), pixels)[0]
    confidence = np.exp(first).max(axis=1) / np.exp(first).sum(axis=1)
    order = np.sort(confidence)
    candidate = plain.with_thresholds([float(order[19] + order[20]) / 2])  # no image at the threshold itself
    artefact: Artefact = (
        network_model(candidate, weights, *gray, form="if")
        if form == "if"
        else segment_models(candidate, weights, *gray)
    )
    _, paths = measured_paths(
        candidate,
        "if" if form == "if" else "segments",
        artefact,
        lambda models: device.measure([MeasureJob(f"m{i}", "network", "fp32", m, 1000) for i, m in enumerate(models)]),
    )
    exit_ms = [m.latency_ms or 0.0 for m in paths]
    models, thresholds = (
        ((artefact,), ())
        if isinstance(artefact, bytes)
        else (
            tuple(s.model for s in artefact),
            (candidate.exits[0].threshold or 0.0,),
        )
    )
    times = device.stream_times(StreamJob("s", models, thresholds, pixels))
    expected = (confidence < candidate.exits[0].threshold).astype(int)
    assert list(times.exits) == expected.tolist() and sum(expected) == 20
    stream = measured_stream(device, "s", artefact, images, exit_ms)
    assert stream is not None and stream.shares == (0.5, 0.5)
    assert stream.sum_ms == pytest.approx(np.mean(exit_ms))
    assert 0.5 * stream.sum_ms < stream.mean_ms < 3 * stream.sum_ms
    each = np.array(times.latency_ms)
    assert 1.3 * np.median(each[expected == 0]) < np.median(each[expected == 1])


def test_images_of_a_stream_travel_once_as_bytes_and_none_stays(
    server: SshServer, device: RemoteDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    plain = AgentLink.send
    monkeypatch.setattr(
        AgentLink, "send", lambda self, request, data=b"": sent.append(len(data)) or plain(self, request, data)
    )
    images = np.random.default_rng(1).integers(0, 256, (50, 3, 12, 12)).astype(np.float32)
    device.stream_times(StreamJob("s", exits_chain(12), (0.5,), images))
    assert sent.count(images.size) == 1 and max(sent) == images.size
    assert all(p.stat().st_size != images.size for p in (server.cache / "blobs").iterdir())
    sent.clear()
    device.stream_times(StreamJob("s", exits_chain(12), (0.5,), images / 2))
    assert images.nbytes in sent, "halves are no bytes"


def test_a_stream_goes_on_over_the_next_connection(server: SshServer, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    opened = RemoteDevice(
        parse_address(server.device_name()), settings=QUICK, say=said.append, sleep=lambda s: time.sleep(s / 50)
    )
    plain, cuts = AgentLink.answer, []

    def answer(self: AgentLink, on_message: Callable[[dict[str, object]], None] = lambda _: None) -> object:
        def take(message: dict[str, object]) -> None:
            if "result" in message and not cuts:
                cuts.append(server.cut())
                raise LinkCutError("cut")
            on_message(message)

        return plain(self, take)

    monkeypatch.setattr(AgentLink, "answer", answer)
    images = np.zeros((6, 3, 8, 8), np.float32)
    images[:2] = 255.0
    assert opened.stream_times(StreamJob("s", exits_chain(), (0.5,), images)).exits == (0, 0, 1, 1, 1, 1)
    assert cuts and any("trying again" in line for line in said)
    opened.close()


def slow_script(server: SshServer) -> Path:
    """Puts `slow.py` on the board, which does not end; the file in which it notes its process id."""
    path = server.home / "slow.py"
    note = server.home / "pid"
    path.write_text(f"import os, time\nprint(os.getpid(), file=open('{note}', 'w'), flush=True)\ntime.sleep(600)\n")
    path.chmod(0o644)
    note.unlink(missing_ok=True)
    return note


def process_of(note: Path) -> Path:
    """The process that a script on the board noted."""
    assert wait_until(lambda: note.exists() and note.read_text().strip() != "")
    return Path("/proc") / note.read_text().strip()


def test_a_script_on_the_board_ends_with_its_connection_and_keeps_others_waiting(server: SshServer) -> None:
    """As with Ctrl-C: what builds engines for minutes does not go on without anybody who wants them."""
    note = slow_script(server)
    opened, said = RemoteDevice(parse_address(server.device_name()), settings=QUICK), []
    other = RemoteDevice(parse_address(server.device_name()), settings=QUICK, say=said.append)
    home = str(server.home)

    def run_until_cut() -> None:
        with pytest.raises(LinkCutError):
            opened.run_script(home, "slow.py", [], 60.0)

    running = threading.Thread(target=run_until_cut)
    waiting = threading.Thread(target=lambda: other.measure([row("waits")]))
    running.start()
    process = process_of(note)
    waiting.start()
    assert wait_until(lambda: any("waiting, another program measures on this board" in line for line in said)), said
    assert process.exists()
    opened._patience_s = 0.0
    opened._connection.link.process.kill()
    assert wait_until(lambda: not process.exists()), "it still runs"
    running.join()
    waiting.join()
    for device in (opened, other):
        device.close()


def test_a_script_that_takes_too_long_is_ended(server: SshServer, device: RemoteDevice) -> None:
    note = slow_script(server)
    with pytest.raises(RefusedRequestError, match=r"did not return within 1\.5 s"):
        device.run_script(str(server.home), "slow.py", [], 1.5)
    process = process_of(note)
    assert wait_until(lambda: not process.exists())


def with_jump(server: SshServer, *, proxy: str, known_hosts: Path) -> str:
    """The name of the board behind a jump host, which is the same server under another name."""
    config = server.folder / "jump-config"
    jump = server.config.read_text().replace("Host board other-board", "Host jump")
    jump = jump.replace(str(server.known_hosts), str(known_hosts))
    config.write_text(f"{server.config.read_text()}{jump}Host board\n  {proxy}\n")
    return f"ssh:board?python={server.python}&config={config}"


def test_a_board_is_reached_through_a_jump_host_whose_key_is_checked_too(server: SshServer, tmp_path: Path) -> None:
    name = with_jump(server, proxy="ProxyJump jump", known_hosts=server.known_hosts)
    opened = RemoteDevice(parse_address(name), settings=QUICK)
    assert opened.measure([row("a")])[0].error is None
    opened.close()
    unknown = tmp_path / "known_hosts"
    config = server.folder / "jump-config"
    for proxy in ("ProxyJump jump", f"ProxyCommand ssh -F {config} -W %h:%p jump"):
        parse = parse_address(with_jump(server, proxy=proxy, known_hosts=unknown))
        with pytest.raises(HostKeyUnknownError, match="its host key is not known"):
            RemoteDevice(parse)
        assert not unknown.exists(), "the key of the jump host was taken without a question"


def test_a_configuration_that_is_not_there_is_told(server: SshServer) -> None:
    with pytest.raises(RemoteError, match="config=/nowhere: there is no such file"):
        RemoteDevice(parse_address(f"ssh:board?python={server.python}&config=/nowhere"))


def test_the_board_finds_the_latency_that_this_machine_finds(device: RemoteDevice) -> None:
    """The same machine behind SSH: what is measured there and reduced here is what is measured here."""
    job = MeasureJob("n", "network", "fp32", mean_model(size=96), 1000)
    there, here = [], []
    for attempt in range(12):  # other tests run beside this one
        there.append(device.measure([job])[0].latency_ms or 0.0)
        here.append(OnnxRuntimeCpu(QUICK).measure([job])[0].latency_ms or 0.0)
        if attempt >= 3 and min(there) == pytest.approx(min(here), rel=0.25):
            break
    assert min(there) == pytest.approx(min(here), rel=0.25)


def test_samples_of_all_sessions_and_rounds_come_back(device: RemoteDevice) -> None:
    network = MeasureJob("n", "network", "fp32", mean_model(), 1000)
    one, other = device.measure([network, row("r")])
    assert 2 <= len(one.session_ms) <= 3 and len(one.rounds_ms) >= 4
    assert len(other.session_ms) == 1
    assert one.clock == "thread_cpu" and one.sequence < other.sequence
    assert one.latency_ms == pytest.approx(np.quantile(one.session_ms, 0.25))


def test_feeds_replace_inputs_and_a_wrong_one_is_a_result_with_a_reason(device: RemoteDevice) -> None:
    feeds = {"x": np.zeros((1, 3, 8, 8), np.float64)}  # the model takes float32
    good = MeasureJob("good", "row", "fp32", mean_model(), 1000, feeds)
    wrong = replace(good, key="wrong", feeds={"y2": np.zeros(1, np.float32)})
    small = replace(good, key="small", feeds={"x": np.zeros((1, 3, 4, 4), np.float32)})
    first, second, third = device.measure([good, wrong, small])
    assert first.error is None
    assert second.error == "no input 'y2' in the model; inputs: x, factor" or "no input 'y2'" in str(second.error)
    assert "takes (1, 3, 8, 8) (768 bytes), got 192 bytes" in str(third.error)


def test_runners_are_told_with_what_is_missing_of_them_and_one_can_be_chosen(server: SshServer) -> None:
    opened = RemoteDevice(parse_address(server.device_name("&runner=onnxruntime")), settings=QUICK)
    assert opened.profile.runtime == "ort"
    assert {r.name: bool(r.missing) for r in opened.runners}["onnxruntime"] is False
    opened.close()
    with pytest.raises(UsageError, match=r"board: runner='onnxruntme': runners are .*; did you mean 'onnxruntime'\?"):
        open_device(server.device_name("&runner=onnxruntme"))


def test_why_rounds_are_marked_is_part_of_the_measurement(device: RemoteDevice) -> None:
    good = {"samples_ms": [1.0, 1.1], "clock": "cuda_event", "enqueue_bound": True, "cuda_graph": False}
    marked = [
        {**good, "throttled": True, "throttled_why": f"oc3_event_cnt rose by {n}; GPU at 306 of 1020 MHz"}
        for n in (7, 9)
    ]
    raw = {
        **{"error": None, "measured_at": "2026-11-29T12:00:00+00:00", "best_ms": None, "transfer_ms": None},
        "warnings": ["skipped_tactics: 2 tactics were passed over because memory was short"],
    }
    (short,) = (device._result(row("a"), [{**raw, "sessions": [[good]]}]),)
    assert short.is_stable, "the same engine would come of measuring it again"
    assert short.source.startswith("skipped_tactics: 2 tactics")
    hot = device._result(row("a"), [{**raw, "warnings": [], "sessions": [[*marked, good]]}])
    assert hot.accepted == (False, False, True)
    assert hot.source == (
        "throttled in 2 of 3 rounds: oc3_event_cnt rose by 7, GPU at 306 of 1020 MHz; "
        "queueing takes about as long as the inference, without a CUDA graph"
    )


def test_the_number_of_threads_is_part_of_the_device_state(server: SshServer, device: RemoteDevice) -> None:
    two = RemoteDevice(parse_address(server.device_name("&threads=2")), settings=replace(QUICK, clock="wall"))
    assert two.profile.threads == 2 and two.profile.name.endswith("_2t")
    assert two.profile.fingerprint != device.profile.fingerprint
    (m,) = two.measure([row("a")])
    assert m.clock == "wall" and m.error is None
    two.close()


def test_a_board_without_a_runtime_says_what_is_missing(server: SshServer) -> None:
    bare = server.folder / "bare-python"
    bare.write_text('#!/bin/sh\nexec /usr/bin/python3 -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(
        DeviceError, match=r"(?s)no runtime to measure with there:\n.*onnxruntime: python3 on this board cannot"
    ):
        open_device(server.device_name(python=bare))


def test_each_way_to_fail_has_its_own_error_with_the_next_command(
    server: SshServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = server.known_hosts.read_text()
    name = server.device_name()
    try:
        server.known_hosts.write_text("")
        with pytest.raises(
            HostKeyUnknownError, match=r"not known on this machine yet.*say yes: ssh -F \S+config board"
        ):
            open_device(name)
        server.known_hosts.write_text(known.replace("AAAAI", "AAAAI", 1)[:-12] + "AAAAAAAAAAA\n")
        with pytest.raises(HostKeyChangedError, match=r"not the one that was known.*ssh-keygen -R"):
            open_device(name)
    finally:
        server.known_hosts.write_text(known)
    with pytest.raises(HostUnknownError, match=r"no-such-host\.invalid: no such host"):
        open_device(server.device_name(host="no-such-host.invalid"))
    with pytest.raises(NoPythonError, match=r"no program python9 there that can be run.*\?python=PATH"):
        open_device(server.device_name(python="python9"))
    server.write_config(user="somebody")
    try:
        with pytest.raises(LoginRefusedError, match=r"the login was refused.*ssh-copy-id"):
            open_device(name)
    finally:
        server.write_config()
    with pytest.raises(LinkCutError, match=r"no connection \(.*Connection refused\)\. Try: ssh"):
        open_device(f"ssh:127.0.0.1:1?config={server.config}")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NoSshError, match="apt-get install openssh-client"):
        open_device(name)


def test_a_login_shell_that_prints_does_not_disturb(server: SshServer) -> None:
    noisy = server.folder / "noisy-python"
    noisy.write_text(f'#!/bin/sh\necho "Welcome to the board"\necho "{{not json"\nexec {server.python} "$@"\n')
    noisy.chmod(0o755)
    opened = RemoteDevice(parse_address(server.device_name(python=noisy)), settings=QUICK)
    assert opened.measure([row("a")])[0].error is None
    opened.close()


def test_a_damaged_agent_is_replaced(server: SshServer) -> None:
    (agent,) = server.cache.glob("agent-*")
    agent.write_bytes(agent.read_bytes()[:-100])
    opened = RemoteDevice(parse_address(server.device_name()), settings=QUICK)
    assert opened.measure([row("a")])[0].error is None
    opened.close()


def test_a_full_disk_there_is_told(server: SshServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from nas.devices.ssh import DiskFullError

    opened = RemoteDevice(parse_address(server.device_name()), settings=QUICK)
    plain = AgentLink._message
    monkeypatch.setattr(
        AgentLink,
        "_message",
        lambda self, s: (
            m if "missing" in (m := plain(self, s)) else {"ok": False, "kind": "disk_full", "error": "full"}
        ),
    )
    with pytest.raises(DiskFullError, match=r"no space left there \(full\)\. Look with: ssh .* df -h"):
        opened.measure([row("a", size=21)])
    opened.close()


@pytest.mark.timeout(600)  # half a minute on a calm machine
def test_connections_cut_at_random_moments_lose_nothing_and_measure_nothing_twice(
    server: SshServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 cuts: the server's side killed, or the ssh program here; while it connects, or after some results arrived."""
    ids: dict[str, set[str]] = {}
    arrived = threading.Semaphore(0)
    plain = AgentLink.answer

    def recorded(self: AgentLink, on_message: Callable[[dict[str, object]], None] = lambda _: None) -> object:
        def take(message: dict[str, object]) -> None:
            result = message.get("result")
            if isinstance(result, dict):
                ids.setdefault(result["key"], set()).add(result["id"])
                arrived.release()
            on_message(message)

        return plain(self, take)

    monkeypatch.setattr(AgentLink, "answer", recorded)
    said: list[str] = []
    settings = replace(QUICK, rows_alive=2, row_round_ms=15.0, max_runs=100_000)
    opened = RemoteDevice(
        parse_address(server.device_name()),
        settings=settings,
        say=said.append,
        sleep=lambda s: time.sleep(s / 50),
        patience_s=1e6,  # it may be cut again and again before anything arrives
    )
    rng = random.Random(0)
    cuts = 0
    is_over = threading.Event()

    def cut() -> None:
        nonlocal cuts
        while cuts < 20 and not is_over.is_set():
            for _ in range(rng.choice((0, 1, 1, 2, 3, 5))):
                arrived.acquire(timeout=5)
            time.sleep(rng.uniform(0.0, 0.15))
            if rng.random() < 0.5:
                cuts += server.cut() > 0
            else:
                link = opened._connection.link
                if link is not None and link.process.poll() is None:
                    os.kill(link.process.pid, signal.SIGKILL)
                    cuts += 1
            time.sleep(0.05)

    jobs = [row(f"row{i}", 8 + i % 5) for i in range(24)]
    told: list[Measurement] = []
    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        results: list[Measurement] = []
        asked = 0
        while cuts < 20 or not results:  # as often as it takes to be cut so often
            batch = [replace(job, key=f"{job.key}-{asked}") for job in jobs]
            found = opened.measure(batch, told.append)
            assert [m.key for m in found] == [job.key for job in batch]
            results += found
            asked += 1
    finally:
        is_over.set()
        cutter.join()
        opened.close()
    assert cuts == 20
    assert all(m.error is None and m.latency_ms for m in results), [m.error for m in results if m.error]
    assert sorted(told, key=lambda m: m.sequence) == sorted(results, key=lambda m: m.sequence), "each is told once"
    assert set(ids) == {m.key for m in results}
    assert {len(found) for found in ids.values()} == {1}, "something that was finished was measured twice"
    noticed = sum("trying again" in line for line in said)  # two cuts may meet in one connection
    assert noticed >= 10 and said.count("board: connected again") >= 5, said


def test_a_board_that_stays_away_is_given_up_with_what_to_do(server: SshServer) -> None:
    slept: list[float] = []
    opened = RemoteDevice(parse_address(server.device_name()), settings=QUICK, patience_s=10.0, sleep=slept.append)
    server.stop()
    try:
        with pytest.raises(
            LinkCutError, match=r"Given up after 4 tries in 7 s\. What arrived is kept: .* same command"
        ):
            opened.measure([row("a")])
    finally:
        server.start()
    assert slept == [1.0, 2.0, 4.0]
    assert opened.measure([row("a")])[0].error is None, "it is found again when it is back"
    opened.close()


def test_what_a_board_finished_for_a_program_that_was_killed_is_not_measured_again(
    server: SshServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    ids: list[list[str]] = [[], []]
    plain = RemoteDevice._check

    def checked(self: RemoteDevice, result: dict[str, object]) -> None:
        ids[number].append(str(result["id"]))
        plain(self, result)
        if number == 0 and len(ids[0]) == 3:
            raise Killed

    monkeypatch.setattr(RemoteDevice, "_check", checked)
    jobs = [row(f"kept{i}") for i in range(3)]
    number, delivered = 0, []
    first = RemoteDevice(parse_address(server.device_name()), settings=QUICK)
    with pytest.raises(Killed):
        first.measure(jobs, lambda m: delivered.append(m.key))
    first.close()
    assert delivered == ["kept0", "kept1"]
    number = 1
    second = RemoteDevice(parse_address(server.device_name()), settings=QUICK)
    second.measure(jobs)
    second.close()
    assert len(ids[0]) == 3 and ids[0] == ids[1]


def with_state(server: SshServer, **state: object) -> Path:
    """An interpreter on whose board the state is overwritten by a file that a test may change."""
    path = server.folder / f"state-{len(list(server.folder.iterdir()))}.json"
    path.write_text(json.dumps(state))
    hook = path.with_suffix(".d")
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import importlib.abc, json, sys\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'nas_board.serve':\n"
        "            import nas_board.state as state\n"
        "            plain = state.read_state\n"
        f"            state.read_state = lambda: dict(plain(), **json.load(open({str(path)!r})))\n"
        "            state.read_identity = lambda: state.identity(state.read_state())\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    python = path.with_suffix(".sh")
    first, last = server.python.read_text().split("\n", 1)
    python.write_text(f"{first}\n{last.replace('PYTHONPATH=', f'PYTHONPATH={hook}:')}")
    python.chmod(0o755)
    return python


def test_a_board_that_changed_its_power_mode_ends_the_work_with_the_difference(server: SshServer) -> None:
    python = with_state(server, power_mode={"id": 0, "name": "MAXN"}, clocks_locked=True)
    state = next(server.folder.glob("state-*.json"))
    opened = RemoteDevice(parse_address(server.device_name(python=python)), settings=QUICK)
    assert opened.profile.power_mode == "MAXN" and opened.profile.clocks_locked
    assert opened.measure([row("a")])[0].error is None
    state.write_text(json.dumps({"power_mode": {"id": 2, "name": "15W"}, "clocks_locked": True}))
    told: list[Measurement] = []
    with pytest.raises(DeviceError, match=r"in another state than .*\n  power_mode: it was 'MAXN', it is '15W'\n") as e:
        opened.measure([row("b")], told.append)
    assert not told, "what was measured in another state was given"
    assert "Bring the board back into that state" in str(e.value)
    assert opened.profile.power_mode == "15W"
    opened.close()


def test_a_board_that_was_booted_in_between_goes_on_and_says_so(server: SshServer) -> None:
    said: list[str] = []
    python = with_state(server, boot_id="first")
    state = max(server.folder.glob("state-*.json"), key=lambda p: p.stat().st_mtime_ns)
    opened = RemoteDevice(parse_address(server.device_name(python=python)), settings=QUICK, say=said.append)
    opened.measure([row("a")])
    state.write_text(json.dumps({"boot_id": "second"}))
    assert opened.measure([row("b")])[0].error is None
    assert said == ["board: the board was started anew"]
    opened.close()


def test_what_shows_the_state_of_the_board_now_is_always_measured_anew(device: RemoteDevice) -> None:
    one, two = (device.measure([overhead_job()])[0] for _ in range(2))
    assert one.rounds_ms != two.rounds_ms


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ssh:", r"device 'ssh:': give ssh:HOST, ssh:USER@HOST or ssh:USER@HOST:PORT"),
        ("ssh:-oProxyCommand=x", r"ssh address '-oProxyCommand=x': give an alias"),
        ("ssh:a b", "give an alias of your ssh configuration"),
        ("ssh:$(touch x)", "give an alias of your ssh configuration"),
        ("ssh:a:99999", "the port must be from 1 to 65535, got 99999"),
        ("ssh:a?runer=x", r"behind \? come runner=.*got 'runer=x'; did you mean 'runner'\?"),
        ("ssh:a?python=py;rm", "without spaces"),
        ("ssh:a?threads=0", "threads must be a number from 1 to 999, got '0'"),
        ("ssh:a,b", r"'b' is no board behind SSH; several boards are joined so: ssh:a,ssh:b"),
        ("ssh:a,ssh:a", "a board is named twice"),
    ],
)
def test_a_name_that_is_no_address_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_device(name)


@pytest.mark.parametrize(
    ("name", "destination", "port"),
    [
        ("ssh:nano", "nano", None),
        ("ssh:me@nano.local:2222", "me@nano.local", 2222),
        ("ssh:me@[fe80::1%eth0]:22", "me@fe80::1%eth0", 22),
        ("ssh:[::1]", "::1", None),
        ("ssh:10.0.0.7", "10.0.0.7", None),
    ],
)
def test_addresses(name: str, destination: str, port: int | None) -> None:
    address = parse_address(name)
    assert (address.ssh.destination, address.ssh.port, address.runner) == (destination, port, "")
    for options in ("", "?runner=trtexec", "?threads=4&python=~/venv/bin/python&config=/etc/mine"):
        assert parse_address(name + options).name == name + options
