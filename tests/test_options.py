"""The command line: config, choosing, options, sources of the password, and what is refused.

A wrong call ends with 2 and one line that says what is wrong and what to do, before anybody is
asked. What needs no process is a table.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import termios
import unicodedata
import unittest
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple

import dicomUpload
from tests.dicom import README_TREE, digests, readme_tree
from tests.support import (EXCLUSIONS, SCRIPT, Ran, drop_root_rights, need, or_at_hand, shown_on,
                           take_terminal, variation)
from tests.support import load_tests as load_tests  # several at a time
from tests.trees import TreeTest
from tests.xnat_standin import Standin, User

NOWHERE = "http://127.0.0.1:9"  # for calls that must end before anybody is contacted
Row = Tuple[str, List[str], List[str]]  # a call, by its title: arguments, words of its sentence
WOULD = re.compile(r"(?m)^(\S+) +(\S+) +would send +([\d,]+) files?\b")


class Refusals(TreeTest):
    """Calls that are refused."""

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
        """The run did nothing but to say in one line: thing, what, and what to do."""
        self.assert_says(ran, status, *words)
        self.assertEqual(ran.out, "")
        told = [line for line in ran.err.splitlines()
                if not line.startswith("dicomUpload: PASS: others")]
        self.assertEqual(len(told), 1, ran.err)
        self.assertRegex(told[0], r"\AdicomUpload: .+: .+\Z")
        self.assertLess(len(told[0]), 700)

    def assert_table(self, status: int, rows: List[Row]) -> List[Ran]:
        """Every call is refused, in these words."""
        ends = self.run_many([arguments for _, arguments, _ in rows])
        for (title, _, words), ran in zip(rows, ends):
            with self.subTest(title):
                self.assert_refused(ran, status, *words)
        return ends


def settings(root: Path, *options: str) -> Any:
    """The Settings of a call with these options."""
    return dicomUpload.read_options(
        ["https://xnat.example.org", "alice", "-", "BRAIN", str(root), *options])


class Config(Refusals):
    """The file that leaves series out."""

    def write(self, content: Any, name: str = "config.json") -> str:
        """A config file: bytes as they are, anything else as JSON."""
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return str(path)

    def test_a_config_that_is_no_config_is_refused_by_name(self) -> None:
        self.series("007/pre/T1")
        cases: List[Tuple[str, Any, List[str]]] = [
            ("not JSON", b'{"Exclude": [\n  "A" "B"]}\n', ["JSON", "line 2", "column 7",
                                                         'in "A" "B"]})']),
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
            ("null at top level", b"null", ['"Exclude": ["']),
            ("the same key twice", b'{"Exclude": ["A"], "Exclude": ["B"]}', ["Exclude", "twice"]),
            ("brackets without end", b"[" * 100000, ["JSON"]),
        ]
        rows = []
        for number, (title, content, words) in enumerate(cases):
            path = self.write(content, f"{number}.json")
            rows.append((title, self.arguments(NOWHERE, "--config", path), [path] + words))
        rows.append(("missing", self.arguments(NOWHERE, "--config", "no.json"), ["no.json"]))
        rows.append(("a folder", self.arguments(NOWHERE, "--config", str(self.root)),
                     [str(self.root)]))
        for (title, _, _), ran in zip(rows, self.assert_table(2, rows)):
            if title in ("missing", "a folder"):
                self.assertNotIn("disk", ran.err)  # nothing is wrong with that
        self.assertFalse(self.work.exists())

    def test_a_mistake_that_is_often_made_is_named(self) -> None:
        self.series("007/pre/T1")
        cases = [
            ("a comma too many", b'{"Exclude": [\n  "A",\n  "B",\n]}', ["line ", "comma"]),
            ("a comma before }", b'{"Exclude": ["A"],}', ["comma"]),
            ("a comment", b'{\n// scouts\n"Exclude": ["A"]}',
             ["line 2", "comment", "in // scouts)"]),
            ("another comment", b'{"Exclude": ["A"]  # scouts\n}', ["line 1", "comment"]),
        ]
        rows = []
        for number, (title, content, words) in enumerate(cases):
            path = self.write(content, f"{number}.json")
            rows.append((title, self.arguments(NOWHERE, "--config", path), [path] + words))
        self.assert_table(2, rows)

    def test_what_a_config_leaves_out(self) -> None:
        self.root.mkdir()
        for content, left_out, goes in (
                ({}, "", "T1"), ({"Exclude": []}, "", "T1"),
                (b'\xef\xbb\xbf{"Exclude": ["t1"]}', "T1 xT1y", "T2"),
                ({"Exclude": ["Scout", "\u00e4rzte"]}, "SCOUT aa_sCoUt_1 Kopf\u00c4RZTE", "Scou"),
                ({"Exclude": ["*"]}, "T2* *", "T1"),  # means itself
                ({"Exclude": ["[T]", "T.1"]}, "a[T]b T.1", "T T01"),
                ({"Exclude": ["\u00e9", "U\u0308"]}, "Te\u0301te \u00fcber", "Tete uber"),
                ({"Exclude": ["-"]}, "T-1", "T1")):
            exclude = settings(self.root, "--config", self.write(content)).left_out
            for name in left_out.split():
                with self.subTest(content, name=name):
                    self.assertTrue(exclude(name))
            for name in goes.split():
                with self.subTest(content, name=name):
                    self.assertFalse(exclude(name))

    def test_several_configs_leave_out_what_each_does(self) -> None:
        self.root.mkdir()
        given = [word for number, name in enumerate(("AAHEAD", "Phoenix"))
                 for word in ("--config", self.write({"Exclude": [name]}, f"{number}.json"))]
        self.assertEqual(settings(self.root, *given).config, ("AAHEAD", "Phoenix"))

    def test_the_readme_config_excludes_exactly_the_folders_that_the_readme_says(self) -> None:
        readme_tree(self.root, files=1)
        with self.xnat() as server:
            ran = self.run_it(server, "--config", str(EXCLUSIONS), status=0)
            self.assert_says(ran, 0, "4 left out")
            wanted = [path for path in README_TREE if not re.search("JJWANGS|AAHEAD", path)]
            self.assertEqual(server.labels(), ["007_post", "007_pre", "008_post", "008_pre"])
            for label in server.labels():
                self.assert_archived(server, label, [
                    digest for path in wanted if path.startswith(label.replace("_", "/") + "/")
                    for digest in digests(self.root / path).values()])

    def test_only_the_series_folders_name_counts(self) -> None:
        wanted = self.series("scout1/Scouting/T1", name="scout{}.dcm")
        wanted.append(self.image("scout1/Scouting/T2/scout/IM1"))
        for name in ("SCOUT", "aa_sCoUt_0001", "Kopf \u00c4RZTE"):
            self.series(f"scout1/Scouting/{name}")
        self.series("scout1/all/SCOUT")
        with self.xnat() as server:
            ran = self.run_it(server, "--config", self.config("Scout", "\u00e4rzte"), status=0)
            self.assert_says(ran, 0, "4 left out")
            self.assertEqual(server.labels(), ["scout1_Scouting"])
            self.assert_archived(server, "scout1_Scouting", wanted)
        for row in self.report():
            if row["series"] in ("SCOUT", "aa_sCoUt_0001"):
                self.assertEqual((row["status"], row["files"]), ("left out", "0"))
                self.assertIn('"Scout"', row["message"])


    def test_a_tree_that_is_left_out_altogether_is_no_failure(self) -> None:
        self.series("007/pre/T1", files=1)
        with self.xnat() as server:
            ran = self.run_it(server, "--config", self.config("T1"), status=0, posts=0)
            self.assert_says(ran, 0, "1 left out")
            self.assert_nothing_there(server)


    def test_a_tree_without_any_dicom_is_no_tree_of_images(self) -> None:
        self.put("007/pre/T1/notes.txt", b"nothing here but words and words")
        (self.root / "007/post/T1").mkdir(parents=True)
        with self.xnat() as server:
            for options in ((), ("--dry-run",)):
                ran = self.upload(server, *options)
                self.assert_says(ran, 2, f"ROOTDIR {self.root}: none of its files is DICOM",
                                 "the folder that holds the subjects")
                self.assertNotIn("All is there", ran.text)
            self.assert_nothing_there(server)


class RememberedExclusions(Refusals):
    """A run that would send what earlier runs left out stops: was --config forgotten?"""

    def setUp(self) -> None:
        super().setUp()
        for path in ("007/pre/T1", "007/pre/SCOUT", "008/pre/T1"):
            self.series(path, files=1)

    def stop(self, server: Standin, *options: str) -> Ran:
        """The run stops with 2 before a byte leaves, and says how to mean it."""
        before = len(server.imports())
        ran = self.upload(server, *options)
        self.assert_refused(ran, 2, "--config", '"scout"', "007/pre/SCOUT",
                            "--overwrite-files --again --only 007/pre")
        self.assertEqual(len(server.imports()), before)
        return ran

    def test_fewer_exclusions_stop_the_run_until_again_says_that_it_is_meant_so(self) -> None:
        self.series("009/pre/SCOUT", files=1)
        with self.xnat() as server:
            self.run_it(server, "--config", self.config("scout"), status=0, posts=2)
            for options in ((), ("--dry-run",), ("--overwrite-files",),
                            ("--config", self.config("T2"))):
                with self.subTest(options):
                    self.stop(server, *options)
            self.assertEqual(len(server.stored("007_pre")), 1)
            self.run_it(server, "--config", self.config("scout"), status=0, posts=0)
            # As the message says, for one session; from then on the others' go as well.
            again = "--overwrite-files", "--again", "--only", "007/pre"
            self.assertEqual(self.upload(server, "--dry-run", *again).status, 1)
            self.stop(server)  # a dry run remembers nothing
            self.run_it(server, *again, status=0, posts=2)
            self.run_it(server, status=0, posts=1)
            for session in "007/pre", "008/pre", "009/pre":
                self.assert_archived(server, session.replace("/", "_"), self.tree(session))

    @variation
    def test_without_what_earlier_runs_left_out_again_forgets_none_of_it(self) -> None:
        with self.xnat() as server:
            self.run_it(server, "--config", self.config("scout"), status=0, posts=2)
            again = "--overwrite-files", "--again", "--only", "008"
            self.run_it(server, *again, status=0, posts=1)  # it has no such series
            self.stop(server)

    @variation
    def test_more_or_broader_exclusions_are_fine_and_are_remembered_too(self) -> None:
        with self.xnat() as server:
            self.run_it(server, "--config", self.config("scout"), status=0)
            self.run_it(server, "--config", self.config("Scout", "T2"), status=0, posts=0)
            self.run_it(server, "--config", self.config("sco"), status=0, posts=0)
            self.series("008/pre/T2", files=1)
            ran = self.upload(server, "--config", self.config("scout"))
            self.assert_refused(ran, 2, '"T2"', "008/pre/T2")
            self.assertEqual(server.stored("008_pre"), self.tree("008/pre/T1"))

    @variation
    def test_only_what_this_run_would_send_counts(self) -> None:
        shard = next(number for number in (1, 2, 3, 4)
                     if settings(self.root, "--shard", f"{number}/4").chooses("007", "pre"))
        with self.xnat() as server:
            self.run_it(server, "--config", self.config("scout"), status=0, posts=2)
            self.run_it(server, "--only", "008", status=0, posts=0)
            self.stop(server, "--only", "007")
            self.stop(server, "--shard", f"{shard}/4")
            self.run_it(server, "--shard", f"{shard % 4 + 1}/4", status=0, posts=0)
            self.stop(server, "--only", "007", "--shard", f"{shard}/4")

    @variation
    def test_it_is_remembered_for_the_whole_project_and_for_no_other(self) -> None:
        with self.xnat() as server:
            # 008 has no such series yet: what was said of one slice holds for all.
            self.run_it(server, "--config", self.config("scout"), "--only", "008", status=0)
            self.stop(server)
            self.assertEqual(self.upload(server, project="OVER").status, 0)
            self.assertEqual(len(server.imports()), 4)

    @variation
    def test_a_dry_run_remembers_nothing(self) -> None:
        with self.xnat() as server:
            self.dry_run(server, "--config", self.config("scout"), status=0)
            self.assertFalse(self.work.exists())
            self.run_it(server, "--only", "008", status=0)
            self.dry_run(server, "--config", self.config("scout"), status=0)
            self.run_it(server, status=0)


class Choosing(Refusals):
    """--only, --shard."""

    def test_only_chooses_whole_sessions_by_glob(self) -> None:
        self.root.mkdir()
        sessions = [("007", "post"), ("007", "pre"), ("008", "pre"), ("07", "pre"), ("[x]", "pre")]
        cases: Tuple[Tuple[List[str], List[int]], ...] = (
            (["007"], [0, 1]), (["007/pre"], [1]), (["00?"], [0, 1, 2]), (["*/pre"], [1, 2, 3, 4]),
            (["0*/po*", "008"], [0, 2]), (["[0]7"], [3]), (["[[]x]"], [4]), ([], list(range(5))),
            (["007", "007/pre"], [0, 1]), (["*"], list(range(5))), (["PRE"], []), (["T1"], []),
            (["pre"], []), (["0"], []), (["007/p"], []), (["007/PRE"], []))
        for only, wanted in cases:
            with self.subTest(only):
                chooses = settings(self.root, *(f"--only={each}" for each in only)).chooses
                self.assertEqual([number for number, each in enumerate(sessions)
                                  if chooses(*each)], wanted)

    def test_only_sends_what_it_chooses(self) -> None:
        wanted = self.series("007/pre/T1") + self.series("007/pre/T2")
        for path in ("007/post/T1", "008/pre/T1"):
            self.series(path)
        with self.xnat() as server:
            ran = self.run_it(server, "--only", "007/pr*", status=0)
            self.assert_says(ran, 0, "2 sessions", "--only")
            self.assertEqual(server.labels(), ["007_pre"])
            self.assert_archived(server, "007_pre", wanted)

    def test_a_slash_at_the_end_and_the_sessions_label_are_understood(self) -> None:
        self.root.mkdir()
        sessions = [("007", "post"), ("007", "pre"), ("008", "a b"), ("A", "b"), ("A_b", "c")]
        for pattern, wanted in (("007/", [0, 1]), ("007/pre/", [1]), ("007_pre", [1]),
                                ("008_a_b", [2]), ("*/", [0, 1, 2, 3, 4]), ("A_*", [4]),
                                ("007_p", []), ("007_PRE", [])):
            with self.subTest(pattern):
                chooses = settings(self.root, "--only", pattern).chooses
                self.assertEqual([number for number, each in enumerate(sessions)
                                  if chooses(*each)], wanted)

    def test_a_pattern_that_could_never_choose_is_refused(self) -> None:
        self.series("007/pre/T1")
        rows: List[Row] = [(pattern, self.arguments(NOWHERE, "--only", pattern),
                            [f"--only {pattern}", "subject/session"])
                           for pattern in ("007/pre/T1", "/007", "/", "a//b", "007//")]
        rows.append(("empty", self.arguments(NOWHERE, "--only", ""), ["--only"]))
        self.assert_table(2, rows)

    def test_a_shard_that_is_none_is_refused_and_shows_the_form(self) -> None:
        self.series("007/pre/T1")
        self.assert_table(2, [
            (text, self.arguments(NOWHERE, f"--shard={text}"), [f"--shard {text}", "K/N", "1 to N"])
            for text in ("0/2", "3/2", "1", "1/0", "0/0", "a/b", "1/2/3", "", " 1/2", "1/ 2",
                         "-1/2", "1/-2", "1.0/2", "\u0661/2", "1/1000000000")])


class Shards(unittest.TestCase):
    """Each subject has one shard, the same in every run, on every Python and platform."""

    # Of 2, 10 and 1,000 shards: whoever changes the hash lets subjects change their machine, and
    # a second machine send what waits in the workdir of the first.
    KNOWN = {
        "007": (1, 7, 997), "008": (1, 9, 119), "sub-01": (2, 2, 412), "sub-02": (2, 2, 162),
        "a b": (1, 3, 403), "-n": (1, 5, 665), "s[1] $(touch hit)": (1, 7, 457),
        "M\u00fcller": (1, 5, 55), "\u65e5\u672c": (2, 2, 332), "\U0001f9e0": (2, 6, 926),
        "\udcff": (1, 7, 297),  # a byte that is no UTF-8
    }

    def shard_of(self, subject: str, shards: int) -> int:
        """The one shard that chooses this subject."""
        found = [number for number in range(1, shards + 1)
                 if self.of(number, shards).chooses(subject, "pre")]
        self.assertEqual(len(found), 1, (subject, shards))
        return found[0]

    def of(self, number: int, shards: int) -> Any:
        return dicomUpload.Settings(
            "", "", "", "", "", (), [], (number, shards), *[None] * (
                len(dicomUpload.fields(dicomUpload.Settings)) - 8))

    def test_known_subjects_keep_their_shards(self) -> None:
        for subject, shards in self.KNOWN.items():
            with self.subTest(subject):
                self.assertEqual(tuple(self.shard_of(subject, count) for count in (2, 10, 1000)),
                                 shards)

    def test_every_subject_is_in_exactly_one_shard_whatever_its_name(self) -> None:
        letters = [chr(code) for code in (*range(1, 0x500, 37), *range(0x500, 0x11000, 1999),
                                          *range(0x11000, 0x110000, 70001))
                   if not 0xD800 <= code < 0xE000]
        names = letters + [f"sub-{letter}{number}" for number, letter in enumerate(letters)]
        names += [os.fsdecode(bytes([byte, 0x41])) for byte in range(0x80, 0x100, 9)]  # no UTF-8
        for shards in (*range(1, 13), 97):
            every = [self.of(number, shards) for number in range(1, shards + 1)]
            for name in names:
                chosen = sum(each.chooses(name, "pre") for each in every)
                self.assertEqual(chosen, 1, (name, shards))

    def test_all_sessions_of_a_subject_are_in_its_shard(self) -> None:
        for subject in ("007", "M\u00fcller"):
            for session in ("pre", "post", "\u00e4", "1"):
                number = self.shard_of(subject, 10)
                self.assertTrue(self.of(number, 10).chooses(subject, session))

    def test_a_name_in_another_unicode_form_has_the_same_shard(self) -> None:
        for name in ("M\u00fcller", "\u1e9b\u0323", "\u00c5ngstr\u00f6m", "\ud55c\uae00", "\u212b"):
            forms = {unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
            for shards in (2, 10, 1000):
                with self.subTest(name, shards=shards):
                    self.assertEqual(len({self.shard_of(each, shards) for each in forms}), 1)

    def test_subjects_are_spread_evenly(self) -> None:
        for shards in (2, 7, 10):
            every = [self.of(number, shards) for number in range(1, shards + 1)]
            counts = [sum(each.chooses(f"sub-{name:04d}", "") for name in range(2000))
                      for each in every]
            self.assertLess(max(counts), 1.25 * 2000 / shards)
            self.assertGreater(min(counts), 0.75 * 2000 / shards)

    def test_it_is_the_sha256_of_the_name_and_so_the_same_everywhere(self) -> None:
        for name in ("007", "a b", "M\u00fcller", "\udcff"):
            raw = unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")
            number = int(hashlib.sha256(raw).hexdigest()[:16], 16)
            for shards in (1, 3, 10, 999999):
                self.assertTrue(self.of(number % shards + 1, shards).chooses(name, "pre"))


class DryRun(Refusals):
    """-n: the same run with nothing sent."""

    def test_it_writes_nothing_anywhere(self) -> None:
        readme_tree(self.root, files=1)
        (self.root / "007/pre/T2_FLAIR_0012/notes.txt").write_text("x" * 300)

        def everything() -> Dict[str, Any]:
            found = {str(path): path.lstat() for path in self.folder.rglob("*")}
            return {name: (info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_mode)
                    for name, info in found.items()}

        with self.xnat() as server:
            before = everything()
            ran = self.dry_run(server, "-n", "--config", str(EXCLUSIONS), status=1)
            self.assert_says(ran, 1, "4 left out")
            self.assertEqual(everything(), before)
            self.assertEqual({each.method for each in server.requests
                              if "/JSESSION" not in each.path}, {"GET"})

    @variation
    def test_it_lists_exactly_what_is_then_sent_and_nothing_after_that(self) -> None:
        readme_tree(self.root, files=2)
        (self.root / "007/pre/T2_FLAIR_0012/notes.txt").write_text("x" * 300)
        options = "--config", str(EXCLUSIONS), "--only", "007"
        with self.xnat() as server:
            dry = self.dry_run(server, *options, status=0)
            listed = {(label, name): int(files) for label, name, files in WOULD.findall(dry.out)}
            self.run_it(server, *options, status=0)
            sent = Counter((label, file.description) for label in server.labels()
                           for file in server.files(label))
            self.assertEqual(listed, dict(sent))
            again = self.dry_run(server, *options, status=0)
            self.assertEqual(WOULD.findall(again.out), [], "all of it is on the server")

    @variation
    def test_the_command_that_it_suggests_sends(self) -> None:
        self.series("007/pre/T1")
        with self.xnat() as server:
            ran = self.upload(server, "-n")
            suggested = next(line for line in ran.out.splitlines() if str(SCRIPT) in line)
            self.assertNotRegex(suggested, r"\s(-n|--dry-run)\b")
            self.assertIn("--workdir", suggested)
            self.assertNotIn("s3cret", ran.text)
            command = suggested[suggested.index("python3 ") + 8:]
            sent = self.run_command(["sh", "-c", f"exec '{sys.executable}' {command}"],
                                    {"XNAT_PASS": "s3cret"})
            self.assertEqual(sent.status, 0, sent.text)
            self.assertEqual(len(server.stored("007_pre")), 2)

    def test_it_finds_the_same_trouble(self) -> None:
        self.series("007/pre/T1")
        (self.root / "007/pre/T1/gone").symlink_to("nowhere")
        with self.xnat() as server:
            self.assert_says(self.dry_run(server, status=1), 1, "T1", "gone", "link")


class Options(Refusals):
    """The options one by one."""

    def setUp(self) -> None:
        super().setUp()
        self.series("007/pre/T1")

    def test_abbreviated_unknown_and_senseless_options_are_refused(self) -> None:
        rows: List[Row] = [(" ".join(options), self.arguments(NOWHERE, *options),
                            [options[0].partition("=")[0]])
                           for options in (
            ["--conf=x.json"], ["--dry"], ["--max", "5"], ["--comp", "1"], ["--no-commit"],
            ["--force"], ["-x"], ["--procs", "0"], ["--procs", "-1"], ["--procs", "two"],
            ["--procs"], ["--max-files", "0"], ["--max-files", "1.5"], ["--compression", "10"],
            ["--compression", "x"], ["--compression", "-1"], ["--compression", "AUTO"],
            ["--compression", ""], ["--retries", "-1"], ["--timeout", "0"], ["--timeout", ""],
            ["--limit-rate", "fast"], ["--limit-rate", "0"], ["--cacert", "/no/such.pem"],
            ["--logname", "a/b"], ["--logname", ""], ["--procs", "\u00b2"], ["--shard"],
            ["--only"], ["--nest"], ["--rev"], ["--review-all"])]
        rows.append(("one too many", self.arguments(NOWHERE, "extra"), ["too many"]))
        rows.append(("nothing", [sys.executable, str(SCRIPT)], ["URL", "ROOTDIR"]))
        rows.append(("empty user", self.arguments(NOWHERE, user=""), ["USER"]))
        rows.append(("empty password", self.arguments(NOWHERE, password=""), ["PASS"]))
        rows.append(("empty project", self.arguments(NOWHERE, project=""), ["PROJECT"]))
        rows.append(("a line break", self.arguments(NOWHERE, project="A\nB"), ["PROJECT"]))
        for option in ("--workdir", "--config", "--cacert"):  # a shell's variable that is not set
            rows.append((f"empty {option}", self.arguments(NOWHERE, option, ""), [option]))
        self.assert_table(2, rows)

    def test_an_argument_that_was_forgotten_is_guessed(self) -> None:
        call = self.arguments(NOWHERE)
        self.assert_table(2, [
            ("PASS", [*call[:4], *call[5:]], ["URL USER PASS PROJECT ROOTDIR", "PASS", " - "]),
            ("ROOTDIR", call[:6], ["URL USER PASS PROJECT ROOTDIR"]),
            ("URL and USER swapped", [*call[:2], "alice", NOWHERE, *call[4:]],
             ["USER", "URL USER PASS PROJECT ROOTDIR"])])

    def test_a_wrong_option_ends_the_command_itself_with_2(self) -> None:
        self.assert_refused(self.run_command(self.arguments(NOWHERE, "--dry")), 2, "--dry")

    def test_a_url_that_is_mistyped_shows_the_right_form(self) -> None:
        host = "127.0.0.1:9"
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

    def test_a_url_is_taken_as_it_is_meant(self) -> None:
        for url, wanted in (
                ("https://xnat.example.org", "https://xnat.example.org"),
                ("https://xnat.example.org//", "https://xnat.example.org"),
                ("HTTPS://XNAT.example.org/Xnat/", "https://xnat.example.org/Xnat"),
                ("http://[::1]:8080/a%20b/", "http://[::1]:8080/a%20b"),
                ("http://localhost:080", "http://localhost:080"),
                ("https://xn--mller-kva.example", "https://xn--mller-kva.example")):
            with self.subTest(url):
                self.assertEqual(dicomUpload.check_url(url), wanted)

    def test_options_may_stand_before_the_arguments(self) -> None:
        with self.xnat() as server:
            arguments = self.arguments(server.url)
            arguments[2:2] = ["--dry-run", "--procs", "2"]
            self.assert_says(self.run_command(arguments), 1, "would send")

    @variation
    def test_the_seeds_call_works_word_for_word(self) -> None:
        readme_tree(self.root, files=1)
        with self.xnat() as server:
            words = (f"{SCRIPT} {server.url} alice s3cret BRAIN {self.root} "
                     f"--config {EXCLUSIONS}").split()
            ran = self.run_command([sys.executable, *words])
            self.assertEqual(ran.status, 0, ran.text)
            self.assertIn("007_pre", server.labels())
        self.assertTrue((self.folder / "work").is_dir())

    @variation
    def test_max_files_splits_a_series_into_parts_in_order(self) -> None:
        wanted = self.series("007/pre/T1", files=5)
        names = [f"IM{number:04d}.dcm" for number in range(1, 6)]
        for most, parts in ((2, [2, 2, 1]), (5, [5])):
            with self.subTest(most), self.xnat() as server:
                ran = self.run_it(server, "--max-files", str(most), "--again", status=0)
                self.assert_says(ran, 0, "5 files verified")
                posts = server.imports()
                self.assertEqual([len(post.entries) for post in posts], parts)
                self.assertEqual([name for post in posts for name in post.entries], names)
                self.assertEqual(len(server.commits()), 1)
                self.assert_archived(server, "007_pre", wanted)

    @variation
    def test_another_max_files_in_the_next_run_sends_only_the_rest(self) -> None:
        wanted = self.series("007/pre/T1", files=5)
        with self.xnat() as server:
            server.fail("error page", "services/import", status=400, text="no", skip=1)
            self.run_it(server, "--max-files", "2", "--procs", "1", status=1)
            self.assertEqual(server.stored("007_pre"), sorted(wanted[:2]))
            for most, parts in ((3, [3]), (1, [])):
                before = len(server.imports())
                self.run_it(server, "--max-files", str(most), "--procs", "1", status=0)
                self.assertEqual([len(post.entries) for post in server.imports()[before:]], parts)
            self.assert_archived(server, "007_pre", wanted)

    def test_what_is_not_given_is_as_the_readme_says(self) -> None:
        given = settings(self.root)
        self.assertEqual((given.procs, given.max_files, given.compression, given.retries,
                          given.timeout, given.limit_rate), (4, 500, dicomUpload.AUTO, 5, 900, 0))

    def test_compression_is_zips_level_or_chosen_for_each_part(self) -> None:
        for subject in ("008", "009"):
            self.series(f"{subject}/pre/T1")
        kept = self.folder / "kept"
        wanted = {"0": {zipfile.ZIP_STORED}, "6": {zipfile.ZIP_DEFLATED},
                  "auto": {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}}  # see test_level
        for level, methods in or_at_hand(wanted, "6", "auto").items():
            (kept / level).mkdir(parents=True)
            with self.subTest(level), self.xnat(keep=str(kept / level)) as server:
                options = () if level == "auto" else ("--compression", level)
                ran = self.run_it(server, "--again", "--procs", "1", *options, status=0, posts=3)
                self.assertRegex(ran.out, f", mostly at zip's level {level}" if options else
                                 r", mostly at zip's level [01]\.\n")
                found: Set[int] = set()
                for path in (kept / level).iterdir():
                    with zipfile.ZipFile(path) as archive:
                        found |= {each.compress_type for each in archive.infolist()}
                self.assertEqual(found | (methods if level == "auto" else set()), methods)

    def test_limit_rate_is_shared_among_the_uploads(self) -> None:
        with self.xnat() as server:
            self.run_it(server, "--limit-rate", "4M", "--procs", "2", status=0)
        self.assertRegex(self.log(), r"--limit-rate 2097152\b")

    def test_retries_are_tries_after_the_first(self) -> None:
        with self.xnat() as server:
            server.fail("status", "services/import", status=503, times=None)
            for retries in (0, 1):
                before = len(server.imports())
                self.run_it(server, "--retries", str(retries), status=1)
                self.assertEqual(len(server.imports()) - before, 1 + retries)

    @variation
    def test_review_leaves_whole_verified_sessions_for_a_person(self) -> None:
        wanted = self.tree()
        with self.xnat() as server:
            ran = self.run_it(server, "--review", status=0, posts=1)
            self.assert_says(ran, 0, "prearchive", "2 files verified", "review")
            self.assertEqual((server.commits(), server.archive), ([], {}))
            (row,) = server.prearchive
            self.assertEqual((row.name, row.status), ("007_pre", "READY"))
            self.assertEqual(server.stored("007_pre"), wanted)
            self.assert_says(self.run_it(server, "--review", status=0, posts=0), 0, "already there")
            self.assertEqual((server.commits(), server.archive), ([], {}))

    def test_a_workdir_inside_rootdir_is_refused(self) -> None:
        (self.folder / "link").symlink_to(self.root)
        self.assert_table(2, [
            (str(workdir), self.arguments(NOWHERE, "--workdir", str(workdir)),
             ["--workdir", "inside ROOTDIR"])
            for workdir in (self.root / "007/work", self.root, self.folder / "link/x")])
        self.assertEqual([path.name for path in self.root.iterdir()], ["007"])

    def test_a_rootdir_among_the_zips_of_the_workdir_is_refused_and_stays(self) -> None:
        root = self.work / "dicomUpload.zips/data"
        shutil.copytree(str(self.root), str(root))
        ran = self.run_command(self.arguments(NOWHERE, root=root))
        self.assertEqual(ran.status, 2, ran.text)
        self.assertIn("ROOTDIR: lies where the workdir keeps its zips", ran.err)
        self.assertEqual(len(list(root.rglob("*.dcm"))), 2)

    def test_a_workdir_beside_rootdir_with_a_longer_name_is_fine(self) -> None:
        workdir = str(self.root) + "-work;a,[b] $(c)\u00fc"
        with self.xnat() as server:
            self.run_it(server, "--workdir", workdir, status=0)
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

    def test_a_workdir_in_use_stops_the_second_run_only_and_says_by_whom(self) -> None:
        with self.xnat() as server:
            server.fail("stall before", "services/import", seconds=30)
            first = self.start(self.arguments(server.url))
            self.assertTrue(server.wait_for(server.imports))
            ran = self.upload(server)
            self.assert_refused(ran, 3, "workdir", "in use", str(first.pid), socket.gethostname())
            first.send_signal(signal.SIGTERM)
            out, err = first.communicate(timeout=20)
            self.assertEqual(first.returncode, 143, out + err)
            self.assertEqual(len(server.imports()), 1)

    def test_version_and_help_are_no_errors(self) -> None:
        for option, word in (("--version", f"dicomUpload {dicomUpload.VERSION}"),
                             ("--help", "exit status:")):
            ran = self.run_command([sys.executable, str(SCRIPT), option])
            self.assert_says(ran, 0, word)
            self.assertEqual(ran.err, "")

    def test_help_names_every_option_and_every_exit_status(self) -> None:
        shown = self.run_command([sys.executable, str(SCRIPT), "--help"]).out
        for option in ("--config", "--workdir", "--only", "--shard", "--nested", "--dry-run",
                       "--procs", "--max-files", "--compression", "--retries", "--timeout",
                       "--limit-rate", "--review", "--overwrite-files", "--again", "--cacert",
                       "--insecure", "--logname", "--quiet", "--verbose"):
            self.assertRegex(shown, rf"(?m)^  (-\w, )?{option}\b")
        statuses = shown[shown.index("exit status:"):]
        for status in (0, 1, 2, 3, 130, 143):
            self.assertRegex(statuses, rf"\b{status}\b")
        self.assertNotIn("--no-commit", shown)


class Address(Refusals):
    """URL and PROJECT, as the server sees them; the rest of the meeting is in test_meet."""

    def setUp(self) -> None:
        super().setUp()
        self.wanted = self.series("007/pre/T1", files=1)

    def test_a_project_that_is_not_there_is_refused_whatever_its_name(self) -> None:
        with self.xnat() as server:
            self.assert_table(3, [
                (project, self.arguments(server.url, project=project),
                 [f"project {project}", "alice", "check its ID"])
                for project in ("NOPE", "SECRET", "brain", "../../x", "a b?c#d%41", "\u00fc")])
            self.assert_nothing_there(server)

    def test_a_project_that_can_only_be_read_is_refused_with_whom_to_ask(self) -> None:
        with self.xnat() as server:
            self.assert_table(3, [
                (user, self.arguments(server.url, user=user, password=password, project=project),
                 [f"project {project}", user, "owner"])
                for user, password, project in (("bob", "b0b", "BRAIN"),
                                                ("alice", "s3cret", "PUBLIC"))])
            self.assert_nothing_there(server)

    def test_a_server_that_nobody_knows_or_that_is_down_is_named_with_what_to_check(self) -> None:
        with socket.socket() as taken:  # bound and not listening: nobody else can have this port
            taken.bind(("127.0.0.1", 0))
            down = "http://127.0.0.1:%d" % taken.getsockname()[1]
            self.assert_table(3, [
                (url, self.arguments(url, *options, "--retries", "0"), [url, words, "check"])
                for options in ((), ("--dry-run",))
                for url, words in ((down, "nothing answers"), ("http://xnat.invalid", "name"))])

    def test_capitals_slashes_at_the_end_and_a_context_path_are_fine(self) -> None:
        with self.xnat(context_path="/Xnat") as server:
            url = server.url.replace("http", "HTTP") + "//"
            self.assert_says(self.run_command(self.arguments(url)), 0)
            self.assert_archived(server, "007_pre", self.wanted)


class Tools(Refusals):
    """zip and curl, and nothing else."""

    def setUp(self) -> None:
        super().setUp()
        self.series("007/pre/T1", files=1)

    def test_a_program_that_is_missing_or_too_old_is_named_with_how_to_get_it(self) -> None:
        old = "echo 'curl 7.60.0 (x86_64) libcurl/7.60.0'"
        cases: List[Tuple[List[str], Dict[str, str], List[str]]] = [
            (["sh", "curl"], {}, ["zip", "not installed", "apt-get install zip",
                                  "dnf install zip", "brew install zip"]),
            (["sh", "zip"], {}, ["curl", "not installed", "apt-get install curl"]),
            (["sh", "zip"], {"curl": old}, ["curl 7.60", "too old", "7.61"]),
        ]
        with self.xnat() as server:
            for tools, stubs, words in cases:
                with self.subTest(words):
                    environment = self.path_with(*tools, **stubs)
                    for ran in self.run_many([self.arguments(server.url, *options)
                                              for options in ((), ("--dry-run",))],
                                             environment=environment):
                        self.assert_refused(ran, 3, *words)
                    shutil.rmtree(environment["PATH"])
            self.assertEqual(server.requests, [])

    def test_nothing_else_is_needed_on_the_path(self) -> None:
        with self.xnat() as server:
            self.run_it(server, status=0, posts=1, environment=self.path_with("sh", "zip", "curl"))
            self.assertEqual(len(server.stored("007_pre")), 1)


class Password(Refusals):
    """Where the password comes from, and where it never goes."""

    def setUp(self) -> None:
        super().setUp()
        self.wanted = self.series("007/pre/T1")

    def netrc(self, text: str, mode: int = 0o600, coding: str = "utf-8") -> None:
        path = self.home / ".netrc"
        path.write_bytes(text.encode(coding))
        path.chmod(mode)

    def let_in(self, server: Standin, environment: Optional[Dict[str, str]] = None) -> None:
        self.dry_run(server, password="-", environment=environment)

    def test_it_comes_from_xnat_pass_then_from_netrc(self) -> None:
        with self.xnat() as server:
            self.netrc("machine 127.0.0.1 login alice password wrong\n")
            self.let_in(server, {"XNAT_PASS": "s3cret"})
            texts = {
                "plain": "machine 127.0.0.1 login alice password s3cret\n",
                "several lines": "machine 127.0.0.1\n  login alice\n  password s3cret\n",
                "beside another machine": "machine other login alice password wrong\n"
                "machine 127.0.0.1 login alice password s3cret\n",
                "in quotes": 'machine 127.0.0.1 login alice password "s3cret"\n',
                "the password first": "machine 127.0.0.1 password s3cret login alice\n",
                "of any machine": "default login alice password s3cret\n",
                "letters of all kinds": "machine other login \u00e4 password \u6d88\n"
                "machine 127.0.0.1 login alice password s3cret\n",
                "after a comment and a macro": "#machine 127.0.0.1 login alice password x\n"
                "macdef init\nmachine 127.0.0.1 login alice password x\n\n"
                "machine 127.0.0.1 login alice account a password s3cret\n",
                "before somebody else": "machine 127.0.0.1 login alice password s3cret\n"
                "machine 127.0.0.1 login bob password b0b\n",
                "after somebody else": "machine 127.0.0.1 login bob password b0b\n"
                "machine 127.0.0.1 login alice password s3cret\n"}
            for title, text in or_at_hand(texts, "in quotes", "the password first",
                                          "of any machine", "after a comment and a macro",
                                          "after somebody else").items():
                with self.subTest(title):
                    self.netrc(text)
                    self.let_in(server)
            self.assertEqual({each.status for each in server.requests}, {200})

    def test_a_line_end_behind_it_is_not_part_of_it(self) -> None:
        with self.xnat() as server:  # XNAT_PASS="$(< file)" has none, a Secret's file often has
            for end in ("\n", "\r\n"):
                self.let_in(server, {"XNAT_PASS": "s3cret" + end})

    def refuse_login(self, *words: str) -> None:
        ran = self.run_command(self.arguments(NOWHERE, password="-"))
        self.assert_refused(ran, 2, *words)

    def test_without_any_the_ways_to_give_one_are_named(self) -> None:
        self.refuse_login("PASS", "XNAT_PASS", ".netrc")
        self.netrc("machine 127.0.0.1 login bob password b0b\n")  # somebody else's
        self.refuse_login("PASS", "XNAT_PASS", ".netrc")

    def test_a_netrc_that_others_can_read_is_not_used(self) -> None:
        self.netrc("machine 127.0.0.1 login alice password s3cret\n", 0o644)
        self.refuse_login(".netrc", "chmod 600")

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

    @variation
    def test_it_is_in_no_output_no_file_and_no_childs_arguments(self) -> None:
        password = "p\"a's \\w;#,: $(x)\u00fchunter2"
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
        pair = base64.b64encode(f"alice:{password}".encode()).decode()
        for secret in (password, "hunter2", pair):
            self.assertNotIn(secret, text)

    def test_one_that_begins_with_a_dash_is_not_repeated(self) -> None:
        passwords = "-s3cret", "--s3cret", "-n3cret", "--procs=3cret"
        ends = self.run_many([self.arguments(NOWHERE, "--retries", "0", password=each)
                              for each in passwords])
        for password, ran in zip(passwords, ends):
            with self.subTest(password):
                self.assertIn(ran.status, (2, 3), ran.text)
                self.assertNotIn("3cret", ran.text)

    @variation
    def test_log_report_and_ledger_are_for_their_owner_only(self) -> None:
        with self.xnat() as server:
            self.run_it(server, "--logname", "brain study", status=0,
                        preexec=lambda: os.umask(0))
        modes = {path.suffix: oct(path.stat().st_mode & 0o777) for path in self.work.iterdir()}
        for suffix in (".log", ".csv", ".ledger"):
            self.assertEqual(modes.get(suffix), "0o600", modes)
        self.assertEqual(sorted(path.suffix for path in self.work.glob("brain study*")),
                         [".csv", ".log"])

    @variation
    def test_each_run_has_a_log_of_its_own(self) -> None:
        with self.xnat() as server:
            for ran in self.run_many([self.arguments(server.url)] * 3):  # surely in two seconds
                self.assert_says(ran, 0)
        self.assertEqual(len(list(self.work.glob("*.log"))), 3)
        self.assertEqual(len(list(self.work.glob("*.csv"))), 3)


if __name__ == "__main__":
    unittest.main()
