"""What the program says is so: a session that is short is told as short, by every later run too,
and one that is whole is never called anything else, whatever tree, ledger and server went through.
"""

import contextlib
import os
import re
import shutil
import signal
import tempfile
import threading
import types
import unittest
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List
from unittest import mock

import dicomUpload
from tests.dicom import digests, uid, write_series
from tests.support import Ran, need, shown_on, slow, take_terminal
from tests.support import load_tests as load_tests  # these mostly wait: several at a time
from tests.test_fault_table import COMMIT, HELD, IMPORT, LOGIN, FaultTest
from tests.test_signals_and_disk import RunningTest, until
from tests.xnat_standin import Row, Session, Standin, User

DROPPED = "DROPPED"  # the description of what the server's filter throws away
FILTER = {"reject": (DROPPED,)}
A, B, C = (f"007/pre/{name}" for name in ("A_0001", "B_0002", "C_0003"))


def once(do: Callable[[], Any], *series: str) -> Callable[[str], bool]:
    """A server's filter that throws nothing away, but does something in the middle of the first
    import of each of these series: when its body is read, and nothing of it is kept yet."""
    waiting = set(series)

    def look(description: str) -> bool:
        if description in waiting:
            waiting.remove(description)
            do()
        return False

    return look


class AnswerTest(FaultTest):
    """What the tests here share."""

    def filtered(self, path: str, files: int, dropped: int) -> None:
        """A series of which the server's filter drops some files."""
        self.tree(path, files=files)
        subject, session, name = path.split("/")
        write_series(self.root / path, study=uid(subject, session), files=dropped,
                     number=int(name[-4:]), patient=subject, description=DROPPED)

    def forget_last_line(self, event: str) -> None:
        """What a SIGKILL between an answer and the ledger leaves behind."""
        *lines, last = self.ledger().read_bytes().splitlines(keepends=True)
        self.assertIn(f'"{event}"', last.decode())
        self.ledger().write_bytes(b"".join(lines))

    def touch(self, path: str) -> None:
        """Another time, the same bytes."""
        os.utime(str(self.root / path), ns=(10 ** 18, 10 ** 18))

    def stays_so(self, server: Standin, **call: Any) -> None:
        """The next run sends nothing, commits nothing and ends well."""
        self.run_it(server, status=0, posts=0, commits=0, **call)


# ---- Counts ----------------------------------------------------------------------------------

