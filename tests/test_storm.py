"""A storm of faults, drawn from a seed: the same command, run again, ends with all of it there.

Twenty sessions, some with copies of their files; the server is of any version, refuses, hangs up,
queues, forgets sessions, lands imports late and answers too late; the uploader is stopped and
killed, at moments that the server's own events decide; folders grow meanwhile, workdirs are lost,
and another machine sends a part of it. A person deletes in the prearchive what the uploader asks
to have deleted, and nothing else. In the end nothing is lost, archived by halves or there twice,
and no run has said what was not so.

The seeds are those in DICOMUPLOAD_TEST_SEED, or three with DICOMUPLOAD_TEST_ALL=1; else none, to
keep the suite short. `python3 -m tests.test_storm SEEDS FIRST` plays so many, from the first on,
and says what happened.
"""

import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
import unittest
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Set, Tuple

from tests.dicom import dicom_file, uid
from tests.running import RunningTest as _RunningTest
from tests.support import Ran, alone
from tests.support import load_tests as load_tests  # seeds go side by side
from tests.xnat_standin import BUSY, CONCURRENT, Fault, Row, Standin

ONCE = True  # the Python that it runs on makes no difference

SESSIONS = 20
FAULTS = 36
LATEST = 5.0    # seconds after which an import may still land
RUNS = 16       # by then it must have ended with 0
SEEDS = 4, 14, 15    # 14 and 15 have found a commit taken for lost while it went on
STOPS = (signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL, 0, 0)
VERSIONS = ("1.7.6", "1.8.6", "1.8.8", "1.8.11", "1.9.3", "1.10.1", "1.10.2", "1.11.0")

# What may happen to a request; the arguments are drawn.
Draw = Callable[[random.Random], Dict[str, Any]]


def busy(draw: random.Random) -> Dict[str, Any]:
    return {"status": draw.choice((408, 429, 502, 503, 504))}


def heals(draw: random.Random) -> Dict[str, Any]:
    return {"status": draw.choice((400, 409, 423, 500)), "text": draw.choice((CONCURRENT, *BUSY))}


def refused(draw: random.Random) -> Dict[str, Any]:
    return {"status": draw.choice((400, 403, 500)), "text": "not today"}


def cut(draw: random.Random) -> Dict[str, Any]:
    return {"after_bytes": draw.randrange(4000)}


def late(draw: random.Random) -> Dict[str, Any]:
    return {"after_bytes": draw.choice((0, draw.randrange(4000))),
            "seconds": draw.uniform(0.5, LATEST)}


def shortly(draw: random.Random) -> Dict[str, Any]:
    return {"seconds": draw.uniform(0.1, 1.0)}


def nothing(_: random.Random) -> Dict[str, Any]:
    return {}


AT_IMPORT: Tuple[Tuple[str, Draw], ...] = (
    ("status", busy), ("early status", busy), ("late status", busy), ("error page", heals),
    ("error page", refused), ("background", nothing), ("reset before", nothing),
    ("reset during", cut), ("reset after", nothing), ("close", nothing), ("close after", nothing),
    ("stall before", shortly), ("stall", shortly), ("truncate", nothing), ("empty", nothing),
    ("late landing", late), ("late landing", late),
    ("disk full", lambda draw: {"entry": draw.choice((1, 2))}), ("drop sessions", nothing))
AT_COMMIT: Tuple[Tuple[str, Draw], ...] = (
    ("status", busy), ("late status", busy), ("background", nothing), ("reset before", nothing),
    ("reset after", nothing), ("close", nothing), ("close after", nothing), ("stall", shortly),
    ("truncate", nothing), ("drop sessions", nothing), ("queued", shortly), ("queued", shortly),
    ("error page", heals), ("error page", refused),
    ("error page", lambda _: {"status": 409, "text": "session document locked"}))
AT_QUESTIONS: Tuple[Tuple[str, Draw], ...] = (
    ("status", busy), ("reset before", nothing), ("close", nothing), ("truncate", nothing),
    ("drop sessions", nothing), ("stall", shortly))


class Turn(NamedTuple):
    """What happens before and during one run."""

    signal: int            # 0: it is not stopped
    commits: bool          # count commits, not imports
    count: int             # so many, and the signal comes
    pause: float           # and a little later, as chance has it
    loses_workdir: bool
    elsewhere: bool        # another machine runs it, with a workdir of its own
    grows: Tuple[str, ...]  # sessions that grow before
    grows_meanwhile: Tuple[str, ...]  # and during the run, after as many requests


