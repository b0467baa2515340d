"""How fast an upload is, side by side with what else could send the same files.

    python3 -m tests.benchmark            all conditions, about 40 minutes
    python3 -m tests.benchmark --quick    small trees, one round, under two minutes
    python3 -m tests.benchmark --only mr-free mr-100M --rounds 5 --peers
    python3 -m tests.benchmark --beside OLD.py    this version and another one, nothing else

The stand-in XNAT runs as a process of its own; the contenders take turns, round by round, each
through its command line, with a warm page cache. A time is from a process's start to its end.

    this      dicomUpload.py: zip, check, send, commit and verify; four uploads side by side; each
              part at the level that it chooses
    this -0   the same with --compression 0, and with 1: what auto is measured against
    1 by 1    the same with --procs 1
    original  what this program's forerunner did: one `zip -6` and one POST a session, one after
              another; nothing is committed and nothing is checked
    bound     `xargs -P` over `zip -1` (with -0: `zip -0`) and `curl`, at two and at four jobs: no
              plan, no check, no commit; lists of the files are made before the clock starts. What
              the machine can do.
    peers     with --peers: xnatctl 0.6.0 and xnat 0.8.1 from PyPI, a call for each session

"of -1" is the time of the bound with zip -1 divided by this one's, 1.00 being as fast: the better
of its two medians counts. "of -0" is the same with zip -0. "cpu" is what the contender's processes
used, the stand-in's own not counted.

The conditions start-... have no contenders: they show how long it takes until the first POST
starts, and what a rerun costs in which nothing has changed, beside `find -ls` on the same tree.
"""
import argparse
import contextlib
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from tests.dicom import dicom_file, uid, write_series
from tests.support import ROOT, SCRIPT, sealed_environment

PART = 500  # files; --max-files of dicomUpload.py
MB = 1e6
BOUNDS = ("bound 2", "bound 4", "bound 2 -0", "bound 4 -0")
LEVELS = ("this", "this -0", "this -1")
Tree = Callable[[Path, bool], None]  # makes it under a folder; True: a small one


# ---- Trees ---------------------------------------------------------------------------------

