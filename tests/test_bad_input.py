"""Bad input, each kind with its own test and its own sentence, through the real command line.

Each test says how the run ends, in which words, and what the server then holds.
"""

import base64
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import unittest
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from tests.dicom import (README_TREE, dicom_file, dicomdir_file, digests, readme_tree, uid,
                         write_series)
from tests.support import (EXCLUSIONS, ROOT, SCRIPT, Ran, UploadTest, drop_root_rights, missing,
                           need, shown_on, take_terminal)
from tests.support import load_tests as load_tests  # several at a time
from tests.xnat_standin import Standin, User

NOWHERE = "http://127.0.0.1:9"  # for calls that must end before anybody is contacted
JUNK = {
    ".DS_Store": b"\0\0\0\1Bud1" + b"\0" * 200,
    "._x": b"\0\5\x16\7\0\2\0\0Mac OS X        " + b"\0" * 200,
    "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600,
    "notes.txt": b"Scanned twice, the first one moved.\n" * 20,
    "empty.dcm": b"",
    "DICOMDIR": dicomdir_file(),
}
Row = Tuple[str, List[str], List[str]]  # a call, by its title: arguments, words of its sentence
# Many calls in one process, where a process each would take too long: main() is the whole command.
MANY = """
import io, json, sys, traceback
sys.path.insert(0, sys.argv[1])
import dicomUpload
ends = []
for sys.argv in json.load(sys.stdin):
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    try:
        status = dicomUpload.main()
    except SystemExit as end:
        status = end.code
    except Exception:
        traceback.print_exc()
        status = 1
    texts = []
    for stream in sys.stdout, sys.stderr:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    ends.append((status, *texts))
sys.__stdout__.write(json.dumps(ends))
"""


class BadInputTest(UploadTest):
    """Trees, and what became of them."""

    def setUp(self) -> None:
        super().setUp()
        self.numbers = itertools.count(1)

    def series(self, path: str, files: int = 2, **more: Any) -> List[str]:
        """Make subject/session/series; the digests of its files."""
        subject, session, _ = path.split("/")
        more.setdefault("study", uid(subject, session))
        write_series(self.root / path, number=next(self.numbers), files=files, **more)
        return list(digests(self.root / path).values())

    def image(self, path: str, instance: int = 1, **more: Any) -> str:
        """Make one file, subject/session/series/name, also below them; its digest."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        subject, session, series = file.relative_to(self.root).parts[:3]
        study = uid(subject, session)
        file.write_bytes(dicom_file(study=study, series=uid(study, series), instance=instance,
                                    description=series, **more))
        return digests(file.parent)[file.name]

    def hold(self, path: Path, mode: int = 0) -> None:
        """Take rights away from a file or folder, until the test is over."""
        self.addCleanup(path.chmod, 0o700)
        path.chmod(mode)

    def need_held_root(self) -> None:
        """Skip where even drop_root_rights leaves every file readable."""
        probe = self.folder / "probe"
        probe.touch(0)
        done = subprocess.run(["cat", str(probe)], preexec_fn=drop_root_rights,
                              stderr=subprocess.DEVNULL, check=False)
        if done.returncode == 0:
            missing(self, "permission bits do not hold here")

    def path_with(self, *tools: str, **stubs: str) -> Dict[str, str]:
        """An environment whose PATH has these programs and no others."""
        folder = self.folder / "bin"
        folder.mkdir()
        for tool in tools:
            (folder / tool).symlink_to(need(self, tool))
        for tool, text in stubs.items():
            (folder / tool).write_text("#!/bin/sh\n" + text, encoding="utf-8")
            (folder / tool).chmod(0o755)
        return {"PATH": str(folder)}

    def assert_says(self, ran: Ran, status: int, *words: str) -> None:
        """The run ended so, and said so."""
        self.assertEqual(ran.status, status, ran.text)
        for word in words:
            self.assertIn(word, ran.text)

    def assert_refused(self, ran: Ran, status: int, *words: str) -> None:
        """The run did nothing but to say why in one line."""
        self.assert_says(ran, status, *words)
        self.assertEqual(ran.out, "")
        self.assertRegex(ran.err, r"\AdicomUpload: [^\n]+\n\Z")
        self.assertLess(len(ran.err), 700)

    def run_many(self, calls: List[List[str]]) -> List[Ran]:
        """What the command does with each of these arguments."""
        process = self.start([sys.executable, "-c", MANY, str(ROOT)], stdin=subprocess.PIPE)
        out, err = process.communicate(json.dumps([call[1:] for call in calls]), timeout=60)
        self.assertEqual((process.returncode, err), (0, ""))
        return [Ran(*end) for end in json.loads(out)]

    def assert_table(self, status: int, rows: List[Row]) -> List[Ran]:
        """Every call is refused, in these words."""
        ends = self.run_many([arguments for _, arguments, _ in rows])
        for (title, _, words), ran in zip(rows, ends):
            with self.subTest(title):
                self.assertNotIn("Traceback", ran.err)
                self.assert_refused(ran, status, *words)
        return ends

    def assert_archived(self, server: Standin, label: str, wanted: List[str]) -> None:
        """The archive holds exactly these files in that session."""
        self.assertIn(("BRAIN", label), server.archive)
        self.assertEqual(server.stored(label), sorted(wanted))

    def assert_nothing_there(self, server: Standin) -> None:
        self.assertEqual(server.imports(), [])
        self.assertEqual(server.labels(), [])

    def lines(self, ran: Ran, *words: str) -> List[str]:
        """The lines of the output with all these words."""
        return [line for line in ran.out.splitlines() if all(word in line for word in words)]

    def row(self, series: str) -> Dict[str, str]:
        """The report's row of a series."""
        rows = [row for row in self.report() if row["series"] == series]
        self.assertEqual(len(rows), 1, rows)
        return rows[0]


