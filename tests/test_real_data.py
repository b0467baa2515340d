"""Real MR images: PyPI's `xnat` 0.8.1 (source package) carries Case001, 324 files in 10 series.

`.ci/run` downloads it and says where it lies in DICOMUPLOAD_TEST_DATA; it is never committed.
"""

import os
import shutil
from pathlib import Path

from tests.dicom import digests
from tests.support import UploadTest, missing


def case001(test: UploadTest) -> Path:
    """The folder of Case001, or the test is skipped."""
    folder = Path(os.environ.get("DICOMUPLOAD_TEST_DATA", "")) / "Case001"
    if not os.environ.get("DICOMUPLOAD_TEST_DATA") or not folder.is_dir():
        missing(test, "no real images: DICOMUPLOAD_TEST_DATA is not set (.ci/run sets it)")
    return folder


class RealImages(UploadTest):
    def test_all_324_real_files_arrive_with_the_same_bytes(self) -> None:
        shutil.copytree(str(case001(self) / "scans"), str(self.root / "Case001" / "MR 1"))
        wanted = digests(self.root)
        self.assertEqual(len([name for name in wanted if name.endswith(".dcm")]), 324)
        with self.xnat() as server:
            ran = self.upload(server, timeout=120)
            self.assertEqual(ran.status, 0, ran.text)
            self.assertIn("Case001_MR_1  archived, 324 files verified", ran.out)
            self.assertEqual(server.stored("Case001_MR_1"), sorted(wanted.values()))
        self.assertEqual({row["status"] for row in self.report()}, {"sent"})
        self.assertEqual(self.zips(), [])