def real_images() -> Optional[Path]:
    """The series folders of Case001, 324 real MR files, if they are on this machine."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for folder in (os.environ.get("DICOMUPLOAD_TEST_DATA"),
                   os.path.join(cache, "dicomUpload-tests", "xnat-0.8.1")):
        if folder and (Path(folder) / "Case001" / "scans").is_dir():
            return Path(folder) / "Case001" / "scans"
    return None


def synthetic(root: Path, sessions: int, series: int, files: int, **more: Any) -> None:
    """So many sessions, series in each, and files in each series."""
    for session in range(1, sessions + 1):
        for number in range(1, series + 1):
            write_series(root / ("s%03d" % session) / "mr" / ("%02d_SERIES" % number), files=files,
                         study=uid("benchmark", session), number=number, **more)


def mr_tree(most: int) -> Tree:
    """Case001 as every session; synthetic images of that size where it is not at hand."""
    def make(root: Path, small: bool) -> None:
        sessions, real = max(1, most // 4) if small else most, real_images()
        if real is None:
            return synthetic(root, sessions, 10, 32, rows=256, columns=256)
        for session in range(1, sessions + 1):
            shutil.copytree(str(real), str(root / ("s%03d" % session) / "mr"))
        return None

    return make


def small_series(root: Path, small: bool) -> None:
    synthetic(root, 5 if small else 20, 20, 3, rows=64, columns=64)


def one_session(root: Path, small: bool) -> None:
    synthetic(root, 1, 40, 4 if small else 20, rows=256, columns=256)


def one_series(root: Path, small: bool) -> None:
    synthetic(root, 1, 1, 1200 if small else 5000, rows=128, columns=128)


def slow_sessions(root: Path, small: bool) -> None:
    synthetic(root, 8, 3 if small else 5, 4 if small else 12)


def slow_session(root: Path, small: bool) -> None:
    synthetic(root, 1, 40, 3 if small else 12)


def packed_pixels(root: Path, small: bool) -> None:
    """Pixels that no zip makes smaller, as those of JPEG 2000."""
    for session in range(1, (2 if small else 8) + 1):
        for number in range(1, 6):
            folder = root / ("s%03d" % session) / "mr" / ("%02d_SERIES" % number)
            folder.mkdir(parents=True)
            for instance in range(1, 11):
                (folder / ("IM%04d.dcm" % instance)).write_bytes(dicom_file(
                    study=uid("packed", session), series=uid("packed", session, number),
                    number=number, instance=instance, pixels=os.urandom(256 * 1024)))


# ---- Conditions ----------------------------------------------------------------------------

@dataclass(frozen=True)
class Condition:
    """A tree, a line and a server: one comparison."""
    name: str
    about: str
    tree: Tree
    rate: float = 0                   # bytes a second
    import_ms: float = 0              # a file
    contenders: Tuple[str, ...] = LEVELS + BOUNDS + ("original",)
    rounds: int = 3                   # at most
    drain: bool = True                # the server's own cost must not count
    memory: bool = False              # measure memory and disk too
    peers: bool = False


MR = "real MR" if real_images() else "synthetic MR"
CONDITIONS = (
    Condition("mr-free", MR + ", line unlimited", mr_tree(24), memory=True, peers=True),
    Condition("mr-1G", MR + ", 1 Gbit/s", mr_tree(8), 125e6),
    Condition("mr-100M", MR + ", 100 Mbit/s", mr_tree(8), 12.5e6, rounds=2, peers=True),
    Condition("mr-20M", MR + ", 20 Mbit/s", mr_tree(1), 2.5e6, rounds=1,
              contenders=LEVELS + ("bound 4", "original")),
    Condition("mr-5ms", MR + ", import 5 ms a file", mr_tree(8), import_ms=5, rounds=2,
              contenders=LEVELS + ("bound 4", "bound 4 -0", "1 by 1")),
    Condition("sessions-46ms", "8 sessions, import 46 ms a file", slow_sessions, import_ms=46,
              rounds=2, contenders=LEVELS + ("bound 4", "1 by 1"), drain=False),
    Condition("session-46ms", "one session of 40 series, import 46 ms a file", slow_session,
              import_ms=46, rounds=2, contenders=LEVELS + ("bound 4", "1 by 1"), drain=False),
    Condition("session-free", "one session of 40 series, line unlimited", one_session),
    Condition("small-free", "400 series of 3 small files, line unlimited", small_series),
    Condition("series-free", "one series of 5,000 files, line unlimited", one_series, memory=True),
    Condition("series-100M", "one series of 5,000 files, 100 Mbit/s", one_series, 12.5e6, rounds=2,
              contenders=LEVELS + ("bound 4", "bound 4 -0", "original")),
    Condition("packed-free", "already compressed pixels, line unlimited", packed_pixels),
    Condition("packed-1G", "already compressed pixels, 1 Gbit/s", packed_pixels, 125e6, rounds=2),
)
PLAN = "plan"  # these conditions are of another kind


@dataclass(frozen=True)
class Start:
    """A large tree: how soon something leaves, and what a rerun costs."""
    name: str
    about: str
    sessions: int
    series: int                       # in each session
    files: int                        # in each series
    open_ms: int = 0                  # added to each open of a file


STARTS = (
    Start("start-200k-1ms", "200,000 files, 1 ms added to each open", 200, 4, 250, 1),
    Start("start-session-1ms", "one session of 20,000 files, 1 ms added to each open", 1, 80, 250,
          1),
    Start("start-1M", "1,000,000 files", 500, 4, 500),
)


# ---- Contenders ----------------------------------------------------------------------------

IMPORT = ("/data/services/import?import-handler=DICOM-zip&overwrite=append"
          "&PROJECT_ID=BRAIN&SUBJECT_ID=$subject&EXPT_LABEL=$label")
ORIGINAL = r"""
cd "$ROOTDIR" || exit
for session in */*; do
    subject=${session%/*} label=${session%/*}_${session#*/}
    zip -q -6 -r "$WORK/$label.zip" "$PWD/$session"
    curl -sS -k -u "$LOGIN" -F "file=@$WORK/$label.zip" "$URL""" + IMPORT + r""""
done
"""
BOUND = r"""
xargs -0 -n 4 -P "$JOBS" sh -c '
    cd "$1" && subject=$2 label=$3
    zip -q "$LEVEL" -X -D "$4.zip" -@ <"$4.names" &&
    curl -sS -u "$LOGIN" -F "file=@$4.zip" "$URL""" + IMPORT + r"""" && rm "$4.zip"
' part <"$WORK/parts"
"""
XNATCTL = r"""
cd "$ROOTDIR" || exit
for session in */*; do
    "$VENV/bin/xnatctl" session upload --mode zip -P BRAIN -S "${session%/*}" \
        -E "${session%/*}_${session#*/}" "$session" || exit
done
"""
XNATPY = r"""
cd "$ROOTDIR" || exit
for session in */*; do
    "$VENV/bin/xnat" import experiment --host "$URL" --user alice --project BRAIN \
        --subject "${session%/*}" --experiment "${session%/*}_${session#*/}" "$session" || exit
done
"""
OTHER = "other"  # version of this program
PEERS = {"xnatctl": ("xnatctl==0.6.0", XNATCTL), "xnatpy": ("xnat==0.8.1", XNATPY)}