class Rootdir(BadInputTest):
    """What ROOTDIR may not be."""

    def refuse_root(self, root: Path, *words: str) -> str:
        """Call with that ROOTDIR; the error output."""
        with self.xnat() as server:
            ran = self.upload(server, root=root)
            self.assertEqual(ran.status, 2, ran.text)
            for word in words + (str(root),):
                self.assertIn(word, ran.err)
            self.assertEqual(ran.out, "")
            self.assert_nothing_there(server)
        return ran.err

    def test_a_rootdir_that_is_missing(self) -> None:
        self.refuse_root(self.root, "does not exist")

    def test_a_rootdir_that_is_a_file(self) -> None:
        self.root.write_bytes(b"x")
        self.refuse_root(self.root, "is a file")

    def test_an_empty_rootdir_shows_the_layout(self) -> None:
        self.root.mkdir()
        self.refuse_root(self.root, "no series", "subject", "session", "series")

    def test_a_rootdir_without_series_shows_the_layout(self) -> None:
        (self.root / "007" / "pre").mkdir(parents=True)
        self.refuse_root(self.root, "no series", "subject", "session", "series")

    def test_a_rootdir_one_level_too_deep_names_the_folder_above(self) -> None:
        readme_tree(self.root, files=1)
        self.refuse_root(self.root / "007", "too deep", f"{self.root}.", "subject")

    def test_a_rootdir_one_level_too_shallow(self) -> None:
        readme_tree(self.root / "dicomdir", files=1)
        self.refuse_root(self.root, "too shallow", "subject")

    def test_a_rootdir_too_shallow_above_a_session_with_one_series(self) -> None:
        readme_tree(self.root / "dicomdir", files=1)
        shutil.rmtree(str(self.root / "dicomdir/007/pre/T2_FLAIR_0012"))
        self.refuse_root(self.root, "too shallow")

    def test_a_rootdir_without_any_dicom(self) -> None:
        (self.root / "007/pre/T1").mkdir(parents=True)
        (self.root / "007/pre/T1/notes.txt").write_text("nothing here but words and words")
        self.refuse_root(self.root, "DICOM")

    def test_a_rootdir_that_nobody_can_look_into(self) -> None:
        self.need_held_root()
        self.series("007/pre/T1")
        self.hold(self.root)
        with self.xnat() as server:
            ran = self.upload(server, preexec=drop_root_rights)
            self.assert_refused(ran, 2, str(self.root), "cannot be read", "permission")
            self.assert_nothing_there(server)

    def test_a_slice_whose_series_has_folders_of_files_is_not_too_shallow(self) -> None:
        self.series("007/pre/T1")
        wanted = [self.image(f"008/pre/ECHOES/echo{echo}/IM1", echo) for echo in (1, 2)]
        with self.xnat() as server:
            self.assert_says(self.upload(server, "--only", "008"), 0)
            self.assert_archived(server, "008_pre", wanted)

    def test_relative_rootdir_and_workdir_work(self) -> None:
        wanted = self.series("007/pre/T1")
        with self.xnat() as server:
            arguments = [sys.executable, str(SCRIPT), server.url, "alice", "s3cret", "BRAIN",
                         "dicomdir", "--workdir", "some where/work"]
            self.assert_says(self.run_command(arguments), 0)
            self.assert_archived(server, "007_pre", wanted)
        self.assertEqual(len(list((self.folder / "some where/work").glob("*.csv"))), 1)

    def test_the_workdir_is_work_unless_given(self) -> None:
        self.series("007/pre/T1")
        with self.xnat() as server:
            arguments = self.arguments(server.url)
            del arguments[-2:]
            self.assert_says(self.run_command(arguments), 0)
        self.assertEqual([row["status"] for row in self.report()], ["sent"])


class Config(BadInputTest):
    """The file that leaves series out."""

    def config(self, content: Any, name: str = "config.json") -> str:
        """Write one: bytes as they are, anything else as JSON."""
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return str(path)

    def test_a_config_that_is_no_config_is_refused_by_name(self) -> None:
        self.series("007/pre/T1")
        cases: List[Tuple[str, Any, List[str]]] = [
            ("not JSON", b'{"Exclude": [\n"A" "B"]}', ["JSON", "line 2", "column 5"]),
            ("empty", b"", ["JSON", "line 1", "column 1"]),
            ("not UTF-8", '{"Exclude": ["Sch\xe4del"]}'.encode("latin-1"), ["UTF-8"]),
            ("UTF-16", '{"Exclude": ["A"]}'.encode("utf-16"), ["UTF-8"]),
            ("Exclude is a string", {"Exclude": "AAHEAD"}, ["AAHEAD", '"Exclude": ["AAHEAD"]']),
            ("Exclude is null", {"Exclude": None}, ["null", '"Exclude": ["']),
            ("Exclude is an object", {"Exclude": {"a": 1}}, ['{"a": 1}', '"Exclude": ["']),
            ("an empty string", {"Exclude": ["A", ""]}, ['""', '"Exclude": ["']),
            ("a number", {"Exclude": ["A", 7]}, ["7", '"Exclude": ["']),
            ("a list in the list", {"Exclude": [["A"]]}, ['["A"]', '"Exclude": ["']),
            ("an unknown key", {"Exclude": ["A"], "exclude": ["B"]}, ['"exclude"']),
            ("a list at top level", ["AAHEAD"], ["AAHEAD", '"Exclude": ["']),
            ("a string at top level", "AAHEAD", ["AAHEAD", '"Exclude": ["']),
            ("the same key twice", b'{"Exclude": ["A"], "Exclude": ["B"]}', ["Exclude", "twice"]),
            ("brackets without end", b"[" * 100000, ["JSON"]),
        ]
        with self.xnat() as server:
            rows = []
            for number, (title, content, words) in enumerate(cases):
                path = self.config(content, f"{number}.json")
                rows.append((title, self.arguments(server.url, "--config", path), [path] + words))
            self.assert_table(2, rows)
            self.assertEqual(server.requests, [])
        self.assertFalse(self.work.exists())

    def test_a_config_that_is_missing(self) -> None:
        self.series("007/pre/T1")
        ran = self.run_command(self.arguments(NOWHERE, "--config", "no.json"))
        self.assert_refused(ran, 2, "no.json")
        self.assertRegex(ran.err, "does not exist|No such file")
        self.assertNotIn("disk", ran.err)  # nothing is wrong with that

    def test_a_config_that_is_a_folder(self) -> None:
        self.series("007/pre/T1")
        ran = self.run_command(self.arguments(NOWHERE, "--config", str(self.root)))
        self.assert_refused(ran, 2, str(self.root))
        self.assertRegex(ran.err, "is a folder|is a directory|Is a directory")
        self.assertNotIn("disk", ran.err)

    def test_a_config_with_a_byte_order_mark_or_nothing_to_exclude_will_do(self) -> None:
        self.series("007/pre/T1")
        contents: List[Any] = [b'\xef\xbb\xbf{"Exclude": ["t1"]}', {}, {"Exclude": []}]
        ends = self.run_many([
            self.arguments(NOWHERE, "--dry-run", "--config", self.config(content, f"{number}.json"))
            for number, content in enumerate(contents)])
        for content, left_out, ran in zip(contents, (1, 0, 0), ends):
            with self.subTest(content=content):
                self.assert_says(ran, 0, f"{left_out} left out")

    def test_the_readme_config_excludes_exactly_the_folders_that_the_readme_says(self) -> None:
        readme_tree(self.root, files=1)
        with self.xnat() as server:
            self.assert_says(self.upload(server, "--config", str(EXCLUSIONS)), 0, "4 left out")
            wanted = [path for path in README_TREE if not re.search("JJWANGS|AAHEAD", path)]
            self.assertEqual(server.labels(), ["007_post", "007_pre", "008_post", "008_pre"])
            for label in server.labels():
                self.assert_archived(server, label, [
                    digest for path in wanted if path.startswith(label.replace("_", "/") + "/")
                    for digest in digests(self.root / path).values()])

    def test_exclusions_look_at_the_series_folder_only_and_in_any_case(self) -> None:
        wanted = self.series("scout1/Scouting/T1", name="scout{}.dcm")
        wanted.append(self.image("scout1/Scouting/T2/scout/IM1"))
        for name in ("SCOUT", "aa_sCoUt_0001", "Kopf \u00c4RZTE"):
            self.series(f"scout1/Scouting/{name}")
        config = self.config({"Exclude": ["Scout", "\u00e4rzte"]})
        with self.xnat() as server:
            ran = self.upload(server, "--config", config)
            self.assert_says(ran, 0, "3 left out")
            self.assert_archived(server, "scout1_Scouting", wanted)
        for name in ("SCOUT", "aa_sCoUt_0001"):
            self.assertEqual(len(self.lines(ran, name, "left out", '"Scout"')), 1)
            row = self.row(name)
            self.assertEqual((row["status"], row["files"]), ("left out", "0"))

    def test_a_tree_that_is_left_out_altogether_is_no_failure(self) -> None:
        self.series("007/pre/T1")
        with self.xnat() as server:
            ran = self.upload(server, "--config", self.config({"Exclude": ["T1"]}))
            self.assert_says(ran, 0, "1 left out")
            self.assert_nothing_there(server)


