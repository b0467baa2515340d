"""The meeting with the server, once, before a byte leaves: login, version, project, rights, lists.

And the farewell: whatever ends a run, its server session is given back.
"""

import os
import re
import shutil
import signal
import unittest

from dicomUpload import Answer, Trouble, rows_of
from tests.faults import (AGAIN, BOTH, BUILD, IMPORT, LOGIN, START, FaultTest, Row, TableTest,
                          add_rows, ever, on, page, proxy)
from tests.support import need, shown_on, slow, take_terminal, variation
from tests.support import load_tests as load_tests  # these mostly wait: several at a time
from tests.xnat_standin import Standin, User

PROJECT = r"GET /data/projects/BRAIN(\?|$)"
RIGHTS = "permissions=edit"


def one_login(test: FaultTest, server: Standin) -> None:
    logins = [each for each in server.requests if each.status == 401]
    test.assertLessEqual(len(logins), 1, "a wrong password is tried once")


def renew_password(test: FaultTest, server: Standin) -> None:
    server.accounts.users["alice"].expired = False


ROWS = [
    # -- the login                         posts, commits, report, exit status, words
    Row("a login refused", page(401, where=LOGIN), 0, 0, START, 3, "login refused .*check USER"),
    Row("a wrong password", None, 0, 0, START, 3, "login refused .*check USER",
        call={"password": "wrong"}, more=one_login),
    Row("a login behind a firewall", page(403, where=LOGIN), 0, 0, START, 3,
        "no login there .HTTP 403.* firewall"),
    Row("a login that is a page", on(LOGIN, "login page"), 0, 0, START, 3, "web page"),
    Row("a login that is empty", on(LOGIN, "empty"), 0, 0, START, 3, "XNAT's own address"),
    Row("a login without XNAT behind the proxy", ever(proxy(503, LOGIN)), 0, 0, START, 3,
        "HTTP 503", options="--retries 0"),
    Row("a login that is redirected to https", on(
        LOGIN, "redirect", location="https://127.0.0.1/data/JSESSION"), 0, 0, START, 3,
        "to https://127.0.0.1.: give that one as URL", beside=True),
    Row("a login with an expired password", None, 0, 0, START, 3, "expired",
        knobs={"users": [User("alice", "s3cret", expired=True)]}, mend=renew_password),
    Row("a login that is reset", ever(on(LOGIN, "reset before")), 0, 0, START, 3, "broke",
        options="--retries 0", beside=True),
    Row("a login that is not HTTP", on(LOGIN, "garbage"), 0, 0, START, 3, "curl exit 1",
        beside=True),
    # -- the version
    Row("no version", page(404, where=BUILD), 2, 1, BOTH, 0, "unknown version"),
    Row("a version that fails", ever(page(500, where=BUILD)), 2, 1, BOTH, 0, "unknown version",
        beside=True),
    Row("a version that a proxy keeps back", ever(proxy(503, BUILD)), 2, 1, BOTH, 0,
        "unknown version", beside=True),
    Row("a version that is a page", on(BUILD, "answer", status=200, body=b"<html>Hi</html>"), 2, 1,
        BOTH, 0, "unknown version", beside=True),
    Row("a version that is no JSON", on(BUILD, "answer", status=200, body=b"1.8"), 2, 1, BOTH, 0,
        "unknown version"),
    *(Row(f"XNAT {version}", None, 2, 1, BOTH, 0, f"XNAT {re.escape(version)}",
          knobs={"version": version}, beside=version in ("1.8.2", "1.9.2.1"))
      for version in ("1.7.5", "1.8.2", "1.9.2.1", "1.10.0-RC2", "1.11.0")),
    # -- the project
    Row("an unknown project", page(404, where=PROJECT), 0, 0, START, 3, "check its ID"),
    Row("a project that comes late", proxy(503, PROJECT), 2, 1, BOTH, 0, AGAIN),
    Row("a project that fails", page(500, "boom", where=PROJECT), 0, 0, START, 3,
        r"HTTP 500, boom\): run again later"),
    Row("a project that is no JSON", on(PROJECT, "answer", status=200, body=b"brain"), 0, 0, START,
        3, "does not tell its ID: is this XNAT's own address", beside=True),
    Row("a project that is a page", on(PROJECT, "answer", status=200, body=b"<html>Hi</html>"),
        0, 0, START, 3, "address", beside=True),
    Row("a project without ID", on(PROJECT, "answer", status=200, body=b"{}"), 0, 0, START, 3,
        "address", beside=True),
    Row("an alias of the project", None, 2, 1, BOTH, 0, "project BRAIN",
        call={"project": "brainy"}),
    # -- the right to add to it
    Row("a right that comes late", proxy(503, RIGHTS), 2, 1, BOTH, 0, AGAIN, beside=True),
    Row("a right on a connection that breaks", on(RIGHTS, "reset before"), 2, 1, BOTH, 0,
        "archived, 4 files verified", beside=True),  # curl itself opens another
    Row("no right to the project", None, 0, 0, START, 3, "not add to it",
        call={"user": "bob", "password": "b0b"}),
    Row("a right that fails", page(500, "boom", where=RIGHTS), 0, 0, START, 3, "HTTP 500, boom",
        beside=True),
    Row("a login refused at the rights", page(401, where=RIGHTS), 0, 0, START, 3,
        "login refused .*check USER", beside=True),
    # -- what archive and prearchive hold
    Row("lists that are refused", None, 2, 1, BOTH, 0, "archived, 4 files verified",
        knobs={"refuse_lists": ("archive", "prearchive")}),
    Row("lists that a proxy keeps back", (ever(proxy(503, "GET /data/experiments")),
                                          ever(proxy(503, r"prearchive/projects/BRAIN\?"))),
        2, 1, BOTH, 0, "archived, 4 files verified", beside=True),
    # -- below a context path
    Row("a context path", None, 2, 1, BOTH, 0, "archived", knobs={"context_path": "/xnat"}),
    Row("a 503 below a context path", proxy(503), 3, 1, BOTH, 0, AGAIN,
        knobs={"context_path": "/xnat"}, beside=True),
]