def write_parts(root: Path, work: Path) -> None:
    """What the bound sends: folder, subject, label and list of files of each part."""
    tasks: List[str] = []
    for number, folder in enumerate(sorted(root.glob("*/*/*"))):
        names = sorted("./" + path.relative_to(folder).as_posix()
                       for path in folder.rglob("*") if path.is_file())
        for start in range(0, len(names), PART):
            part = work / ("%04d_%05d" % (number, start))
            Path(str(part) + ".names").write_text("\n".join(names[start:start + PART]) + "\n")
            subject, session = folder.parts[-3:-1]
            tasks += [str(folder), subject, subject + "_" + session, str(part)]
    (work / "parts").write_text("\0".join(tasks) + "\0")


def command_of(contender: str, url: str, root: Path, work: Path,
               venvs: Dict[str, Path]) -> Tuple[List[str], Dict[str, str]]:
    """The contender's command line, and its part of the environment."""
    values = {"URL": url, "ROOTDIR": str(root), "WORK": str(work), "LOGIN": "alice:s3cret"}
    if contender == "original":
        return ["sh", "-c", ORIGINAL], values
    if contender.startswith("bound "):
        write_parts(root, work)
        jobs, level = contender.split()[1], "-0" if contender.endswith("-0") else "-1"
        return ["sh", "-c", BOUND], dict(values, JOBS=jobs, LEVEL=level)
    if contender in PEERS:
        values.update(VENV=str(venvs[contender]), XNAT_URL=url, XNAT_USER="alice",
                      XNAT_PASS="s3cret", XNATPY_PASS="s3cret")
        return ["sh", "-c", PEERS[contender][1]], values
    more = {"this": [], "1 by 1": ["--procs", "1"], "this -0": ["--compression", "0"],
            "this -1": ["--compression", "1"], OTHER: []}[contender]
    return [sys.executable, str(venvs.get(contender, SCRIPT)), url, "alice", "s3cret", "BRAIN",
            str(root), "--workdir", str(work), *more], {}


# ---- The server, and one run ---------------------------------------------------------------