class MeetingTheServer(BadInputTest):
    """Address, login, project: all before the first byte."""

    def setUp(self) -> None:
        super().setUp()
        self.wanted = self.series("007/pre/T1")

    def test_a_wrong_password_is_tried_once(self) -> None:
        with self.xnat() as server:
            ran = self.upload(server, password="wrong-one")
            self.assert_refused(ran, 3, "alice", "401", "PASS")
            self.assertEqual([request.status for request in server.requests], [401])
            self.assert_nothing_there(server)

    def test_a_project_that_is_not_there(self) -> None:
        with self.xnat() as server:
            self.assert_table(3, [
                (project, self.arguments(server.url, project=project),
                 [f"project {project}", "alice"])
                for project in ("NOPE", "SECRET", "brain", "../../x", "a b?c#d%41")])
            self.assert_nothing_there(server)

    def test_a_project_that_can_only_be_read(self) -> None:
        with self.xnat() as server:
            self.assert_table(3, [
                (user, self.arguments(server.url, user=user, password=password, project=project),
                 [f"project {project}", user, "owner"])
                for user, password, project in (("bob", "b0b", "BRAIN"),
                                                ("alice", "s3cret", "PUBLIC"))])
            self.assert_nothing_there(server)

    def test_the_alias_of_a_project_stands_for_the_project(self) -> None:
        with self.xnat() as server:
            self.assert_says(self.upload(server, project="brainy"), 0, "BRAIN")
            self.assertEqual([each.params["PROJECT_ID"] for each in server.imports()], ["BRAIN"])
            self.assert_archived(server, "007_pre", self.wanted)

    def test_a_server_that_is_down(self) -> None:
        with socket.socket() as taken:  # bound and not listening: nobody else can have this port
            taken.bind(("127.0.0.1", 0))
            url = "http://127.0.0.1:%d" % taken.getsockname()[1]
            ran = self.run_command(self.arguments(url))
        self.assert_refused(ran, 3, url, "nothing answers", "check")

    def test_a_server_whose_name_nobody_knows(self) -> None:
        ran = self.run_command(self.arguments("http://xnat.invalid"))
        self.assert_refused(ran, 3, "http://xnat.invalid", "name", "check")

    def test_a_url_that_is_mistyped_shows_the_right_form(self) -> None:
        with self.xnat() as server:
            host = f"127.0.0.1:{server.port}"
            cases = [
                ("one slash", f"http:/{host}", [f"http://{host}"]),
                ("three slashes", f"http:///{host}", [f"http://{host}"]),
                ("no slash", f"https:{host}", [f"https://{host}"]),
                ("no colon", f"http//{host}", [f" http://{host}"]),
                ("no scheme", host, [f"https://{host}"]),
                ("another scheme", f"ftp://{host}", [f" https://{host}"]),
                ("a login in it", f"http://alice:pass4u@{host}", [f"http://{host}", "USER"]),
                ("a login with @", f"http://alice:p@ss4u@{host}/x", [f"http://{host}", "USER"]),
                ("a login with /", f"http://alice:4/ss4u@{host}/x", [f"http://{host}"]),
                ("a login with ?", f"http://alice:4?ss4u@{host}/x", [f"http://{host}"]),
                ("one slash and a login", f"http:/alice:p@ss4u@{host}", [f"http://{host}"]),
                ("a login, no scheme", f"alice:pass4u@{host}", [f"https://{host}", "USER"]),
                ("a space", f"http://{host}/a b", ["https://"]),
                ("a space before", f" http://{host}", ["https://"]),
                ("a line break", f"http://{host}\n", []),
                ("a query", f"http://{host}/?a=b", ["https://"]),
                ("a bracket", "http://[::1", ["https://"]),
                ("a port that is no number", "http://127.0.0.1:xnat", ["https://"]),
                ("nothing but a scheme", "https://", ["https://"]),
                ("empty", "", ["empty"]),
            ]
            rows = [(title, self.arguments(url), ["URL"] + words) for title, url, words in cases]
            for (title, _, _), ran in zip(rows, self.assert_table(2, rows)):
                with self.subTest(title, what="the password in it is not repeated"):
                    self.assertNotIn("ss4u", ran.text)
            self.assertEqual(server.requests, [])

    def test_slashes_at_the_end_and_a_context_path_are_fine(self) -> None:
        with self.xnat(context_path="/xnat") as server:
            arguments = self.arguments(server.url + "//")
            self.assert_says(self.run_command(arguments), 0)
            self.assert_archived(server, "007_pre", self.wanted)

    def test_a_url_in_capitals_is_fine(self) -> None:
        with self.xnat() as server:
            ran = self.run_command(self.arguments(server.url.replace("http", "HTTP")))
            self.assert_says(ran, 0)
            self.assert_archived(server, "007_pre", self.wanted)


class Tools(BadInputTest):
    """zip and curl."""

    def setUp(self) -> None:
        super().setUp()
        self.series("007/pre/T1")

    def refuse(self, environment: Dict[str, str], *words: str) -> None:
        with self.xnat() as server:
            self.assert_refused(self.upload(server, environment=environment), 3, *words)
            self.assertEqual(server.requests, [])

    def test_zip_is_not_installed(self) -> None:
        self.refuse(self.path_with("sh", "curl"), "zip", "not installed", "apt-get install zip",
                    "dnf install zip", "brew install zip")

    def test_curl_is_not_installed(self) -> None:
        self.refuse(self.path_with("sh", "zip"), "curl", "not installed", "apt-get install curl")

    def test_curl_is_too_old(self) -> None:
        self.refuse(self.path_with("sh", "zip", curl="echo 'curl 7.60.0 (x86_64) libcurl/7.60.0'"),
                    "curl 7.60", "too old", "7.61")

    def test_nothing_else_is_needed_on_the_path(self) -> None:
        with self.xnat() as server:
            ran = self.upload(server, environment=self.path_with("sh", "zip", "curl"))
            self.assert_says(ran, 0)
            self.assertEqual(len(server.stored("007_pre")), 2)

    def test_a_dry_run_needs_no_tools(self) -> None:
        ran = self.run_command(self.arguments(NOWHERE, "-n"), {"PATH": str(self.home)})
        self.assert_says(ran, 0, "would send")


