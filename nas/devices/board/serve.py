"""The agent: it serves one host over its standard input and output, and ends with everything it started when these end.

One JSON object a line both ways; raw bytes follow the line that announces them:

    hello    client, runners: bool      -> agent, python, runners, state
    have     sha256: [..]               -> missing: [..]
    put      sha256, bytes + the bytes  -> ok
    measure  batch, runner, plan, jobs  -> {"result"} for each job, {"progress"} now and then, {"done"}
    stream   the same; a job is images  -> the same: a job has a chain of models and a file of images
    calm     runner, plan, checks       -> readings of the reference network
    run      sha256, runner, images     -> outputs + their bytes
    profile  sha256, runner, runs       -> layers
    script   folder, script, options    -> code, out, err of a Python program that lies on the board
    hold     is_held                    -> ok: until it is let go, or this connection ends, nobody else gets the board
    state                               -> state
    power    set_mode, lock_clocks      -> ran, back, notes, state: only what was asked for is changed
    acknowledge batch                   -> ok: the host has the results of this batch
    bye

An agent that is asked nothing says `{"idle"}` every minute: where nobody is at the other end any more, the network
gives that up in about a quarter of an hour, and the agent ends.

Results of `measure` also stand in `batches/batch-<id>.jsonl` until they are acknowledged: the same request again,
over another connection, gives what is there and measures the rest. A result counts only if power mode, locked clocks
and boot were the same before and after the models that were measured together with it; otherwise these are measured
again.
"""

import hashlib
import os
import queue
import sys
import threading
import time
import uuid
from typing import Any, Callable, Dict, Iterator, List, Optional

from . import processes
from .building import cache_name
from .errors import BoardError, as_board_error
from .lines import LineReader, LineWriter
from .power import change
from .rounds import Plan
from .state import read_identity, read_state
from .store import Batch, BoardLock, Folder
from .worker_process import WorkerProcess

ROOT = "~/.cache/nas-board"
TELL_EVERY_S = 1.0
IDLE_BEAT_S = 60.0
STATE_TRIES = 3  # how often models are measured whose board did not stay in one state
NO_ANSWER = ("hung", "killed", "truncated")  # kinds of error of a worker that was lost over what it was doing

ReadState = Callable[[], Dict[str, Any]]


