"""How a run begins and what it may find there: streams that are closed."""

import unittest
from typing import Any

from tests.faults import FaultTest
from tests.support import Ran, cases
from tests.support import load_tests as load_tests  # these mostly wait: several at a time


class HowItBegins(FaultTest):

    def closed(self, url: str, how: str, **call: Any) -> Ran:
        """A run with some of its streams closed."""
        return self.run_command(["sh", "-c", f'exec "$@" {how}', "sh",
                                 *self.arguments(url, **call)])

    def test_closed_streams_stop_no_upload(self) -> None:
        for number, how in enumerate(cases("<&- >&- 2>&-", ">&-", "2>&-")):
            with self.subTest(how), self.xnat() as server:
                self.tree(f"007/pre/A_{number:04}")
                ran = self.closed(server.url, how)
                self.assertEqual(ran.status, 0, ran.text)
                self.assert_whole(server)

    def test_without_an_input_to_ask_at_a_missing_password_is_told(self) -> None:
        self.tree()
        with self.xnat() as server:
            ran = self.closed(server.url, "<&-", password="-")
            self.assertEqual(ran.status, 2, ran.text)
            self.assertRegex(ran.err, "dicomUpload: PASS -: .*XNAT_PASS")


if __name__ == "__main__":
    unittest.main()
