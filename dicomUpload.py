#!/usr/bin/env python3
"""Send a tree of DICOM folders (ROOTDIR/subject/session/series) to XNAT: whole,
verified, never by halves. Run it again after any trouble: it sends the rest.

    ROOTDIR                     in XNAT
    +-- 007                     subject 007
        +-- pre                 session 007_pre
            +-- T2_FLAIR_0012   a series: its DICOM files, at any depth

examples:
  dicomUpload.py https://xnat.example.org alice - BRAIN dicomdir --dry-run
  dicomUpload.py https://xnat.example.org alice - BRAIN dicomdir --only 007/pre
  dicomUpload.py https://xnat.example.org alice - BRAIN dicomdir \\
      --config Exclusions.json --workdir /scratch/upload

exit status:
  0         all is there (or left out on purpose)
  1         some series or sessions failed
  2         wrong options, ROOTDIR or config, nothing sent
  3         could not start or had to stop (no zip, no curl, server unreachable,
            login refused, no right to the project, workdir in use or full)
  130, 143  stopped by a signal

Needs Python 3.8, curl 7.61, zip 3.0; no packages. Reads in the order of a run:
  words      the nouns of the program, as dataclasses
  finding    folders to Plan: labels, what is DICOM, what is left out
  packing    the one door to other programs, the workdir, one part to one zip
  sending    what to say to XNAT, and what its answers mean
  ledger     what has been sent, for the next run
  the run    what may go next, and when a session is whole
  telling    lines, summary, log and report; nothing else prints
  options    the command line to Settings
  main       the only place that exits
"""

from __future__ import annotations

import argparse
import csv
import datetime
import errno
import fcntl
import fnmatch
import getpass
import glob
import hashlib
import heapq
import html
import io
import itertools
import json
import netrc
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import unicodedata
import zipfile
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from queue import Empty, SimpleQueue
from typing import (Any, Callable, Deque, Dict, Iterator, List, NamedTuple, NoReturn, Optional,
                    Sequence, Set, TextIO, Tuple)
from urllib.parse import quote, urlencode

VERSION = "1.0"
ABOUT, LAYOUT, EXAMPLES, STATUSES, _ = (__doc__ or "\n\n" * 4).split("\n\n")  # for --help
ALL_THERE, SOME_FAILED, WRONG_CALL, STOPPED = 0, 1, 2, 3


# ---- words ---------------------------------------------------------------------------------