class Schedule:
    """All that will happen, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        draw = self.draw = random.Random(seed)
        self.labels = [f"{number:03}_{draw.choice(('pre', 'post'))}" for number in
                       range(1, SESSIONS + 1)]
        self.series = {label: draw.choice((1, 1, 2, 3)) for label in self.labels}
        self.copies = {label: draw.choice(("", "", "", "file", "series")) for label in self.labels}
        self.knobs: Dict[str, Any] = {
            "version": draw.choice(VERSIONS), "archive_seconds": draw.choice((0.02, 0.1, 0.3)),
            "statistics": draw.choice(("stored", "stored", "on request", "never")),
            "site_script": draw.choice(((), (), (), ("sizes",), ("uids",))),
            "queue_seconds": draw.choice((0, 0, 0.2))}
        if self.knobs["version"] in ("1.7.6", "1.8.6"):
            # They take a file that is sent again, and whose UID a script has changed, for another.
            self.knobs["site_script"] = ()
        # Only the ledger knows what a script has changed: it must not be lost then.
        self.known = "uids" not in self.knobs["site_script"]
        self.faults = [self._fault(draw) for _ in range(FAULTS)]
        # A dead line: the import is done, and then nothing for longer than --timeout.
        self.faults.append(Fault("stall", self._import(draw), seconds=60))
        stops = list(STOPS)
        draw.shuffle(stops)
        self.turns = [self._turn(draw, number) for number in stops]
        self.max_files = draw.choice((1, 2, 500))
        self.procs = draw.choice((1, 4, 4))

    def _turn(self, draw: random.Random, number: int) -> Turn:
        def some() -> Tuple[str, ...]:
            return tuple(draw.sample(self.labels, draw.choice((0, 0, 1, 3)))) * self.known

        return Turn(number, draw.random() < 0.4, draw.randrange(1, 12),
                    draw.choice((0.0, draw.uniform(0, 0.05))), self.known and draw.random() < 0.25,
                    self.known and draw.random() < 0.25, some(), some())

    def _import(self, draw: random.Random) -> str:
        return f"POST /data/services/import.*EXPT_LABEL={draw.choice(self.labels)}"

    def _fault(self, draw: random.Random) -> Fault:
        place = draw.random()
        if place < 0.6:
            kinds, where = AT_IMPORT, self._import(draw)
        elif place < 0.85:
            kinds, where = AT_COMMIT, f"/{draw.choice(self.labels)}.action=commit"
        else:
            kinds, where = AT_QUESTIONS, f"GET .*/{draw.choice(self.labels)}"
        kind, arguments = draw.choice(kinds)
        return Fault(kind, where, times=draw.choice((1, 1, 2)), **arguments(draw))


class AStorm(_RunningTest):

    def weather(self, seed: int) -> str:
        """Play one seed; what happened, in a line."""
        schedule, begun = Schedule(seed), time.monotonic()
        self.images: Dict[str, Dict[str, Set[str]]] = {}  # by session and series folder: UIDs
        self.sizes: Dict[str, Set[int]] = defaultdict(set)  # what each session ever had
        for label, count in schedule.series.items():
            self.images[label] = defaultdict(set)
            for number in range(1, count + 1):
                for instance in (1, 2):
                    self.add(label, number, instance)
            self.copy(label, schedule.copies[label])
            self.sizes[label].add(self.wanted(label))
        with self.xnat(faults=schedule.faults, **schedule.knobs) as server:
            halves = self.watch_archive(server)
            ends: List[int] = []
            turns = list(schedule.turns)
            self.deleted = 0
            while turns or ends[-1:] != [0]:
                turn = turns.pop(0) if turns else None
                ran = self.one_run(server, schedule, turn)
                ends.append(ran.status)
                self.assertIn(ran.status, (0, 1, 3, 130, 143, -9), ran.text)
                self.assert_true(server, ran, schedule)
                self.assertTrue(len(ends) < RUNS or not ran.status, f"no end: {ends}\n{ran.text}")
                self.be_the_person(server, ran)
            self.rest(server)
            self.at_the_end(server, schedule, halves)
            met = Counter(each.fault for each in server.requests if each.fault)
            return (f"seed {seed}: XNAT {schedule.knobs['version']} "
                    f"{schedule.knobs['site_script'] or ''}, runs ended {ends}, "
                    f"{len(server.imports())} imports of {sum(schedule.series.values())} series, "
                    f"{sum(met.values())} faults of {len(met)} kinds, {self.deleted} deleted, "
                    f"{time.monotonic() - begun:.0f} s")

    # -- the tree

    def add(self, label: str, number: int, instance: int) -> None:
        """One image more."""
        folder = self.root / label.replace("_", "/") / f"S_{number:04}"
        folder.mkdir(parents=True, exist_ok=True)
        series = uid(label, number)
        part = folder / f"IM{instance:04}.dcm"
        part.write_bytes(dicom_file(study=uid(label), series=series, number=number, rows=4,
                                    instance=instance, patient=label[:3], columns=4))
        self.images[label][folder.name].add(uid(series, instance))

    def copy(self, label: str, kind: str) -> None:
        """A file stands twice, or a whole series."""
        folder = self.root / label.replace("_", "/") / "S_0001"
        if kind == "file":
            shutil.copy(str(folder / "IM0001.dcm"), str(folder / "copy of IM0001.dcm"))
        elif kind == "series":
            shutil.copytree(str(folder), str(folder.with_name("S_0001 again")))

    def grow(self, label: str) -> None:
        """One more image in the first series, or a new series."""
        if label.endswith("post"):
            self.add(label, 1, 10 + len(self.images[label]["S_0001"]))
        else:
            self.add(label, 10 + len(self.images[label]), 1)
        self.sizes[label].add(self.wanted(label))

    def wanted(self, label: str) -> int:
        return sum(map(len, self.images[label].values()))

    # -- one run

    def one_run(self, server: Standin, schedule: Schedule, turn: Optional[Turn]) -> Ran:
        """The command once, stopped in the middle if it is to be."""
        work = self.work
        if turn and turn.loses_workdir:
            shutil.rmtree(str(self.work), ignore_errors=True)
        for label in turn.grows if turn else ():
            self.grow(label)
        self.work = self.folder / "another machine's" if turn and turn.elsewhere else work
        before = len(server.imports()), len(server.commits())
        process = self.start(self.arguments(
            server.url, "--retries", "2", "--timeout", "1", "--max-files",
            str(schedule.max_files), "--procs", str(schedule.procs)))

        def due() -> bool:
            done = (len(server.commits()) - before[1] if turn.commits else
                    len(server.imports()) - before[0])
            return done >= turn.count

        if turn and self.wait_while_alive(server, process, due):
            time.sleep(turn.pause)
            for label in turn.grows_meanwhile:
                self.grow(label)
            if turn.signal:
                process.send_signal(turn.signal)
        ran = self.ended(process, 300)
        self.assert_alone()
        server.forget_clients()  # what was killed may go on there, and the next run cannot know
        if ran.status >= 0:
            self.tidy(ran)
            self.rows = self.report() if "Report:" in ran.out else []
        else:
            self.rows = []
        self.work = work
        return ran

    @staticmethod
    def wait_while_alive(server: Standin, process: Any, due: Callable[[], bool]) -> bool:
        """Wait for the moment, unless the run ends before."""
        while not server.wait_for(due, 0.2):
            if process.poll() is not None:
                return False
        return True

    def be_the_person(self, server: Standin, ran: Ran) -> None:
        """Delete in the prearchive what the uploader asks to have deleted there."""
        labels = {row["label"] for row in self.rows
                  if re.search("delete .*prearchive", row["message"])}
        named = set(re.findall(r"(/prearchive/\S+) \(\w+\): lies in the prearchive beside",
                               ran.err))
        for row in server.prearchive:
            if row.name in labels or row.uri in named:
                with server.changed:
                    if row.uri in named:  # a copy, it said
                        self.assert_copy(server, row)
                    server.store.remove(row)
                    self.deleted += 1

    def assert_copy(self, server: Standin, row: Row) -> None:
        """What is said to be a copy of something archived has nothing that is not there."""
        session = server.store.archive[row.project, row.name]
        has = {file.sop_instance for file in session.files}
        more = {file.sop_instance for file in row.files.values()} - has
        self.assertEqual(more, set(), f"{row.name}: no copy")

    # -- what must be so

    def watch_archive(self, server: Standin) -> List[str]:
        """A list that names each session which ever stands in the archive in part."""
        halves: List[str] = []
        move = server.store._move

        def watched(row: Any, overwrite: bool) -> Any:
            session = move(row, overwrite)
            if len(session.files) not in self.sizes[row.name]:
                halves.append(f"{row.name}: {len(session.files)} files of {self.sizes[row.name]}")
            return session

        server.store._move = watched  # type: ignore[assignment]
        return halves

    def assert_true(self, server: Standin, ran: Ran, schedule: Schedule) -> None:
        """What a run says is there is there."""
        for label, files in re.findall(r"(?m)^(\w+) +(?:archived|already there), (\d+) files?",
                                       ran.out):
            self.assertIn(("BRAIN", label), server.archive, ran.text)
            self.assertGreaterEqual(len(server.archive["BRAIN", label].files), int(files), ran.text)
            self.assertIn(int(files), self.sizes[label], ran.text)
        for row in self.rows if schedule.known else ():
            if row["status"] in ("sent", "already there"):
                has = set(server.instances(row["label"]))
                missing = self.images[row["label"]][row["series"]] - has
                # What came while it ran is not said to be there.
                self.assertLessEqual(len(missing), len(self.sizes[row["label"]]) - 1,
                                     f"{row}\n{ran.text}")
        if ran.status == 0:
            for label in self.images:
                self.assertIn(("BRAIN", label), server.archive, ran.text)

    def rest(self, server: Standin) -> None:
        """Imports that land late have landed."""
        server.wait_for(lambda: all(each.answered or "stall" in each.fault
                                    for each in server.requests), 10)
        time.sleep(LATEST if any(each.fault == "late landing" for each in server.requests) else 0)

    def at_the_end(self, server: Standin, schedule: Schedule, halves: List[str]) -> None:
        """All is there, once; nothing is left to be done."""
        server.faults.clear()
        for _ in range(3):  # a late import lies beside its session: a run says so
            ran = self.one_run(server, schedule, None)
            self.assertEqual(ran.status, 0, ran.text)
            self.be_the_person(server, ran)
        posts = len(server.imports()), len(server.commits())
        ran = self.one_run(server, schedule, None)
        self.assertEqual((len(server.imports()), len(server.commits())), posts, ran.text)
        self.assertEqual([row.uri for row in server.prearchive], [])
        self.assertEqual(halves, [], "archived by halves")
        for label, series in self.images.items():
            there = server.instances(label)
            self.assertEqual(sum(there.values()), self.wanted(label), label)
            self.assertEqual(set(there.values()), {1}, f"{label} is there twice")
            if schedule.known:
                self.assertEqual(set(there), set().union(*series.values()), label)
        self.assert_alone()


def seeds() -> List[int]:
    """The seeds to play."""
    given = os.environ.get("DICOMUPLOAD_TEST_SEED", "")
    if given:
        return [int(seed) for seed in re.findall(r"\d+", given)]
    return list(SEEDS if os.environ.get("DICOMUPLOAD_TEST_ALL") == "1" else ())


def as_test(seed: int) -> Callable[[AStorm], None]:
    def test(self: AStorm) -> None:
        try:
            self.weather(seed)
        except BaseException:
            print(f"\nThe storm of seed {seed} was lost: python3 -m tests.test_storm 1 {seed}",
                  file=sys.stderr, flush=True)
            raise

    return test


for _seed in seeds():
    setattr(AStorm, f"test_all_of_it_arrives_once_whatever_happens_seed_{_seed}", as_test(_seed))


def main(count: int, first: int) -> int:
    """Play so many seeds, one after another; how many were lost."""
    lost = 0
    for seed in range(first, first + count):
        try:
            with alone(AStorm()) as storm:
                print(storm.weather(seed), flush=True)
        except Exception as error:
            lost += 1
            where = traceback.extract_tb(error.__traceback__)
            at = ", ".join(f"{each.name} {each.lineno}" for each in where
                           if Path(each.filename).name == "test_storm.py")
            print(f"seed {seed} LOST at {at}: {error}", flush=True)
    return lost


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(min(1, main(int(sys.argv[1]), int((sys.argv + ["1"])[2]))))
    unittest.main()
