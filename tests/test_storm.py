"""A storm of faults, drawn from a seed: the same command, run again, ends with all of it there.

Forty sessions; the server refuses, hangs up, forgets sessions and answers too late; the uploader
is stopped and killed, at moments that the server's own events decide. The seeds are those in
DICOMUPLOAD_TEST_SEED, or three with DICOMUPLOAD_TEST_ALL=1; else none, to keep the suite short.
`python3 -m tests.test_storm SEED...` plays chosen ones and says what happened.
"""

import os
import random
import re
import signal
import sys
import time
import unittest
from collections import Counter
from typing import Any, Callable, Dict, List, NamedTuple, Set, Tuple

from tests.dicom import uid, write_series
from tests.support import Ran, alone
from tests.support import load_tests as load_tests  # seeds go side by side
from tests.test_fault_table import HEALING
from tests.test_signals_and_disk import RunningTest as _RunningTest
from tests.xnat_standin import Fault, Standin

ONCE = True  # the Python that it runs on makes no difference

SESSIONS = 40
FAULTS = 30
RUNS = 12       # by then it must have ended with 0
SEEDS = 4, 14, 15    # 14 and 15 have found a commit taken for lost while it went on
STOPS = (signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL)

# What may happen to a request; the arguments are drawn.
Draw = Callable[[random.Random], Dict[str, Any]]


def busy(draw: random.Random) -> Dict[str, Any]:
    return {"status": draw.choice((408, 429, 502, 503, 504))}


def heals(draw: random.Random) -> Dict[str, Any]:
    return {"status": 400, "text": draw.choice(HEALING)}


def refused(draw: random.Random) -> Dict[str, Any]:
    return {"status": draw.choice((400, 403, 500)), "text": "not today"}


def cut(draw: random.Random) -> Dict[str, Any]:
    return {"after_bytes": draw.randrange(4000)}


def shortly(draw: random.Random) -> Dict[str, Any]:
    return {"seconds": draw.uniform(0.1, 1.0)}


def nothing(_: random.Random) -> Dict[str, Any]:
    return {}


AT_IMPORT: Tuple[Tuple[str, Draw], ...] = (
    ("status", busy), ("early status", busy), ("late status", busy), ("error page", heals),
    ("error page", refused), ("background", nothing), ("reset before", nothing),
    ("reset during", cut), ("reset after", nothing), ("close", nothing), ("close after", nothing),
    ("stall before", shortly), ("stall", shortly), ("truncate", nothing), ("empty", nothing),
    ("disk full", lambda draw: {"entry": draw.choice((1, 2))}), ("drop sessions", nothing))
AT_COMMIT: Tuple[Tuple[str, Draw], ...] = (
    ("status", busy), ("late status", busy), ("background", nothing), ("reset before", nothing),
    ("reset after", nothing), ("close", nothing), ("close after", nothing), ("stall", shortly),
    ("truncate", nothing), ("drop sessions", nothing),
    ("error page", lambda _: {"status": 409, "text": "session document locked"}))
AT_QUESTIONS: Tuple[Tuple[str, Draw], ...] = (
    ("status", busy), ("reset before", nothing), ("close", nothing), ("truncate", nothing),
    ("drop sessions", nothing), ("stall", shortly))


class Stop(NamedTuple):
    """End the uploader with `signal` when it has begun so many more requests of one kind."""

    signal: int
    commits: bool       # count commits, not imports
    count: int
    pause: float        # and a little later, as chance has it


