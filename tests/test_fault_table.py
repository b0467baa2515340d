"""What the program does about every fault there is, a line each, and what its ledger is good for.

Each row of the table is one run of the real command against the stand-in: two series of one
session, one upload at a time, a fault. The row says what must come of it. After a fault that
heals, everything is archived exactly once; after any other, the same command run again without
the fault must end there. Rows mostly wait, so several run at a time.
"""

import json
import re
import sys
import threading
import unittest
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Tuple, Union

from tests.dicom import digests, uid, write_series
from tests.support import ELSEWHERE, Ran, UploadTest, slow, variation
from tests.support import load_tests as load_tests  # rows mostly wait: several at a time
from tests.xnat_standin import Fault, Request, Session, Standin, User

# ---- A place for one run ---------------------------------------------------------------------

class FaultTest(UploadTest):
    """What the tests of faults share."""

    def tree(self, *paths: str, files: int = 2) -> None:
        """Make series folders, subject/session/series; numbers are taken from their ends."""
        for path in paths or ("007/pre/A_0001", "007/pre/B_0002"):
            subject, session, name = path.split("/")
            write_series(self.root / path, study=uid(subject, session), files=files,
                         number=int(name[-4:]), patient=subject)

    def quiet(self, server: Standin) -> None:
        """Wait until nothing runs on the server any more, also in the background."""
        def idle() -> bool:
            return all(each.answered or "stall" in each.fault for each in server.requests)

        self.assertTrue(server.wait_for(idle, 30), "the stand-in has not come to rest")

    def assert_whole(self, server: Standin, archived: bool = True, context: str = "") -> None:
        """The server holds every file under ROOTDIR exactly once; archived, if it should be."""
        tree = digests(self.root)
        labels = {"_".join(path.split("/")[:2]) for path in tree}
        for label in sorted(labels):
            wanted = sorted(digest for path, digest in tree.items()
                            if "_".join(path.split("/")[:2]) == label)
            self.assertEqual(server.stored(label), wanted, f"{label} {context}")
            self.assertEqual(set(server.instances(label).values()), {1}, f"{label} {context}")
        if archived:
            self.assertEqual({name for _, name in server.archive}, labels, context)
            self.assertEqual([row for row in server.prearchive if row.name in labels], [], context)

    def tidy(self, ran: Ran) -> None:
        """What no run may leave or show."""
        self.assertEqual(self.zips(), [])
        self.assertNotRegex(ran.text + self.log_if_any(), "s3cret")
        self.assertNotRegex(ran.text, "(?i)</?(html|body|h3|p)>")

    def log_if_any(self) -> str:
        return self.log() if self.work.is_dir() else ""

    def statuses(self) -> str:
        """The series' statuses in the newest report, in the order of the folders."""
        keys = "subject", "session", "series", "status"
        return ", ".join(row[-1] for row in sorted([each[key] for key in keys]
                                                   for each in self.report()))

    def run_it(self, server: Standin, *options: str, status: int = 0, words: str = "",
               posts: int = -1, commits: int = -1, **call: Any) -> Ran:
        """Run the upload; check exit status, words (| between them), requests of this run."""
        before = len(server.imports()), len(server.commits())
        ran = self.upload(server, *options, timeout=150, **call)
        self.assertEqual(ran.status, status, ran.text)
        for word in filter(None, words.split(" | ")):
            self.assertRegex(ran.text, word)
        made = len(server.imports()) - before[0], len(server.commits()) - before[1]
        wanted = (made[0] if posts < 0 else posts, made[1] if commits < 0 else commits)
        self.assertEqual(made, wanted, f"imports and commits\n{ran.text}")
        self.tidy(ran)
        return ran

    def ledger(self) -> Path:
        """The file that remembers."""
        (found,) = self.work.glob("*ledger*")
        return found


# ---- The table -------------------------------------------------------------------------------

# Where a fault strikes.
IMPORT = "POST /data/services/import"
COMMIT = "action=commit"
LOGIN = "POST /data/JSESSION"
BUILD = "buildInfo"
PROJECT = r"GET /data/projects/BRAIN(\?|$)"
RIGHTS = "permissions=edit"
COUNT = r"GET .*/experiments/007_pre/scans"
ROW = r"GET /data/prearchive/projects/BRAIN/[^/]+/007_pre(\?|$)"

# What the report says of A_0001 and B_0002. None: the run ended before there was a report.
BOTH, SECOND, FIRST, NEITHER = ("sent, sent", "not sent, sent", "sent, not sent",
                                "not sent, not sent")
START = None

HELD = "held back"
AGAIN = "trying again in"
JSON_PAGE = (("Content-Type", "application/json"),)

Hook = Callable[[FaultTest, Standin], None]


class Row(NamedTuple):
    """One line: the fault, and what must come of it."""

    name: str
    fault: Union[None, Fault, Tuple[Fault, ...]]
    posts: int
    commits: int
    series: Any                       # what the report says of each
    status: int                       # the command's exit status
    words: str                        # regexes that must be found in its output, " | " between
    options: str = "--retries 1"
    knobs: Mapping[str, Any] = {}
    call: Mapping[str, Any] = {}
    before: Any = None                # Hook: done before the run
    mend: Any = None                  # Hook: done before the second run
    again: str = ""                   # further options of the second run
    archived: bool = True             # where everything is in the end
    more: Any = None                  # Hook: further checks after the first run


def page(status: int, text: str = "", where: str = IMPORT, **more: Any) -> Fault:
    """XNAT's own page."""
    return Fault("error page", where, status=status, text=text, **more)


def proxy(status: int, where: str = IMPORT, **more: Any) -> Fault:
    """A proxy's page, the work not done."""
    return Fault("status", where, status=status, **more)


def late(status: int, where: str = IMPORT, **more: Any) -> Fault:
    """A proxy's page, the work done."""
    return Fault("late status", where, status=status, **more)


