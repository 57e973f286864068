"""Processes that are killed, told to stop, or meet a full disk, at a moment of choice.

As a program this file is a server: it forks a process for every call that it is asked for, since importing PyTorch
takes longer than all the rest. As a module it is the client of that server.
"""
import contextlib, errno, gc, importlib, io, multiprocessing.util, os, pickle, re, resource, signal, socket, subprocess
import sys, threading, time, traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUIET = dict(  # as tests run side by side: more threads than cores would only wait for each other
    OMP_NUM_THREADS="1",
    NUMBA_NUM_THREADS="1",
    PYTHONPATH=os.environ.get("PYTHONPATH", str(ROOT)),
)
WRITES = os.O_WRONLY | os.O_RDWR
CHANGES = "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree"


def children_of(pid):
    "The processes that a process has started and that have not been waited for"
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in lists for child in path.read_text().split()]


def is_worker(pid): return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()


# ---- in a process that something happens to --------------------------------------------------------------------------

def act(what, *about):
    "signal NAME; full BYTES: no file grows beyond so many; cut FILE BYTES; worker SECONDS: kill one, and wait"
    if what == "signal": os.kill(os.getpid(), getattr(signal, *about))
    if what == "cut": os.truncate(*about)
    if what == "full":
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (*about, hard))
    if what == "worker":
        os.kill(next(filter(is_worker, children_of(os.getpid()))), signal.SIGKILL)
        time.sleep(*about)  # PyTorch tells of it in the middle of anything


def watch(folder, pattern, times, *what):
    """Act when it happens so many times that something in a folder is about to be opened for writing, made, renamed,
    changed or removed, and "EVENT PATH" matches"""
    count = 0
    def hook(event, about):
        nonlocal count
        if event not in CHANGES and not (event == "open" and (about[2] or 0) & WRITES): return
        path = str(about[0])
        if not path.startswith(folder) or not re.search(pattern, f"{event} {path[len(folder):]}"): return
        count += 1
        if count == times: act(*what)
    sys.addaudithook(hook)


def wait_and_act(seconds, *what):
    "Act after so much processor time"
    while time.process_time() < seconds: time.sleep(0.0005)
    act(*what)


def name_of(error):
    "Code of an error: ours; of the system, its constant; of the parser, the option that it is about, or USAGE"
    if isinstance(error, OSError): return errno.errorcode[error.errno]
    if hasattr(error, "code"): return error.code
    option = error.param.opts[-1] if getattr(error, "param", None) else getattr(error, "option_name", None)
    return option if option and option.startswith("-") else "USAGE"


def noting(format_error, note):
    "The function that writes an error as a line; it notes the error's name, too"
    def format_and_note(error):
        note(name_of(error))
        return format_error(error)
    return format_and_note


def run(call, out, env, at, after):
    "The life of a process: call, and end with the status that this gives; 2 where it is refused, with a code"
    from radrotator.core import RadRotatorError
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(env)
    note = Path(f"{out}.code").write_text
    if at: watch(*at)
    if after: threading.Thread(target=wait_and_act, args=after, daemon=True).start()
    try:
        call = pickle.loads(call)
        console = sys.modules.get("radrotator.app.console")
        if console: console.format_error = noting(console.format_error, note)
        status = call()
    except RadRotatorError as error:
        note(error.code)
        status = 2
    except BaseException:
        traceback.print_exc()
        status = 1
    multiprocessing.util._run_finalizers()  # as at the end of any process: or semaphores are told of as leaked
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 0)


def serve():
    "Fork a process for every request; wait for one"
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "w")
    with contextlib.redirect_stdout(io.StringIO()): pickle.load(requests)()
    gc.freeze()  # or every process would copy all this as it looks for garbage
    while True:
        try: request = pickle.load(requests)
        except EOFError: return
        if isinstance(request, int): answer = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
        elif not (answer := os.fork()): run(**request)
        print(answer, file=answers, flush=True)


# ---- in the test -----------------------------------------------------------------------------------------------------

LATE = re.compile(r"[^\n]*resource_tracker: There appear to be (\d+) leaked semaphore objects[^\n]*\n[^\n]*\n"
                  r"((?:[^\n]*resource_tracker: '/mp-\w+': \[Errno 2\][^\n]*\n[^\n]*\n)+)")


def drop_late_notes(err):
    """What a process said, but for semaphores that it had removed and not yet struck off the list: `run` ends with
    `os._exit`, which waits for no thread that is about to. One that is still there counts as leaked"""
    return LATE.sub(lambda note: "" if note[2].count("[Errno 2]") == int(note[1]) else note[0], err)


@dataclass
class Ended:
    "What has become of a process"
    status: int       # negative: of a signal
    out: str
    err: str
    code: str | None  # of the refusal

    @property
    def went_well(self): return (self.status, drop_late_notes(self.err)) == (0, "")

    @property
    def was_killed(self): return self.status == -signal.SIGKILL


@dataclass(frozen=True)
class Running:
    pid: int
    out: str  # where its output goes, without endings


class Server:
    "Runs calls in processes of their own"
    def __init__(self, folder, first=None):
        self.folder, self.count, self.running = folder, 0, set()
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, env=os.environ | QUIET)
        self.send(first or partial(importlib.import_module, "radrotator.core"))

    def send(self, what):
        pickle.dump(what, self.process.stdin)
        self.process.stdin.flush()

    def ask(self, what):
        self.send(what)
        return int(self.process.stdout.readline())

    def start(self, call, env={}, at=None, after=None):
        "Begin a call (a function, or a `partial` of one); `at`: arguments of `watch`; `after`: of `wait_and_act`"
        self.count += 1
        out = str(self.folder/f"output{self.count}")
        pid = self.ask(dict(call=pickle.dumps(call), out=out, env=env, at=at, after=after))
        self.running.add(pid)
        return Running(pid, out)

    def end(self, process):
        "Wait for a process that was started"
        status = self.ask(process.pid)
        self.running.discard(process.pid)
        out, err = (Path(f"{process.out}.{name}").read_text() for name in ("out", "err"))
        code = Path(f"{process.out}.code")
        return Ended(status, out, err, code.read_text() if code.exists() else None)

    def __call__(self, call, **how): return self.end(self.start(call, **how))

    def kill(self, process):
        "Kill a process with its workers"
        os.killpg(process.pid, signal.SIGKILL)
        return self.end(process)

    def close(self):
        for pid in self.running: os.killpg(pid, signal.SIGKILL)
        self.process.communicate()


@contextlib.contextmanager
def serving(folder, first=None):
    "A server that has called `first`, whose module is imported for this"
    server = Server(folder, first)
    try: yield server
    finally: server.close()


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def ranks(count=2):
    "The environments of processes that torchrun would start together"
    common = dict(
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=free_port(),
    )
    return [common | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]


def wait_until(condition, seconds=60):
    "Wait for a condition"
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.005)


if __name__ == "__main__": serve()
