"""What the tests of faults share: a place for one run, what must come of it, and tables of faults.

Each row of a table is one session of two series, a fault, and what must come of it. After a fault
that heals, everything is archived exactly once; after any other, the same command run again without
the fault must end there.
"""

import base64
import io
import json
import re
import urllib.request
import zipfile
from pathlib import Path
from typing import Any, Callable, Collection, Dict, List, Mapping, NamedTuple, Tuple, Union
from urllib.parse import urlencode

from tests.dicom import digests, uid, write_series
from tests.support import WHOLE, Ran, UploadTest, slow, variation
from tests.xnat_standin import Fault, Request, Standin

# Where a fault strikes.
IMPORT = "POST /data/services/import"
COMMIT = "action=commit"
LOGIN = "POST /data/JSESSION"
BUILD = "buildInfo"

HELD = "held back"
AGAIN = "trying again in"
HEALING = ("Concurrent file sends of the same data is not supported.",
           "session processing in progress", "Concurrent modification is discouraged",
           "Duplicate archive attempt", "Destination session in use")


# ---- A place for one run ---------------------------------------------------------------------

class FaultTest(UploadTest):
    """What the tests of faults share."""

    def tree(self, *paths: str, files: int = 2, **more: Any) -> None:
        """Make series folders, subject/session/series; numbers are taken from their ends."""
        for path in paths or ("007/pre/A_0001", "007/pre/B_0002"):
            subject, session, name = path.split("/")
            write_series(self.root / path, study=uid(subject, session), files=files,
                         number=int(name[-4:]), patient=subject, **more)

    def without(self, *names: str) -> Tuple[str, str]:
        """Options that leave series out."""
        path = self.folder / "config.json"
        path.write_text(json.dumps({"Exclude": names}))
        return "--config", str(path)

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

    def gives_back(self, server: Standin) -> None:
        """Each run that was let in has given its server session back, and last of all."""
        ours = [each for each in server.requests if each.path == "/data/JSESSION"]
        logins = [each for each in ours if each.method == "POST" and each.status == 200
                  and each.fault in ("", "drop sessions")]
        farewells = [each for each in ours if each.method == "DELETE"]
        self.assertGreaterEqual(len(farewells), len(logins), [each.method for each in ours])
        if logins:
            self.assertEqual(server.requests[-1].method, "DELETE", server.requests[-1])

    def log_if_any(self) -> str:
        return self.log() if self.work.is_dir() else ""

    def statuses(self, subject: str = "") -> str:
        """The series' statuses in the newest report, in the order of the folders."""
        keys = "subject", "session", "series", "status"
        return ", ".join(row[-1] for row in sorted([each[key] for key in keys]
                                                   for each in self.report()
                                                   if subject in ("", each["subject"])))

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

    def stays_so(self, server: Standin, *options: str, **call: Any) -> None:
        """The next run sends nothing, commits nothing and ends well."""
        self.run_it(server, *options, status=0, posts=0, commits=0, **call)

    def ledger(self) -> Path:
        """The file that remembers."""
        (found,) = self.work.glob("*ledger*")
        return found


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


