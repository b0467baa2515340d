"""A run and how it ends: signals and sudden death at any moment, terminals that go away, slow
readers, XNAT's idle timer; after every end a summary and a whole report, and a next run that
completes. Then what a run may take: files opened, memory."""

import contextlib
import os
import re
import signal
import sys
import threading
import time
import unittest
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

from dicomUpload import READERS
from tests.dicom import uid, write_series
from tests.running import AGAIN, COMMIT, HELD, IMPORT, RunningTest, until
from tests.support import FULL, WHOLE, Ran, shown_on, slow, variation
from tests.support import load_tests as load_tests  # these mostly wait: several at a time
from tests.xnat_standin import Standin

MEASURES = "measures memory: runs with DICOMUPLOAD_TEST_ALL=1"
DEAF_TO_HUP = """import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.argv[1], sys.argv[1:])
"""


# ---- Moments of a run ------------------------------------------------------------------------

Moment = Iterator[Tuple[Standin, Any]]


def begun(test: RunningTest, server: Standin, *options: str, **more: Any) -> Any:
    return test.start(test.arguments(server.url, "--procs", "1", *options), **more)


@contextlib.contextmanager
def while_meeting(test: RunningTest) -> Moment:
    test.tree()
    with test.xnat() as server:
        server.fail("stall before", "GET /data/projects/BRAIN", seconds=60)
        process = begun(test, server)
        test.assertTrue(server.wait_for(lambda: len(server.requests) == 2, 30))
        yield server, process


@contextlib.contextmanager
def while_reading(test: RunningTest) -> Moment:
    """A slow share, and a long series."""
    test.tree("007/pre/A_0001", files=300)
    test.tree("007/pre/B_0002")
    with test.xnat() as server:
        process = begun(test, server, environment=test.on_open(
            ".dcm", "print(path, file=open(os.environ['HOME'] + '/read', 'a')); time.sleep(0.3)"))
        test.assertTrue(until((test.home / "read").exists))
        yield server, process


@contextlib.contextmanager
def while_zipping(test: RunningTest) -> Moment:
    test.tree()
    with test.xnat() as server:
        process = begun(test, server, environment=test.shim(
            "zip", '[ "$1" = -v ] || { cat >/dev/null; touch "$HOME/zipping"; exec sleep 60; }'))
        test.assertTrue(until((test.home / "zipping").exists))
        yield server, process


@contextlib.contextmanager
def while_sending(test: RunningTest) -> Moment:
    test.tree("007/pre/A_0001")
    test.big_series("007/pre/B_0002", 1)
    with test.xnat() as server:
        def choke() -> bool:
            server.line.rate = 300e3  # B is on the line for seconds
            return False

        server.knobs.reject = lambda _: choke()
        process = begun(test, server)
        test.assertTrue(server.wait_for(lambda: len(server.imports()) == 2, 30))
        yield server, process


@contextlib.contextmanager
def while_waiting_to_retry(test: RunningTest) -> Moment:
    test.tree()
    with test.xnat() as server:
        server.fail("status", IMPORT, status=503, retry_after="60", skip=1)
        process = begun(test, server)
        test.assertTrue(server.wait_for(
            lambda: [each for each in server.imports() if each.status == 503], 30))
        yield server, process


@contextlib.contextmanager
def while_committing(test: RunningTest) -> Moment:
    test.tree()
    with test.xnat(archive_seconds=1) as server:
        process = begun(test, server)
        test.assertTrue(server.wait_for(
            lambda: any(row.status == "_ARCHIVING" for row in server.prearchive), 30))
        yield server, process


@contextlib.contextmanager
def while_verifying(test: RunningTest) -> Moment:
    test.tree()
    with test.xnat() as server:
        server.fail("stall before", r"GET .*/007_pre/scans\?", seconds=60)
        process = begun(test, server)
        test.assertTrue(server.wait_for(
            lambda: any("/scans" in each.path for each in server.requests), 30))
        yield server, process


MOMENTS = (while_meeting, while_reading, while_zipping, while_sending, while_waiting_to_retry,
           while_committing, while_verifying)


