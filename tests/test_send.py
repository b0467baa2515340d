"""A part on its way to XNAT: what the program does about every answer to an import there is.

And what many sessions do to each other: side by side, one after another, all refused alike.
"""

import contextlib
import os
import shutil
import signal
import threading
import time
import types
import unittest
from collections import Counter
from typing import Any, Callable, List, Tuple
from unittest import mock

import dicomUpload
from tests.dicom import digests, uid, write_series
from tests.faults import (AGAIN, BOTH, BUILD, FIRST, HEALING, HELD, IMPORT, NEITHER, SECOND,
                          FaultTest, Row, TableTest, add_rows, ever, late, on, once, overlap, page,
                          proxy)
from tests.running import RunningTest, until
from tests.support import load_tests as load_tests  # these mostly wait: several at a time
from tests.support import cases, slow, variation
from tests.xnat_standin import Fault, Standin

LOGIN_VM = "http://127.0.0.1/app/template/Login.vm"
EXPIRED_VM = "http://127.0.0.1/app/template/XDATScreen_UpdateUser.vm"
ELSEWHERE = "/data/prearchive/projects/BRAIN/20200102_101500000/"


# ---- Answers ---------------------------------------------------------------------------------

# Each row: the fault, POSTs, commits, what the report says, exit status, words.

FOR_GOOD = [
    Row("no fault at all", None, 2, 1, BOTH, 0, "archived, 4 files verified"),
    Row("a 400 is for good", page(400, "no room at the inn"), 2, 0, SECOND, 1,
        f"HTTP 400, no room at the inn | {HELD}"),
    Row("a 403 is for good", page(403, "Forbidden"), 2, 0, SECOND, 1,
        r"HTTP 403, Forbidden\) | right to edit"),
    Row("a 404 is for good", page(404, "Unknown importer"), 2, 0, SECOND, 1, "Unknown importer",
        beside=True),
    Row("a 413 is for good", proxy(413), 2, 0, SECOND, 1, "client_max_body_size"),
    Row("a 413 before the body is read", on(IMPORT, "early status", status=413), 2, 0, SECOND, 1,
        "client_max_body_size"),
    Row("a 500 is for good", page(500, "NullPointerException"), 2, 0, SECOND, 1,
        r"HTTP 500, NullPointerException\)"),
    Row("a full disk of XNAT", on(IMPORT, "disk full", entry=2), 2, 0, SECOND, 1,
        "unable to read DICOM object | disk is full"),
    Row("an answer that is not HTTP", on(IMPORT, "garbage"), 2, 0, SECOND, 1, "curl exit 1"),
    # 200 that is no success
    Row("an empty 200", on(IMPORT, "empty"), 2, 0, SECOND, 1, "kept none of these files"),
    Row("another web page", on(IMPORT, "answer", status=200, body=b"<html>Maintenance</html>",
                               headers=(("Content-Type", "text/html"),)), 2, 0, SECOND, 1,
        "web page", beside=True),
    Row("a 200 that is no address", on(IMPORT, "answer", status=200, body=b"OK"), 2, 0, SECOND, 1,
        "no address"),
    Row("another session", on(IMPORT, "answer", status=200, body=(
        ELSEWHERE + "another\r\n").encode()), 2, 0, SECOND, 1, "another session"),
    Row("a second address", on(IMPORT, "extra line", text=ELSEWHERE + "LABEL"), 2, 0, SECOND, 1,
        "another session.*/2020.*_pre, /.*_pre"),
    # heals, but not in time
    Row("a 400 that could heal but does not", ever(page(400, HEALING[0])), 4, 0, NEITHER, 1,
        f"{AGAIN} | Concurrent file sends"),
    Row("a 429 without end", ever(proxy(429)), 4, 0, NEITHER, 1, f"{AGAIN} | HTTP 429",
        beside=True),
    Row("imports that are 503 for good while the rest answers", ever(proxy(503)), 4, 0, NEITHER, 1,
        "HTTP 503"),
]

HEALS = [
    *(Row(f"a {status} that says {text}", page(status, text), 3, 1, BOTH, 0, AGAIN,
          beside=text != HEALING[1])
      for status, text in ((400, HEALING[0]), (400, HEALING[1]), (400, HEALING[2]),
                           (409, HEALING[3]), (423, HEALING[4]), (500, HEALING[1]))),
    Row("a 408", proxy(408), 3, 1, BOTH, 0, AGAIN, beside=True),
    Row("a 429", proxy(429), 3, 1, BOTH, 0, AGAIN),
    Row("a 429 whose Retry-After is a date", proxy(
        429, retry_after="Wed, 21 Oct 2015 07:28:00 GMT"), 3, 1, BOTH, 0, AGAIN),
    Row("a 502", proxy(502), 3, 1, BOTH, 0, AGAIN, beside=True),
    Row("a 503", proxy(503), 3, 1, BOTH, 0, AGAIN),
    Row("a 504", proxy(504), 3, 1, BOTH, 0, AGAIN),
    Row("a 502 after the import", late(502), 3, 1, BOTH, 0, AGAIN, beside=True),
    Row("a 504 after the import", late(504), 3, 1, BOTH, 0, AGAIN),
]