class Agent(object):
    """Answers the host's requests."""

    def __init__(
        self,
        folder: Folder,
        worker: WorkerProcess,
        send: Callable[..., None],
        read_state: ReadState,
        read_identity: ReadState,
        name: str,
    ) -> None:
        """Serves nothing yet.

        Args:
            folder: what is kept on the board.
            worker: runs models.
            send: writes a message, and raw bytes.
            read_state: reads the whole state of the board.
            read_identity: reads the part that may not change while models are measured.
            name: the agent's content hash.
        """
        self._folder = folder
        self._worker = worker
        self._send = send
        self._read_state = read_state
        self._read_identity = read_identity
        self._name = name
        self._client = ""
        self._held = None  # type: Optional[BoardLock]

    def answer(self, request: Dict[str, Any]) -> None:
        """Answers one request. What goes wrong is an answer too: `{"ok": false, "kind", "error"}`."""
        operations = {
            "hello": self._hello,
            "have": self._have,
            "put": self._put,
            "measure": self._measure,
            "stream": self._stream,
            "calm": self._calm,
            "run": self._run,
            "profile": self._profile,
            "script": self._script,
            "hold": self._hold,
            "state": lambda _: self._send({"ok": True, "state": self._read_state()}),
            "acknowledge": self._acknowledge,
            "power": self._power,
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
        self._tidy()
        found = []  # type: List[Dict[str, Any]]
        if request.get("runners", True):  # importing runtimes takes seconds: not again over the next connection
            found = self._described(str(request.get("runner") or ""))
            self._worker.end()  # every runtime that there is was loaded into it, also those that nobody will use
        version = "%d.%d.%d" % sys.version_info[:3]
        state = self._read_state()
        self._send({"ok": True, "agent": self._name, "python": version, "runners": found, "state": state})

    def _described(self, only: str) -> List[Dict[str, Any]]:
        """What the runtimes say of themselves; one that ends or hangs the worker is missing, the others are asked anew.

        `only`: name of the one that is wanted; the others are not loaded then.
        """
        broken = {}  # type: Dict[str, str]
        while True:
            try:
                asked = {"op": "describe", "broken": broken, "only": only}
                return list(self._worker.ask(asked, _Progress(self._send, 0, 1).tell)["runners"])
            except BoardError as e:
                if e.kind not in NO_ANSWER or not self._worker.key or self._worker.key in broken:
                    raise
                broken[self._worker.key] = "it cannot be loaded: %s" % e.message

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
        self._tidy()
        self._send({"ok": True})

    def _tidy(self) -> None:
        self._folder.used("agent-%s.pyz" % self._name[:16])  # another version that tidies up leaves this one
        self._folder.tidy(time.time())

    def _locked(self) -> BoardLock:
        """The board for as long as a request takes; at once where it is held by this agent anyway."""
        path = "" if self._held is not None else self._folder.lock
        return BoardLock(path, self._client, lambda text: self._send({"progress": 0.0, "waiting": text}))

    def _hold(self, request: Dict[str, Any]) -> None:
        if request["is_held"] and self._held is None:
            lock = self._locked()
            lock.__enter__()
            self._held = lock
        elif not request["is_held"] and self._held is not None:
            lock, self._held = self._held, None
            lock.__exit__()
        self._send({"ok": True})

    def _measure(self, request: Dict[str, Any]) -> None:
        plan = Plan(request["plan"])
        jobs = [self._job(i, job) for i, job in enumerate(request["jobs"])]
        with self._locked():
            batch = Batch(self._folder.batch(request["batch"]), jobs, self._read_identity())
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
            self._send({"done": True})

    def _stream(self, request: Dict[str, Any]) -> None:
        """As `measure`, for jobs with images."""
        try:
            self._measure(request)
        finally:  # as in `_run`
            for job in request["jobs"]:
                self._folder.remove(job["images"])

    def _measured(
        self, request: Dict[str, Any], jobs: List[Dict[str, Any]], during: Callable[[Dict[str, Any]], None]
    ) -> Iterator[Dict[str, Any]]:
        """Results of models measured together, all in one state of the board."""
        for _ in range(STATE_TRIES):
            before = self._read_identity()
            results = self._survived(request, before, jobs, during)
            after = self._read_identity()
            if before == after:
                for result in results:
                    yield _final(result, after)
                return
        changed = [k for k in sorted(after) if before[k] != after[k]]
        what = ", ".join("%s: %r, then %r" % (k, before[k], after[k]) for k in changed)
        for job in jobs:
            yield _final(_failed(job, "state_changed", "the board did not stay in one state: %s" % what), after)

    def _survived(
        self,
        request: Dict[str, Any],
        state: Dict[str, Any],
        jobs: List[Dict[str, Any]],
        during: Callable[[Dict[str, Any]], None],
    ) -> List[Dict[str, Any]]:
        """Results of models measured together; one that ends or hangs the worker fails alone, the rest starts anew."""
        lost = []  # type: List[Dict[str, Any]]
        left = list(jobs)
        while left:
            more = {"jobs": left, "best_ms": request.get("best_ms"), "plan": request["plan"]}
            asked = self._asked(request, str(request["op"]), state, **more)
            try:
                told = self._worker.ask(asked, during)
            except BoardError as e:
                guilty = [job for job in left if job["key"] == self._worker.key]
                if e.kind not in NO_ANSWER or not guilty:
                    raise
                lost += [_failed(job, e.kind, e.message) for job in guilty]
                left = [job for job in left if job not in guilty]
                continue
            return lost + list(told["results"])
        return lost

    def _calm(self, request: Dict[str, Any]) -> None:
        with self._locked():
            more = {"checks": request["checks"], "best_ms": request.get("best_ms"), "plan": request["plan"]}
            asked = self._asked(request, "calm", self._read_identity(), **more)
            told = self._worker.ask(asked, _Progress(self._send, 0, 1).tell)
        self._send(dict(told, ok=True))

    def _run(self, request: Dict[str, Any]) -> None:
        asked = self._asked(
            request,
            "run",
            self._read_identity(),
            path=self._there(request["sha256"]),
            images=self._there(request["images"]),
            shape=request["shape"],
            precision=request.get("precision", "fp32"),
            limit_s=request["limit_s"],
        )
        try:
            with self._locked():
                outputs = self._worker.ask(asked, _Progress(self._send, 0, 1).tell)["outputs"]
        finally:  # images are many, and hardly ever the same ones again
            self._folder.remove(request["images"])
        data = []
        for output in outputs:
            path = output.pop("path")
            with open(path, "rb") as f:
                data.append(f.read())
            os.remove(path)
            output["bytes"] = len(data[-1])
        self._send({"ok": True, "outputs": outputs}, b"".join(data))

    def _profile(self, request: Dict[str, Any]) -> None:
        with self._locked():
            asked = self._asked(
                request,
                "profile",
                self._read_identity(),
                path=self._there(request["sha256"]),
                feeds={name: self._there(x) for name, x in request.get("feeds", {}).items()},
                precision=request.get("precision", "fp32"),
                runs=request["runs"],
                limit_s=request["limit_s"],
            )
            told = self._worker.ask(asked, _Progress(self._send, 0, 1).tell)
        self._send(dict(told, ok=True, state=self._read_state()))

    def _script(self, request: Dict[str, Any]) -> None:
        """Runs a program while nobody measures. It ends with this agent, and so when the host lets go."""
        argv = [sys.executable, os.path.join(str(request["folder"]), str(request["script"]))]
        argv += [str(option) for option in request["options"]]
        tell = _Progress(self._send, 0, 1).tell
        with self._locked():
            self._worker.end()  # the memory that it holds is for the program now
            code, out, err = processes.run(argv, float(request["limit_s"]), lambda: tell({}))
        self._send({"ok": True, "code": code, "out": out, "err": err})

    def _power(self, request: Dict[str, Any]) -> None:
        mode = request.get("set_mode")
        store = os.path.join(self._folder.root, "clocks-before.conf")
        with self._locked():
            told = change(None if mode is None else str(mode), bool(request.get("lock_clocks")), store)
        self._send(dict(told, ok=True))

    def _asked(self, request: Dict[str, Any], op: str, state: Dict[str, Any], **more: Any) -> Dict[str, Any]:
        """A request for the worker; `state`: identity of the board now."""
        reference = request.get("reference")
        settings = {name: value for name, value in state.items() if name != "boot_id"}
        # of one version, too: trtexec may refuse to build with the cache of another, as after an update of JetPack
        cache = cache_name(str(request["runner"]), str(request.get("version", "")), settings)
        return dict(
            more,
            op=op,
            runner=str(request["runner"]),
            threads=int(request.get("threads", 1)),
            reference=None if reference is None else self._there(reference),
            work=self._folder.work,
            timing_cache=self._folder.used(cache),
        )

    def _job(self, index: int, job: Dict[str, Any]) -> Dict[str, Any]:
        known = {"index": index, "key": str(job["key"])}  # type: Dict[str, Any]
        if "images" in job:
            return dict(
                known,
                paths=[self._there(x) for x in job["models"]],
                precisions=[str(x) for x in job["precisions"]],
                thresholds=[float(x) for x in job["thresholds"]],
                images=self._there(job["images"]),
                images_kind=str(job["images_kind"]),
                shape=[int(n) for n in job["shape"]],
            )
        return dict(
            known,
            precision=str(job.get("precision", "fp32")),
            path=self._there(job["sha256"]),
            feeds={str(name): self._there(x) for name, x in job.get("feeds", {}).items()},
        )

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


def _final(result: Dict[str, Any], state: Dict[str, Any]) -> Dict[str, Any]:
    """A result with the state that it holds for, and an id by which a second measurement could be told from it."""
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
        "transfer_ms": None,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "best_ms": None,
    }


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
    finally:  # also after a request that nobody thought of: without this thread the end of the stream is never seen
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
        worker.close()
        folder.close()
        os._exit(0)  # the main thread may be in the middle of anything

    reading = threading.Thread(target=_reader_thread, args=(LineReader(0), folder, requests, ended), daemon=True)
    reading.start()
    agent = Agent(folder, worker, writer.send, read_state, read_identity, name)
    try:
        while True:
            try:
                request = requests.get(timeout=IDLE_BEAT_S)
            except queue.Empty:
                writer.send({"idle": True})
                continue
            agent.answer(request)
    except OSError:  # the host is gone
        ended()
