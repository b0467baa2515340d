"""Programs, the workdir, its room and its locks, and what becomes of a series' files in a zip."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import unittest
import zipfile
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import dicomUpload
from tests.dicom import uid, write_series
from tests.running import AGAIN, HELD, HELD_BY_PERMISSIONS, IMPORT, RunningTest, until
from tests.support import ROOT, cases, need, or_at_hand, variation
from tests.support import load_tests as load_tests  # these mostly wait: several at a time

# The program on a file system that knows no locks.
WITHOUT_LOCKS = """import errno, sys
import dicomUpload
def flock(*_): raise OSError(errno.ENOSYS, "Function not implemented")
dicomUpload.fcntl.flock = flock
sys.exit(dicomUpload.main())
"""


class Programs(RunningTest):

    def kill(self, program: str) -> None:
        """kill -9 for the programs of this name that the run has started."""
        found = self.processes(program)
        self.assertTrue(found, f"no {program} is running")
        for number in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, 9)

    def test_a_curl_that_is_killed_is_tried_again(self) -> None:
        self.tree("007/pre/A_0001")
        with self.xnat() as server:
            server.fail("stall before", IMPORT, seconds=60)
            process = self.start(self.arguments(server.url))
            self.assertTrue(server.wait_for(server.imports, 30))
            self.kill("curl")
            ran = self.ended(process, 60)
            self.assertEqual(ran.status, 0, ran.text)
            self.assertIn(AGAIN, ran.err)
            self.tidy(ran)
            self.assert_whole(server)

    def test_a_zip_that_is_killed_costs_that_series_only(self) -> None:
        self.tree("007/pre/A_0001", "008/pre/A_0001")
        once = 'case "$PWD" in */007/*) mkdir "$HOME/once" 2>&- && kill -9 $$;; esac'
        with self.xnat() as server:
            ran = self.upload(server, environment=self.shim("zip", once))
            self.assertEqual(ran.status, 1, ran.text)
            self.assertRegex(ran.out, r"A_0001 +not sent +zip failed \(exit -9\)")
            self.assertEqual(self.statuses(), "not sent, sent")
            self.tidy(ran)
            self.assert_alone()
            self.completes(server)

    @unittest.skipUnless(os.path.isdir("/proc/self"), "finds processes in /proc")
    def test_whatever_else_the_run_has_started_may_be_killed(self) -> None:
        self.tree()
        with self.xnat() as server:
            go_on = threading.Event()
            server.knobs.reject = lambda _: not go_on.wait(60)
            process = self.start(self.arguments(server.url, "--procs", "1"))
            self.assertTrue(server.wait_for(server.imports, 30))
            self.assertTrue(until(lambda: not self.processes("zip")))
            others = set(self.processes()) - set(self.processes("curl")) - {process.pid}
            self.assertTrue(others, "no guard")
            for number in others:
                os.kill(number, 9)
            go_on.set()
            ran = self.ended(process, 60)
            self.assertEqual(ran.status, 0, ran.text)
            self.assert_whole(server)
            self.assert_alone()

    @unittest.skipUnless(os.path.isdir("/proc/self"), "finds processes in /proc")
    def test_a_curl_behind_a_wrapper_ends_with_the_run(self) -> None:
        self.tree("007/pre/A_0001")
        curl = need(self, "curl")
        wrapped = self.shim("curl", f'{curl} "$@"; exit $?')  # the real one is its child
        for number in (signal.SIGTERM, signal.SIGKILL):
            with self.subTest(number), self.xnat() as server:
                server.fail("stall", IMPORT, seconds=60)
                process = self.start(self.arguments(server.url), wrapped)
                self.assertTrue(server.wait_for(server.imports, 30))
                process.send_signal(number)
                process.communicate(timeout=10)
                self.assert_alone()

    @variation
    def test_a_zip_that_starts_late_gets_all_its_names(self) -> None:
        folder = self.root / "007/pre/A_0001"
        name = "n" * 190
        write_series(folder, study=uid("late"), files=400, name=name + "{:04d}", rows=1, columns=1)
        with self.xnat() as server:  # 78 kB of names: more than a pipe holds
            ran = self.upload(server, environment=self.shim("zip", "sleep 0.6"), timeout=50)
            self.assertEqual(ran.status, 0, ran.text)
            self.assertEqual(len(server.stored("007_pre")), 400)

    def test_no_option_for_zip_or_curl_comes_in_from_outside(self) -> None:
        self.tree("007/pre/A_0001")
        (self.home / ".curlrc").write_text('user = "bob:b0b"\n')
        with self.xnat() as server:
            ran = self.upload(server, environment={"ZIPOPT": "-e", "ZIP": "-x*"})
            self.assertEqual(ran.status, 0, ran.text)
            self.assertEqual({each.user for each in server.requests}, {"alice"})
            self.assert_whole(server)


# ---- The workdir -----------------------------------------------------------------------------

    def test_of_all_that_ends_while_a_run_is_stopped_its_first_reason_is_told(self) -> None:
        programs = dicomUpload.Programs()
        self.addCleanup(programs.close)

        def end(of: BaseException) -> None:
            raise of

        first, words = dicomUpload.Stop("the first"), "what a thread ends with"
        for each in (dicomUpload.Trouble(words, ""), dicomUpload.Stopping(words), first,
                     dicomUpload.Stopping(words), dicomUpload.Stop("a second one")):
            with self.assertRaises(type(each)):
                programs.guarded(end, each)
            stops = not isinstance(each, dicomUpload.Trouble)
            self.assertEqual(programs.stopping.is_set(), stops)
        self.assertIs(programs.reason, first)


class TheWorkdir(RunningTest):

    def small_disk(self, size: str) -> None:
        """Make the workdir a file system of its own, of so many bytes (and inodes)."""
        self.work.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.work)]
        try:
            done = subprocess.run(mount, stderr=subprocess.DEVNULL)
        except OSError:
            self.skipTest("mount is not installed")
        if done.returncode:
            self.skipTest("a file system cannot be mounted here: needs root")
        self.addCleanup(subprocess.call, ["umount", "-l", str(self.work)])

    def test_series_that_fit_into_the_workdir_one_by_one_are_not_refused_together(self) -> None:
        for number in range(1, 7):
            self.big_series(f"002/pre/S_{number:04}", 3)
        self.tree("001/pre/A_0001")
        self.small_disk("8M")
        with self.xnat() as server:
            self.run_it(server, posts=7, commits=2)
            self.assert_whole(server)

    def test_a_workdir_that_cannot_be_used_is_named_and_nobody_is_asked(self) -> None:
        self.tree("007/pre/A_0001")
        locked, file = self.folder / "locked", self.folder / "file"
        locked.mkdir(mode=0o555)
        file.write_text("mine")
        with self.xnat() as server:
            for place, why in ((locked, r"\(.*ermi.*\)"), (file, "")):
                with self.subTest(place.name):
                    ran = self.run_command([
                        sys.executable, "-c", HELD_BY_PERMISSIONS, str(ROOT),
                        *self.arguments(server.url, "--workdir", str(place))])
                    self.assertEqual(ran.status, 3, ran.text)
                    self.assertRegex(ran.err, f"dicomUpload: workdir .*{place.name}.*{why}.*: ")
            ran = self.upload(server, "--workdir", str(self.root / "work"))
            self.assertEqual(ran.status, 2, ran.text)
            self.assertIn("inside ROOTDIR", ran.err)
            self.assertFalse((self.root / "work").exists())
            self.assertEqual(server.requests, [])
        self.assertEqual(file.read_text(), "mine")

    def test_a_second_run_in_the_same_workdir_is_refused_and_the_first_goes_on(self) -> None:
        self.tree()
        with self.xnat() as server:
            second_ended = threading.Event()
            server.knobs.reject = lambda _: not second_ended.wait(60)
            process = self.start(self.arguments(server.url))
            self.assertTrue(server.wait_for(server.imports, 30))
            second = self.upload(server)
            second_ended.set()
            self.assertEqual(second.status, 3, second.text)
            self.assertRegex(second.err, rf"workdir .*in use by another run \(process {process.pid}"
                                         r" on \S+ since 20[0-9T: -]{14}\): wait")
            ran = self.ended(process, 60)
            self.assertEqual(ran.status, 0, ran.text)
            self.assertEqual(len(server.imports()), 2)
            self.assert_whole(server)
            self.tidy(ran)

    @variation
    def test_a_share_without_locks_is_told_and_holds_zips_of_one_run_only(self) -> None:
        self.tree("007/pre/A_0001")
        gone = subprocess.Popen(["true"])
        gone.wait()
        zips = f"dicomUpload.zips-{os.uname().nodename}-"
        left = [self.work / (zips + str(gone.pid)), self.work / (zips + "0x")]
        others = [self.work / (zips + str(os.getpid())),  # of a run that lives
                  self.work / "dicomUpload.zips-another-machine-1"]
        for place in left + others:
            place.mkdir(parents=True)
            (place / "part-1.zip").write_text("half")
        seen: List[str] = []

        def look(_: str) -> bool:
            seen.extend(path.relative_to(self.work).parts[0] for path in self.work.rglob("*.zip")
                        if path.parent not in others)
            return False

        with self.xnat(reject=look) as server:
            ran = self.run_command(self.altered(WITHOUT_LOCKS, server.url))
            self.assertEqual(ran.status, 0, ran.text)
            self.assert_whole(server)
        self.assertIn("knows no locks", ran.err)
        self.assertTrue(seen and all(re.search(r"zips-.+-\d+$", name) for name in seen), seen)
        self.assertEqual(sorted(path.parent for path in self.work.rglob("*.zip")), sorted(others))
        self.assertFalse(left[0].exists())

    def test_zips_of_an_earlier_run_are_neither_added_to_nor_left(self) -> None:
        self.tree("007/pre/A_0001")
        scratch = self.folder / "scratch"
        scratch.mkdir()
        self.work.mkdir()
        (self.work / "dicomUpload.zips").symlink_to(scratch)
        (self.folder / "note.txt").write_text("x")
        subprocess.run([need(self, "zip"), "-q", str(scratch / "part-1.zip"), "note.txt"],
                       cwd=str(self.folder), check=True)
        with self.xnat() as server:
            ran = self.upload(server)
            self.assertEqual(ran.status, 0, ran.text)
            self.assertEqual(len(server.stored("007_pre")), 2)
            self.assertEqual(self.zips(), [])

    def test_a_series_too_big_for_the_workdir_fails_with_the_remedy_and_small_ones_go(self) -> None:
        self.big_series("007/pre/A_0001", 0.5, files=6)
        self.tree("007/pre/B_0002", "008/pre/A_0001")
        self.small_disk("1m")
        with self.xnat() as server:
            self.run_it(server, status=3, posts=2, commits=1,
                        words=f"too full .*needs 3.* MB, has .*B | lower --max-files | {HELD}")
            self.assertEqual(self.statuses(), "not sent, sent, sent")
            # Smaller parts fit where a whole series does not, one after another.
            self.run_it(server, "--max-files", "1", status=0, posts=6, commits=1)
            self.assert_whole(server)

    @variation
    def test_a_series_waits_while_only_other_zips_are_in_its_way(self) -> None:
        for subject in ("001", "002", "003", "004", "005"):
            self.big_series(f"{subject}/pre/A_0001", 1)
        self.small_disk("3m")
        with self.xnat(seconds_per_file=0.1) as server:
            self.run_it(server, "--procs", "4", status=0, posts=5, commits=5)
            self.assert_whole(server)

    @variation
    def test_a_stop_ends_a_run_of_which_zips_wait_for_room(self) -> None:
        self.big_series("001/pre/A_0001", 0.3, files=4)
        self.big_series("002/pre/A_0001", 1.2)  # needs all of it, and comes late
        self.small_disk("1500k")
        sign = self.folder / "sign"
        late = self.on_open("002/pre/A_0001", f"while not os.path.exists({str(sign)!r}):\n"
                            "    time.sleep(0.01)", "os.scandir")
        with self.xnat() as server:
            server.fail("stall before", IMPORT, seconds=60)
            process = self.start(self.arguments(server.url, "--max-files", "1", "--nested"), late)
            self.assertTrue(server.wait_for(server.imports, 30))
            self.assertTrue(until(lambda: len(self.zips()) == 2), "the next one is packed")
            sign.touch()
            self.assertFalse(server.wait_for(lambda: len(server.imports()) > 1, 1))
            process.send_signal(signal.SIGTERM)
            self.assertEqual(self.ended(process).status, 143)
            self.assertEqual(self.zips(), [])
            server.faults.clear()
            self.quiet(server)
            self.run_it(server, "--max-files", "1", status=0)
            self.assert_whole(server)

    def test_a_workdir_without_an_inode_for_a_zip_s_folder_is_full(self) -> None:
        self.tree()
        self.small_disk("20m,nr_inodes=6")  # the root, lock, zips, log, report, ledger
        with self.xnat() as server:
            self.run_it(server, status=3, posts=0, words="takes no more .No space left | make room")
            subprocess.check_call(["mount", "-o", "remount,nr_inodes=99", str(self.work)])
            self.run_it(server, status=0)
            self.assert_whole(server)

    def test_a_workdir_without_a_single_free_byte_stops_the_run(self) -> None:
        self.tree()
        self.small_disk("64k")
        filler = self.work / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"#" * 4096)
        with self.xnat() as server:
            ran = self.upload(server)
            self.assertEqual(ran.status, 3, ran.text)
            self.assertRegex(ran.err, "dicomUpload: .*[Nn]o space.*: ")
            self.assertEqual(server.imports(), [])
            filler.unlink()
            subprocess.check_call(["mount", "-o", "remount,size=20m", str(self.work)])
            self.completes(server)

    def test_a_zip_that_finds_the_disk_full_says_so_and_the_run_ends_with_3(self) -> None:
        self.tree("007/pre/A_0001", "008/pre/A_0001")
        with self.xnat() as server:
            full = self.shim("zip", 'case "$PWD" in */007/*) echo "I/O error" >&2; exit 14;; esac')
            ran = self.upload(server, environment=full)
            self.assertEqual(ran.status, 3, ran.text)
            self.assertRegex(ran.out, r"zip failed \(exit 14, I/O error\)\n +make room in the work")
            self.assertEqual(set(server.archive), {("BRAIN", "008_pre")})
            self.completes(server)

    def test_a_disk_that_fills_up_on_the_way_stops_the_run_and_its_summary_is_printed(self) -> None:
        self.tree("007/pre/A_0001", "007/pre/B_0002", "008/pre/A_0001", "009/pre/A_0001")
        self.small_disk("400k")
        filler = self.work / "filler"

        def fill(_: str) -> bool:  # log, report and ledger have not one byte then
            with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
                while True:
                    file.write(b"#" * 4096)
            return False

        with self.xnat(reject=fill) as server:
            ran = self.upload(server, "--procs", "1")
            self.assertEqual(ran.status, 3, ran.text)
            self.assertRegex(ran.err, r"dicomUpload: .*[Nn]o space.*make room")
            self.assertIn("\nNot finished: 007_pre, 008_pre, 009_pre\n", ran.out)
            self.assertIn("First fix the 1 above, then run the same command again", ran.out)
            server.knobs.reject = ()
            filler.unlink()
            self.completes(server)


# ---- Files that change on the way ------------------------------------------------------------

Change = Callable[[Path], object]


def shrink(series: Path) -> None:
    file = series / "IM0002.dcm"
    os.truncate(str(file), file.stat().st_size - 100)


def grow(series: Path) -> None:
    with (series / "IM0002.dcm").open("ab") as file:
        file.write(bytes(100))


def rewrite(series: Path) -> None:
    """Equal in size, other bytes."""
    file = series / "IM0002.dcm"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def unlock(series: Path) -> None:
    if series.is_dir():
        series.chmod(0o755)
        for file in series.iterdir():
            file.chmod(0o644)


CHANGES: Dict[str, Tuple[Change, str]] = or_at_hand({  # of the series, and how that is told
    "shrink": (shrink, "IM0002.dcm changed"),
    "grow": (grow, "IM0002.dcm changed"),
    "rewrite": (rewrite, "IM0002.dcm changed"),
    "vanish": (lambda series: (series / "IM0002.dcm").unlink(), "IM0002.dcm does not exist"),
    "gone": (lambda series: shutil.rmtree(str(series)), "IM0001.dcm does not exist"),
    "lock": (lambda series: (series / "IM0002.dcm").chmod(0), "IM0002.dcm could not be read"),
    "shut": (lambda series: series.chmod(0), "IM0001.dcm cannot be read .*Permission"),
}, "rewrite", "vanish", "lock")


class FilesThatChangeOnTheWay(RunningTest):

    def grow_tree(self) -> None:
        for name in CHANGES:
            for number, series in enumerate("ABC", 1):
                # B has too many to share a connection with others: C is packed once A is sent.
                write_series(self.root / "007" / name / f"{series}_{number:04}", number=number,
                             study=uid(name), files=101 if series == "B" else 2, rows=1,
                             description=f"{name} {series}")
                grow(self.root / "007" / name / f"{series}_{number:04}")  # that may be cut off

    def play(self, due: str, folder: str) -> Tuple[str, Dict[str, str]]:
        """Change a series of each session while the server takes in the series `due`; the output,
        and the series' statuses by session."""
        self.grow_tree()
        done = set()

        def change(description: str) -> bool:
            name, series = description.split()
            if series == due and name not in done:
                done.add(name)
                CHANGES[name][0](self.root / "007" / name / folder)
            return False

        with self.xnat(reject=change) as server:
            ran = self.run_command([
                sys.executable, "-c", HELD_BY_PERMISSIONS, str(ROOT),
                *self.arguments(server.url, "--procs", "1")])
            statuses: Dict[str, List[str]] = {name: [] for name in CHANGES}
            for row in self.report():
                statuses[row["session"]].append(row["status"])
            archived = {label for _, label in server.archive}
            self.tidy(ran)
            for name in CHANGES:
                unlock(self.root / "007" / name / folder)
            self.assertEqual(done, set(CHANGES))
            server.knobs.reject = ()
            again = self.upload(server)
            if due == "A":  # what had been sent has not changed since
                self.assertEqual(again.status, 0, again.text)
                self.assert_whole(server)
        self.archived, self.ran = archived, ran
        return ran.out, {name: ", ".join(each) for name, each in statuses.items()}

    def test_a_file_that_is_not_as_it_was_read_fails_its_series_and_holds_its_session_back(
            self) -> None:
        out, statuses = self.play("A", "C_0003")  # A is in the server, and B is packed meanwhile
        self.assertEqual(self.ran.status, 1, self.ran.text)
        self.assertEqual(self.archived, {"007_rewrite"}, "what is packed is what is there")
        for name, (_, words) in CHANGES.items():
            with self.subTest(name):
                if name == "rewrite":
                    continue
                self.assertEqual(statuses[name], "sent, sent, not sent")
                self.assertRegex(out, f"007_{name} +C_0003 +not sent +{words}")
                self.assertRegex(out, f"(?m)^007_{name} +{HELD}")

    @variation
    def test_a_folder_that_has_changed_once_it_is_sent_holds_its_session_back(self) -> None:
        out, statuses = self.play("C", "A_0001")
        self.assertEqual(self.ran.status, 1, self.ran.text)
        self.assertEqual(self.archived, {"007_lock"}, "its bytes are there, and its listing is as "
                         "it was")
        for name in set(CHANGES) - {"lock"}:
            with self.subTest(name):
                self.assertEqual(statuses[name], "sent, sent, sent")
                self.assertRegex(out, f"(?m)^007_{name} +held back.*: its folder changed while it "
                                 "was sent")

    def test_a_file_that_comes_while_its_session_is_sent_holds_it_back(self) -> None:
        self.tree()

        def come(_: str) -> bool:
            self.tree("007/pre/C_0003")
            return False

        with self.xnat(reject=come) as server:
            self.run_it(server, status=1, posts=2, commits=0, words="folder changed while")
            server.knobs.reject = ()
            self.run_it(server, status=0, posts=1, commits=1)
            self.assert_whole(server)

    def test_a_file_that_changes_while_it_is_packed_fails_its_series(self) -> None:
        """Between the last look at it and zip's; zip itself takes it as it is, with exit 0."""
        changes = {"cut": "truncate -s -100 IM0002.dcm", "longer": "echo 1 >> IM0002.dcm",
                   "away": "rm IM0002.dcm", "all": "rm *.dcm"}
        for name in changes:
            write_series(self.root / name / "s" / "A_0001", study=uid(name), files=2)
        script = 'case "$PWD" in ' + "".join(
            f"*/{name}/*) {command};; " for name, command in changes.items()) + "esac"
        with self.xnat() as server:
            ran = self.upload(server, environment=self.shim("zip", script))
            self.assertEqual(ran.status, 1, ran.text)
            self.assertEqual(server.imports(), [])
        for name in changes:
            file = "IM0001.dcm" if name == "all" else "IM0002.dcm"
            self.assertRegex(ran.out, f"{name}_s +A_0001 +not sent +{file} could not be read in "
                             "full, or changed while it was read")
        self.tidy(ran)


