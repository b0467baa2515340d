"""What a second hostile review found, the smallest way to see each."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

from tests.dicom import uid, write_series
from tests.support import UploadTest, need
from tests.support import load_tests as load_tests  # several at a time
from tests.xnat_standin import Standin

IMPORT = "POST /data/services/import"


class SecondReview(UploadTest):
    def tree(self, *paths: str, files: int = 2) -> None:
        for number, path in enumerate(paths or ("007/pre/A_0001", "007/pre/B_0002"), 1):
            write_series(self.root / path, study=uid(*path.split("/")[:2]), number=number,
                         files=files)

    def shim(self, tool: str, before: str) -> dict:
        """An environment whose `tool` does something before it is the real one."""
        place = self.folder / "bin"
        place.mkdir(exist_ok=True)
        (place / tool).write_text(f"#!/bin/sh\n{before}\nexec {need(self, tool)} \"$@\"\n")
        (place / tool).chmod(0o755)
        return {"PATH": f"{place}:{os.environ['PATH']}"}

    def test_a_zip_that_starts_late_gets_all_its_names(self) -> None:
        folder = self.root / "007/pre/A_0001"
        name = "n" * 190
        write_series(folder, study=uid("late"), files=400, name=name + "{:04d}", rows=1, columns=1)
        with self.xnat() as server:  # 78 kB of names: more than a pipe holds
            ran = self.upload(server, environment=self.shim("zip", "sleep 0.6"), timeout=50)
            self.assertEqual(ran.status, 0, ran.text)
            self.assertEqual(len(server.stored("007_pre")), 400)

    def lose_terminal(self, server: Standin, seconds: float) -> "subprocess.Popen[str]":
        """A run whose terminal goes away while its first import takes so long."""
        self.tree()
        master, slave = os.openpty()
        server.fail("stall", IMPORT, seconds=seconds)
        process = self.start(self.arguments(server.url), {"TERM": "xterm"}, stdout=slave,
                             stderr=slave, start_new_session=True)
        os.close(slave)
        self.assertTrue(server.wait_for(server.imports, 20))
        os.close(master)
        return process

    def test_a_terminal_that_is_gone_does_not_stop_the_upload(self) -> None:
        with self.xnat() as server:
            self.assertEqual(self.lose_terminal(server, 1).wait(30), 0)
            self.assertEqual(len(server.stored("007_pre")), 4)
        self.assertEqual([row["status"] for row in self.report()], ["sent", "sent"])

    def test_a_hang_up_with_a_dead_terminal_still_ends_in_order(self) -> None:
        with self.xnat() as server:
            process = self.lose_terminal(server, 60)
            process.send_signal(signal.SIGHUP)
            self.assertEqual(process.wait(30), 129)
        self.assertEqual(len(self.report()), 2)

    def test_a_signal_that_comes_where_python_drops_exceptions_still_stops_the_run(self) -> None:
        self.tree()
        program = ("import os, signal, sys, time, dicomUpload\n"
                   "class Late:\n"
                   "    def __del__(self):\n"
                   "        os.kill(os.getpid(), signal.SIGTERM)\n"
                   "        time.sleep(0.1)\n"
                   "real = dicomUpload.Xnat.meet\n"
                   "def meet(self):\n"
                   "    Late()\n"
                   "    real(self)\n"
                   "dicomUpload.Xnat.meet = meet\n"
                   "sys.exit(dicomUpload.main())")
        with self.xnat() as server:
            arguments = self.arguments(server.url)
            ran = self.run_command([arguments[0], "-c", program, *arguments[2:]],
                                   {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)})
            self.assertEqual(ran.status, 143, ran.text)
            self.assertEqual(server.commits(), [])
        self.assertIn("stopped by SIGTERM", ran.err)

    def test_parts_packed_ahead_know_where_the_first_one_went(self) -> None:
        self.tree("007/pre/A_0001", files=3)
        with self.xnat(idle_seconds=0.8) as server:
            server.fail("stall before", IMPORT, seconds=3, skip=1)
            ran = self.upload(server, "--no-commit", "--max-files", "1", "--procs", "4")
            self.assertEqual(ran.status, 0, ran.text)
            self.assertNotIn("two studies", ran.text)

    def test_an_interrupt_within_a_long_series_is_the_reason_in_the_report(self) -> None:
        self.tree("007/pre/A_0001", files=6)
        with self.xnat() as server:
            server.fail("stall", IMPORT, seconds=60)
            process = self.start(self.arguments(server.url, "--max-files", "1"))
            self.assertTrue(server.wait_for(server.imports, 20))
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=30)
            self.assertEqual(process.returncode, 130, out)
        self.assertIn("stopped", self.report()[0]["message"])
        self.assertIn("Not there: 007_pre A_0001: not reached, the run was stopped", out)

    def test_many_links_to_folders_cost_no_minutes(self) -> None:
        self.tree("007/pre/A_0001")
        for number in range(1500):
            other = self.folder / "elsewhere" / str(number)
            other.mkdir(parents=True)
            (self.root / "007/pre/A_0001" / f"l{number}").symlink_to(other)
        with self.xnat() as server:
            ran = self.upload(server, "--dry-run", timeout=20)
        self.assertEqual(ran.status, 0, ran.text[-500:])

    def test_a_zip_of_an_earlier_run_in_a_linked_folder_is_not_added_to(self) -> None:
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

    def test_odd_redirects_and_hosts_are_no_tracebacks(self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("redirect", "POST /data/JSESSION", location="https://[xnat/")
            self.assertEqual(self.upload(server).status, 3)
            for url in ("http://[abc]/", "http://h:0", "http://[::1/"):
                self.assertEqual(self.run_command(self.arguments(url, password="-")).status, 2)

    def test_data_put_elsewhere_is_no_reason_to_run_again(self) -> None:
        self.tree()
        with self.xnat() as server:
            server.fail("other project", IMPORT)
            ran = self.upload(server)
            self.assertEqual(ran.status, 3, ran.text)
        self.assertRegex(ran.err, r"XNAT put 007_pre \S+ into project OTHER .*do not run again")
        self.assertNotIn("Run the same command again", ran.text)

    def test_the_report_says_where_a_session_that_is_not_archived_waits(self) -> None:
        self.tree("007/pre/A_0001")
        with self.xnat() as server:
            ran = self.upload(server, "--no-commit")
            self.assertEqual(ran.status, 0, ran.text)
            self.assertIn("--no-commit", self.report()[0]["message"])
            self.assertIn("not verified", ran.out)

    def test_an_empty_file_is_named_as_one_that_may_be_broken(self) -> None:
        self.tree("007/pre/A_0001")
        (self.root / "007/pre/A_0001/IM0009.dcm").touch()
        with self.xnat() as server:
            ran = self.upload(server, "-q")
        self.assertEqual(ran.status, 0, ran.text)
        self.assertIn("1 file not DICOM (named in the log): not sent", ran.out)
        self.assertRegex(self.log(), r"IM0009.dcm \(is empty: a copy that broke\?\)")

    def test_a_share_without_locks_is_used_with_zips_of_its_own(self) -> None:
        self.tree("007/pre/A_0001")
        seen = []
        program = ("import sys, errno, dicomUpload\n"
                   "def flock(*_): raise OSError(errno.ENOSYS, 'Function not implemented')\n"
                   "dicomUpload.fcntl.flock = flock\nsys.exit(dicomUpload.main())")

        def look(_: str) -> bool:
            seen.extend(path.parent.name for path in self.work.rglob("part-*.zip"))
            return False

        with self.xnat(reject=look) as server:
            arguments = self.arguments(server.url)
            ran = self.run_command([arguments[0], "-c", program, *arguments[2:]], {
                "PYTHONPATH": str(Path(__file__).resolve().parent.parent)})
            self.assertEqual(ran.status, 0, ran.text)
        self.assertTrue(seen and all(re.search(r"zips-.+-\d+$", name) for name in seen), seen)
        self.assertEqual(self.zips(), [])
        shutil.rmtree(str(self.work))
