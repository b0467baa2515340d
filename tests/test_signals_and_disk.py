"""Signals and sudden death at any moment, full and closed disks, files that change on the way."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import unittest
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

from tests.dicom import uid, write_series
from tests.support import ROOT, Ran, variation
from tests.support import load_tests as load_tests  # these mostly wait: several at a time
from tests.test_fault_table import AGAIN, COMMIT, HELD, IMPORT, FaultTest
from tests.xnat_standin import Standin

Process = "subprocess.Popen[str]"

# Run a command without root's way round permissions, or with a signal ignored.
HELD_BY_PERMISSIONS = """import os, sys
sys.path.insert(0, sys.argv[1])
from tests.support import drop_root_rights
drop_root_rights()
os.execv(sys.argv[2], sys.argv[2:])
"""
DEAF_TO_HUP = """import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.argv[1], sys.argv[1:])
"""


def until(true: Callable[[], Any], seconds: float = 30) -> Any:
    """Wait for something outside the stand-in; what it gave, false if it never came."""
    end = time.monotonic() + seconds
    while True:
        found = true()
        if found or time.monotonic() > end:
            return found
        time.sleep(0.01)


class RunningTest(FaultTest):
    """What the tests of running uploads share."""

    def big_series(self, path: str, megabytes: float, files: int = 1) -> None:
        """A series that does not compress."""
        subject, session, name = path.split("/")
        write_series(self.root / path, study=uid(subject, session), number=int(name[-4:]),
                     files=files, patient=subject, pixels=os.urandom(int(megabytes * 5e5) * 2))

    def processes(self, program: str = "") -> List[int]:
        """All living processes that were started with this test's HOME; or those of `program`."""
        if not os.path.isdir("/proc/self"):
            lines = subprocess.check_output(["ps", "-axo", "pid=,args="]).decode().splitlines()
            return [int(line.split()[0]) for line in lines if str(self.folder) in line
                    and os.path.basename(line.split()[1]).startswith(program)]
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                mine = os.fsencode(f"HOME={self.home}\0") in (place / "environ").read_bytes()
                name = (place / "comm").read_text()
                if mine and name.startswith(program):
                    found.append(int(place.name))
        return found

    def assert_alone(self, seconds: float = 3) -> None:
        """Nothing that the run started is alive."""
        until(lambda: not self.processes(), seconds)
        self.assertEqual(self.processes(), [], "processes are left")

    def ended(self, process: Any, seconds: float = 20) -> Ran:
        """The end of a run."""
        out, err = process.communicate(timeout=seconds)
        ran = Ran(process.returncode, out, err)
        self.assertNotIn("Traceback", ran.text)
        return ran

    def completes(self, server: Standin, *options: str) -> Ran:
        """The next run ends with everything there."""
        ran = self.run_it(server, *options, status=0)
        self.assert_whole(server)
        self.assert_alone()
        return ran


# ---- Moments of a run ------------------------------------------------------------------------

@contextlib.contextmanager
def while_planning(test: RunningTest) -> Iterator[Tuple[Standin, Any]]:
    test.tree(files=200)
    with test.xnat() as server:
        process = test.start(test.arguments(server.url))
        test.assertTrue(until(lambda: list(test.work.glob("*.log"))))
        yield server, process


@contextlib.contextmanager
def while_zipping(test: RunningTest) -> Iterator[Tuple[Standin, Any]]:
    test.big_series("007/pre/A_0001", 20)
    with test.xnat() as server:
        process = test.start(test.arguments(server.url, "--compression", "9"))
        test.assertTrue(until(lambda: test.processes("zip") and test.zips()))
        yield server, process


@contextlib.contextmanager
def while_sending(test: RunningTest) -> Iterator[Tuple[Standin, Any]]:
    test.tree("007/pre/A_0001")
    test.big_series("007/pre/B_0002", 1)
    with test.xnat(rate=300e3) as server:
        process = test.start(test.arguments(server.url, "--procs", "1"))
        test.assertTrue(server.wait_for(lambda: len(server.imports()) == 2, 30))
        time.sleep(0.3)  # into its body
        yield server, process
        server.line.rate = 0