BROKEN = [
    Row("a 504 while the import goes on", on(IMPORT, "background"), 3, 1, BOTH, 0, AGAIN),
    Row("a 408 while the import goes on", on(IMPORT, "background", status=408), 3, 1, BOTH, 0,
        AGAIN, beside=True),
    Row("a reset before the body", on(IMPORT, "reset before"), 3, 1, BOTH, 0, AGAIN, beside=True),
    Row("a reset during the body", on(IMPORT, "reset during", after_bytes=500), 3, 1, BOTH, 0,
        AGAIN),
    Row("a reset after the import", on(IMPORT, "reset after"), 3, 1, BOTH, 0, AGAIN),
    Row("a hang-up without an answer", on(IMPORT, "close"), 3, 1, BOTH, 0, AGAIN),
    Row("a hang-up after the import", on(IMPORT, "close after"), 3, 1, BOTH, 0, AGAIN, beside=True),
    Row("an answer cut in half", on(IMPORT, "truncate"), 3, 1, BOTH, 0, AGAIN),
]

SILENT = [
    Row("silence before the body", on(IMPORT, "stall before", seconds=60), 3, 1, BOTH, 0,
        f"went silent | {AGAIN}"),
    Row("silence after the import", on(IMPORT, "stall", seconds=60), 3, 1, BOTH, 0,
        f"went silent | {AGAIN}"),
]

NO_H3 = [
    Row("a 400 without a heading", page(400, "no room at the inn"), 2, 0, SECOND, 1,
        r"HTTP 400, no room at the inn\)"),
    Row("a 400 without a heading that heals", page(400, HEALING[0]), 3, 1, BOTH, 0,
        f"HTTP 400, {HEALING[0]}.; {AGAIN}"),
    Row("a commit without a heading", page(500, "boom", where="action=commit"), 2, 1, BOTH, 1,
        "HTTP 500, boom;"),
]


def stops_asking(test: FaultTest, server: Standin) -> None:
    """After a refused login only the farewell may come."""
    after = [each for each in server.requests if each.number > server.imports()[-1].number]
    test.assertEqual([each.method for each in after if each.method != "DELETE"], [])


def waited(seconds: float) -> Callable[[FaultTest, Standin], None]:
    def check(test: FaultTest, server: Standin) -> None:
        first, second = server.imports()[:2]
        test.assertGreaterEqual(second.started - float(first.answered or 0), seconds)

    return check


def enable_alice(test: FaultTest, server: Standin) -> None:
    server.accounts.users["alice"].disabled = False


ALONE = [
    # what stops the run at once
    Row("a 401 stops the run", page(401, "no"), 1, 0, NEITHER, 3,
        r"login refused \(HTTP 401, no\): check USER",
        more=stops_asking, beside=True),
    Row("a login page stops the run", on(IMPORT, "login page"), 1, 0, NEITHER, 3, "login",
        more=stops_asking),
    Row("another project stops the run", on(IMPORT, "other project"), 1, 0, NEITHER, 3,
        "project OTHER"),
    Row("an alias's other project", on(IMPORT, "other project", text="Unassigned"), 1, 0, NEITHER,
        3, "Unassigned", beside=True),
    Row("a redirect to the login", on(IMPORT, "redirect", location=LOGIN_VM), 1, 0, NEITHER, 3,
        "login refused", more=stops_asking, beside=True),
    Row("a redirect to the expired password", on(IMPORT, "redirect", location=EXPIRED_VM), 1, 0,
        NEITHER, 3, "expired", more=stops_asking, beside=True),
    Row("a redirect without a host", on(IMPORT, "redirect", location="/my.policy"), 1, 0, NEITHER,
        3, r"a second login stands .*\(HTTP 302, to http://127[^@]*/my\.policy\)"),
    Row("a redirect to https", on(IMPORT, "redirect", status=301, location="https://127.0.0.1/x"),
        1, 0, NEITHER, 3, r"another address \(HTTP 301, to https://127.0.0.1/x\): give that",
        more=stops_asking, beside=True),
    Row("an account disabled in the middle", on(IMPORT, "disable account", skip=1), 2, 0, FIRST, 3,
        "login refused", mend=enable_alice, beside=True),
    # what heals by itself
    Row("a session of the server that ends", on(IMPORT, "drop sessions"), 2, 1, BOTH, 0,
        "archived", beside=True),
    Row("a session that ends at each request", on("", "drop sessions", times=None), 2, 1, BOTH, 0,
        "archived"),
    # how long it waits, and how often
    Row("a 429 with Retry-After is waited for", proxy(429, retry_after="3"), 3, 1, BOTH, 0, AGAIN,
        more=waited(3), waits=True),
    Row("a 503 with Retry-After is waited for", proxy(503, retry_after="3"), 3, 1, BOTH, 0, AGAIN,
        more=waited(3), beside=True),
    Row("a 503 twice heals with two retries", proxy(503, times=2), 4, 1, BOTH, 0,
        r"\(1 of 2\) | answers again", options="--retries 2", waits=True),
    Row("a 503 is not tried again without retries", proxy(503), 2, 0, SECOND, 1, "HTTP 503",
        options="--retries 0", beside=True),
    Row("an import that lands after its client has gone", on(
        IMPORT, "late landing", after_bytes=2600, seconds=0.3), 3, 1, BOTH, 0, AGAIN,
        options="--retries 1 --compression 0"),
    # since about 1.10.2 the row of an import that failed in its middle is an ERROR
    Row("a full disk of a newer XNAT", on(IMPORT, "disk full", entry=2), 2, 0, SECOND, 1,
        "unable to read DICOM object", knobs={"version": "1.10.2"}),
    # filters
    Row("a series filter that keeps nothing", None, 2, 0, FIRST, 1, "filter",
        knobs={"reject": ("B_0002",)}, mend=lambda _, server: setattr(server.knobs, "reject", ())),
    Row("a filter that keeps nothing of the only session", None, 2, 0, NEITHER, 1, "filter",
        knobs={"reject": ("A_0001", "B_0002")},
        mend=lambda _, server: setattr(server.knobs, "reject", ()), beside=True),
]