class AtAnyMoment(RunningTest):

    def stopped(self, moment: Any, number: int) -> None:
        """A signal at this moment: the run ends in order, and the next one completes."""
        with moment(self) as (server, process):
            process.send_signal(number)
            ran = self.ended(process)
            self.assertEqual(ran.status, 128 + number, ran.text)
            self.assertIn(signal.Signals(number).name, ran.err)
            self.assert_alone()
            self.tidy(ran)
            if moment is not while_meeting:
                self.assertIn("Report: ", ran.out, "no summary")
                self.assertRegex(ran.out, "(?m)^1 session: 1 not finished")
                self.assertIn("\nNot finished: 007_pre\n", ran.out)
                self.assertIn("Run the same command again", ran.out)
                # While XNAT archives it, or it is counted there, nobody could archive half of it.
                self.assertEqual(self.statuses(), {
                    while_reading: "not sent, not sent", while_zipping: "not sent, not sent",
                    while_committing: "sent, sent", while_verifying: "sent, sent",
                }.get(moment, "sent, not sent"))
                self.assertTrue(all(row["message"] for row in self.report()))
                if moment is while_reading:  # docker waits ten seconds for a run to stop
                    self.assertLess((self.home / "read").read_text().count("\n"), READERS)
                halves = "Not whole in the prearchive, do not archive by hand: 007_pre"
                self.assertEqual(moment in (while_sending, while_waiting_to_retry),
                                 halves in ran.out, ran.out)
            self.finishes(server, moment)

    def finishes(self, server: Standin, moment: Any) -> None:
        """Nothing goes on, and the next run completes with what is not there yet."""
        server.line.rate, server.knobs.reject = 0, ()  # what is on the line still arrives, or not
        self.quiet(server)
        server.faults.clear()
        before = len(server.imports())
        self.completes(server)
        self.assertEqual(len(server.imports()) - before, {
            while_sending: 1, while_waiting_to_retry: 1, while_committing: 0, while_verifying: 0,
            while_reading: 3,  # of a long series the first part of a run is small
        }.get(moment, 2), "sent twice, or not at all")

    def killed(self, moment: Any) -> None:
        """kill -9 at this moment: nothing outlives it, and the next run completes."""
        with moment(self) as (server, process):
            process.kill()
            process.wait()
            self.assert_alone(5)
            self.finishes(server, moment)


def as_signal_test(moment: Any, number: int) -> Callable[[AtAnyMoment], None]:
    return lambda self: self.stopped(moment, number)


def as_kill_test(moment: Any) -> Callable[[AtAnyMoment], None]:
    return lambda self: self.killed(moment)


for _moment in MOMENTS:
    _test = as_signal_test(_moment, signal.SIGTERM)
    setattr(AtAnyMoment, f"test_a_SIGTERM_{_moment.__name__}", _test)
    _test = variation(as_signal_test(_moment, signal.SIGINT))
    setattr(AtAnyMoment, f"test_a_SIGINT_{_moment.__name__}", _test)
    _test = as_kill_test(_moment)
    if _moment not in (while_sending, while_committing):
        _test = variation(_test)
    setattr(AtAnyMoment, f"test_a_SIGKILL_{_moment.__name__}", _test)
for _number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU):  # before a batch system kills
    _test = variation(as_signal_test(while_zipping, _number))
    setattr(AtAnyMoment, f"test_a_{_number.name}_while_zipping", _test)