class Counts(AnswerTest):

    def test_a_series_added_to_a_session_under_review_is_counted_with_it(self) -> None:
        self.tree(A, files=10)
        with self.xnat() as server:
            self.run_it(server, status=0, posts=1, words="10 files verified", project="MANUAL")
            self.tree(B, files=8)
            self.run_it(server, status=0, posts=1, words="18 files verified", project="MANUAL")
            self.assert_whole(server, archived=False)

    def test_a_series_added_to_a_session_under_review_and_filtered_is_told_as_short(self) -> None:
        self.tree(A, files=10)
        with self.xnat(**FILTER) as server:
            self.run_it(server, status=0, posts=1, words="10 files verified", project="MANUAL")
            self.filtered(B, 8, dropped=5)
            short = r"\b13 files where 18 | Not there: 007_pre"
            self.run_it(server, status=1, posts=1, commits=1, words=short, project="MANUAL")
            self.run_it(server, status=1, posts=0, words=short, project="MANUAL")
            server.knobs.reject = ()
            self.run_it(server, "--again", status=0, posts=2, project="MANUAL")
            self.assert_whole(server, archived=False)

    def test_a_series_added_to_an_archived_session_and_filtered_is_told_as_short_when_overwriting(
            self) -> None:
        self.tree(A, files=10)
        with self.xnat(**FILTER) as server:
            self.run_it(server, status=0, posts=1, words="archived, 10 files verified")
            self.filtered(B, 8, dropped=5)
            short = r"\b13 files where 18 | Not there: 007_pre"
            self.run_it(server, "--overwrite-files", status=1, posts=1, commits=1, words=short)
            self.run_it(server, status=1, posts=0, commits=0, words=short)
            server.knobs.reject = ()
            self.run_it(server, "--again", "--overwrite-files", status=0, posts=2)
            self.assert_whole(server)

    def test_a_project_that_overwrites_takes_again_what_it_has_and_that_is_whole(self) -> None:
        self.tree()
        whole: Dict[str, Any] = {"status": 0, "commits": 1, "words": "archived, 4 files verified",
                                 "project": "OVER"}
        with self.xnat() as server:
            self.run_it(server, posts=2, **whole)
            self.ledger().unlink()
            self.run_it(server, posts=2, **whole)
            self.touch(f"{A}/IM0001.dcm")
            self.run_it(server, posts=1, **whole)
            self.assert_whole(server)
            self.stays_so(server, project="OVER")

    def test_a_commit_that_was_not_noted_is_recognized_also_where_images_lie_twice(self) -> None:
        self.tree(A, files=3)
        shutil.copytree(str(self.root / A), str(self.root / A / "copy"))
        with self.xnat() as server:
            self.run_it(server, status=0, posts=1, commits=1, words="3 files equal in name")
            self.forget_last_line("archived")
            self.run_it(server, status=0, posts=0, commits=0, words="007_pre +archived, 3 files")
            self.assertEqual(set(server.instances("007_pre").values()), {1})

    def test_a_short_session_whose_commit_was_not_answered_is_told_and_not_sent_again(self) -> None:
        self.tree(A)
        self.filtered(B, 4, dropped=2)
        short = r"\b4 files where 6 | Not there: 007_pre"
        with self.xnat(**FILTER) as server:
            server.fail("reset after", COMMIT)
            self.run_it(server, status=1, posts=2, commits=1, words=short)
            self.run_it(server, status=1, posts=0, commits=0, words=short)

    def test_a_short_session_whose_commit_was_not_noted_is_told_and_not_sent_again(self) -> None:
        self.tree(A)
        self.filtered(B, 4, dropped=2)
        short = r"\b4 files where 6 | Not there: 007_pre"
        with self.xnat(**FILTER) as server:
            self.run_it(server, status=1, posts=2, commits=1, words=short)
            self.forget_last_line("archived")
            self.run_it(server, status=1, posts=0, commits=0, words=short)

    def test_a_new_series_of_a_session_that_is_short_is_sent_nevertheless(self) -> None:
        self.filtered(A, 3, dropped=1)
        with self.xnat(**FILTER) as server:
            self.run_it(server, status=1, posts=1, commits=1, words=r"\b2 files where 3\b")
            self.tree(B)
            self.run_it(server, status=1, posts=1, commits=1, words=r"\b4 files where 5\b")
            self.assertEqual(self.statuses(), "already there, sent")
            self.assertEqual(len([each for each in server.archive["BRAIN", "007_pre"].files
                                  if each.description == "B_0002"]), 2)

    def test_names_that_xnat_makes_equal_are_told_as_equal(self) -> None:
        self.tree()
        first = self.root / A / "IM0001.dcm"
        (first.parent / "IM_1").write_bytes(first.read_bytes())
        first.rename(first.parent / "IM 1")
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2, commits=1,
                        words="1 file equal in name and image | archived, 4 files verified")


# ---- Sessions that go on living --------------------------------------------------------------