class Server:
    """A stand-in as a process of its own."""

    def __init__(self, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.xnat_standin", *options], cwd=str(ROOT),
            stdout=subprocess.PIPE, universal_newlines=True)
        assert self.process.stdout
        self.url = self.process.stdout.readline().split()[-1]
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def tell(self, method: str, what: str) -> Any:
        """One of the stand-in's own routes."""
        request = urllib.request.Request(self.url + "/_standin/" + what, method=method)
        with self._open(request, timeout=60) as answer:
            return json.loads(answer.read().decode())

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.communicate()


@dataclass
class Usage:
    """What one process and all below it took, looked at every few milliseconds (Linux)."""
    own: int = 0                      # peak bytes of the first process
    tree: int = 0                     # peak bytes of all together; shared pages count each time
    disk: int = 0                     # peak bytes of zips in the workdir
    zips: int = 0                     # peak number of them

    def watch(self, pid: int, work: Path, over: threading.Event) -> None:
        """Look until it is over."""
        while not over.wait(0.01):
            with contextlib.suppress(OSError):
                status = Path("/proc/%d/status" % pid).read_text()
                high = [line.split()[1] for line in status.splitlines() if "VmHWM" in line]
                self.own = max([self.own] + [int(value) * 1024 for value in high])
            self.tree = max(self.tree, sum(map(resident, family(pid))))
            sizes = []
            for folder, _, names in os.walk(str(work / "dicomUpload.zips")):  # they come and go
                for name in names:
                    with contextlib.suppress(OSError):
                        sizes.append(os.stat(os.path.join(folder, name)).st_size)
            self.disk, self.zips = max(self.disk, sum(sizes)), max(self.zips, len(sizes))


def family(pid: int) -> List[int]:
    """A process and all below it."""
    found, at = [pid], 0
    while at < len(found):
        with contextlib.suppress(OSError):
            for task in os.listdir("/proc/%d/task" % found[at]):
                path = "/proc/%d/task/%s/children" % (found[at], task)
                found += map(int, Path(path).read_text().split())
        at += 1
    return found


def resident(pid: int) -> int:
    """Its resident memory in bytes."""
    try:
        pages = Path("/proc/%d/statm" % pid).read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Failed(Exception):
    """A contender did not do its work."""


@dataclass
class Ran:
    """One run: seconds, seconds of processor time, and what its memory was."""
    seconds: float
    cpu: float
    usage: Usage = field(default_factory=Usage)


def run(command: List[str], folder: Path, more: Dict[str, str], work: Path,
        watched: bool = False, wanted: int = 0) -> Ran:
    """Run it to its end. Raises Failed if that was another than was wanted."""
    usage, over = Usage(), threading.Event()
    with (folder / "output").open("w+", errors="replace") as output:
        started, before = time.monotonic(), os.times()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, cwd=str(folder),
                                   env=sealed_environment(folder, **more))
        thread = threading.Thread(target=usage.watch, args=(process.pid, work, over))
        if watched:
            thread.start()
        status = process.wait()
        seconds, after = time.monotonic() - started, os.times()
        over.set()
        if watched:
            thread.join()
        output.seek(0)
        last = " ".join(output.read().split()[-40:])
    if status != wanted:
        raise Failed("exit status %d: %s" % (status, last))
    return Ran(seconds, after[2] + after[3] - before[2] - before[3], usage)


def check_arrival(server: Server, files: int) -> Tuple[int, int, int]:
    """Raises Failed unless so many files came, once each; the requests, the POSTs of files and
    the bytes of these."""
    requests = server.tell("GET", "requests")
    posts = [each for each in requests if each["method"] == "POST" and each["entries"]]
    bad = [each["status"] for each in posts if each["status"] != 200]
    came = sum(len([name for name in each["entries"] if not name.endswith("/")]) for each in posts)
    if bad or came != files:
        raise Failed("%d of %d files came, %d refusals" % (came, files, len(bad)))
    return len(requests), len(posts), sum(each["body_bytes"] for each in posts)