class Stop(Exception):
    """The run cannot go on; the text says thing, what and what to do."""

    def __init__(self, message: str, status: int = STOPPED, drawing: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.drawing = drawing


class Misplaced(Stop):
    """XNAT puts the data elsewhere: another run would only put more there."""


class Trouble(Exception):
    """One series or session cannot be done; the text says why and what to do."""


def option(names: str, text: str, default: Any = None, **more: Any) -> Any:
    """A field that the command line fills; `names` ends with what --help calls its value."""
    *flags, metavar = names.split()
    text += " (%(default)s)" if default else ""
    return field(metadata={"flags": flags, "metavar": metavar, "help": text, "default": default,
                           **more})


def switch(flags: str, text: str) -> Any:
    """A field that is False until the command line has one of these flags."""
    return field(metadata={"flags": flags.split(), "help": text, "action": "store_true"})


@dataclass(frozen=True, repr=False)  # no trace may show the password
class Settings:
    """The command line, checked. Sizes are bytes, times seconds."""

    url: str = option("URL", "XNAT's address, https://xnat.example.org")
    user: str = option("USER", "login, or the alias of an alias token")
    password: str = option("PASS", "password or secret; - takes XNAT_PASS, then ~/.netrc, or asks")
    project: str = option("PROJECT", "ID of the project")
    rootdir: str = option("ROOTDIR", "the folder that holds the subjects")
    config: Tuple[str, ...] = option(
        "--config FILE", 'JSON, {"Exclude": ["AAHEAD"]}: leave out series whose folder name '
        "contains one of these, in any case")
    only: List[str] = option("--only PATTERN", "glob on subject or subject/session: send only "
                             "these (repeatable)", [], action="append")
    dry_run: bool = switch("-n --dry-run", "show what would be sent, contact nobody")
    again: bool = switch(
        "--again", "forget what was sent of the sessions that --only chooses, or of all")
    no_commit: bool = switch(
        "--no-commit", "leave sessions to XNAT's own timers, which may archive one by halves")
    overwrite_files: bool = switch(
        "--overwrite-files", "on commit, replace images that the archive already holds")
    workdir: str = option(
        "--workdir DIR", "zips, ledger, log, report; the same in every run", "./work")
    procs: int = option("--procs N", "uploads side by side", 4)
    max_files: int = option("--max-files N", "files per zip", 500)
    compression: int = option("--compression 0-9", "zip's level", 1)
    retries: int = option("--retries N", "tries after the first", 5)
    timeout: int = option(
        "--timeout SECONDS", "seconds without a byte before a transfer counts as dead", 900)
    limit_rate: int = option(
        "--limit-rate RATE", "bytes per second for all uploads together, such as 5M (none)")
    cacert: str = option("--cacert FILE", "CA to trust (the system's)")
    insecure: bool = switch("--insecure", "do not check the server's certificate")
    logname: str = option("--logname NAME", "base of the log's and report's names", "dicomUpload")
    quiet: bool = switch("-q --quiet", "only what failed, and the summary")
    verbose: bool = switch(
        "-v --verbose", "each command and each answer of the server too, as in the log")
    command: str = ""  # the same call, without the password


File = Tuple[str, int, int]  # name below the series folder, bytes, time in ns


@dataclass(frozen=True)
class Series:
    """One series folder: what of it is to be sent, or why nothing is."""

    name: str
    folder: str
    packed: bytes = b""  # the files, compressed: ten thousand sessions stay small in memory
    files: int = 0
    bytes: int = 0
    fingerprint: str = ""  # of names, sizes and times
    not_dicom: int = 0
    left_out: str = ""
    problem: str = ""

    def listing(self) -> List[File]:
        """The files to send, as the plan saw them."""
        lines = os.fsdecode(zlib.decompress(self.packed)).split("\0") if self.files else []
        parts = (line.split(" ", 2) for line in lines)
        return [(name, int(length), int(time_ns)) for length, time_ns, name in parts]


@dataclass(frozen=True)
class Session:
    """One session folder and the labels that XNAT gets for it."""

    path: str  # subject/session, as the folders are called
    subject_label: str
    label: str
    series: Tuple[Series, ...]


@dataclass(frozen=True)
class Plan:
    """All that ROOTDIR holds, decided before any byte leaves."""

    sessions: Tuple[Session, ...]
    strays: Tuple[str, ...]  # what lies where folders belong
    loose: Dict[str, List[str]]  # the DICOM files among them, by folder
    not_chosen: int  # sessions left out by --only

    def pairs(self) -> Iterator[Tuple[Session, Series]]:
        return ((session, series) for session in self.sessions for series in session.series)


@dataclass(frozen=True)
class Part:
    """Files `start` to `stop` of a series: one zip, one POST."""

    session: Session
    series: Series
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """Of its files, about: as if all files of a series were of one size."""
        return self.series.bytes * (self.stop - self.start) // self.series.files

    @property
    def room(self) -> int:
        """Bytes that its zip never exceeds, about."""
        return zip_room(self.bytes, self.stop - self.start)


class Turn:
    """A part's place in its series: it takes room on the disk after the one before it, and is
    posted after that one is sent. (Else one that waits could keep the room from one that is
    waited for.)
    """

    def __init__(self, before: Optional[Turn]) -> None:
        self.before = before
        self.has_room = threading.Event()
        self.over = threading.Event()
        self.address = ""  # where it was sent

    def end(self) -> None:
        self.before = None
        self.has_room.set()
        self.over.set()

    def comes(self) -> bool:
        """Wait for the part before; whether it is sent."""
        if self.before:
            self.before.over.wait()
        return not self.before or bool(self.before.address)


@dataclass(frozen=True)
class Outcome:
    """What became of one part. `address` set means that it is sent."""

    address: str = ""
    message: str = ""
    zipped: int = 0  # bytes
    tries: int = 0
    status: int = 0
    moved: bool = False  # the session's earlier parts have left the prearchive meanwhile


@dataclass(frozen=True)
class Standing:
    """How the server holds a session: before anything is sent, or after its commit."""

    where: str = ""  # new, open, lost, archived, prearchived; '' if that is not known
    message: str = ""  # what is wrong with it
    files: int = 0  # counted by the server
    owed: int = 0  # what it should have counted, where it did not
    path: str = ""  # where it was counted


@dataclass(frozen=True)
class Answer:
    """What came back from one curl: `code` is its exit status, `status` the server's."""

    code: int
    status: int
    body: str
    error: str = ""
    location: str = ""
    retry_after: float = 0.0
    cookie: str = field(default="", repr=False)

    @property
    def is_html(self) -> bool:
        return bool(re.match(r"\s*<(!doctype|html|!--)", self.body, re.IGNORECASE))


@dataclass(frozen=True)
class Verdict:
    """An answer, judged: `wait` set means that trying again may heal it, after so long."""

    address: str = ""
    message: str = ""
    wait: Optional[float] = None
    gone: bool = False  # nothing that looks like a working XNAT answered
    stop: bool = False


# ---- finding -------------------------------------------------------------------------------


def make_plan(settings: Settings, note: Callable[[str], None]) -> Plan:
    """Walk ROOTDIR/subject/session/series. `note` gets each file that is not DICOM.

    Raises Stop(2) if two folders meet in one label, or the tree has another shape.
    """
    sessions: List[Session] = []
    strays: List[str] = []
    above: List[str] = [] if settings.only else strays  # each slice tells only of its own
    owners: Dict[Tuple[str, str], str] = {}
    globs = [each if "/" in each else each + "/*" for each in settings.only or ["*"]]
    not_chosen = 0
    for subject in subfolders(settings.rootdir, above):
        # XNAT finds subjects without regard to case (xnat.md 4.4, retrieveMatchingSubject).
        folder = os.path.join(settings.rootdir, subject)
        claim(owners, "subject", clean_label(subject).lower(), folder)
        try:
            names = subfolders(folder, above)
        except OSError:
            names = [""]  # a session without a name stands for it, and fails
        for name in names:
            claim(owners, "session", clean_label(f"{subject}_{name}"), os.path.join(folder, name))
            if any(fnmatch.fnmatchcase(f"{subject}/{name}", each) for each in globs):
                sessions.append(read_session(subject, name, settings, strays, note))
            else:
                not_chosen += 1
    loose: Dict[str, List[str]] = {}
    for path in strays:
        with suppress(OSError):
            if os.path.isfile(path) and is_dicom(first_bytes(path), os.path.getsize(path)):
                loose.setdefault(os.path.dirname(path), []).append(os.path.basename(path))
    plan = Plan(tuple(sessions), tuple(strays), loose, not_chosen)
    check_shape(plan, settings)
    return plan


def subfolders(folder: str, strays: List[str]) -> List[str]:
    """Names of the folders in `folder`, hidden ones not, in order; the rest goes to `strays`."""
    names = []
    for entry in os.scandir(folder):
        # A link to nothing counts: a share that is not mounted must not go unnoticed.
        lost = entry.is_symlink() and not os.path.exists(entry.path)
        if not lost and (not entry.is_dir() or leads_back(entry)):
            strays.append(entry.path)
        elif not entry.name.startswith("."):
            names.append(entry.name)
    return sorted(names)


def leads_back(entry: os.DirEntry[str]) -> bool:
    """Whether a folder is a link to a folder above itself, which would never end."""
    return entry.is_symlink() and lies_in(os.path.dirname(entry.path), entry.path)


def lies_in(path: str, folder: str) -> bool:
    """Whether `path` is `folder`, or lies in it."""
    return os.path.realpath(folder) in and_above(path)


def and_above(path: str) -> List[str]:
    """The real path of a folder, and of all folders above it."""
    real = os.path.realpath(path)
    return [real] + [real[:at] or "/" for at, each in enumerate(real) if each == "/"]


def clean_label(text: str) -> str:
    """`text` as a label that XNAT keeps unchanged: it accepts [A-Za-z0-9_-] (xnat.md 4.4)."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)


def claim(owners: Dict[Tuple[str, str], str], kind: str, label: str, folder: str) -> None:
    """Note that `folder` becomes `label`. Raises Stop(2) if another folder already does."""
    other = owners.setdefault((kind, label), folder)
    if other != folder:
        refuse(f"{kind} label {label}", f"two folders would become one ({other} and {folder}; XNAT "
               "keeps only letters, digits, _ and -): rename one of them")


def read_session(subject: str, name: str, settings: Settings, strays: List[str],
                 note: Callable[[str], None]) -> Session:
    """Look into every series folder of one session."""
    folder = os.path.join(settings.rootdir, subject, name)
    try:
        series = tuple(read_series(each, os.path.join(folder, each), settings.config, note)
                       for each in subfolders(folder, strays))
    except OSError as error:
        series = (Series("(folder)", folder, problem=f"the folder {unreadable(error)}"),)
    label = clean_label(f"{subject}_{name}" if name else subject)
    return Session(f"{subject}/{name}", clean_label(subject), label, series)


def read_series(name: str, folder: str, exclude: Tuple[str, ...],
                note: Callable[[str], None]) -> Series:
    """Decide what of one series folder is sent."""
    for pattern in exclude:
        if pattern.lower() in name.lower():
            return Series(name, folder, left_out=f'name contains "{pattern}"')
    try:
        files, junk, problems = list_files(folder)
    except OSError as error:
        return Series(name, folder, problem=f"the folder {unreadable(error)}")
    for each in junk:
        note(f"not DICOM: {os.path.join(folder, each)}")
    raw = os.fsencode("\0".join(f"{length} {time_ns} {each}" for each, length, time_ns in files))
    more = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
    return Series(name, folder, zlib.compress(raw, 1), len(files), sum(file[1] for file in files),
                  hashlib.sha256(raw).hexdigest()[:32], len(junk),
                  problem=problems[0] + more if problems else "")


def list_files(folder: str) -> Tuple[List[File], List[str], List[str]]:
    """One pass over a series folder: its DICOM files, the names of the rest, what is wrong."""
    files: List[File] = []
    junk: List[str] = []
    problems: List[str] = []
    entries = list(os.scandir(folder))
    links: List[Tuple[str, os.DirEntry[str]]] = []  # to folders: after all real ones, by path
    read = {os.path.realpath(folder)}  # folders that link to each other have paths without end
    while entries or links:
        linked = not entries
        entry = heapq.heappop(links)[1] if linked else entries.pop()
        name = entry.path[len(folder) + 1:]
        try:
            if not entry.is_dir():
                look_at_file(entry, name, files, junk, problems)
            elif not entry.is_symlink():
                entries += os.scandir(entry.path)
            elif not linked:
                heapq.heappush(links, (entry.path, entry))
            elif leads_back(entry) or not read.isdisjoint(and_above(entry.path)):
                junk.append(f"{name} (a link to a folder above it, or one that is read already)")
            else:
                read.add(os.path.realpath(entry.path))
                entries += os.scandir(entry.path)
        except OSError as error:
            problems.append(f"{name} {unreadable(error)}")
    return sorted(files), sorted(junk), sorted(problems)


def look_at_file(entry: os.DirEntry[str], name: str, files: List[File], junk: List[str],
                 problems: List[str]) -> None:
    """Put one file where it belongs. Raises OSError if it cannot be read."""
    if entry.is_symlink() and not os.path.exists(entry.path):
        problems.append(f"{name} is a link to nothing: mend or remove it, then run again")
        return
    info = entry.stat()
    regular = entry.is_file() and info.st_size  # a FIFO would make us wait for ever
    if not regular or not is_dicom(first_bytes(entry.path), info.st_size):
        junk.append(name + ("" if info.st_size else " (is empty: a copy that broke?)"))
    elif re.search(r"[\n\r\x7f]", name):  # zip takes a line each, and spoils the zip with a DEL
        problems.append(f"{name} has a line break or DEL in its name: rename it, then run again")
    elif not is_utf8(name):  # Java refuses the whole zip for it (xnat.md 3)
        problems.append(f"{name} has a name that is not UTF-8: rename it, then run again")
    elif re.search(r"\.(zip|tar|tgz|gz)$", name, re.IGNORECASE):  # XNAT would unpack it (xnat.md 3)
        problems.append(f"{name} is DICOM named as an archive: rename it, then run again")
    else:
        files.append((name, info.st_size, info.st_mtime_ns))


def unreadable(error: OSError) -> str:
    """The same words for every file or folder that the system refuses to show."""
    known = {errno.EACCES: f"cannot be read ({error.strerror}): give yourself read permission",
             errno.ENOENT: "does not exist: check the name or link",
             errno.ELOOP: "is a link that goes round in circles: mend it",
             errno.ENOTDIR: "is a file: give a folder", errno.EISDIR: "is a folder: give a file"}
    rest = f"cannot be read ({error.strerror}): check the disk or share"
    return known.get(error.errno or 0, rest) + ", then run again"


def is_utf8(name: str) -> bool:
    raw = os.fsencode(name)
    return raw.decode("utf-8", "ignore").encode("utf-8") == raw


def first_bytes(path: str, count: int = 512) -> bytes:
    """Enough of a file to know it by: the preamble and the media storage class after it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.read(handle, count)
    finally:
        os.close(handle)


# A first tag in group 0002 or 0008, of either byte order, with its value representation.
EXPLICIT = re.compile(
    rb"([\2\10]\0[\0-\x90]\0|\0[\2\10]\0[\0-\x90])(AE|AS|AT|CS|DA|DS|DT|FD|FL|IS|LO|LT|OB|OD|OF|OL|"
    rb"OW|PN|SH|SL|SQ|SS|ST|TM|UC|UI|UL|UN|UR|US|UT)")
# A DICOMDIR is an index without a SOP class of its own, and XNAT refuses it (xnat.md 3).
DICOMDIR_CLASS = re.compile(rb"1\.2\.840\.10008\.1\.3\.10(?![0-9.])")


def is_dicom(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins with `head` (512 bytes, or all) is DICOM.

    By its bytes, never by its name: `DICM` at 128, or a data set without preamble, whose first
    tag lies in group 0002 or 0008 with a plausible value representation or length.
    """
    if head[128:132] == b"DICM":
        return not DICOMDIR_CLASS.search(head, 132)
    if len(head) < 16:
        return False
    if EXPLICIT.match(head):
        return True
    group, element, length = struct.unpack("<HHI", head[:8])
    return (group in (0x0002, 0x0008) and element <= 0x0090 and (element > 0 or length == 4)
            and length <= min(size - 8, 1024) and length % 2 == 0)


def check_shape(plan: Plan, settings: Settings) -> None:
    """Raises Stop(2) if ROOTDIR holds nothing to send, or looks one level off."""
    root, wanted = settings.rootdir, [each for _, each in plan.pairs() if not each.left_out]
    full = [series for series in wanted if series.files]
    deep = [path for path in plan.strays if os.path.dirname(path) != root]
    wrong = ""
    if plan.not_chosen and not plan.sessions:
        refuse(f"--only {' '.join(settings.only)}", f"chooses none of the {plan.not_chosen} "
               f"sessions in {root}: give subject or subject/session, as the folders go")
    elif not any(plan.pairs()) and deep:
        wrong = (f"one level too deep (files where series belong, {deep[0]}): try "
                 f"{os.path.dirname(os.path.abspath(root))}")
    elif not any(plan.pairs()):
        wrong = "no series found: give the folder that holds the subjects"
    elif wanted and not full and not any(series.problem for series in wanted):
        junk = sum(series.not_dicom for series in wanted)
        wrong = f"none of the {junk} files in {len(wanted)} series is DICOM: is this the folder?"
    elif (all("/" in name for series in full for name, _, _ in series.listing())
          and any(map(holds_several, full))):
        wrong = (f"one level too shallow (different series in {full[0].folder}): give a folder "
                 f"inside {root}")
    if wrong:
        raise Stop(f"ROOTDIR {root}: {wrong}. The layout is", WRONG_CALL, LAYOUT)


SERIES_INSTANCE = re.compile(rb"\x20\x00\x0e\x00(?:UI..|.{4})([0-9.]+)", re.DOTALL)


def holds_several(series: Series) -> bool:
    """Whether the folders in a series folder hold different series, as a session's do."""
    firsts = {name.partition("/")[0]: name for name, _, _ in series.listing()}
    found = {SERIES_INSTANCE.search(first_bytes(os.path.join(series.folder, name), 65536))
             for name in list(firsts.values())[:8]}
    return len({each[1] for each in found if each}) > 1


class Header(NamedTuple):
    """What the first bytes of a file say of it."""
    kind: str          # "DICOM", "damaged", "blank", "other"; "more" if more bytes have to tell
    sop: str = ""      # SOP Instance UID
    study: str = ""    # Study Instance UID
    series: str = ""   # Series Instance UID
    why: str = ""      # what is damaged or blank: it follows the name of the file in a sentence


SOP_CLASS, SOP, STUDY, SERIES = UIDS = (0x00080016, 0x00080018, 0x0020000D, 0x0020000E)
PIXELS = 0x7FE00008  # as floats; 0009 are doubles, 0010 integers
SEQUENCE_END, UNDEFINED = 0xFFFEE0DD, 0xFFFFFFFF
SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # 4 bytes of length, at 8
DEFLATED, DICOMDIR = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.3.10"
UNPACK = {order: struct.Struct(order + "HH2sH").unpack_from for order in "<>"}
READS = (8192, 1 << 17, 1 << 22, 1 << 26)  # bytes in all; the first is enough for nearly all files
CUT = "ends within its header"
BLANK = ((b"version https://git-lfs.github.com/spec/", "is a Git LFS pointer"),
         (b"/annex/objects/", "is a git-annex pointer"),
         (b"<!doctype", "is a web page"), (b"<html", "is a web page"), (b"<?xml", "is XML"))


def read_header(path: str, size: int) -> Header:
    """What a file of `size` bytes is, and whose, by its bytes. Raises OSError if unreadable."""
    data = b""
    with open(path, "rb", buffering=0) as file:
        for most in READS:
            data += file.read(most - len(data))
            header = header_of(data, max(size, len(data)))
            if header.kind != "more":
                return header
    return Header("damaged", why="has a header without end")


def header_of(data: bytes, size: int) -> Header:
    """The same by the first bytes of the file, which may be any. Old exports may lack `DICM`."""
    if not data:
        return Header("blank", why="is empty")
    if not data.strip(data[:1]):
        byte = f"0x{data[0]:02X}" if data[0] else "zeros"
        return Header("blank", why=f"{'begins with' if size > len(data) else 'holds'} only {byte}")
    at = 132 if data[128:132] == b"DICM" or (bytes(128) + b"DICM").startswith(data) else 0
    if at or begins_bare(data, size):
        return read_data_set(data, at, size)
    begin = data[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower()  # without a byte order mark
    why = next((why for mark, why in BLANK if begin.startswith(mark)), "")
    return Header("blank" if why else "other", why=why)


def begins_bare(data: bytes, size: int) -> bool:
    """Whether three elements in order stand at 0, the first as in data sets. Numbers do not."""
    first = [each for each in itertools.islice(elements(data, 0, size), 3) if each[2] <= size]
    tags = [tag for tag, _, _ in first]
    if len(tags) < 3 or not tags[0] < tags[1] < tags[2] < 0x00300000:
        return False
    (group, element), length = divmod(tags[0], 1 << 16), first[0][2] - first[0][1]
    return group in (2, 8) and element <= 0x90 and (length <= 1024 if element else length == 4)


def read_data_set(data: bytes, at: int, size: int) -> Header:
    """The header of a DICOM file whose first element, of group 0002 or not, is at `at`."""
    found: Dict[int, bytes] = {}
    for tag, start, end in elements(data, at, size):
        if tag >> 16 != 0x0002 or end > size:
            break
        found[tag], at = data[start:end].rstrip(b"\0 "), end
    if found.get(0x00020002) == DICOMDIR:
        return Header("other")  # an index of other files
    if found.get(0x00020010) == DEFLATED and at + 12 <= len(data):  # all of group 0002 is there
        whole, data, at = len(data) == size, data[at:], 0
        bits = 15 if data[:1] == b"\x78" else -15  # some have a zlib header
        try:
            data = zlib.decompressobj(bits).decompress(data, READS[-1])
        except zlib.error:
            return Header("damaged", why="cannot be inflated")
        size = len(data) if whole and len(data) < READS[-1] else 1 << 62
    last, why = 0, ""
    for tag, start, end in elements(data, at, size):
        if end > size and tag >= last:
            why = "ends within its pixels" if tag >= PIXELS else CUT
        elif not tag and not last:
            why = "holds zeros where its header should go on"
        if why or tag <= last or (tag in UIDS and end > len(data)):
            break
        if tag in UIDS:
            found[tag] = data[start:end].partition(b"\\")[0].strip(b"\0 ")
        if tag >= SERIES:  # from here on tags ascend, or are not understood; pixels are the last
            last = tag if tag < PIXELS or end == start else 1 << 32
    if not why and not last and len(data) < size:
        return Header("more")
    sop_class, sop, study, series = (found.get(tag, b"").decode("latin-1") for tag in UIDS)
    if not why and not (sop_class and sop):
        why = f"has no SOP {'Instance' if sop_class else 'Class'} UID"
    return Header("damaged" if why else "DICOM", sop, study, series, why)


def elements(data: bytes, at: int, size: int) -> Iterator[Tuple[int, int, int]]:
    """Tag, start and end of the value of each element, not of those in sequences. An undefined
    length counts as 0. In a cut file the last end is behind it; the tag is 0 if that is cut."""
    first, whole, outer = data[at:at + 6], len(data) == size, 0
    # The first element knows the encoding better than the transfer syntax, which some get wrong.
    order = ">" if first[:1] == b"\0" and first[1:2] > b"\0" else "<"  # a group below 0100
    inside = [(order, first[4:].isalpha() and first[4:].isupper())]  # and sequences that are open
    data += bytes(4) if whole else b""  # the last element may have 8 bytes
    while at + 12 <= len(data):
        order, explicit = inside[-1]
        group, element, vr, length = UNPACK[order](data, at)
        tag, start = group << 16 | element, at + 8
        if not explicit or group == 0xFFFE or not (vr.isalpha() and vr.isupper()):
            (length,) = struct.unpack_from(order + "I", data, at + 4)  # some mix explicit and not
        elif vr in LONG or (not length and vr not in SHORT):
            start = at + 12
            (length,) = struct.unpack_from(order + "I", data, at + 8)
        at = start + (length if length != UNDEFINED else 0)
        if group != 0xFFFE and len(inside) == 1:
            outer = tag
            yield tag, start, at
        if group != 0xFFFE and length == UNDEFINED:  # an UN is implicit inside, little-endian
            inside.append(("<", False) if vr == b"UN" else inside[-1])
        elif tag == SEQUENCE_END and len(inside) > 1:
            inside.pop()
    if at > size or whole and (at < size or len(inside) > 1 and outer < SERIES):
        yield outer if len(inside) > 1 else 0, at, size + 1


# ---- packing -------------------------------------------------------------------------------


class Programs:
    """The one place that starts programs. Nothing that it starts outlives this process."""

    # A parent killed with -9 leaves its curl uploading. This shell reads the numbers of the
    # running programs, a line each time they change; when the pipe closes it kills the last.
    GUARD = 'trap "" HUP INT TERM; while read -r now; do pids=$now; done; kill -9 $pids'

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._running: Dict[int, subprocess.Popen[bytes]] = {}
        # zip takes options from two of these, and no program needs the password.
        hidden = ("ZIPOPT", "ZIP", "XNAT_PASS")
        self._environment = {key: os.environ[key] for key in os.environ if key not in hidden}
        self._guard = self._start(["sh", "-c", self.GUARD], "/")

    def _start(self, command: List[str], folder: str) -> subprocess.Popen[bytes]:
        # Its own session: a Ctrl-C at the terminal is ours to pass on, not the kernel's.
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, cwd=folder, env=self._environment,
                                start_new_session=True)

    def run(self, command: List[str], given: bytes = b"", folder: str = "/",
            watch: Callable[[bytes], None] = lambda _: None) -> subprocess.CompletedProcess[bytes]:
        """Start `command` in `folder`, feed it `given`, wait for it. Raises Stop, Trouble.

        Four times a second `watch` gets what it has said on its error output so far.
        """
        with self._lock:
            if self.stopping.is_set():
                raise Stop("stopping")
            try:
                process = self._start(command, folder)
            except OSError as error:
                raise Trouble(f"{command[0]} cannot be started in {folder} ({error.strerror}): "
                              "check both, then run again")
            self._running[process.pid] = process
            self._tell_guard()
        try:
            out, err = self._talk(process, given, watch)
        finally:
            process.kill()
            process.wait()
            with self._lock:
                del self._running[process.pid]
                self._tell_guard()
        if self.stopping.is_set() and process.returncode < 0:
            raise Stop("stopping")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    @staticmethod
    def _talk(process: subprocess.Popen[bytes], given: bytes,
              watch: Callable[[bytes], None]) -> Tuple[bytes, bytes]:
        # Not by communicate(): after a timeout it never writes the rest (python/cpython#141473).
        # zip and curl read all of it before they say much.
        with suppress(BrokenPipeError), process.stdin as into:  # type: ignore[union-attr]
            into.write(given)
        process.stdin = None
        while True:
            try:
                return process.communicate(timeout=0.25)
            except subprocess.TimeoutExpired as so_far:
                watch(so_far.stderr or b"")

    def _tell_guard(self) -> None:
        with suppress(BrokenPipeError):  # somebody killed the guard: the uploads do not need it
            os.write(self._guard.stdin.fileno(),  # type: ignore[union-attr]
                     " ".join(map(str, self._running)).encode() + b"\n")

    def stop(self) -> None:
        """End everything that runs, and start nothing more."""
        with self._lock:
            self.stopping.set()
            for process in self._running.values():
                process.kill()

    def close(self) -> None:
        """End everything, and let the guard go."""
        self.stop()
        self._guard.kill()
        self._guard.communicate()


class Workdir:
    """The folder for zips, ledger, log and report, held by one run at a time."""

    def __init__(self, path: str) -> None:
        """Raises Stop(3) if it cannot be made, or another run holds it."""
        self.path = os.path.abspath(path)
        self.zips = os.path.join(self.path, "dicomUpload.zips")
        self._numbers = itertools.count(1)
        self._room = threading.Condition()
        self._promised = 0
        try:
            os.makedirs(self.path, exist_ok=True)
            self._lock = open(os.path.join(self.path, "dicomUpload.lock"), "ab")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(f"workdir {path}: in use by another run: wait until it ends")
        except OSError as error:
            # A share without locks will do, if nobody else can touch these zips.
            self.zips += f"-{os.uname().nodename}-{os.getpid()}"
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise Stop(f"workdir {path}: cannot be used ({error.strerror}): choose another")
        shutil.rmtree(self.zips, ignore_errors=True)  # left by an earlier run that was killed
        os.makedirs(self.zips, exist_ok=True)

    def close(self) -> None:
        shutil.rmtree(self.zips, ignore_errors=True)
        self._lock.close()

    @contextmanager
    def room_for(self, files: List[File]) -> Iterator[str]:
        """A name for a zip of these files, once there is room. The zip is removed at the end.

        Waits while other zips are in the way; raises Trouble if it would not fit even alone.
        """
        need = zip_room(sum(length for _, length, _ in files), len(files))
        with self._room:
            while shutil.disk_usage(self.zips).free - self._promised < need:
                if not self._promised:
                    free = size(shutil.disk_usage(self.zips).free)
                    raise Trouble(f"workdir {self.path} is too full (needs {size(need)}, has "
                                  f"{free}): make room, lower --max-files, or move all of it, "
                                  "ledger too, to a larger disk")
                self._room.wait()
            self._promised += need
        target = os.path.join(self.zips, f"part-{next(self._numbers)}.zip")
        try:
            with suppress(FileNotFoundError):  # zip would add to an old one
                os.unlink(target)
            yield target
        finally:
            with suppress(FileNotFoundError):
                os.unlink(target)
            with self._room:
                self._promised -= need
                self._room.notify_all()


def zip_room(total: int, files: int) -> int:
    """Bytes that a zip of so many bytes in so many files never exceeds."""
    return total + 1024 * files + 65536


def pack(series: Series, files: List[File], target: str, level: int, programs: Programs) -> None:
    """Zip `files` of a series into `target`. Raises Trouble unless it holds exactly them."""
    for name, length, time_ns in files:
        try:
            info = os.stat(os.path.join(series.folder, name))
        except OSError as error:
            raise Trouble(f"{name} {unreadable(error)}")
        if (info.st_size, info.st_mtime_ns) != (length, time_ns):
            raise Trouble(f"{name} changed during this run: run again when it is still")
    # -q quiet; -X no owners and times; -D no folder entries; -@ names, a line each, as input. `./`
    # keeps a name with - from being taken for an option. zip makes the file itself (one that is
    # there would be updated); written to a pipe, Java would refuse it (data descriptors).
    names = b"".join(b"./" + os.fsencode(name) + b"\n" for name, _, _ in files)
    done = programs.run(["zip", "-q", "-X", "-D", f"-{level}", target, "-@"], names, series.folder)
    if done.returncode not in (0, 12, 18):  # 12, 18: a file could not be read; check_zip names it
        text = " ".join((done.stdout + done.stderr).decode("utf-8", "replace").split())
        room = "make room in the workdir" if done.returncode == 14 else "run again"
        raise Trouble(f"zip failed (exit {done.returncode}{', ' + text if text else ''}): {room}")
    check_zip(target, files)


def check_zip(target: str, files: List[File]) -> None:
    """Raises Trouble unless the zip holds these files in full and nothing else.

    zip's exit 0 is no proof: a file that shrank or vanished while it read gives 0 (tools.md).
    """
    wanted = Counter((os.fsencode(name), length) for name, length, _ in files)
    packed: Counter[Tuple[bytes, int]] = Counter()
    try:
        with suppress(FileNotFoundError), zipfile.ZipFile(target) as archive:
            for entry in archive.infolist():
                # The bytes as they stand in the zip: Python decodes those without flag as cp437.
                coding = "utf-8" if entry.flag_bits & 0x800 else "cp437"
                packed[entry.orig_filename.encode(coding), entry.file_size] += 1
    except (OSError, zipfile.BadZipFile) as error:
        raise Trouble(f"zip made no readable archive ({error}): run again")
    for name, _ in (wanted - packed) or (packed - wanted):
        raise Trouble(f"{os.fsdecode(name)} could not be read in full, or changed while it was "
                      "read: check it, then run again")


# ---- sending -------------------------------------------------------------------------------


CURL_TROUBLE = {
    5: "the proxy's name cannot be found: check the proxy settings",
    6: "the server's name cannot be found: check URL and network",
    7: "nothing answers there: check URL, network, and whether XNAT is up",
    28: "the connection went silent: check the network, and see --timeout",
    35: "no encrypted connection comes about: check https or http, and the port",
    52: "the server closed the connection without an answer: run again later",
    55: "the connection broke while sending: run again later",
    56: "the connection broke: run again later",
    60: "the server's certificate is not trusted: give your site's CA with --cacert FILE",
    77: "the CA file cannot be read: check --cacert",
}
# What else exit 60 may mean, by curl's own words: no other CA would help.
CERTIFICATES = (
    ("expired", "the server's certificate has expired: ask the XNAT admin to renew it"),
    ("not yet valid", "the server's certificate is not valid yet: check this machine's clock"),
    ("subject name", "the server's certificate is for another name: give the URL by that name"),
)
# Exit statuses of curl that waiting may heal: connections that failed, broke or went silent.
CONNECTION_TROUBLE = frozenset((5, 6, 7, 16, 18, 28, 35, 52, 55, 56, 92, 95, 96))
BUSY_STATUS = frozenset((408, 429, 502, 503, 504))
# 400s that waiting heals, by their words (xnat.md 5 and 10).
BUSY_WORDS = re.compile(
    "concurrent file sends|session processing in progress|concurrent modification is discouraged"
    "|duplicate archive attempt|destination session in use", re.IGNORECASE)
BUILD_INFO = "/xapi/siteConfig/buildInfo"
ADDRESS = re.compile(r"/data/prearchive/projects/([^/\s]+)/[^/\s]+/([^/\s]+)$")
# What to do about a refusal, by XNAT's own words (xnat.md 3, 6.2).
REMEDIES = (
    ("unable to read dicom|contains no sop",
     "copy that file again from its source, or move it out if it is no image, then run again"),
    ("matching files|same resources",
     "XNAT has some of these images: if another workdir sent them, run with that one; if they are "
     "newer here, --overwrite-files replaces XNAT's"),
    ("another subject|session subject", "the label belongs to another subject: rename the folder"),
    ("session uid|same uid", "XNAT has another study under this label: rename the folder"),
    ("http 413", "lower --max-files, or ask the admin to raise client_max_body_size"),
    ("http 504", "lower --max-files, or ask the admin to raise proxy_read_timeout"),
    ("http 403", "ask the project's owner for the right to edit"),
    ("http 5", "run again later; if it stays, ask the XNAT admin"),
    ("", "look at the session in XNAT's prearchive"),
)


Row = Dict[str, str]


class Xnat:
    """A server, one login and one project on it, through curl."""

    def __init__(self, settings: Settings, programs: Programs, teller: Teller) -> None:
        self.settings = settings
        self.programs = programs
        self.teller = teller
        self.project = settings.project
        self.project_path = f"/data/projects/{quote(settings.project, safe='')}"
        self.version = ""
        self.replaces = settings.overwrite_files  # whether XNAT replaces files it has
        self.subjects: Dict[str, str] = {}  # labels as XNAT has them, by those in lower case
        self.archived: Optional[Set[str]] = None  # labels in the project's archive
        self._cookie = ""
        self._numbers = itertools.count(1)

    # One request

    def ask(self, method: str, path: str, query: Optional[Dict[str, str]] = None, zipped: str = "",
            seconds: int = 0, moved: Callable[[float], None] = lambda _: None) -> Answer:
        """One request, with `zipped` (a path) as its file; `seconds` bounds the whole of it.

        `moved` is told from time to time how much of the file has gone out, 0 to 1.
        """
        url = self.settings.url + path + ("?" + urlencode(query) if query else "")
        options, folder = ["--silent", "--show-error"], "/"
        if zipped:
            # A plain name in curl's own folder: `;` and `,` in -F names mean something.
            # -F and not -T: XNAT then reads all before it answers, so that the status is always
            # seen and a body cut short imports nothing. Never --data-binary: it fills the memory.
            folder, name = os.path.split(zipped)
            options = ["--progress-bar", "--form", f"file=@{name};type=application/zip"]
            if self.settings.limit_rate:
                rate = max(1, self.settings.limit_rate // self.settings.procs)
                options += ["--limit-rate", str(rate)]
        elif method == "POST":
            options += ["--data", "", "--header", "Content-Type:"]
        elif method != "GET":
            options += ["--request", method]
        options += ["--max-time", str(seconds)] if seconds else []

        def watch(said: bytes) -> None:
            percent = re.findall(rb"(\d+\.\d)%", said[-200:])
            moved(min(0.99, float(percent[-1]) / 100) if percent else 0.0)

        return self._curl([url], options, folder, watch)[0]

    def ask_once(self, *paths: str) -> List[Any]:
        """The JSON at each of `paths`, all over one connection; None where it did not come."""
        urls = [f"{self.settings.url}{path}?format=json" for path in paths]
        found: List[Any] = []
        for answer in self._curl(urls, ["--silent", "--show-error", "--max-time", "60"]):
            try:
                found.append(json.loads(answer.body) if answer.status == 200 else None)
            except (ValueError, RecursionError):
                found.append(None)
        return found

    def _curl(self, urls: List[str], options: List[str], folder: str = "/",
              watch: Callable[[bytes], None] = lambda _: None) -> List[Answer]:
        """An answer from each URL, in their order."""
        settings, mark = self.settings, os.urandom(8).hex()
        # --disable must come first, or ~/.curlrc is read. --config -: login and cookie on
        # standard input, where `ps` does not see them. --globoff: no [] or {} in the URL.
        # --include: the headers come with the body. Never --fail (it hides the answer), never
        # --location (a redirect would be followed with the login).
        command = ["curl", "--disable", "--config", "-", "--globoff", "--include",
                   "--suppress-connect-headers", "--write-out", f"\n%{{http_code}} {mark}\n"]
        # A dead link would hang for ever; XNAT is silent while it imports, so this is minutes.
        command += ["--connect-timeout", str(min(30, settings.timeout)), "--speed-limit", "1",
                    "--speed-time", str(settings.timeout), "--max-filesize", "100000000"]
        command += ["--cacert", settings.cacert] if settings.cacert else []
        command += ["--insecure"] if settings.insecure else []
        command += options
        # The URL goes in there too: a curl whose parent dies before it is fed does nothing.
        secrets = "".join(f'url = "{quoted(url)}"\n' for url in urls)
        secrets += f'user = "{quoted(settings.user)}:{quoted(settings.password)}"\n'
        if self._cookie:  # with both, a server session that expired heals itself (xnat.md 7)
            secrets += f'cookie = "JSESSIONID={self._cookie}"\n'
        number = next(self._numbers)
        self.teller.log(f"curl {number}: {shlex.join(command[1:] + urls)}")
        done = self.programs.run(command, os.fsencode(secrets), folder, watch)
        answers = read_answers(done, mark, len(urls))
        for url, answer in zip(urls, answers):
            self._cookie = answer.cookie or self._cookie
            body = " ".join(answer.body.split())[:500]
            body = "" if "JSESSION" in url + body else body  # that is a secret
            self.teller.log(f"curl {number}: exit {answer.code} {answer.error} HTTP "
                            f"{answer.status} {body}")
        return answers

    def ask_until(self, about: str, request: Callable[[], Answer],
                  judge: Callable[[Answer], Verdict]) -> Tuple[Answer, Verdict, int]:
        """Repeat a request while its answer may heal; the last answer, its verdict, the tries.

        Raises Stop where no other request could fare better: login refused, server gone.
        """
        retries = self.settings.retries
        for tries in range(1, retries + 2):
            answer = request()
            verdict = judge(answer)
            if verdict.stop:
                raise Stop(verdict.message)
            if verdict.wait is None or tries > retries:
                break
            self.wait_to_heal(about, verdict, tries)
        if verdict.gone and not self.is_there():
            raise Stop(f"{self.settings.url}: the server is gone ({verdict.message}): run again "
                       "later, it goes on where it stopped")
        return answer, verdict, tries

    def wait_to_heal(self, about: str, verdict: Verdict, tries: int) -> None:
        """Announce a wait that grows with the tries, and wait."""
        # 1, 3, 9, 27, 81 s: a server that restarts is back within two minutes.
        pause = max(verdict.wait or 0.0, 3.0 ** min(tries - 1, 4)) * random.uniform(1.0, 1.3)
        self.teller.say(f"{about}: {verdict.message}; trying again in {pause:.0f} s "
                        f"({tries} of {self.settings.retries})")
        self.pause(pause)

    def pause(self, seconds: float) -> None:
        """Wait, unless the run is being stopped."""
        if self.programs.stopping.wait(seconds):
            raise Stop("stopping")

    def is_there(self) -> bool:
        """Whether anything that could be a working XNAT answers."""
        answer = self.ask("GET", BUILD_INFO, seconds=min(30, self.settings.timeout))
        return answer.code == 0 and answer.status not in BUSY_STATUS

    def get(self, path: str, query: Optional[Dict[str, str]] = None) -> Any:
        """The JSON at `path`, None if there is none (404). Raises Trouble for other answers."""
        query = dict(query or {}, format="json")
        answer, verdict, _ = self.ask_until(
            path, lambda: self.ask("GET", path, query), self.judge)
        if answer.status == 404:
            return None
        try:
            return json.loads(answer.body if answer.status == 200 else "")
        except (ValueError, RecursionError):
            raise Trouble(f"{path} cannot be read: {verdict.message or said(answer)}")

    def rows(self, path: str, query: Optional[Dict[str, str]] = None) -> Optional[List[Row]]:
        """A listing, None if there is none (404). Raises Trouble for other answers."""
        found = self.get(path, query)
        rows = table(found)
        if rows is None and found is not None:
            raise Trouble(f"{path} is no listing: is this XNAT's own address?")
        return rows

    # The server, once

    def meet(self) -> None:
        """Log in once and check the project, before any byte. Raises Stop(3) with the reason.

        XNAT itself refuses none of this at import: a wrong project gives 200 and the data goes
        into another one or to Unassigned (xnat.md 4.3, 7).
        """
        answer = self.ask("POST", "/data/JSESSION", seconds=60)
        if answer.status != 200 or not re.match(r"[0-9A-Za-z._-]{1,200}\s*$", answer.body):
            raise Stop(self.refusal(answer))
        self._cookie = answer.body.strip()
        try:
            self.project = self._find_project()
        except Trouble as trouble:
            raise Stop(f"project {self.settings.project}: {trouble}")
        self.project_path = f"/data/projects/{quote(self.project, safe='')}"
        # Not every server tells these to every user, and none of them is needed.
        info, subjects, archived, code = self.ask_once(BUILD_INFO, *(
            f"{self.project_path}/{what}" for what in ("subjects", "experiments",
                                                       "prearchive_code")))
        # Without a version the series of a session go one by one.
        self.version = str(info.get("version", "")) if isinstance(info, dict) else ""
        for row in table(subjects) or []:  # found without regard to case (xnat.md 4.4)
            self.subjects[row.get("label", "").lower()] = row.get("label", "")
        rows = table(archived)
        self.archived = None if rows is None else {row.get("label", "") for row in rows}
        self.replaces |= code == 5

    def _find_project(self) -> str:
        """The project's own ID (an alias may have been given), if this user may add to it."""
        wanted, user = self.settings.project, self.settings.user
        found = self.get(self.project_path)
        if found is None:
            raise Stop(f"project {wanted}: not on this XNAT, or {user} cannot see it: check its ID")
        try:
            project = str(found["items"][0]["data_fields"]["ID"])
        except (KeyError, IndexError, TypeError):
            raise Trouble("the server does not tell its ID: is this XNAT's own address?")
        query = {"permissions": "edit", "dataType": "xnat:subjectData"}
        if project not in [row.get("id") for row in self.rows("/data/projects", query) or []]:
            raise Stop(f"project {wanted}: {user} can see it but not add to it: ask its owner to "
                       f"make {user} a member")
        return project

    def takes_side_by_side(self) -> bool:
        """Whether series of one session may go at the same time: since 1.8.8 (XNAT-7535)."""
        return [int(number) for number in re.findall(r"[0-9]{1,9}", self.version)[:3]] >= [1, 8, 8]

    def close(self) -> None:
        """Give the server session back: a user has a limited number of them."""
        self.ask("DELETE", "/data/JSESSION", seconds=3)

    # What answers mean

    def refusal(self, answer: Answer) -> str:
        """Why the server does not let us in: one sentence with the remedy."""
        user, target = self.settings.user, answer.location
        if answer.code:
            why = curl_trouble(answer)
        elif answer.status == 401 or "Login" in target:
            why = (f"login refused for {user} (HTTP {answer.status}): check USER and PASS "
                   "(20 wrong ones lock the account for an hour; too many open sessions look the "
                   "same)")
        elif "UpdateUser" in target:
            why = f"the password of {user} has expired: set a new one in the browser"
        elif "InactiveAccount" in target:
            why = f"the account {user} is not active yet: ask the XNAT admin"
        elif target.startswith("https:") and self.settings.url.startswith("http:"):
            site = target[8:].partition("/")[0]
            path = "".join(self.settings.url[7:].partition("/")[1:])  # XNAT may have one of its own
            why = f"the server wants https: give https://{site}{path} as URL"
        elif target:
            why = f"the server redirects to {target}: give the address that XNAT itself has"
        elif answer.is_html and answer.status == 200:
            why = "a web page came instead of an answer (login?): is this XNAT's own address?"
        else:
            why = f"unexpected answer ({said(answer)}): is this XNAT's own address?"
        return f"{self.settings.url}: {why}"

    def judge(self, answer: Answer, files: int = 0) -> Verdict:
        """What any answer means for trying again; `files` is what XNAT may still be importing."""
        importing = 0.15 * files  # XNAT needs 46 to 75 ms a file: by then it is surely over
        if answer.code:
            heals = answer.code in CONNECTION_TROUBLE or answer.code < 0
            wait = (importing if answer.code == 28 else 0.0) if heals else None
            return Verdict(message=curl_trouble(answer), wait=wait, gone=heals)
        if answer.status == 401 or 300 <= answer.status < 400:
            return Verdict(message=self.refusal(answer), stop=True)
        if answer.status in BUSY_STATUS:  # a proxy that gave up (504) does not end the import
            wait = importing if answer.status == 504 else answer.retry_after
            return Verdict(message=said(answer), wait=wait, gone=answer.status >= 500)
        if answer.status == 400 and BUSY_WORDS.search(said(answer)):
            return Verdict(message=said(answer), wait=importing)
        if answer.status == 200 and answer.is_html:
            return Verdict(message=self.refusal(answer), stop="login" in answer.body.lower())
        return Verdict()

    def judge_part(self, answer: Answer, part: Part) -> Verdict:
        """What the answer to a part means. Only an address in our project and session is success:
        XNAT says 200 too when it kept nothing, or put it elsewhere (xnat.md 4.3)."""
        verdict = self.judge(answer, part.stop - part.start)
        if verdict.message:
            return verdict
        if answer.status != 200:
            return Verdict(message=f"the server refused it ({said(answer)}): {remedy(answer)}")
        addresses = sorted(set(answer.body.split()))
        for address in addresses:
            found = ADDRESS.search(address)
            if not found:
                return Verdict(message=f"no address came back ({address[:200]}): look in the log")
            if found[1] != self.project:
                raise Misplaced(f"project {self.project}: XNAT put {part.session.label} "
                                f"{part.series.name} into project {found[1]} ({address}): do not "
                                "run again, have it deleted there, and ask the XNAT admin")
            if found[2] != part.session.label:
                return Verdict(message=f"XNAT put it into another session ({address}): look there")
        if len(addresses) > 1:
            return Verdict(message=two_studies("series", addresses))
        if not addresses:
            return Verdict(message="XNAT kept none of these files (empty answer): ask the "
                           "project's owner about import filters and anonymization scripts")
        return Verdict(address=addresses[0][addresses[0].index("/data/"):])

    # One part

    def send(self, part: Part, workdir: Workdir, address: str, turn: Turn) -> Outcome:
        """Pack one part and POST it until it is sent, refused or out of tries (xnat.md 1, 2).

        `address` is where the session's earlier parts lie.
        """
        session = part.session
        query = {"import-handler": "DICOM-zip", "PROJECT_ID": self.project,
                 "SUBJECT_ID": session.subject_label, "EXPT_LABEL": session.label,
                 "overwrite": "append"}
        if not self.settings.no_commit:  # else five idle minutes archive half a session (6.1)
            query["prevent_auto_commit"] = "true"
        try:
            if turn.before:
                turn.before.has_room.wait()
            files = part.series.listing()[part.start:part.stop]
            total = sum(length for _, length, _ in files)
            with workdir.room_for(files) as zipped, self.teller.at_work(
                    f"{session.label} {part.series.name}", len(files), total) as moved:
                turn.has_room.set()
                pack(part.series, files, zipped, self.settings.compression, self.programs)
                zip_size = os.path.getsize(zipped)
                if not turn.comes():
                    return Outcome()  # the one before says why
                address = turn.before.address if turn.before else address
                answer, verdict, tries = self.ask_until(
                    f"{session.label} {part.series.name}",
                    lambda: self.ask("POST", "/data/services/import", query, zipped, moved=moved),
                    lambda answer: self.judge_part(answer, part))
                moved(1.0 if verdict.address else 0.0)
                turn.address = verdict.address
                if answer.status in (413, 504):  # a proxy's limits: how big was it?
                    message = (f"{said(answer)}, for a zip of {size(zip_size)} with "
                               f"{plural(len(files), 'file')}: {remedy(answer)}")
                    verdict = replace(verdict, message=message)
                away = verdict.address and address and verdict.address != address
                return Outcome(verdict.address, verdict.message, zip_size, tries, answer.status,
                               bool(away) and not self.settled(address))
        except (Trouble, OSError) as trouble:
            return Outcome(message=str(trouble))
        finally:
            turn.end()

    # A whole session

    def look(self, session: Session, memory: Memory, to_send: bool) -> Standing:
        """How the server holds a session before this run does anything to it."""
        try:
            # First wait for a commit that an earlier run may have left going, then count.
            if memory.address and self.settled(memory.address):
                return Standing("open")
            path = self._archive_path(session)
            if memory.address:
                return self._gone(session, memory)
            if to_send:
                there = self.archived is None or session.label in self.archived
                return Standing("new", files=self.count(path) or 0 if there else 0)
            if memory.ended == "prearchived" and not self.settled(memory.path):
                standing = self._verify(session, memory, "archived", path)
                return standing if not standing.message else Standing(
                    message="it was left for review, and is neither in the prearchive nor in the "
                    f"archive any more: {anew(session)}")
            standing = self._verify(session, memory, memory.ended, memory.path)
            if standing.message and not standing.files:
                return Standing(message=f"an earlier run saw it {memory.ended}, and it is not "
                                f"there any more: {anew(session)}")
            return standing
        except (Trouble, OSError) as trouble:
            return Standing(message=str(trouble))

    def commit(self, session: Session, memory: Memory) -> Standing:
        """Commit a whole session, and verify it by the server's own count (xnat.md 6.2, 8)."""
        with self.teller.at_work(f"archiving {session.label}"):
            return self._commit(session, memory)

    def _commit(self, session: Session, memory: Memory) -> Standing:
        address, query = memory.address, {"action": "commit"}
        if self.settings.overwrite_files:
            query["overwrite_files"] = "true"
        try:
            for tries in itertools.count(1):
                answer = self.ask("POST", address, query)
                found = re.search(r"/data/archive(/projects/\S+)", answer.body)
                if answer.status == 301 and found:  # the subject's label may differ in case
                    return self._verify(session, memory, "archived", "/data" + found[1])
                if answer.status == 200 and "/data/prearchive/" in answer.body:
                    return self._verify(session, memory, "prearchived", address)
                verdict = Verdict() if answer.status == 301 else self.judge(answer)
                if verdict.stop:
                    raise Stop(verdict.message)
                # Refused, or the answer was lost on the way while XNAT went on: look.
                status = self.settled(address)
                if not status:
                    standing = self._gone(session, memory)
                    return standing if standing.where != "lost" else Standing(
                        message="it is gone from the prearchive, and XNAT's archive does not have "
                        "it: run again to send it again")
                lost = verdict.wait is not None or answer.status == 409 and "locked" in said(answer)
                again = lost and status in ("RECEIVING", "READY")
                if not again or tries > self.settings.retries:
                    break
                verdict = replace(verdict, message=said(answer))
                self.wait_to_heal(f"commit of {session.label}", verdict, tries)
            if lost:  # XNAT keeps the reason
                answer = self.ask("GET", address + "/logs/last")
            return Standing(message=f"XNAT did not archive it ({said(answer)}): {remedy(answer)}")
        except (Trouble, OSError) as trouble:
            return Standing(message=str(trouble))

    def _gone(self, session: Session, memory: Memory) -> Standing:
        """What a session has come to that left the prearchive: by a commit whose answer was lost,
        by a timer, or by hand."""
        standing = self._verify(session, memory, "archived", self._archive_path(session))
        lost = standing.message and standing.files <= memory.before
        return Standing("lost", files=standing.files) if lost else standing

    def _archive_path(self, session: Session) -> str:
        subject = self.subjects.get(session.subject_label.lower(), session.subject_label)
        return f"{self.project_path}/subjects/{subject}/experiments/{session.label}"

    def settled(self, address: str) -> str:
        """Status of a prearchive session once nothing works on it; '' if it is not there."""
        for wait in (1.0, 2.0, 5.0, 10.0) + (30.0,) * 60:
            rows = self.rows(address)
            status = rows[0].get("status", "") if rows else ""
            # _BUILDING, ARCHIVING, QUEUED_ARCHIVING, MOVING ...: nobody may touch it (xnat.md 5)
            if not status.startswith("_") and (not status.endswith("ING") or status == "RECEIVING"):
                return status
            if wait == 2.0:
                self.teller.say(f"{address}: XNAT is at work on it ({status}): waiting")
            self.pause(wait)
        raise Trouble(f"XNAT is still at work on it ({address} is {status}): run again later")

    def count(self, path: str) -> Optional[int]:
        """DICOM files that the server counts in a built session, None if it is not there."""
        # One request for all scans, where the server knows that way and forgets none.
        everything = "/resources" if "/prearchive/" in path else "/scans/ALL/resources"
        scans, rows = map(table, self.ask_once(path + "/scans", path + everything))
        scans = self.rows(path + "/scans") if scans is None else scans
        if scans is None:
            return None
        names = [scan.get("id", "") for scan in scans]
        folders = {name: f"{path}/scans/{quote(name, safe='')}/resources" for name in names}
        if rows is None or not set(folders) <= {row.get("cat_id", "") for row in rows}:
            rows = [dict(row, cat_id=scan) for scan, folder in folders.items()
                    for row in self.rows(folder) or []]
        total = 0
        for row in rows:
            scan, label, count = (row.get(name, "") for name in ("cat_id", "label", "file_count"))
            if scan in folders and label in ("DICOM", "secondary"):
                if not re.fullmatch("[0-9]{1,9}", count):  # an old catalog without statistics
                    count = str(len(self.rows(f"{folders[scan]}/{label}/files") or []))
                total += int(count)
        return total

    def _verify(self, session: Session, memory: Memory, where: str, path: str) -> Standing:
        """Compare the server's count with what was sent, and what was there before."""
        least = memory.files_sent(session, memory.address or memory.path)
        if where == "archived":
            # What it replaces does not add to the count; all that was ever sent must be there.
            added = 0 if self.replaces or not memory.address else least
            least = max(memory.files_sent(session), memory.before + added)
        counted = self.count(path) or 0
        doubles = copies(session) if counted < least else 0
        if doubles and counted >= least - doubles:
            self.teller.say(f"{session.label}: {plural(doubles, 'file')} equal in name and image "
                            "to others of the session: XNAT keeps one of each")
            least = counted
        # More can only be what was there before, or an earlier state of the folder.
        ever = sum(stop - start for parts in memory.sent.values() for _, start, stop, _ in parts)
        strange = memory.address and not memory.before and ever == least
        if counted < least or counted > least and strange:
            return Standing(where, f"{where}, but XNAT counts {counted} files where {least} should "
                            f"be: compare {path} with the folder (an import filter may drop some, "
                            "others may have sent some)", counted, least, path)
        if counted > least:
            self.teller.say(f"{session.label}: XNAT counts {counted} files, {counted - least} more "
                            "than the folder: they were there before, or came from elsewhere")
        return Standing(where, files=counted, path=path)


def quoted(text: str) -> str:
    """`text` for a double-quoted value in curl's config."""
    return text.replace("\\", "\\\\").replace('"', '\\"')


def read_answers(done: subprocess.CompletedProcess[bytes], mark: str, count: int) -> List[Answer]:
    """Take curl's output apart: each answer ends with its HTTP status and `mark`."""
    pieces = re.split(rb"\n(\d{3}) " + mark.encode() + rb"\n", done.stdout)
    pieces = pieces[:-1] or [done.stdout, b"000"]  # curl was killed: no mark, no status
    pairs = list(zip(pieces[::2], pieces[1::2]))[:count]
    pairs += [(b"", b"000")] * (count - len(pairs))
    # The exit status is that of the last one; of the others the HTTP status tells.
    return [read_answer(out, int(status), done if at == count else None)
            for at, (out, status) in enumerate(pairs, 1)]


def read_answer(out: bytes, status: int,
                done: Optional[subprocess.CompletedProcess[bytes]]) -> Answer:
    """One answer: the headers of each hop, then the body."""
    found = re.match(rb"(?:HTTP/[^\n]*\n(?:[^\r\n][^\n]*\n)*\r?\n)+", out)
    head = found[0].decode("latin-1") if found else ""

    def header(pattern: str) -> str:
        match = re.search(rf"(?im)^{pattern}", head)
        return match[1].strip() if match else ""

    code, told = (done.returncode, done.stderr.decode("utf-8", "replace")) if done else (0, "")
    error = re.search(r"curl: \(\d+\) (.*)", told, re.DOTALL)  # after the bars of its progress
    wait = header(r"retry-after: *(\d{1,6})\s*$")
    return Answer(
        code, 0 if code else status,  # after a failed transfer curl may still say 100 or 200
        out[len(head):].decode("utf-8", "replace"),
        " ".join(error[1].split())[:200] if error else "",
        header(r"location:(.*)$"),
        min(600.0, float(wait or 0)),  # no server is waited for longer than ten minutes
        # A new server session where the old one had expired; not the guest's of a refusal.
        header(r"set-cookie: *JSESSIONID=([0-9A-Za-z._-]+)") if status == 200 else "")


def table(found: Any) -> Optional[List[Row]]:
    """The rows of a listing with lower-case column names (xnat.md 8), None if it is none."""
    try:
        return [{key.lower(): "" if value is None else str(value) for key, value in row.items()}
                for row in found["ResultSet"]["Result"]]
    except (KeyError, TypeError, AttributeError):
        return None


def curl_trouble(answer: Answer) -> str:
    """curl's exit status in words, with curl's own as the evidence."""
    words = CURL_TROUBLE.get(answer.code, "curl was killed" if answer.code < 0 else "curl failed")
    if answer.code == 60:
        words = next((words for sign, words in CERTIFICATES if sign in answer.error), words)
    what, _, to_do = words.partition(": ")
    return (f"{what} (curl exit {answer.code}{', ' if answer.error else ''}{answer.error}): "
            f"{to_do or 'run again'}")


def said(answer: Answer) -> str:
    """The server's own sentence: Restlet puts it in <h3>, others in <title> or in plain text."""
    if answer.code:
        return curl_trouble(answer)
    for pattern in (r"<h3>(.*?)</h3>", r"<title>(.*?)</title>", r"(.*)"):
        found = re.search(pattern, answer.body, re.DOTALL | re.IGNORECASE)
        if found:
            break
    text = html.unescape(re.sub(r"<[^>]*>", " ", found[1] if found else ""))
    return ", ".join(filter(None, (f"HTTP {answer.status}", " ".join(text.split())[:300])))


def remedy(answer: Answer) -> str:
    """What to do about a refusal."""
    return next(advice for words, advice in REMEDIES if re.search(words, said(answer).lower()))


def anew(session: Session) -> str:
    """How to send all of a session again."""
    return f"to send it anew, add --again --only {shlex.quote(glob.escape(session.path))}"


def two_studies(kind: str, addresses: List[str]) -> str:
    return (f"two studies in one {kind} folder, or another run sends the same session; XNAT made "
            f"two sessions ({', '.join(addresses)}): move one study to a folder of its own, "
            "or let that run end; delete both in the prearchive, then run again")


SOP_INSTANCE = re.compile(
    rb"(?:\x02\x00\x03\x00UI..|\x08\x00\x18\x00(?:UI..|.{4}))([0-9.]+)", re.DOTALL)


def copies(session: Session) -> int:
    """How many files XNAT will not keep beside their equals: same name, same image (xnat.md 9)."""
    seen = set()
    total = 0
    for series in session.series:
        for name, _, _ in series.listing():
            instance = SOP_INSTANCE.search(first_bytes(os.path.join(series.folder, name)))
            stored = re.sub(r"[^A-Za-z0-9_.-]", "_", os.path.basename(name))
            seen.add((stored, instance[1] if instance else name))
            total += 1
    return total - len(seen)


# ---- ledger --------------------------------------------------------------------------------


@dataclass
class Memory:
    """What earlier runs and this one have done for one session."""

    # By series: fingerprint, start, stop and address of each part that is sent.
    sent: Dict[str, List[Tuple[str, int, int, str]]] = field(default_factory=dict)
    address: str = ""  # where this round's parts lie until they are committed
    before: int = 0  # what the archive held before this round
    ended: str = ""  # archived or prearchived
    path: str = ""  # where that is read
    owed: int = 0  # what it should have counted, where it did not

    def parts_left(self, session: Session, series: Series, max_files: int) -> List[Part]:
        """The parts of a series that are not on the server yet, for these very files."""
        done = sorted(each[1:3] for each in self.sent.get(series.name, [])
                      if each[0] == series.fingerprint)
        parts, at = [], 0
        for start, stop in done + [(series.files, series.files)]:
            while at < start:
                parts.append(Part(session, series, at, min(start, at + max_files)))
                at = parts[-1].stop
            at = max(at, stop)
        return parts

    def files_sent(self, session: Session, address: str = "") -> int:
        """How many files of the session, as they are now, were sent, at all or to `address`."""
        return sum(stop - start for series in session.series
                   for mark, start, stop, place in set(self.sent.get(series.name, []))
                   if mark == series.fingerprint and address in ("", place))

    def has_changed(self, series: Series) -> bool:
        """Whether other files of this series were sent before."""
        return any(each[0] != series.fingerprint for each in self.sent.get(series.name, []))

    def take(self, event: str, line: Dict[str, Any]) -> None:
        """Take in one event of the ledger."""
        if event == "opened":
            self.before = line["before"]
        elif event == "sent":
            part = (line["files"], line["from"], line["to"], line["address"])
            self.sent.setdefault(line["series"], []).append(part)
            self.address, self.ended, self.owed = line["address"], "", 0
        elif event == "lost":
            for name, parts in self.sent.items():
                self.sent[name] = [each for each in parts if each[3] != self.address]
            self.address = ""
        elif event in ("archived", "prearchived"):
            self.address, self.ended = "", event
            self.path, self.owed = line["path"], line["owed"]


class Ledger:
    """The file that remembers what was sent: JSON, a line each, synced; the last may be torn."""

    def __init__(self, settings: Settings, project: str, read_only: bool = False) -> None:
        """Raises Stop(3) if it cannot be read, or, unless `read_only`, written."""
        self.path = os.path.join(os.path.abspath(settings.workdir), "dicomUpload.ledger")
        self._where = {"v": 1, "server": settings.url, "project": project}
        self._sessions: Dict[Tuple[str, str], Memory] = {}
        if read_only and (settings.again or not os.path.exists(self.path)):
            return
        try:
            if not read_only:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
                self._file = os.fdopen(handle, "r+b", buffering=0)
            raw = b"\n"
            with open(self.path, "rb") as lines:
                for raw in lines:
                    self._read(raw)
            if not raw.endswith(b"\n") and not read_only:
                self._file.write(b"\n")
        except OSError as error:
            raise Stop(f"ledger {self.path}: cannot be used ({error.strerror}): mend it, it "
                       "remembers what was sent")

    def _read(self, raw: bytes) -> None:
        try:
            line = json.loads(raw)
            if all(line[key] == value for key, value in self._where.items()):
                self._take(line)
        except (ValueError, KeyError, TypeError):
            pass  # torn, or of another version: what it told of is sent again

    def _take(self, line: Dict[str, Any]) -> None:
        if line["event"] == "forget":
            self._sessions.pop((line["subject"], line["session"]), None)
        else:
            memory = self._sessions.setdefault((line["subject"], line["session"]), Memory())
            memory.take(line["event"], line)

    def of(self, session: Session) -> Memory:
        """What is known of a session."""
        return self._sessions.setdefault((session.subject_label, session.label), Memory())

    def add(self, session: Session, event: str, **more: Any) -> None:
        """Write an event down and sync it. Raises Stop(3) if that fails."""
        line = dict(self._where, at=now(), subject=session.subject_label, session=session.label,
                    event=event, **more)
        raw = json.dumps(line).encode() + b"\n"
        try:
            if self._file.write(raw) < len(raw):  # a full disk takes the first half in silence
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise Stop(f"ledger {self.path}: cannot be written ({error.strerror}): make room, then "
                       "run again")
        self._take(line)

    def close(self) -> None:
        self._file.close()


# ---- the run -------------------------------------------------------------------------------


@dataclass
class Tally:
    """One series on its way: what is left of it, and what has become of the rest."""

    series: Series
    parts: Deque[Part] = field(default_factory=deque)
    status: str = ""  # '' while on its way; sent, not sent, already there, left out, no DICOM
    message: str = ""
    jobs: int = 0  # parts that are packed or posted now
    last: Optional[Turn] = None  # of these jobs
    files: int = 0
    bytes: int = 0
    zipped: int = 0  # bytes
    started: float = 0.0
    seconds: float = 0.0
    tries: int = 0
    status_code: int = 0
    address: str = ""


class Journey:
    """One session on its way: the one place that says what may go next, and when it is whole."""

    def __init__(self, session: Session, memory: Memory, settings: Settings) -> None:
        self.session = session
        self.memory = memory
        self.settings = settings
        self.jobs = 0
        self.message = ""  # why the session as a whole failed
        self.verified = 0  # files that the server counted
        self.tallies = self.take_stock()
        # What was left for review, or was short, is counted again by each run.
        self.to_send = any(tally.parts for tally in self.tallies)
        unsure = memory.address or memory.owed or memory.ended == "prearchived"
        self.looked = not (self.to_send or unsure)

    def take_stock(self) -> List[Tally]:
        """Which parts of which series are left to send."""
        tallies = []
        for series in self.session.series:
            parts = self.memory.parts_left(self.session, series, self.settings.max_files)
            if series.left_out:
                tallies.append(Tally(series, status="left out", message=series.left_out))
            elif series.problem:
                tallies.append(Tally(series, status="not sent", message=series.problem))
            elif not series.files:
                junk = plural(series.not_dicom, "file")
                message = f"none of its {junk} is DICOM" if series.not_dicom else "is empty"
                tallies.append(Tally(series, status="no DICOM", message=message))
            else:
                tallies.append(Tally(series, deque(parts), "" if parts else "already there"))
        return tallies

    def next_job(self, side_by_side: bool) -> Tuple[str, Optional[Tally]]:
        """What this session may do now: look, send (and which series), commit; '' for nothing.

        Parts of one series go in order. Series go one by one until the first answer, which
        makes the session; then side by side, if the server can take it. A session is committed
        when all of it is sent, and nothing is sent while it is being committed.
        """
        if self.message or self.jobs and not (side_by_side and self.looked and self.memory.address):
            return "", None
        if not self.looked:
            return "look", None
        for tally in self.tallies:
            if tally.parts and not tally.jobs:
                return "send", tally
        whole = self.memory.address and not self.jobs and not self.failed()
        return ("commit" if whole and not self.settings.no_commit else ""), None

    def next_ahead(self) -> Optional[Tally]:
        """A series whose next part may be packed while the ones before it are posted.

        Only once no other series waits for a worker; two zips ahead keep the line busy.
        """
        if any(tally.parts and not tally.jobs for tally in self.tallies):
            return None
        return next((tally for tally in self.tallies if tally.parts and tally.jobs < 3), None)

    def next_part(self, tally: Tally, quick: bool) -> Part:
        """The next part of a series; of one file, if `quick`: its answer lets the others go."""
        part = tally.parts.popleft()
        if quick and not self.memory.address and part.stop - part.start > 1:
            tally.parts.appendleft(replace(part, start=part.start + 1))
            part = replace(part, stop=part.start + 1)
        return part

    def failed(self) -> bool:
        return bool(self.message) or any(tally.status == "not sent" for tally in self.tallies)

    def where(self) -> str:
        """How the session ended."""
        if self.message and self.memory.address:
            return "not archived"
        if self.failed():
            return "held back" if self.memory.address else "failed"
        return "sent" if self.memory.address else self.memory.ended or "nothing to send"


class Run:
    """The upload: starts jobs, takes their results, keeps ledger and telling right.

    Workers only pack, send, look and commit; what is decided is decided here, in one thread.
    """

    def __init__(self, plan: Plan, xnat: Xnat, workdir: Workdir, ledger: Ledger) -> None:
        self.xnat = xnat
        self.settings = xnat.settings
        self.teller = xnat.teller
        self.workdir = workdir
        self.ledger = ledger
        self.waiting = deque(plan.sessions)
        self.active: List[Journey] = []
        self.jobs = 0
        self.done: SimpleQueue[Tuple[Journey, Callable[[Journey, Any], None], Any]] = SimpleQueue()
        self.pool = ThreadPoolExecutor(self.settings.procs)

    def go(self) -> None:
        """Run until every session is over. Raises Stop; no job is left, whatever happens."""
        try:
            while self._start_jobs():
                with suppress(Empty):
                    self._take(*self.done.get(timeout=0.25))
                if self.teller.stopped:  # by a signal that came where Python drops exceptions
                    raise self.teller.stopped
                self.teller.progress()
        except BaseException:
            self.xnat.programs.stop()
            raise
        finally:
            self.pool.shutdown()
            while not self.done.empty():  # what was answered in the last moment counts
                journey, then, result = self.done.get()
                if not isinstance(result, BaseException):
                    self._take(journey, then, result)

    def _start_jobs(self) -> bool:
        """Give every free worker what may go next; False when nothing is left."""
        while self.jobs < self.settings.procs:
            if any(self._start_one(journey) for journey in self.active):
                continue
            if self.waiting:
                self._open(self.waiting.popleft())
            elif not any(self._start_ahead(journey) for journey in self.active):
                break
        return self.jobs > 0

    def _open(self, session: Session) -> None:
        """Bring a session under way."""
        journey = Journey(session, self.ledger.of(session), self.settings)
        if journey.memory.ended == "archived" and self.xnat.archived is not None:
            journey.looked &= session.label in self.xnat.archived  # deleted since?
        self.active.append(journey)
        if journey.looked:
            self._tell_known(journey)
        self._close_if_over(journey)

    def _start_one(self, journey: Journey) -> bool:
        """Start what this session may do next, if anything."""
        kind, tally = journey.next_job(self.xnat.takes_side_by_side())
        session, memory = journey.session, journey.memory
        if kind == "look":
            self._submit(journey, lambda: self.xnat.look(session, memory, journey.to_send),
                         self._looked)
        elif kind == "commit":
            self._submit(journey, lambda: self.xnat.commit(session, memory), self._settle)
        elif tally:
            self._start_part(journey, tally)
        return bool(kind)

    def _start_ahead(self, journey: Journey) -> bool:
        """Start packing what this session may post later, if anything."""
        tally = journey.next_ahead()
        if tally:
            self._start_part(journey, tally)
        return bool(tally)

    def _start_part(self, journey: Journey, tally: Tally) -> None:
        # While a long session is the only one, nobody works until its first answer has come.
        waiting = sum(1 for each in journey.tallies if each.parts)
        alone = not self.waiting and len(self.active) == 1 and waiting > self.settings.procs > 1
        quick = alone and not journey.jobs and self.xnat.takes_side_by_side()
        part = journey.next_part(tally, quick)
        address, turn = journey.memory.address, Turn(tally.last if tally.jobs else None)
        tally.jobs += 1
        tally.last = turn
        tally.started = tally.started or time.monotonic()
        self._submit(journey, lambda: self.xnat.send(part, self.workdir, address, turn),
                     lambda journey, outcome: self._sent(journey, tally, part, outcome))

    def _submit(self, journey: Journey, work: Callable[[], Any],
                then: Callable[[Journey, Any], None]) -> None:
        def job() -> None:
            try:
                self.done.put((journey, then, work()))
            except BaseException as error:  # the main thread decides
                self.done.put((journey, then, error))

        try:
            self.pool.submit(job)
        except RuntimeError:  # of threads or memory
            raise Stop("this system starts no more threads: lower --procs")
        self.jobs += 1
        journey.jobs += 1

    def _take(self, journey: Journey, then: Callable[[Journey, Any], None], result: Any) -> None:
        """Take in the end of a job."""
        self.jobs -= 1
        journey.jobs -= 1
        if isinstance(result, BaseException):
            raise result
        then(journey, result)
        self._close_if_over(journey)

    def _looked(self, journey: Journey, standing: Standing) -> None:
        session, journey.looked = journey.session, True
        self._settle(journey, standing)
        if standing.where == "lost":
            self.teller.say(f"{session.label}: is no longer in the prearchive: sending it again")
            journey.tallies = journey.take_stock()
        if standing.where in ("archived", "lost", "new"):
            self.ledger.add(session, "opened", before=standing.files)
        self._tell_known(journey)

    def _settle(self, journey: Journey, standing: Standing) -> None:
        """Write down where the parts of a session are now: archived, for review, or lost."""
        journey.message, journey.verified = standing.message, standing.files
        if standing.where in ("archived", "prearchived", "lost"):
            self.ledger.add(journey.session, standing.where, files=standing.files,
                            owed=standing.owed, path=standing.path)

    def _tell_known(self, journey: Journey) -> None:
        """Tell of the series that need no sending, and of those that have changed."""
        for tally in journey.tallies:
            if tally.status:
                self.teller.series(journey.session, tally)
            elif journey.memory.has_changed(tally.series):
                self.teller.say(f"{journey.session.label} {tally.series.name}: has changed since "
                                "it was sent: sent again (where the archive has it, XNAT refuses "
                                "the session unless --overwrite-files)")

    def _sent(self, journey: Journey, tally: Tally, part: Part, outcome: Outcome) -> None:
        tally.jobs -= 1
        tally.tries += outcome.tries
        tally.status_code = outcome.status
        tally.seconds = time.monotonic() - tally.started
        session, here = journey.session, journey.memory.address or outcome.address
        if outcome.moved and outcome.address != here:
            self.teller.say(f"{session.label}: XNAT archived what was sent before by itself")
            self.ledger.add(session, "archived", files=0, owed=0, path="")
            here = outcome.address
        if outcome.address and outcome.address != here:
            message = two_studies("session", [here, outcome.address])
            outcome = replace(outcome, address="", message=message)
        if outcome.address:
            self.ledger.add(journey.session, "sent", series=tally.series.name, address=here,
                            files=tally.series.fingerprint, **{"from": part.start, "to": part.stop})
            tally.files += part.stop - part.start
            tally.bytes += part.bytes
            tally.zipped += outcome.zipped
            tally.address = here
        else:
            tally.parts.clear()
            tally.message = tally.message or outcome.message
        if not tally.parts and not tally.jobs:
            tally.status = "not sent" if tally.message else "sent"
            self.teller.series(journey.session, tally)

    def _close_if_over(self, journey: Journey) -> None:
        """Say how a session ended for which nothing is left to do."""
        if not journey.jobs and not journey.next_job(False)[0]:
            self.active.remove(journey)
            where = journey.where()
            self._report(journey, journey.message or ("" if where == "archived" else ENDS[where]))
            self.teller.session(journey)

    def _report(self, journey: Journey, message: str) -> None:
        """A row in the report for each series; `message` is for all that have none of their own."""
        for tally in journey.tallies:
            tally.status = tally.status or "not sent"
            if tally.status in ("sent", "not sent", "already there"):
                tally.message = tally.message or message
            self.teller.report(journey.session, tally)

    def tell_rest(self) -> List[str]:
        """Write into the report what a stop left undone; the series that it did not reach."""
        waiting = (Journey(each, self.ledger.of(each), self.settings) for each in self.waiting)
        rest = []
        for journey in itertools.chain(self.active, waiting):
            rest += [f"{journey.session.label} {tally.series.name}" for tally in journey.tallies
                     if not tally.status]
            self._report(journey, "the run was stopped before its session was whole: run again")
        return rest


# ---- telling -------------------------------------------------------------------------------


REPORT = ("subject", "session", "series", "label", "status", "files", "not-DICOM files",
          "bytes sent", "seconds", "tries", "HTTP status", "server's address", "message")
# How a session ended, in words.
ENDS = {
    "archived": "archived",
    "prearchived": "in the prearchive, waiting for review",
    "sent": "sent, in the prearchive until XNAT archives it (--no-commit)",
    "not archived": "not archived",
    "held back": "held back in the prearchive until every series is sent",
    "failed": "not there",
    "nothing to send": "nothing to send",
}


class Teller:
    """The one place that prints: results to stdout, the rest to stderr, all of it to the log."""

    HEARTBEAT = 60.0  # seconds without a line after which a log shows that the run is alive

    def __init__(self) -> None:
        self.failures: List[str] = []
        self.report_path = ""
        self.quiet = self.verbose = False
        self.stopped: Optional[Stop] = None  # by a signal
        self._sessions: Counter[str] = Counter()
        self._series: Counter[str] = Counter()
        self._files = self._bytes = self._zipped = 0
        self._at_work: Dict[object, Tuple[str, float]] = {}  # what goes on, bytes of it gone out
        self._goal = (0, 0)  # series and bytes to send
        self._widths = (0, 0)  # of labels and of series names
        self._began = self._heard = self._drawn = time.monotonic()
        self._lock = threading.RLock()
        self._handles: Dict[str, int] = {}  # of log and report, once they are open
        self._moves = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = False  # whether the moving line is on the screen

    def open_files(self, settings: Settings) -> None:
        """Begin log and report in the workdir, readable by their owner only."""
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        first = os.path.join(os.path.abspath(settings.workdir), f"{settings.logname}_{stamp}")
        base = first
        for number in itertools.count(2):  # for runs within one second
            if not os.path.exists(base + ".log"):
                break
            base = f"{first}-{number}"
        self.report_path = base + ".csv"
        for kind, path in (("log", base + ".log"), ("report", self.report_path)):
            self._handles[kind] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._write("report", csv_line(REPORT))
        self.log(f"dicomUpload {VERSION}: {settings.command}")

    # One line

    def log(self, text: str) -> None:
        """A line for the log only; with --verbose on stderr too."""
        self._keep(text)
        if self.verbose:
            self._show(sys.stderr, f"  {text}")

    def line(self, text: str = "", important: bool = True) -> None:
        """A result: a line on stdout and in the log. --quiet shows only what is `important`."""
        self._keep(text)
        if important or not self.quiet:
            self._show(sys.stdout, text)

    def say(self, text: str, drawing: str = "") -> None:
        """A warning, an error or a wait: a line on stderr and in the log, maybe with a drawing."""
        self._keep(text)
        for line in (f"dicomUpload: {text}", *drawing.splitlines()):
            self._show(sys.stderr, line)

    def _keep(self, text: str) -> None:
        self._write("log", f"{now()} {printable(text)}\n")

    def _write(self, kind: str, text: str) -> None:
        with self._lock:
            if kind in self._handles:
                try:
                    os.write(self._handles[kind], text.encode("utf-8", "backslashreplace"))
                except OSError as error:
                    self._handles.clear()  # so that this can be said
                    raise Stop(f"{kind} beside {self.report_path}: cannot be written "
                               f"({error.strerror}): make room, then run again")

    def _show(self, stream: TextIO, text: str) -> None:
        """Print a line."""
        with self._lock:
            self._erase()
            self._heard = time.monotonic()
            coding = stream.encoding or "ascii"
            put(stream, printable(text).encode(coding, "backslashreplace").decode(coding) + "\n")

    # While it goes on

    @contextmanager
    def at_work(self, name: str, files: int = 0, total: int = 0
                ) -> Iterator[Callable[[float], None]]:
        """While something goes on: a way to tell which share of its `total` bytes has gone out."""
        mine = object()

        def moved(share: float) -> None:
            with self._lock:
                self._at_work[mine] = (name, share * total)

        moved(0.0)
        try:
            yield moved
        finally:
            with self._lock:
                if self._at_work.pop(mine)[1] == total:
                    self._files += files
                    self._bytes += total

    def progress(self) -> None:
        """On a terminal the one moving line; elsewhere a line now and then."""
        with self._lock:
            moment = time.monotonic()
            if self._moves and not self.quiet and moment > self._drawn + 0.1:
                self._drawn = moment
                columns = 0
                with suppress(OSError):
                    columns = os.get_terminal_size(sys.stderr.fileno()).columns
                self._erase()
                put(sys.stderr, fitting(self._standing(), (columns or 80) - 1))
                self._shown = True
            elif not (self._moves or self.quiet) and moment > self._heard + self.HEARTBEAT:
                self.say(f"still at work: {self._standing()}")

    def _standing(self) -> str:
        """How far it is, how fast, how long it will take, and what is going on."""
        series, total = self._goal
        sent = self._bytes + sum(each for _, each in self._at_work.values())
        rate = sent / max(1.0, time.monotonic() - self._began)
        left = "  waiting for XNAT" if sent else ""
        if 0 < sent < 0.99 * total:
            left = f"  {duration((total - sent) / rate)} left"
        names = [name for name, _ in self._at_work.values()][:1]
        return (f"[{self._series['sent']} of {series} series  {size(sent)} of {size(total)}  "
                f"{size(rate)}/s{left}]  {''.join(names)}")

    def _erase(self) -> None:
        if self._shown:
            put(sys.stderr, "\r\033[K")
            self._shown = False

    # Before

    def plan(self, plan: Plan, to_send: List[Part]) -> None:
        """What is about to happen, in a few lines."""
        pairs = list(plan.pairs())
        series = {id(part.series) for part in to_send}
        files = sum(part.stop - part.start for part in to_send)
        self._goal = (len(series), sum(part.bytes for part in to_send))
        self._widths = (max((len(session.label) for session in plan.sessions), default=0),
                        min(40, max((len(printable(each.name)) for _, each in pairs), default=0)))
        self._began = time.monotonic()
        subjects = len({session.subject_label for session in plan.sessions})
        left_out = sum(1 for _, each in pairs if each.left_out)
        self.line(f"{plural(subjects, 'subject')}, {plural(len(plan.sessions), 'session')}: "
                  f"{len(series):,} series to send ({plural(files, 'file')}, "
                  f"{size(self._goal[1])}), {left_out:,} left out", important=False)
        if plan.not_chosen:
            self.line(f"{plural(plan.not_chosen, 'session')} left out by --only", important=False)
        named = " (named in the log)" if self._handles else ""
        junk = sum(each.not_dicom for _, each in pairs)
        if junk:
            self.line(f"{plural(junk, 'file')} not DICOM{named}: not sent")
        if plan.strays:
            self.say(f"{plan.strays[0]}: {plural(len(plan.strays), 'file')} where folders "
                     f"belong{named}: not sent")
        for stray in plan.strays:
            self.log(f"where a folder belongs: {stray}")
        for folder, names in plan.loose.items():
            count = plural(len(names), "DICOM file")
            self.failures.append(f"{folder}: {count} where folders belong"
                                 f" ({names[0]}): put them into a series folder, then run again")
        for session in plan.sessions:
            if session.label != session.path.rstrip("/").replace("/", "_"):
                self.line(f"{session.path} becomes session {session.label} of subject "
                          f"{session.subject_label}", important=False)
        self.line(important=False)

    def dry_run(self, plan: Plan, to_send: List[Part], ledger: Ledger, settings: Settings,
                not_dicom: List[str]) -> None:
        """Every series with what would become of it, and whether there is room."""
        for session in plan.sessions:
            self.line(f"{session.path} goes to subject {session.subject_label}, session "
                      f"{session.label}{'' if session.series else ': nothing to send'}",
                      important=False)
            journey = Journey(session, ledger.of(session), settings)
            for tally in journey.tallies:
                detail = tally.message
                if not tally.status:
                    files = sum(part.stop - part.start for part in tally.parts)
                    total = sum(part.bytes for part in tally.parts)
                    detail = f"{plural(files, 'file'):>11}  {size(total):>8}"
                    if journey.memory.has_changed(tally.series):
                        detail += "  (has changed since it was sent)"
                self._series_line(session.label, tally.series, tally.status or "would send", detail)
        self.line()
        for each in not_dicom[:20]:
            self.line(each)
        if not_dicom[20:]:
            self.line(f"not DICOM: {plural(len(not_dicom) - 20, 'file')} more")
        folder = os.path.abspath(settings.workdir)
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        free = shutil.disk_usage(folder).free
        need = [part.room for part in heapq.nlargest(settings.procs, to_send, lambda p: p.room)]
        self.line(f"Room for zips in {settings.workdir}: {size(free)} free, up to "
                  f"{size(sum(need))} needed at once")
        if need and need[0] > free:
            self.failures.append(f"workdir {settings.workdir}: too full for the largest zip "
                                 f"({size(need[0])}): make room, or lower --max-files")
        for failure in self.failures:
            self.line(f"Would not be sent: {failure}")
        self.line(f"Nothing was sent and nobody contacted. To send: {settings.command}")

    # After

    def _series_line(self, label: str, series: Series, status: str, detail: str) -> None:
        widths, failed = self._widths, status == "not sent"
        if failed:
            self.failures.append(f"{label} {series.name}: {detail}")
        if series.not_dicom and series.files:
            detail += f"  ({series.not_dicom} not DICOM)"
        self.line(f"{label:<{widths[0]}}  {printable(series.name):<{widths[1]}}  {status:<13} "
                  f"{detail}".rstrip(), important=failed)

    def series(self, session: Session, tally: Tally) -> None:
        """One line for a series that is settled."""
        detail = tally.message
        self._series[tally.status] += 1
        if tally.status == "sent":
            detail = (f"{plural(tally.files, 'file'):>11}  {size(tally.bytes):>8}  "
                      f"{tally.seconds:.1f} s")
            self._zipped += tally.zipped
        self._series_line(session.label, tally.series, tally.status, detail)

    def report(self, session: Session, tally: Tally) -> None:
        """One row in the report."""
        subject, _, name = session.path.partition("/")
        files = tally.files if tally.status == "sent" else tally.series.files
        row = (subject, name, tally.series.name, session.label, tally.status, files,
               tally.series.not_dicom, tally.zipped, f"{tally.seconds:.1f}", tally.tries,
               tally.status_code or "", tally.address, tally.message)
        self._write("report", csv_line([cell(each) for each in row]))

    def session(self, journey: Journey) -> None:
        """One line for a session that is over."""
        where, label = journey.where(), journey.session.label
        self._sessions[where] += 1
        text = ENDS[where]
        if journey.message:
            self.failures.append(f"{label}: {journey.message}")
            text = journey.message
        elif where in ("archived", "prearchived"):
            files = plural(journey.verified, "file")
            text += f", {files} verified" if journey.verified else ", counted by an earlier run"
            self._sessions["earlier"] += not journey.verified
        self.line(f"{label}  {text}", important=journey.failed())

    def summary(self, run: Run, rest: List[str], again: bool) -> None:
        """The end: how much is there, each failure again, what a stop left, and what to do."""
        ends, seconds = self._sessions, time.monotonic() - self._began
        unfinished = len(run.active) + len(run.waiting)
        total = sum(ends.values()) - ends["earlier"] + unfinished
        there = ends["archived"] + ends["prearchived"]
        words = [f"{there} of {plural(total, 'session')} archived and verified"]
        if ends["prearchived"]:
            words = [f"{there} of {plural(total, 'session')} verified, {ends['prearchived']} of "
                     "them in the prearchive"]
        if ends["earlier"]:
            words[0] += f" ({ends['earlier']} of them by an earlier run)"
        words += [f"{ends[end]} {end}" for end in ("sent", "not archived", "held back", "failed",
                                                   "nothing to send") if ends[end]]
        words += [f"{unfinished} not finished"] if unfinished else []
        self.line(important=False)
        self.line("; ".join(words) + ".")
        counts = (f"{self._series[status]:,} {word}" for status, word in (
            ("sent", "sent"), ("already there", "already there"), ("left out", "left out"),
            ("no DICOM", "without DICOM"), ("not sent", "failed")) if self._series[status])
        self.line(f"Series: {', '.join(counts) or 'none finished'}.")
        if self._files:
            self.line(f"{plural(self._files, 'file')}, {size(self._bytes)} "
                      f"({size(self._zipped)} zipped) in {duration(seconds)} "
                      f"({size(self._bytes / max(seconds, 0.1))}/s).")
        halves = [journey.session.label for journey in run.active if journey.memory.address]
        if halves:
            self.line(f"Not whole in the prearchive, do not archive by hand: {', '.join(halves)}")
        for failure in self.failures:
            self.line(f"Not there: {failure}")
        for name in rest[:20]:
            self.line(f"Not there: {name}: not reached, the run was stopped")
        if rest[20:]:
            self.line(f"Not there: {len(rest) - 20:,} series more, named in the report")
        if (self.failures or unfinished) and again:
            self.line(f"Run the same command again to finish: {run.settings.command}")
        elif not (self.failures or unfinished or ends["sent"]):
            self.line("All is there.")
        if ends["prearchived"]:
            self.line("Those in the prearchive wait for review: somebody must archive them there.")
        if ends["sent"]:
            self.line("What is sent waits for XNAT to archive it, and is not verified: run again "
                      "later without --no-commit.")
        self.line(f"Report: {self.report_path}")


def put(stream: TextIO, text: str) -> None:
    """Write at once. A reader that has gone away (`| head`, a terminal) stops no upload."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def csv_line(row: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text).writerow(row)
    return text.getvalue()


def fitting(text: str, columns: int) -> str:
    """As much of `text` as fits: letters of some scripts are two columns wide, accents none."""
    widths = itertools.accumulate(
        0 if unicodedata.combining(each) else 1 + (unicodedata.east_asian_width(each) in "WF")
        for each in printable(text))
    return "".join(each for each, width in zip(printable(text), widths) if width <= columns)


def printable(text: str) -> str:
    """`text` with control characters, line breaks and bytes that are no text made visible."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode()
                   for each in text)


def cell(value: object) -> str:
    """A value that no spreadsheet takes for a formula."""
    text = printable(str(value))
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text


def now() -> str:
    return datetime.datetime.now().isoformat(sep=" ", timespec="milliseconds")


def size(count: float) -> str:
    """Bytes, for people."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            digits = 1 if unit != "bytes" and count < 10 else 0
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def duration(seconds: float) -> str:
    """Seconds, for people."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else (
        f"{seconds} s")


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


# ---- options -------------------------------------------------------------------------------


GROUPS = {"url": "what goes where", "config": "what to send", "no_commit": "on the server",
          "workdir": "how to send", "quiet": "what to show"}  # titles in --help


class Parser(argparse.ArgumentParser):
    """Options whose errors are one line, like all others here."""

    def error(self, message: str) -> NoReturn:
        # argparse repeats what it does not understand, and that may be a password.
        words = message.partition("unrecognized arguments: ")[2].split()
        if words or "explicit argument" in message:
            names = [word.partition("=")[0] for word in words if re.match(r"--[a-z]|-.$", word)]
            message = f"options {' '.join(names)}: unknown" if names else "arguments: too many"
            message += " (if PASS begins with -, set XNAT_PASS and give - instead)"
        refuse(message, "see --help")


def read_options(argv: List[str]) -> Settings:
    """The command line as Settings. Raises Stop(2) if it is wrong."""
    parser = Parser(
        prog="dicomUpload.py", usage="dicomUpload.py [options] URL USER PASS PROJECT ROOTDIR",
        description=ABOUT, epilog=f"{EXAMPLES}\n\n{STATUSES}", allow_abbrev=False, add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for each in fields(Settings):
        if each.name in GROUPS:
            group = parser.add_argument_group(GROUPS[each.name])
        if each.metadata:
            more = dict(each.metadata)
            group.add_argument(*more.pop("flags") or [each.name], **more)
    group = parser.add_argument_group("about")
    group.add_argument("-h", "--help", action="help", help="show this and exit")
    group.add_argument("--version", action="version", version=f"dicomUpload {VERSION}",
                       help="show it and exit")
    given = parser.parse_args(argv)
    check(given)
    given.url = check_url(given.url)
    given.config = read_config(given.config) if given.config else ()
    given.limit_rate = 0 if given.limit_rate is None else bytes_per_second(given.limit_rate)
    given.cacert = os.path.abspath(given.cacert) if given.cacert else ""
    command = ["python3", sys.argv[0]]
    for at, word in enumerate(argv):  # the one that is PASS, and not an option's value like it
        shown = argv[:at] + ["-"] + argv[at + 1:]
        if word == given.password and parser.parse_args(shown).password == "-":
            command += [each for each in shown if each not in ("-n", "--dry-run", "--again")]
            break
    return Settings(**vars(given), command=shlex.join(command))


def check(given: argparse.Namespace) -> None:
    """Raises Stop(2) for options that no upload can work with, and makes numbers of numbers."""
    for name in ("url", "user", "password", "project"):
        if not sendable(getattr(given, name)):
            refuse(name.upper(), "is empty, or holds a character that is no text: give it again")
    for name in ("config", "workdir", "cacert", "logname"):  # an unset $CONFIG must not send all
        if getattr(given, name) == "":
            refuse(f"--{name}", "is empty: give a name, or leave the option out")
    for name, least, most in (("procs", 1, 9999), ("max_files", 1, 999_999_999),
                              ("compression", 0, 9), ("retries", 0, 9999), ("timeout", 1, 999_999)):
        text = str(getattr(given, name))
        if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
            refuse(f"--{name.replace('_', '-')}", f"give a whole number from {least} to {most}")
        setattr(given, name, int(text))
    for pattern in given.only:
        if not re.fullmatch(r"[^/]+(/[^/]+)?", pattern):
            refuse(f"--only {pattern}", "is neither subject nor subject/session: give one of these")
    if given.cacert is not None and not os.path.isfile(given.cacert):
        refuse(f"--cacert {given.cacert}", "is no file: give the CA's certificate in PEM form")
    if os.sep in given.logname:
        refuse(f"--logname {given.logname}", "is no plain name: give the folder as --workdir")
    try:
        os.scandir(given.rootdir).close()
    except OSError as error:
        refuse(f"ROOTDIR {given.rootdir}", unreadable(error))
    if lies_in(given.workdir, given.rootdir):
        refuse(f"--workdir {given.workdir}", "lies inside ROOTDIR: choose one outside")


def sendable(text: str) -> bool:
    """Whether curl's config can carry this, and the server get it as it is."""
    return bool(text) and is_utf8(text) and not re.search(r"[\x00-\x1f\x7f]", text)


def check_url(text: str) -> str:
    """The URL as it is used. Raises Stop(2) with the right form, and with no login in it."""
    good = r"(https?://(?:[^\s/?#@:\[\]]+|\[[0-9a-f:.]+\])(?::0*[1-9]\d{0,4})?)((?:/[^\s?#]*)?)"
    rest = re.sub(r"^((https?|ftps?)(:/*|/+)|/+)", "", text, flags=re.IGNORECASE).rpartition("@")[2]
    right = ("http://" if re.match("http(?!s)", text, re.IGNORECASE) else "https://") + rest
    if "@" in text:
        refuse("URL", f"holds a login: give {right}, and the login as USER and PASS")
    found = re.fullmatch(good, text, re.IGNORECASE)
    if not found:
        example = right if re.fullmatch(good, right) else "https://xnat.example.org"
        refuse(f"URL {text}", f"is mistyped: give it like {example}")
    return found[1].lower() + found[2].rstrip("/")


def refuse(thing: str, what: str) -> NoReturn:
    raise Stop(f"{thing}: {what}", WRONG_CALL)


def read_config(path: str) -> Tuple[str, ...]:
    """The exclusions in a config file. Raises Stop(2), naming what is wrong in it."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            config = json.load(file, object_pairs_hook=no_key_twice)
    except OSError as error:
        refuse(f"--config {path}", unreadable(error))
    except (ValueError, RecursionError) as error:
        refuse(f"--config {path}", f"is not JSON in UTF-8 ({error}): mend it there")
    names = config.pop("Exclude", []) if isinstance(config, dict) else []
    wrong = [names] if not isinstance(names, list) else [
        each for each in names if not isinstance(each, str) or not each]
    wrong += [config] if config != {} else []
    if wrong:
        refuse(f"--config {path}", f"has {json.dumps(wrong[0])[:60]} where only a list of parts of "
               'names belongs: write {"Exclude": ["AAHEAD"]}')
    return tuple(names)


def no_key_twice(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    """A JSON object, or ValueError where a second key would hide the first."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a key twice in {json.dumps([key for key, _ in pairs])[:60]}")
    return dict(pairs)


def bytes_per_second(text: str) -> int:
    """5M, 500k or plain bytes per second. Raises Stop(2) for anything else."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)([kmg]?)", text.lower())
    value = int(float(found[1]) * 1024 ** " kmg".index(found[2] or " ")) if found else 0
    return min(value, 1 << 40) or refuse(
        f"--limit-rate {text}", "give bytes per second, such as 500k or 5M")


def find_password(settings: Settings) -> Settings:
    """`settings` with the password that PASS - stands for. Raises Stop(2) if there is none."""
    if settings.password != "-":
        return settings
    password = os.environ.get("XNAT_PASS") or netrc_password(settings.url, settings.user)
    if not password and sys.stdin and sys.stdin.isatty():
        with suppress(EOFError):
            password = getpass.getpass(f"Password of {settings.user} at {settings.url}: ")
    if not sendable(password):
        refuse("PASS -", "no password that could be sent in XNAT_PASS, in ~/.netrc for this host "
               "and user, or from a terminal: set XNAT_PASS")
    return replace(settings, password=password)


def netrc_password(url: str, user: str) -> str:
    """What ~/.netrc has for this user on this machine, if it has it."""
    host = re.sub(r"^https?://(\[[^]]*\]|[^/:]*).*", r"\1", url).strip("[]")
    try:
        with open(os.path.expanduser("~/.netrc"), encoding="utf-8") as file:
            private = not os.fstat(file.fileno()).st_mode & 0o077
            # Of several logins on one machine Python's netrc keeps only the last, and before 3.11
            # it knows no letters beyond ASCII.
            found = re.search(rf"(?m)^\s*machine\s+{re.escape(host)}\s+login\s+{re.escape(user)}"
                              r"\s+password\s+([^\s\"]\S*)", file.read())
        if found and private:
            return found[1]
        login, _, password = netrc.netrc().authenticators(host) or ("", "", "")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, netrc.NetrcParseError) as error:
        refuse("~/.netrc", f"cannot be used ({error}): mend it, or set XNAT_PASS")
    return password or "" if login == user else ""


def check_tools(programs: Programs, teller: Teller) -> None:
    """Raises Stop(3) unless zip, and a curl that is new enough, are there."""
    for tool, question in (("zip", "-v"), ("curl", "--version")):
        if not shutil.which(tool):
            raise Stop(f"{tool}: is not installed: apt-get install {tool} (Debian, Ubuntu), dnf "
                       f"install {tool} (RHEL, Fedora) or brew install {tool} (macOS)")
        text = programs.run([tool, question]).stdout.decode("utf-8", "replace")
        version = re.search(r"(?:Zip|curl) (\d+)\.(\d+)", text)
        teller.log(version[0] if version else f"{tool} of unknown version")
        if tool == "curl" and version and (int(version[1]), int(version[2])) < (7, 61):
            raise Stop(f"curl {version[1]}.{version[2]}: is too old: install 7.61 or newer")


# ---- main ----------------------------------------------------------------------------------


def upload(settings: Settings, teller: Teller) -> int:
    """One run from plan to summary; the exit status."""
    teller.quiet, teller.verbose = settings.quiet, settings.verbose
    if settings.dry_run:
        not_dicom: List[str] = []
        plan = make_plan(settings, not_dicom.append)
        ledger = Ledger(settings, settings.project, read_only=True)
        to_send = parts_to_send(plan, ledger, settings)
        teller.plan(plan, to_send)
        teller.dry_run(plan, to_send, ledger, settings, not_dicom)
        return SOME_FAILED if teller.failures else ALL_THERE
    readable, settings = settings.password != "-", find_password(settings)
    with closing(Workdir(settings.workdir)) as workdir, closing(Programs()) as programs:
        teller.open_files(settings)
        check_tools(programs, teller)
        plan = make_plan(settings, teller.log)
        xnat = Xnat(settings, programs, teller)
        if settings.insecure:
            teller.say(f"{settings.url}: its certificate is not checked (--insecure), whoever "
                       "answers gets login and scans: give its CA with --cacert FILE instead")
        xnat.meet()
        teller.line(f"XNAT {xnat.version or 'of unknown version'}, project {xnat.project}, as "
                    f"{settings.user}", important=False)
        if readable:
            teller.say("PASS: others on this machine can read it in the list of processes: give - "
                       "and set XNAT_PASS, or use ~/.netrc")
        return send_all(plan, xnat, workdir)


def parts_to_send(plan: Plan, ledger: Ledger, settings: Settings) -> List[Part]:
    """All parts of the plan that are not on the server yet."""
    return [part for session, series in plan.pairs() if not series.problem
            for part in ledger.of(session).parts_left(session, series, settings.max_files)]


def send_all(plan: Plan, xnat: Xnat, workdir: Workdir) -> int:
    """Send what is planned and not there yet, tell how it went; the exit status."""
    settings, teller = xnat.settings, xnat.teller
    ledger = Ledger(settings, xnat.project)
    for session in plan.sessions if settings.again else ():
        ledger.add(session, "forget")
    teller.plan(plan, parts_to_send(plan, ledger, settings))
    run = Run(plan, xnat, workdir, ledger)
    status, again = ALL_THERE, True
    try:
        run.go()
        with suppress(Trouble):
            xnat.close()
    except (Stop, OSError) as stop:
        again = not isinstance(stop, Misplaced)
        teller.say(str(stop))
        status = getattr(stop, "status", STOPPED)
        xnat.programs.stopping.clear()  # all has ended; only the server session is to be closed
        with suppress(Stop, Trouble):
            xnat.close()
    ledger.close()
    teller.summary(run, run.tell_rest(), again)
    return status or (SOME_FAILED if teller.failures else ALL_THERE)


def stop_on_signals(teller: Teller) -> None:
    """A first signal ends the run in order, a second one at once."""

    def stop(number: int, _: object) -> None:
        if teller.stopped:
            os._exit(128 + number)
        teller.stopped = Stop(f"stopped by {signal.Signals(number).name}", 128 + number)
        raise teller.stopped

    def lost(unraisable: Any) -> None:  # Python drops what is raised within a __del__
        if unraisable.exc_value is not teller.stopped:
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = lost

    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) != signal.SIG_IGN:  # nohup ignores HUP, and is right
            signal.signal(each, stop)


def main() -> int:
    """Run the program; the exit status."""
    os.umask(0o077)  # zips, ledger, log and report are nobody else's business
    sys.stdout = sys.stdout or open(os.devnull, "w")  # a daemon may have closed them
    sys.stderr = sys.stderr or open(os.devnull, "w")
    teller = Teller()
    try:
        stop_on_signals(teller)
        return upload(read_options(sys.argv[1:]), teller)
    except (Stop, Trouble) as end:
        teller.say(str(end), getattr(end, "drawing", ""))
        return int(getattr(end, "status", STOPPED))
    except OSError as error:
        teller.say(f"{error.filename or 'the system'}: {error.strerror}: mend it, then run again")
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