class OddFiles(BadInputTest):
    """What lies in a series folder."""

    def send(self, label: str, wanted: List[str], *words: str, **call: Any) -> Ran:
        """Upload; exactly these files are archived."""
        with self.xnat() as server:
            ran = self.upload(server, **call)
            self.assert_says(ran, 0, *words)
            self.assert_archived(server, label, wanted)
            return ran

    def test_a_series_with_only_junk_is_named_and_no_failure(self) -> None:
        wanted = self.series("007/pre/T1")
        folder = self.root / "007/pre/PAPERS"
        folder.mkdir()
        (folder / "notes.txt").write_bytes(JUNK["notes.txt"])
        (folder / "DICOMDIR").write_bytes(JUNK["DICOMDIR"])
        ran = self.send("007_pre", wanted)
        self.assertEqual(len(self.lines(ran, "PAPERS", "2 files", "DICOM")), 1, ran.out)
        row = self.row("PAPERS")
        self.assertEqual((row["files"], row["not-DICOM files"]), ("0", "2"))
        self.assertIn(str(folder / "notes.txt"), self.log())

    def test_an_empty_series_folder_is_named_and_no_failure(self) -> None:
        wanted = self.series("007/pre/T1")
        (self.root / "007/pre/EMPTY/sub").mkdir(parents=True)
        ran = self.send("007_pre", wanted)
        self.assertEqual(len(self.lines(ran, "EMPTY")), 1, ran.out)

    def test_junk_beside_good_files_stays_out_and_is_counted_and_named(self) -> None:
        wanted = self.series("007/pre/T1", files=3)
        for name, content in JUNK.items():
            (self.root / "007/pre/T1" / name).write_bytes(content)
        ran = self.send("007_pre", wanted)
        self.assertEqual(len(self.lines(ran, "007_pre", "T1", "sent", "3 files", "6 not DICOM")), 1)
        self.assertEqual((self.row("T1")["files"], self.row("T1")["not-DICOM files"]), ("3", "6"))
        for name in JUNK:
            self.assertIn(f"not DICOM: {self.root / '007/pre/T1' / name}", self.log())

    def test_dicom_is_decided_by_the_bytes_not_by_the_name(self) -> None:
        names = ("1.2.840.113619.2.5.1762583153", "IM0001", "I", "scan.txt", "photo.jpg", ".hidden",
                 "._z.dcm", "DICOMDIR", "Thumbs.db")
        wanted = [self.image(f"007/pre/T1/{name}", number)
                  for number, name in enumerate(names, 1)]
        self.send("007_pre", wanted, "9 files")

    def test_files_in_folders_of_a_series_arrive_also_with_equal_names(self) -> None:
        names = ("IM1", "a/IM1", "b/IM1", "b/c/d/e/IM1", "b/c/d/e/IM2", ".cache/IM1")
        wanted = [self.image(f"007/pre/T1/{name}", number)
                  for number, name in enumerate(names, 1)]
        self.send("007_pre", wanted, "6 files")

    def test_bare_data_sets_without_preamble_arrive(self) -> None:
        wanted = self.series("007/pre/EXPLICIT", preamble=False)
        wanted += self.series("007/pre/IMPLICIT", preamble=False, explicit=False)
        wanted += self.series("007/pre/IMPLICIT_FILE", explicit=False)
        self.send("007_pre", wanted, "6 files")

    def test_file_names_with_any_character_arrive(self) -> None:
        names = ("-x.dcm", "-@", "--help", "@", "@list", "[1].dcm", "[", "*", "?", "a b", " before",
                 "after ", "a'b", 'a"b', "$(touch hit)", "`touch hit`", "a;b,c", "a\\b", "a\tb",
                 "a\x1bb", "#", "%41", "~", "\u00fc\u00df", "\u65e5\u672c", "\U0001f9e0", "A", "a",
                 "x" * 250, "..x", "a:b", "a|b&c", "{1..3}", "!", "=1+1")
        wanted = [self.image(f"007/pre/T1/{name}", number)
                  for number, name in enumerate(names, 1)]
        for locale in ({"LANG": "C.UTF-8"}, {"LC_ALL": "C"}):
            with self.subTest(locale), self.xnat() as server:
                ran = self.upload(server, "--again", environment=locale)
                self.assertEqual(ran.status, 0, ran.text)
                arrived = set(server.stored("007_pre"))
                for name, digest in zip(names, wanted):
                    with self.subTest(name):
                        self.assertIn(digest, arrived)
                self.assert_archived(server, "007_pre", wanted)
        self.assertEqual(list(self.folder.rglob("hit")), [])

    def test_dicom_files_that_are_named_as_archives_are_never_lost_in_silence(self) -> None:
        # From 1.8.10 on XNAT unpacks such entries, and refuses .gz (xnat.md 3).
        wanted = {}
        for kind in ("zip", "gz", "tar", "tgz"):
            wanted[kind] = self.series(f"007/{kind}/T1") + [
                self.image(f"007/{kind}/T1/IM9.{kind}", 9)]
        with self.xnat() as server:
            ran = self.upload(server)
            for kind, digest in wanted.items():
                with self.subTest(kind):
                    if server.stored(f"007_{kind}") != sorted(digest):
                        self.assertEqual(ran.status, 1, ran.text)
                        self.assertNotIn(("BRAIN", f"007_{kind}"), server.archive)
                        self.assertTrue(self.lines(ran, "Not there", f"IM9.{kind}"), ran.out)

    def test_links_to_a_good_file_and_to_a_folder_of_files_are_followed(self) -> None:
        wanted = self.series("007/pre/T1")
        outside = self.folder / "elsewhere"
        study = uid("007", "pre")
        write_series(outside, study=study, number=77, files=3)
        wanted += digests(outside).values()
        (outside / "IM0003.dcm").rename(self.folder / "IM0003.dcm")
        (self.root / "007/pre/T1/one.dcm").symlink_to(self.folder / "IM0003.dcm")
        (self.root / "007/pre/T1/more").symlink_to(outside)
        self.send("007_pre", wanted, "5 files")

    def test_subjects_sessions_and_series_may_be_links(self) -> None:
        wanted = self.series("007/pre/T1")
        self.root.rename(self.folder / "real")
        (self.root / "007/pre").mkdir(parents=True)
        (self.root / "007/pre/T1").symlink_to(self.folder / "real/007/pre/T1")
        (self.root / "008").mkdir()
        (self.root / "008/pre").symlink_to(self.folder / "real/007/pre")
        (self.root / "009").symlink_to(self.folder / "real/007")
        with self.xnat() as server:
            self.assert_says(self.upload(server), 0)
            for label in ("007_pre", "008_pre", "009_pre"):
                self.assert_archived(server, label, wanted)

    def test_a_link_to_a_folder_above_ends_and_is_named(self) -> None:
        wanted = self.series("007/pre/T1")
        (self.root / "007/pre/T1/loop").symlink_to("..")
        (self.root / "007/pre/T1/again").symlink_to(".")
        self.send("007_pre", wanted, "2 files")
        for name in ("loop", "again"):
            self.assertIn(str(self.root / "007/pre/T1" / name), self.log())

    def test_folders_that_link_to_each_other_end_and_send_nothing_twice(self) -> None:
        self.image("007/pre/T1/a/IM1", 1)
        self.image("007/pre/T1/b/IM2", 2)
        for name in ("x", "y"):  # two ways at each step: 2 to the 40th paths
            (self.root / "007/pre/T1/a" / name).symlink_to("../b")
            (self.root / "007/pre/T1/b" / name).symlink_to("../a")
        self.series("007/pre/T2")
        with self.xnat() as server:
            try:
                ran = self.upload(server, timeout=10)
            except subprocess.TimeoutExpired:
                self.fail("hangs in folders that link to each other")
            self.assertIn(ran.status, (0, 1))
            self.assertLessEqual(max(server.instances("007_pre").values()), 1)
            self.assertLessEqual(len(server.stored("007_pre")), 4)

    def test_a_fifo_and_a_socket_are_no_dicom_and_nobody_waits_for_them(self) -> None:
        wanted = self.series("007/pre/T1")
        os.mkfifo(str(self.root / "007/pre/T1/pipe"))
        with socket.socket(socket.AF_UNIX) as end:
            here = os.getcwd()
            os.chdir(str(self.root / "007/pre/T1"))  # the path may be too long for a socket
            try:
                end.bind("socket")
            finally:
                os.chdir(here)
            self.send("007_pre", wanted, "2 not DICOM", timeout=20)
        self.assertIn("007/pre/T1/pipe", self.log())

    def test_what_cannot_be_sent_fails_its_series_by_name_and_no_other(self) -> None:
        self.need_held_root()
        locked = self.folder / "locked"
        locked.mkdir()
        (locked / "IM9").write_bytes(b"x")
        cases: Dict[str, Tuple[Callable[[Path], Any], List[str]]] = {
            "dangling-link": (
                lambda series: (series / "IM9.dcm").symlink_to("nowhere"), ["IM9.dcm", "link"]),
            "link-to-itself": (lambda series: (series / "self").symlink_to("self"), ["self"]),
            "link-into-a-closed-folder": (
                lambda series: (series / "IM9.dcm").symlink_to(locked / "IM9"), ["IM9.dcm"]),
            "unreadable-file": (
                lambda series: self.hold(series / "IM0002.dcm"),
                ["IM0002.dcm", "cannot be read", "permission"]),
            "unreadable-series": (self.hold, ["cannot be read", "permission"]),
            "series-that-can-only-be-listed": (
                lambda series: self.hold(series, 0o400), ["IM0001.dcm", "cannot be read"]),
            "unreadable-folder-in-a-series": (
                lambda series: (self.image(f"{series}/inner/IM1", 9), self.hold(series / "inner")),
                ["inner", "cannot be read", "permission"]),
            "line-break-in-a-file-name": (
                lambda series: (series / "IM0001.dcm").rename(series / "IM1\nIM2.dcm"),
                ["IM1\\nIM2.dcm", "line break", "rename"]),
            "line-break-in-a-folder-name": (
                lambda series: self.image(f"{series}/in\nner/IM1", 9),
                ["in\\nner/IM1", "line break", "rename"]),
            "file-name-that-is-not-utf-8": (
                lambda series: os.rename(os.fsencode(series / "IM0001.dcm"),
                                         os.fsencode(series) + b"/Sch\xe4del.dcm"),
                ["Sch", "del.dcm", "UTF-8", "rename"]),
        }
        if sys.platform == "darwin":  # no such name can be made there
            del cases["file-name-that-is-not-utf-8"]
        beside = {case: self.series(f"007/{case}/BESIDE", files=1) for case in cases}
        other = self.series("008/pre/OTHER")
        for number, (case, (spoil, _)) in enumerate(cases.items()):
            self.series(f"007/{case}/BAD{number}")
            spoil(self.root / "007" / case / f"BAD{number}")
        self.hold(locked)
        with self.xnat() as server:
            ran = self.upload(server, preexec=drop_root_rights)
            self.assert_says(ran, 1, "Run the same command again")
            self.assert_archived(server, "008_pre", other)
            self.assertEqual(len(server.archive), 1)
            self.assertNotIn("\udce4", ran.text)
            for number, (case, (_, words)) in enumerate(cases.items()):
                with self.subTest(case):
                    label, name = f"007_{case}", f"BAD{number}"
                    for word in "not sent", "Not there":
                        told = self.lines(ran, word, label, name, *words)
                        self.assertEqual(len(told), 1, ran.text)
                    self.assertEqual(server.stored(label), beside[case])
                    row = self.row(name)
                    self.assertEqual((row["status"], row["bytes sent"]), ("not sent", "0"))
                    for word in words:
                        self.assertIn(word, row["message"])