def on(where: str, kind: str, **more: Any) -> Fault:
    return Fault(kind, where, **more)


def ever(fault: Fault) -> Fault:
    """For good."""
    return Fault(**dict(vars(fault), times=None))


def rows_of(*rows: Dict[str, str]) -> bytes:
    return json.dumps({"ResultSet": {"Result": rows}}).encode()


def counted(scan: int, files: int) -> Fault:
    """The server counts so many files in one of the two scans."""
    body = rows_of(*({"label": "DICOM", "cat_id": str(number),
                      "file_count": str(files if number == scan else 2)} for number in (1, 2)))
    return Fault("answer", "scans/ALL/resources", status=200, body=body, headers=JSON_PAGE,
                 times=None)


def already_there(test: FaultTest, server: Standin) -> None:
    """Somebody else has sent and archived the same images."""
    ran = test.upload(server, "--workdir", str(test.folder / "elsewhere"))
    test.assertEqual(ran.status, 0, ran.text)


def already_there_renamed(test: FaultTest, server: Standin) -> None:
    """The same images, under other file names."""
    already_there(test, server)
    for path in sorted(test.root.rglob("*.dcm")):
        path.rename(path.with_name("X" + path.name))


def others_label(test: FaultTest, server: Standin) -> None:
    """The label is another subject's."""
    server.store.archive["BRAIN", "007_pre"] = Session("BRAIN", "007_pre", "someone",
                                                       uid("007", "pre"), 1)


def other_study(test: FaultTest, server: Standin) -> None:
    """The label holds another study."""
    server.store.archive["BRAIN", "007_pre"] = Session("BRAIN", "007_pre", "007", "1.2.3", 1)


def empty_archive(test: FaultTest, server: Standin) -> None:
    """Somebody has removed what stood in the way."""
    server.store.archive.clear()


def enable_alice(test: FaultTest, server: Standin) -> None:
    server.accounts.users["alice"].disabled = False


def renew_password(test: FaultTest, server: Standin) -> None:
    server.accounts.users["alice"].expired = False


def row_deleted_at_commit(test: FaultTest, server: Standin) -> None:
    """Somebody deletes the session while its commit is on the way."""
    def delete() -> None:
        if server.wait_for(server.commits):
            for row in server.prearchive:
                server.store.remove(row)

    server.fail("stall before", COMMIT, seconds=1)
    threading.Thread(target=delete, daemon=True).start()


def no_filter(test: FaultTest, server: Standin) -> None:
    server.knobs.reject = ()


def one_login(test: FaultTest, server: Standin) -> None:
    logins = [each for each in server.requests if each.status == 401]
    test.assertLessEqual(len(logins), 1, "a wrong password is tried once")


def waited(seconds: float) -> Hook:
    def check(test: FaultTest, server: Standin) -> None:
        first, second = server.imports()[:2]
        test.assertGreaterEqual(second.started - float(first.answered or 0), seconds)

    return check


def stops_asking(test: FaultTest, server: Standin) -> None:
    """After a refused login only the farewell may come."""
    after = [each for each in server.requests if each.number > server.imports()[-1].number]
    test.assertEqual([each.method for each in after if each.method != "DELETE"], [])


HEALING = ("Concurrent file sends of the same data is not supported.",
           "session processing in progress", "Concurrent modification is discouraged",
           "Duplicate archive attempt", "Destination session in use")
UNDER_WAY = {"seconds_per_file": 0.07}
PATIENT = "--retries 1 --timeout 1"
LOGIN_VM = "http://127.0.0.1/app/template/Login.vm"
EXPIRED_VM = "http://127.0.0.1/app/template/XDATScreen_UpdateUser.vm"
MANUAL = {"call": {"project": "MANUAL"}, "archived": False}

