"""From the last part to the last word: the commit, what the server counts, and sessions that go on
living through several runs.

What the program says is so: a session that is short is told as short, by every later run too, and
one that is whole is never called anything else.
"""

import os
import shutil
import threading
import unittest
from typing import Callable

from tests.dicom import digests, uid
from tests.faults import (AGAIN, BOTH, COMMIT, HEALING, HELD, JSON_PAGE, NEITHER, THERE, FaultTest,
                          Row, TableTest, add_rows, ever, import_by_hand, late, on, once, page,
                          proxy, rows_of)
from tests.support import load_tests as load_tests  # these mostly wait: several at a time
from tests.support import slow, variation
from tests.xnat_standin import Fault, Session, Standin
from tests.xnat_standin import Row as Waiting

LOGIN_VM = "http://127.0.0.1/app/template/Login.vm"
A, B, C = (f"007/pre/{name}" for name in ("A_0001", "B_0002", "C_0003"))


# ---- Answers to a commit ---------------------------------------------------------------------

REFUSAL = "FAILED: Unable to archive it: Operation Failed: "

COMMITS = [
    # done, whatever the answer was
    Row("the answer was lost", on(COMMIT, "reset after"), 2, 1, BOTH, 0, "archived, 4 files ver"),
    Row("the answer was cut", on(COMMIT, "truncate"), 2, 1, BOTH, 0, "archived, 4 files verified"),
    Row("done, then 502", late(502, COMMIT), 2, 1, BOTH, 0, "archived, 4 files"),
    Row("done, then 503", late(503, COMMIT), 2, 1, BOTH, 0, "archived, 4 files"),
    Row("done, then 504", late(504, COMMIT), 2, 1, BOTH, 0, "archived, 4 files"),
    Row("301 without an address", late(301, COMMIT), 2, 1, BOTH, 0, "archived, 4 files verified"),
    Row("queued, READY, and the answer lost", on(COMMIT, "queued", seconds=2), 2, 1, BOTH, 0,
        "archived, 4 files verified"),
    # not done, and done at the second try
    Row("not done, 502", proxy(502, COMMIT), 2, 2, BOTH, 0, AGAIN),
    Row("not done, 503", proxy(503, COMMIT), 2, 2, BOTH, 0, AGAIN),
    Row("not done, reset", on(COMMIT, "reset before"), 2, 2, BOTH, 0, AGAIN),
    Row("a locked session", page(409, "session document locked", where=COMMIT), 2, 2, BOTH, 0,
        AGAIN),
    *(Row(f"a {status} that says {text}", page(status, text, COMMIT), 2, 2, BOTH, 0, AGAIN)
      for status, text in ((400, HEALING[2]), (409, HEALING[1]), (423, HEALING[3]),
                           (500, REFUSAL + HEALING[4]))),
]

REFUSED = [
    Row("503 for good", ever(proxy(503, COMMIT)), 2, 2, BOTH, 1,
        "did not archive it .HTTP 503"),
    Row("busy for good", ever(page(500, HEALING[1], COMMIT)), 2, 2, BOTH, 1,
        f"did not archive it .HTTP 500, {HEALING[1]}"),
    Row("forbidden", page(403, "Forbidden", COMMIT), 2, 1, BOTH, 1, "HTTP 403"),
    Row("it fails", page(500, "boom", COMMIT), 2, 1, BOTH, 1, "HTTP 500, boom"),
    Row("an empty answer", on(COMMIT, "empty"), 2, 1, BOTH, 1, "HTTP 200"),
    Row("matching files", page(500, REFUSAL + "Session already exists with matching files.",
                               COMMIT), 2, 1, BOTH, 1, "matching files"),
]


def others_label(test: FaultTest, server: Standin) -> None:
    """The label is another subject's."""
    server.store.archive["BRAIN", "007_pre"] = Session("BRAIN", "007_pre", "someone",
                                                       uid("007", "pre"), 1)


def other_study(test: FaultTest, server: Standin) -> None:
    """The label holds another study."""
    server.store.archive["BRAIN", "007_pre"] = Session("BRAIN", "007_pre", "007", "1.2.3", 1)