@dataclass
class Result:
    """All runs of one contender under one condition."""
    contender: str
    seconds: List[float] = field(default_factory=list)
    cpu: List[float] = field(default_factory=list)
    requests: int = 0
    posts: int = 0
    sent: int = 0
    trouble: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def turn(contender: str, options: List[str], root: Path, files: int, scratch: Path,
         venvs: Dict[str, Path], watched: bool = False) -> Tuple[Ran, Tuple[int, int, int]]:
    """One run of one contender on a server and in a workdir of its own. Raises Failed."""
    # One server for all would run out of logins: a POST without a cookie opens another session.
    with fresh(scratch / "work") as work, Server(*options) as server:
        command, more = command_of(contender, server.url, root, work, venvs)
        ran = run(command, scratch, more, work, watched)
        return ran, check_arrival(server, files)


@contextlib.contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """An empty folder, removed afterwards."""
    shutil.rmtree(str(folder), ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(str(folder), ignore_errors=True)


def warm(root: Path) -> Tuple[int, int]:
    """Read the tree, so that it is in the page cache; its files and bytes."""
    sizes = [len(path.read_bytes()) for path in root.rglob("*") if path.is_file()]
    os.sync()
    return len(sizes), sum(sizes)


def compare(condition: Condition, rounds: int, small: bool, scratch: Path,
            venvs: Dict[str, Path]) -> Dict[str, Result]:
    """Let the contenders take turns; print and return how they did."""
    contenders = condition.contenders + (tuple(venvs) if condition.peers else ())
    if OTHER in venvs:
        contenders = "this", OTHER
    results = {name: Result(name) for name in contenders}
    options = ["--rate", str(condition.rate), "--seconds-per-file", str(condition.import_ms / 1000)]
    options += ["--drain"] if condition.drain else []
    with fresh(scratch / "tree") as root:
        condition.tree(root, small)
        files, size = warm(root)
        print("\n%s: %s\n  %d sessions, %d series, %d files, %.0f MB" % (
            condition.name, condition.about, len(list(root.glob("*/*"))),
            len(list(root.glob("*/*/*"))), files, size / MB), flush=True)
        for _ in range(min(rounds, condition.rounds)):
            for name, result in results.items():
                if not result.trouble:
                    try:
                        ran, (result.requests, result.posts, result.sent) = turn(
                            name, options, root, files, scratch, venvs)
                        result.seconds.append(ran.seconds)
                        result.cpu.append(ran.cpu)
                    except Failed as failed:
                        result.trouble = str(failed)
        show(results, size)
        if condition.memory and sys.platform == "linux":
            usage = turn("this", options, root, files, scratch, venvs, watched=True)[0].usage
            print("  memory of this: Python %.0f MB, all its processes %.0f MB; at most %d zips in "
                  "the workdir, %.1f MB" % (usage.own / MB, usage.tree / MB, usage.zips,
                                            usage.disk / MB))
    return results


def bound_of(results: Dict[str, Result], level: str) -> float:
    """The better median of the bound at this level, 0 if there is none."""
    return min((each.median for name, each in results.items() if name.startswith("bound")
                and name.endswith("-0") == (level == "-0") and each.seconds), default=0)


def of(bound: float, seconds: float) -> str:
    return "%.2f" % (bound / seconds) if bound else ""


def show(results: Dict[str, Result], size: int) -> None:
    """The table of one condition."""
    print("  %-10s %8s %15s %6s %7s %6s %6s %9s %6s %8s" % (
        "", "median", "range", "cpu", "MB/s", "of -1", "of -0", "requests", "POSTs", "MB sent"))
    for name, each in results.items():
        if each.seconds:
            print("  %-10s %6.2f s %6.2f - %6.2f %4.1f s %7.1f %6s %6s %9d %6d %8.1f" % (
                name, each.median, min(each.seconds), max(each.seconds),
                statistics.median(each.cpu), size / MB / each.median,
                of(bound_of(results, "-1"), each.median), of(bound_of(results, "-0"), each.median),
                each.requests, each.posts, each.sent / MB))
        if each.trouble:
            print("  %-10s left out: %s" % (name, each.trouble[:300]))
    sys.stdout.flush()


# ---- Large trees ---------------------------------------------------------------------------

SLOW_OPENS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
static void wait_for(const char *path) {
    const char *root = getenv("SLOW_ROOT"), *log = getenv("SLOW_LOG");
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    if (!root || !path || strncmp(path, "./", 2) && strncmp(path, root, strlen(root))) return;
    struct timespec wait = {0, 1000000L * atoi(getenv("SLOW_MS"))};
    int handle = real(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (handle >= 0) { if (write(handle, ".", 1)) {} close(handle); }
    if (wait.tv_nsec) nanosleep(&wait, 0);
}
#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { \
    va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }
#define OPEN(name) int name(const char *path, int flags, ...) { MODE \
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #name); \
    if (!(flags & O_DIRECTORY)) wait_for(path); \
    return real(path, flags, mode); }