@contextlib.contextmanager
def while_waiting_to_retry(test: RunningTest) -> Iterator[Tuple[Standin, Any]]:
    test.tree()
    with test.xnat() as server:
        server.fail("status", IMPORT, status=503, retry_after="60", skip=1)
        process = test.start(test.arguments(server.url, "--procs", "1"))
        test.assertTrue(server.wait_for(
            lambda: [each for each in server.imports() if each.status == 503], 30))
        yield server, process


@contextlib.contextmanager
def while_committing(test: RunningTest) -> Iterator[Tuple[Standin, Any]]:
    test.tree()
    with test.xnat(archive_seconds=1.5) as server:
        process = test.start(test.arguments(server.url))
        test.assertTrue(server.wait_for(server.commits, 30))
        time.sleep(0.1)
        yield server, process


MOMENTS = (while_planning, while_zipping, while_sending, while_waiting_to_retry, while_committing)


class SignalsAtAnyMoment(RunningTest):

    def stopped(self, moment: Any, number: int) -> None:
        """A signal at this moment: the run ends in order, and the next one completes."""
        with moment(self) as (server, process):
            process.send_signal(number)
            begun = time.monotonic()
            ran = self.ended(process)
            self.assertLess(time.monotonic() - begun, 10)
            self.assertEqual(ran.status, 128 + number, ran.text)
            self.assertIn(signal.Signals(number).name, ran.err)
            self.assert_alone()
            self.tidy(ran)
            if moment is not while_planning:
                self.assertIn("Report: ", ran.out, "no summary")
                self.assertIn("Run the same command again", ran.out)
            if moment is while_sending:
                self.assertEqual(self.statuses(), "sent, not sent")
            posts = len(server.imports())
            sent = [each for each in server.imports() if each.status == 200]
            server.faults.clear()
            self.completes(server)
            series = 1 if moment is while_zipping else 2
            self.assertEqual(len(server.imports()) - posts, series - len(sent), "sent twice")

    def killed(self, moment: Any) -> None:
        """kill -9 at this moment: nothing goes on, and the next run completes."""
        with moment(self) as (server, process):
            process.kill()
            process.wait()
            self.assert_alone(5)
            server.faults.clear()
            self.completes(server)


def as_signal_test(moment: Any, number: int) -> Callable[[SignalsAtAnyMoment], None]:
    return lambda self: self.stopped(moment, number)


def as_kill_test(moment: Any) -> Callable[[SignalsAtAnyMoment], None]:
    return lambda self: self.killed(moment)


for _moment in MOMENTS:
    for _number in (signal.SIGINT, signal.SIGTERM):
        _test = as_signal_test(_moment, _number)
        if _number == signal.SIGINT and _moment is not while_sending:
            _test = variation(_test)
        setattr(SignalsAtAnyMoment, f"test_{_number.name}_{_moment.__name__}", _test)
    setattr(SignalsAtAnyMoment, f"test_SIGKILL_{_moment.__name__}", as_kill_test(_moment))


