"""What the person at the terminal sees, and the one who reads log and report next morning."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import unicodedata
import unittest
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple

import dicomUpload
from tests.dicom import dicom_file, readme_tree, uid, write_series
from tests.support import (EXCLUSIONS, WHOLE, UploadTest, cases, missing, shown_on, slow,
                           variation)
from tests.support import load_tests as load_tests  # several at a time
from tests.xnat_standin import User

IMPORT = "POST /data/services/import"
PATIENT = 60  # seconds; only a failure takes so long
ROW = re.compile(r"^(\S+) +(.+?)  +(would send|sent|left out|already there|no DICOM|copy|not sent)"
                 r"(?:  +(.*))?$", re.MULTILINE)

# The disk is full for a moment, in the middle of a line.
TORN = """
import resource
import dicomUpload
teller = dicomUpload.Teller()
settings = dicomUpload.read_options(sys.argv[1:])
dicomUpload.Workdir(settings.workdir)
teller.open(settings)
most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most[1]))
teller.log("no room for it" * 99)
resource.setrlimit(resource.RLIMIT_FSIZE, most)
teller.log("a line behind it")
series = dicomUpload.Series("T1", "")
teller.report(dicomUpload.Outcome(dicomUpload.Session("007", "pre"), [series]))
teller.check()
"""


def listed(text: str, *statuses: str) -> List[Tuple[str, str, str]]:
    """Label, series and what is said of it, of the series with these statuses."""
    return sorted((label, series, re.sub("; [0-9.]+ s", "", said))
                  for label, series, status, said in ROW.findall(text) if status in statuses)


def screen(stream: str) -> List[str]:
    """All states that the last line of a terminal went through."""
    states, line = [], ""
    for piece in re.split(r"(\r\x1b\[K|\r\n|\n)", stream):
        if re.match(r"[\r\n]", piece):
            line = ""
        else:
            line += piece
            states.append(line)
    return [state for state in states if state]


def columns(text: str) -> int:
    """How many columns a terminal needs for it."""
    text = re.sub(r"\x1b\[\d+m", "", text)
    return sum(0 if unicodedata.combining(each) else
               2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)


class Messy(UploadTest):
    def tree(self) -> None:
        """Something of everything, in seven sessions."""
        readme_tree(self.root, files=2)
        flair = self.root / "007/pre/T2_FLAIR_0012"
        (flair / "notes.txt").write_text("x")
        (flair / "IM0009.dcm").write_bytes(b"")
        shutil.copy(str(flair / "IM0001.dcm"), str(flair / "again.dcm"))
        (self.root / "007/pre/empty").mkdir()
        (self.root / "008/post/T1-MPRAGE_0011/lost.dcm").symlink_to("nowhere")
        write_series(self.root / "009/pr\u00e9 a" / "T1 b", study=uid("nine"))
        for number in (1, 2):
            write_series(self.root / "010/two" / f"T{number}", study=uid("ten", number), files=1)
        (self.root / "011/a/T1").mkdir(parents=True)
        with tarfile.open(str(self.root / "011/a/T1/all.tar.gz"), "w:gz") as tar:
            tar.add(str(flair / "IM0001.dcm"), "IM0001.dcm")
        (self.root / "007/stray.dcm").write_bytes(dicom_file(study=uid("s"), series=uid("t")))

    def many(self, count: int) -> None:
        """Sessions that all fail for the same reason."""
        for number in range(count):
            folder = self.root / f"S{number:03d}/pre/T1"
            write_series(folder, study=uid(number), files=1)
            (folder / f"IM{number}.dcm").symlink_to("/mnt/nowhere")

    def on_terminal(self, server: Any, width: int, *options: str, status: int = 0,
                    **environment: str) -> str:
        """All that a terminal of this width is shown."""
        master, slave = self.terminal(width)
        process = self.start(self.arguments(server.url, *options), {"TERM": "xterm", **environment},
                             stdout=slave, stderr=slave)
        os.close(slave)
        shown = shown_on(master)
        self.assertEqual(process.wait(PATIENT), status, shown)
        self.assertNotIn("Traceback", shown)
        return shown.replace("\r\n", "\n")


class DryRun(Messy):
    def test_it_says_what_the_real_run_then_says_and_writes_nothing_anywhere(self) -> None:
        self.tree()
        options = "--config", str(EXCLUSIONS), "--max-files", "3"
        with self.xnat() as server:
            dry = self.upload(server, "--dry-run", *options)
            self.assertEqual(dry.status, 1, dry.text)
            asked = [(each.method, each.path) for each in server.requests]
            self.assertFalse(self.work.exists())
            ran = self.upload(server, "-v", *options)
            self.assertEqual(ran.status, 1, ran.text)
        self.assertIn(("POST", "/data/JSESSION"), [(way, path.partition("?")[0])
                                                   for way, path in asked])
        for method, path in asked:
            self.assertTrue(method == "GET" or "/data/JSESSION" in path, (method, path))
        self.assertEqual(listed(dry.out, "would send"), listed(ran.out, "sent"))
        self.assertEqual(len(listed(ran.out, "sent")), 6)
        for status in ("left out", "no DICOM"):
            self.assertEqual(listed(dry.out, status), listed(ran.out, status))
        links = "008_post", "T1-MPRAGE_0011", "lost.dcm is a link to nothing"
        for text in (dry.out, ran.out):
            self.assertIn(links, listed(text, "not sent"))
        failed = [re.findall(r"(?ms)^Failed \(\d+\):\n.*?^$", text)[0]
                  for text in (dry.out, ran.out)]
        self.assertEqual(*failed)
        for words in ("damaged: IM0009.dcm is empty", "packed: all.tar.gz", "two studies in one",
                      "1 DICOM file where folders belong (stray.dcm)"):
            self.assertIn(words, failed[0])

    def test_it_shows_labels_reasons_copies_junk_room_and_a_command_that_does_it(self) -> None:
        self.tree()
        with self.xnat() as server:
            dry = self.upload(server, "-n", "--config", str(EXCLUSIONS))
            for words in ("009/pr\u00e9 a becomes session 009_pr__a of subject 009",
                          'left out       name contains "JJWANGS"', "no DICOM       is empty",
                          "1 copy: ", "1 not DICOM: notes.txt", "2 files, 3.2 kB",
                          '4 left out ("AAHEAD" 2, "JJWANGS" 2)', " free, up to ",
                          "Nothing was sent. To send: python3 "):
                self.assertIn(words, dry.out)
            only = self.upload(server, "-n", "--only", "009/*")
            self.assertEqual(only.status, 1, only.text)  # something is missing
            command = only.out.rpartition("To send: ")[2].strip()
            self.assertNotRegex(command, r"s3cret| (-n|--dry-run)\b")
            ran = self.run_command(["sh", "-c", command.replace("python3", sys.executable, 1)],
                                   {"XNAT_PASS": "s3cret"})
            self.assertEqual(ran.status, 0, ran.text)
            self.assertEqual(len(server.stored("009_pr__a")), 3)

    @variation
    def test_it_is_the_proof_of_what_is_there_whatever_a_ledger_says(self) -> None:
        readme_tree(self.root, files=2)
        with self.xnat() as server:
            self.assertEqual(self.upload(server).status, 0)
            shutil.rmtree(self.work)
            write_series(self.root / "007/pre/T2_FLAIR_0012", study=uid("007", "pre"), number=12,
                         files=3)
            dry = self.upload(server, "-n")
            for options in ((), ("-q",)):
                self.assertEqual(self.upload(server).status, 0)
                proof = self.upload(server, "-n", *options)
                self.assertEqual(proof.status, 0, proof.text)
                self.assertTrue(proof.out.endswith("\nAll is there.\n"), proof.out)
            (server.archive["BRAIN", "007_pre"].scans.clear())
            gone = self.upload(server, "-nq", "--only", "007")
        self.assertEqual((dry.status, gone.status), (1, 1), "something is missing")
        self.assertRegex(gone.out, r"(?m)^2 sessions: .*\b1 not sent\b")
        self.assertRegex(gone.out, r"(?s)007_pre .*not there any more.* add .*--only 007/pre"
                                   r".*To send: python3 .* -q --only 007\n$")
        self.assertEqual(len(listed(dry.out, "already there")), 9)
        self.assertEqual(listed(dry.out, "would send"), [
            ("007_pre", "T2_FLAIR_0012", "1 file, 1.6 kB; 2 files already there")])
        self.assertRegex(dry.out, r"(?m)^4 sessions: 3 already there, 1 would be sent\.$")


class Screen(Messy):
    def test_lines_break_between_words_and_nothing_is_wider_than_the_terminal(self) -> None:
        self.tree()
        with self.xnat() as server:
            for width in (40, 80, 200):
                with self.subTest(width):
                    shown = self.on_terminal(server, width, "-n", status=1)
                    lines = [states[-1] for states in (line.split("\r\x1b[K") for line in
                                                       shown.split("\n"))]
                    for line in lines:
                        if "python3 " not in line:  # a command is there to be copied
                            words = re.sub(r"\x1b\[\d+m", "", line).split()
                            fits = columns(line) <= width or len(words) == 1
                            self.assertTrue(fits, line)
                    heading = next(at for at, line in enumerate(lines) if "Failed" in line)
                    after = lines[heading + 1:lines.index("", heading)]
                    self.assertTrue(all(line.startswith("  ") for line in after), after)

    @variation
    def test_status_words_have_colours_on_a_terminal_that_can_and_wants_them(self) -> None:
        self.tree()
        with self.xnat() as server:
            shown = self.on_terminal(server, 100, status=1)
            for words in ("\x1b[32marchived\x1b[0m, ", "\x1b[31mnot sent\x1b[0m: two studies",
                          "\x1b[33mheld back\x1b[0m in the prearchive",
                          "\x1b[31mnot sent\x1b[0m", "\x1b[31mdamaged\x1b[0m: IM0009.dcm",
                          "\x1b[31mFailed\x1b[0m (5):"):
                self.assertIn(words, shown)
            plain = self.on_terminal(server, 100, status=1, NO_COLOR="1")
            self.assertNotRegex(plain, r"\x1b\[\d+m")

    def test_a_terminal_that_cannot_and_a_pipe_get_no_control_characters(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.assertNotRegex(self.on_terminal(server, 100, status=1, TERM="dumb"), r"[\r\x1b]")
            piped = self.upload(server, environment={"TERM": "xterm"})
            self.assertNotRegex(piped.text, r"[\r\x1b]| of \d sessions  ")

    def test_a_rerun_on_a_terminal_folds_what_is_there(self) -> None:
        readme_tree(self.root, files=1)
        with self.xnat() as server:
            self.assertEqual(self.upload(server).status, 0)
            shown = self.on_terminal(server, 80)
            self.assertNotIn("007_pre ", shown.replace("\r\x1b[K", "\n").partition("reading")[0])
            self.assertIn("\n4 sessions: 4 already there.\n10 series: 10 already there.\n", shown)
            self.assertIn("\x1b[32mAll is there\x1b[0m.", shown)
            self.assertIn("007_pre   already there, 2 files\n", self.upload(server).out)

    @variation
    def test_options_to_be_copied_are_never_broken_into_two_lines(self) -> None:
        """Half of them, pasted, would send the whole tree."""
        readme_tree(self.root, files=1)
        with self.xnat() as server:
            self.assertEqual(self.upload(server).status, 0)
            shutil.rmtree(str(self.root / "007/pre"))
            for width in 40, 72, 80:
                shown = self.on_terminal(server, width, status=1)
                self.assertRegex(shown, "--overwrite-files --again --only 007/pre once\n")

    def test_forty_failures_of_one_kind_are_read_at_a_glance_and_the_verdict_stands_last(
            self) -> None:
        self.many(40)
        with self.xnat() as server:
            shown = self.on_terminal(server, 80, status=1, NO_COLOR="1")
        last = shown.split("\n")[-15:]
        self.assertIn("Failed (40):", last)
        at = last.index("Failed (40):")
        self.assertEqual(last[at + 1:at + 5], [
            "  S000_pre T1: IM0.dcm is a link to nothing",
            "      and 39 more like it: S001_pre T1, S002_pre T1, S003_pre T1 and 36 more",
            "      fix or remove it, then run again", ""])
        self.assertIn("40 sessions: 40 not sent.", last)
        self.assertRegex("\n".join(last), r"\nFirst fix the 40 above, then run the same command ")
        rows = self.report()
        self.assertEqual(len(rows), 40)
        self.assertTrue(all("is a link to nothing" in row["message"] for row in rows))


class Progress(Messy):
    def watch(self, width: int, *options: str) -> str:
        with self.xnat(rate=12_000_000) as server:
            return self.on_terminal(server, width, *options)

    def long_series(self, name: str) -> None:
        """One part of 21 MB: far more than the kernel keeps for a line that is slow."""
        write_series(self.root / "007/pre" / name, study=uid("p"), files=40, rows=512, columns=512)

    @slow
    def test_it_moves_within_one_series_and_never_wraps(self) -> None:
        name = "\u6d88\u5316\u5668\u5185\u79d1 T1 \u00e4 " + "x" * 120
        self.long_series(name)
        for width in (40, 80, 200):
            with self.subTest(width):
                shown = self.watch(width, "--compression", "0", "--again", "--overwrite-files")
                moving = [state for state in screen(shown) if state.startswith("[")]
                self.assertLess(max(map(columns, moving)), min(width, 80))
                self.assertNotRegex(shown, r"\[\d+ of 1 session[^\r\n]*\n")  # each is erased
                if width == 80:
                    amounts = set(re.findall(r"\[0 of 1 session  ([\d.]+ MB)", "\n".join(moving)))
                    self.assertGreaterEqual(len(amounts), 3, moving)
                    self.assertRegex("\n".join(moving), r"MB/s  about \d+ s left\]  007_pre ")

    @variation
    def test_it_is_drawn_ten_times_a_second_at_most(self) -> None:
        for number in range(150):
            (self.root / f"{number:03}/pre/T1").mkdir(parents=True)
        # A share on which each folder takes a moment: the walk moves on 200 times a second.
        slow = self.folder / "site"
        slow.mkdir()
        (slow / "sitecustomize.py").write_text(
            "import sys, time\nsys.addaudithook(lambda event, _: event == 'os.scandir' and "
            "time.sleep(0.005))\n")
        began = time.monotonic()
        with self.xnat() as server:
            shown = self.on_terminal(server, 80, "-n", PYTHONPATH=str(slow))
        took = time.monotonic() - began
        drawn = [state for state in screen(shown) if state.startswith("[")]
        self.assertIn("[walking: ", drawn[0])
        self.assertGreater(len(drawn), 5)
        self.assertLessEqual(len(drawn), 10 * took + 1)

    @slow
    def test_a_long_upload_shows_life_in_a_cron_log_and_a_quiet_one_does_not(self) -> None:
        write_series(self.root / "007/pre/T1", study=uid("p"))
        # The real program, only with less patience than a minute.
        program = ("import sys, dicomUpload; dicomUpload.Teller.HEARTBEAT = 0.3; "
                   "sys.exit(dicomUpload.main())")
        for options, least, most in (((), 2, 12), (("-q", "--again", "--overwrite-files"), 0, 0)):
            with self.subTest(options), self.xnat() as server:
                server.fail("stall", IMPORT, seconds=2)
                ran = self.run_command(self.altered(program, server.url, *options))
                self.assertEqual(ran.status, 0, ran.text)
                lines = re.findall(r"(?m)^dicomUpload: still at work: \[0 of 1 session  .*007_pre "
                                   "T1$", ran.err)
                self.assertTrue(least <= len(lines) <= most, ran.err)


class Summary(Messy):
    def test_it_counts_everything_and_says_the_same_in_the_log(self) -> None:
        readme_tree(self.root)
        lost = self.root / "007/pre/T2_FLAIR_0012/lost"
        lost.symlink_to("nowhere")
        with self.xnat() as server:
            ran = self.upload(server, "--config", str(EXCLUSIONS))
            self.assertEqual(ran.status, 1, ran.text)
            log = self.log()
            quiet = self.upload(server, "--config", str(EXCLUSIONS), "-q")
            lost.unlink()
            again = self.upload(server, "--config", str(EXCLUSIONS))
            self.assertEqual(again.status, 0, again.text)
        self.assertIn("\nFailed (1):\n  007_pre T2_FLAIR_0012: lost is a link to nothing\n"
                      "      fix or remove it, then run again\n\n"
                      "4 sessions: 3 archived, 1 held back in the prearchive.\n"
                      "10 series: 5 sent, 4 left out, 1 not sent.\n20 files, 32 kB in ", ran.out)
        self.assertRegex(ran.out, r"\nFirst fix the 1 above, then run the same command again to "
                                  r"finish: python3 .*\n$")
        for line in ran.out.splitlines():
            self.assertIn(line, log)
        self.assertIn("\n4 sessions: 3 already there, 1 archived.\n"
                      "10 series: 5 already there, 4 left out, 1 sent.\n4 files, ", again.out)
        self.assertTrue(again.out.endswith("\nAll is there.\n"), again.out)
        self.assertRegex(quiet.out, r"^007_pre +T2_FLAIR_0012 +not sent .*\n007_pre +held back.*\n"
                                    r"Failed \(1\):\n")
        self.assertNotRegex(quiet.out, r"(?m)^00\d_\S+ .*(archived|already there|left out)")

    def test_what_heals_by_itself_asks_for_no_more_than_another_run(self) -> None:
        write_series(self.root / "007/pre/T1", study=uid("p"))
        with self.xnat() as server:
            server.fail("status", IMPORT, status=503, times=None)
            ran = self.upload(server, "--retries", "0")
        self.assertNotEqual(ran.status, 0)
        self.assertRegex(ran.out, r"\nRun the same command again to finish: python3 .*\n$")

    def test_what_must_be_fixed_is_counted_and_what_heals_is_not(self) -> None:
        self.many(1)
        write_series(self.root / "S001/pre/T1", study=uid("p"))
        with self.xnat() as server:
            server.fail("status", IMPORT, status=503, times=None)
            ran = self.upload(server, "--retries", "0")
        self.assertEqual(ran.status, 1, ran.text)
        self.assertRegex(ran.out, r"\nFailed \(2\):\n  S000_pre T1: IM0.dcm is a link to nothing\n")
        self.assertRegex(ran.out, r"\nFirst fix 1 of the 2 above, then run the same command again ")

    def test_after_a_stop_the_failures_come_first_and_one_line_for_the_rest(self) -> None:
        self.many(1)
        for number in range(1, 40):
            write_series(self.root / f"S{number:03d}/pre/T1", study=uid(number), files=1)
        with self.xnat() as server:
            server.fail("reset before", IMPORT, skip=4, times=None)
            ran = self.upload(server, "--procs", "1", "--retries", "0")
        self.assertEqual(ran.status, 3, ran.text)
        self.assertRegex(ran.out, r"\nFailed \(\d+\):\n  S000_pre T1: IM0.dcm is a link to ")
        self.assertEqual(len(re.findall("(?m)^Not finished: .* and [0-9]+ more$", ran.out)), 1)
        rows = self.report()  # complete after a stop too, and in the order of the folders
        self.assertEqual([row["subject"] for row in rows], [f"S{n:03d}" for n in range(40)])
        self.assertIn("the run was stopped", rows[-1]["message"])

    def test_verbose_shows_series_commands_answers_and_where_to_look(self) -> None:
        readme_tree(self.root)
        with self.xnat() as server:
            ran = self.upload(server, "-v", "--only", "007/pre")
        self.assertEqual(ran.status, 0, ran.text)
        self.assertRegex(ran.err, r"curl \d+: --disable --config - .*/data/services/import")
        self.assertRegex(ran.err, r"curl \d+: /data/services/import\?.*: exit 0 +HTTP 200 "
                                  "/data/prearchive/projects/BRAIN/")
        self.assertNotIn("curl", ran.out)
        self.assertEqual(len(listed(ran.out, "sent")), 2)
        self.assertRegex(ran.out, r"(?m)^007_pre  archived, 8 files verified  "
                                  r"http://\S+/experiments/007_pre\?format=html$")


class Report(Messy):
    def test_a_row_for_each_series_in_the_order_of_the_folders_with_what_became_of_it(self) -> None:
        self.tree()
        with self.xnat() as server:
            self.assertEqual(self.upload(server, "--config", str(EXCLUSIONS)).status, 1)
            url = server.url
        rows = self.report()
        path = [(row["subject"], row["session"], row["series"]) for row in rows]
        self.assertEqual(path, sorted(path))
        self.assertEqual(len(rows), 15)
        found = {row["label"] + " " + row["series"]: row for row in rows}
        flair = found["007_pre T2_FLAIR_0012"]
        self.assertEqual([flair[key] for key in ("status", "files", "copies", "damaged files",
                                                 "not-DICOM files", "tries", "HTTP status")],
                         ["sent", "2", "1", "1", "1", "1", "200"])
        self.assertEqual(flair["open in a browser"], f"{url}/data/projects/BRAIN/subjects/007/"
                                                     "experiments/007_pre?format=html")
        self.assertEqual(flair["server's address"],
                         "/data/projects/BRAIN/subjects/007/experiments/007_pre")
        held = found["008_post T1-MPRAGE_0011"]
        self.assertIn("fix or remove it", held["message"])
        self.assertEqual(held["status"], "not sent")
        for name, status in (("007_post JJWANGS_PCASL_0006", "left out"),
                             ("007_pre empty", "no DICOM"), ("010_two T1", "not sent")):
            self.assertEqual(found[name]["status"], status)
        mode = next(self.work.glob("*.csv")).stat().st_mode
        self.assertEqual(mode & 0o777, 0o600)

    def test_it_opens_in_a_spreadsheet_without_surprises(self) -> None:
        names = ["=1+1", "+2", "-3", "@x", "a,b", 'q"q', "\u00fc\u6d88"]
        for number, name in enumerate(names):
            write_series(self.root / "007/pre" / name, study=uid("r"), number=number, files=1)
        with self.xnat() as server:
            ran = self.upload(server)
            self.assertEqual(ran.status, 0, ran.text)
        rows = self.report()
        self.assertEqual(sorted(row["series"] for row in rows),
                         sorted("'" + name if name[0] in "=+-@" else name for name in names))
        text = next(self.work.glob("*.csv")).read_bytes()
        self.assertEqual(len(text.decode("utf-8").splitlines()), len(names) + 1)

    def test_once_a_line_was_torn_by_a_full_disk_no_line_comes_behind_it(self) -> None:
        self.root.mkdir()
        ran = self.start(self.altered(TORN, "http://xnat.example.org")).communicate(timeout=PATIENT)
        self.assertRegex("".join(ran), r"log or report \(.*\): cannot be written \(No space.*"
                         "make room")
        self.assertEqual(len(self.log()), 1000)
        self.assertRegex(self.log(), r"\n.* no room for it.*\Z")
        self.assertEqual(next(self.work.glob("*.csv")).read_text().count("\n"), 1)


class SmallWords(unittest.TestCase):
    def test_failures_of_one_kind_are_known_by_their_words(self) -> None:
        def kinds(*troubles: Tuple[str, str]) -> int:
            return len(dicomUpload.alike([("", dicomUpload.Trouble(*each)) for each in troubles]))

        for one, other in (("a.dcm is a link to nothing", "b is a link to nothing"),
                           ("damaged: a is empty", "damaged: IM2 ends within its data, c is empty"),
                           ("x cannot be read (Permission denied)", "y/z cannot be read (Other)"),
                           ("XNAT has 3 of its 5 files", "XNAT has 1 of its 1 file"),
                           ("no (HTTP 400, a: IM1.dcm)", "no (HTTP 400, a: IM2.dcm)")):
            self.assertEqual(kinds((one, "x"), (other, "x")), 1, one)
        for one, other in (("a is a link to nothing", "a is unfinished, by its name"),
                           ("no (HTTP 400, disk full)", "no (HTTP 400, not DICOM)")):
            self.assertEqual(kinds((one, "x"), (other, "x")), 2, one)
        self.assertEqual(kinds(("a", "add --only 007/pre"), ("a", "add --only 008/pre")), 1)

    def test_sizes_times_and_numbers_are_for_people(self) -> None:
        for given, words in ((0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"),
                             (36e6, "36 MB"), (1234e9, "1,234.0 GB")):
            self.assertEqual(dicomUpload.size(given), words)
        for given, words in ((0.9, "0 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")):
            self.assertEqual(dicomUpload.duration(given), words)
        self.assertEqual([dicomUpload.plural(1, "file"), dicomUpload.plural(1200, "file"),
                          dicomUpload.plural(2, "copy", "copies")],
                         ["1 file", "1,200 files", "2 copies"])
        self.assertEqual(dicomUpload.printable("a\x1b\n\udcff\u00e4"), "a\\x1b\\n\\udcff\u00e4")
        self.assertEqual(dicomUpload.wrapped("  one two three", 10),
                         ["  one two", "      three"])


class Secrets(UploadTest):
    SECRET = "hunter2-\u00e4-topsecret"

    def processes(self) -> Dict[str, bytes]:
        """Arguments and environment of all processes of this test, with what kind it is."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                command = (place / "cmdline").read_bytes()  # first: exec may come in between
                environment = (place / "environ").read_bytes()
                if os.fsencode(f"HOME={self.home}\0") in environment:
                    found[place.name] = command + b"\0ENVIRONMENT\0" + environment
            except OSError:  # it has ended
                continue
        return found

    def sample(self, over: threading.Event, seen: Set[bytes]) -> None:
        while not over.is_set():
            seen.update(self.processes().values())

    def run_sampled(self, arguments: List[str], **environment: str) -> Tuple[Set[bytes], str]:
        """Run while every process of it is looked at; what was seen, and all text it left."""
        seen: Set[bytes] = set()
        over = threading.Event()
        watcher = threading.Thread(target=self.sample, args=(over, seen))
        watcher.start()
        try:
            ran = self.run_command(arguments, environment, afresh=True)
        finally:
            over.set()
            watcher.join()
        self.assertEqual(ran.status, 0, ran.text)
        files = "".join(path.read_text("utf-8", "replace") for path in self.work.rglob("*")
                        if path.is_file())
        return seen, ran.text + files

    def forms(self) -> List[str]:
        """The secret as it might show."""
        pair = base64.b64encode(f"alice:{self.SECRET}".encode()).decode()
        return [self.SECRET, "topsecret", pair, json.dumps(self.SECRET).strip('"')]

    def test_it_is_in_no_process_but_where_the_user_put_it(self) -> None:
        if not os.path.isdir("/proc/self"):
            missing(self, "looks at processes in /proc")
        readme_tree(self.root)
        rows = (("variable", "-", {"XNAT_PASS": self.SECRET}), ("netrc", "-", {}),
                ("argument", self.SECRET, {}))
        for title, given, environment in rows[0 if WHOLE else 2:]:
            with self.subTest(title), self.xnat(
                    users=[User("alice", self.SECRET)]) as server:
                netrc = self.home / ".netrc"
                if title == "netrc":
                    netrc.touch(0o600)
                    netrc.write_text(f"machine 127.0.0.1 login alice password {self.SECRET}\n")
                seen, text = self.run_sampled(
                    self.arguments(server.url, "--again", "-v", password=given), **environment)
                kinds = {each.split(b"\0")[0] for each in seen}
                self.assertIn(b"curl", kinds)
                mine = {each for each in seen if self.SECRET.encode() in each}
                # One that the kernel is only about to start has no arguments yet.
                own = {each for each in mine if os.fsencode(sys.executable) in each
                       or each.startswith(b"\0ENVIRONMENT")}
                self.assertEqual(mine - own, set())
                self.assertEqual(bool(own), title != "netrc")
                for form in self.forms():
                    self.assertNotIn(form, text)
                netrc.unlink() if netrc.exists() else None

    def test_a_forced_traceback_does_not_hold_it(self) -> None:
        write_series(self.root / "007/pre/T1", study=uid("t"))
        for where in cases("Curl._run", "Xnat.log_in", "Upload.one_session", "walk",
                           "find_password"):
            program = ("import sys, dicomUpload\n"
                       "def boom(*given, **more): raise KeyError(given, more)\n"
                       f"dicomUpload.{where} = boom\nsys.exit(dicomUpload.main())")
            with self.subTest(where), self.xnat(users=[User("alice", self.SECRET)]) as server:
                process = self.start(self.altered(program, server.url, password="-"),
                                     {"XNAT_PASS": self.SECRET})
                out, err = process.communicate(timeout=PATIENT)
                self.assertIn("KeyError", err)
                for form in self.forms():
                    self.assertNotIn(form, out + err)

    def test_one_on_the_command_line_works_and_earns_one_line_of_advice(self) -> None:
        write_series(self.root / "007/pre/T1", study=uid("t"))
        with self.xnat() as server:
            ran = self.upload(server)
            self.assertEqual(ran.status, 0, ran.text)
            advice = re.findall(r"(?m)^dicomUpload: PASS: .*XNAT_PASS.*$", ran.err)
            self.assertEqual(len(advice), 1, ran.err)
            quiet = self.upload(server, password="-", environment={"XNAT_PASS": "s3cret"})
            self.assertNotIn("PASS", quiet.text)


class Help(UploadTest):
    def ask(self, *options: str) -> "subprocess.CompletedProcess[str]":
        arguments = self.arguments("x")[:2] + list(options)
        ran = self.run_command(arguments, {"COLUMNS": "80"})
        self.assertEqual((ran.status, ran.err), (0, ""))
        return subprocess.CompletedProcess(arguments, 0, ran.out)

    def test_it_is_grouped_and_has_defaults_units_examples_and_statuses(self) -> None:
        text = self.ask("--help").stdout
        for words in ("what goes where:", "what to send:", "how to send:", "on the server:",
                      "what to show:", "examples:", "exit status:", "(4)", "(500)", "SECONDS",
                      "--shard K/N", "--review", "--nested",
                      "bytes per second", "-q, --quiet", "-v, --verbose", "-n, --dry-run"):
            self.assertIn(words, text)
        self.assertEqual(text.count("\n  dicomUpload.py https://"), 3)

    def test_version_is_one_line(self) -> None:
        self.assertRegex(self.ask("--version").stdout, r"^dicomUpload \d+\.\d+\n$")