class OddFolders(BadInputTest):
    """What lies where subjects, sessions and series belong."""

    def test_folder_names_with_any_character_become_clean_labels(self) -> None:
        wanted = {}
        names = ("a b", "a'b", 'a"b', "a;b", "a,b", "$(touch hit)", "`touch hit`", "-rf", "M\u00fc",
                 "a.b", "a\nb", "*?[x]", "a\\b", "\u65e5\u672c", "a&b=c%41#", "~", "=1+1", "@x")
        for number, name in enumerate(names):
            path = f"{name}{number}/{name}/{name}"
            wanted[path] = self.series(path, files=1)
        with self.xnat() as server:
            ran = self.upload(server)
            self.assertEqual(ran.status, 0, ran.text)
            for path, digest in wanted.items():
                subject, session, series = path.split("/")
                label = re.sub("[^A-Za-z0-9_-]", "_", f"{subject}_{session}")
                with self.subTest(path):
                    self.assert_archived(server, label, digest)
                    self.assertEqual(server.archive["BRAIN", label].subject,
                                     re.sub("[^A-Za-z0-9_-]", "_", subject))
                    if label != f"{subject}_{session}":
                        shown = path.rpartition("/")[0].replace("\n", "\\n")
                        self.assertEqual(len(self.lines(ran, shown, label)), 1, "not shown")
        self.assertEqual(list(self.folder.rglob("hit")), [])
        self.assertEqual(len(self.report()), len(names))

    def test_a_folder_name_with_a_line_break_cannot_forge_a_line(self) -> None:
        self.series("007/pre/T1\nFORGED")
        self.series("008\nFORGED/pre/T1")
        with self.xnat() as server:
            ran = self.upload(server)
            self.assert_says(ran, 0)
        for text in (ran.text, self.log()):
            self.assertNotRegex(text, "(?m)^FORGED")
        self.assertIn("T1\\nFORGED", ran.out)

    def test_a_folder_name_that_is_not_utf_8_is_fine(self) -> None:
        self.series("007/pre/T1")
        for name in (b"/S\xe4", b"/S\xe4/p\xe4", b"/S\xe4/p\xe4/T\xe4"):
            try:
                os.mkdir(os.fsencode(self.root) + name)
            except OSError:
                missing(self, "names must be UTF-8 here")
        folder = Path(os.fsdecode(os.fsencode(self.root) + b"/S\xe4/p\xe4/T\xe4"))
        write_series(folder, study=uid("odd"), description="odd", files=1)
        with self.xnat() as server:
            ran = self.upload(server)
            self.assert_says(ran, 0)
            self.assert_archived(server, "S__p_", list(digests(folder).values()))
        self.assertNotIn("\udce4", ran.text)

    def collide(self, *words: str) -> None:
        """No run of any kind may begin."""
        with self.xnat() as server:
            self.assert_table(2, [
                (" ".join(options), self.arguments(server.url, *options), list(words))
                for options in ((), ("--only", "zzz*"), ("--dry-run",))])
            self.assert_nothing_there(server)

    def test_subjects_that_differ_in_case_only_meet_in_one(self) -> None:
        self.series("Sub1/a/T1")
        self.series("sub1/b/T1")
        self.series("zzz/b/T1")
        self.collide(str(self.root / "Sub1"), str(self.root / "sub1"), "subject", "rename")

    def test_subjects_that_differ_in_cleaned_characters_meet_in_one(self) -> None:
        self.series("a b/a/T1")
        self.series("a.b/b/T1")
        self.series("zzz/b/T1")
        self.collide(str(self.root / "a b"), str(self.root / "a.b"), "subject", "a_b", "rename")

    def test_sessions_of_two_subjects_meet_in_one_label(self) -> None:
        self.series("a/b_c/T1")
        self.series("a_b/c/T1")
        self.series("zzz/b/T1")
        self.collide(str(self.root / "a/b_c"), str(self.root / "a_b/c"), "session", "a_b_c")

    def test_two_studies_in_one_series_folder_are_not_committed(self) -> None:
        self.series("007/pre/T1", name="A{}.dcm")
        wanted = digests(self.root / "007/pre/T1")
        write_series(self.root / "007/pre/T1", study=uid("another"), number=50, files=2)
        with self.xnat() as server:
            ran = self.upload(server)
            self.assert_says(ran, 1, "two studies", "T1")
            self.assertEqual(len(self.lines(ran, "Not there", "007_pre", "T1", "two studies")), 1)
            self.assertEqual((server.commits(), server.archive), ([], {}))
            self.assertEqual(server.stored("007_pre"),
                             sorted({**wanted, **digests(self.root / "007/pre/T1")}.values()))
        self.assertEqual(self.row("T1")["status"], "not sent")

    def test_two_studies_in_one_session_folder_are_not_committed(self) -> None:
        self.series("007/pre/T1")
        self.series("007/pre/T2", study=uid("another"))
        with self.xnat() as server:
            ran = self.upload(server)
            self.assert_says(ran, 1, "two studies")
            self.assertEqual(len(self.lines(ran, "Not there", "007_pre", "two studies")), 1)
            self.assertEqual((server.commits(), server.archive), ([], {}))

    def test_hidden_folders_are_no_subjects_sessions_or_series(self) -> None:
        wanted = self.series("007/pre/T1")
        for path in (".git/a/T1", "007/.snapshot/T1", "007/pre/.thumbs"):
            self.series(path)
        with self.xnat() as server:
            ran = self.upload(server)
            self.assert_says(ran, 0, "1 subject, 1 session: 1 series")
            self.assertEqual(server.labels(), ["007_pre"])
            self.assert_archived(server, "007_pre", wanted)
        self.assertNotIn("belong", ran.text)

    def test_files_where_folders_belong_are_counted_and_named_once(self) -> None:
        wanted = self.series("007/pre/T1")
        strays = ["README.txt", "007/list.csv", "007/pre/notes.txt"]
        for path in strays:
            (self.root / path).write_text("x")
        os.mkfifo(str(self.root / "007/pipe"))
        with self.xnat() as server:
            ran = self.upload(server)
            self.assert_says(ran, 0)
            self.assert_archived(server, "007_pre", wanted)
        told = [line for line in ran.text.splitlines() if re.search(r"\b4\b.*folders belong", line)]
        self.assertEqual(len(told), 1, ran.text)
        self.assertTrue(any(path in told[0] for path in strays), told)
        for path in strays + ["007/pipe"]:
            self.assertIn(str(self.root / path), self.log())

    def test_a_folder_that_cannot_be_opened_is_a_failure_and_stops_no_other(self) -> None:
        self.need_held_root()
        for subject in ("closed-session", "closed-subject", "no-series", "no-session", "good"):
            self.series(f"{subject}/pre/T1")
        wanted = self.series("no-session/post/T1")
        self.hold(self.root / "closed-session/pre")
        self.hold(self.root / "closed-subject")
        # A link to nothing may be a share that is not mounted: this is not the whole session.
        (self.root / "no-series/pre/T2").symlink_to("/not/mounted")
        shutil.rmtree(str(self.root / "no-session/pre"))
        (self.root / "no-session/pre").symlink_to("/not/mounted")
        (self.root / "no-subject").symlink_to("/not/mounted")
        (self.root / "loop").symlink_to("loop")
        with self.xnat() as server:
            ran = self.upload(server, preexec=drop_root_rights)
            self.assert_says(ran, 1, "Run the same command again")
            self.assertEqual(set(server.archive),
                             {("BRAIN", "good_pre"), ("BRAIN", "no-session_post")})
            self.assertEqual(server.stored("no-session_post"), sorted(wanted))
        for words in (["closed-session_pre", "cannot be read", "permission"],
                      ["closed-subject", "cannot be read", "permission"],
                      ["no-series_pre", "T2", "link"], ["no-session_pre", "link"],
                      ["no-subject", "link"], ["loop", "link"]):
            with self.subTest(words[0]):
                self.assertEqual(len(self.lines(ran, "Not there", *words)), 1, ran.text)
                label = words[0].partition("_")[0]
                self.assertIn("not sent", [row["status"] for row in self.report()
                                           if row["label"].startswith(label)])


