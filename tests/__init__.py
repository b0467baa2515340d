"""The tests of dicomUpload: run them all with `python3 -m unittest`."""

import unittest
from typing import Any


def load_tests(loader: unittest.TestLoader, _: Any, __: Any) -> unittest.TestSuite:
    """unittest asks for the tests of this package."""
    from tests.support import load_all  # not for those who only want one module
    return load_all(loader)