class Answers(TableTest):

    @slow
    def test_what_is_refused_is_told_held_back_and_completed_by_the_next_run(self) -> None:
        self.play_together(FOR_GOOD)

    def test_what_waiting_heals_is_sent_again_and_archived_once(self) -> None:
        self.play_together(HEALS)

    def test_what_breaks_on_the_way_is_sent_again_and_archived_once(self) -> None:
        self.play_together(BROKEN, knobs={"seconds_per_file": 0.05})

    @slow
    def test_what_goes_silent_is_sent_again_and_archived_once(self) -> None:
        self.play_together(SILENT, "--retries 1 --timeout 1")

    @variation
    def test_reasons_are_found_in_pages_that_have_no_h3(self) -> None:
        self.play_together(NO_H3, "--retries 1 --procs 1", {"version": "1.11"})


add_rows(Answers, ALONE)


# ---- Many sessions ---------------------------------------------------------------------------

class ManySessions(FaultTest):

    def many(self, count: int, files: int = 1) -> None:
        self.tree(*(f"{number:03}/pre/A_0001" for number in range(1, count + 1)), files=files)

    @variation
    def test_a_server_that_goes_away_for_good_stops_the_run_after_one_series_tries(self) -> None:
        self.many(6)
        with self.xnat() as server:
            # Everything works until the second import; from then on nothing does.
            server.fail("reset before", IMPORT, skip=1, times=None)
            server.fail("reset before", BUILD, skip=1, times=None)
            ran = self.run_it(server, "--procs", "1", "--retries", "1", status=3, posts=3,
                              words="http.*broke .*: run again later | 5 not finished|not sent")
            self.assertEqual(self.statuses(), "sent" + 5 * ", not sent", ran.text)
            server.faults.clear()
            self.run_it(server, "--procs", "1", status=0, posts=5, commits=5)
            self.assert_whole(server)

    def test_a_server_that_goes_away_with_four_uploads_under_way_stops_all_of_them(self) -> None:
        self.many(12)
        with self.xnat() as server:
            server.fail("close", IMPORT, skip=2, times=None)
            server.fail("close", BUILD, skip=1, times=None)
            self.run_it(server, "--procs", "4", "--retries", "1", status=3,
                        words="http.*connection broke .*: run again later")
            self.assertLessEqual(len(server.imports()), 2 + 2 * 4)
            server.faults.clear()
            self.run_it(server, status=0)
            self.assert_whole(server)

    def test_a_server_that_is_down_at_the_start_is_named_with_its_address(self) -> None:
        self.tree()
        with self.xnat() as server:
            url = server.url
        ran = self.run_command(self.arguments(url, "--retries", "0"))
        self.assertEqual(ran.status, 3, ran.text)
        self.assertIn(url, ran.err)
        self.assertIn("nothing answers there", ran.err)

    @variation
    def test_twenty_five_sessions_refused_alike_stop_the_run_with_advice_that_fits(self) -> None:
        self.many(25)
        with self.xnat() as server:
            server.fail("disk full", IMPORT, times=None)
            ran = self.run_it(server, "--procs", "1", status=3, posts=20, commits=0,
                              words="refuses everything .20 sessions in a row | disk is full | "
                                    "Report: ")
            self.assertNotRegex(ran.text, "(?m)(?<!if not, )copy that file again$")
            self.assertEqual(self.statuses(), ", ".join(25 * ["not sent"]))

    @variation
    def test_a_page_of_maintenance_in_place_of_every_import_stops_the_run(self) -> None:
        self.many(22)
        with self.xnat() as server:
            server.fail("answer", IMPORT, status=200, body=b"<html>Down until 6</html>", times=None)
            self.run_it(server, "--procs", "1", status=3, posts=20, commits=0,
                        words="refuses everything .20 sessions in a row.* a web page")

    @variation
    def test_sessions_refused_alike_with_one_that_passes_between_do_not_stop_it(self) -> None:
        self.many(21)
        with self.xnat() as server:
            server.faults.append(Fault("disk full", IMPORT, times=10))
            server.faults.append(Fault("disk full", IMPORT, skip=1, times=10))
            self.run_it(server, "--procs", "1", status=1, posts=21, commits=1)

    @variation
    def test_a_filter_that_takes_one_series_of_each_session_does_not_stop_it(self) -> None:
        self.tree(*(f"{100 + number}/pre/{name}" for number in range(22)
                    for name in ("A_0001", "P_0002")), files=1)
        with self.xnat(reject=("P_0002",)) as server:
            ran = self.run_it(server, status=1, posts=44, commits=0)
            self.assertIn("22 sessions: 22 held back", ran.out)
            self.assertRegex(ran.out, "kept none of these.*\n.*and 21 more.*\n.* with --config")
            config = self.folder / "config.json"
            config.write_text('{"Exclude": ["P_"]}')
            self.run_it(server, "--config", str(config), status=0, posts=0, commits=22)

    @variation
    def test_a_server_that_archives_nothing_stops_the_run(self) -> None:
        self.many(22)
        with self.xnat() as server:
            server.fail("error page", "action=commit", status=500, text="boom", times=None)
            ran = self.run_it(server, "--procs", "1", status=3, posts=20, commits=20)
            self.assertIn("the server refuses everything", ran.text)

    def test_one_that_fails_by_itself_between_sessions_refused_alike_does_not_count(self) -> None:
        self.many(21)
        middle = sorted(self.root.glob("*/*/*"))[10]
        (middle / "gone.dcm").symlink_to("nowhere")
        with self.xnat() as server:
            server.fail("error page", IMPORT, status=500, text="boom", times=None)
            ran = self.run_it(server, "--procs", "1", status=3, posts=20, commits=0)
            self.assertIn("the server refuses everything", ran.text)
            self.assertIn("is a link to nothing", ran.text)

    @variation
    def test_one_session_that_fails_does_not_hold_up_the_others(self) -> None:
        self.tree("007/post/A_0001", "007/pre/A_0001", "008/pre/A_0001")
        with self.xnat() as server:
            server.fail("error page", IMPORT + ".*EXPT_LABEL=007_post", status=400, text="no",
                        times=None)
            ran = self.run_it(server, "--retries", "1", status=1, posts=3, commits=2)
            self.assertEqual(self.statuses(), "not sent, sent, sent", ran.text)
            server.faults.clear()
            self.run_it(server, status=0, posts=1, commits=1)
            self.assert_whole(server)

    def test_a_login_refused_while_four_uploads_run_is_not_tried_twenty_times(self) -> None:
        self.many(12)
        self.refuse_logins(12)  # whoever was on the way; 20 lock the account

    @variation
    def test_nor_is_one_while_four_loads_are_on_their_way(self) -> None:
        self.tree(*(f"{subject:03}/pre/S_{number:04}" for subject in range(12)
                    for number in range(1, 9)), files=1)
        self.refuse_logins(19)

    def refuse_logins(self, most: int) -> None:
        with Standin(seconds_per_file=0.1) as server:  # four uploads may each meet it once
            server.fail("disable account", IMPORT, skip=2)
            ran = self.upload(server, "--procs", "4")
            self.assertEqual(ran.status, 3, ran.text)
            self.assertIn("login refused", ran.text)
            refused = [each for each in server.requests if each.status == 401]
            self.assertLessEqual(len(refused), most)
            enable_alice(self, server)
            self.run_it(server, status=0)
            self.assert_whole(server)

    @slow
    def test_every_wait_is_announced_in_one_line_with_its_number(self) -> None:
        self.tree("007/pre/A_0001")
        with self.xnat() as server:
            server.fail("status", IMPORT, status=429, times=2)
            ran = self.run_it(server, "--retries", "2", status=0, posts=3,
                              words=r"\(1 of 2\) | \(2 of 2\)")
            lines = [line for line in ran.err.splitlines() if AGAIN in line]
            self.assertEqual(len(lines), 2, ran.err)
            first, second, third = server.imports()
            self.assertGreater(third.started - float(second.answered or 0),
                               second.started - float(first.answered or 0), "waits grow")


    def outage(self, *options: str) -> List[str]:
        """What a run of eight sessions says while four are sent, and the server goes away and
        comes back."""
        self.many(8)
        with self.xnat(seconds_per_file=0.4) as server:
            process = self.start(self.arguments(server.url, "--procs", "4", *options))
            self.assertTrue(server.wait_for(lambda: len(server.imports()) > 4, 30))
            with server.down():
                time.sleep(1.5)
            out, err = process.communicate(timeout=60)
            self.assertEqual(process.returncode, 0, out + err)
            self.assert_whole(server)
        self.assertGreater(self.log().count(AGAIN), 3, "several have waited")
        return [line for line in err.splitlines() if "PASS:" not in line]

    @slow
    def test_an_outage_is_one_line_and_its_end_another_however_many_wait(self) -> None:
        for options in cases((), ("--quiet",)):
            with self.subTest(options):
                self.work = self.folder / "-".join(("work", *options))
                begins, ends = self.outage(*options)
                self.assertRegex(begins, rf"\(curl exit .*\); {AGAIN} 1 s \(1 of 5\)$")
                self.assertRegex(ends, r": http://127.0.0.1:\d+: the server answers again$")