class Schedule:
    """All that will happen, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.labels = [f"{number:03}_{draw.choice(('pre', 'post'))}" for number in
                       range(1, SESSIONS + 1)]
        self.series = {label: draw.choice((1, 1, 2, 3)) for label in self.labels}
        self.faults = [self._fault(draw) for _ in range(FAULTS)]
        # A dead line: the import is done, and then nothing for longer than --timeout.
        self.faults.append(Fault("stall", self._import(draw), seconds=60))
        self.stops = [Stop(number, draw.random() < 0.4, draw.randrange(1, 12),
                           draw.choice((0.0, draw.uniform(0, 0.05)))) for number in STOPS]
        draw.shuffle(self.stops)
        self.archive_seconds = draw.choice((0.02, 0.1, 0.3))

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
        for label, count in schedule.series.items():
            subject, session = label.split("_")
            for number in range(1, count + 1):
                write_series(self.root / subject / session / f"S_{number:04}", number=number,
                             study=uid(subject, session), files=2, patient=subject)
        with self.xnat(archive_seconds=schedule.archive_seconds, faults=schedule.faults) as server:
            halves = self.watch_archive(server, schedule)
            ends: List[int] = []
            stops = list(schedule.stops)
            while 0 not in ends:
                ran = self.one_run(server, stops.pop(0) if stops else None)
                ends.append(ran.status)
                self.assertIn(ran.status, (0, 1, 3, 130, 143, -9), ran.text)
                self.assert_true(server, ran, schedule)
                self.assertTrue(len(ends) < RUNS or not ran.status, f"no end: {ends}\n{ran.text}")
            self.quiet(server)
            self.assert_whole(server)
            self.assertEqual(halves, [], "archived by halves")
            self.assert_alone()
            self.run_it(server, posts=0, commits=0)
            met = Counter(each.fault for each in server.requests if each.fault)
            return (f"seed {seed}: runs ended {ends}, {len(server.imports())} imports of "
                    f"{sum(schedule.series.values())} series, {sum(met.values())} faults of "
                    f"{len(met)} kinds, {time.monotonic() - begun:.0f} s")

    def watch_archive(self, server: Standin, schedule: Schedule) -> List[str]:
        """A list that names each session which ever stands in the archive in part."""
        halves: List[str] = []
        move = server.store._move

        def watched(row: Any, overwrite: bool) -> Any:
            session = move(row, overwrite)
            wanted = 2 * schedule.series[row.name]
            if len(session.files) != wanted:
                halves.append(f"{row.name}: {len(session.files)} files of {wanted}")
            return session

        server.store._move = watched  # type: ignore[assignment]
        return halves

    def one_run(self, server: Standin, stop: Any) -> Ran:
        """The command once, stopped in the middle if it is to be."""
        before = len(server.imports()), len(server.commits())
        process = self.start(self.arguments(server.url, "--retries", "2", "--timeout", "1"))

        def due() -> bool:
            done = (len(server.commits()) - before[1] if stop.commits else
                    len(server.imports()) - before[0])
            return done >= stop.count

        if stop and self.wait_while_alive(server, process, due):
            time.sleep(stop.pause)
            process.send_signal(stop.signal)
        ran = self.ended(process, 120)
        self.assert_alone()
        if ran.status >= 0:
            self.tidy(ran)
        return ran

    @staticmethod
    def wait_while_alive(server: Standin, process: Any, due: Callable[[], bool]) -> bool:
        """Wait for the moment, unless the run ends before."""
        while not server.wait_for(due, 0.2):
            if process.poll() is not None:
                return False
        return True

    def assert_true(self, server: Standin, ran: Ran, schedule: Schedule) -> None:
        """What a run says of a session that is archived is so."""
        said: Set[str] = set(re.findall(r"(?m)^(\w+)  archived, \d+ files verified", ran.out))
        for label in said:
            self.assertEqual(len(server.instances(label)), 2 * schedule.series[label], ran.text)
            self.assertIn(("BRAIN", label), server.archive, ran.text)


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
            print(f"\nThe storm of seed {seed} was lost: python3 -m tests.test_storm {seed}",
                  file=sys.stderr, flush=True)
            raise

    return test


for _seed in seeds():
    setattr(AStorm, f"test_all_of_it_arrives_once_whatever_happens_seed_{_seed}", as_test(_seed))


def main(chosen: List[str]) -> int:
    """Play chosen seeds, one after another; the number of those that were lost."""
    lost = 0
    for seed in map(int, chosen):
        try:
            with alone(AStorm()) as storm:
                print(storm.weather(seed), flush=True)
        except (AssertionError, OSError) as error:
            lost += 1
            print(f"seed {seed} LOST: {error}", flush=True)
    return lost


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(sys.argv[1:]))
    unittest.main()