def others_label_meanwhile(test: FaultTest, server: Standin) -> None:
    """The label becomes another subject's while we send."""
    server.knobs.reject = once(lambda: others_label(test, server), "B_0002")


def other_study_meanwhile(test: FaultTest, server: Standin) -> None:
    """Another study comes under the label while we send."""
    server.knobs.reject = once(lambda: other_study(test, server), "B_0002")


def row_deleted_at_commit(test: FaultTest, server: Standin) -> None:
    """Somebody deletes the session while its commit is on the way."""
    def delete() -> None:
        if server.wait_for(server.commits):
            for row in server.prearchive:
                server.store.remove(row)

    server.fail("stall before", COMMIT, seconds=1)
    threading.Thread(target=delete, daemon=True).start()


def empty_archive(test: FaultTest, server: Standin) -> None:
    """Somebody has removed what stood in the way."""
    server.store.archive.clear()


def already_there(test: FaultTest, server: Standin) -> None:
    """Somebody else has sent and archived the same images."""
    ran = test.upload(server, "--workdir", str(test.folder / "elsewhere"))
    test.assertEqual(ran.status, 0, ran.text)


def already_there_renamed(test: FaultTest, server: Standin) -> None:
    """The same images, under other file names."""
    already_there(test, server)
    for path in sorted(test.root.rglob("*.dcm")):
        path.rename(path.with_name("X" + path.name))


def says_the_same(test: FaultTest, server: Standin) -> None:
    """A surplus is a word, no failure, and the next run says nothing else."""
    test.stays_so(server)
    test.run_it(server, "--dry-run", status=0)


def stays_hidden(test: FaultTest, server: Standin) -> None:
    """What is archived and not shown is not sent again."""
    test.run_it(server, status=1, posts=0, commits=0, words="XNAT does not show it to alice")


def counted(scan: int, files: int) -> Fault:
    """The server counts so many files in one of the two scans."""
    body = rows_of(*({"label": "DICOM", "cat_id": str(number),
                      "file_count": str(files if number == scan else 2)} for number in (1, 2)))
    return Fault("answer", "scans/ALL/resources", status=200, body=body, headers=JSON_PAGE,
                 times=None)


MANUAL = {"call": {"project": "MANUAL"}, "archived": False}
NO_LISTS = {"refuse_lists": ("archive", "prearchive")}
ONE = r"GET .*/experiments/007_pre"
COUNT = ONE + "/scans"

