"""The agent: it serves one host over its standard input and output, and ends with everything it started when these end.

One JSON object a line both ways; raw bytes follow the line that announces them:

    hello                               -> agent, python, runners, state
    have     sha256: [..]               -> missing: [..]
    put      sha256, bytes + the bytes  -> ok
    measure  batch, runner, plan, jobs  -> {"result"} for each job, {"progress"} now and then, {"done"}
    calm     runner, plan, checks       -> readings of the reference network
    run      sha256, runner, images     -> outputs + their bytes
    profile  sha256, runner, runs       -> layers
    state                               -> state
    acknowledge batch                   -> ok: the host has the results of this batch
    bye

Results of `measure` also stand in `batches/batch-<id>.jsonl` until they are acknowledged: the same request again,
over another connection, gives what is there and measures the rest. A result counts only if power mode, locked clocks
and boot were the same before and after the models that were measured together with it; otherwise these are measured
again.
"""

import fcntl
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from typing import Any, Callable, Dict, Iterator, List, Optional

from . import processes
from .errors import BoardError, as_board_error
from .lines import LineReader, LineWriter
from .rounds import Plan
from .sensors import bare_state, identity
from .worker import START_S

ROOT = "~/.cache/nas-board"
KEEP_S = 24 * 3600.0  # models and unacknowledged batches that nobody used for so long are removed
TELL_EVERY_S = 1.0
BEAT_S = 5.0  # a sign of life for the host while a model takes long
GRACE_S = 5.0  # beyond the limit of a step, for a busy board
WAIT_FOR_BOARD_S = 600.0  # another host may be measuring
STATE_TRIES = 3  # how often models are measured whose board did not stay in one state

_SHA256 = re.compile("[0-9a-f]{64}")
_BATCH = re.compile("[0-9a-f]{8,64}")

ReadState = Callable[[], Dict[str, Any]]


