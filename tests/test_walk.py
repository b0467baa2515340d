"""Walking ROOTDIR: which folders are subjects, sessions and series, and what they are called.

Only names count here, and no file is opened before the server has let us in. Through the real
command line; what lies in the files is in test_read.
"""

import os
import re
import shutil
import sys
import unittest
from typing import List

from tests.dicom import digests, readme_tree, uid, write_series
from tests.support import SCRIPT, Ran, drop_root_rights, missing, variation
from tests.support import load_tests as load_tests  # several at a time
from tests.trees import TreeTest
from tests.xnat_standin import Standin

LOGIN = "POST /data/JSESSION"
NO_DATA = (".hidden", ".Trash-1000", "#recycle", "@Recycle", "@eaDir", "$RECYCLE.BIN",
           "lost+found", "System Volume Information", "__MACOSX")
NO_SESSION_LEVEL = re.compile(r"(?i)\b(no|missing|without|lacks?)\b[^/:,.(]{0,30}\bsession|"
                              r"\bsessions?\b[^/:,.(]{0,30}\b(missing|level)\b")


class Names(TreeTest):
    """Names that are no data, and files where folders belong."""

    def test_names_that_are_no_data_are_left_out_at_every_level_and_in_any_case(self) -> None:
        wanted = [self.image("007/pre/T1/IM1", 1), self.image("007/pre/T1/deep/er/IM2", 2)]
        places = ("{}/pre/T1/IM1", "007/{}/T1/IM1", "007/pre/{}/IM1", "007/pre/T1/{}/IM1",
                  "007/pre/T1/deep/{}/er/IM1")
        left_out = ["007/pre/T1/.IM3", "007/pre/T1/deep/._IM2"]
        for place in left_out:
            self.image(place, 7)
        for number, name in enumerate(NO_DATA):
            cases = (name, name.upper(), name.lower(), name.swapcase())
            for level, place in enumerate(places):
                path = place.format(cases[(number + level) % len(cases)])
                self.image(path, 10 * number + level)
                left_out.append(path[:place.index("{") + len(name)])
                if level == 0 and name == "lost+found":  # as it is at the top of a file system
                    self.hold(self.root / left_out[-1])
        alike = self.image("recycle/lost and found/eaDir/MACOSX.dcm")
        with self.xnat() as server:
            ran = self.run_it(server, status=0, preexec=drop_root_rights)
            self.assert_archived(server, "007_pre", wanted)
            self.assert_archived(server, "recycle_lost_and_found", [alike])
            self.assertEqual(len(server.labels()), 2)
        self.assertRegex(ran.text, rf"\b{len(left_out)}\b")
        self.assertNotIn("held back", ran.text)
        for path in left_out:
            with self.subTest(path):
                self.assertIn(path, self.log())

    def test_a_tree_where_all_names_are_no_data_has_no_series(self) -> None:
        self.image(".git/pre/T1/IM1")
        self.image("007/@eaDir/T1/IM1")
        self.image("008/pre/#recycle/IM1")
        with self.xnat() as server:
            ran = self.run_it(server, status=2)
            self.assert_nothing_there(server)
        self.assertIn("series", ran.text)

    def test_files_where_folders_belong_are_counted_and_named_once(self) -> None:
        wanted = self.series("007/pre/T1")
        strays = ["README.txt", "007/list.csv", "007/pre/notes.txt"]
        for path in strays:
            (self.root / path).write_text("Scanned twice, the first one moved.\n")
        os.mkfifo(str(self.root / "007/pipe"))
        with self.xnat() as server:
            ran = self.run_it(server, status=0, posts=1, timeout=20)
            self.assert_archived(server, "007_pre", wanted)
        names = [path.rpartition("/")[2] for path in strays]
        told = [line for line in self.lines(ran, re.compile(r"\b4\b"))
                if any(name in line for name in names)]
        self.assertEqual(len(told), 1, ran.text)
        for path in strays + ["007/pipe"]:
            self.assertIn(path, self.log())

    @variation
    def test_images_beside_series_or_session_folders_are_a_failure_by_name(self) -> None:
        wanted = self.series("007/pre/T1")
        self.image("007/pre/loose1.dcm")
        self.series("008/pre/T1")
        (self.root / "008/loose2.dcm").write_bytes(self.content("008/post/T1/IM1"))
        with self.xnat() as server:
            self.run_it(server, "--only", "007", status=1)
            dry = self.dry_run(server, status=1)
            ran = self.run_it(server, status=1)
            self.series("009/pre/T1")
            self.run_it(server, "--only", "009", status=0)  # another's is not its business
            self.assertEqual(server.stored("007_pre"), sorted(wanted))
            self.assertEqual(len(server.stored("008_pre")), 2)
        for said in (dry, ran):
            for name in ("loose1.dcm", "loose2.dcm"):
                self.assertIn(name, said.text)

    def test_sessions_and_series_that_are_links_are_followed(self) -> None:
        wanted = self.series("007/pre/T1")
        self.root.rename(self.folder / "real")
        (self.root / "007/pre").mkdir(parents=True)
        (self.root / "007/pre/T1").symlink_to(self.folder / "real/007/pre/T1")
        (self.root / "008").mkdir()
        (self.root / "008/pre").symlink_to(self.folder / "real/007/pre")
        (self.root / "009").symlink_to(self.folder / "real/007")
        with self.xnat() as server:
            self.run_it(server, status=0, posts=3)
            for label in ("007_pre", "008_pre", "009_pre"):
                self.assert_archived(server, label, wanted)

    def test_a_folder_that_cannot_be_opened_is_a_failure_and_stops_no_other(self) -> None:
        self.need_held_root()
        for subject in ("closed-session", "closed-subject", "closed-series", "no-series", "good"):
            self.series(f"{subject}/pre/T1")
        post = self.series("no-session/post/T1")
        self.series("closed-series/pre/T2")
        self.hold(self.root / "closed-session/pre")
        self.hold(self.root / "closed-subject")
        self.hold(self.root / "closed-series/pre/T2")
        # A link to nothing may be a share that is not mounted: this is not the whole session.
        (self.root / "no-series/pre/T2").symlink_to("/not/mounted")
        (self.root / "no-session/pre").symlink_to("/not/mounted")
        (self.root / "no-subject").symlink_to("/not/mounted")
        (self.root / "loop").symlink_to("loop")
        with self.xnat() as server:
            dry = self.dry_run(server, status=1, preexec=drop_root_rights)
            ran = self.run_it(server, status=1, preexec=drop_root_rights)
            self.assertEqual(set(server.archive),
                             {("BRAIN", "good_pre"), ("BRAIN", "no-session_post")})
            self.assertEqual(server.stored("no-session_post"), sorted(post))
            for label in ("closed-series_pre", "no-series_pre"):
                self.assertEqual(len(server.stored(label)), 2, label)  # T1 waits
                self.assert_told(ran, label, "held back")
        for said in (dry, ran):
            for words in (["closed-session", "pre"], ["closed-subject"],
                          ["closed-series", "T2"], ["no-series", "T2"],
                          ["no-session", "pre"], ["no-subject"], ["loop"]):
                with self.subTest(words):
                    self.assert_told(said, *words)


    @variation
    def test_a_folder_that_cannot_be_opened_takes_no_session_its_label(self) -> None:
        self.need_held_root()
        self.series("007/pre/T1")
        self.series("007_pre/x/T1")
        self.hold(self.root / "007_pre")
        with self.xnat() as server:
            ran = self.run_it(server, status=1, preexec=drop_root_rights)
            self.assertEqual(set(server.archive), {("BRAIN", "007_pre")})
            self.assertIn("007_pre: the folder cannot be read", ran.out)