ROWS = [
    # -- commit                            posts, commits, report, exit status, words
    Row("a project for review", None, 2, 1, BOTH, 0, "in the prearchive", **MANUAL),
    Row("a commit for review whose answer was lost", on(COMMIT, "reset after"), 2, 2, BOTH, 0,
        "in the prearchive", waits=True, **MANUAL),
    Row("--review leaves it to a person", None, 2, 0, BOTH, 0, "in the prearchive.*4 files",
        options="--review", archived=False),
    Row("a commit whose session was deleted", None, 2, 1, BOTH, 1, "no longer|gone|deleted",
        before=row_deleted_at_commit),
    Row("a commit that goes on after 504", on(COMMIT, "background"), 2, 1, BOTH, 0,
        "archived, 4 files", knobs={"build_delay": 0.5, "archive_seconds": 1}, beside=True),
    Row("a commit that takes longer than XNAT waits", None, 2, 1, BOTH, 0, "archived, 4 files",
        knobs={"archive_timeout": 0.3, "archive_seconds": 1.5}, waits=True),
    Row("a server session that expires before its commit", on(COMMIT, "drop sessions"), 2, 1, BOTH,
        0, "archived, 4 files verified"),
    Row("a commit that is a login page", on(COMMIT, "login page"), 2, 1, BOTH, 3, "login"),
    Row("a commit with the login refused", page(401, where=COMMIT), 2, 1, BOTH, 3,
        "login refused", beside=True),
    Row("a commit that is redirected", on(COMMIT, "redirect", location=LOGIN_VM), 2, 1, BOTH, 3,
        "redirect|login", beside=True),
    Row("a label that a rule of the site would change", None, 2, 1, BOTH, 0,
        "archived, 4 files verified", knobs={"label_rule": "other"}),
    Row("an archive under another label", on(
        COMMIT, "answer", status=301, body=b"/data/archive/projects/BRAIN/subjects/007/"
        b"experiments/other"), 2, 1, BOTH, 1,
        "archived it under another label .*/other. | look there"),
    # -- what the archive holds already
    Row("the same images", None, 0, 0, THERE, 0, "already there, 4 files", before=already_there,
        beside=True),
    Row("the same images by other names", None, 0, 0, THERE, 0, "already there, 4 files",
        before=already_there_renamed, beside=True),
    Row("the same images with --overwrite-files", None, 0, 0, THERE, 0, "already there, 4 files",
        before=already_there, options="--overwrite-files", beside=True),
    Row("a label of another study", None, 0, 0, NEITHER, 1, "another study.*1.2.3 | rename",
        before=other_study, mend=empty_archive),
    Row("a label of another subject", None, 0, 0, NEITHER, 1, "under subject someone | rename",
        before=others_label, mend=empty_archive),
    Row("a label of another study that no list tells", None, 0, 0, NEITHER, 1,
        "another study.*1.2.3 | rename", before=other_study, mend=empty_archive, knobs=NO_LISTS,
        beside=True),
    Row("a label of another subject that no list tells", None, 0, 0, NEITHER, 1,
        "under subject someone | rename", before=others_label, mend=empty_archive, knobs=NO_LISTS,
        beside=True),
    Row("another subject that comes while we send", None, 2, 1, BOTH, 1,
        "another Subject | rename", before=others_label_meanwhile, mend=empty_archive),
    Row("a conflict whose answer was lost", on(COMMIT, "reset after"), 2, 2, BOTH, 1,
        "another Subject | rename", before=others_label_meanwhile, mend=empty_archive,
        beside=True),
    Row("another study that comes while we send", None, 2, 1, BOTH, 1, "session UID | rename",
        before=other_study_meanwhile, mend=empty_archive),
    Row("another study that comes while we send, 1.7.5", None, 2, 1, BOTH, 1,
        "HTTP 409.*session UID | rename", before=other_study_meanwhile, mend=empty_archive,
        knobs={"version": "1.7.5"}, beside=True),
    # -- verification
    Row("fewer files than sent", counted(1, 1), 2, 1, BOTH, 1,
        r"A_0001.*\b1 files? where 2\b"),
    Row("more files than sent", counted(2, 7), 2, 1, BOTH, 0,
        "7 files where.* 2\\b | archived, 4 files verified", more=says_the_same),
    Row("counts that come late", proxy(503, "scans/1/resources"), 2, 1, BOTH, 0,
        f"{AGAIN} | 4 files verified", knobs={"all_scans": False}, beside=True),
    Row("counts that cannot be read", ever(page(500, "boom", where="scans/1/resources")), 2, 1,
        BOTH, 1, "HTTP 500, boom", knobs={"all_scans": False}),
    Row("a server that does not know ALL", None, 2, 1, BOTH, 0, "archived, 4 files verified",
        knobs={"all_scans": False}, beside=True),
    Row("a server that forgets one of ALL", ever(on(
        "scans/ALL/resources", "answer", status=200, headers=JSON_PAGE,
        body=rows_of({"label": "DICOM", "cat_id": "1", "file_count": "2"}))), 2, 1, BOTH, 0,
        "archived, 4 files verified"),
    Row("a server that keeps no statistics", None, 2, 1, BOTH, 0, "archived, 4 files verified",
        knobs={"statistics": "never"}),
    Row("scans that come late", proxy(503, COUNT, times=3), 2, 1, BOTH, 0,
        f"{AGAIN} | archived, 4 files verified", options="--retries 2", beside=True),
    Row("scans that are a web page", ever(on(
        "007_pre/scans", "answer", status=200, body=b"<html><h1>Maintenance</h1></html>",
        headers=(("Content-Type", "text/html"),))), 0, 0, NEITHER, 1,
        "cannot be read .HTTP 200, a web page. | XNAT's own address", before=already_there),
    Row("scans that are XHTML", ever(on(
        "007_pre/scans", "answer", status=200,
        body=b"<?xml version='1.0'?>\n<!DOCTYPE html><html><h1>Maintenance</h1></html>")), 0, 0,
        NEITHER, 1, "cannot be read .HTTP 200, a web page", before=already_there, beside=True),
    Row("a session in quarantine", ever(page(404, "Not there", where=ONE)), 2, 1, BOTH, 1,
        "it is archived, but XNAT does not show it to alice .HTTP 404.* | the project's owner",
        more=stays_hidden),
    Row("counts nested without end", ever(on(  # once it was a stack too small for Python 3.13
        "scans/ALL/resources", "answer", status=200, body=b'[{"a":' * 5000, headers=JSON_PAGE)), 2,
        1, BOTH, 0, "archived, 4 files verified", beside=True),
    Row("counts that were stored earlier", None, 2, 1, BOTH, 0, "archived, 4 files verified",
        knobs={"stored_count": 1}),
    Row("a count of nothing where there are names", counted(1, 0), 2, 1, BOTH, 0,
        "archived, 4 files verified"),
    Row("snapshots are no images", None, 2, 1, BOTH, 0, "archived, 4 files verified",
        knobs={"snapshots": True}, beside=True),
]