class OtherSignals(RunningTest):

    def test_two_interrupts_end_the_run_at_once(self) -> None:
        with while_sending(self) as (server, process):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            begun = time.monotonic()
            # Late in its own end Python has no handlers left; to a shell this is 130 too.
            self.assertIn(process.wait(20), (130, -signal.SIGINT))
            self.assertLess(time.monotonic() - begun, 3)
            self.assert_alone()
            self.completes(server)

    def test_a_terminal_that_goes_away_stops_the_run(self) -> None:
        with while_sending(self) as (server, process):
            process.send_signal(signal.SIGHUP)
            self.assertEqual(self.ended(process).status, 129)
            self.assert_alone()
            self.assertEqual(self.zips(), [])
            self.completes(server)

    def test_under_nohup_a_terminal_may_go_away(self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("stall before", IMPORT, seconds=1)
            process = self.start([sys.executable, "-c", DEAF_TO_HUP, *self.arguments(server.url)])
            self.assertTrue(server.wait_for(server.imports, 30))
            process.send_signal(signal.SIGHUP)
            ran = self.ended(process, 60)
            self.assertEqual(ran.status, 0, ran.text)
            self.assert_whole(server)

    def kill(self, program: str) -> None:
        """kill -9 for the programs of this name that the run has started."""
        found = self.processes(program)
        self.assertTrue(found, f"no {program} is running")
        for number in found:
            os.kill(number, signal.SIGKILL)

    def test_a_curl_that_is_killed_is_tried_again(self) -> None:
        with while_sending(self) as (server, process):
            self.kill("curl")
            server.line.rate = 0
            ran = self.ended(process, 60)
            self.assertEqual(ran.status, 0, ran.text)
            self.assertIn(AGAIN, ran.err)
            self.tidy(ran)
            self.assert_whole(server)

    def test_a_zip_that_is_killed_costs_that_series_only(self) -> None:
        with while_zipping(self) as (server, process):
            self.tree("008/pre/A_0001")  # not seen by the run any more
            self.kill("zip")
            ran = self.ended(process, 60)
            self.assertEqual(ran.status, 1, ran.text)
            self.assertRegex(ran.out, "A_0001 +not sent +zip")
            self.tidy(ran)
            self.assert_alone()
            self.completes(server)

    @unittest.skipUnless(os.path.isdir("/proc/self"), "finds processes in /proc")
    def test_whatever_else_the_run_has_started_may_be_killed(self) -> None:
        with while_sending(self) as (server, process):
            others = set(self.processes()) - set(self.processes("curl")) - {process.pid}
            for number in others:
                os.kill(number, signal.SIGKILL)
            server.line.rate = 0
            ran = self.ended(process, 60)
            self.assertEqual(ran.status, 0, ran.text)
            self.assert_whole(server)
            self.assert_alone()

    def test_a_part_that_was_sent_but_not_noted_is_sent_again_and_kept_once(self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("stall", IMPORT, seconds=60)  # it is imported; the answer never comes
            process = self.start(self.arguments(server.url, "--procs", "1"))
            self.assertTrue(server.wait_for(lambda: len(server.files("007_pre")) == 2, 30))
            process.kill()
            process.wait()
            self.run_it(server, status=0, posts=2, commits=1)
            self.assert_whole(server)

    def test_a_second_run_in_the_same_workdir_is_refused_and_the_first_goes_on(self) -> None:
        self.tree()
        with self.xnat() as server:
            second_ended = threading.Event()
            server.knobs.reject = lambda _: not second_ended.wait(60)
            process = self.start(self.arguments(server.url))
            self.assertTrue(server.wait_for(server.imports, 30))
            second = self.upload(server)
            second_ended.set()
            self.assertEqual(second.status, 3, second.text)
            self.assertRegex(second.err, "workdir .*in use by another run: ")
            ran = self.ended(process, 60)
            self.assertEqual(ran.status, 0, ran.text)
            self.assertEqual(len(server.imports()), 2)
            self.assert_whole(server)
            self.tidy(ran)


# ---- The workdir -----------------------------------------------------------------------------

class TheWorkdir(RunningTest):

    def small_disk(self, size: str) -> None:
        """Make the workdir a file system of its own, of so many bytes."""
        self.work.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.work)]
        try:
            done = subprocess.run(mount, stderr=subprocess.DEVNULL)
        except OSError:
            self.skipTest("mount is not installed")
        if done.returncode:
            self.skipTest("a file system cannot be mounted here: needs root")
        self.addCleanup(subprocess.call, ["umount", "-l", str(self.work)])

    def unprivileged(self, arguments: List[str]) -> List[str]:
        return [sys.executable, "-c", HELD_BY_PERMISSIONS, str(ROOT), *arguments]

    def test_a_workdir_that_may_not_be_written_is_named(self) -> None:
        self.tree()
        self.work.mkdir()
        self.work.chmod(0o555)
        with self.xnat() as server:
            ran = self.run_command(self.unprivileged(self.arguments(server.url)))
            self.assertEqual(ran.status, 3, ran.text)
            self.assertRegex(ran.err, r"dicomUpload: workdir .*work.*\(.*ermi.*\).*: ")
            self.assertEqual(server.requests, [])
            self.work.chmod(0o755)
            self.completes(server)

    def test_a_workdir_that_is_a_file_is_named(self) -> None:
        self.tree()
        self.work.write_text("mine")
        with self.xnat() as server:
            ran = self.upload(server)
            self.assertEqual(ran.status, 3, ran.text)
            self.assertRegex(ran.err, "dicomUpload: workdir .*work.*: ")
            self.assertEqual(server.requests, [])
            self.assertEqual(self.work.read_text(), "mine")

    def test_a_workdir_inside_rootdir_is_refused(self) -> None:
        self.tree()
        with self.xnat() as server:
            ran = self.upload(server, "--workdir", str(self.root / "work"))
            self.assertEqual(ran.status, 2, ran.text)
            self.assertIn("inside ROOTDIR", ran.err)
            self.assertFalse((self.root / "work").exists())

    def test_a_series_too_big_for_the_workdir_fails_and_small_ones_go(self) -> None:
        self.big_series("007/pre/A_0001", 3)
        self.tree("007/pre/B_0002", "008/pre/A_0001")
        self.small_disk("1m")
        with self.xnat() as server:
            self.run_it(server, status=1, posts=2, commits=1,
                        words=f"too full .*needs 3.* MB, has .*B.*--max-files | {HELD}")
            self.assertEqual(self.statuses(), "not sent, sent, sent")
            subprocess.check_call(["mount", "-o", "remount,size=20m", str(self.work)])
            self.run_it(server, status=0, posts=1, commits=1)
            self.assert_whole(server)

    def test_smaller_parts_fit_where_a_whole_series_does_not(self) -> None:
        self.big_series("007/pre/A_0001", 0.4, files=6)
        self.small_disk("1m")
        with self.xnat() as server:
            self.run_it(server, status=1, posts=0, words="--max-files")
            self.run_it(server, "--max-files", "1", status=0, posts=6, commits=1)
            self.assert_whole(server)

    def test_a_series_waits_while_only_other_zips_are_in_its_way(self) -> None:
        for subject in ("001", "002", "003", "004", "005"):
            self.big_series(f"{subject}/pre/A_0001", 1)
        self.small_disk("3m")
        with self.xnat(seconds_per_file=0.3) as server:
            self.run_it(server, "--procs", "4", status=0, posts=5, commits=5)
            self.assert_whole(server)

    def test_a_workdir_without_a_single_free_byte_stops_the_run(self) -> None:
        self.tree()
        self.small_disk("64k")
        filler = self.work / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"#" * 4096)
        with self.xnat() as server:
            ran = self.upload(server)
            self.assertEqual(ran.status, 3, ran.text)
            self.assertRegex(ran.err, "dicomUpload: .*[Nn]o space.*: ")
            self.assertEqual(server.imports(), [])
            filler.unlink()
            subprocess.check_call(["mount", "-o", "remount,size=20m", str(self.work)])
            self.completes(server)