class Folder(object):
    """What the agent keeps on the board: models by content, batches, runtimes' caches; private, below one folder."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.blobs, self.batches = os.path.join(root, "blobs"), os.path.join(root, "batches")
        self.lock = os.path.join(root, "measuring.lock")
        for path in (root, self.blobs, self.batches):
            os.makedirs(path, 0o700, exist_ok=True)
        self.work = tempfile.mkdtemp(prefix="work-", dir=root)

    def blob(self, sha256: Any) -> str:
        """Path of a file by its content.

        Raises:
            BoardError: not a hash.
        """
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise BoardError("bad_request", "not a sha256: %.80r" % (sha256,))
        return os.path.join(self.blobs, sha256)

    def batch(self, name: Any) -> str:
        """Path of a batch's results.

        Raises:
            BoardError: not a name of a batch.
        """
        if not isinstance(name, str) or not _BATCH.fullmatch(name):
            raise BoardError("bad_request", "not a batch: %.80r" % (name,))
        return os.path.join(self.batches, "batch-%s.jsonl" % name)

    def has(self, sha256: Any) -> bool:
        """Whether a file is there; it then counts as used now."""
        path = self.blob(sha256)
        try:
            os.utime(path)
        except OSError:
            return False
        return True

    def tidy(self, now_s: float) -> None:
        """Removes what nobody used for long, leftovers of agents that were killed included."""
        for folder in (self.root, self.blobs, self.batches):
            for name in os.listdir(folder):
                path = os.path.join(folder, name)
                if folder == self.root and not name.startswith("work-"):
                    continue
                try:
                    if now_s - os.stat(path).st_mtime < KEEP_S:
                        continue
                    if os.path.isdir(path):
                        shutil.rmtree(path)
                    else:
                        os.remove(path)
                except OSError:  # another agent removed it
                    continue

    def close(self) -> None:
        """Removes the scratch folder of this agent."""
        shutil.rmtree(self.work, ignore_errors=True)


class WorkerProcess(object):
    """The worker, started when it is needed and again after it was ended."""

    def __init__(self, command: List[str]) -> None:
        self._command = command
        self._process = None  # type: Optional[subprocess.Popen[bytes]]
        self._reader = None  # type: Optional[LineReader]
        self.key = ""  # of the model with which something is being done

    def ask(self, request: Dict[str, Any], during: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
        """The answer to a request; a worker that dies or hangs is ended, and `key` says over which model.

        Args:
            request: see `worker.Worker.answer`.
            during: told what the worker says before its answer, and `{}` every few seconds.

        Raises:
            BoardError: what the worker answered; `hung` or `killed` where it did not.
        """
        self.key = ""
        process, reader = self._started()
        limit_s = START_S
        try:
            if process.stdin is not None:
                LineWriter(process.stdin.fileno()).send(request)
            while True:
                message = _next_message(reader, limit_s + GRACE_S, lambda: during({}))
                if message is None:
                    raise self._ended()
                if "at" in message:
                    self.key, limit_s = message["at"], message["limit_s"]
                elif "step" in message:
                    during(message)
                elif "failed" in message:
                    raise BoardError(message["failed"]["kind"], message["failed"]["message"])
                else:
                    return message
        except OSError as e:  # it ended before it took the request
            raise self._ended() from e
        except BoardError as e:
            if e.kind in ("hung", "truncated") and self._process is not None:
                self.end()
            raise

    def end(self) -> None:
        """Ends the process, and what it started, at once."""
        process, self._process, self._reader = self._process, None, None
        if process is not None:
            processes.end(process)
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    try:
                        stream.close()
                    except OSError:  # what was not written yet has no reader any more
                        pass

    def _started(self) -> Any:
        if self._process is None or self._process.poll() is not None:
            self.end()
            pipe = subprocess.PIPE
            self._process = processes.start(self._command, stdin=pipe, stdout=pipe)
            self._reader = LineReader(self._process.stdout.fileno()) if self._process.stdout else None
        return self._process, self._reader

    def _ended(self) -> BoardError:
        process = self._process
        if process is None:
            return BoardError("killed", "the process that runs models was ended")
        try:
            code = process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            code = 0
        self.end()
        if code == -9:
            return BoardError("killed", "ended by signal 9 (SIGKILL), which the kernel sends when memory is short")
        if code < 0:
            return BoardError("killed", "ended by signal %d, a crash of the runtime" % -code)
        return BoardError("killed", "the process that runs models ended with status %d" % code)


def _next_message(reader: LineReader, limit_s: float, beat: Callable[[], None]) -> Optional[Dict[str, Any]]:
    """The next message of the worker within its limit; `beat` is called while it takes long."""
    until_s = time.monotonic() + limit_s
    while True:
        left_s = until_s - time.monotonic()
        try:
            return reader.message(max(0.0, min(BEAT_S, left_s)))
        except BoardError as e:
            if e.kind != "hung":
                raise
            if left_s <= BEAT_S:
                raise BoardError("hung", "did not return within %g s" % (limit_s - GRACE_S)) from e
            beat()


class Agent(object):
    """Answers the host's requests."""

    def __init__(
        self,
        folder: Folder,
        worker: WorkerProcess,
        send: Callable[..., None],
        read_state: ReadState,
        name: str,
    ) -> None:
        """`send` writes a message (and raw bytes); `read_state` reads the board; `name` is the agent's content hash."""
        self._folder = folder
        self._worker = worker
        self._send = send
        self._read_state = read_state
        self._name = name
        self._client = ""

    def answer(self, request: Dict[str, Any]) -> None:
        """Answers one request. What goes wrong is an answer too: `{"ok": false, "kind", "error"}`."""
        operations = {
            "hello": self._hello,
            "have": self._have,
            "put": self._put,
            "measure": self._measure,
            "calm": self._calm,
            "run": self._run,
            "profile": self._profile,
            "state": lambda _: self._send({"ok": True, "state": self._read_state()}),
            "acknowledge": self._acknowledge,
        }  # type: Dict[str, Callable[[Dict[str, Any]], None]]
        try:
            operation = operations.get(request.get("op", ""))
            if operation is None:
                raise BoardError("bad_request", "unknown request %.80r" % (request.get("op"),))
            operation(request)
        except BrokenPipeError:
            raise
        except Exception as e:  # whatever goes wrong here becomes an answer with its reason
            wrong = "bad_request" if isinstance(e, (KeyError, TypeError, ValueError)) else "unsupported"
            error = as_board_error(e, wrong)
            self._send({"ok": False, "kind": error.kind, "error": error.message})

    def _hello(self, request: Dict[str, Any]) -> None:
        self._client = str(request.get("client", ""))
        self._folder.tidy(time.time())
        found = self._worker.ask({"op": "describe"}, _Progress(self._send, 0, 1).tell)["runners"]
        version = "%d.%d.%d" % sys.version_info[:3]
        state = self._read_state()
        self._send({"ok": True, "agent": self._name, "python": version, "runners": found, "state": state})

    def _have(self, request: Dict[str, Any]) -> None:
        self._send({"ok": True, "missing": [x for x in request["sha256"] if not self._folder.has(x)]})

    def _put(self, request: Dict[str, Any]) -> None:
        if request.get("failed"):
            raise BoardError(request["failed"]["kind"], request["failed"]["message"])
        self._send({"ok": True})

    def _acknowledge(self, request: Dict[str, Any]) -> None:
        try:
            os.remove(self._folder.batch(request["batch"]))
        except FileNotFoundError:  # acknowledged before, over a connection that was cut
            pass
        self._send({"ok": True})

    def _measure(self, request: Dict[str, Any]) -> None:
        plan = Plan(request["plan"])
        jobs = [self._job(i, job) for i, job in enumerate(request["jobs"])]
        with _Lock(self._folder.lock, self._client, lambda text: self._send({"progress": 0.0, "waiting": text})):
            before = self._read_state()
            batch = _Batch(self._folder.batch(request["batch"]), jobs, identity(before))
            for result in batch.found:
                self._send({"result": result})
            left = [job for job in jobs if job["index"] not in batch.indices]
            total_steps = max(1, len(jobs) * plan.sessions * plan.rounds)
            done_steps = len(batch.found) * plan.sessions * plan.rounds
            for start in range(0, len(left), plan.alive):
                part = left[start : start + plan.alive]
                progress = _Progress(self._send, done_steps, total_steps)
                for result in self._measured(request, part, progress.tell):
                    batch.add(result)
                    self._send({"result": result})
                done_steps += len(part) * plan.sessions * plan.rounds
            self._send({"done": True, "state_before": before, "state_after": self._read_state()})

    def _measured(
        self, request: Dict[str, Any], jobs: List[Dict[str, Any]], during: Callable[[Dict[str, Any]], None]
    ) -> Iterator[Dict[str, Any]]:
        """Results of models measured together, all in one state of the board."""
        for _ in range(STATE_TRIES):
            before = identity(self._read_state())
            results = self._survived(request, jobs, during)
            after = identity(self._read_state())
            if before == after:
                for result in results:
                    yield _final(result, after)
                return
        changed = [k for k in sorted(after) if before[k] != after[k]]
        what = ", ".join("%s: %r, then %r" % (k, before[k], after[k]) for k in changed)
        for job in jobs:
            yield _final(_failed(job, "state_changed", "the board did not stay in one state: %s" % what), after)

    def _survived(
        self, request: Dict[str, Any], jobs: List[Dict[str, Any]], during: Callable[[Dict[str, Any]], None]
    ) -> List[Dict[str, Any]]:
        """Results of models measured together; one that ends or hangs the worker fails alone, the rest starts anew."""
        lost = []  # type: List[Dict[str, Any]]
        left = list(jobs)
        while left:
            asked = self._asked(request, "measure", jobs=left, best_ms=request.get("best_ms"), plan=request["plan"])
            try:
                told = self._worker.ask(asked, during)
            except BoardError as e:
                guilty = [job for job in left if job["key"] == self._worker.key]
                if e.kind not in ("hung", "killed", "truncated") or not guilty:
                    raise
                lost += [_failed(job, e.kind, e.message) for job in guilty]
                left = [job for job in left if job not in guilty]
                continue
            return lost + list(told["results"])
        return lost

    def _calm(self, request: Dict[str, Any]) -> None:
        with _Lock(self._folder.lock, self._client, lambda text: self._send({"progress": 0.0, "waiting": text})):
            asked = self._asked(
                request, "calm", checks=request["checks"], best_ms=request.get("best_ms"), plan=request["plan"]
            )
            told = self._worker.ask(asked, _Progress(self._send, 0, 1).tell)
        self._send(dict(told, ok=True))

    def _run(self, request: Dict[str, Any]) -> None:
        asked = self._asked(
            request,
            "run",
            path=self._there(request["sha256"]),
            images=self._there(request["images"]),
            shape=request["shape"],
            precision=request.get("precision", "fp32"),
            limit_s=request["limit_s"],
        )
        outputs = self._worker.ask(asked, _Progress(self._send, 0, 1).tell)["outputs"]
        data = []
        for output in outputs:
            path = output.pop("path")
            with open(path, "rb") as f:
                data.append(f.read())
            os.remove(path)
            output["bytes"] = len(data[-1])
        self._send({"ok": True, "outputs": outputs}, b"".join(data))

    def _profile(self, request: Dict[str, Any]) -> None:
        with _Lock(self._folder.lock, self._client, lambda text: self._send({"progress": 0.0, "waiting": text})):
            asked = self._asked(
                request,
                "profile",
                path=self._there(request["sha256"]),
                feeds={name: self._there(x) for name, x in request.get("feeds", {}).items()},
                precision=request.get("precision", "fp32"),
                runs=request["runs"],
                limit_s=request["limit_s"],
            )
            told = self._worker.ask(asked, _Progress(self._send, 0, 1).tell)
        self._send(dict(told, ok=True, state=self._read_state()))

    def _asked(self, request: Dict[str, Any], op: str, **more: Any) -> Dict[str, Any]:
        reference = request.get("reference")
        return dict(
            more,
            op=op,
            runner=str(request["runner"]),
            threads=int(request.get("threads", 1)),
            reference=None if reference is None else self._there(reference),
            work=self._folder.work,
            timing_cache=os.path.join(self._folder.root, "timing-cache-%s.bin" % _plain(str(request["runner"]))),
        )

    def _job(self, index: int, job: Dict[str, Any]) -> Dict[str, Any]:
        return {
            "index": index,
            "key": str(job["key"]),
            "precision": str(job.get("precision", "fp32")),
            "path": self._there(job["sha256"]),
            "feeds": {str(name): self._there(x) for name, x in job.get("feeds", {}).items()},
        }

    def _there(self, sha256: Any) -> str:
        path = self._folder.blob(sha256)
        if not self._folder.has(sha256):
            raise BoardError("not_found", "%s is not on this board any more" % sha256)
        return path