class Choosing(BadInputTest):
    """--only, --dry-run, --max-files."""

    WOULD = re.compile(r"(?m)^(\S+) +(\S+) +would send +([\d,]+) files? ")

    def test_only_chooses_whole_sessions_by_glob(self) -> None:
        for path in ("007/pre/T1", "007/post/T1", "008/pre/T1", "07/pre/T1", "[x]/pre/T1"):
            self.series(path, files=1)
        everything = ["007_post", "007_pre", "008_pre", "07_pre", "_x__pre"]
        cases: Tuple[Tuple[List[str], List[str]], ...] = (
                (["007"], everything[:2]),
                (["007/pre"], ["007_pre"]),
                (["00?"], everything[:3]),
                (["*/pre"], everything[1:]),
                (["0*/po*", "008"], ["007_post", "008_pre"]),
                (["[0]7"], ["07_pre"]),
                (["[[]x]"], ["_x__pre"]),
                (["007", "007/pre"], everything[:2]),
                (["*"], everything))
        ends = self.run_many([
            self.arguments(NOWHERE, "-n", *(f"--only={pattern}" for pattern in only))
            for only, _ in cases])
        for (only, labels), ran in zip(cases, ends):
            with self.subTest(only):
                self.assertEqual(ran.status, 0, ran.text)
                self.assertEqual(sorted(found[0] for found in self.WOULD.findall(ran.out)), labels)
                if labels != everything:
                    self.assertIn(f"{5 - len(labels)} session", ran.out)

    def test_only_sends_what_it_chooses(self) -> None:
        wanted = self.series("007/pre/T1") + self.series("007/pre/T2")
        for path in ("007/post/T1", "008/pre/T1"):
            self.series(path)
        with self.xnat() as server:
            self.assert_says(self.upload(server, "--only", "007/pr*"), 0, "--only")
            self.assertEqual(server.labels(), ["007_pre"])
            self.assert_archived(server, "007_pre", wanted)

    def test_only_that_chooses_nothing_is_refused(self) -> None:
        self.series("007/pre/T1")
        rows = [(pattern, self.arguments(NOWHERE, "--only", pattern), ["--only", pattern])
                for pattern in ("009", "007/post", "PRE", "T1", "007/pre/T1", "/007", "007/")]
        rows.append(("empty", self.arguments(NOWHERE, "--only", ""), ["--only"]))
        self.assert_table(2, rows)

    def test_a_dry_run_contacts_nobody_and_writes_nothing(self) -> None:
        readme_tree(self.root, files=2)
        (self.root / "007/pre/T2_FLAIR_0012/notes.txt").write_text("x" * 300)

        def everything() -> Dict[str, Any]:
            found = {str(path): path.lstat() for path in self.folder.rglob("*")}
            return {name: (info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_mode)
                    for name, info in found.items()}

        with self.xnat() as server:
            before = everything()
            ran = self.upload(server, "-n", "--config", str(EXCLUSIONS), password="-")
            self.assert_says(ran, 0, "4 left out")
            self.assertEqual(server.requests, [])
            self.assertEqual(everything(), before)

    def test_a_dry_run_lists_exactly_what_is_then_sent(self) -> None:
        readme_tree(self.root, files=2)
        (self.root / "007/pre/T2_FLAIR_0012/notes.txt").write_text("x" * 300)
        options = "--config", str(EXCLUSIONS), "--only", "007"
        with self.xnat() as server:
            dry = self.upload(server, "--dry-run", *options)
            self.assert_says(dry, 0, "nobody contacted")
            listed = {(label, name): int(files)
                      for label, name, files in self.WOULD.findall(dry.out)}
            ran = self.upload(server, *options)
            self.assertEqual(ran.status, 0, ran.text)
            sent = Counter((label, file.description) for label in server.labels()
                           for file in server.files(label))
            self.assertEqual(listed, dict(sent))
            plan = re.compile(r"(?m)^.*series to send.*$")
            self.assertEqual(plan.findall(dry.out), plan.findall(ran.out))
            again = self.upload(server, "--dry-run", *options)
            self.assertEqual(self.WOULD.findall(again.out), [], "all of it is on the server")

    def test_the_command_that_a_dry_run_suggests_sends(self) -> None:
        self.series("007/pre/T1")
        ran = self.run_command(self.arguments(NOWHERE, "-n"))
        suggested = ran.out.rstrip().splitlines()[-1]
        self.assertIn(str(SCRIPT), suggested)
        self.assertNotRegex(suggested, r"\s(-n|--dry-run)\b")
        self.assertNotIn("s3cret", ran.text)

    def test_a_dry_run_finds_the_same_trouble(self) -> None:
        self.series("007/pre/T1")
        (self.root / "007/pre/T1/gone").symlink_to("nowhere")
        ran = self.run_command(self.arguments(NOWHERE, "--dry-run"))
        self.assert_says(ran, 1, "T1", "gone", "link")

    def test_max_files_splits_a_series_into_parts_in_order(self) -> None:
        wanted = self.series("007/pre/T1", files=7)
        names = [f"IM{number:04d}.dcm" for number in range(1, 8)]
        for most, parts in ((3, [3, 3, 1]), (7, [7]), (1, [1] * 7)):
            with self.subTest(most), self.xnat() as server:
                ran = self.upload(server, "--max-files", str(most), "--again")
                self.assert_says(ran, 0, "7 files verified")
                posts = server.imports()
                self.assertEqual([len(post.entries) for post in posts], parts)
                self.assertEqual([name for post in posts for name in post.entries], names)
                self.assertEqual(len(server.commits()), 1)
                self.assert_archived(server, "007_pre", wanted)
                self.assertEqual(len(self.lines(ran, "T1", "sent", "7 files")), 1)


