"""What the end-to-end tests share: a sealed place to run the real command in, and its results."""

import contextlib
import csv
import ctypes
import fcntl
import os
import pty
import random
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

from tests.forked import Forked, fits
from tests.xnat_standin import Standin

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "dicomUpload.py"
EXCLUSIONS = ROOT / "Exclusions.json"
WIDTH = 6  # tests at a time, where a module asks for it
# .ci/run plays what depends on no Python (modules with ONCE) on its first one only, variations on
# its first and its last one.
ELSEWHERE = os.environ.get("DICOMUPLOAD_TEST_ONCE") == "done"
FULL = os.environ.get("DICOMUPLOAD_TEST_ALL") == "1" and not ELSEWHERE
# Mutants meet them too, on a machine that need not have all the tools of a full run.
WHOLE = FULL or os.environ.get("DICOMUPLOAD_TEST_VARIATIONS") == "1"


class Ran(NamedTuple):
    """A run that has ended: exit status (negative for a signal), standard output, error output."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


def sealed_environment(home: Path, **more: str) -> Dict[str, str]:
    """An environment of our own: nothing from outside but the way to the programs."""
    environment = {
        "HOME": str(home),
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": "C.UTF-8",
        "TMPDIR": tempfile.gettempdir(),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TERM": "dumb",
    }
    if "PYENV_VERSION" in os.environ:
        environment["PYENV_VERSION"] = os.environ["PYENV_VERSION"]
    environment.update(more)
    return environment


def drop_root_rights() -> None:
    """In a child, before exec: let root be held by permission bits like anybody else."""
    if os.geteuid() == 0 and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def open_terminal(columns: int = 0) -> Tuple[int, int]:
    """Both ends of a terminal of this width."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return master, slave


def shown_on(master: int, last: bytes = b"\0") -> str:
    """What is shown on a terminal until its other end is closed, or this is shown last."""
    shown = b""
    with contextlib.suppress(OSError):  # closed, on Linux
        while not shown.endswith(last) and select.select([master], [], [], 20)[0]:
            shown += os.read(master, 1024) or last
    return shown.decode()


@contextlib.contextmanager
def alone(test: unittest.TestCase) -> Iterator[Any]:
    """A test outside of any suite: set up, and cleaned up after."""
    test.setUp()
    try:
        yield test
    finally:
        test.doCleanups()