ROWS = [
    # -- import: XNAT's answers            posts, commits, report, exit status, words
    Row("no fault at all", None, 2, 1, BOTH, 0, "archived, 4 files verified"),
    Row("a 400 is for good", page(400, "no room at the inn"), 2, 0, SECOND, 1,
        f"HTTP 400, no room at the inn | {HELD}"),
    *(Row(f"a 400 that says {text} heals", page(400, text), 3, 1, BOTH, 0, AGAIN)
      for text in HEALING),
    Row("a 400 that could heal but does not", ever(page(400, HEALING[0])), 4, 0, NEITHER, 1,
        f"{AGAIN} | Concurrent file sends"),
    Row("a 401 stops the run", page(401, "no"), 1, 0, NEITHER, 3, "login refused for alice",
        more=stops_asking),
    Row("a 403 is for good", page(403, "Forbidden"), 2, 0, SECOND, 1, "HTTP 403 | right to edit"),
    Row("a 404 is for good", page(404, "Unknown importer"), 2, 0, SECOND, 1, "Unknown importer"),
    Row("a 408 heals", proxy(408), 3, 1, BOTH, 0, AGAIN),
    Row("a 413 is for good", proxy(413), 2, 0, SECOND, 1, "client_max_body_size"),
    Row("a 413 before the body is read", on(IMPORT, "early status", status=413), 2, 0, SECOND, 1,
        "client_max_body_size"),
    Row("a 429 heals", proxy(429), 3, 1, BOTH, 0, AGAIN),
    Row("a 429 with Retry-After is waited for", proxy(429, retry_after="3"), 3, 1, BOTH, 0, AGAIN,
        more=waited(3)),
    Row("a 503 with Retry-After is waited for", proxy(503, retry_after="3"), 3, 1, BOTH, 0, AGAIN,
        more=waited(3)),
    Row("a 429 whose Retry-After is a date", proxy(
        429, retry_after="Wed, 21 Oct 2015 07:28:00 GMT"), 3, 1, BOTH, 0, AGAIN),
    Row("a 429 without end", ever(proxy(429)), 4, 0, NEITHER, 1, f"{AGAIN} | HTTP 429"),
    Row("a 500 is for good", page(500, "NullPointerException"), 2, 0, SECOND, 1,
        "HTTP 500, NullPointerException"),
    Row("a 502 heals", proxy(502), 3, 1, BOTH, 0, AGAIN),
    Row("a 503 heals", proxy(503), 3, 1, BOTH, 0, AGAIN),
    Row("a 504 heals", proxy(504), 3, 1, BOTH, 0, AGAIN),
    Row("a 503 twice heals with two retries", proxy(503, times=2), 4, 1, BOTH, 0,
        r"\(1 of 2\) | \(2 of 2\)", options="--retries 2"),
    Row("a 503 is not tried again without retries", proxy(503), 2, 0, SECOND, 1, "HTTP 503",
        options="--retries 0"),
    Row("imports that are 503 for good while the rest answers", ever(proxy(503)), 4, 0, NEITHER, 1,
        "HTTP 503"),
    Row("a 502 after the import", late(502), 3, 1, BOTH, 0, AGAIN),
    Row("a 504 after the import", late(504), 3, 1, BOTH, 0, AGAIN),
    Row("a 504 while the import goes on", on(IMPORT, "background"), 3, 1, BOTH, 0, AGAIN,
        knobs=UNDER_WAY),
    Row("a 408 while the import goes on", on(IMPORT, "background", status=408), 3, 1, BOTH, 0,
        AGAIN, knobs=UNDER_WAY),
    Row("a full disk of XNAT", on(IMPORT, "disk full", entry=2), 2, 0, SECOND, 1,
        "unable to read DICOM object"),
    # -- import: broken connections and answers
    Row("a reset before the body", on(IMPORT, "reset before"), 3, 1, BOTH, 0, AGAIN),
    Row("a reset during the body", on(IMPORT, "reset during", after_bytes=500), 3, 1, BOTH, 0,
        AGAIN),
    Row("a reset after the import", on(IMPORT, "reset after"), 3, 1, BOTH, 0, AGAIN),
    Row("a hang-up without an answer", on(IMPORT, "close"), 3, 1, BOTH, 0, AGAIN),
    Row("a hang-up after the import", on(IMPORT, "close after"), 3, 1, BOTH, 0, AGAIN),
    Row("silence before the body is slow", on(IMPORT, "stall before", seconds=60), 3, 1, BOTH, 0,
        f"went silent | {AGAIN}", options=PATIENT),
    Row("silence after the import is slow", on(IMPORT, "stall", seconds=60), 3, 1, BOTH, 0,
        f"went silent | {AGAIN}", options=PATIENT),
    Row("an answer cut in half", on(IMPORT, "truncate"), 3, 1, BOTH, 0, AGAIN),
    Row("an answer that is not HTTP", on(IMPORT, "garbage"), 2, 0, SECOND, 1, "curl exit 1"),
    # -- import: 200 that is no success
    Row("an empty 200", on(IMPORT, "empty"), 2, 0, SECOND, 1, "kept none of these files"),
    Row("a login page", on(IMPORT, "login page"), 1, 0, NEITHER, 3, "login", more=stops_asking),
    Row("another web page", on(IMPORT, "answer", status=200, body=b"<html>Maintenance</html>",
                               headers=(("Content-Type", "text/html"),)), 2, 0, SECOND, 1,
        "web page"),
    Row("a 200 that is no address", on(IMPORT, "answer", status=200, body=b"OK"), 2, 0, SECOND, 1,
        "no address"),
    Row("another project", on(IMPORT, "other project"), 1, 0, NEITHER, 3, "project OTHER"),
    Row("an alias's other project", on(IMPORT, "other project", text="Unassigned"), 1, 0, NEITHER,
        3, "Unassigned"),
    Row("another session", on(IMPORT, "answer", status=200, body=(
        b"/data/prearchive/projects/BRAIN/20200102_101500000/another\r\n")), 2, 0, SECOND, 1,
        "another session"),
    Row("a second address", on(IMPORT, "extra line", text=(
        "/data/prearchive/projects/BRAIN/20200102_101500000/007_pre")), 2, 0, SECOND, 1,
        "two studies"),
    # -- import: redirects and the login
    Row("a redirect to the login", on(IMPORT, "redirect", location=LOGIN_VM), 1, 0, NEITHER, 3,
        "redirect|login", more=stops_asking),
    Row("a redirect to the expired password", on(IMPORT, "redirect", location=EXPIRED_VM), 1, 0,
        NEITHER, 3, "expired", more=stops_asking),
    Row("a redirect to https", on(IMPORT, "redirect", status=301, location="https://127.0.0.1/x"),
        1, 0, NEITHER, 3, "wants https: give https://127.0.0.1", more=stops_asking),
    Row("a session of the server that ends", on(IMPORT, "drop sessions"), 2, 1, BOTH, 0,
        "archived"),
    Row("a session that ends at each request", on("", "drop sessions", times=None), 2, 1, BOTH, 0,
        "archived"),
    Row("an account disabled in the middle", on(IMPORT, "disable account", skip=1), 2, 0, FIRST, 3,
        "login refused", mend=enable_alice),
    # -- the first requests
    Row("a login refused", page(401, where=LOGIN), 0, 0, START, 3, "login refused for alice"),
    Row("a wrong password", None, 0, 0, START, 3, "login refused for alice",
        call={"password": "wrong"}, more=one_login),
    Row("a login that is a page", on(LOGIN, "login page"), 0, 0, START, 3, "web page"),
    Row("a login that is empty", on(LOGIN, "empty"), 0, 0, START, 3, "XNAT's own address"),
    Row("a login without XNAT behind the proxy", ever(proxy(503, LOGIN)), 0, 0, START, 3,
        "HTTP 503"),
    Row("a login that is redirected to https", on(
        LOGIN, "redirect", location="https://127.0.0.1/data/JSESSION"), 0, 0, START, 3,
        "give https://"),
    Row("a login with an expired password", None, 0, 0, START, 3, "expired",
        knobs={"users": [User("alice", "s3cret", expired=True)]}, mend=renew_password),
    Row("a login that is reset", ever(on(LOGIN, "reset before")), 0, 0, START, 3, "broke"),
    Row("a login that is not HTTP", on(LOGIN, "garbage"), 0, 0, START, 3, "curl exit 1"),
    Row("no version", page(404, where=BUILD), 2, 1, BOTH, 0, "unknown version"),
    Row("a version that fails", ever(page(500, where=BUILD)), 2, 1, BOTH, 0, "unknown version"),
    Row("a version that a proxy keeps back", ever(proxy(503, BUILD)), 2, 1, BOTH, 0,
        "unknown version"),
    Row("a version that is a page", on(BUILD, "answer", status=200, body=b"<html>Hi</html>"), 2, 1,
        BOTH, 0, "unknown version"),
    Row("a version that is no JSON", on(BUILD, "answer", status=200, body=b"1.8"), 2, 1, BOTH, 0,
        "unknown version"),
    Row("an unknown project", page(404, where=PROJECT), 0, 0, START, 3, "check its ID"),
    Row("a project that comes late", proxy(503, PROJECT), 2, 1, BOTH, 0, AGAIN),
    Row("a project that fails", page(500, "boom", where=PROJECT), 0, 0, START, 3, "HTTP 500"),
    Row("a project that is a page", on(PROJECT, "answer", status=200, body=b"<html>Hi</html>"),
        0, 0, START, 3, "address"),
    Row("a project without ID", on(PROJECT, "answer", status=200, body=b"{}"), 0, 0, START, 3,
        "address"),
    Row("a right that comes late", on(RIGHTS, "reset before"), 2, 1, BOTH, 0, AGAIN),
    Row("no right to the project", None, 0, 0, START, 3, "not add to it",
        call={"user": "bob", "password": "b0b"}),
    Row("a right that fails", page(500, where=RIGHTS), 0, 0, START, 3, "HTTP 500"),
    Row("a login refused at the rights", page(401, where=RIGHTS), 0, 0, START, 3,
        "login refused for alice"),
    Row("a first look that comes late", proxy(503, COUNT, times=3), 2, 1, BOTH, 0,
        AGAIN),
    Row("a first look that fails",  # the archive's list is not told, so it looks, and again fails
        page(500, "boom", where="GET .*/experiments", times=4), 0, 0, NEITHER, 1, "HTTP 500"),
    # -- commit
    Row("a project for review", None, 2, 1, BOTH, 0, "in the prearchive", **MANUAL),
    Row("a commit forbidden", page(403, "Forbidden", where=COMMIT), 2, 1, BOTH, 1,
        "HTTP 403 | right to edit"),
    Row("a commit whose session was deleted", None, 2, 1, BOTH, 1, "no longer|gone|deleted",
        before=row_deleted_at_commit),
    Row("a commit whose answer was lost", on(COMMIT, "reset after"), 2, 1, BOTH, 0,
        "archived, 4 files verified"),
    Row("a commit whose answer was cut", on(COMMIT, "truncate"), 2, 1, BOTH, 0,
        "archived, 4 files verified"),
    Row("a commit done, then 502", late(502, COMMIT), 2, 1, BOTH, 0, "archived, 4 files"),
    Row("a commit done, then 503", late(503, COMMIT), 2, 1, BOTH, 0, "archived, 4 files"),
    Row("a commit done, then 504", late(504, COMMIT), 2, 1, BOTH, 0, "archived, 4 files"),
    Row("a commit that goes on after 504", on(COMMIT, "background"), 2, 1, BOTH, 0,
        "archived, 4 files", knobs={"build_delay": 0.5, "archive_seconds": 1}),
    Row("a commit for review whose answer was lost", on(COMMIT, "reset after"), 2, 2, BOTH, 0,
        "in the prearchive", **MANUAL),
    Row("a commit not done, 502", proxy(502, COMMIT), 2, 2, BOTH, 0, AGAIN),
    Row("a commit not done, 503", proxy(503, COMMIT), 2, 2, BOTH, 0, AGAIN),
    Row("a commit not done, 504", proxy(504, COMMIT), 2, 2, BOTH, 0, AGAIN),
    Row("a commit not done, reset", on(COMMIT, "reset before"), 2, 2, BOTH, 0, AGAIN),
    Row("a commit that is 503 for good", ever(proxy(503, COMMIT)), 2, 2, BOTH, 1, "HTTP 503"),
    Row("a commit of a locked session", page(409, "session document locked", where=COMMIT), 2, 2,
        BOTH, 0, AGAIN),
    Row("a commit that fails", page(500, "boom", where=COMMIT), 2, 1, BOTH, 1, "HTTP 500, boom"),
    Row("a commit that is a login page", on(COMMIT, "login page"), 2, 1, BOTH, 3, "login"),
    Row("a commit with the login refused", page(401, where=COMMIT), 2, 1, BOTH, 3,
        "login refused"),
    Row("a commit that is redirected", on(COMMIT, "redirect", location=LOGIN_VM), 2, 1, BOTH, 3,
        "redirect|login"),
    Row("a commit with an empty answer", on(COMMIT, "empty"), 2, 1, BOTH, 1, "HTTP 200"),
    Row("a commit that takes longer than XNAT waits", None, 2, 1, BOTH, 0, "archived, 4 files",
        knobs={"archive_timeout": 0.3, "archive_seconds": 1.5}),
    Row("a conflict with the same images", None, 2, 1, BOTH, 1,
        "matching files | --overwrite-files", before=already_there, again="--overwrite-files"),
    Row("a conflict with the same images, 1.7.5", None, 2, 1, BOTH, 1,
        "matching files | --overwrite-files", before=already_there, again="--overwrite-files",
        knobs={"version": "1.7.5"}),
    Row("a conflict with the same images by other names", None, 2, 1, BOTH, 1,
        "matching files | --overwrite-files", before=already_there_renamed,
        again="--overwrite-files"),
    Row("the same images with --overwrite-files", None, 2, 1, BOTH, 0, "archived, 4 files",
        before=already_there, options="--overwrite-files"),
    Row("a conflict of studies", None, 2, 1, BOTH, 1, "session UID | rename", before=other_study,
        mend=empty_archive),
    Row("a conflict of subjects", None, 2, 1, BOTH, 1, "another Subject | rename",
        before=others_label, mend=empty_archive),
    Row("a conflict whose answer was lost", on(COMMIT, "reset after"), 2, 1, BOTH, 1,
        "another Subject | rename", before=others_label, mend=empty_archive),
    # -- verification
    Row("fewer files than sent", counted(1, 1), 2, 1, BOTH, 1, r"\b3 files | \b4 "),
    Row("more files than sent", counted(2, 7), 2, 1, BOTH, 1, r"\b9 files | \b4 "),
    Row("counts that come late", proxy(503, "scans/1/resources"), 2, 1, BOTH, 0,
        f"{AGAIN} | 4 files verified", knobs={"all_scans": False}),
    Row("counts that cannot be read", ever(page(500, "boom", where="scans/1/resources")), 2, 1,
        BOTH, 1, "HTTP 500, boom", knobs={"all_scans": False}),
    Row("a server that does not know ALL", None, 2, 1, BOTH, 0, "archived, 4 files verified",
        knobs={"all_scans": False}),
    Row("a server that forgets one of ALL", ever(on(
        "scans/ALL/resources", "answer", status=200, headers=JSON_PAGE,
        body=rows_of({"label": "DICOM", "cat_id": "1", "file_count": "2"}))), 2, 1, BOTH, 0,
        "archived, 4 files verified"),
    Row("a series filter that keeps nothing", None, 2, 0, FIRST, 1, "filter",
        knobs={"reject": ("B_0002",)}, mend=no_filter),
    Row("a filter that keeps nothing of the only session", None, 2, 0, NEITHER, 1, "filter",
        knobs={"reject": ("A_0001", "B_0002")}, mend=no_filter),
    # -- other servers
    *(Row(f"XNAT {version}", None, 2, 1, BOTH, 0, f"XNAT {re.escape(version)}",
          knobs={"version": version}) for version in ("1.7.5", "1.8.2", "1.9.2.1", "1.10.0-RC2")),
    Row("a context path", None, 2, 1, BOTH, 0, "archived", knobs={"context_path": "/xnat"}),
    Row("a 503 below a context path", proxy(503), 3, 1, BOTH, 0, AGAIN,
        knobs={"context_path": "/xnat"}),
    Row("an alias of the project", None, 2, 1, BOTH, 0, "project BRAIN",
        call={"project": "brainy"}),
]