class Waits(unittest.TestCase):

    def test_they_grow_and_none_is_longer_than_minutes_however_many_retries(self) -> None:
        waits: List[float] = []
        settings: Any = types.SimpleNamespace(retries=9999)
        programs: Any = types.SimpleNamespace(pause=lambda each: waits.append(each) if each else 0)
        teller: Any = types.SimpleNamespace(say=str, log=str)
        curl = dicomUpload.Curl(settings, programs, teller)
        answer = dicomUpload.Answer(0, 503, "")
        for tries in (1, 2, 3, 30, 9999):
            curl.wait_to_heal("007_pre", answer, tries)
        self.assertEqual(waits[:3], sorted(waits[:3]), "they grow")
        self.assertLess(max(waits), 300)

    def test_after_a_lost_answer_xnat_gets_the_time_to_finish(self) -> None:
        waits: List[float] = []
        settings: Any = types.SimpleNamespace(retries=1)
        programs: Any = types.SimpleNamespace(pause=lambda each: waits.append(each) if each else 0)
        teller: Any = types.SimpleNamespace(say=str, log=str)
        for answer in dicomUpload.Answer(0, 504, ""), dicomUpload.Answer(28, 0, ""):
            dicomUpload.Curl(settings, programs, teller).wait_to_heal(
                "007_pre", answer, 1, files=500)
        self.assertGreater(min(waits), 0.075 * 500)