class _Progress(object):
    """Tells the host how far a batch is, and that the agent lives, but not too often."""

    def __init__(self, send: Callable[..., None], done: int, total: int) -> None:
        self._send = send
        self._done = done
        self._total = total
        self._told_s = 0.0

    def tell(self, message: Dict[str, Any]) -> None:
        self._done += "step" in message
        now_s = time.monotonic()
        if not message or now_s - self._told_s >= TELL_EVERY_S:
            self._told_s = now_s
            self._send({"progress": min(1.0, float(self._done) / self._total)})


class _Batch(object):
    """The results of a batch on disk: appended one by one, a torn last line is left out when they are read again."""

    def __init__(self, path: str, jobs: List[Dict[str, Any]], state: Dict[str, Any]) -> None:
        """Reads what an earlier connection measured in the same power mode and with the same clocks."""
        self._path = path
        keys = {job["index"]: job["key"] for job in jobs}
        self.found = []  # type: List[Dict[str, Any]]
        self.indices = set()  # type: ignore[var-annotated]
        for result in _read_lines(path):
            index, told = result.get("index"), result.get("state") or {}
            same = all(told.get(name) == state[name] for name in state if name != "boot_id")
            if same and index not in self.indices and index in keys and result.get("key") == keys[index]:
                self.indices.add(index)
                self.found.append(result)
        staged = path + ".new"
        with open(staged, "wb") as f:
            for result in self.found:
                f.write(_line(result))
        os.rename(staged, path)

    def add(self, result: Dict[str, Any]) -> None:
        with open(self._path, "ab") as f:
            f.write(_line(result))