class Options(BadInputTest):
    """The command line itself."""

    def setUp(self) -> None:
        super().setUp()
        self.series("007/pre/T1")

    def test_abbreviated_unknown_and_senseless_options_are_refused(self) -> None:
        rows: List[Row] = [(" ".join(options), self.arguments(NOWHERE, *options),
                            [options[0].partition("=")[0]])
                           for options in (
            ["--conf=x.json"], ["--dry"], ["--max", "5"], ["--comp", "1"], ["--no-commi"],
            ["--force"], ["-x"], ["--procs", "0"], ["--procs", "-1"], ["--procs", "two"],
            ["--procs"], ["--max-files", "0"], ["--max-files", "1.5"], ["--compression", "10"],
            ["--compression", "x"], ["--retries", "-1"], ["--timeout", "0"], ["--timeout", ""],
            ["--limit-rate", "fast"], ["--limit-rate", "0"], ["--cacert", "/no/such.pem"],
            ["--logname", "a/b"], ["--logname", ""], ["--procs", "\u00b2"])]
        rows.append(("one too many", self.arguments(NOWHERE, "extra"), ["too many"]))
        rows.append(("nothing", [sys.executable, str(SCRIPT)], ["URL", "ROOTDIR"]))
        rows.append(("no ROOTDIR", self.arguments(NOWHERE)[:6], ["ROOTDIR"]))
        rows.append(("empty user", self.arguments(NOWHERE, user=""), ["USER"]))
        rows.append(("empty password", self.arguments(NOWHERE, password=""), ["PASS"]))
        rows.append(("empty project", self.arguments(NOWHERE, project=""), ["PROJECT"]))
        rows.append(("a line break", self.arguments(NOWHERE, project="A\nB"), ["PROJECT"]))
        for option in ("--workdir", "--config", "--cacert"):  # a shell's variable that is not set
            rows.append((f"empty {option}", self.arguments(NOWHERE, option, ""), [option]))
        self.assert_table(2, rows)

    def test_a_wrong_option_ends_the_command_itself_with_2(self) -> None:
        self.assert_refused(self.run_command(self.arguments(NOWHERE, "--dry")), 2, "--dry")

    def test_options_may_stand_before_the_arguments(self) -> None:
        arguments = self.arguments(NOWHERE)
        arguments[2:2] = ["--dry-run", "--procs", "2"]
        self.assert_says(self.run_command(arguments), 0, "would send")

    def test_a_workdir_inside_rootdir_is_refused(self) -> None:
        (self.folder / "link").symlink_to(self.root)
        self.assert_table(2, [
            (str(workdir), self.arguments(NOWHERE, "--workdir", str(workdir)),
             ["--workdir", "inside ROOTDIR"])
            for workdir in (self.root / "007/work", self.root, self.folder / "link/x")])
        self.assertEqual([path.name for path in self.root.iterdir()], ["007"])

    def test_a_workdir_beside_rootdir_with_a_longer_name_is_fine(self) -> None:
        workdir = str(self.root) + "-work;a,[b] $(c)\u00fc"
        with self.xnat() as server:
            self.assert_says(self.upload(server, "--workdir", workdir), 0)
            self.assertEqual(len(server.stored("007_pre")), 2)

    def test_a_workdir_that_cannot_be_used_stops_the_run(self) -> None:
        self.need_held_root()
        self.work.write_text("a file")
        (self.folder / "held").mkdir(mode=0o500)
        for workdir in (self.work, self.folder / "held/work"):
            with self.subTest(workdir.name), self.xnat() as server:
                ran = self.upload(server, "--workdir", str(workdir), preexec=drop_root_rights)
                self.assert_refused(ran, 3, "workdir", str(workdir))
                self.assert_nothing_there(server)

    def test_a_workdir_in_use_stops_the_second_run_only(self) -> None:
        with self.xnat() as server:
            server.fail("stall before", "services/import", seconds=30)
            first = self.start(self.arguments(server.url))
            self.assertTrue(server.wait_for(server.imports))
            self.assert_refused(self.upload(server), 3, "workdir", "in use")
            first.send_signal(signal.SIGTERM)
            first.communicate(timeout=20)
            self.assertEqual(first.returncode, 143)
            self.assertEqual(len(server.imports()), 1)

    def test_a_signal_ends_the_run_with_its_own_status(self) -> None:
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            with self.subTest(number.name), self.xnat() as server:
                server.fail("stall before", "services/import", seconds=30)
                process = self.start(self.arguments(server.url, "--again"))
                self.assertTrue(server.wait_for(server.imports))
                process.send_signal(number)
                out, err = process.communicate(timeout=20)
                self.assertEqual(process.returncode, status, out + err)
                self.assertIn(number.name, err)
                self.assertIn("Run the same command again", out)
                self.assertNotIn("Traceback", err)
                self.assertEqual((server.archive, self.zips()), ({}, []))

    def test_version_and_help_are_no_errors(self) -> None:
        for option, word in (("--version", "dicomUpload"), ("--help", "exit status:")):
            ran = self.run_command([sys.executable, str(SCRIPT), option])
            self.assert_says(ran, 0, word)
            self.assertEqual(ran.err, "")