# ---- One session -----------------------------------------------------------------------------

class OneSession(FaultTest):

    @variation
    def test_up_to_1_8_7_the_series_of_a_session_go_strictly_one_after_another(self) -> None:
        self.tree(*(f"007/pre/S_{number:04}" for number in range(1, 6)))
        for version in ("1.7.5", "1.8.7"):
            with self.subTest(version), self.xnat(version=version, seconds_per_file=0.05) as server:
                self.run_it(server, "--procs", "4", "--again", status=0, posts=5, commits=1)
                self.assertFalse(overlap(server.imports()), "two at once")
                self.assert_whole(server)

    @variation
    def test_from_1_8_8_on_series_go_side_by_side_once_the_first_has_made_the_session(self) -> None:
        self.tree(*(f"007/pre/S_{number:04}" for number in range(1, 6)))
        for version in ("1.8.8", "1.10"):
            with self.subTest(version), self.xnat(version=version, seconds_per_file=0.15) as server:
                self.run_it(server, "--procs", "4", "--again", status=0, posts=6, commits=1)
                first, *others = server.imports()
                self.assertTrue(overlap(others), "never two at once")
                for other in others:
                    self.assertGreaterEqual(other.started, float(first.answered or 1e99))
                self.assert_whole(server)

    @variation
    def test_the_parts_of_one_series_go_in_order(self) -> None:
        self.tree("007/pre/A_0001", files=7)
        with self.xnat(seconds_per_file=0.05) as server:
            self.run_it(server, "--procs", "4", "--max-files", "2", status=0, posts=4, commits=1)
            self.assertFalse(overlap(server.imports()))
            sent = [name for each in server.imports() for name in each.entries]
            self.assertEqual(sent, sorted(sent))
            self.assert_whole(server)

    def test_a_part_that_fails_takes_the_rest_of_its_series_with_it_and_no_more(self) -> None:
        self.tree(files=5)
        with self.xnat() as server:
            server.fail("error page", IMPORT, status=400, text="no", skip=1)
            self.run_it(server, "--procs", "1", "--max-files", "2", status=1, posts=5, commits=0,
                        words=HELD)
            self.assertEqual(self.statuses(), "not sent, sent")
            self.run_it(server, "--procs", "1", "--max-files", "2", status=0, posts=2, commits=1)
            self.assert_whole(server)

    @variation
    def test_a_copy_is_sent_once_whatever_its_name_and_folder(self) -> None:
        self.tree()
        folder = self.root / "007/pre/A_0001"
        (folder / "IM0001 (1).dcm").write_bytes((folder / "IM0001.dcm").read_bytes())
        (folder / "copy").mkdir()
        (folder / "copy/IM0002.dcm").write_bytes((folder / "IM0002.dcm").read_bytes())
        shutil.copytree(str(self.root / "007/pre/B_0002"), str(self.root / "007/pre/B_0002 again"))
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2, commits=1, words="archived, 4 files verified | "
                                                                    "4 cop(y|ies)")
            self.assertEqual(set(server.instances("007_pre").values()), {1})
            self.assertEqual(len(server.stored("007_pre")), 4)
            for name in "IM0001 (1).dcm", "copy/IM0002.dcm", "B_0002 again":
                self.assertIn(name, self.log())
            self.stays_so(server)

    @variation
    def test_two_images_of_one_uid_fail_both_their_series_before_a_byte_leaves(self) -> None:
        self.tree("007/pre/A_0001", "007/pre/B_0002", "008/pre/A_0001")
        write_series(self.root / "007/pre/C_0003", study=uid("007", "pre"), number=1, files=1,
                     name="E2_{:04d}.dcm", patient="007", rows=24)
        with self.xnat() as server:
            self.run_it(server, "--procs", "1", status=1, posts=2, commits=1,
                        words=r"A_0001.*IM0001\.dcm | C_0003.*E2_0001\.dcm")
            self.assertEqual(self.statuses(), "not sent, sent, not sent, sent")
            self.assertEqual(set(server.archive), {("BRAIN", "008_pre")})
            shutil.rmtree(str(self.root / "007/pre/C_0003"))
            self.run_it(server, status=0, posts=1, commits=1)
            self.assert_whole(server)

    def test_equal_names_of_different_images_are_all_kept(self) -> None:
        self.tree()
        write_series(self.root / "007/pre/A_0001/more", study=uid("007", "pre"), number=1, files=2,
                     series=uid("another"))
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2, commits=1, words="archived, 6 files")
            self.assert_whole(server)

    @variation
    def test_two_studies_in_one_session_fail_it_before_a_byte_leaves_and_no_other(self) -> None:
        self.tree("007/pre/A_0001", "008/pre/A_0001")
        write_series(self.root / "007/pre/C_0003", study=uid("other"), number=3, files=2)
        with self.xnat() as server:
            self.run_it(server, "--procs", "1", status=1, posts=1, commits=1,
                        words=f"two studies.*A_0001.*{uid('007', 'pre')}.*C_0003.*{uid('other')}")
            self.assertEqual(set(server.archive), {("BRAIN", "008_pre")})
            self.assertEqual(server.prearchive, [])


# ---- Loads -----------------------------------------------------------------------------------

def parts(*counts: int, size: int = 1) -> List[dicomUpload.Part]:
    """Parts of so many files, of so many bytes each."""
    return [dicomUpload.Part(dicomUpload.Series(str(number), ""), count * [
        dicomUpload.File("x", size, 0)]) for number, count in enumerate(counts)]


