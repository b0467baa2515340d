"""The tests of dicomUpload: run them all with `python3 -m unittest`."""
