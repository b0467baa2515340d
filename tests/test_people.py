"""What the person at the terminal sees, and the one who reads the log next morning."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple

from tests.dicom import readme_tree, uid, write_series
from tests.support import EXCLUSIONS, ROOT, UploadTest, missing, shown_on
from tests.support import load_tests as load_tests  # several at a time
from tests.xnat_standin import User

IMPORT = "POST /data/services/import"
PATIENT = 20  # seconds; only a failure takes so long
LINE = re.compile(r"^(\S+) +(.+?)  +(would send|sent|left out|already there|no DICOM|not sent) +"
                  r"(?:([\d,]+) files?)?", re.MULTILINE)


def listed(text: str, status: str) -> List[Tuple[str, str, str]]:
    """Label, series and number of files of the lines with this status."""
    return sorted((label, series, files) for label, series, found, files in LINE.findall(text)
                  if found == status)


def screen(stream: str) -> List[str]:
    """All states that the last line of a terminal went through; wrapping would need more."""
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
    return sum(0 if unicodedata.combining(each) else
               2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)


class DryRun(UploadTest):
    def tree(self) -> None:
        """Something of everything."""
        readme_tree(self.root)
        (self.root / "007/pre/T2_FLAIR_0012/notes.txt").write_text("x")
        (self.root / "007/pre/empty").mkdir()
        write_series(self.root / "009/pr\u00e9 a" / "T1 b", study=uid("nine"), files=5)

    def test_its_list_is_what_a_real_run_then_sends(self) -> None:
        self.tree()
        with self.xnat() as server:
            options = "--config", str(EXCLUSIONS), "--max-files", "3"
            dry = self.upload(server, "--dry-run", *options)
            self.assertEqual((dry.status, server.requests), (0, []), dry.text)
            self.assertFalse(self.work.exists())
            ran = self.upload(server, *options)
            self.assertEqual(ran.status, 0, ran.text)
        self.assertEqual(len(listed(dry.out, "would send")), 7)
        self.assertEqual(listed(dry.out, "would send"), listed(ran.out, "sent"))
        for status in ("left out", "no DICOM"):
            self.assertEqual(listed(dry.out, status), listed(ran.out, status))

    def test_what_the_ledger_has_is_already_there_and_the_rest_is_what_the_next_run_sends(
            self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("error page", IMPORT, skip=3, status=400, text="no", times=2)
            first = self.upload(server, "--procs", "1")
            self.assertEqual(first.status, 1, first.text)
            dry = self.upload(server, "--dry-run", "--procs", "1")
            again = self.upload(server, "--procs", "1")
            self.assertEqual(again.status, 0, again.text)
        self.assertEqual(listed(dry.out, "would send"), listed(again.out, "sent"))
        self.assertEqual(len(listed(dry.out, "would send")), 2)
        self.assertEqual(listed(dry.out, "already there"), listed(again.out, "already there"))

    def test_it_shows_labels_reasons_junk_room_and_the_command(self) -> None:
        self.tree()
        with self.xnat() as server:
            dry = self.upload(server, "-n", "--config", str(EXCLUSIONS))
        for words in ("007/pre goes to subject 007, session 007_pre",
                      "009/pr\u00e9 a goes to subject 009, session 009_pr__a",
                      'left out      name contains "JJWANGS"', "no DICOM      is empty",
                      "4 files    6.5 kB  (1 not DICOM)", "not DICOM: ", "notes.txt",
                      "3 subjects, 5 sessions: 7 series to send (29 files, ", " 4 left out",
                      " free, up to ", "Nothing was sent and nobody contacted. To send: python3 "):
            self.assertIn(words, dry.out)
        command = dry.out.rpartition("To send: ")[2]
        self.assertNotIn("s3cret", command)
        self.assertNotRegex(command, r" (-n|--dry-run)\b")

    def test_the_command_that_it_shows_does_it(self) -> None:
        self.tree()
        with self.xnat() as server:
            dry = self.upload(server, "-n", "--only", "009/*")
            command = dry.out.rpartition("To send: ")[2].strip()
            ran = self.run_command(["sh", "-c", command.replace("python3", sys.executable, 1)],
                                   {"XNAT_PASS": "s3cret"})
            self.assertEqual(ran.status, 0, ran.text)
            self.assertEqual(len(server.stored("009_pr__a")), 5)

    def test_a_series_that_cannot_be_sent_is_told_and_its_status_is_1(self) -> None:
        self.tree()
        (self.root / "007/pre/T2_FLAIR_0012/lost").symlink_to("nowhere")
        with self.xnat() as server:
            dry = self.upload(server, "-n")
        self.assertEqual(dry.status, 1, dry.text)
        self.assertRegex(dry.out, r"(?m)^Would not be sent: 007_pre T2_FLAIR_0012: lost is a ")


class Progress(UploadTest):
    def watch(self, width: int, *options: str, **more: Any) -> str:
        """What a terminal of this width shows during an upload of a second or two."""
        master, slave = self.terminal(width)
        with self.xnat(rate=12_000_000) as server:
            process = self.start(self.arguments(server.url, *options), {"TERM": "xterm"},
                                 stdout=slave, stderr=slave, **more)
            os.close(slave)
            shown = shown_on(master)
            self.assertEqual(process.wait(PATIENT), 0, shown)
        return shown

    def long_series(self, name: str) -> None:
        """One part of 21 MB: far more than the kernel keeps for a line that is slow."""
        write_series(self.root / "007/pre" / name, study=uid("p"), files=40, rows=512, columns=512)

    def test_it_moves_within_one_part_of_one_series(self) -> None:
        self.long_series("long")
        shown = self.watch(80, "--compression", "0")
        moving = [state for state in screen(shown) if state.startswith("[0 of 1 series")]
        amounts = {re.findall(r"series  (.*?) of 21 MB", state)[0] for state in moving}
        self.assertGreaterEqual(len(amounts - {"0 bytes"}), 3, shown)
        self.assertRegex(shown, r" MB/s  \d s left\]  007_pre long")

    def test_it_fits_into_40_80_and_200_columns_and_never_wraps(self) -> None:
        name = "\u6d88\u5316\u5668\u5185\u79d1 T1 \u00e4 " + "x" * 120
        self.long_series(name)
        for width in (40, 80, 200):
            with self.subTest(width):
                shown = self.watch(width, "--compression", "0", "--again")
                moving = [state for state in screen(shown) if state.startswith("[")]
                self.assertTrue(moving)
                self.assertLess(max(map(columns, moving)), width)
                if width == 200:
                    self.assertIn("\u5668\u5185\u79d1 T1", max(moving, key=columns))

    def test_it_is_drawn_ten_times_a_second_at_most_and_gone_before_other_text(self) -> None:
        for number in range(12):
            write_series(self.root / "007/pre" / ("S%02d" % number), study=uid("p"),
                         number=number, files=1, rows=256, columns=256)
        started = time.monotonic()
        shown = self.watch(80)
        seconds = time.monotonic() - started
        self.assertLessEqual(len(re.findall(r"\[\d+ of 12 series", shown)), 10 * seconds)
        self.assertNotRegex(shown, r"\[\d+ of 12 series[^\r\n]*\n")  # each is erased, none stays

    def test_without_a_terminal_there_are_plain_lines(self) -> None:
        write_series(self.root / "007/pre/T1", study=uid("p"))
        with self.xnat() as server:
            ran = self.upload(server)
        self.assertNotRegex(ran.text, r"[\r\x1b]|of 1 series  ")

    def test_a_dumb_terminal_gets_no_control_characters(self) -> None:
        write_series(self.root / "007/pre/T1", study=uid("p"))
        master, slave = self.terminal(80)
        with self.xnat() as server:
            process = self.start(self.arguments(server.url), {"TERM": "dumb"}, stdout=slave,
                                 stderr=slave)
            os.close(slave)
            shown = shown_on(master).replace("\r\n", "\n")
            self.assertEqual(process.wait(PATIENT), 0, shown)
        self.assertIn("All is there.", shown)
        self.assertNotRegex(shown, r"[\r\x1b]")

    def test_a_long_upload_shows_life_in_a_cron_log(self) -> None:
        write_series(self.root / "007/pre/T1", study=uid("p"))
        # The real program, only with less patience than a minute.
        program = ("import sys, dicomUpload; dicomUpload.Teller.HEARTBEAT = 0.3; "
                   "sys.exit(dicomUpload.main())")
        with self.xnat() as server:
            beats = server.fail("stall", IMPORT, seconds=2)
            arguments = self.arguments(server.url)
            ran = self.run_command([arguments[0], "-c", program, *arguments[2:]],
                                   {"PYTHONPATH": str(ROOT)})
            self.assertEqual(ran.status, 0, ran.text)
            del beats
        lines = re.findall(r"(?m)^dicomUpload: still at work: \[0 of 1 series .*007_pre T1$",
                           ran.err)
        self.assertTrue(2 <= len(lines) <= 8, ran.err)
        self.assertIn("still at work", self.log())


class Summary(UploadTest):
    def test_it_counts_everything_and_says_the_same_in_the_log(self) -> None:
        readme_tree(self.root)
        (self.root / "007/pre/T2_FLAIR_0012/lost").symlink_to("nowhere")
        with self.xnat() as server:
            ran = self.upload(server, "--config", str(EXCLUSIONS))
            self.assertEqual(ran.status, 1, ran.text)
            (self.root / "007/pre/T2_FLAIR_0012/lost").unlink()
            again = self.upload(server, "--config", str(EXCLUSIONS))
            self.assertEqual(again.status, 0, again.text)
        self.assertIn("\n3 of 4 sessions archived and verified; 1 held back.\n"
                      "Series: 5 sent, 4 left out, 1 failed.\n20 files, 32 kB (", ran.out)
        self.assertRegex(ran.out, r"(?m)^Not there: 007_pre T2_FLAIR_0012: lost is a link to "
                                  r"nothing: mend or remove it, then run again$")
        self.assertRegex(ran.out, r"(?m)^Run the same command again to finish: python3 ")
        self.assertIn("\n4 of 4 sessions archived and verified (3 of them by an earlier run).\n"
                      "Series: 1 sent, 5 already there, 4 left out.\n4 files, ", again.out)
        log = self.log()
        for line in ran.out.splitlines():
            self.assertIn(line, log)

    def test_quiet_shows_what_failed_and_the_summary_only(self) -> None:
        readme_tree(self.root)
        (self.root / "007/pre/T2_FLAIR_0012/lost").symlink_to("nowhere")
        with self.xnat() as server:
            ran = self.upload(server, "-q", "--config", str(EXCLUSIONS))
        lines = ran.out.splitlines()
        self.assertRegex(lines[0], r"^007_pre +T2_FLAIR_0012 +not sent ")
        self.assertRegex(lines[1], r"^007_pre  held back")
        self.assertRegex(lines[2], r"^3 of 4 sessions")
        self.assertNotRegex(ran.out, r"(?m)^\S+ +\S+ +(sent|left out) ")

    def test_verbose_shows_commands_and_answers(self) -> None:
        readme_tree(self.root)
        with self.xnat() as server:
            ran = self.upload(server, "-v", "--only", "007/pre")
        self.assertEqual(ran.status, 0, ran.text)
        self.assertRegex(ran.err, r"curl \d+: --disable --config - .*/data/services/import")
        self.assertRegex(ran.err, r"curl \d+: exit 0 +HTTP 200 /data/prearchive/projects/BRAIN/")
        self.assertNotIn("curl", ran.out)

    def test_the_report_opens_in_a_spreadsheet_without_surprises(self) -> None:
        names = ["=1+1", "+2", "-3", "@x", "a,b", 'q"q', "\u00fc\u6d88"]
        for number, name in enumerate(names):
            write_series(self.root / "007/pre" / name, study=uid("r"), number=number, files=1)
        with self.xnat() as server:
            ran = self.upload(server)
            self.assertEqual(ran.status, 0, ran.text)
        rows = self.report()
        self.assertEqual([row["series"] for row in rows],
                         sorted(["'" + name if name[0] in "=+-@" else name for name in names],
                                key=lambda name: name.lstrip("'")))
        text = next(self.work.glob("*.csv")).read_bytes()
        self.assertEqual(len(text.decode("utf-8").splitlines()), len(names) + 1)


class Secrets(UploadTest):
    SECRET = "hunter2-\u00e4-topsecret"

    def processes(self) -> Dict[str, bytes]:
        """Arguments and environment of all processes of this test, with what kind it is."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                environment = (place / "environ").read_bytes()
                if os.fsencode(f"HOME={self.home}\0") in environment:
                    command = (place / "cmdline").read_bytes()
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
            ran = self.run_command(arguments, environment)
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
        for title, given, environment in rows:
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
                own = {each for each in mine if os.fsencode(sys.executable) in each}
                self.assertEqual(mine - own, set())
                self.assertEqual(bool(own), title != "netrc")
                for form in self.forms():
                    self.assertNotIn(form, text)
                netrc.unlink() if netrc.exists() else None

    def test_a_forced_traceback_does_not_hold_it(self) -> None:
        write_series(self.root / "007/pre/T1", study=uid("t"))
        for where in ("Xnat.meet", "Xnat._curl", "Run._sent", "make_plan", "find_password"):
            program = ("import sys, dicomUpload\n"
                       "def boom(*given, **more): raise RuntimeError(given, more)\n"
                       f"dicomUpload.{where} = boom\nsys.exit(dicomUpload.main())")
            with self.subTest(where), self.xnat(users=[User("alice", self.SECRET)]) as server:
                arguments = self.arguments(server.url, password="-")
                process = self.start([arguments[0], "-c", program, *arguments[2:]],
                                     {"PYTHONPATH": str(ROOT), "XNAT_PASS": self.SECRET})
                out, err = process.communicate(timeout=PATIENT)
                self.assertIn("RuntimeError", err)
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
                      "bytes per second", "-q, --quiet", "-v, --verbose", "-n, --dry-run"):
            self.assertIn(words, text)
        self.assertEqual(text.count("\n  dicomUpload.py https://"), 3)

    def test_version_is_one_line(self) -> None:
        self.assertRegex(self.ask("--version").stdout, r"^dicomUpload \d+\.\d+\n$")