#define OPENAT(name) int name(int folder, const char *path, int flags, ...) { MODE \
    int (*real)(int, const char *, int, ...) = dlsym(RTLD_NEXT, #name); \
    if (!(flags & O_DIRECTORY)) wait_for(path); \
    return real(folder, path, flags, mode); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)
"""


def build_shim(scratch: Path) -> Path:
    """A library that adds a wait to each open below SLOW_ROOT, and counts them. Raises Failed."""
    source, library = scratch / "slow.c", scratch / "slow.so"
    source.write_text(SLOW_OPENS)
    if not shutil.which("cc"):
        raise Failed("no cc")
    done = subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(source),
                           "-ldl"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise Failed("cc: %s" % done.stdout.decode(errors="replace")[-200:])
    return library


def make_large(root: Path, sessions: int, series: int, files: int) -> int:
    """So many tiny images, quickly: of each series one is made, the others get their UIDs."""
    mark = b"9" * 12
    for session in range(sessions):
        study = "1.2.%d" % (10 ** 8 + session)
        for number in range(series):
            folder = "%s/s%04d/mr/%02d_SERIES" % (root, session, number)
            os.makedirs(folder)
            content = dicom_file(study=study, series="%s.%d" % (study, number), number=number + 1,
                                 sop_instance="%s.%d." % (study, number) + mark.decode(), rows=1,
                                 columns=1)
            for file in range(files):
                handle = os.open("%s/IM%05d.dcm" % (folder, file), os.O_CREAT | os.O_WRONLY)
                os.write(handle, content.replace(mark, b"1%011d" % file))
                os.close(handle)
    return sessions * series * files


def start(condition: Start, small: bool, scratch: Path) -> None:
    """One full run and a rerun, with every open counted."""
    sessions = max(1, condition.sessions // 50) if small else condition.sessions
    series = min(10, condition.series) if small else condition.series
    roomy = Path("/dev/shm") if os.path.isdir("/dev/shm") and shutil.disk_usage(
        "/dev/shm").free > 8e9 else scratch  # a million inodes
    print("\n%s: %s" % (condition.name, condition.about))
    with fresh(roomy / ("dicomUpload-benchmark-%d" % os.getpid())) as root, fresh(
            scratch / "work") as work, Server("--drain") as xnat:
        try:
            shim = build_shim(scratch)
            files = make_large(root, sessions, series, condition.files)
            log = scratch / "opens"
            slow = {"LD_PRELOAD": str(shim), "SLOW_ROOT": str(root), "SLOW_LOG": str(log),
                    "SLOW_MS": str(condition.open_ms)}
            call = [sys.executable, str(SCRIPT), xnat.url, "alice", "s3cret", "BRAIN", str(root),
                    "--workdir", str(work)]
            finds = [run(["sh", "-c", 'find "$0" -ls >/dev/null', str(root)], scratch, {}, work)
                     for _ in range(3)]
            find = min(finds, key=lambda ran: ran.seconds)
            print("  %d sessions, %d files; find -ls: %.1f s (cpu %.1f s)" % (
                sessions, files, find.seconds, find.cpu), flush=True)
            began = time.monotonic()
            ran = run(call, scratch, slow, work, watched=sys.platform == "linux")
            posts = [each for each in xnat.tell("GET", "requests")
                     if each["method"] == "POST" and each["entries"]]
            first = min(each["started"] for each in posts) - began
            check_arrival(xnat, files)
            print("  first POST after %.1f s (goal: 5), all there after %.0f s; %d opens, Python "
                  "%.0f MB" % (first, ran.seconds, log.stat().st_size, ran.usage.own / MB))
            log.write_bytes(b"")
            reruns = [run(call, scratch, slow, work) for _ in range(2)]
            again = min(reruns, key=lambda ran: ran.seconds)
            print("  run again: %.1f s (cpu %.1f s), %.2f of find -ls by the clock, %.2f by cpu "
                  "(goal: 2); %d opens" % (again.seconds, again.cpu, again.seconds / find.seconds,
                                           again.cpu / find.cpu, log.stat().st_size), flush=True)
        except Failed as failed:
            print("  left out: " + str(failed)[:300], flush=True)


def plan_many(small: bool, scratch: Path) -> None:
    """Look at 10,000 sessions of ten series in a dry run, then send and find again some of them."""
    sessions = 300 if small else 10000
    contents = [dicom_file(study="1.2", series="1.2.%d" % number, number=number, rows=1,
                           columns=1) for number in range(10)]
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(fresh(scratch / "tree"))
        work = stack.enter_context(fresh(scratch / "work"))
        xnat = stack.enter_context(Server("--drain"))
        for number in range(sessions * 10):
            folder = (root / ("s%04d" % (number // 50)) / ("mr%d" % (number // 10 % 5))
                      / ("%02d_SERIES" % (number % 10)))
            folder.mkdir(parents=True)
            (folder / "IM0001.dcm").write_bytes(contents[number % 10])
        call = [sys.executable, str(SCRIPT), xnat.url, "alice", "s3cret", "BRAIN", str(root),
                "--workdir", str(work)]
        print("\nplan: %d sessions, %d series of one tiny file" % (sessions, sessions * 10))
        try:
            timed("looked at (--dry-run)", call + ["--dry-run"], scratch, work, status=1)
            some = call + ["--only", "s000*"]
            timed("500 of the series sent", some, scratch, work)
            timed("run again, all there", some, scratch, work)
            posts = [each for each in xnat.tell("GET", "requests") if "import" in each["path"]]
            print("  %d POSTs of files" % len(posts))
        except Failed as failed:
            print("  failed: " + str(failed)[:300])


def timed(text: str, command: List[str], scratch: Path, work: Path, status: int = 0) -> None:
    """Run it, and tell its time and memory."""
    ran = run(command, scratch, {}, work, sys.platform == "linux", status)
    memory = ", Python %.0f MB" % (ran.usage.own / MB) if ran.usage.own else ""
    print("  %-26s %6.1f s%s" % (text, ran.seconds, memory), flush=True)


# ---- Peers ---------------------------------------------------------------------------------

def install_peers(scratch: Path) -> Dict[str, Path]:
    """A virtual environment for each peer that can be installed."""
    venvs: Dict[str, Path] = {}
    for name, (package, _) in PEERS.items():
        venv = scratch / name
        for command in ([sys.executable, "-m", "venv", str(venv)],
                        [str(venv / "bin" / "pip"), "install", "-q", package]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  universal_newlines=True)
            if done.returncode:
                print("%s left out: %s" % (name, " ".join(done.stdout.split())[-200:]))
                break
        else:
            venvs[name] = venv
    return venvs


# ---- The end -------------------------------------------------------------------------------

def facts() -> str:
    """The machine, the programs and the time."""
    def first(pattern: str, *command: str) -> str:
        try:
            text = subprocess.run(command, stdout=subprocess.PIPE, universal_newlines=True).stdout
        except OSError:
            return "none"
        return next((line.strip() for line in text.splitlines() if pattern in line), "unknown")

    model = "unknown processor"
    with contextlib.suppress(OSError):
        model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo")
                      if line.startswith("model name")), model)
    load = "%.1f" % os.getloadavg()[0]
    return "\n".join((
        time.strftime("%Y-%m-%d %H:%M %Z") + ", load %s before the start" % load,
        "%s, %s cores, %s" % (platform.platform(), os.cpu_count(), model),
        "Python %s; %s; %s" % (platform.python_version(), first("Zip ", "zip", "-v"),
                               first("curl", "curl", "--version").split(" lib")[0])))


def summary(all_results: Dict[str, Dict[str, Result]]) -> None:
    """One line for each condition, then the bars."""
    print("\n%-14s %8s %9s %9s %6s %6s %9s %10s %9s %8s" % (
        "condition", "this", "bound -1", "bound -0", "of -1", "of -0", "of levels", "x original",
        "x 1 by 1", "x other"))
    for name, results in all_results.items():
        if results["this"].seconds:
            this = results["this"].median

            def times(other: str, this: float = this,
                      results: Dict[str, Result] = results) -> str:
                seconds = results[other].seconds if other in results else []
                return "%.2f" % (statistics.median(seconds) / this) if seconds else ""

            bounds = [bound_of(results, level) for level in ("-1", "-0")]
            better = min((each.median for each in (results.get("this -0"), results.get("this -1"))
                          if each and each.seconds), default=0)
            print("%-14s %6.2f s %9s %9s %6s %6s %9s %10s %9s %8s" % (
                name, this, *("%.2f s" % each if each else "" for each in bounds),
                *(of(each, this) for each in bounds), of(better, this), times("original"),
                times("1 by 1"), times(OTHER)))
    for name, results in all_results.items():
        print("\n" + name)
        longest = max([each.median for each in results.values() if each.seconds] or [1])
        for contender, each in results.items():
            if each.seconds:
                print("  %-10s %s %.1f s" % (contender, "#" * max(1, round(
                    50 * each.median / longest)), each.median))


def main(argv: Optional[List[str]] = None) -> int:
    names = [each.name for each in CONDITIONS + STARTS] + [PLAN]
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.benchmark", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small trees, one round")
    parser.add_argument("--rounds", type=int, default=3, help="at most (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CONDITION",
                        help=", ".join(names))
    parser.add_argument("--peers", action="store_true", help="install and run PyPI's peers too")
    parser.add_argument("--beside", metavar="FILE", type=Path,
                        help="only this version and another one of dicomUpload.py")
    options = parser.parse_args(argv)
    rounds = 1 if options.quick else options.rounds
    started = time.monotonic()
    print("python3 -m tests.benchmark " + shlex.join(sys.argv[1:] if argv is None else argv))
    print(facts(), flush=True)
    scratch = Path(tempfile.mkdtemp(prefix="dicomUpload-benchmark-"))
    try:
        venvs = install_peers(scratch) if options.peers else {}
        venvs.update({OTHER: options.beside.resolve()} if options.beside else {})
        results = {each.name: compare(each, rounds, options.quick, scratch, venvs)
                   for each in CONDITIONS if each.name in options.only}
        for each in STARTS:
            if each.name in options.only:
                start(each, options.quick, scratch)
        if PLAN in options.only:
            plan_many(options.quick, scratch)
        summary(results)
    finally:
        shutil.rmtree(str(scratch), ignore_errors=True)
    print("\n%.0f s in all" % (time.monotonic() - started))
    return 1 if any(each.trouble for found in results.values() for name, each in found.items()
                    if name not in PEERS) else 0


if __name__ == "__main__":
    sys.exit(main())