class Answers(TableTest):

    @slow
    def test_what_a_commit_has_done_is_found_out_and_what_it_has_not_is_done_once(self) -> None:
        self.play_together(COMMITS)

    @variation
    def test_a_commit_that_is_refused_is_told_and_tried_by_the_next_run(self) -> None:
        self.play_together(REFUSED)


add_rows(Answers, ROWS)


# ---- Counts ----------------------------------------------------------------------------------

DROPPED = "DROPPED"  # the description of what the server's filter throws away
FILTER = {"reject": (DROPPED,)}
SHORT = r"B_0002.*\b2 files where 4\b | Failed .1"


class Counts(FaultTest):

    def filtered(self, path: str, files: int, dropped: int) -> None:
        """A series of which the server's filter drops the first files."""
        self.tree(path, files=files)
        self.tree(path, files=dropped, description=DROPPED)

    def forget_last_line(self, event: str) -> None:
        """What a SIGKILL between an answer and the ledger leaves behind."""
        *lines, last = self.ledger().read_bytes().splitlines(keepends=True)
        self.assertIn(f'"{event}"', last.decode())
        self.ledger().write_bytes(b"".join(lines))

    @variation
    def test_a_series_added_to_a_session_under_review_is_counted_with_it(self) -> None:
        self.tree(A)
        with self.xnat() as server:
            self.run_it(server, status=0, posts=1, words="2 files verified", project="MANUAL")
            self.tree(B, files=3)
            self.run_it(server, status=0, posts=1, words="5 files verified", project="MANUAL")
            self.assert_whole(server, archived=False)

    def test_a_series_that_is_short_is_told_with_both_numbers_by_every_run(self) -> None:
        self.tree(A)
        self.filtered(B, 4, dropped=2)
        with self.xnat(**FILTER) as server:
            self.run_it(server, status=1, posts=2, commits=1, words=SHORT)
            for _ in range(2):  # what is missing goes again, and is dropped again
                self.run_it(server, status=1, posts=1, words="B_0002 | Failed .1")
            server.knobs.reject = ()
            self.run_it(server, status=0, posts=1, commits=1, words="archived, 6 files verified")
            self.assert_whole(server)
            self.stays_so(server)

    @variation
    def test_a_series_that_is_short_is_told_where_the_answer_to_the_commit_was_lost(self) -> None:
        self.tree(A)
        self.filtered(B, 4, dropped=2)
        with self.xnat(**FILTER) as server:
            server.fail("reset after", COMMIT)
            self.run_it(server, status=1, posts=2, commits=1, words=SHORT)

    @variation
    def test_a_series_that_is_short_is_told_where_the_commit_was_not_noted(self) -> None:
        self.tree(A)
        self.filtered(B, 4, dropped=2)
        with self.xnat(**FILTER) as server:
            self.run_it(server, status=1, posts=2, commits=1, words=SHORT)
            self.forget_last_line("ended")
            self.run_it(server, status=1, words="B_0002 | Failed .1")

    def test_a_series_that_is_short_is_told_in_a_session_under_review(self) -> None:
        self.tree(A)
        with self.xnat(**FILTER) as server:
            self.run_it(server, status=0, posts=1, words="2 files verified", project="MANUAL")
            self.filtered(B, 4, dropped=2)
            self.run_it(server, status=1, posts=1, commits=1, words=SHORT, project="MANUAL")
            self.run_it(server, status=1, words="B_0002 | Failed .1", project="MANUAL")
            server.knobs.reject = ()
            self.run_it(server, "--again", status=0, posts=2, project="MANUAL")
            self.assert_whole(server, archived=False)

    @variation
    def test_a_series_that_is_short_is_told_when_overwriting(self) -> None:
        self.tree(A)
        with self.xnat(**FILTER) as server:
            self.run_it(server, status=0, posts=1, words="archived, 2 files verified")
            self.filtered(B, 4, dropped=2)
            self.run_it(server, "--overwrite-files", status=1, posts=1, commits=1, words=SHORT)
            server.knobs.reject = ()
            self.run_it(server, "--again", "--overwrite-files", status=0, posts=2)
            self.assert_whole(server)

    @variation
    def test_a_new_series_of_a_session_that_is_short_is_sent_and_archived_in_the_end(self) -> None:
        self.filtered(A, 3, dropped=1)
        with self.xnat(**FILTER) as server:
            self.run_it(server, status=1, posts=1, commits=1, words=r"\b2 files where 3\b")
            self.tree(B)
            self.run_it(server, "--procs", "1", status=1, posts=2, words="A_0001 | Failed .1")
            server.knobs.reject = ()
            self.run_it(server, status=0, commits=1)
            self.assert_whole(server)

    @variation
    def test_a_project_that_overwrites_is_not_sent_what_it_has(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, posts=2, commits=1, words="archived, 4 files", project="OVER")
            self.ledger().unlink()
            self.stays_so(server, project="OVER")
            os.utime(str(self.root / A / "IM0001.dcm"), ns=(10 ** 18, 10 ** 18))
            self.stays_so(server, project="OVER")
            self.assert_whole(server)

    @variation
    def test_a_commit_that_was_not_noted_is_recognized_also_where_images_lie_twice(self) -> None:
        self.tree(A, files=3)
        shutil.copytree(str(self.root / A), str(self.root / A / "copy"))
        with self.xnat() as server:
            self.run_it(server, status=0, posts=1, commits=1, words="3 cop(y|ies)")
            self.forget_last_line("ended")
            self.run_it(server, status=0, posts=0, commits=0, words="007_pre +already there, 3")
            self.assertEqual(set(server.instances("007_pre").values()), {1})

    def test_names_that_xnat_makes_equal_are_all_kept(self) -> None:
        self.tree()
        first = self.root / A
        (first / "IM0001.dcm").rename(first / "IM 1")
        (first / "IM0002.dcm").rename(first / "IM_1")
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2, commits=1, words="archived, 4 files verified")
            self.assert_whole(server)
            self.stays_so(server)
            self.ledger().unlink()
            self.stays_so(server)

    @variation
    def test_where_a_script_changes_the_uids_the_total_is_counted(self) -> None:
        self.tree()
        for script in "site_script", "project_script":
            with self.subTest(script), self.xnat(**{script: ("uids", "sizes")}) as server:
                self.run_it(server, "--again", status=0, posts=2, commits=1,
                            words="archived, 4 files verified")
                self.stays_so(server)
                self.assertEqual(len(server.stored("007_pre")), 4)
                shutil.rmtree(str(self.work))

    def test_where_a_script_changes_the_uids_too_few_is_told_all_the_same(self) -> None:
        self.tree(A)
        self.filtered(B, 4, dropped=2)
        with self.xnat(project_script=("uids",), **FILTER) as server:
            self.run_it(server, status=1, posts=2, commits=1, words=r"\b4 files where 6\b")