# ---- One part, one zip -----------------------------------------------------------------------

class TheZip(unittest.TestCase):

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dicomUpload-test-"))
        self.addCleanup(shutil.rmtree, str(self.folder))
        self.zip = self.folder / "part.zip"

    def check(self, *names: str, **content: bytes) -> Dict[str, int]:
        """What the check says of a zip with this content, where these names were wanted, each
        with three bytes."""
        with zipfile.ZipFile(str(self.zip), "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        files = [dicomUpload.File(name, 3, 0) for name in names]
        dicomUpload.check_zip(str(self.zip), files)
        return {file.name: file.crc for file in files}

    def test_a_zip_that_holds_what_it_should_gives_each_files_crc(self) -> None:
        self.assertEqual(self.check("a", "b", a=b"abc", b=b"123"),
                         {"a": 0x352441C2, "b": 0x884863D2})

    def test_a_zip_that_holds_anything_else_is_no_part(self) -> None:
        for what, wanted, content, named in (
                ("one is missing", "ab", {"a": b"abc"}, "b"),
                ("one is cut", "ab", {"a": b"abc", "b": b"12"}, "b"),
                ("one has grown", "ab", {"a": b"abc1", "b": b"123"}, "a"),
                ("there is one more", "a", {"a": b"abc", "x": b"123"}, "x"),
                ("it is empty", "ab", {}, "a")):
            with self.subTest(what), self.assertRaises(dicomUpload.Trouble) as caught:
                self.check(*wanted, **content)
            self.assertTrue(str(caught.exception).startswith(f"{named} could not be read"), what)

    def test_a_file_that_is_no_zip_or_no_file_is_no_part(self) -> None:
        self.zip.write_bytes(b"PK\3\4 and so on")
        with self.assertRaises(dicomUpload.Trouble):
            dicomUpload.check_zip(str(self.zip), [dicomUpload.File("a", 3, 0)])
        self.zip.unlink()
        with self.assertRaises(dicomUpload.Trouble):
            dicomUpload.check_zip(str(self.zip), [dicomUpload.File("a", 3, 0)])

    def test_names_of_all_kinds_are_the_same_in_the_zip_as_on_the_disk(self) -> None:
        names = ["-r", "@", "a b", "ä/日本", "[x]*?", "\\n", "=1", "\u202eabc", "a\tb"]
        for name in names:
            file = self.folder / "series" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(name.encode())
        files = []
        for name in names:
            info = os.stat(str(self.folder / "series" / name))
            files.append(dicomUpload.File(name, info.st_size, info.st_mtime_ns))
        with contextlib.closing(dicomUpload.Programs()) as programs:
            dicomUpload.pack(str(self.folder / "series"), files, str(self.zip), 1, programs)
        self.assertTrue(all(file.crc >= 0 for file in files))

    def test_no_zip_is_larger_than_the_room_that_is_asked_for(self) -> None:
        series = self.folder / "series"
        for name in ("a{}", "x" * 200 + "{}", ("日" * 70 + "/") * 8 + "{}"):
            for size in 0, 10, 500_000:  # that do not shrink
                files = []
                for number in range(10):
                    file = series / name.format(number)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(os.urandom(size))
                    files.append(dicomUpload.File(name.format(number), size,
                                                  file.stat().st_mtime_ns))
                for level in cases(0, 1, 9, first=2):
                    with self.subTest(name=name, size=size, level=level), contextlib.closing(
                            dicomUpload.Programs()) as programs:
                        dicomUpload.pack(str(series), files, str(self.zip), level, programs)
                        # Without what is for ledger and log; the end of a zip has 22 bytes.
                        room = dicomUpload.zip_room(files) - dicomUpload.zip_room([]) + 22
                        self.assertLessEqual(self.zip.stat().st_size, room)
                        self.zip.unlink()
                shutil.rmtree(str(series))


if __name__ == "__main__":
    unittest.main()