def take_terminal() -> None:
    """In a child, before exec: let the terminal on standard input be its own."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def need(test: unittest.TestCase, tool: str) -> str:
    """The path of a program. Skips the test without it, or fails where everything must run."""
    found = shutil.which(tool)
    if not found:
        missing(test, f"{tool} is not installed")
    return str(found)


def missing(test: unittest.TestCase, reason: str) -> None:
    """Skip, or fail where DICOMUPLOAD_TEST_ALL=1 says that nothing may be skipped."""
    if os.environ.get("DICOMUPLOAD_TEST_ALL") == "1":
        test.fail(f"{reason}, and DICOMUPLOAD_TEST_ALL=1")
    test.skipTest(reason)


def variation(test: Any) -> Any:
    """A test of which others tell the promise, or go the same way through the program: it waits
    for a full run."""
    return unittest.skipUnless(WHOLE, "a variation: runs with DICOMUPLOAD_TEST_ALL=1")(test)


def cases(*given: Any, first: int = 1) -> Tuple[Any, ...]:
    """All of these in a full run; at hand the first, the others go the same way."""
    return given if WHOLE else given[:first]


def or_at_hand(table: Dict[str, Any], *names: str) -> Dict[str, Any]:
    """A table whole in a full run; at hand those of its rows that go ways of their own."""
    few = {name: table[name] for name in names}
    return table if WHOLE else few


class UploadTest(unittest.TestCase):
    """A test with a folder of its own, and the real command run in it."""

    longMessage = True
    maxDiff = None

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dicomUpload-test-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.home = self.folder / "home"
        self.home.mkdir()
        self.root = self.folder / "dicomdir"
        self.work = self.folder / "work"

    @contextlib.contextmanager
    def xnat(self, **knobs: Any) -> Iterator[Standin]:
        """A stand-in XNAT; at its end nothing may have been abused."""
        with Standin(**knobs) as server:
            yield server
            self.assertEqual(server.abuses, [])

    def arguments(self, url: str, *options: str, user: str = "alice", password: str = "s3cret",
                  project: str = "BRAIN", root: Optional[Path] = None) -> List[str]:
        """The command line of a run against `url`, with quick retries."""
        return [sys.executable, str(SCRIPT), url, user, password, project,
                str(root or self.root), "--workdir", str(self.work), *options]

    def altered(self, program: str, url: str, *options: str, **call: Any) -> List[str]:
        """The same with a Python program that changes something, and then runs main()."""
        python, _, *rest = self.arguments(url, *options, **call)
        return [python, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}", *rest]

    def start(self, arguments: List[str], environment: Optional[Dict[str, str]] = None,
              afresh: bool = False, **more: Any) -> "subprocess.Popen[str]":
        """Start the command and let it run; the test ends it. A run that /proc must show as a
        user's is started `afresh`."""
        given: Dict[str, Any] = {
            "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
            "cwd": str(self.folder), "env": sealed_environment(self.home, **(environment or {})),
            "universal_newlines": True, "errors": "surrogateescape", **more}
        quick = not afresh and fits(arguments, environment or {}, more)
        process = (Forked if quick else subprocess.Popen)(arguments, **given)

        def end() -> None:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.communicate()

        self.addCleanup(end)
        return process

    def run_command(self, arguments: List[str], environment: Optional[Dict[str, str]] = None,
                    timeout: float = 60, **more: Any) -> Ran:
        """Run the command to its end. No run may ever print a traceback."""
        process = self.start(arguments, environment, **more)
        out, err = process.communicate(timeout=timeout)
        ran = Ran(process.returncode, out or "", err or "")
        self.assertNotIn("Traceback", ran.text)
        return ran

    def upload(self, server: Standin, *options: str, environment: Optional[Dict[str, str]] = None,
               timeout: float = 60, preexec: Any = None, **call: Any) -> Ran:
        """Run an upload against the stand-in. `call` is for `arguments`."""
        return self.run_command(self.arguments(server.url, *options, **call), environment,
                                timeout, preexec_fn=preexec)

    def terminal(self, columns: int = 0) -> Tuple[int, int]:
        """Both ends of a terminal; the test closes the second."""
        master, slave = open_terminal(columns)
        self.addCleanup(os.close, master)
        return master, slave

    def report(self) -> List[Dict[str, str]]:
        """The rows of the newest report."""
        newest = max(self.work.glob("*.csv"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        with newest.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def log(self) -> str:
        """All logs in the workdir."""
        return "".join(path.read_text(encoding="utf-8") for path in sorted(self.work.glob("*.log")))

    def zips(self) -> List[Path]:
        """Zips and zip's temporary files that were left in the workdir."""
        return [path for path in self.work.rglob("*")
                if path.suffix == ".zip" or path.name.startswith("zi")]


# ---- Tests side by side ----------------------------------------------------------------------

class Kept:
    """A test result that keeps what it is told, to tell it to the real one later."""

    failfast = False
    shouldStop = False

    def __init__(self) -> None:
        self.told: List[Tuple[str, Tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not re.match("start|stop|add", name):
            raise AttributeError(name)
        return lambda *given: self.told.append((name, given))

    def bad(self) -> bool:
        return any(name in ("addFailure", "addError") or name == "addSubTest" and given[-1]
                   for name, given in self.told)

    def tell(self, result: unittest.TestResult) -> None:
        for name, given in self.told:
            if hasattr(result, name):
                getattr(result, name)(*given)


class SideBySide(unittest.TestSuite):
    """Tests that need nobody's company, several at a time, in a mixed order: those of one module
    often wait for the same. The slow ones come in its first half, or the end waits for one."""

    def run(self, result: unittest.TestResult, debug: bool = False) -> unittest.TestResult:
        tests = list(leaves(self))
        kept = [Kept() for _ in tests]

        def play(number: int) -> None:
            if not (result.failfast and any(each.bad() for each in kept)):
                tests[number].run(kept[number])

        with ThreadPoolExecutor(WIDTH) as pool:
            jobs = {}
            place = [random.Random(number).random() / (1 + is_slow(test))
                     for number, test in enumerate(tests)]
            for number in sorted(range(len(tests)), key=place.__getitem__):
                jobs[number] = pool.submit(play, number)
            for number in range(len(tests)):
                if result.shouldStop:
                    jobs[number].cancel()
                else:
                    jobs[number].result()
                    kept[number].tell(result)
        return result


class OneByOne(unittest.TestSuite):
    """A module whose tests are not for each other's company: beside others it goes as one test."""


def leaves(suite: Iterable[Any]) -> Iterator[Any]:
    """What goes side by side in a suite of suites: its tests, and whole modules."""
    for each in suite:
        if isinstance(each, unittest.TestSuite) and not isinstance(each, OneByOne):
            yield from leaves(each)
        else:
            yield each


def slow(test: Any) -> Any:
    """Mark a test that takes long."""
    test.slow = True
    return test


def is_slow(test: Any) -> bool:
    return isinstance(test, OneByOne) or hasattr(
        getattr(test, test.id().rpartition(".")[2], None), "slow")


def load_tests(_: Any, tests: unittest.TestSuite, __: Any) -> unittest.TestSuite:
    """unittest asks for the tests of this module."""
    return SideBySide([tests])


def load_all(loader: unittest.TestLoader) -> unittest.TestSuite:
    """All modules in one crowd, so that no core waits; last those that want to be ALONE."""
    crowd, last = [], []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        tests = loader.loadTestsFromName(f"tests.{path.stem}")
        module = sys.modules.get(f"tests.{path.stem}")
        if ELSEWHERE and getattr(module, "ONCE", False):
            continue
        if getattr(module, "ALONE", False) is True:
            last.append(tests)
        else:
            crowd.append(tests if isinstance(tests, SideBySide) else OneByOne([tests]))
    return unittest.TestSuite([SideBySide(crowd), *last])