class _Lock(object):
    """One host measures at a time. An agent of the same host that a cut link left is ended, another one is waited for.

    Raises:
        BoardError: `busy`, when another host keeps the board for too long.
    """

    def __init__(self, path: str, client: str, waiting: Callable[[str], None]) -> None:
        self._path = path
        self._client = client
        self._waiting = waiting
        self._fd = -1

    def __enter__(self) -> "_Lock":
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        until_s = time.monotonic() + WAIT_FOR_BOARD_S
        told_s = 0.0
        while not self._taken():
            holder = self._holder()
            if self._client and holder.get("client") == self._client and holder.get("pid") != os.getpid():
                _end_agent(holder.get("pid"))
            now_s = time.monotonic()
            if now_s > until_s:
                os.close(self._fd)
                raise BoardError("busy", "another program measures on this board since %s" % holder.get("since"))
            if now_s - told_s > BEAT_S:
                told_s = now_s
                self._waiting("another program measures on this board since %s" % holder.get("since"))
            time.sleep(0.1)
        holder = {"pid": os.getpid(), "client": self._client, "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(holder).encode("ascii"), 0)
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self._fd)

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _holder(self) -> Dict[str, Any]:
        try:
            told = json.loads(os.pread(self._fd, 4096, 0).decode("utf-8", "replace"))
        except ValueError:  # it is being written
            return {}
        return told if isinstance(told, dict) else {}