def apart(*counts: int, size: int = 1) -> List[List[dicomUpload.Part]]:
    """Scans of one part each."""
    return [[part] for part in parts(*counts, size=size)]


class Loads(RunningTest):
    """Several small series over one connection."""

    def test_each_upload_of_a_load_tells_how_far_it_is(self) -> None:
        zips = [self.folder / f"{number}.zip" for number in range(3)]
        for path in zips:
            path.write_bytes(os.urandom(1_000_000))
        told: List[Tuple[int, float]] = []
        settings: Any = types.SimpleNamespace(
            user="alice", password="s3cret", timeout=60, cacert="", insecure=False,
            limit_rate=4_000_000, procs=1)
        silent: Any = types.SimpleNamespace(say=str, log=str)
        with self.xnat() as server, contextlib.closing(dicomUpload.Programs()) as programs:
            settings.url = server.url
            curl = dicomUpload.Curl(settings, programs, silent)
            answers = curl.send("/data/services/import", [str(path) for path in zips], [
                lambda share, at=at: told.append((at, share)) for at in range(3)])
        self.assertEqual([each.code for each in answers], [0, 0, 0])
        self.assertEqual(told, sorted(told), "in their order, and never back")
        self.assertEqual({at for at, share in told if share == 0.99}, {0, 1, 2})

    def test_how_far_it_is_may_come_in_any_pieces(self) -> None:
        told: List[Tuple[int, float]] = []
        done = types.SimpleNamespace(returncode=7, stdout=b"", stderr=b"")

        def run(_: Any, config: bytes, folder: str, watch: Callable[[bytes], None], whole: bool
                ) -> Any:
            for piece in b"\r#  4", b"9.5%", b"\r## 10", b"0.0%", b"\n\r#  5.0%", b"\n", b" 1.0%":
                watch(piece)
            return done

        settings: Any = types.SimpleNamespace(
            user="", password="", timeout=60, cacert="", insecure=False, limit_rate=0, url="")
        programs: Any = types.SimpleNamespace(run=run, stopping=threading.Event())
        curl = dicomUpload.Curl(settings, programs, types.SimpleNamespace(log=str))  # type: ignore
        curl.send("", ["a", "b"], [lambda share, at=at: told.append((at, share)) for at in (0, 1)])
        self.assertEqual(told, [(0, 0.495), (0, 0.495), (0, 0.99), (0, 0.99), (1, 0.05),
                                (1, 0.99)])

    def test_four_small_scans_at_most_share_a_load(self) -> None:
        for title, scans, limits, wanted in (
                ("nothing", [], {}, []),
                ("three", apart(3, 3, 3), {}, [[[3, 3, 3]]]),
                ("nine", apart(*range(1, 10)), {}, [[[1, 2, 3, 4]], [[5, 6, 7, 8]], [[9]]]),
                ("an only session", apart(1, 2, 3), {"alone": True}, [[[1]], [[2]], [[3]]]),
                ("a long only session", apart(*32 * [1]), {"alone": True}, 16 * [[[1, 1]]]),
                ("100 files", apart(50, 50, 1), {}, [[[50, 50]], [[1]]]),
                ("one that has more", apart(500, 1, 1), {}, [[[500]], [[1, 1]]]),
                ("16 MB", apart(8, 8, 1, size=1 << 20), {}, [[[8, 8]], [[1]]]),
                ("a small disk", apart(4, 4, 4, size=1 << 20), {"free": 64 << 20},
                 [[[4, 4]], [[4]]]),
                ("nine uploads, who could lock the account", apart(1, 1, 1), {"procs": 9},
                 [[[1]], [[1]], [[1]]]),
                ("a scan of two parts", [parts(1), parts(2, 3)], {}, [[[2], [3]], [[1]]]),
                ("a scan of several parts keeps its order", [parts(1), parts(2, 3, 4), parts(5)],
                 {}, [[[2], [3], [4]], [[1, 5]]])):
            with self.subTest(title):
                self.assertEqual(self.lanes(scans, **limits), wanted)

    def lanes(self, scans: List[List[dicomUpload.Part]], alone: bool = False, procs: int = 4,
              free: int = 1 << 40) -> List[List[List[int]]]:
        """How many files the parts have, by lanes and loads."""
        settings = types.SimpleNamespace(procs=procs, compression=1, workdir=str(self.folder))
        some: Any = types.SimpleNamespace(settings=settings)
        sender = dicomUpload.Sender(some, some, some, alone)
        with mock.patch("shutil.disk_usage", lambda _: types.SimpleNamespace(free=free)):
            lanes = list(sender.lanes_of(scans))
        sender.close()
        return [[[len(part.files) for part in load] for load in lane] for lane in lanes]

    def grow(self) -> str:
        """A session whose six series go as one, a load of four, and one; where its POSTs go.
        Before it another one: what has no company goes side by side."""
        self.tree("001/pre/A_0001", *(f"002/pre/S_{number:04}" for number in range(1, 7)), files=1)
        return IMPORT + ".*EXPT_LABEL=002_pre"

    def test_small_series_share_a_connection_where_xnat_takes_them_side_by_side(self) -> None:
        self.tree(*(f"{subject:03}/pre/S_{number:04}" for subject in range(3)
                    for number in range(1, 7)), files=1)
        for version, procs, connections in cases(
                ("1.8.11", "4", [1, 1, 4]), ("1.8.7", "4", [1, 1, 1, 1, 1, 1]),
                ("1.8.11", "1", [1, 1, 4]), first=2):
            with self.subTest(version=version, procs=procs), self.xnat(version=version) as server:
                self.run_it(server, "--procs", procs, "--again", posts=18, commits=3)
                ports = Counter((each.params["EXPT_LABEL"], each.port) for each in server.imports())
                for _, session in server.archive:
                    self.assertEqual(connections, sorted(
                        count for (label, _), count in ports.items() if label == session))
                self.assert_whole(server)

    def meets(self, *faults: Tuple[Fault, int, str]) -> None:
        """Each meets the second of a load: POSTs, and what becomes of that series."""
        for fault, posts, status in faults:
            with self.subTest(fault), self.xnat() as server:
                self.work = self.folder / fault.kind / str(fault.status)
                server.faults.append(fault)
                self.run_it(server, "--procs", "1", status=int(status != "sent"), posts=posts)
                self.assertEqual(self.statuses(), f"sent, sent, sent, {status}, sent, sent, sent")
                self.run_it(server, posts=int(status != "sent"))
                self.assert_whole(server)

    def test_what_meets_one_of_a_load_costs_the_others_nothing(self) -> None:
        where = self.grow()
        self.meets((page(400, "no room at the inn", where, skip=2), 7, "not sent"),
                   (proxy(503, where, skip=2), 8, "sent"), (on(where, "close", skip=2), 8, "sent"))

    @variation
    def test_whatever_meets_one_of_a_load_costs_the_others_nothing(self) -> None:
        where = self.grow()
        self.meets((page(400, HEALING[0], where, skip=2), 8, "sent"),
                   (late(504, where, skip=2), 8, "sent"),
                   (on(where, "empty", skip=2), 7, "not sent"),
                   (on(where, "close after", skip=2), 8, "sent"),
                   (on(where, "reset during", after_bytes=200, skip=2), 8, "sent"),
                   (on(where, "truncate", skip=2), 8, "sent"),
                   (on(where, "drop sessions", skip=2), 7, "sent"))

    @variation
    def test_a_folder_of_several_scans_is_not_sent_if_one_of_them_is_refused(self) -> None:
        for number in range(1, 7):  # the last one goes beside a load, and is over before it
            write_series(self.root / "002/pre/S_0001", study=uid("002", "pre"), number=number,
                         files=1, series=uid(number), name=f"E{number}_{{:04d}}.dcm",
                         description=f"E{number}")
        self.tree("001/pre/A_0001", files=1)
        with self.xnat(reject=("E6",), seconds_per_file=0.1) as server:
            self.run_it(server, "--max-files", "1", status=1, posts=7, commits=1)
            self.assertEqual(self.statuses("002"), "not sent")
            server.knobs.reject = ()
            self.run_it(server, posts=1, commits=1)
            self.assert_whole(server)

    def interrupted(self, server: Standin) -> Any:
        """A run that hangs in the third POST of a load."""
        server.fail("stall before", self.grow(), skip=3, seconds=60)
        process = self.start(self.arguments(server.url, "--procs", "1"))
        self.assertTrue(server.wait_for(lambda: len(server.imports()) == 5, 30))
        return process

    def test_a_run_that_is_killed_within_a_load_leaves_the_rest_to_the_next_one(self) -> None:
        with self.xnat() as server:
            process = self.interrupted(server)
            process.kill()
            process.communicate(timeout=30)
            self.assert_alone(5)
            self.run_it(server, "--procs", "1", posts=5, commits=1)
            self.assert_whole(server)

    @variation
    def test_what_has_arrived_of_a_load_is_told_when_the_run_is_stopped(self) -> None:
        with self.xnat() as server:
            process = self.interrupted(server)
            process.terminate()
            ran = self.ended(process)
            self.assertEqual(ran.status, 143, ran.text)
            self.assertRegex(ran.out, "(?m)^3 files,")  # curl keeps its last answer to itself
            self.assertRegex(ran.out, "do not archive by hand.*002_pre")
            self.assertNotIn(AGAIN, ran.err)
            self.assertEqual(self.statuses("002"), "sent, sent" + 4 * ", not sent")
            self.run_it(server, "--procs", "1", posts=4, commits=1)
            self.assert_whole(server)

    @variation
    def test_another_project_is_told_before_anybody_is_waited_for(self) -> None:
        where = self.grow()
        for first in (proxy(503, where, skip=1, retry_after="600"),
                      on(where, "login page", skip=1)):
            with self.subTest(first), self.xnat() as server:
                self.work = self.folder / first.kind
                server.faults.append(first)
                server.faults.append(on(where, "other project", skip=2))
                ran = self.run_it(server, "--procs", "1", status=3, posts=6, words="do not run "
                                  "again, have it deleted there")
                self.assertNotIn(AGAIN, ran.err)

    @variation
    def test_after_a_stop_nobody_waits_for_what_could_heal(self) -> None:
        where = self.grow()
        with self.xnat() as server:
            server.faults.append(proxy(503, where, skip=1))
            server.fail("stall before", where, skip=2, seconds=60)
            process = self.start(self.arguments(server.url, "--procs", "1"))
            self.assertTrue(server.wait_for(lambda: len(server.imports()) == 5, 30))
            process.terminate()
            ran = self.ended(process)
            self.assertEqual(ran.status, 143, ran.text)
            self.assertNotIn(AGAIN, ran.text)
            self.run_it(server)
            self.assert_whole(server)

    def test_what_arrived_beside_one_that_stops_the_run_is_noted(self) -> None:
        where = self.grow()
        for fault in cases(on(where, "other project", skip=1), on(where, "login page", skip=1),
                           on(where, "redirect", location=LOGIN_VM, skip=1)):
            with self.subTest(fault), self.xnat() as server:
                self.work = self.folder / fault.kind
                server.faults.append(fault)
                self.run_it(server, "--procs", "1", status=3, posts=6, commits=1)
                self.assertEqual(self.statuses("002"), "sent, not sent, sent, sent, sent, not sent")
                self.run_it(server, "--procs", "1", posts=2, commits=1)
                self.assert_whole(server)

    def test_what_has_arrived_of_a_load_is_noted_before_the_rest_is_waited_for(self) -> None:
        with self.xnat() as server:
            server.fail("status", self.grow(), skip=1, status=503,
                        headers=(("Retry-After", "600"),))
            process = self.start(self.arguments(server.url, "--procs", "1"))
            self.assertTrue(until(lambda: self.work.is_dir() and AGAIN in self.log()))
            process.kill()
            process.communicate(timeout=30)
            self.assertEqual(self.ledger().read_text().count('"sent"'), 5)
            self.run_it(server, "--procs", "1", posts=2, commits=1)
            self.assert_whole(server)

    def test_a_curl_that_is_killed_within_a_load_costs_no_answer_that_it_has_told(self) -> None:
        with self.xnat() as server:
            process = self.interrupted(server)
            for curl in self.processes("curl"):
                os.kill(curl, signal.SIGKILL)
            ran = self.ended(process, 60)
            self.assertEqual(ran.status, 0, ran.text)
            self.assertLessEqual(len(server.imports()), 9)  # curl had the last one to itself yet
            self.assertEqual(ran.err.count(AGAIN), 1, ran.err)
            self.assert_whole(server)