# Rows beside a row that goes the same way through the program.
VARIATIONS = re.compile(
    "a 400 that says (?!Concurrent file)|a 50[23] heals|a 503 with Retry|a 429 (whose|without)|"
    "a 502 after|a 408 while|a 413 before|a reset before|a hang-up|an alias's other|"
    "a login (without|that is (reset|not|redirected))|a version that (fails|a proxy|is a page)|"
    "a project (that is a page|without)|a right that fails|a login refused at|"
    "a commit (done, then|not done,) 50[23]|a commit whose answer was cut|"
    "a conflict with the same images(,| by)|XNAT 1.(8.2|9.2)|a 503 below")


class TheFaultTable(FaultTest):

    def play(self, row: Row) -> None:
        """Check one row."""
        self.tree()
        with self.xnat(**row.knobs) as server:
            if row.before:
                row.before(self, server)
            base = len(server.imports()), len(server.commits())
            faults = (row.fault,) if isinstance(row.fault, Fault) else row.fault or ()
            for fault in faults:
                server.faults.append(fault)
            ran = self.upload(server, "--procs", "1", *row.options.split(), timeout=150, **row.call)
            got = (len(server.imports()) - base[0], len(server.commits()) - base[1],
                   START if row.series is START else self.statuses(), ran.status)
            self.assertEqual(got, (row.posts, row.commits, row.series, row.status), ran.text)
            for word in row.words.split(" | "):
                self.assertRegex(ran.text, word)
            self.tidy(ran)
            if row.more:
                row.more(self, server)
            server.faults.clear()
            self.quiet(server)
            if row.series is START and not row.mend:
                self.assertEqual(server.labels(), [])
                return
            if ran.status:
                self.complete(server, row)
            self.assert_whole(server, row.archived, ran.text)

    def complete(self, server: Standin, row: Row) -> None:
        """The same command, without the fault, ends with everything there."""
        if row.mend:
            row.mend(self, server)
        call = {} if row.series is START else row.call
        ran = self.upload(server, "--procs", "1", *(row.options + " " + row.again).split(),
                          timeout=150, **call)
        self.assertEqual(ran.status, 0, f"the second run:\n{ran.text}")
        self.tidy(ran)