class SessionsThatGoOn(AnswerTest):

    def changed_while_held_back(self, change: Callable[[], None]) -> None:
        """A series is sent, and changes while another holds the session back."""
        self.tree(files=3)
        link = self.root / B / "gone.dcm"
        link.symlink_to("nowhere")
        with self.xnat() as server:
            self.run_it(server, status=1, posts=1, commits=0, words=HELD)
            change()
            link.unlink()
            self.run_it(server, status=0, posts=2, commits=1, words="007_pre +archived")
            self.assertEqual(server.prearchive, [])
            self.assertLessEqual(set(digests(self.root).values()), set(server.stored("007_pre")))
            self.assertEqual(set(server.instances("007_pre").values()), {1})
            self.stays_so(server)

    def test_a_series_touched_while_its_session_is_held_back_is_archived_with_it(self) -> None:
        self.changed_while_held_back(lambda: self.touch(f"{A}/IM0001.dcm"))

    def test_a_series_that_loses_a_file_while_held_back_is_archived_with_it(self) -> None:
        self.changed_while_held_back((self.root / A / "IM0001.dcm").unlink)

    def test_a_series_that_gains_a_file_while_held_back_is_archived_with_it(self) -> None:
        self.changed_while_held_back(lambda: self.tree(A, files=4))

    def begun_with_no_commit(self, server: Standin) -> None:
        """A session of three series, of which --no-commit has sent the first."""
        self.tree(A, B, C)
        server.fail("error page", IMPORT, status=400, text="no", skip=1, times=2)
        self.run_it(server, "--no-commit", "--procs", "1", status=1, posts=3, commits=0)
        self.assertEqual(self.statuses(), "sent, not sent, not sent")

    def timer(self, server: Standin) -> None:
        """XNAT's timer goes off."""
        server.knobs.idle_seconds = 0
        server.store.archive_idle()
        server.knobs.idle_seconds = 300

    def ends_whole(self, server: Standin, ran: Ran) -> None:
        """At the latest the next run has everything archived."""
        self.assertEqual([each.files for each in server.archived_by_idle], [2])
        self.assertNotIn("two studies", ran.text)
        if ran.status:
            self.run_it(server, status=0)
        self.assert_whole(server)

    def test_what_no_commit_began_and_the_timer_archives_between_two_runs_is_completed(
            self) -> None:
        with self.xnat() as server:
            self.begun_with_no_commit(server)
            self.timer(server)
            self.ends_whole(server, self.upload(server))

    def test_what_no_commit_began_and_the_timer_archives_during_a_run_is_not_two_studies(
            self) -> None:
        with self.xnat() as server:
            self.begun_with_no_commit(server)
            server.knobs.reject = once(lambda: self.timer(server), "B_0002")
            self.ends_whole(server, self.upload(server, "--procs", "1"))

    def test_two_series_that_meet_that_timer_side_by_side_are_not_two_studies_either(self) -> None:
        with self.xnat() as server:
            self.begun_with_no_commit(server)
            both = threading.Barrier(2, lambda: self.timer(server), 20)
            server.knobs.reject = once(both.wait, "B_0002", "C_0003")
            self.ends_whole(server, self.upload(server, "--procs", "4"))

    def left_for_review(self, server: Standin) -> Row:
        """A session that a run has left in the prearchive."""
        self.tree()
        self.run_it(server, status=0, posts=2, commits=1, words="for review", project="MANUAL")
        (row,) = server.prearchive
        return row

    def test_what_its_reviewer_has_archived_is_archived(self) -> None:
        with self.xnat() as server:
            server.store.commit(self.left_for_review(server), archive=True, overwrite=False)
            self.run_it(server, status=0, posts=0, commits=0, project="MANUAL",
                        words="007_pre +archived, 4 files verified")
            self.stays_so(server, project="MANUAL")
            self.assert_whole(server)

    def test_what_its_reviewer_has_deleted_is_told_and_sent_anew_with_again(self) -> None:
        with self.xnat() as server:
            server.store.remove(self.left_for_review(server))
            self.run_it(server, status=1, posts=0, commits=0, project="MANUAL",
                        words="Not there: 007_pre.*review.*--again")
            self.run_it(server, "--again", status=0, posts=2, commits=1, words="for review",
                        project="MANUAL")
            self.assert_whole(server, archived=False)

    def other_case(self, server: Standin) -> None:
        """XNAT has the subject `sub`, the tree `SUB`: XNAT keeps its own spelling."""
        self.tree("SUB/pre/A_0001")
        server.store.archive["BRAIN", "sub_old"] = Session("BRAIN", "sub_old", "sub", "1.2.3", 1)

    def in_other_case(self, server: Standin, files: int) -> None:
        """The session is archived whole, under the other spelling; and stays so."""
        session = server.archive["BRAIN", "SUB_pre"]
        self.assertEqual((session.subject, len(session.files)), ("sub", files))
        self.stays_so(server)

    def test_a_subject_whose_case_differs_in_xnat_is_archived_and_verified(self) -> None:
        with self.xnat() as server:
            self.other_case(server)
            self.run_it(server, status=0, posts=1, commits=1, words="archived, 2 files verified")
            self.tree("SUB/pre/B_0002")
            self.run_it(server, status=0, posts=1, commits=1, words="archived, 4 files verified")
            self.in_other_case(server, 4)

    def test_a_subject_whose_case_differs_in_xnat_is_found_when_the_commit_is_not_answered(
            self) -> None:
        with self.xnat() as server:
            self.other_case(server)
            server.fail("reset after", COMMIT)
            self.run_it(server, status=0, posts=1, commits=1, words="archived, 2 files verified")
            self.in_other_case(server, 2)

    def test_a_commit_answered_301_without_an_address_is_verified(self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("late status", COMMIT, status=301)
            self.run_it(server, status=0, posts=2, commits=1, words="archived, 4 files verified")
            self.assert_whole(server)

    def test_one_server_has_one_ledger_however_its_name_is_written(self) -> None:
        self.tree()
        with self.xnat(context_path="/Xnat") as server:
            for number, site in enumerate(("localhost:{}/Xnat", "LOCALHOST:{}/Xnat/")):
                with self.subTest(site):
                    ran = self.run_command(self.arguments("http://" + site.format(server.port)))
                    self.assertEqual(ran.status, 0, ran.text)
                    self.assertEqual(len(server.imports()), 2)
                    self.assertEqual("already there" in ran.out, number > 0, ran.out)

    @slow
    def test_a_commit_that_an_earlier_run_left_going_is_waited_for_and_that_is_said(self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("error page", COMMIT, status=500, text="no")
            self.run_it(server, status=1, posts=2, commits=1)
            (row,) = server.prearchive
            row.status = "_ARCHIVING"
            process = self.start(self.arguments(server.url))
            self.assertTrue(until(lambda: re.search("_ARCHIVING.*waiting", self.log()), 20))
            with server.changed:
                row.status = "READY"
                server.store.commit(row, archive=True, overwrite=False)
            out, err = process.communicate(timeout=30)
            self.assertEqual(process.returncode, 0, out + err)
            self.assertRegex(err, "dicomUpload: .*007_pre.*_ARCHIVING.*waiting")
            self.assertIn("archived, 4 files verified", out)
            self.assertEqual((len(server.imports()), len(server.commits())), (2, 1))
            self.assert_whole(server)


# ---- What is shown, and to whom --------------------------------------------------------------

class WhatIsShown(AnswerTest):

    def test_the_command_that_finishes_forgets_nothing_again_and_hides_the_password(self) -> None:
        self.tree()
        with self.xnat(users=[User("alice", "alice")]) as server:
            for options in ("--again",), ("--again", "--dry-run"):
                with self.subTest(options):
                    server.fail("error page", IMPORT, status=400, text="no")
                    ran = self.upload(server, *options, password="alice")
                    self.assertEqual(ran.status, int("--dry-run" not in options), ran.text)
                    found = re.search("(again to finish|To send): (.*)", ran.out)
                    self.assertIsNotNone(found, ran.out)
                    command = found[2] if found else ""
                    self.assertIn(f" {server.url} alice - BRAIN ", command)
                    self.assertNotIn("--again", command)
                    self.assertNotIn("--dry-run", command)

    def test_an_option_equal_to_login_or_password_is_not_taken_for_it_in_that_command(self) -> None:
        self.tree()
        python, script, url, *others = self.arguments("http://127.0.0.1:1", password="alice")
        for options in ("--logname", "alice"), ("--logname", "bob", "--only", "alice"):
            with self.subTest(options):
                ran = self.run_command([python, script, *options, url, *others, "--only", "007",
                                        "--dry-run"])
                self.assertEqual(ran.status, 0, ran.text)
                self.assertIn(f"{' '.join(options)} {url} alice - BRAIN ", ran.out)

    def test_while_it_sends_nobody_else_can_read_anything(self) -> None:
        self.tree()
        self.work.mkdir()
        modes: Dict[str, int] = {}

        def look() -> None:
            for path in self.work.rglob("*"):
                modes[path.suffix or path.name] = path.stat().st_mode & 0o77

        with self.xnat(reject=once(look, "B_0002")) as server:
            ran = self.upload(server, "--procs", "1", preexec=lambda: os.umask(0))
            self.assertEqual(ran.status, 0, ran.text)
        self.assertEqual(set(modes.values()), {0}, modes)
        self.assertLessEqual({".zip", ".zips", ".log", ".csv", ".ledger", ".lock"}, set(modes))

    def test_on_a_terminal_the_line_moves_within_a_series(self) -> None:
        self.tree(A, files=4)
        master, slave = self.terminal()
        with self.xnat(seconds_per_file=0.6) as server:
            process = self.start(self.arguments(server.url, "--max-files", "1"),
                                 {"TERM": "xterm"}, stderr=slave)
            os.close(slave)
            shown = shown_on(master)
            out, _ = process.communicate(timeout=30)
            self.assertEqual(process.returncode, 0, out)
            self.assertEqual(len(server.imports()), 4)
        within = re.findall(r"\[0 of 1 series[^]]*?  (\S+ \w+) of ", shown)
        self.assertGreaterEqual(len(set(within) - {"0 bytes"}), 2, shown)

    def test_the_end_of_input_instead_of_a_password_is_told(self) -> None:
        self.tree()
        master, slave = self.terminal()
        with self.xnat() as server:
            process = self.start(self.arguments(server.url, password="-"), stdin=slave,
                                 preexec_fn=take_terminal)
            os.close(slave)
            self.assertIn("alice", shown_on(master, b": "))
            os.write(master, b"\x04")
            out, err = process.communicate(timeout=30)
            self.assertEqual(process.returncode, 2, out + err)
            self.assertNotIn("Traceback", out + err)
            self.assertRegex(err, "dicomUpload: PASS -: .*XNAT_PASS")
            self.assertEqual(server.requests, [])

    def closed(self, url: str, how: str, **call: Any) -> Ran:
        """A run with some of its streams closed."""
        return self.run_command(["sh", "-c", f'exec "$@" {how}', "sh",
                                 *self.arguments(url, **call)])

    def test_closed_streams_stop_no_upload(self) -> None:
        for number, how in enumerate((">&-", "2>&-", "<&- >&- 2>&-")):
            with self.subTest(how), self.xnat() as server:
                self.tree(f"007/pre/A_{number:04}")
                ran = self.closed(server.url, how)
                self.assertEqual(ran.status, 0, ran.text)
                self.assert_whole(server)

    def test_without_an_input_to_ask_at_a_missing_password_is_told(self) -> None:
        self.tree()
        with self.xnat() as server:
            ran = self.closed(server.url, "<&-", password="-")
            self.assertEqual(ran.status, 2, ran.text)
            self.assertRegex(ran.err, "dicomUpload: PASS -: .*XNAT_PASS")

    def test_a_program_that_cannot_be_executed_is_named(self) -> None:
        self.tree()
        for bad in "curl", "zip":
            place = self.folder / f"no {bad}"
            place.mkdir()
            for tool in "curl", "zip", "sh":
                (place / tool).symlink_to(need(self, tool))
            (place / bad).unlink()
            (place / bad).write_bytes(b"\0\1\2 no program\n")
            (place / bad).chmod(0o755)
            with self.subTest(bad), self.xnat() as server:
                ran = self.upload(server, environment={"PATH": str(place)})
                self.assertEqual(ran.status, 3, ran.text)
                self.assertRegex(ran.err, rf"^dicomUpload: .*\b{bad}\b.*\(.+\): .+\n$")
                self.assertEqual(server.requests, [])

    def test_a_login_that_is_answered_with_megabytes_fails_in_a_sentence(self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("answer", LOGIN, status=200, body=b"A" * 5_000_000)
            self.run_it(server, status=3, posts=0, words=r"dicomUpload: http.*own address")
            self.assertLess(len(self.log()), 5000)
            self.assertEqual([each for each in server.requests if each.method == "GET"], [])


# ---- The ground giving way -------------------------------------------------------------------

class TheGroundGivingWay(RunningTest):

    def without_zips(self, status: int, statuses: str) -> None:
        """The folder for zips goes away while the first series is on its way."""
        self.tree()
        with self.xnat() as server:
            server.knobs.reject = once(
                lambda: shutil.rmtree(str(self.work / "dicomUpload.zips")), "A_0001")
            if "not sent" == statuses.split(", ")[0]:
                server.fail("late status", IMPORT, status=503)
            ran = self.run_it(server, "--procs", "1", status=status, commits=0,
                              words="Report: | Run the same command again")
            self.assertEqual(self.statuses(), statuses, ran.text)
            self.completes(server)

    def test_a_folder_for_zips_that_is_removed_costs_what_is_not_sent_yet(self) -> None:
        self.without_zips(1, "sent, not sent")

    def test_a_folder_for_zips_that_is_removed_before_a_retry_costs_that_series_too(self) -> None:
        self.without_zips(1, "not sent, not sent")

    def test_a_run_that_is_stopped_closes_its_server_session(self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("stall before", IMPORT, seconds=60)
            process = self.start(self.arguments(server.url))
            self.assertTrue(server.wait_for(server.imports, 30))
            process.send_signal(signal.SIGTERM)
            ran = self.ended(process)
            self.assertEqual(ran.status, 143, ran.text)
            last = server.requests[-1]
            self.assertEqual((last.method, last.path), ("DELETE", "/data/JSESSION"))
            self.assertEqual(server.accounts.sessions, {})


# ---- Parts that only compute -------------------------------------------------------------------

@contextlib.contextmanager
def no_inodes() -> Iterator[None]:
    """A file system that calls every file number 0, for dicomUpload's own look at them only."""
    def stat(path: str) -> Any:
        return types.SimpleNamespace(st_dev=0, st_ino=0)

    with mock.patch.object(dicomUpload, "os", types.SimpleNamespace(**dict(vars(os), stat=stat))):
        yield


class PartsThatOnlyCompute(unittest.TestCase):

    def test_thirty_retries_and_thousands_wait_no_longer_than_minutes_each(self) -> None:
        settings: Any = types.SimpleNamespace(project="BRAIN", overwrite_files=False, retries=9999)
        xnat = dicomUpload.Xnat(settings, mock.Mock(), mock.Mock())
        waits: List[float] = []
        with mock.patch.object(xnat, "pause", waits.append):
            for tries in (1, 2, 3, 30, 9999):
                xnat.wait_to_heal("007_pre", dicomUpload.Verdict(message="HTTP 503", wait=0), tries)
        self.assertEqual(waits[:3], sorted(waits[:3]), "they grow")
        self.assertLess(max(waits), 300)

    def test_subfolders_that_all_have_number_0_are_all_read(self) -> None:
        with tempfile.TemporaryDirectory(prefix="dicomUpload-test-") as folder:
            names = ["a", "b", "c/d", ""]
            for name in names:
                write_series(Path(folder, name), study=uid("study"), files=1)
            with no_inodes():
                files, junk, problems = dicomUpload.list_files(folder)
        self.assertEqual([name for name, _, _ in files],
                         sorted(os.path.join(name, "IM0001.dcm") for name in names))
        self.assertEqual((junk, problems), ([], []))


if __name__ == "__main__":
    unittest.main()