# ---- The folder while it is sent -------------------------------------------------------------

class TheFolderWhileItIsSent(FaultTest):

    def held(self, change: Callable[[], Any], posts: int) -> None:
        """A session whose folder changes while its last series is imported is held back; the next
        run sends so many parts and ends whole."""
        self.tree()
        with self.xnat(reject=once(change, "B_0002")) as server:
            self.run_it(server, "--procs", "1", status=1, posts=2, commits=0, words=f"{HELD} | "
                        "changed while it was sent")
            self.assertEqual(server.archive, {})
            self.run_it(server, "--procs", "1", status=0, posts=posts, commits=1)
            self.assertLessEqual(set(digests(self.root).values()), set(server.stored("007_pre")))
            self.assertEqual(set(server.instances("007_pre").values()), {1})
            self.assertEqual(server.prearchive, [])
            self.stays_so(server)

    @variation
    def test_a_file_that_comes_holds_its_session_back(self) -> None:
        self.held(lambda: self.tree("007/pre/A_0001", files=3), 1)

    @variation
    def test_a_file_that_goes_holds_its_session_back(self) -> None:
        self.held(lambda: (self.root / "007/pre/A_0001/IM0002.dcm").unlink(), 1)

    @variation
    def test_a_file_that_changes_holds_its_session_back(self) -> None:
        self.held(lambda: self.tree("007/pre/A_0001", rows=24), 1)

    @variation
    def test_an_image_that_is_there_and_gets_another_time_holds_nothing_back(self) -> None:
        self.tree("007/pre/A_0001")
        path = self.root / "007/pre/A_0001/IM0001.dcm"
        with self.xnat(reject=once(lambda: os.utime(path, (1, 1)), "B_0002")) as server:
            self.run_it(server, status=0)
            self.tree("007/pre/B_0002")
            self.run_it(server, status=0, posts=1, commits=1)
            self.assert_whole(server)

    @variation
    def test_a_series_that_comes_holds_its_session_back(self) -> None:
        self.held(lambda: self.tree("007/pre/C_0003"), 1)

    def test_while_it_sends_nobody_else_can_read_anything(self) -> None:
        self.tree()
        self.work.mkdir()
        modes = {}

        def look() -> None:
            for path in self.work.rglob("*"):
                modes[path.suffix or path.name] = path.stat().st_mode & 0o77

        with self.xnat(reject=once(look, "B_0002")) as server:
            ran = self.upload(server, "--procs", "1", preexec=lambda: os.umask(0))
            self.assertEqual(ran.status, 0, ran.text)
        self.assertEqual(set(modes.values()), {0}, modes)
        self.assertLessEqual({".zip", ".zips", ".log", ".csv", ".ledger", ".lock"}, set(modes))

    def without_zips(self, statuses: str, *faults: Fault) -> None:
        """The folder for zips goes away while the first series is on its way."""
        self.tree()
        with self.xnat() as server:
            server.knobs.reject = once(
                lambda: shutil.rmtree(str(self.work / "dicomUpload.zips")), "A_0001")
            for fault in faults:
                server.faults.append(fault)
            ran = self.run_it(server, "--procs", "1", status=1, commits=0,
                              words="Report: | [Rr]un the same command again")
            self.assertEqual(HELD in ran.out, statuses == FIRST, ran.out)
            self.assertEqual(self.statuses(), statuses, ran.text)
            self.run_it(server, status=0)
            self.assert_whole(server)

    @variation
    def test_a_folder_for_zips_that_is_removed_costs_what_is_not_sent_yet(self) -> None:
        self.without_zips(FIRST)

    def test_a_folder_for_zips_that_is_removed_before_a_retry_costs_that_series_too(self) -> None:
        self.without_zips(NEITHER, late(503))


if __name__ == "__main__":
    unittest.main()