class Meeting(TableTest):

    @slow
    def test_what_is_there_is_seen_under_an_alias_and_after_a_hiccup_without_asking_each(
            self) -> None:
        archive, prearchive = "/data/experiments", "/data/prearchive/projects/BRAIN"
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0)
            # How often each list is asked for under the project's own ID; the prearchive's once
            # more at the end.
            for project, fault, wanted in (
                    ("brainy", None, (1, 2)), ("BRAIN", on(PROJECT, "truncate"), (1, 2)),
                    ("BRAIN", proxy(503, PROJECT), (2, 3)),  # the first ones may be as ill
                    ("BRAIN", proxy(503, prearchive + r"\?"), (1, 3))):
                with self.subTest(project=project, fault=fault):
                    shutil.rmtree(self.work, ignore_errors=True)
                    if fault:
                        server.faults.append(fault)
                    before = len(server.requests)
                    self.run_it(server, posts=0, commits=0, words="already there", project=project)
                    asked = server.requests[before:]
                    lists = [each.path for each in asked if each.path == prearchive
                             or each.path == archive and each.params["project"] == "BRAIN"]
                    self.assertEqual((lists.count(archive), lists.count(prearchive)), wanted)
                    self.assertEqual([each.path for each in asked if re.search(
                        r"/projects/\w+/experiments/\w+$", each.path)], [])

    def test_a_login_that_is_answered_with_megabytes_fails_in_a_sentence(self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("answer", LOGIN, status=200, body=b"A" * 5_000_000)
            self.run_it(server, status=3, posts=0, words=r"dicomUpload: http.*own address")
            self.assertLess(len(self.log()), 5000)
            self.assertEqual([each for each in server.requests if each.method == "GET"], [])


add_rows(Meeting, ROWS)


class Listings(unittest.TestCase):

    def test_only_what_is_not_there_is_empty_and_what_is_no_listing_is_told(self) -> None:
        listing = '{"ResultSet": {"Result": [{"ID": "a"}]}}'
        self.assertEqual(rows_of(Answer(0, 200, listing)), [{"id": "a"}])
        self.assertEqual(rows_of(Answer(0, 404, "not found")), [])
        for status, body in ((200, ""), (200, "[]"), (200, '{"ResultSet": {}}'), (500, listing),
                             (200, '{"ResultSet": {"Result": "none"}}')):
            with self.subTest(status=status, body=body), self.assertRaises(Trouble):
                rows_of(Answer(0, status, body))


class WhatComesBeforeIt(FaultTest):

    def test_the_end_of_input_instead_of_a_password_is_told(self) -> None:
        self.tree("007/pre/A_0001")
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

    def test_a_program_that_cannot_be_executed_is_named(self) -> None:
        self.tree("007/pre/A_0001")
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
                self.assertRegex(ran.err, rf"(?m)^dicomUpload: .*\b{bad}\b.*\(.+\): .+$")
                self.assertEqual(server.requests, [])


class TheFarewell(FaultTest):

    def test_the_command_that_finishes_hides_the_login_and_does_not_begin_anew(self) -> None:
        self.tree("007/pre/A_0001")
        with self.xnat(users=[User("alice", "alice")]) as server:
            server.fail("error page", IMPORT, status=400, text="no")
            for options in ("--again", "--logname", "alice"), ("--again", "--dry-run"):
                with self.subTest(options):
                    ran = self.upload(server, *options, password="alice")
                    self.assertEqual(ran.status, 1, ran.text)
                    (command,) = [line for line in ran.out.splitlines() if "python3 " in line]
                    self.assertIn(f" {server.url} alice - BRAIN ", command)
                    self.assertEqual("--logname alice" in command, "--logname" in options)
                    self.assertNotRegex(command, "--again|--dry-run")

    def test_a_session_is_given_back_after_a_run_that_sends_and_one_that_does_not(self) -> None:
        self.tree("007/pre/A_0001")
        with self.xnat() as server:
            for options in ("--dry-run",), (), (), ("--only", "007/pre"):
                with self.subTest(options):
                    ran = self.upload(server, *options)
                    self.assertIn(ran.status, (0, 1), ran.text)
                    self.gives_back(server)
            self.assertEqual(server.accounts.sessions, {})

    @variation
    def test_a_session_is_given_back_where_the_project_may_not_be_edited(self) -> None:
        self.tree("007/pre/A_0001")
        with self.xnat() as server:
            for more in ({"user": "bob", "password": "b0b"}, {"project": "SECRET"},
                         {"project": "nowhere"}):
                with self.subTest(**more):
                    self.run_it(server, status=3, posts=0, **more)
                    self.gives_back(server)
            self.assertEqual(server.accounts.sessions, {})

    def test_a_session_is_given_back_where_the_ledger_cannot_be_used(self) -> None:
        self.tree("007/pre/A_0001")
        (self.work / "dicomUpload.ledger").mkdir(parents=True)
        with self.xnat() as server:
            self.run_it(server, status=3, posts=0, words="ledger")
            self.gives_back(server)
            self.assertEqual(server.accounts.sessions, {})

    def test_a_session_is_given_back_where_the_tree_looks_too_high(self) -> None:
        for path in "007/pre", "007/post", "008/pre", "008/post":
            self.tree(f"{path}/A_0001", f"{path}/B_0002")
        (self.folder / "up").mkdir()
        self.root.rename(self.folder / "up/dicomdir")
        self.root = self.folder / "up"
        with self.xnat() as server:
            self.run_it(server, status=2, posts=0, words="one level too high")
            self.gives_back(server)

    def test_a_run_that_is_stopped_gives_its_session_back(self) -> None:
        self.tree("007/pre/A_0001")
        with self.xnat() as server:
            server.fail("stall before", IMPORT, seconds=60)
            process = self.start(self.arguments(server.url))
            self.assertTrue(server.wait_for(server.imports, 30))
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=30)
            self.assertEqual(process.returncode, 143, out + err)
            self.gives_back(server)
            self.assertEqual(server.accounts.sessions, {})


if __name__ == "__main__":
    unittest.main()