# ---- Sessions that go on living --------------------------------------------------------------

class SessionsThatGoOn(FaultTest):

    def touch(self, path: str) -> None:
        """Another time, the same bytes."""
        os.utime(str(self.root / path), ns=(10 ** 18, 10 ** 18))

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

    @variation
    def test_a_series_touched_while_its_session_is_held_back_is_archived_with_it(self) -> None:
        self.changed_while_held_back(lambda: self.touch(f"{A}/IM0001.dcm"))

    @variation
    def test_a_series_that_loses_a_file_while_held_back_is_archived_with_it(self) -> None:
        self.changed_while_held_back((self.root / A / "IM0001.dcm").unlink)

    @variation
    def test_a_series_that_gains_a_file_while_held_back_is_archived_with_it(self) -> None:
        self.changed_while_held_back(lambda: self.tree(A, files=4))

    @variation
    def test_a_series_whose_images_change_while_held_back_is_archived_as_it_is_now(self) -> None:
        self.changed_while_held_back(lambda: self.tree(A, files=3, rows=24))

    @variation
    def test_a_series_that_was_a_then_b_then_a_again_is_not_called_there(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2, commits=1)
            for rows, posts in ((24, 1), (16, 1)):
                self.tree(A, rows=rows)
                self.run_it(server, status=1, posts=0, words="A_0001.*changed | --overwrite-files")
                self.run_it(server, "--overwrite-files", status=0, posts=posts, commits=1)
                self.assert_whole(server)
                self.stays_so(server)

    @variation
    def test_a_series_that_others_archived_is_merged_with_and_only_ours_is_counted(self) -> None:
        self.tree(C, files=3)
        with self.xnat() as server:
            self.run_it(server, "--workdir", str(self.folder / "elsewhere"), status=0)
            self.tree()
            self.run_it(server, *self.without("C_0003"), status=0, posts=2, commits=1,
                        words="archived, 4 files verified")
            self.assert_whole(server)

    # What waits in the prearchive, and who sent it.

    def left_by_others(self, server: Standin, *faults: Fault) -> None:
        """A run whose workdir is lost leaves a session in the prearchive."""
        for fault in faults:
            server.faults.append(fault)
        self.run_it(server, "--workdir", str(self.folder / "elsewhere"), "--procs", "1",
                    "--retries", "0", status=1, commits=len(faults) - 1 or -1)
        server.faults.clear()

    def test_a_session_that_others_left_receiving_is_joined_and_committed_once(self) -> None:
        self.tree(A, B, C)
        with self.xnat() as server:
            self.left_by_others(server, page(400, "no", skip=1))
            self.assertEqual([row.status for row in server.prearchive], ["RECEIVING"])
            self.run_it(server, "--dry-run", status=1, posts=0,
                        words="007_pre: waits in the prearchive .*shows when it is sent")
            self.run_it(server, "--procs", "1", status=0, posts=1, commits=1,
                        words="archived, 6 files verified")
            self.assertEqual(self.statuses(), "already there, sent, already there")
            self.assert_whole(server)
            self.stays_so(server)

    @variation
    def test_a_session_that_others_left_built_or_refused_is_committed_as_it_is(self) -> None:
        self.tree()
        for status in "READY", "ERROR", "CONFLICT":
            with self.subTest(status), self.xnat() as server:
                server.fail("error page", COMMIT, status=500, text="no")
                self.run_it(server, "--workdir", str(self.folder / status), status=1, posts=2)
                server.store.build(server.prearchive[0])
                server.prearchive[0].status = status
                self.run_it(server, "--procs", "1", status=0, posts=0,
                            commits=1, words="archived, 4 files verified")
                self.assert_whole(server)
                shutil.rmtree(str(self.work))

    @variation
    def test_a_series_that_others_left_in_the_prearchive_is_archived_with_ours(self) -> None:
        self.tree(C, files=3)
        with self.xnat() as server:
            self.left_by_others(server, page(500, "no", COMMIT))
            self.tree()
            config = self.without("C_0003")
            self.run_it(server, *config, status=0, posts=2, commits=1,
                        words="archived, 4 files verified")
            self.stays_so(server, *config)
            self.assert_whole(server)

    @variation
    def test_what_lands_beside_an_archived_session_is_named_and_left_alone(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2, commits=1)
            import_by_hand(server, self.root / A / "IM0001.dcm")  # one whose curl was killed
            (row,) = server.prearchive
            self.run_it(server, status=0, posts=0, commits=0,
                        words=f"{row.timestamp}/007_pre.*beside its archived session")
            self.assertEqual(server.prearchive, [row])
            self.assertEqual(len(server.archive["BRAIN", "007_pre"].files), 4)

    def test_a_row_that_another_subject_got_under_our_label_meanwhile_is_not_archived(self) -> None:
        self.tree()
        other = self.root / B / "IM0001.dcm"
        with self.xnat(reject=once(lambda: import_by_hand(server, other, subject="008"),
                                   "A_0001")) as server:
            self.run_it(server, "--procs", "1", status=1, posts=3, commits=0,
                        words="under subject 008, here it is subject 007 | or delete that")
            self.assertEqual(server.archive, {})

    # What a person does meanwhile.

    def left_for_review(self, server: Standin) -> Waiting:
        """A session that a run has left in the prearchive."""
        self.tree()
        self.run_it(server, status=0, posts=2, commits=1, words="for review", project="MANUAL")
        (row,) = server.prearchive
        return row

    @variation
    def test_what_its_reviewer_has_archived_is_archived(self) -> None:
        with self.xnat() as server:
            server.store.commit(self.left_for_review(server), archive=True, overwrite=False)
            self.run_it(server, status=0, posts=0, commits=0, project="MANUAL",
                        words="007_pre +(archived|already there), 4 files")
            self.stays_so(server, project="MANUAL")
            self.assert_whole(server)

    def test_what_its_reviewer_has_deleted_is_told_and_sent_anew_with_again(self) -> None:
        with self.xnat() as server:
            server.store.remove(self.left_for_review(server))
            self.run_it(server, status=1, posts=0, commits=0, project="MANUAL",
                        words="Failed .1 | 007_pre.*review | --again")
            self.run_it(server, "--again", status=0, posts=2, commits=1, words="for review",
                        project="MANUAL")
            self.assert_whole(server, archived=False)

    @variation
    def test_what_somebody_has_deleted_from_the_archive_is_told_and_sent_anew_with_again(
            self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2)
            server.store.archive.clear()
            for _ in range(2):
                self.run_it(server, status=1, posts=0, commits=0,
                            words="Failed .1 | 007_pre.*not there any more | "
                                  "--again.*--only 007/pre")
            self.run_it(server, "--again", "--only", "007/pre", status=0, posts=2, commits=1)
            self.assert_whole(server)

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

    @variation
    def test_a_subject_whose_case_differs_in_xnat_is_found_when_the_commit_is_not_answered(
            self) -> None:
        with self.xnat() as server:
            self.other_case(server)
            server.fail("reset after", COMMIT)
            self.run_it(server, status=0, posts=1, commits=1, words="archived, 2 files verified")
            self.in_other_case(server, 2)

    @slow
    def test_a_commit_that_an_earlier_run_left_going_is_waited_for_and_that_is_said(self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("error page", COMMIT, status=500, text="no")
            self.run_it(server, status=1, posts=2, commits=1)
            (row,) = server.prearchive
            row.status = "QUEUED_ARCHIVING"
            looks = len(server.requests)

            def looked(times: int = 3) -> bool:
                return len([each for each in server.requests[looks:] if each.answered
                            and each.path.endswith("/007_pre") and each.method == "GET"]) >= times

            self.tree(C)  # not a byte of it may go while that goes on
            process = self.start(self.arguments(server.url))
            self.assertTrue(server.wait_for(lambda: looked(1), 30))
            row.status = "_ARCHIVING"
            self.assertTrue(server.wait_for(looked, 30))
            self.assertEqual((len(server.imports()), len(server.commits())), (2, 1))
            with server.changed:
                row.status = "READY"
                server.store.commit(row, archive=True, overwrite=False)
            out, err = process.communicate(timeout=60)
            self.assertEqual(process.returncode, 0, out + err)
            self.assertRegex(err, "dicomUpload: .*007_pre.*_ARCHIVING.*waiting")
            self.assertRegex(out, "007_pre +archived, 6 files verified")
            self.assertEqual((len(server.imports()), len(server.commits())), (3, 2), out + err)
            self.assert_whole(server)


if __name__ == "__main__":
    unittest.main()