class Labels(TreeTest):
    """What XNAT is given for the names of folders."""

    def test_names_with_any_character_become_clean_labels_and_the_change_is_shown(self) -> None:
        wanted = {}
        names = ("a b", "a'b", 'a"b', "a;b", "a,b", "$(touch hit)", "`touch hit`", "-rf", "M\u00fc",
                 "a.b", "a\nb", "*?[x]", "a\\b", "\u65e5\u672c", "a&b=c%41#", "~", "=1+1", "@x")
        for number, name in enumerate(names):
            path = f"{name}{number}/{name}/{name}"
            wanted[path] = self.series(path, files=1)
        with self.xnat() as server:
            ran = self.run_it(server, status=0, posts=len(names))
            for path, digest in wanted.items():
                subject, session, series = path.split("/")
                label = re.sub("[^A-Za-z0-9_-]", "_", f"{subject}_{session}")
                with self.subTest(path):
                    self.assert_archived(server, label, digest)
                    self.assertEqual(server.archive["BRAIN", label].subject,
                                     re.sub("[^A-Za-z0-9_-]", "_", subject))
                    if label != f"{subject}_{session}":
                        shown = path.rpartition("/")[0].replace("\n", "\\n")
                        self.assert_told(ran, shown, label)
        self.assertEqual(list(self.folder.rglob("hit")), [])
        self.assertEqual(len(self.report()), len(names))

    def test_labels_exclusions_and_only_are_the_same_in_every_locale(self) -> None:
        self.series("M\u00fcller/pr\u00e9/T1_0001", files=1)
        self.series("M\u00fcller/pr\u00e9/\u00dcber_0002", files=1)
        config = self.folder / "config.json"
        config.write_text('{"Exclude": ["\u00fcber"]}', encoding="utf-8")
        with self.xnat() as server:
            self.run_it(server, "--config", str(config), "--only", "M\u00fcller", status=0, posts=1,
                        environment={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
            self.assertEqual(list(server.archive), [("BRAIN", "M_ller_pr_")])
            self.run_it(server, "--config", str(config), status=0, posts=0)

    def test_a_folder_name_with_a_line_break_cannot_forge_a_line(self) -> None:
        self.series("007/pre/T1\nFORGED")
        self.series("008\nFORGED/pre/T1")
        with self.xnat() as server:
            ran = self.run_it(server, "-v", status=0, posts=2)
        for text in (ran.text, self.log()):
            self.assertNotRegex(text, "(?m)^FORGED")
        self.assertIn("T1\\nFORGED", ran.text)

    def test_a_folder_name_that_is_not_utf_8_is_fine(self) -> None:
        self.series("007/pre/T1")
        folder = os.fsencode(self.root) + b"/S\xe4/p\xe4/T\xe4"
        try:
            os.makedirs(folder)
        except OSError:
            missing(self, "names must be UTF-8 here")
        place = self.root / os.fsdecode(b"S\xe4/p\xe4/T\xe4")
        write_series(place, study=uid("odd"), description="odd", files=1)
        with self.xnat() as server:
            ran = self.run_it(server, status=0, posts=2)
            self.assert_archived(server, "S__p_", list(digests(place).values()))
        self.assertNotIn("\udce4", ran.text)

    def test_a_label_of_255_bytes_goes_and_a_longer_one_is_refused(self) -> None:
        long = "s" * 127
        wanted = self.series(f"{long}/{long}/T1", files=1)
        with self.xnat() as server:
            self.run_it(server, status=0, posts=1)
            self.assert_archived(server, f"{long}_{long}", wanted)
            self.series(f"{long}/x{long}/T1", files=1)
            for options in ((), ("--dry-run",)):
                ran = self.run_it(server, *options, status=2, posts=0)
                self.assertIn(f"x{long}", ran.text)
                self.assertIn("255", ran.text)
            self.assertEqual(server.labels(), [f"{long}_{long}"])

    def test_folders_that_would_meet_in_one_label_stop_every_run_with_both_paths(self) -> None:
        pairs = [
            ("subjects without regard to case", "Sub1", "a", "sub1", "b"),
            ("subjects beyond ASCII, too", "\u00c4x1", "a", "\u00e4x1", "b"),
            ("cleaned subjects", "a b", "a", "a.b", "b"),
            ("subjects in two Unicode forms", "M\u00e9", "a", "Me\u0301", "b"),
            ("cleaned sessions of one subject", "007", "a b", "007", "a.b"),
            ("sessions of one subject in two forms", "007", "\u00e9", "007", "e\u0301"),
            ("sessions of two subjects", "a", "b_c", "a_b", "c"),
        ]
        with self.xnat() as server:
            calls = []
            for number, (_, *folders) in enumerate(pairs):
                root = self.folder / f"root{number}"
                for subject, session in (folders[:2], folders[2:], ("zzz", "b")):
                    write_series(root / subject / session / "T1", study=uid(subject, session),
                                 files=1)
                if len(list(root.rglob("T1"))) == 3:  # macOS makes one of some
                    calls += [(pairs[number], options, self.arguments(
                        server.url, *options, root=root))
                        for options in ((), ("--only", "zzz*"), ("--dry-run",))]
            for (pair, options, _), ran in zip(calls, self.run_many([call[-1] for call in calls])):
                with self.subTest(f"{pair[0]} {options}"):
                    self.assertEqual(ran.status, 2, ran.text)
                    whole = pair[1] == pair[3] or pair[0] == "sessions of two subjects"
                    for subject, session in (pair[1:3], pair[3:5]):
                        self.assertIn(f"{subject}/{session}" if whole else subject, ran.text)
            self.assert_nothing_there(server)

    @variation
    def test_names_that_differ_enough_do_not_meet(self) -> None:
        self.series("a/b/T1", files=1)
        self.series("a/b_c/T1", files=1)
        self.series("ab/c/T1", files=1)
        self.series("a_/b/T1", files=1)
        with self.xnat() as server:
            self.run_it(server, status=0, posts=4)
            self.assertEqual(server.labels(), ["a__b", "a_b", "a_b_c", "ab_c"])


class Levels(TreeTest):
    """ROOTDIR is not what it should be, or some levels are missing below it."""

    def refuse(self, server: Standin, root: str, *options: str) -> List[Ran]:
        """Run, and run dry: refused by name, nothing is sent, and nobody is shown to a folder
        above, for that would make wrong subjects."""
        place = self.root / root
        calls = [self.arguments(server.url, *options, *more, root=place)
                 for more in ((), ("--dry-run",))]
        ends = self.run_many(calls, preexec_fn=drop_root_rights)
        for ran in ends:
            self.assertEqual(ran.status, 2, ran.text)
            self.assertIn(str(place), ran.text)
            self.assertNotRegex(ran.text, re.escape(str(place.parent)) + r"(?![\w/-])")
        self.assert_nothing_there(server)
        return ends

    def refuse_with_layout(self, server: Standin, root: str, *options: str) -> List[Ran]:
        """Refused, and shown how a tree should look."""
        ends = self.refuse(server, root, *options)
        for ran in ends:
            for word in ("subject", "session", "series"):
                self.assertIn(word, ran.text)
        return ends

    def test_a_rootdir_that_is_missing_or_a_file_is_refused_by_name(self) -> None:
        self.series("007/pre/T1")
        (self.root / "file").write_bytes(b"x")
        with self.xnat() as server:
            self.refuse(server, "missing")
            self.refuse(server, "file")

    def test_a_rootdir_that_nobody_can_look_into_is_refused_by_name(self) -> None:
        self.need_held_root()
        self.series("closed/007/pre")
        self.hold(self.root / "closed")
        with self.xnat() as server:
            self.refuse(server, "closed")

    def test_a_rootdir_without_any_series_shows_the_layout(self) -> None:
        for path in ("empty", "subject/007", "session/007/pre", "junk/007/pre"):
            (self.root / path).mkdir(parents=True)
        (self.root / "junk/007/pre/notes.txt").write_text("x")
        with self.xnat() as server:
            for path in ("empty", "subject", "session", "junk"):
                with self.subTest(path):
                    self.refuse_with_layout(server, path)

    def no_session_level(self, server: Standin, root: str, *options: str) -> None:
        """Refused, the missing level by its name."""
        for ran in self.refuse_with_layout(server, root, *options):
            self.assert_told(ran, NO_SESSION_LEVEL)

    @variation
    def test_images_where_series_belong_name_the_missing_session_level(self) -> None:
        for subject in ("sub-001", "sub-002"):
            for number, name in enumerate(("001-localizer", "002-T1"), 1):
                write_series(self.root / "sourcedata" / subject / name, study=uid(subject),
                             number=number, files=2)
        with self.xnat() as server:
            self.no_session_level(server, "sourcedata")
            self.no_session_level(server, "sourcedata", "--only", "sub-001")
            self.no_session_level(server, "sourcedata", "--nested")

    def test_a_rootdir_one_two_or_three_levels_too_deep_is_refused(self) -> None:
        readme_tree(self.root, files=1)
        with self.xnat() as server:
            self.no_session_level(server, "007")
            for root in ("007/pre", "007/pre/T2_FLAIR_0012"):
                with self.subTest(root):
                    self.refuse_with_layout(server, root)

    @variation
    def test_one_subject_without_session_level_among_others_is_told(self) -> None:
        self.series("007/pre/T1")
        self.series("008/pre/T1")
        self.image("009/T1/IM1.dcm")
        with self.xnat() as server:
            ran = self.upload(server)
            self.assertIn(ran.status, (1, 2), ran.text)
            self.assert_told(ran, "009/T1")
            self.assertEqual(server.stored("009_T1"), [])

    def test_relative_rootdir_and_workdir_work_and_the_workdir_is_work_unless_given(self) -> None:
        wanted = self.series("007/pre/T1")
        with self.xnat() as server:
            arguments = [sys.executable, str(SCRIPT), server.url, "alice", "s3cret", "BRAIN",
                         "dicomdir"]
            for more in (["--workdir", "some where/work"], []):
                ran = self.run_command(arguments + more)
                self.assertEqual(ran.status, 0, ran.text)
            self.assert_archived(server, "007_pre", wanted)
            self.assertEqual(len(server.imports()), 1)
        for place in (self.folder / "some where/work", self.work):
            self.assertEqual(len(list(place.glob("*.csv"))), 1)


class TooHigh(TreeTest):
    """ROOTDIR looks one level too high: what stands for series are sessions."""

    def nested(self, path: str, *names: str) -> List[str]:
        """A series folder that holds these series, all of one study; the digests."""
        subject, session, _ = path.split("/")
        for name in names:
            write_series(self.root / path / name, files=1, **self.header(
                path, series=uid(subject, session, name)))
        return list(digests(self.root / path).values())

    def test_a_rootdir_one_level_too_high_is_refused_before_a_byte_leaves(self) -> None:
        for subject in ("A", "B"):
            self.nested(f"{subject}/007/pre", "T1", "T2")
            self.nested(f"{subject}/008/pre", "T1", "T2")
        self.series("good/pre/T1")
        slices = [(), ("--only", "good"), ("--only", "A/007"), ("--shard", "1/2"),
                  ("--shard", "2/2"), ("--dry-run",), ("-n", "--only", "good")]
        with self.xnat() as server:
            calls = [self.arguments(server.url, *options) for options in slices]
            for options, ran in zip(slices, self.run_many(calls)):
                with self.subTest(options):
                    self.assertEqual(ran.status, 2, ran.text)
                    self.assertIn("--nested", ran.text)
                    self.assertIn(str(self.root), ran.text)
            self.assert_nothing_there(server)
            # It is judged by what lies in files, so after the login.
            ran = self.run_it(server, status=3, password="wrong")
            self.assertNotIn("--nested", ran.text)

    def test_the_tree_of_the_readme_one_level_too_high_is_refused(self) -> None:
        readme_tree(self.root / "dicomdir", files=1)
        shutil.rmtree(str(self.root / "dicomdir/007/pre/T2_FLAIR_0012"))  # one series is left
        with self.xnat() as server:
            ran = self.run_it(server, status=2)
            self.assertIn("--nested", ran.text)
            self.assert_nothing_there(server)

    def test_nested_says_that_it_is_meant_so(self) -> None:
        wanted = {subject: self.nested(f"{subject}/007/pre", "T1", "T2", "deep/T3")
                  for subject in ("A", "B")}
        with self.xnat() as server:
            self.dry_run(server, "--nested", status=0)
            self.run_it(server, "--nested", status=0)
            for subject, digest in wanted.items():
                self.assert_archived(server, f"{subject}_007", digest)
                self.assertEqual(len(server.archive["BRAIN", f"{subject}_007"].scans), 3)

    @variation
    def test_xnats_own_download_goes_and_is_judged_the_same_in_every_slice(self) -> None:
        wanted = {}
        for subject in ("008", "009"):
            session = f"{subject}/{subject}_MR1"
            wanted[subject] = self.nested(f"{session}/scans", *(
                f"{scan}/resources/DICOM/files" for scan in ("5-T1", "6-T2", "7")))
            resources = self.root / session / "scans/5-T1/resources"
            (resources / "DICOM/scan_5_catalog.xml").write_text("<cat:DCMCatalog/>")
            (resources / "SNAPSHOTS/files").mkdir(parents=True)
            (resources / "SNAPSHOTS/files/t1.gif").write_bytes(b"GIF89a" + b"\0" * 200)
        with self.xnat() as server:
            self.run_it(server, "--only", "009", status=0)
            self.assertEqual(server.labels(), ["009_009_MR1"])
            self.dry_run(server, "--only", "008", status=0)
            self.run_it(server, status=0)
            for subject, digest in wanted.items():
                self.assert_archived(server, f"{subject}_{subject}_MR1", digest)
                self.assertEqual(len(server.archive["BRAIN", f"{subject}_{subject}_MR1"].scans), 3)
            self.run_it(server, status=0, posts=0)

    def test_xnats_own_download_beside_other_folders_goes_too(self) -> None:
        wanted = self.nested("008/008_MR1/scans", "5-T1/resources/DICOM/files",
                             "6-T2/resources/DICOM/files")
        other = self.series("007/pre/T1")
        with self.xnat() as server:
            self.run_it(server, status=0)
            self.assert_archived(server, "008_008_MR1", wanted)
            self.assert_archived(server, "007_pre", other)

    def test_series_that_keep_their_files_in_subfolders_go(self) -> None:
        wanted = {}
        for subject in ("006", "007", "008"):
            wanted[subject] = [self.image(f"{subject}/pre/{series}/{echo}/IM1", number)
                               for series in ("MAG", "PHASE")
                               for number, echo in enumerate(("echo1", "echo2"), 1)]
        wanted["008"] += self.nested("008/pre/BOTH", "T1", "T2")
        with self.xnat() as server:
            self.run_it(server, "--only", "008", status=0)
            self.run_it(server, status=0)
            for subject, digest in wanted.items():
                self.assert_archived(server, f"{subject}_pre", digest)

    @variation
    def test_several_series_in_one_folder_without_subfolders_go(self) -> None:
        wanted = {}
        for subject in ("007", "008"):
            wanted[subject] = [self.image(f"{subject}/pre/all/{name}.{number}", number,
                                          series=uid(subject, name), description=name)
                               for name in ("T1", "T2") for number in (1, 2)]
        with self.xnat() as server:
            self.run_it(server, status=0)
            for subject, digest in wanted.items():
                self.assert_archived(server, f"{subject}_pre", digest)
                self.assertEqual(len(server.archive["BRAIN", f"{subject}_pre"].scans), 2)


class Slices(TreeTest):
    """--only and --shard."""

    def setUp(self) -> None:
        super().setUp()
        for path in ("007/pre/T1", "007/post/T1", "008/pre/T1"):
            self.series(path, files=1)

    def test_the_shards_together_are_all_and_a_subject_stays_in_one(self) -> None:
        found: List[List[str]] = []
        with self.xnat() as server:
            for number in (1, 2, 3, 4):
                before = set(server.labels())
                self.run_it(server, "--shard", f"{number}/4", status=0)
                found.append(sorted(set(server.labels()) - before))
            self.assertEqual(sorted(sum(found, [])), ["007_post", "007_pre", "008_pre"])
            self.assertEqual(len(server.imports()), 3)
        for shard in found:
            self.assertEqual("007_pre" in shard, "007_post" in shard)
        self.assertGreaterEqual(found.count([]), 2)  # a shard with nothing in it is no failure

    def test_a_pattern_that_no_folder_has_is_a_mistake_and_named(self) -> None:
        (self.root / "009").mkdir()
        with self.xnat() as server:
            choices = [("--only", "zzz*"), ("--only", "007/zzz"), ("--only", "zzz", "--dry-run"),
                       ("--only", "PRE/007"), ("--only", "008", "--only", "zzz"),
                       ("--only", "zzz", "--again"), ("--only", "zzz", "--shard", "1/2")]
            calls = [self.arguments(server.url, *options) for options in choices]
            for options, ran in zip(choices, self.run_many(calls)):
                with self.subTest(options):
                    self.assertEqual(ran.status, 2, ran.text)
                    self.assertRegex(ran.err, r"--only (zzz\*?|007/zzz|PRE/007): .*subject/session")
            self.assert_nothing_there(server)

    @variation
    def test_a_slice_with_nothing_in_it_ends_with_0(self) -> None:
        (self.root / "009").mkdir()
        with self.xnat() as server:
            slices = [("--only", "007", "--shard", f"{number}/3") for number in (1, 2, 3)]
            slices += [("--only", "009"), ("--only", "008", "--config", self.config("T1"))]
            for options in slices:
                with self.subTest(options):
                    self.run_it(server, *options, status=0)
            self.assertEqual(server.labels(), ["007_post", "007_pre"])


class BeforeTheLogin(TreeTest):
    """Only names are looked at until the server has let us in."""

    def setUp(self) -> None:
        super().setUp()
        for subject in ("007", "008", "009"):
            self.series(f"{subject}/pre/T1", name=subject + "_{:02d}.dcm")
        (self.root / "007/pre/stray.dcm").write_bytes(self.content("007/pre/T2/IM1", 9))
        (self.root / "007/stray.zip").write_bytes(b"PK\3\4" + b"\0" * 100)

    def test_no_file_is_opened_before_the_login_is_accepted(self) -> None:
        with self.xnat() as server:
            ran = self.upload(server, environment=self.watched())
            self.assertEqual(len(server.archive), 3, ran.text)
            login = next(each for each in server.requests
                         if LOGIN in f"{each.method} {each.path}")
            self.assertEqual(login.status, 200)
            opened = self.opened()
            self.assertGreaterEqual(len({each.name for each in opened}), 6, opened)
            self.assertGreater(min(each.moment for each in opened), float(login.answered or 0))

    @variation
    def test_a_login_that_is_refused_leaves_every_file_closed(self) -> None:
        for options in ((), ("--dry-run",)):
            with self.xnat() as server:
                self.run_it(server, *options, environment=self.watched(), status=3,
                            password="wrong")
                self.assertEqual(self.opened(), [])


if __name__ == "__main__":
    unittest.main()