def as_test(row: Row) -> Callable[[TheFaultTable], None]:
    def test(self: TheFaultTable) -> None:
        self.play(row)

    test = variation(test) if VARIATIONS.match(row.name) else test
    return slow(test) if "slow" in row.name else test


for _number, _row in enumerate(ROWS):
    if ELSEWHERE and (_number + sys.version_info[1]) % 3:
        continue  # CI has played them all on its first Python: each other one plays a third
    _name = "test_" + re.sub(r"\W+", "_", _row.name).strip("_")
    assert not hasattr(TheFaultTable, _name), f"two rows are called {_name}"
    setattr(TheFaultTable, _name, as_test(_row))


# ---- What does not fit into a line -----------------------------------------------------------

def overlap(requests: List[Request]) -> bool:
    """Whether two of these requests were under way at once."""
    ordered = sorted(requests, key=lambda each: each.started)
    return any(later.started < float(earlier.answered or 1e99)
               for earlier, later in zip(ordered, ordered[1:]))


class FaultsOfManySessions(FaultTest):

    def test_a_server_that_goes_away_for_good_stops_the_run_after_one_series_tries(self) -> None:
        self.tree(*(f"{number:03}/pre/A_0001" for number in range(1, 7)))
        with self.xnat() as server:
            # Everything works until the second import; from then on nothing does.
            server.fail("reset before", IMPORT, skip=1, times=None)
            server.fail("reset before", BUILD, skip=1, times=None)
            ran = self.run_it(server, "--procs", "1", "--retries", "1", status=3, posts=3,
                              words="server is gone | 5 not finished|not sent")
            self.assertEqual(self.statuses(), "sent" + 5 * ", not sent", ran.text)
            server.faults.clear()
            self.run_it(server, "--procs", "1", status=0, posts=5, commits=5)
            self.assert_whole(server)

    def test_a_server_that_goes_away_with_four_uploads_under_way_stops_all_of_them(self) -> None:
        self.tree(*(f"{number:03}/pre/A_0001" for number in range(1, 13)))
        with self.xnat() as server:
            server.fail("close", IMPORT, skip=2, times=None)
            server.fail("close", BUILD, skip=1, times=None)
            self.run_it(server, "--procs", "4", "--retries", "1", status=3, words="server is gone")
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

    def test_up_to_1_8_7_the_series_of_a_session_go_strictly_one_after_another(self) -> None:
        for version in ("1.7.5", "1.8.2", "1.8.7"):
            with self.subTest(version), self.xnat(version=version, seconds_per_file=0.05) as server:
                self.tree(*(f"007/pre/S_{number:04}" for number in range(1, 6)))
                self.run_it(server, "--procs", "4", "--again", status=0, posts=5, commits=1)
                self.assertFalse(overlap(server.imports()), "two at once")
                self.assert_whole(server)

    def test_from_1_8_8_on_series_go_side_by_side_once_the_first_has_made_the_session(self) -> None:
        for version in ("1.8.8", "1.10"):
            with self.subTest(version), self.xnat(version=version, seconds_per_file=0.15) as server:
                self.tree(*(f"007/pre/S_{number:04}" for number in range(1, 6)))
                self.run_it(server, "--procs", "4", "--again", status=0, posts=6, commits=1)
                first, *others = server.imports()
                self.assertTrue(overlap(others), "never two at once")
                for other in others:
                    self.assertGreaterEqual(other.started, float(first.answered or 1e99))
                self.assert_whole(server)

    def test_the_parts_of_one_series_go_in_order(self) -> None:
        self.tree("007/pre/A_0001", files=7)
        with self.xnat(seconds_per_file=0.05) as server:
            self.run_it(server, "--procs", "4", "--max-files", "2", status=0, posts=4, commits=1)
            self.assertFalse(overlap(server.imports()))
            sent = [name for each in server.imports() for name in each.entries]
            self.assertEqual(sent, sorted(sent))
            self.assert_whole(server)

    def test_series_that_were_archived_before_are_merged_with_and_counted(self) -> None:
        self.tree("007/pre/C_0003", files=3)
        with self.xnat() as server:
            self.run_it(server, "--workdir", str(self.folder / "elsewhere"), status=0)
            self.tree()
            self.run_it(server, "--only", "007/pre", "--config", self.without("C_0003"),
                        status=0, posts=2, commits=1, words="verified")
            self.assert_whole(server)

    def without(self, name: str) -> str:
        """A config that leaves a series out."""
        path = self.folder / "config.json"
        path.write_text(json.dumps({"Exclude": [name]}))
        return str(path)

    def test_images_that_lie_twice_in_a_series_are_kept_once_and_that_is_said(self) -> None:
        self.tree()
        copy = self.root / "007/pre/A_0001/copy"
        copy.mkdir()
        (copy / "IM0001.dcm").write_bytes((self.root / "007/pre/A_0001/IM0001.dcm").read_bytes())
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2, commits=1,
                        words="1 file equal in name and image | archived, 4 files")
            self.assertEqual(set(server.instances("007_pre").values()), {1})

    def test_one_image_under_two_names_is_kept_twice_as_xnat_does(self) -> None:
        self.tree()
        folder = self.root / "007/pre/A_0001"
        (folder / "copy.dcm").write_bytes((folder / "IM0001.dcm").read_bytes())
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2, commits=1, words="archived, 5 files")

    def test_equal_names_of_different_images_are_all_kept(self) -> None:
        self.tree()
        write_series(self.root / "007/pre/A_0001/more", study=uid("007", "pre"), number=1, files=2,
                     series=uid("another"))
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2, commits=1, words="archived, 6 files")
            self.assert_whole(server)

    def test_a_series_that_others_left_in_the_prearchive_is_joined_and_counted(self) -> None:
        self.tree("007/pre/C_0003", files=3)
        with self.xnat() as server:
            server.fail("error page", COMMIT, status=500, text="no")
            self.run_it(server, "--workdir", str(self.folder / "elsewhere"), status=1)
            self.tree()
            config = "--config", self.without("C_0003")
            ran = self.upload(server, *config)  # more files than it sent: verified or told, not hid
            self.assertIn("7 files", ran.text)
            self.assertIn(ran.status, (0, 1))
            self.run_it(server, *config, status=0, posts=0, commits=0)
            self.assert_whole(server)

    def test_images_that_others_left_in_the_prearchive_are_replaced_and_counted_once(
            self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("error page", COMMIT, status=500, text="no")
            self.run_it(server, "--workdir", str(self.folder / "elsewhere"), status=1)
            self.run_it(server, status=0, posts=2, commits=1, words="archived, 4 files")
            self.assert_whole(server)

    def test_two_studies_in_one_session_are_told_and_not_committed(self) -> None:
        self.tree()
        write_series(self.root / "007/pre/C_0003", study=uid("other"), number=3, files=2)
        with self.xnat() as server:
            self.run_it(server, "--procs", "1", status=1, posts=3, commits=0, words="two studies")
            self.assertEqual(server.archive, {})

    def test_a_login_refused_while_four_uploads_run_is_not_tried_twenty_times(self) -> None:
        self.tree(*(f"{number:03}/pre/A_0001" for number in range(1, 13)))
        with Standin(seconds_per_file=0.1) as server:  # four uploads may each meet it once
            server.fail("disable account", IMPORT, skip=2)
            ran = self.upload(server, "--procs", "4")
            self.assertEqual(ran.status, 3, ran.text)
            self.assertIn("login refused", ran.text)
            refused = [each for each in server.requests if each.status == 401]
            self.assertLessEqual(len(refused), 5)
            enable_alice(self, server)
            self.run_it(server, status=0)
            self.assert_whole(server)

    def test_every_wait_is_announced_in_one_line_with_its_number(self) -> None:
        self.tree("007/pre/A_0001")
        with self.xnat() as server:
            server.fail("status", IMPORT, status=503, times=2)
            ran = self.run_it(server, "--retries", "2", status=0, posts=3, words=AGAIN)
            lines = [line for line in ran.err.splitlines() if AGAIN in line]
            self.assertEqual(len(lines), 2, ran.err)
            first, second, third = server.imports()
            self.assertGreater(third.started - float(second.answered or 0),
                               second.started - float(first.answered or 0), "waits grow")


# ---- The ledger ------------------------------------------------------------------------------

FULL = """import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""


class TheLedger(FaultTest):

    def held_back(self, server: Standin) -> None:
        """A run after which both series are sent and nothing is committed."""
        server.fail("error page", COMMIT, status=500, text="not today", times=None)
        self.run_it(server, "--procs", "1", "--retries", "0", status=1, posts=2)
        server.faults.clear()

    def test_a_second_run_sends_nothing(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2, commits=1)
            self.run_it(server, status=0, posts=0, commits=0, words="already there")
            self.assertEqual(self.statuses(), "already there, already there")
            self.assert_whole(server)

    def test_a_torn_last_line_costs_one_part(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.held_back(server)
            lines = self.ledger().read_bytes().splitlines(keepends=True)
            self.ledger().write_bytes(b"".join(lines[:-1]) + lines[-1][:len(lines[-1]) // 2])
            self.run_it(server, status=0, posts=1, commits=1)
            self.assert_whole(server)
            self.run_it(server, status=0, posts=0, commits=0)

    def test_zeros_at_the_end_as_after_a_power_cut_cost_nothing(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.held_back(server)
            with self.ledger().open("ab") as file:
                file.write(b"\0" * 4096)
            self.run_it(server, status=0, posts=0, commits=1)
            self.assert_whole(server)
            self.run_it(server, status=0, posts=0, commits=0)

    def test_a_line_torn_at_the_end_of_a_whole_run_costs_nothing(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2, commits=1)
            whole = self.ledger().read_bytes()
            self.ledger().write_bytes(whole[:-10])
            self.run_it(server, status=0, posts=0, commits=0)
            self.assert_whole(server)

    def test_lines_of_another_version_are_passed_over(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.held_back(server)
            text, changed = re.subn(r'"v": ?\d+', '"v": 99', self.ledger().read_text())
            self.assertGreater(changed, 1, text)
            self.ledger().write_text(text)
            self.run_it(server, status=0, posts=2, commits=1)
            self.assert_whole(server)

    def test_lines_that_mean_nothing_do_no_harm(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2, commits=1)
            with self.ledger().open("ab") as file:
                file.write(b'[]\nnull\n"x"\n17\n{"v": 1}\n\xff\xfe\n{"v": 99, "event": "sent"}\n')
            self.run_it(server, status=0, posts=0, commits=0)
            self.assert_whole(server)

    def test_without_the_ledger_what_waits_in_the_prearchive_is_merged_with(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.held_back(server)
            self.ledger().unlink()
            self.run_it(server, status=0, posts=2, commits=1)
            self.assert_whole(server)

    def test_without_the_ledger_a_conflict_with_the_archive_is_told_with_its_remedy(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0)
            self.ledger().unlink()
            self.run_it(server, status=1, posts=2, commits=1,
                        words="matching files | --overwrite-files")
            self.run_it(server, "--overwrite-files", status=0, posts=0, commits=1)
            self.assert_whole(server)

    def test_a_changed_file_in_an_archived_series_is_told_and_overwritten_on_demand(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0)
            write_series(self.root / "007/pre/A_0001", study=uid("007", "pre"), number=1, files=2,
                         patient="007", rows=24)
            self.run_it(server, status=1, posts=1, commits=1,
                        words="changed | A_0001 | --overwrite-files")
            self.run_it(server, "--overwrite-files", status=0, posts=0, commits=1)
            self.assert_whole(server)
            self.run_it(server, status=0, posts=0, commits=0)

    def test_a_new_series_in_an_archived_session_is_merged(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0)
            self.tree("007/pre/C_0003")
            self.run_it(server, status=0, posts=1, commits=1, words="6 files")
            self.assert_whole(server)
            self.run_it(server, status=0, posts=0, commits=0)

    def test_a_session_held_back_is_completed_by_the_next_run(self) -> None:
        self.tree("007/pre/A_0001", "007/pre/B_0002", "008/pre/A_0001")
        with self.xnat() as server:
            server.fail("error page", IMPORT, status=400, text="no", skip=1)
            self.run_it(server, "--procs", "1", status=1, posts=3, commits=1, words=HELD)
            self.run_it(server, "--procs", "1", status=0, posts=1, commits=1)
            self.assert_whole(server)

    def test_what_was_sent_and_not_committed_is_committed_by_the_next_run(self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("stall before", COMMIT, seconds=60)
            run = self.start(self.arguments(server.url, "--procs", "1"))
            self.assertTrue(server.wait_for(server.commits, 60))
            run.kill()
            run.wait()
            server.faults.clear()
            self.run_it(server, status=0, posts=0, commits=1)
            self.assert_whole(server)

    def test_what_was_sent_and_deleted_in_the_prearchive_is_sent_again(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.held_back(server)
            for row in server.prearchive:
                server.store.remove(row)
            self.run_it(server, status=0, posts=2, commits=1, words="no longer in the prearchive")
            self.assert_whole(server)

    def test_what_somebody_else_has_archived_meanwhile_is_neither_sent_nor_committed(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.held_back(server)
            server.store.commit(server.prearchive[0], archive=True, overwrite=False)
            self.run_it(server, status=0, posts=0, commits=0, words="archived")
            self.assert_whole(server)
            self.run_it(server, status=0, posts=0, commits=0)

    def test_again_sends_all_of_it_again(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.held_back(server)
            self.run_it(server, "--again", status=0, posts=2, commits=1)
            self.assert_whole(server)
            self.run_it(server, "--again", status=1, posts=2, words="--overwrite-files")
            self.run_it(server, "--again", "--overwrite-files", status=0, posts=2, commits=1)
            self.assert_whole(server)
            self.run_it(server, status=0, posts=0, commits=0)

    def test_again_forgets_only_what_is_chosen(self) -> None:
        self.tree("007/pre/A_0001", "008/pre/A_0001")
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2)
            self.run_it(server, "--again", "--only", "008", "--overwrite-files", status=0, posts=1)
            self.run_it(server, status=0, posts=0, commits=0)
            self.assert_whole(server)

    def test_no_commit_leaves_it_to_xnat_until_a_run_without_it(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, "--no-commit", status=0, posts=2, commits=0, words="no-commit")
            self.assertFalse(any("prevent_auto_commit" in each.params for each in server.imports()))
            self.run_it(server, "--no-commit", status=0, posts=0, commits=0)
            self.run_it(server, status=0, posts=0, commits=1)
            self.assert_whole(server)

    def test_other_max_files_send_no_file_twice(self) -> None:
        self.tree("007/pre/A_0001", "007/pre/B_0002", files=9)
        with self.xnat() as server:
            server.fail("error page", IMPORT, status=400, text="no", skip=2)
            self.run_it(server, "--procs", "1", "--max-files", "2", status=1, commits=0)
            self.run_it(server, "--procs", "1", "--max-files", "4", status=0, commits=1)
            sent = [(each.address, each.params["EXPT_LABEL"], name)
                    for each in server.imports() if each.status == 200 for name in each.entries]
            self.assertEqual(len(sent), 18, "9 files of 2 series")
            self.assert_whole(server)
            self.run_it(server, "--max-files", "3", status=0, posts=0, commits=0)

    def test_another_project_knows_nothing_of_the_first(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2)
            self.run_it(server, status=0, posts=2, commits=1, project="OVER")
            self.assertEqual({project for project, _ in server.archive}, {"BRAIN", "OVER"})
            self.run_it(server, status=0, posts=0)

    def test_a_ledger_that_cannot_be_used_stops_before_anything_is_sent(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.run_it(server, status=0)
            place = self.ledger()
            place.unlink()
            place.mkdir()
            self.run_it(server, status=3, posts=0, words="ledger")

    def full_disk(self, lines: int, more: int, posts: int) -> None:
        """The ledger's disk has room for so many lines and `more` bytes: no file may grow beyond
        a limit that it has nearly reached, and that no other file comes near to."""
        self.tree()
        limit = 300_000
        with self.xnat() as server:
            place, rehearsal = self.work, self.folder / "rehearsal"
            self.work = rehearsal
            self.run_it(server, "--procs", "1", status=0)
            name, written = self.ledger().name, self.ledger().read_bytes().splitlines(True)
            empty_archive(self, server)
            self.work = place
            self.work.mkdir()
            filled = limit - sum(map(len, written[:lines])) - more
            (self.work / name).write_bytes(b"#" * (filled - 1) + b"\n")
            before = len(server.imports())
            ran = self.run_command([sys.executable, "-c", FULL, str(limit), *self.arguments(
                server.url, "--procs", "1")])
            self.assertEqual(ran.status, 3, ran.text)
            self.assertRegex(ran.text, "ledger.*: ")
            self.tidy(ran)
            self.assertLessEqual(len(server.imports()) - before, posts, "it went on unrecorded")
            self.assertEqual(server.archive, {})
            self.run_it(server, "--procs", "1", status=0)
            self.assert_whole(server)

    # The lines of a run here: opened, sent, sent, archived.

    def test_a_full_disk_under_the_ledger_stops_the_run(self) -> None:
        self.full_disk(0, 0, posts=0)

    def test_a_disk_that_fills_after_the_first_part_stops_the_run(self) -> None:
        self.full_disk(2, 0, posts=2)

    def test_a_disk_that_fills_in_the_middle_of_a_ledger_line_stops_the_run(self) -> None:
        self.full_disk(1, 100, posts=1)

    def test_a_disk_that_fills_in_the_last_ledger_line_before_the_commit_stops_the_run(
            self) -> None:
        self.full_disk(2, 100, posts=2)


if __name__ == "__main__":
    unittest.main()