class Password(BadInputTest):
    """Where the password comes from, and where it never goes."""

    def setUp(self) -> None:
        super().setUp()
        self.wanted = self.series("007/pre/T1")

    def netrc(self, text: str, mode: int = 0o600, coding: str = "utf-8") -> None:
        path = self.home / ".netrc"
        path.write_bytes(text.encode(coding))
        path.chmod(mode)

    def assert_let_in(self, environment: Optional[Dict[str, str]] = None) -> None:
        with self.xnat() as server:
            self.assert_says(self.upload(server, password="-", environment=environment), 0)
            self.assert_archived(server, "007_pre", self.wanted)

    def test_it_comes_from_xnat_pass_before_netrc(self) -> None:
        self.netrc("machine 127.0.0.1 login alice password wrong\n")
        self.assert_let_in({"XNAT_PASS": "s3cret"})

    def test_it_comes_from_netrc(self) -> None:
        self.netrc("machine other login alice password wrong\n"
                   "machine 127.0.0.1 login alice password s3cret\n")
        self.assert_let_in()

    def refuse_login(self, *words: str) -> None:
        with self.xnat() as server:
            self.assert_refused(self.upload(server, password="-"), 2, *words)
            self.assertEqual(server.requests, [])

    def test_without_any_the_ways_to_give_one_are_named(self) -> None:
        self.refuse_login("PASS", "XNAT_PASS", ".netrc")

    def test_an_entry_of_somebody_else_is_not_taken(self) -> None:
        self.netrc("machine 127.0.0.1 login bob password b0b\n")
        self.refuse_login("PASS", "XNAT_PASS", ".netrc")

    def test_an_entry_beside_that_of_somebody_else_is_found(self) -> None:
        self.netrc("machine 127.0.0.1 login alice password s3cret\n"
                   "machine 127.0.0.1 login bob password b0b\n")
        self.assert_let_in()

    def test_a_netrc_that_others_can_read_is_not_used(self) -> None:
        self.netrc("machine 127.0.0.1 login alice password s3cret\n", 0o644)
        self.refuse_login(".netrc")

    def test_a_netrc_that_cannot_be_understood_is_named(self) -> None:
        for title, text, coding in (("words", "machine 127.0.0.1 pass\n", "utf-8"),
                                    ("bytes", "machine \u00e4 login x password y\n", "latin-1")):
            with self.subTest(title):
                self.netrc(text, coding=coding)
                self.refuse_login(".netrc")

    def test_on_a_terminal_it_is_asked_for_without_echo(self) -> None:
        master, slave = self.terminal()
        with self.xnat() as server:
            process = self.start(self.arguments(server.url, password="-"), stdin=slave,
                                 preexec_fn=take_terminal)
            shown = shown_on(master, b": ")
            self.assertIn("alice", shown)
            self.assertFalse(termios.tcgetattr(slave)[3] & termios.ECHO)
            os.close(slave)
            os.write(master, b"s3cret\n")
            out, err = process.communicate(timeout=30)
            shown += shown_on(master)
            self.assertEqual(process.returncode, 0, out + err)
            self.assert_archived(server, "007_pre", self.wanted)
        self.assertNotIn("s3cret", shown)

    def test_it_is_in_no_output_no_file_and_no_childs_arguments(self) -> None:
        password = "p\"a's \\w;#,: $(x)\u00fc4711"
        seen = self.folder / "seen"
        seen.mkdir()
        spy = "{ printf '%%s\\n' \"$@\"; env; } >'%s'/$$\nexec '%s' \"$@\"\n"
        environment = self.path_with("sh", "env", **{
            tool: spy % (seen, need(self, tool)) for tool in ("zip", "curl")})
        environment["XNAT_PASS"] = password
        self.series("008/pre/T1")
        (self.root / "008/pre/T1/gone").symlink_to("nowhere")
        text = ""
        for given, user, status in ((password, "alice", 1), ("-", "alice", 1), ("-", "bob", 3)):
            with self.xnat(users=[User("alice", password), User("bob", "b0b")]) as server:
                ran = self.upload(server, "--again", user=user, password=given,
                                  environment=environment)
                self.assertEqual(ran.status, status, ran.text)
                self.assertEqual(bool(server.stored("007_pre")), status == 1)
                text += ran.text
        files = [path for folder in (self.work, seen) for path in folder.rglob("*")
                 if path.is_file()]
        self.assertGreater(len(files), 10)
        text += "".join(path.read_text(encoding="utf-8") for path in files)
        for secret in (password, "4711", base64.b64encode(f"alice:{password}".encode()).decode()):
            self.assertNotIn(secret, text)

    def test_one_that_begins_with_a_dash_is_not_repeated(self) -> None:
        passwords = "-s3cret", "--s3cret", "-n3cret", "--procs=3cret"
        ends = self.run_many([self.arguments(NOWHERE, password=each) for each in passwords])
        for password, ran in zip(passwords, ends):
            with self.subTest(password):
                self.assertIn(ran.status, (2, 3), ran.text)
                self.assertNotIn("3cret", ran.text)

    def test_log_report_and_ledger_are_for_their_owner_only(self) -> None:
        with self.xnat() as server:
            ran = self.upload(server, preexec=lambda: os.umask(0))
            self.assert_says(ran, 0)
        modes = {path.suffix: oct(path.stat().st_mode & 0o777) for path in self.work.iterdir()}
        for suffix in (".log", ".csv", ".ledger"):
            self.assertEqual(modes.get(suffix), "0o600", modes)

    def test_logname_names_log_and_report(self) -> None:
        with self.xnat() as server:
            self.assert_says(self.upload(server, "--logname", "brain study"), 0)
        names = sorted(path.suffix for path in self.work.glob("brain study*"))
        self.assertEqual(names, [".csv", ".log"])

    def test_each_run_has_a_log_of_its_own(self) -> None:
        with self.xnat() as server:
            for ran in self.run_many([self.arguments(server.url)] * 3):  # surely in two seconds
                self.assert_says(ran, 0)
        self.assertEqual(len(list(self.work.glob("*.log"))), 3)
        self.assertEqual(len(list(self.work.glob("*.csv"))), 3)


if __name__ == "__main__":
    unittest.main()
