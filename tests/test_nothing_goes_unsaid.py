"""What is not there is said: on the screen, in the exit status, and in the report."""

from tests.dicom import write_series
from tests.support import UploadTest
from tests.support import load_tests as load_tests  # several at a time


class NothingGoesUnsaid(UploadTest):
    def setUp(self) -> None:
        super().setUp()
        write_series(self.root / "007/pre/T1", study="1.2.7")

    def test_the_last_words_of_a_whole_upload_are_that_all_is_there(self) -> None:
        with self.xnat() as server:
            for _ in range(2):
                ran = self.upload(server)
                self.assertEqual(ran.status, 0, ran.text)
                self.assertIn("\nAll is there.\n", ran.out)

    def test_dicom_files_without_a_series_folder_are_a_failure_by_name(self) -> None:
        (self.root / "Thumbs.db").write_bytes(b"junk" * 99)
        (self.root / "007/pre/T1/IM0001.dcm").rename(self.root / "007/pre/IM0001.dcm")
        with self.xnat() as server:
            for options in ((), ("--dry-run",)):
                ran = self.upload(server, *options)
                self.assertEqual(ran.status, 1, ran.text)
                self.assertRegex(ran.out, r"(Not there|Would not be sent): \S*007/pre: "
                                          r"1 DICOM file where folders belong \(IM0001.dcm\): "
                                          r"put them into a series folder")
                self.assertNotIn("All is there", ran.out)
            self.assertEqual(len(server.stored("007_pre")), 2)

    def test_a_slice_does_not_answer_for_loose_files_of_others(self) -> None:
        write_series(self.root / "008/pre/T1", study="1.2.8")
        (self.root / "008/pre/T1/IM0001.dcm").rename(self.root / "008/IM0001.dcm")
        with self.xnat() as server:
            self.assertEqual(self.upload(server, "--only", "007").status, 0)
            self.assertEqual(self.upload(server).status, 1)

    def test_other_files_where_folders_belong_are_told_and_no_failure(self) -> None:
        (self.root / "007/notes.txt").write_text("words " * 99)
        with self.xnat() as server:
            ran = self.upload(server)
        self.assertEqual(ran.status, 0, ran.text)
        self.assertIn("007/notes.txt: 1 file where folders belong", ran.err)

    def test_a_session_deleted_on_the_server_is_missed_by_the_next_run(self) -> None:
        with self.xnat() as server:
            self.assertEqual(self.upload(server).status, 0)
            server.store.archive.clear()
            ran = self.upload(server)
            self.assertEqual(ran.status, 1, ran.text)
            self.assertIn("007_pre: an earlier run saw it archived, and it is not there any more: "
                          "to send it anew, add --again --only 007/pre", ran.out)
            ran = self.upload(server, "--again")
            self.assertEqual(ran.status, 0, ran.text)
            self.assertEqual(len(server.stored("007_pre")), 3)

    def test_the_report_says_of_each_series_what_became_of_its_session(self) -> None:
        with self.xnat() as server:
            server.fail("error page", "POST .*action=commit", status=500,
                        text="FAILED: no, thanks")
            ran = self.upload(server)
        self.assertEqual(ran.status, 1, ran.text)
        (row,) = self.report()
        self.assertEqual(row["status"], "sent")
        self.assertIn("FAILED: no, thanks", row["message"])

    def test_an_empty_series_is_called_empty_and_holds_nothing_back(self) -> None:
        (self.root / "007/pre/T2").mkdir()
        with self.xnat() as server:
            ran = self.upload(server)
        self.assertEqual(ran.status, 0, ran.text)
        self.assertRegex(ran.out, r"T2 +no DICOM +is empty")

    def test_after_a_stop_the_halves_in_the_prearchive_are_named(self) -> None:
        write_series(self.root / "007/pre/T2", study="1.2.7", number=2)
        with self.xnat() as server:
            server.fail("disable account", "POST .*import", skip=1)
            ran = self.upload(server, "--procs", "1")
        self.assertEqual(ran.status, 3, ran.text)
        self.assertIn("Not whole in the prearchive, do not archive by hand: 007_pre\n", ran.out)