class OtherSignals(RunningTest):

    def test_two_interrupts_end_the_run_at_once(self) -> None:
        with while_waiting_to_retry(self) as (server, process):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            # Late in its own end Python has no handlers left; to a shell this is 130 too.
            self.assertIn(process.wait(20), (130, -signal.SIGINT))
            self.assert_alone()
            server.faults.clear()
            self.completes(server)

    @variation
    def test_under_nohup_a_terminal_may_go_away(self) -> None:
        self.tree("007/pre/A_0001")
        with self.xnat() as server:
            go_on = threading.Event()
            server.knobs.reject = lambda _: not go_on.wait(30)
            process = self.start([sys.executable, "-c", DEAF_TO_HUP, *self.arguments(server.url)])
            self.assertTrue(server.wait_for(server.imports, 30))
            process.send_signal(signal.SIGHUP)
            go_on.set()
            ran = self.ended(process, 60)
            self.assertEqual(ran.status, 0, ran.text)
            self.assert_whole(server)

    def test_a_signal_that_comes_where_python_drops_exceptions_still_stops_the_run(self) -> None:
        self.tree()  # which is looked at four times a second; the upload takes longer
        program = ("import os, signal, sys, time, dicomUpload\n"
                   "class Late:\n"
                   "    def __del__(self):\n"
                   "        os.kill(os.getpid(), signal.SIGTERM)\n"
                   "        time.sleep(0.1)\n"
                   "real = dicomUpload.Xnat.log_in\n"
                   "def log_in(self):\n"
                   "    Late()\n"
                   "    real(self)\n"
                   "dicomUpload.Xnat.log_in = log_in\n"
                   "sys.exit(dicomUpload.main())")
        with self.xnat() as server:
            server.fail("stall before", IMPORT, seconds=60)
            ran = self.run_command(self.altered(program, server.url))
            self.assertEqual(ran.status, 143, ran.text)
            self.assertIn("stopped by SIGTERM", ran.err)
            self.assertEqual(server.archive, {})

    def test_a_parent_that_ignores_the_ends_of_children_makes_no_difference(self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("reset during", IMPORT)
            self.run_it(server, status=0, posts=3, words=AGAIN,
                        preexec=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
            self.assert_whole(server)

    def test_a_system_that_starts_no_more_threads_is_told(self) -> None:
        self.tree(*(f"{subject:03}/pre/A_0001" for subject in range(12)))
        large = ("threading.stack_size(256 << 20)\n"
                 "threading.stack_size = lambda size: None\n")
        program = ("import resource, sys, threading, dicomUpload\n%s"
                   "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
                   "sys.exit(dicomUpload.main())")
        with self.xnat() as server:
            ran = self.run_command(self.altered(program % large, server.url))
            self.assertEqual(ran.status, 3, ran.text)
            self.assertIn("dicomUpload: this system starts no more threads: lower --procs", ran.err)
            self.assertIn("Not finished: ", ran.out)
            ran = self.run_command(self.altered(program % "", server.url))  # a batch system's limit
            self.assertEqual(ran.status, 0, ran.text)
            self.assert_whole(server)

    def test_an_interrupt_within_a_long_series_is_the_reason_in_the_report(self) -> None:
        self.tree("007/pre/A_0001", "008/pre/A_0001", files=4)
        with self.xnat() as server:
            server.fail("stall", IMPORT, skip=1, seconds=60)
            process = begun(self, server, "--max-files", "1")
            self.assertTrue(server.wait_for(lambda: len(server.imports()) > 1, 20))
            process.send_signal(signal.SIGINT)
            ran = self.ended(process)
            self.assertEqual(ran.status, 130, ran.text)
        first, second = self.report()
        self.assertEqual((first["status"], first["files"]), ("not sent", "1"))
        for row in first, second:
            self.assertIn("the run was stopped", row["message"])
        self.assertIn("\nNot finished: 007_pre, 008_pre\n", ran.out)
        self.assertIn("do not archive by hand: 007_pre\n", ran.out)

    def test_a_part_that_was_sent_but_not_noted_is_found_there_and_not_sent_again(self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("stall", IMPORT, seconds=60)  # it is imported; the answer never comes
            process = begun(self, server)
            self.assertTrue(server.wait_for(lambda: len(server.files("007_pre")) == 2, 30))
            process.kill()
            process.wait()
            self.run_it(server, status=0, posts=1, commits=1)
            self.assert_whole(server)


class Stops(RunningTest):
    """Ends that no signal brings."""

    def test_no_signal_hides_that_the_data_went_into_another_project(self) -> None:
        self.tree("007/pre/A_0001", "008/pre/A_0001")
        slow = self.on_open("008/pre/A_0001", "open(os.environ['HOME'] + '/there', 'w').close()\n"
                            "time.sleep(2)", "os.scandir")
        with self.xnat() as server:
            server.fail("other project", IMPORT)
            process = self.start(self.arguments(server.url, "--nested"), slow)
            self.assertTrue(server.wait_for(server.imports, 30))
            self.assertTrue(until((self.home / "there").exists))
            self.assertTrue(until(lambda: not self.processes("curl")))
            process.send_signal(signal.SIGINT)  # while 008 is still being listed
            ran = self.ended(process)
            self.assertEqual(ran.status, 3, ran.text)
            self.assertIn("do not run again", ran.text)
            self.assertNotIn("the same command again", ran.text)

    @variation
    def test_after_a_stop_the_halves_in_the_prearchive_are_named_and_each_series_has_a_row(
            self) -> None:
        self.tree("007/pre/A_0001", "007/pre/B_0002", "008/pre/A_0001")
        # What no other run heals by itself is to be fixed first.
        for kind, more in (("disable account", {}), ("login page", {}),
                           ("other project", {}), ("redirect", {"location": "https://[xnat/"})):
            with self.subTest(kind), self.xnat() as server:
                server.fail(kind, IMPORT, skip=1, **more)
                ran = self.upload(server, "--procs", "1", "--again")
                self.assertEqual(ran.status, 3, ran.text)
                self.assertIn("Not whole in the prearchive, do not archive by hand: 007_pre\n",
                              ran.out)
                self.assertIn("\nNot finished: 007_pre, 008_pre\n", ran.out)
                self.assertEqual(self.statuses(), "sent, not sent, not sent")
                self.assertEqual(server.commits(), [])
                self.tidy(ran)
                self.assertEqual(kind == "other project",
                                 "run the same command again" not in ran.out)

    @variation
    def test_what_an_earlier_run_left_in_part_is_named_after_a_stop_too(self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("error page", IMPORT, status=400, text="no", skip=1)
            self.run_it(server, "--procs", "1", status=1, words=HELD)
            server.fail("disable account", IMPORT)
            ran = self.upload(server, "--procs", "1")
            self.assertEqual(ran.status, 3, ran.text)
            self.assertIn("do not archive by hand: 007_pre\n", ran.out)

    @variation
    def test_a_server_that_goes_away_for_good_stops_the_run(self) -> None:
        self.tree("007/pre/A_0001", "007/pre/B_0002", "008/pre/A_0001")
        with self.xnat() as server:
            server.fail("close", "import|buildInfo", skip=2, times=None)
            ran = self.upload(server, "--procs", "1", "--retries", "0")
            self.assertEqual(ran.status, 3, ran.text)
            self.assertRegex(ran.err, "dicomUpload: http.*connection broke .*: run again later")
            self.assertIn("do not archive by hand: 007_pre", ran.out)
            self.assertEqual(self.statuses(), "sent, not sent, not sent")
            server.faults.clear()
            self.completes(server)

    def test_a_server_that_refuses_everything_stops_the_run_after_twenty_sessions(self) -> None:
        for number in range(40):
            write_series(self.root / f"{number:03}/s/T1", study=uid(number), files=1, rows=1)
        with self.xnat() as server:
            server.fail("disk full", IMPORT, times=None)
            ran = self.upload(server, "--procs", "2")
            self.assertEqual(ran.status, 3, ran.text)
            self.assertRegex(ran.err, r"refuses everything \(20 sessions in a row.*disk is full")
            self.assertLess(len(server.imports()), 30)
            self.assertEqual(len(self.report()), 40)
            self.assertNotIn("", {row["message"] for row in self.report()})

    @variation
    def test_a_line_that_breaks_in_two_ways_by_turns_stops_the_run_all_the_same(self) -> None:
        for number in range(25):
            write_series(self.root / f"{number:03}/s/T1", study=uid(number), files=1, rows=1)
        shim = self.shim("curl", f"""cat >"$0.$$"; exec <"$0.$$"
            case "$(cat "$0.$$")" in *--form*) cd {self.folder}
            echo >>broken; code=$((55 + $(wc -l <broken) % 2))
            echo "curl: ($code) $code: Connection reset by peer" >&2; exit $code;; esac""")
        with self.xnat() as server:
            ran = self.upload(server, "--procs", "1", "--retries", "0", environment=shim)
            self.assertEqual(ran.status, 3, ran.text)
            self.assertRegex(ran.err, r"refuses everything \(20 sessions in a row")
            self.assertEqual(server.imports(), [])


# ---- What is not there -----------------------------------------------------------------------

class WhatIsNotThere(RunningTest):
    """It is in the exit status, on the screen and in the report."""

    def test_the_last_words_of_a_whole_upload_are_that_all_is_there(self) -> None:
        self.tree("007/pre/A_0001")
        (self.root / "007/pre/T2").mkdir()
        (self.root / "007/notes.txt").write_text("words " * 99)
        with self.xnat() as server:
            for _ in range(2):
                ran = self.upload(server)
                self.assertEqual(ran.status, 0, ran.text)
                self.assertIn("\nAll is there.\n", ran.out)
                self.assertIn("007/notes.txt: 1 file where folders belong", ran.err)
        self.assertEqual(self.statuses(), "already there, no DICOM")

    @variation
    def test_images_without_a_series_folder_are_a_failure_by_name_but_not_of_a_slice_of_others(
            self) -> None:
        self.tree("007/pre/A_0001", "008/pre/A_0001")
        (self.root / "007/pre/A_0001/IM0001.dcm").rename(self.root / "007/pre/IM0001.dcm")
        (self.root / "007/pre/A_0001/IM0002.dcm").rename(self.root / "007/IM0002.dcm")
        self.tree("007/pre/A_0001", files=1)
        with self.xnat() as server:
            self.assertEqual(self.upload(server, "--only", "008").status, 0)
            for options in ((), ("--dry-run",)):
                ran = self.upload(server, *options)
                self.assertEqual(ran.status, 1, ran.text)
                for name in ("007/pre: 1 DICOM file where folders belong (IM0001.dcm)",
                             "007: 1 DICOM file where folders belong (IM0002.dcm)"):
                    self.assertIn(name, ran.text)
                self.assertNotIn("All is there", ran.out)

    def test_a_session_of_which_files_are_missing_does_not_look_whole(self) -> None:
        self.tree("007/pre/A_0001", files=3)
        drops = iter((False, True, False))
        with self.xnat(reject=lambda _: next(drops)) as server:
            ran = self.upload(server)
            self.assertEqual(ran.status, 1, ran.text)
            self.assertRegex(ran.out, "(?m)^007_pre +archived, only 2 of 3 files verified$")
            self.assertRegex(ran.out, "XNAT counts 2 files where 3 should be")

    def test_the_report_says_of_each_series_what_became_of_its_session(self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("error page", COMMIT, status=500, text="FAILED: no, thanks")
            ran = self.upload(server)
        self.assertEqual(ran.status, 1, ran.text)
        self.assertEqual(self.statuses(), "sent, sent")
        for row in self.report():
            self.assertIn("FAILED: no, thanks", row["message"])
            self.assertIn("/data/prearchive/projects/BRAIN/", row["server's address"])


# ---- Where it tells --------------------------------------------------------------------------

class WhoListens(RunningTest):

    def lose_terminal(self, server: Standin) -> Tuple[Any, threading.Event]:
        """A run whose terminal goes away while its first import is in the server."""
        self.tree()
        master, slave = os.openpty()
        go_on = threading.Event()
        server.knobs.reject = lambda _: not go_on.wait(60)
        process = self.start(self.arguments(server.url), {"TERM": "xterm"}, stdout=slave,
                             stderr=slave, start_new_session=True)
        os.close(slave)
        self.assertTrue(server.wait_for(server.imports, 20))
        os.close(master)
        return process, go_on

    @variation
    def test_a_terminal_that_is_gone_does_not_stop_the_upload(self) -> None:
        with self.xnat() as server:
            process, go_on = self.lose_terminal(server)
            go_on.set()
            self.assertEqual(process.wait(30), 0)
            self.assert_whole(server)
        self.assertEqual(self.statuses(), "sent, sent")

    def test_a_hang_up_with_a_dead_terminal_still_ends_in_order(self) -> None:
        with self.xnat() as server:
            process, go_on = self.lose_terminal(server)
            process.send_signal(signal.SIGHUP)
            self.assertEqual(process.wait(30), 129)
            go_on.set()
            self.assertEqual(len(self.report()), 2)
            self.assertEqual(self.zips(), [])
            self.assert_alone()
            self.quiet(server)
            self.completes(server)

    def test_a_reader_that_goes_away_does_not_stop_the_upload(self) -> None:
        self.tree()
        with self.xnat() as server:
            command = " ".join(map("'{}'".format, self.arguments(server.url, "-v")))
            ran = self.run_command(["bash", "-c", f"{command} 2>&1 | head -1; "
                                    "exit ${PIPESTATUS[0]}"])
            self.assertEqual(ran.status, 0, ran.text)
            self.assert_whole(server)

    def test_a_pipe_that_is_full_for_a_moment_loses_no_line(self) -> None:
        sessions = 30 if WHOLE else 10
        for number in range(sessions):
            write_series(self.root / f"{number:03}" / "s" / ("n" * 200), study=uid(number),
                         files=1, rows=1)
        with self.xnat() as server:
            reader, writer = os.pipe()
            for end in (reader, writer):
                os.set_blocking(end, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(writer, b"#" * 1024)  # full
            process = self.start(self.arguments(server.url, "-v"), stdout=writer, stderr=writer)
            os.close(writer)
            self.assertFalse(server.wait_for(server.imports, 0.5), "it went on unheard")
            os.set_blocking(reader, True)
            with open(reader, "rb") as pipe:
                text = pipe.read().lstrip(b"#").decode()
            self.assertEqual(process.wait(30), 0, text)
        for number in range(sessions):
            self.assertRegex(text, f"(?m)^{number:03}_s +archived, 1 file verified\\b")
        self.assertRegex(text, r"(?m)^Report: \S+\.csv$")

    @variation
    def test_walking_and_reading_show_themselves(self) -> None:
        self.tree("007/pre/A_0001", "007/pre/B_0002", "008/pre/A_0001", files=4)
        for event, words in (("os.scandir", "walking: 1 session so far"),
                             ("open", "reading 007_pre")):
            with self.subTest(event), self.xnat() as server:
                master, slave = self.terminal(80)
                process = self.start(
                    self.arguments(server.url, "--again"), {
                        "TERM": "xterm", **self.on_open("", "time.sleep(0.15)", event)},
                    stdout=slave, stderr=slave)
                os.close(slave)
                shown = shown_on(master)
                self.assertEqual(process.wait(30), 0, shown)
                self.assertIn(words, shown)

    def test_closed_standard_streams_are_no_reason_to_stop(self) -> None:
        self.tree("007/pre/A_0001")
        with self.xnat() as server:
            command = " ".join(map("'{}'".format, self.arguments(server.url)))
            ran = self.run_command(["sh", "-c", f"{command} <&- >&- 2>&-"])
            self.assertEqual(ran.status, 0)
            self.assert_whole(server)


# ---- XNAT's idle timer -----------------------------------------------------------------------

class TheIdleTimer(RunningTest):

    IDLE: Dict[str, Any] = {"idle_seconds": 0.8, "tick_seconds": 0.1}

    @variation
    def test_a_gap_longer_than_the_idle_time_archives_no_half_session(self) -> None:
        self.tree()
        with self.xnat(**self.IDLE) as server:
            server.fail("status", IMPORT, status=503, retry_after="2", skip=1)
            self.run_it(server, "--procs", "1", "--retries", "1", status=0, posts=3, commits=1)
            self.assertEqual(server.archived_by_idle, [])
            self.assert_whole(server)

    @slow
    def test_a_session_that_was_left_in_part_is_not_archived_by_the_idle_timer(self) -> None:
        self.tree("007/pre/A_0001", "007/pre/B_0002", "008/pre/A_0001", "008/pre/B_0002")
        with self.xnat(**self.IDLE) as server:
            server.fail("error page", IMPORT, status=400, text="no", skip=1)  # held back
            server.fail("reset before", IMPORT, skip=3)  # killed
            process = begun(self, server)
            self.assertTrue(server.wait_for(lambda: len(server.imports()) == 4, 30))
            process.kill()
            process.wait()
            self.assertFalse(server.wait_for(lambda: server.archived_by_idle, 2))
            self.assertEqual(len(server.prearchive), 2)
            self.completes(server)

    @slow
    def test_a_commit_that_takes_its_time_is_waited_for(self) -> None:
        self.tree()
        with self.xnat(build_delay=0.5, archive_seconds=1, **self.IDLE) as server:
            server.fail("reset before", COMMIT)
            ran = self.run_it(server, "--retries", "2", status=0, posts=2, commits=2)
            self.assertEqual(len(re.findall(AGAIN, ran.err)), 1, ran.err)
            self.assert_whole(server)


# ---- What a run takes ------------------------------------------------------------------------

class WhatItTakes(RunningTest):

    def opened(self) -> List[str]:
        """The files below ROOTDIR that were opened since the last look, and what stood between."""
        lines = (self.home / "opened").read_text().splitlines()
        (self.home / "opened").write_text("")
        return lines

    def upload_watched(self, server: Standin, *options: str) -> Ran:
        ran = self.upload(server, *options, environment=self.on_open("", (
            "home = os.environ['HOME']\n"
            "with open(home + '/opened', 'a') as log: log.write(path + '\\n')")))
        self.assertEqual(ran.status, 0, ran.text)
        return ran

    @variation
    def test_files_are_opened_after_the_login_and_those_of_a_few_sessions_before_the_first_post(
            self) -> None:
        for number in range(24):
            write_series(self.root / f"{number:03}" / "s" / "T1", study=uid(number), files=3,
                         rows=1)
        opened = self.home / "opened"
        opened.touch()
        at_post: List[int] = []

        def look() -> bool:
            at_post.append(len({Path(line).parent for line in opened.read_text().splitlines()}))
            return False

        with self.xnat(reject=lambda _: look()) as server:
            for procs in (1, 2):
                server.store.archive.clear()
                at_post.clear()
                self.upload_watched(server, "--procs", str(procs), "--again")
                self.assertEqual(len(set(self.opened())), 72)
                # As many as are read and packed while others are posted, and their look-ahead.
                self.assertLessEqual(at_post[0], 2 * procs, "before the first POST")
            server.fail("error page", "POST /data/JSESSION", status=401, text="no")
            ran = self.upload(server, environment=self.on_open("", "raise SystemExit(99)"))
            self.assertEqual(ran.status, 3, "opened one, and so ended with 99" + ran.text)
            self.assertEqual(self.opened(), [], "opened before the login was accepted")

            # Nothing has changed: names, sizes and times say so.
            ran = self.upload_watched(server)
            self.assertEqual(self.opened(), [])
            there = re.findall("(?m)^[0-9]{3}_s +already there, 3 files", ran.out)
            self.assertEqual(len(there), 24)
            # One file has: its series is read, and no other session.
            (self.root / "007/s/T1/IM0001.dcm").touch()
            self.upload_watched(server)
            self.assertEqual({Path(line).parent.parent.parent.name for line in self.opened()},
                             {"007"})

    @variation
    def test_many_links_to_folders_cost_no_minutes(self) -> None:
        self.tree("007/pre/A_0001")
        for number in range(1000):
            other = self.folder / "elsewhere" / str(number)
            other.mkdir(parents=True)
            (self.root / "007/pre/A_0001" / f"l{number}").symlink_to(other)
        with self.xnat() as server:
            ran = self.upload(server, timeout=60)  # each with each took minutes
            self.assertEqual(ran.status, 0, ran.text[-500:])

    @unittest.skipUnless(FULL, MEASURES)
    def test_memory_stays_under_60_mb_for_8_000_series(self) -> None:
        self.memory(subjects=20, sessions=10, series=40)

    @unittest.skipUnless(FULL, MEASURES)
    def test_memory_stays_under_60_mb_for_200_000_series(self) -> None:
        self.memory(subjects=2000, sessions=10, series=10)

    def memory(self, subjects: int, sessions: int, series: int) -> None:
        """Measure the run itself on a tree of so many names, of which a few have files."""
        pattern = self.folder / "pattern"
        for session in range(sessions):
            for number in range(series):
                os.makedirs(str(pattern / f"ses{session:02}" / f"MPRAGE_T1_SAGITTAL_{number:04}"))
        self.root.mkdir()
        for subject in range(subjects):  # links: they are made faster than folders
            os.symlink(str(pattern), str(self.root / f"subject{subject:05}"))
        for subject in range(5):
            write_series(self.root / f"with_files_{subject}" / "ses" / "T1", study=uid(subject),
                         files=1, rows=1)
        if not os.path.exists("/proc/self/status"):
            self.skipTest("no /proc on this system")
        # Not by getrusage: its peak is that of the parent, where that was larger before exec.
        program = ("import re, sys, dicomUpload\n"
                   "status = dicomUpload.main()\n"
                   "peak = re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())\n"
                   "print('PEAK', int(peak[1]) * 1024, file=sys.stderr)\n"
                   "sys.exit(status)")
        with self.xnat() as server:
            ran = self.run_command(self.altered(program, server.url, "-q"), timeout=600)
            self.assertEqual(ran.status, 0, ran.text[-2000:])
            self.assertEqual(len(server.archive), 5)
            self.assertEqual(len(self.report()), subjects * sessions * series + 5)
        peak = int(ran.err.rpartition("PEAK ")[2]) / 1e6
        self.assertLess(peak, 60, "MB")


if __name__ == "__main__":
    unittest.main()