# ---- Files that change after the plan --------------------------------------------------------

def shrink(series: Path) -> None:
    file = series / "IM0002.dcm"
    os.truncate(str(file), file.stat().st_size - 100)


def grow(series: Path) -> None:
    with (series / "IM0002.dcm").open("ab") as file:
        file.write(bytes(100))


def rewrite(series: Path) -> None:
    """Equal in size, other bytes."""
    file = series / "IM0002.dcm"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def vanish(series: Path) -> None:
    (series / "IM0002.dcm").unlink()


def vanish_altogether(series: Path) -> None:
    shutil.rmtree(str(series))


def lock(series: Path) -> None:
    (series / "IM0002.dcm").chmod(0)


def lock_folder(series: Path) -> None:
    series.chmod(0)


def unlock(series: Path) -> None:
    series.chmod(0o755)
    (series / "IM0002.dcm").chmod(0o644)


class FilesThatChangeAfterThePlan(RunningTest):

    def changed(self, change: Callable[[Path], None], word: str,
                mend: Callable[[Path], None] = lambda series: None) -> None:
        """Change the second series while the first is on its way."""
        self.tree()
        series = self.root / "007/pre/B_0002"
        with self.xnat() as server:
            server.fail("stall before", IMPORT, seconds=1)
            process = self.start([sys.executable, "-c", HELD_BY_PERMISSIONS, str(ROOT),
                                  *self.arguments(server.url, "--procs", "1")])
            self.assertTrue(server.wait_for(server.imports, 30))
            change(series)
            ran = self.ended(process, 60)
            self.assertEqual(ran.status, 1, ran.text)
            self.assertEqual(self.statuses(), "sent, not sent")
            self.assertRegex(ran.out, f"B_0002 +not sent +.*{word}")
            self.assertIn(HELD, ran.out)
            self.assertEqual((len(server.imports()), len(server.commits())), (1, 0))
            self.tidy(ran)
            mend(series)
            self.run_it(server, status=0, commits=1)
            self.assert_whole(server)

    def test_a_file_that_shrinks_fails_its_series(self) -> None:
        self.changed(shrink, "IM0002.dcm changed")

    def test_a_file_that_grows_fails_its_series(self) -> None:
        self.changed(grow, "IM0002.dcm changed")

    def test_a_file_that_is_rewritten_fails_its_series(self) -> None:
        self.changed(rewrite, "IM0002.dcm changed")

    def test_a_file_that_vanishes_fails_its_series(self) -> None:
        self.changed(vanish, "IM0002.dcm")

    def test_a_folder_that_vanishes_fails_its_series(self) -> None:
        self.changed(vanish_altogether, "IM0001.dcm")

    def test_a_file_that_may_not_be_read_any_more_fails_its_series(self) -> None:
        self.changed(lock, "IM0002.dcm", unlock)

    def test_a_folder_that_may_not_be_read_any_more_fails_its_series(self) -> None:
        self.changed(lock_folder, "IM0001.dcm.*permission", unlock)

    def test_a_file_that_comes_after_the_plan_is_sent_by_the_next_run(self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("stall before", IMPORT, seconds=1)
            process = self.start(self.arguments(server.url, "--procs", "1"))
            self.assertTrue(server.wait_for(server.imports, 30))
            self.tree("007/pre/C_0003")
            ran = self.ended(process, 60)
            self.assertEqual(ran.status, 0, ran.text)
            self.run_it(server, status=0, posts=1, commits=1)
            self.assert_whole(server)


# ---- XNAT's idle timer -----------------------------------------------------------------------

class TheIdleTimer(RunningTest):

    IDLE: Dict[str, Any] = {"idle_seconds": 1, "tick_seconds": 0.1, "seconds_per_file": 0.3}

    def test_a_gap_longer_than_the_idle_time_archives_no_half_session(self) -> None:
        self.tree("007/pre/A_0001", "007/pre/B_0002", "007/pre/C_0003", "008/pre/A_0001")
        with self.xnat(**self.IDLE) as server:
            server.fail("status", IMPORT, status=503, retry_after="3", skip=1, times=2)
            self.run_it(server, "--procs", "1", "--retries", "2", status=0, posts=6, commits=2)
            self.assertEqual(server.archived_by_idle, [])
            self.assert_whole(server)

    def test_a_run_that_is_killed_leaves_no_session_for_the_idle_timer(self) -> None:
        self.tree()
        with self.xnat(**self.IDLE) as server:
            server.fail("stall before", IMPORT, seconds=60, skip=1)
            process = self.start(self.arguments(server.url, "--procs", "1"))
            self.assertTrue(server.wait_for(lambda: len(server.imports()) == 2, 30))
            process.kill()
            process.wait()
            self.assertFalse(server.wait_for(lambda: server.archived_by_idle, 2.5))
            self.completes(server)

    def test_a_session_held_back_is_not_archived_by_the_idle_timer(self) -> None:
        self.tree()
        with self.xnat(**self.IDLE) as server:
            server.fail("error page", IMPORT, status=400, text="no", skip=1)
            self.run_it(server, "--procs", "1", status=1, posts=2, commits=0, words=HELD)
            self.assertFalse(server.wait_for(lambda: server.archived_by_idle, 2.5))
            self.completes(server)

    def test_with_no_commit_the_idle_timer_does_archive_a_half_session(self) -> None:
        self.tree()
        with self.xnat(**self.IDLE) as server:
            server.fail("status", IMPORT, status=503, retry_after="3", skip=1)
            ran = self.upload(server, "--procs", "1", "--no-commit", "--retries", "1")
            self.assertTrue(server.wait_for(lambda: server.archived_by_idle))
            self.assertEqual([each.files for each in server.archived_by_idle[:1]], [2], "of 4")
            self.assertNotIn("two studies", ran.text, "there is one study only")

    def test_a_commit_that_takes_its_time_is_waited_for(self) -> None:
        self.tree()
        with self.xnat(build_delay=0.5, archive_seconds=1, **self.IDLE) as server:
            server.fail("reset before", COMMIT)
            self.run_it(server, "--retries", "1", status=0, posts=2, commits=2)
            self.assert_whole(server)


if __name__ == "__main__":
    unittest.main()