def _end_agent(pid: Any) -> None:
    """Ends an agent of ours by its process id, after a look that it still is one."""
    try:
        with open("/proc/%d/cmdline" % int(pid), "rb") as f:
            command = f.read()
        if b"agent-" in command or b"nas.devices.board" in command:
            os.kill(int(pid), signal.SIGKILL)
    except (OSError, TypeError, ValueError):  # it has ended
        pass


def _read_lines(path: str) -> Iterator[Dict[str, Any]]:
    try:
        with open(path, "rb") as f:
            for line in f:
                try:
                    told = json.loads(line.decode("utf-8"))
                except ValueError:  # torn when the agent was ended
                    continue
                if isinstance(told, dict):
                    yield told
    except FileNotFoundError:
        return


def _line(result: Dict[str, Any]) -> bytes:
    return json.dumps(result, allow_nan=False).encode("ascii") + b"\n"


def _final(result: Dict[str, Any], state: Dict[str, Any]) -> Dict[str, Any]:
    """A result with the state that it holds for, and an id by which a second measurement could be told from this one."""
    return dict(result, state=state, id=uuid.uuid4().hex)


def _failed(job: Dict[str, Any], kind: str, message: str) -> Dict[str, Any]:
    return {
        "index": job["index"],
        "key": job["key"],
        "error": {"kind": kind, "message": message},
        "sessions": [],
        "build_s": None,
        "engine_bytes": None,
        "warnings": [],
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "best_ms": None,
    }


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower())


def _reader_thread(reader: LineReader, folder: Folder, requests: "queue.Queue[Any]", ended: Callable[[], None]) -> None:
    """Reads requests, and takes in files, while the main thread works; at the end of the stream everything ends."""
    try:
        while True:
            request = reader.message()
            if request is None or request.get("op") == "bye":
                break
            if request.get("op") == "put":
                request = dict(request, failed=_received(reader, folder, request))
            requests.put(request)
    except (BoardError, OSError):  # the host speaks another language, or is gone
        pass
    ended()


def _received(reader: LineReader, folder: Folder, request: Dict[str, Any]) -> Optional[Dict[str, str]]:
    """Takes in a file; all of its bytes are read whatever goes wrong, so that the next line is a request again."""
    left = int(request["bytes"])
    digest = hashlib.sha256()
    failed = None  # type: Optional[BoardError]
    staged = os.path.join(folder.work, "incoming")
    try:
        target = open(staged, "wb")  # type: Any
    except OSError as e:
        target, failed = None, as_board_error(e, "unsupported")
    while left > 0:
        data = reader.data(left)
        if not data:
            raise BoardError("truncated", "the stream ended within a file")
        left -= len(data)
        digest.update(data)
        if failed is None:
            try:
                target.write(data)
            except OSError as e:
                failed = as_board_error(e, "unsupported")
    try:
        if target is not None:
            target.close()
        if failed is None and digest.hexdigest() != request.get("sha256"):
            failed = BoardError("truncated", "a file arrived with another content than it was sent with")
        if failed is None:
            os.rename(staged, folder.blob(request.get("sha256")))
    except (OSError, BoardError) as e:
        failed = as_board_error(e, "unsupported")
    return None if failed is None else {"kind": failed.kind, "message": failed.message}


def known_state() -> ReadState:
    """What reads the state of this board: all that a Jetson tells where this package can read that."""
    try:
        from .state import read_state  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return bare_state
    return read_state  # type: ignore[no-any-return, unused-ignore]


def serve(command: List[str], name: str) -> None:
    """Serves the host that holds the other end of standard input and output, until it lets go.

    Args:
        command: starts this program; `--worker` is added for the process that runs models.
        name: content hash of the agent.
    """
    out = os.dup(1)
    os.dup2(2, 1)  # nothing else may come between the messages
    os.umask(0o077)
    folder = Folder(os.path.expanduser(ROOT))
    worker = WorkerProcess(command + ["--worker"])
    writer = LineWriter(out)
    requests = queue.Queue()  # type: queue.Queue[Any]

    def ended() -> None:
        worker.end()
        folder.close()
        os._exit(0)  # the main thread may be in the middle of anything

    reading = threading.Thread(target=_reader_thread, args=(LineReader(0), folder, requests, ended), daemon=True)
    reading.start()
    agent = Agent(folder, worker, writer.send, known_state(), name)
    try:
        while True:
            agent.answer(requests.get())
    except BrokenPipeError:  # the host is gone
        ended()