def import_by_hand(server: Standin, *images: Path, subject: str = "007") -> None:
    """Another tool sends these images to session 007_pre."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as entries:
        for image in images:
            entries.write(str(image), image.name)
    query = urlencode({"import-handler": "DICOM-zip", "PROJECT_ID": "BRAIN", "SUBJECT_ID": subject,
                       "EXPT_LABEL": "007_pre", "prevent_auto_commit": "true"})
    login = base64.b64encode(b"alice:s3cret").decode()
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(urllib.request.Request(
        f"{server.url}/data/services/import?{query}", packed.getvalue(),
        {"Authorization": "Basic " + login, "Content-Type": "application/zip"})).close()


# ---- Faults ----------------------------------------------------------------------------------

JSON_PAGE = (("Content-Type", "application/json"),)


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


# ---- Tables ----------------------------------------------------------------------------------

# What the report says of A_0001 and B_0002. None: the run ended before there was a report.
BOTH, SECOND, FIRST, NEITHER = ("sent, sent", "not sent, sent", "sent, not sent",
                                "not sent, not sent")
THERE = "already there, already there"
START = None

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
    beside: bool = False              # it goes the same way through the program as a neighbour
    waits: bool = False               # it takes seconds


def narrowed(fault: Fault, label: str) -> Fault:
    """The same fault for one session only."""
    where = {IMPORT: rf"{IMPORT}\?.*EXPT_LABEL={label}&", COMMIT: rf"/{label}\?{COMMIT}"}.get(
        fault.where, rf"/{label}\b.*{fault.where}")
    return Fault(**dict(vars(fault), where=where, text=fault.text.replace("LABEL", label)))


def requests_of(server: Standin, label: str) -> Tuple[int, int]:
    """Imports and commits of one session."""
    return (len([each for each in server.imports() if each.params["EXPT_LABEL"] == label]),
            len([each for each in server.commits() if each.path.endswith("/" + label)]))


class TableTest(FaultTest):

    def play(self, row: Row) -> None:
        """Check one row in a run of its own, one upload at a time."""
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
                   START if row.series is START else self.statuses("007"), ran.status)
            self.assertEqual(got, (row.posts, row.commits, row.series, row.status), ran.text)
            for word in row.words.split(" | "):
                self.assertRegex(ran.text, word)
            self.tidy(ran)
            self.gives_back(server)
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

    def play_together(self, rows: Collection[Row], options: str = "--retries 1",
                      knobs: Mapping[str, Any] = {}, call: Mapping[str, Any] = {},
                      archived: bool = True) -> None:
        """Check rows in one run, each with a session of its own: sessions are independent.

        XNAT is so old that the series of a session go one after another.
        """
        rows = [row for row in rows if WHOLE or not row.beside]
        subjects = {row.name: f"{number:03}" for number, row in enumerate(rows, 1)}
        with self.xnat(**dict({"version": "1.8.2"}, **knobs)) as server:
            for row in rows:
                subject = subjects[row.name]
                self.tree(f"{subject}/pre/A_0001", f"{subject}/pre/B_0002")
                for fault in (row.fault,) if isinstance(row.fault, Fault) else row.fault or ():
                    server.faults.append(narrowed(fault, f"{subject}_pre"))
            ran = self.upload(server, "--procs", "8", *options.split(), timeout=150, **call)
            self.assertEqual(ran.status, max(row.status for row in rows), ran.text)
            for row in rows:
                subject = subjects[row.name]
                with self.subTest(row.name):
                    got = requests_of(server, f"{subject}_pre") + (self.statuses(subject),)
                    said = "\n".join(block for block in re.split(r"\n(?! {3})", ran.text)
                                     if f"{subject}_pre" in block)  # with what is indented below
                    self.assertEqual(got, (row.posts, row.commits, row.series), said)
                    waits = "".join(re.findall(rf".*{subject}_pre.*{AGAIN}.*", self.log()))
                    for word in row.words.split(" | "):  # many wait, and one of them tells it
                        self.assertRegex(waits if word in (AGAIN, "went silent") else said, word)
                    self.assertEqual(bool(re.search(rf"(?s)Failed \(.*{subject}_pre", ran.out)),
                                     bool(row.status), ran.out)
            self.tidy(ran)
            server.faults.clear()
            self.quiet(server)
            again = self.upload(server, *options.split(), timeout=150, **call)
            self.assertEqual(again.status, 0, f"the second run:\n{again.text}")
            self.assert_whole(server, archived, ran.text)


def as_test(row: Row) -> Callable[[TableTest], None]:
    def test(self: TableTest) -> None:
        self.play(row)

    test = variation(test) if row.beside else test
    return slow(test) if row.waits else test


def add_rows(case: Any, rows: Collection[Row]) -> None:
    """A test for each row."""
    for row in rows:
        name = "test_" + re.sub(r"\W+", "_", row.name).strip("_")
        assert not hasattr(case, name), f"two rows are called {name}"
        setattr(case, name, as_test(row))


def overlap(requests: List[Request]) -> bool:
    """Whether two of these requests were under way at once."""
    ordered = sorted(requests, key=lambda each: each.started)
    return any(later.started < float(earlier.answered or 1e99)
               for earlier, later in zip(ordered, ordered[1:]))
