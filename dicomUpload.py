#!/usr/bin/env python3
"""Send a tree of DICOM folders (ROOTDIR/subject/session/series) to XNAT: whole,
verified, nothing twice. Run it again, from anywhere, until all of it is there.

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
  1         some series or sessions failed, or are gone here; after a dry run
            also: some of it is missing on the server
  2         wrong options, ROOTDIR or config, nothing sent
  3         could not start or had to stop (no zip, no curl, server unreachable,
            login refused, no right to the project, workdir in use or full, the
            server refuses everything)
  130, 143  stopped by a signal

Needs Python 3.8, curl 7.61, zip 3.0; no packages. Reads in the order of a run:
  words      the nouns of the program
  tree       walk ROOTDIR by names; read one session: what its files are
  packing    the one door to other programs, the workdir, one part to one zip
  curl       requests of one connection to their answers; cookie and retries
  meanings   what an answer says, whether waiting heals it, what to do
  xnat       meet the server, ask what it holds, post, commit
  ledger     what earlier runs have done, to ask and send less
  upload     one session from folder to archive; several at a time
  telling    lines, summary, log and report; nothing else prints
  options    the command line to Settings
  main       the only place that exits
"""

from __future__ import annotations

import argparse
import base64
import bz2
import csv
import datetime
import errno
import fcntl
import fnmatch
import getpass
import glob
import gzip
import hashlib
import heapq
import html
import io
import itertools
import json
import lzma
import os
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from typing import (Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, NoReturn, Optional,
                    Sequence, Set, TextIO, Tuple, Union)
from urllib.parse import quote, urlencode, urlsplit

VERSION = "2.0"
ABOUT, LAYOUT, EXAMPLES, STATUSES, _ = (__doc__ or "\n\n" * 4).split("\n\n")  # for --help
ALL_THERE, SOME_FAILED, WRONG_CALL, STOPPED = 0, 1, 2, 3


# ---- words ---------------------------------------------------------------------------------


class Stop(Exception):
    """The run cannot go on; the text says thing, what and what to do."""

    def __init__(self, message: str, status: int = STOPPED, drawing: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.drawing = drawing


class Stopping(Stop):
    """Another thread has the reason."""


class Misplaced(Stop):
    """XNAT puts the data elsewhere: another run would only put more there."""


class Trouble(Exception):
    """One series or session cannot be done: what is wrong (the evidence), and what to do."""

    def __init__(self, what: str, to_do: str, refused: bool = False) -> None:
        super().__init__(f"{what}: {to_do}")
        self.what = what
        self.to_do = to_do
        self.refused = refused  # by the server


class Full(Trouble):
    """There is no room in the workdir: the others go on, and the run ends with 3."""


def option(names: str, text: str, default: Any = None, **more: Any) -> Any:
    """A field that the command line fills; `names` ends with what --help calls its value."""
    *flags, metavar = names.split()
    text += " (%(default)s)" if default else ""
    return field(metadata={"flags": flags, "metavar": metavar, "help": text, "default": default,
                           **more})


def switch(flags: str, text: str) -> Any:
    """A field that is False until the command line has one of these flags."""
    return field(metadata={"flags": flags.split(), "help": text, "action": "store_true"})


AUTO = -1  # as a level: 0 or 1, whichever is faster


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
        "contains one of these, in any case (repeatable)", [], action="append")
    only: List[str] = option("--only PATTERN", "glob on subject or subject/session, or a "
                             "session's label: send only these (repeatable)", [], action="append")
    shard: Tuple[int, int] = option("--shard K/N", "of N machines that share the tree this is "
                                    "number K: whole subjects, always the same", "1/1")
    nested: bool = switch("--nested", "series folders hold several series each, as is meant")
    dry_run: bool = switch("-n --dry-run", "log in, look, show what would be sent; write nothing")
    again: bool = switch("--again", "send what is chosen again, whatever ledger and server say")
    review: bool = switch("--review", "leave whole, verified sessions in the prearchive for a "
                          "person to archive")
    overwrite_files: bool = switch(
        "--overwrite-files", "on commit, replace images that the archive already holds; what has "
        "changed here since it was sent goes again")
    workdir: str = option("--workdir DIR", "zips, ledger, log, report", "./work")
    procs: int = option("--procs N", "uploads side by side", 4)
    max_files: int = option("--max-files N", "files per zip", 500)
    compression: int = option("--compression auto|0-9", "zip's level; auto takes 0 or 1, whichever "
                              "is faster here", "auto", choices=["auto", *"0123456789"])
    retries: int = option("--retries N", "tries after the first", 5)
    timeout: int = option(
        "--timeout SECONDS", "seconds without a byte before a transfer counts as dead", 900)
    limit_rate: int = option(
        "--limit-rate RATE", "bytes per second for all uploads together, such as 5M (none)")
    cacert: str = option("--cacert FILE", "CA to trust (the system's)")
    insecure: bool = switch("--insecure", "do not check the server's certificate")
    logname: str = option("--logname NAME", "base of the log's and report's names", "dicomUpload")
    quiet: bool = switch("-q --quiet", "only what failed, and the summary")
    verbose: bool = switch("-v --verbose", "a line for each series, each command and each answer "
                           "of the server too")
    command: str = ""  # the same call, without the password

    def matching(self, subject: str, name: str) -> Set[str]:
        """The patterns of --only that choose this session: by its folders, or its label."""
        found, label = set(), Session(subject, name).label
        subject, name = one_form(subject), one_form(name)
        for pattern in self.only:
            of_subject, _, of_session = one_form(pattern).partition("/")
            fits = fnmatch.fnmatchcase(subject, of_subject) and (  # it decides if there is no name
                not name or fnmatch.fnmatchcase(name, of_session or "*"))
            if fits or pattern == label:
                found.add(pattern)
        return found

    def chooses(self, subject: str, name: str) -> bool:
        """Whether --only and --shard choose this session."""
        if self.only and not self.matching(subject, name):
            return False
        number, shards = self.shard
        raw = one_form(subject).encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") % shards == number - 1

    def left_out(self, series: str) -> str:
        """The exclusion that this series' name contains, or ''."""
        name = one_form(series).lower()
        return next((each for each in self.config if one_form(each).lower() in name), "")


def one_form(name: str) -> str:
    """A name with one form of each letter: macOS and Linux may store the same name in two."""
    return unicodedata.normalize("NFC", name)


class Session(NamedTuple):
    """One session folder, by names alone: ten thousand of them stay small in memory."""

    subject: str  # the folders' names
    name: str
    joined: str = ""  # names of the series folders, as the walk saw them

    @property
    def path(self) -> str:
        return f"{self.subject}/{self.name}"

    @property
    def subject_label(self) -> str:
        return clean_label(self.subject)

    @property
    def label(self) -> str:
        return clean_label(f"{self.subject}_{self.name}" if self.name else self.subject)

    @property
    def series(self) -> List[str]:
        return self.joined.split("\0") if self.joined else []


@dataclass(eq=False)
class File:
    """A file below a series folder. Once it is read, its UIDs say which image it is: XNAT keeps
    one of each SOP Instance UID in a series."""

    name: str
    bytes: int
    time_ns: int
    sop: str = ""
    study: str = ""
    series: str = ""
    crc: int = -1  # CRC-32, where it is known
    missing: bool = True  # the server does not have it


@dataclass(eq=False)
class Series:
    """One series folder as it was read, and what has become of it."""

    name: str
    folder: str
    # sent, not sent, would send, already there, left out, no DICOM, copy; '' on its way
    status: str = ""
    message: str = ""  # why it was left out, or what else is worth a word
    listing: str = ""  # fingerprint of its files' names, sizes and times
    files: List[File] = field(default_factory=list)
    images: List[File] = field(default_factory=list)  # those that belong on the server
    no_data: List[str] = field(default_factory=list)  # by its name, see NO_DATA
    not_dicom: List[str] = field(default_factory=list)
    damaged: List[str] = field(default_factory=list)  # name and what is wrong with it
    packed: List[str] = field(default_factory=list)
    copies: List[str] = field(default_factory=list)  # name and of what
    problems: List[Trouble] = field(default_factory=list)  # nothing more of it may be sent
    there: int = 0  # images that are on the server
    held: int = 0  # files of its Series UID there, by the server's last count
    sent: int = 0  # of these, by this run
    bytes: int = 0  # of these
    zipped: int = 0  # bytes that went over the line
    tries: int = 0
    http: int = 0  # status of the last answer
    began: float = 0.0
    seconds: float = 0.0

    @property
    def missing(self) -> List[File]:
        """What is still to be sent."""
        return [] if self.problems else [image for image in self.images if image.missing]

    def wants_a_person(self) -> bool:
        return bool(self.problems or self.damaged or self.packed)


@dataclass(eq=False)
class Outcome:
    """How a session ended."""

    session: Session
    series: List[Series]
    # archived, prearchived, there, held back, not archived, failed, nothing to send; in a dry run
    # also: to send, to archive
    where: str = "failed"
    files: int = 0  # of ours on the server, counted by it
    study: str = ""  # Study UID, if the server has it under our UIDs
    address: str = ""  # where it lies
    joined: bool = False  # what lies there in the prearchive was not all sent by runs of ours
    earlier: bool = False  # an earlier run, or somebody else, had brought all of it there
    problems: List[Trouble] = field(default_factory=list)  # of the session as a whole
    answered: threading.Event = field(default_factory=threading.Event)  # a part, by the server

    def failed(self) -> bool:
        return bool(self.problems) or any(each.wants_a_person() for each in self.series)


def fingerprint(lines: Iterable[str]) -> str:
    """A short digest of these lines."""
    return hashlib.sha256(b"\0".join(map(os.fsencode, lines))).hexdigest()[:20]


# ---- tree ----------------------------------------------------------------------------------

# Trash, snapshots and system folders of file servers and desktops: what they hold was withdrawn.
NO_DATA = frozenset(("#recycle", "@recycle", "@eadir", "$recycle.bin", "recycler", "lost+found",
                     "system volume information", "__macosx", "#snapshot", "~snapshot",
                     "@recently-snapshot"))
UNFINISHED = re.compile(r"\.(part|filepart|partial|crdownload)$", re.IGNORECASE)
# rsync's .NAME.XXXXXX, and names that other programs give to halves: only if the bytes agree.
PERHAPS_UNFINISHED = re.compile(r"^\..+\.[A-Za-z0-9]{6}$|\.(tmp|temp|download|aria2)$")
XNAT_UNPACKS = re.compile(r"\.(zip|tar|tgz|gz|zar|xar)$", re.IGNORECASE)
READERS, SLOW = 32, 0.0003  # files at a time, where one takes longer than so many seconds
SAMPLE = 6  # sessions, and series folders of each, that tell whether ROOTDIR is a level too high


@dataclass
class Tree:
    """What ROOTDIR holds, by names."""

    sessions: List[Session] = field(default_factory=list)  # those that were chosen
    sample: List[Session] = field(default_factory=list)  # the first with series, chosen or not
    strays: List[str] = field(default_factory=list)  # files where folders belong
    no_data: List[str] = field(default_factory=list)  # names that stand for none
    not_chosen: int = 0  # sessions
    labels: Set[str] = field(default_factory=set)  # of all sessions, chosen or not
    idle: Set[str] = field(default_factory=set)  # patterns of --only that no folder has

    def pairs(self) -> Iterator[Tuple[Session, str]]:
        return ((session, series) for session in self.sessions for series in session.series)


def walk(settings: Settings, tick: Callable[[Tree], None]) -> Tree:
    """Walk ROOTDIR/subject/session/series by names; no file is opened.

    Raises Stop(2) if two folders meet in one label, a label is too long, or there is no series.
    """
    tree, above, top = Tree(idle=set(settings.only)), [], []  # type: Tree, List[str], List[str]
    owners: Dict[Tuple[str, str], str] = {}
    for subject in folders_in(settings.rootdir, top, tree.no_data):
        # XNAT finds subjects without regard to case (retrieveMatchingSubject).
        folder = os.path.join(settings.rootdir, subject)
        claim(owners, "subject", clean_label(subject).lower(), folder)
        files, before = [], len(tree.sessions)  # type: List[str], int
        try:
            names = folders_in(folder, files, tree.no_data)
        except OSError:
            names = [""]  # a session without a name stands for it, and fails
        for name in names:
            path, series = os.path.join(folder, name), []  # type: str, List[str]
            label = Session(subject, name).label
            if name:
                claim(owners, "session", label, path)
            tree.labels.add(label)
            chosen = settings.chooses(subject, name)
            tree.idle -= settings.matching(subject, name)
            if chosen or len(tree.sample) < SAMPLE:
                with suppress(OSError):  # reading it will say why
                    series = folders_in(path, tree.strays if chosen else [],
                                        tree.no_data if chosen else [])
            session = Session(subject, name, "\0".join(series))
            tree.sample += [session] if series and len(tree.sample) < SAMPLE else []
            tree.sessions += [session] if chosen else []
            tree.not_chosen += not chosen
            tick(tree)
        tree.idle -= set() if names else settings.matching(subject, "")
        if len(tree.sessions) > before or not names and settings.chooses(subject, ""):
            above += files
    check_shape(tree, settings, above)
    # Each slice tells only of its own, the first one of what lies in ROOTDIR.
    tree.strays += above + (top if not settings.only and settings.shard[0] == 1 else [])
    return tree


def is_no_data(name: str) -> bool:
    """Whether this name says that what it stands for is no data, at any level of the tree."""
    return name.startswith(".") or name.lower() in NO_DATA


def folders_in(folder: str, files: List[str], no_data: List[str]) -> List[str]:
    """Names of the folders in `folder`, in order; the paths of the rest go into the lists."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            # A link to nothing counts: a share that is not mounted must not go unnoticed.
            lost = entry.is_symlink() and not os.path.exists(entry.path)
            if is_no_data(entry.name):
                no_data.append(entry.path)
            elif lost or entry.is_dir() and not (
                    entry.is_symlink() and lies_in(folder, entry.path)):  # would never end
                names.append(entry.name)
            else:
                files.append(entry.path)
    return sorted(names)


def lies_in(path: str, folder: str) -> bool:
    """Whether `path` is `folder`, or lies in it."""
    return real_path(path).startswith(real_path(folder))


def real_path(path: str) -> str:
    return os.path.join(os.path.realpath(path), "")


def clean_label(text: str) -> str:
    """`text` as a label that XNAT keeps unchanged: it accepts [A-Za-z0-9_-] (XftStringUtils)."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", unicodedata.normalize("NFC", text))


def claim(owners: Dict[Tuple[str, str], str], kind: str, label: str, folder: str) -> None:
    """Note that `folder` becomes `label`. Raises Stop(2) if another one does, or it is too long."""
    other = owners.setdefault((kind, label), folder)
    if other != folder:
        refuse(f"{kind} label {label}", f"two folders would become one ({other} and {folder}; XNAT "
               "keeps only letters, digits, _ and -): rename one of them")
    if len(label) > 255:
        refuse(f"{kind} label {label}", f"is longer than the 255 bytes that XNAT can store "
               f"({folder}): rename the folder")


def check_shape(tree: Tree, settings: Settings, above: List[str]) -> None:
    """Raises Stop(2) if there is no series in ROOTDIR; a slice may be empty."""
    if tree.sample or any(not session.name for session in tree.sessions):
        return
    where = tree.strays or above
    missing = "session level is" if tree.strays else "session and series levels are"
    if not where and tree.not_chosen:
        return
    wrong = (f"the {missing} missing ({where[0]} is a file where folders belong)" if where else
             "no series found")
    raise Stop(f"ROOTDIR {settings.rootdir}: {wrong}: give a folder of this layout", WRONG_CALL,
               LAYOUT)


# One session's files


def list_session(session: Session, settings: Settings) -> List[Series]:
    """All series folders of a session with their files by names, sizes and times; opens none.

    Raises Trouble if the folder cannot be read.
    """
    folder = os.path.join(settings.rootdir, session.subject, session.name)
    try:
        return [list_series(name, os.path.join(folder, name), settings)
                for name in folders_in(folder, [], [])]
    except OSError as error:
        raise unreadable("the folder", error)


def list_series(name: str, folder: str, settings: Settings) -> Series:
    """One series folder with its files, at any depth, or the exclusion that leaves it out."""
    series, pattern = Series(name, folder), settings.left_out(name)
    if pattern:
        series.status, series.message = "left out", f'name contains "{pattern}"'
        return series
    try:
        list_files(series)
    except OSError as error:
        series.problems.append(unreadable("the folder", error))
    series.files.sort(key=lambda file: file.name)
    series.listing = fingerprint(
        f"{file.name} {file.bytes} {file.time_ns}" for file in series.files)
    return series


def list_files(series: Series) -> None:
    """One pass over the folders below a series folder. Links are followed, each folder once."""
    entries = list(os.scandir(series.folder))
    links: List[Tuple[str, os.DirEntry[str]]] = []  # to folders: after all real ones, by path
    read = [real_path(series.folder)]  # folders that link to each other have paths without end
    while entries or links:
        linked = not entries
        entry = heapq.heappop(links)[1] if linked else entries.pop()
        name, real = entry.path[len(series.folder) + 1:], real_path(entry.path) if linked else ""
        try:
            if is_no_data(entry.name) and not PERHAPS_UNFINISHED.search(entry.name):
                series.no_data.append(name)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                series.problems.append(Trouble(f"{name} is a link to nothing",
                                               "fix or remove it, then run again"))
            elif entry.is_file():
                info = entry.stat()
                series.files.append(File(name, info.st_size, info.st_mtime_ns))
            elif not entry.is_dir():  # a FIFO would make us wait for ever
                series.not_dicom.append(f"{name} (no regular file)")
            elif entry.is_symlink() and not linked:
                heapq.heappush(links, (entry.path, entry))
            elif linked and any(real.startswith(each) or each.startswith(real) for each in read):
                series.not_dicom.append(f"{name} (a link to a folder that is read already)")
            else:
                read += [real] if linked else []
                entries += os.scandir(entry.path)
        except OSError as error:
            series.problems.append(unreadable(name, error))


def unreadable(thing: str, error: OSError) -> Trouble:
    """The same words for every file or folder that the system refuses to show."""
    known = {errno.EACCES: (f"cannot be read ({error.strerror})", "give yourself read permission"),
             errno.ENOENT: ("does not exist", "check the name or link"),
             errno.ELOOP: ("is a link that goes round in circles", "fix it"),
             errno.ENOTDIR: ("is a file", "give a folder"),
             errno.EISDIR: ("is a folder", "give a file")}
    what, to_do = known.get(error.errno or 0, (f"cannot be read ({error.strerror})",
                                               "check the disk or share"))
    return Trouble(f"{thing} {what}".strip(), f"{to_do}, then run again")


def read_session(series: List[Series], tick: Callable[[], None]) -> None:
    """Read the headers of a session's files, and say of each file what it is.

    `tick` is called before each file, and may end it. Raises Trouble for two studies in one
    session.
    """
    blank: List[Tuple[Series, str, str]] = []
    files = [(each, file) for each in series for file in each.files]
    for one, file, found in read_files(files, tick):
        blank += look_at(one, file, found)
    shapes = {name_shape(image.name) for each in series for image in each.images}
    for each, name, why in blank:  # an image that broke, if it is named as the others are
        if name_shape(name) in shapes or re.search(r"\.(dcm|ima|dicom)$", name.lower()):
            each.damaged.append(f"{name} {why}")
        else:
            each.not_dicom.append(f"{name} ({why})")
    find_copies(series)
    check_studies(series)
    for each in series:
        if not (each.status or each.problems or each.images):
            each.status = "copy" if each.copies else "no DICOM"
            each.message = (f"all its images are copies: {some(each.copies)}" if each.copies else
                            f"none of its {plural(len(each.files), 'file')} is DICOM"
                            if each.files else "is empty")


def read_files(files: List[Tuple[Series, File]], tick: Callable[[], None]
               ) -> Iterator[Tuple[Series, File, Found]]:
    """Read the headers one after another; several at a time where each is waited for, as on a
    share. All others would only be slowed down: threads of Python share one core."""

    def read(pair: Tuple[Series, File]) -> Tuple[Series, File, Found, float]:
        tick()
        began, (series, file) = time.monotonic(), pair
        try:
            found: Found = read_header(os.path.join(series.folder, file.name), file.bytes)
        except OSError as error:
            found = error
        return series, file, found, time.monotonic() - began

    with ThreadPoolExecutor(READERS) as pool:
        at, most, slow = 0, READERS, False
        while at < len(files):
            done = list((pool.map if slow else map)(read, files[at:at + most]))
            yield from (each[:3] for each in done)
            slow = sorted(seconds for *_, seconds in done)[len(done) // 2] > SLOW
            at, most = at + most, 16 * READERS


def look_at(series: Series, file: File, header: Found) -> List[Tuple[Series, str, str]]:
    """Put one file where it belongs in its series; what is blank is returned, with the reason."""
    name, base, unsendable = file.name, os.path.basename(file.name), why_unsendable(file.name)
    if isinstance(header, OSError):
        series.problems.append(unreadable(name, header))
    elif UNFINISHED.search(base) or PERHAPS_UNFINISHED.search(base) and (
            header.kind not in ("other", "packed")):
        series.problems.append(Trouble(f"{name} is unfinished, by its name",
                                       "wait until it is whole, or remove it, then run again"))
    elif header.kind == "packed":
        series.packed.append(name)
    elif header.kind == "damaged":
        series.damaged.append(f"{name} {header.why}")
    elif is_no_data(base) or header.kind == "other":
        series.not_dicom.append(name)
    elif header.kind == "blank":
        return [(series, name, header.why)]
    elif unsendable:
        series.problems.append(Trouble(f"{name} {unsendable}", "rename it, then run again"))
    else:
        file.sop, file.study, file.series = header.sop, header.study, header.series
        series.images.append(file)
    return []


def name_shape(name: str) -> str:
    """What the names of one export have in common."""
    return re.sub(r"\d+", "0", os.path.basename(name).lower())


def why_unsendable(name: str) -> str:
    """Why zip or XNAT would not take a DICOM file of this name, or ''."""
    if re.search(r"[\n\r\x7f]", name):  # zip takes a line each, and spoils the zip with a DEL
        return "has a line break or DEL in its name"
    if not is_utf8(name):  # Java's ZipInputStream refuses the whole zip for it
        return "has a name that is not UTF-8"
    if name.endswith(".log"):  # left behind, and deleted, when XNAT archives (MergeSessionsA)
        return "is DICOM named as a log"
    return "is DICOM named as an archive" if XNAT_UNPACKS.search(name) else ""


def is_utf8(name: str) -> bool:
    raw = os.fsencode(name)
    return raw.decode("utf-8", "ignore").encode("utf-8") == raw


def find_copies(series: List[Series]) -> None:
    """Take images out that stand there already; where one UID stands for two, fail both series."""
    owners: Dict[Tuple[str, str], List[Tuple[Series, File]]] = defaultdict(list)
    for each in series:
        for image in each.images:
            owners[image.series, image.sop].append((each, image))
    copies: Set[File] = set()
    for found in owners.values():
        if len(found) > 1:
            copies |= settle_copies(sorted(
                found, key=lambda pair: (len(pair[1].name), pair[1].name)))
    for each in series:
        each.images = [image for image in each.images if image not in copies]


def settle_copies(found: List[Tuple[Series, File]]) -> Set[File]:
    """Of equal files of one UID all but the first are told and returned; if they differ, all their
    series fail."""
    names = [f"{series.name}/{image.name}" for series, image in found]
    try:
        contents = {(image.bytes, crc_of(series, image)) for series, image in found}
    except OSError as error:
        found[0][0].problems.append(unreadable(str(error.filename), error))
        return set()
    if len(contents) == 1:
        for (series, _), name in list(zip(found, names))[1:]:
            series.copies.append(f"{name} is a copy of {names[0]}")
        return {image for _, image in found[1:]}
    trouble = Trouble(f"{' and '.join(names)} are different images with one SOP Instance UID "
                      f"({found[0][1].sop}), of which XNAT would keep one",
                      "move one of them out, or have its UIDs corrected, then run again")
    for series in dict.fromkeys(series for series, _ in found):
        series.problems.append(trouble)
    return set()


def crc_of(series: Series, file: File) -> int:
    """The CRC-32 of a file's bytes, read once."""
    if file.crc < 0:
        crc = 0
        with open(os.path.join(series.folder, file.name), "rb") as stream:
            for piece in iter(lambda: stream.read(1 << 20), b""):
                crc = zlib.crc32(piece, crc)
        file.crc = crc
    return file.crc


def has_changed(session: Session, series: List[Series], settings: Settings) -> bool:
    """Whether a session's folder is another than when it was read. Raises Trouble."""
    again = list_session(session, settings)
    then, now = ([(each.name, [(file.name, file.bytes) for file in each.files]) for each in found]
                 for found in (series, again))
    if then != now or any(each.problems for each in again):
        return True
    return any(new.time_ns != old.time_ns and old.crc >= 0 and crc_of(after, new) != old.crc
               for before, after in zip(series, again)  # times alone are no change
               for old, new in zip(before.files, after.files))


def check_studies(series: List[Series]) -> None:
    """Raises Trouble if a session holds two studies: XNAT would make two sessions of it."""
    studies: Dict[str, str] = {}
    for each in series:
        for image in each.images:
            studies.setdefault(image.study, f"{each.name} ({image.name}) is of study "
                               f"{image.study or 'none'}")
    if len(studies) > 1:
        raise Trouble(f"two studies in one session folder: {'; '.join(studies.values())}",
                      "move the series or files of one study to a session folder of their own, "
                      "then run again")


def is_packed(path: str) -> bool:
    """Whether an archive or compressed file holds DICOM, by its first members' first bytes."""
    with suppress(Exception):  # whatever a foreign archive makes Python's readers raise
        return any(header_of(head, len(head)).kind in ("DICOM", "damaged")
                   for head in itertools.islice(heads_in(path), 1000))  # a viewer goes first
    return False


def heads_in(path: str) -> Iterator[bytes]:
    """The first bytes of what an archive or compressed file holds."""
    with open(path, "rb") as file:
        magic = file.read(4)
    for sign, opener in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zX", lzma.open)):
        if magic.startswith(sign):
            with opener(path) as stream:
                yield stream.read(READS[0])
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as stream:
                    yield stream.read(READS[0])
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:
            # Whoever packs gigabytes of something else is not read to the end.
            members = itertools.takewhile(lambda each: each.offset < 1 << 26, tar)
            for content in filter(None, map(tar.extractfile, filter(tarfile.TarInfo.isfile,
                                                                    members))):
                yield content.read(READS[0])


# Before the first session: a level too high, and files beside the folders


def check_level(tree: Tree, settings: Settings) -> None:
    """Raises Stop(2) if the subfolders of series folders hold different series, in most of a
    sample: ROOTDIR is one level too high."""
    deep, flat = [], []  # type: List[str], List[str]
    for path in (f"{session.path}/{name}" for session in tree.sample
                 for name in session.series[:SAMPLE]):
        folder, uids = os.path.join(settings.rootdir, path), set()
        with suppress(OSError):
            for below in folders_in(folder, [], [])[:SAMPLE]:
                # XNAT's own download is meant so: scans/5-T1/resources/DICOM/files/
                if not os.path.isdir(os.path.join(folder, below, "resources")):
                    uids.add(first_series(os.path.join(folder, below)))
        (deep if len(uids - {""}) > 1 else flat).append(folder)
    if len(deep) > len(flat):
        raise Stop(f"ROOTDIR {settings.rootdir}: it looks one level too high (different series in "
                   f"the folders of {deep[0]}): give the folder that holds the subjects, or add "
                   "--nested if series folders hold several series each. The layout is",
                   WRONG_CALL, LAYOUT)


def first_series(folder: str) -> str:
    """The Series UID of a DICOM file below a folder, among the first that are found there."""
    for path in itertools.islice((os.path.join(path, name) for path, _, names in os.walk(folder)
                                  for name in sorted(names) if not is_no_data(name)), 20):
        with suppress(OSError):
            uid = read_header(path, os.path.getsize(path)).series
            if uid:
                return uid
    return ""


def look_at_strays(tree: Tree) -> Iterator[Tuple[str, Trouble]]:
    """What is wrong with files that lie where folders belong: images there would be lost."""
    found: Dict[Tuple[str, str], List[str]] = defaultdict(list)
    for path in tree.strays:
        with suppress(OSError):
            if os.path.isfile(path):
                kind = read_header(path, os.path.getsize(path)).kind
                found[os.path.dirname(path), kind].append(os.path.basename(path))
    for (folder, kind), names in found.items():
        if kind in ("DICOM", "damaged", "packed"):
            yield folder, Trouble(f"{plural(len(names), f'{kind} file')} where folders belong "
                                  f"({some(names)})", ("unpack into" if kind == "packed" else
                                  "put into") + " a series folder, then run again")


# One file's header


class Header(NamedTuple):
    """What the first bytes of a file say of it."""
    kind: str          # "DICOM", "damaged", "blank", "packed", "other", or "more" has to be read
    sop: str = ""      # SOP Instance UID
    study: str = ""    # Study Instance UID
    series: str = ""   # Series Instance UID
    why: str = ""      # what is damaged or blank: it follows the name of the file in a sentence


Found = Union[Header, OSError]

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
                return Header("packed") if header.kind == "other" and is_packed(path) else header
    return Header("damaged", why="has a header without end")


def header_of(data: bytes, size: int) -> Header:
    """What a file of `size` bytes is by its first bytes, however many. Old exports lack `DICM`."""
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
        uid = tag <= SERIES and tag in UIDS
        if why or tag <= last or uid and end > len(data):
            break
        if uid:
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
    length counts as 0. Of a file that is cut, the last one ends behind `size`; its tag is that of
    the sequence it is cut in, or 0."""
    first, whole, outer = data[at:at + 6], len(data) == size, 0
    # The first element knows the encoding better than the transfer syntax, which some get wrong.
    order = ">" if first[:1] == b"\0" and first[1:2] > b"\0" else "<"  # a group below 0100
    # The encoding of the data set, then that of each sequence in it that is open.
    inside = [(order, first[4:].isalpha() and first[4:].isupper())]
    data += bytes(4) if whole else b""  # the last element may have 8 bytes
    last, (order, explicit) = len(data) - 12, inside[0]
    while at <= last:
        group, element, vr, length = UNPACK[order](data, at)
        tag, start = group << 16 | element, at + 8
        if vr in SHORT and explicit and group != 0xFFFE:  # most are, and this must be quick
            pass
        elif not explicit or group == 0xFFFE or not (vr.isalpha() and vr.isupper()):
            (length,) = struct.unpack_from(order + "I", data, at + 4)  # some mix explicit and not
        elif vr in LONG or not length:
            start = at + 12
            (length,) = struct.unpack_from(order + "I", data, at + 8)
        at = start + (length if length != UNDEFINED else 0)
        if group != 0xFFFE and len(inside) == 1:
            outer = tag
            yield tag, start, at
        if length == UNDEFINED and group != 0xFFFE:  # an UN is implicit inside, little-endian
            inside.append(("<", False) if vr == b"UN" else inside[-1])
        elif tag == SEQUENCE_END and len(inside) > 1:
            inside.pop()
        else:
            continue
        order, explicit = inside[-1]
    unclosed = len(inside) > 1
    if at > size or whole and (at < size or unclosed and outer < SERIES):
        yield outer if unclosed else 0, at, size + 1


# ---- packing -------------------------------------------------------------------------------


class Programs:
    """The one place that starts programs. Nothing that it starts outlives this process."""

    # A parent killed with -9 leaves its curl uploading. This shell reads the groups of the
    # running programs, a line each time they change; when the pipe closes it kills the last.
    GUARD = 'trap "" HUP INT TERM; while read -r now; do groups=$now; done; kill -9 $groups'

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.reason: Optional[BaseException] = None  # why a thread stopped the run
        self._lock = threading.Lock()
        self._running: Dict[int, subprocess.Popen[bytes]] = {}
        # zip takes options from two of these, and no program needs the password.
        self._environment = {key: value for key, value in os.environ.items()
                             if key not in ("ZIPOPT", "ZIP", "XNAT_PASS")}
        self._guard = self._start(["sh", "-c", self.GUARD], "/")

    def _start(self, command: List[str], folder: str) -> subprocess.Popen[bytes]:
        # Its own session: a Ctrl-C at the terminal is ours to pass on, not the kernel's.
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, cwd=folder, env=self._environment,
                                start_new_session=True)

    def run(self, command: List[str], given: bytes = b"", folder: str = "/",
            watch: Callable[[bytes], None] = lambda _: None, whole: bool = True
            ) -> subprocess.CompletedProcess[bytes]:
        """Start `command` in `folder`, feed it `given`, wait for it. Raises Stop, Trouble.

        `watch` gets what it says on its error output, piece by piece. If it is not `whole`, what it
        has said until the run was stopped is something too.
        """
        with self._lock:
            if self.stopping.is_set():
                raise Stopping("stopping")
            try:
                process = self._start(command, folder)
            except OSError as error:
                raise Trouble(f"{command[0]} cannot be started in {folder} ({error.strerror})",
                              "check both, then run again")
            self._running[process.pid] = process
            self._tell_guard()
        try:
            out, err = talk(process, given, watch)
        finally:
            with self._lock:
                del self._running[process.pid]
                self._tell_guard()
        if whole and self.stopping.is_set() and process.returncode < 0:
            raise Stopping("stopping")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def _tell_guard(self) -> None:
        with suppress(BrokenPipeError):  # somebody killed the guard: the uploads do not need it
            os.write(self._guard.stdin.fileno(),  # type: ignore[union-attr]
                     " ".join(f"-{pid}" for pid in self._running).encode() + b"\n")

    def guarded(self, work: Callable[..., Any], *given: Any) -> Any:
        """Work here, in a thread of a pool: what ends it, but a Trouble, stops the run at once."""
        try:
            return work(*given)
        except Trouble:  # of one series or session
            raise
        except BaseException as end:
            if not isinstance(end, Stopping):
                self.reason = self.reason or end
            self.stop()
            raise

    def pause(self, seconds: float) -> None:
        """Wait, unless the run is being stopped."""
        if self.stopping.wait(seconds):
            raise Stopping("stopping")

    def stop(self) -> None:
        """End everything that runs, and start nothing more."""
        with self._lock:
            self.stopping.set()
            for process in self._running.values():
                kill(process)

    def close(self) -> None:
        """End everything, and let the guard go."""
        self.stop()
        self._guard.kill()
        self._guard.communicate()


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a program, and what it has started, should it be a wrapper around the real one."""
    if process.poll() is None:
        with suppress(ProcessLookupError, PermissionError):  # it ends just now
            os.killpg(process.pid, signal.SIGKILL)


def talk(process: subprocess.Popen[bytes], given: bytes, watch: Callable[[bytes], None]
         ) -> Tuple[bytes, bytes]:
    """Feed a program and hear it to its end: its output, and the last of its error output."""
    assert process.stdin and process.stdout and process.stderr
    out, err = bytearray(), bytearray()
    with process, selectors.DefaultSelector() as open_ones:
        try:
            # zip and curl read all of their input before they say much.
            with suppress(BrokenPipeError), process.stdin as into:
                into.write(given)
            open_ones.register(process.stdout, selectors.EVENT_READ, out)
            open_ones.register(process.stderr, selectors.EVENT_READ, err)
            while open_ones.get_map():
                for key, _ in open_ones.select():
                    piece = os.read(key.fd, 1 << 16)
                    key.data.extend(piece)
                    if key.data is err:
                        watch(piece)
                    if not piece:
                        open_ones.unregister(key.fileobj)
                del err[:-10000]  # hours of curl's progress
            process.wait()
        finally:
            kill(process)  # if something came between
    return bytes(out), bytes(err)


ZIPS = "dicomUpload.zips"


class Workdir:
    """The folder for zips, ledger, log and report, held by one run at a time."""

    def __init__(self, path: str) -> None:
        """Raises Stop(3) if it cannot be made, or another run holds it."""
        self.path = os.path.abspath(path)
        self.zips = os.path.join(self.path, ZIPS)
        self.advice = ""  # what its user should know
        self._room = threading.Condition()
        self._promised = 0
        try:
            os.makedirs(self.path, exist_ok=True)
            self._lock = open(os.path.join(self.path, "dicomUpload.lock"), "a+", encoding="utf-8",
                              errors="replace")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(OSError):  # a full disk is told by those who need its room
                os.ftruncate(self._lock.fileno(), 0)
                os.write(self._lock.fileno(), f"process {os.getpid()} on {os.uname().nodename} "
                         f"since {now()[:16]}".encode())
        except BlockingIOError:
            self._lock.seek(0)
            raise Stop(f"workdir {path}: in use by another run ({self._lock.read(300)}): wait "
                       "until it ends")
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise Stop(f"workdir {path}: cannot be used ({error.strerror}): choose another")
            self._do_without_lock()
        shutil.rmtree(self.zips, ignore_errors=True)  # left by an earlier run that was killed
        os.makedirs(self.zips, exist_ok=True)

    def _do_without_lock(self) -> None:
        """A share without locks will do, if nobody else can touch these zips."""
        self.advice = (f"workdir {self.path}: its file system knows no locks, so two runs are not "
                       "kept apart: see that no other run uses it")
        here = f"{self.zips}-{os.uname().nodename}-"
        for left in glob.glob(glob.escape(here) + "[0-9]*"):
            with suppress(PermissionError):  # else that run of this machine is alive
                try:
                    os.kill(int(left[len(here):]), 0)
                except (ProcessLookupError, ValueError):
                    shutil.rmtree(left, ignore_errors=True)
        self.zips = f"{here}{os.getpid()}"

    def close(self) -> None:
        shutil.rmtree(self.zips, ignore_errors=True)
        self._lock.close()

    @contextmanager
    def room_for(self, files: List[File]) -> Iterator[str]:
        """A folder for zips of these files, once there is room. It is removed at the end.

        Waits while other zips are in the way; raises Full if it would not fit even alone.
        """
        need = zip_room(files)
        with self._room:
            while need > (free := shutil.disk_usage(self.zips).free) - self._promised:
                if not self._promised:
                    raise Full(f"workdir {self.path} is too full (needs {size(need)}, has "
                               f"{size(free)})", "make room, lower --max-files, or choose "
                               "another --workdir")
                self._room.wait()
            self._promised += need
        try:  # a folder of their own: zip would add to an old one, and may leave halves
            try:
                part = tempfile.TemporaryDirectory(prefix="part-", dir=self.zips)
            except OSError as error:
                raise Full(f"workdir {self.path} takes no more ({error.strerror})",
                           "make room, check its rights, or choose another --workdir")
            with part as folder:
                yield folder
        finally:
            with self._room:
                self._promised -= need
                self._room.notify_all()


def free_at(path: str) -> int:
    """Bytes that are free where a folder is, or would be."""
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def zip_room(files: List[File]) -> int:
    """Bytes that a zip of these files never exceeds, with some for ledger and log beside it."""
    # What does not shrink grows by 5 in 32,768; names stand twice, with less than 256 around them.
    return 65536 + sum(file.bytes + file.bytes // 4096 + 2 * len(os.fsencode(file.name)) + 256
                       for file in files)


def pack(folder: str, files: List[File], target: str, level: int, programs: Programs) -> None:
    """Zip `files` of a folder into `target`. Raises Trouble unless it holds exactly them."""
    for file in files:
        try:
            info = os.stat(os.path.join(folder, file.name))
        except OSError as error:
            raise unreadable(file.name, error)
        if info.st_size != file.bytes or info.st_mtime_ns != file.time_ns and read_header(
                os.path.join(folder, file.name), file.bytes)[1:4] != (
                file.sop, file.study, file.series):  # times alone are no change
            raise Trouble(f"{file.name} changed during this run", "run again when it is still")
    # -q quiet; -X no owners and times; -D no folder entries; -@ names, a line each, as input. `./`
    # keeps a name with - from being taken for an option. zip makes the file itself (one that is
    # there would be updated); written to a pipe, Java would refuse it (data descriptors).
    names = b"".join(b"./" + os.fsencode(file.name) + b"\n" for file in files)
    done = programs.run(["zip", "-q", "-X", "-D", f"-{level}", target, "-@"], names, folder)
    if done.returncode not in (0, 12, 18):  # 12, 18: a file could not be read; check_zip names it
        text = " ".join((done.stdout + done.stderr).decode("utf-8", "replace").split())
        what = f"zip failed (exit {done.returncode}{', ' + text if text else ''})"
        if done.returncode == 14:
            raise Full(what, "make room in the workdir")
        raise Trouble(what, "run again")
    check_zip(target, files)


def check_zip(target: str, files: List[File]) -> None:
    """Take over each file's CRC-32. Raises Trouble unless the zip holds these in full and no more.

    zip's exit 0 is no proof: a file that shrank or vanished while it was read gives 0.
    """
    wanted = {(os.fsencode(file.name), file.bytes): file for file in files}
    found: Dict[Tuple[bytes, int], int] = {}
    try:
        with suppress(FileNotFoundError), zipfile.ZipFile(target) as archive:
            for entry in archive.infolist():
                # The bytes as they stand in the zip: Python decodes those without flag as cp437.
                coding = "utf-8" if entry.flag_bits & 0x800 else "cp437"
                found[entry.orig_filename.encode(coding), entry.file_size] = entry.CRC
    except (OSError, zipfile.BadZipFile) as error:
        raise Trouble(f"zip made no readable archive ({error})", "run again")
    for name, _ in sorted(wanted.keys() ^ found.keys()):
        raise Trouble(f"{os.fsdecode(name)} could not be read in full, or changed while it was "
                      "read", "check it, then run again")
    for key, file in wanted.items():
        file.crc = found[key]


class Level:
    """zip's level for the next part: 0 or 1, whichever gets its bytes there sooner, by what this
    run has measured. While zips wait for the line, packing is behind them and costs nothing,
    unless the processors are what they wait for."""

    KEPT = 0.7  # of what was measured before: a line that changes is followed within a few parts

    def __init__(self, fixed: int, clock: Callable[[], float] = time.monotonic,
                 patience: float = 0.3) -> None:
        """Of auto: so many seconds at most the other parts wait for the first one's answer, which
        tells what the line is."""
        self.fixed = fixed
        self.used: Counter[int] = Counter()  # parts by level
        self.bytes: Counter[int] = Counter()  # by level
        self._patience = patience
        self._answered = threading.Event()  # a POST: it is known what the line is
        self._going: Dict[str, List[int]] = defaultdict(list)  # bytes of each part that is at it
        self._sums: Dict[str, Tuple[float, float]] = {}  # seconds (of "zipped", bytes), of bytes
        self._clock = clock
        self._lock = threading.Lock()

    def choose(self, count: int) -> int:
        """The level for a part of so many bytes."""
        if self.fixed == AUTO and self.used:
            self._answered.wait(self._patience)
        with self._lock:
            level = self._sooner(count) if self.fixed == AUTO else self.fixed
            self.used[level] += 1
            self.bytes[level] += count
            return level

    def _sooner(self, count: int) -> int:
        if "posting" not in self._sums:
            return min(1, self.used[0])  # the first one leaves at once; then smaller is safer
        posting, storing = self._pace("posting"), self._pace("packing 0")
        waiting, shared = sum(self._going["waiting"]), count + sum(self._going["packing"])
        # To post a byte is taken to cost a processor what packing it at level 0 did.
        wait, busy = posting * waiting, storing * waiting
        quick = busy + shared * storing
        slow = busy + shared * self._pace("packing 1", 4 * storing)
        stored = max(wait, quick) + posting * shared
        zipped = max(wait, slow) + posting * shared * self._pace("zipped 1", 0.5)
        # Do they shrink now? Where it costs nothing, and where nobody has looked yet.
        look = sum(self.used.values()) % 16 == 0 and (
            slow < wait or "packing 1" not in self._sums)
        return int(zipped < 0.999 * stored or look)

    def _pace(self, what: str, unknown: float = 0.0) -> float:
        value, count = self._sums.get(what, (unknown, 1.0))
        return value / count

    def learn(self, what: str, value: float, count: int) -> None:
        """So many bytes took so many seconds, or became so many bytes."""
        with self._lock:
            earlier, of = self._sums.get(what, (0.0, 0.0))
            self._sums[what] = self.KEPT * earlier + value, self.KEPT * of + max(1, count)
        if what == "posting":
            self._answered.set()

    @contextmanager
    def at(self, what: str, count: int) -> Iterator[None]:
        """Learn how long so many bytes are at this. What goes on side by side shares the time."""
        with self._lock:
            going = self._going[what.split()[0]]
            going.append(count)
            alike, began = len(going), self._clock()
        try:
            yield
            self.learn(what, 2 * (self._clock() - began) / (alike + len(going)), count)
        finally:
            with self._lock:
                going.remove(count)


# ---- curl ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What came back from one request: `code` is curl's exit status, `status` the server's."""

    code: int
    status: int
    body: str
    error: str = ""  # in curl's words
    location: str = ""  # where a redirect points
    headers: str = field(default="", repr=False)  # the cookie is a secret

    @property
    def retry_after(self) -> float:
        """Seconds; ten minutes are the most that we wait."""
        found = re.search(r"(?im)^retry-after: *([0-9]{1,6})\s*$", self.headers)
        return min(600.0, float(found[1])) if found else 0.0

    @property
    def cookie(self) -> str:
        """A new server session where the old one had expired; not the guest's of a refusal."""
        found = re.search(r"(?im)^set-cookie: *JSESSIONID=([0-9A-Z._-]+)", self.headers)
        return found[1] if found and self.status in (200, 301) else ""  # 301: a commit's

    @property
    def is_html(self) -> bool:
        return bool(re.match(
            r"\s*(<!--|(<\?xml[^>]*>\s*)?<(!doctype|(html|head|meta|script|body)\b))", self.body,
            re.IGNORECASE))

    @property
    def evidence(self) -> str:
        """curl's exit status and words, or the HTTP status and what the server says."""
        what, words = f"HTTP {self.status}", sentence(self.body)
        if self.code:
            what, words = f"curl exit {self.code}", self.error
        elif self.location:
            words = f"to {self.location[:300]}"
        elif self.status == 200 and self.is_html:
            words = "a login page" if "login" in self.body.lower() else "a web page"
        return f"{what}, {words}" if words else what

    def json(self) -> Any:
        """The body as JSON, None if it is none."""
        with suppress(ValueError, RecursionError):
            return json.loads(self.body) if self.status == 200 else None


# What stands in error pages beside the reason: headings, and the names of the statuses.
NO_REASON = re.compile(r"Status page\b|You can get technical details|Please continue your visit|"
                       "[A-Z][a-z]+( [A-Z][a-z]+){0,2}$")


def sentence(body: str) -> str:
    """The reason in an error page: XNAT's stands in <h3>, in newer ones in a <p>."""
    text = re.sub(r"(?is)<(script|style)\b.*?</\1>", " ", body[:20_000])
    found = [each for tag in ("h3", "p", "title", "h[1-6]")
             for each in re.findall(f"(?is)<{tag}[^>]*>(.*?)</{tag}>", text)] or [text]
    words = [" ".join(html.unescape(re.sub("<[^>]*>", " ", each)).split()) for each in found]
    words = [each for each in words if not NO_REASON.match(each)] + words
    return next((each[:300] for each in words if each), "")


class Curl:
    """Requests to one server with one login, each through one curl."""

    def __init__(self, settings: Settings, programs: Programs, teller: Teller) -> None:
        self.settings = settings
        self.programs = programs
        self.teller = teller
        self.cookie = ""
        self._numbers = itertools.count(1)
        self._mark = os.urandom(8).hex()  # ends each answer; no body can hold it
        self._outage = False  # the server is gone, and that has been told
        self._lock = threading.Lock()

    def ask(self, method: str, path: str, seconds: int = 0) -> Answer:
        """One request without a body, of so many seconds at most."""
        options = ["--silent", "--show-error", "--max-time", str(seconds)]
        if method == "POST":
            options += ["--data", "", "--header", "Content-Type:"]
        elif method != "GET":
            options += ["--request", method]
        return self._run([(path, options)])[0]

    def ask_once(self, *paths: str) -> List[Answer]:
        """The answer at each of `paths`, all over one connection, each tried once."""
        return self._run([(path, ["--silent", "--show-error", "--max-time", "300"])
                          for path in paths])

    def send(self, path: str, zips: Sequence[str], moved: Sequence[Callable[[float], None]]
             ) -> List[Answer]:
        """POST zips (of one folder) over one connection, each tried once; the answers, up to the
        first that did not come, be it that the run was stopped.

        `moved` is told from time to time how much of each zip has gone out, 0 to 1.
        """
        options = ["--progress-bar"]
        if self.settings.limit_rate:
            rate = max(1, self.settings.limit_rate // self.settings.procs)
            options += ["--limit-rate", str(rate)]
        over, bar = 0, b""

        def watch(said: bytes) -> None:
            nonlocal over, bar
            *ended, bar = (bar + said).split(b"\n")
            for tell in moved[over:over + len(ended)]:
                tell(0.99)
            over, bar = over + len(ended), bar[-200:]
            percent = re.findall(rb"(\d+\.\d)%", bar)
            if percent and over < len(moved):
                moved[over](min(0.99, float(percent[-1]) / 100))

        # A plain name in curl's own folder: `;` and `,` in --form names mean something.
        # --form and not --upload-file: XNAT then reads all before it answers, so that the status
        # is always seen and a body cut short imports nothing. Never --data-binary: it fills the
        # memory.
        answers = self._run([(path, options + [
            "--form", f"file=@{os.path.basename(zipped)};type=application/zip"])
            for zipped in zips], os.path.dirname(zips[0]), watch, whole=False)
        return answers[:sum(not each.code for each in answers) + 1]

    def _run(self, requests: Sequence[Tuple[str, List[str]]], folder: str = "/",
             watch: Callable[[bytes], None] = lambda _: None, whole: bool = True) -> List[Answer]:
        """One curl: the answer from each path, asked with these options, in their order."""
        settings, number = self.settings, next(self._numbers)
        # --globoff: no [] or {} in the URL. --include: the headers come with the body. Never --fail
        # (it hides the answer), never --location (a redirect would be followed with the login). A
        # dead link would hang for ever; XNAT is silent while it imports, so the longest silence is
        # minutes.
        shared = ["--globoff", "--include", "--fail-early", "--suppress-connect-headers",
                  "--max-filesize", "100000000", "--speed-limit", "1", "--speed-time",
                  str(settings.timeout), "--connect-timeout", str(min(30, settings.timeout)),
                  "--write-out", rf"\n%{{http_code}} %{{redirect_url}} {self._mark}\n"]
        shared += ["--cacert", settings.cacert] if settings.cacert else []
        shared += ["--insecure"] if settings.insecure else []
        # With login and cookie, a server session that expired heals itself. Never --user: of a
        # redirect without a host, curl tells a URL with the login in it.
        login = base64.b64encode(os.fsencode(f"{settings.user}:{settings.password}")).decode()
        secret = f"\n--header {quoted(f'Authorization: Basic {login}')}"
        secret += f"\n--cookie {quoted(f'JSESSIONID={self.cookie}')}" if self.cookie else ""
        asked = [[*options, "--url", settings.url + path] for path, options in requests]
        # --disable must come first, or ~/.curlrc is read. The rest on its standard input, where
        # `ps` does not see it; and a curl whose parent dies before it is fed has no URL.
        command = ["curl", "--disable", "--config", "-"]
        config = "\n--next".join(secret + "".join(
            f"\n{each}" if each.startswith("--") else f" {quoted(each)}" for each in shared + words)
            for words in asked)
        self.teller.log(f"curl {number}: {shlex.join(command[1:] + shared)} "
                        + " --next ".join(map(shlex.join, asked)))
        outage = self._outage
        done = self.programs.run(command, os.fsencode(config), folder, watch, whole)
        answers = read_answers(done, self._mark, [path for path, _ in requests])
        for (path, _), answer in zip(requests, answers):
            if self.cookie:  # the server renews one that has expired
                self.cookie = answer.cookie or self.cookie
            body = "" if "JSESSION" in path else " ".join(answer.body.split())[:500]  # a secret
            self.teller.log(f"curl {number}: {path}: exit {answer.code} {answer.error} HTTP "
                            f"{answer.status} {body}")
        with self._lock:  # only what was asked since can tell that it is over
            if outage and self._outage and not meaning_of(answers[-1]).gone:
                self._outage = False
                self.teller.say(f"{settings.url}: the server answers again")
        return answers

    def ask_until(self, about: str, request: Callable[[], Answer], files: int = 0,
                  tried: Optional[Answer] = None) -> Tuple[Answer, Meaning, int]:
        """Repeat a request while its answer may heal; the last answer, its meaning, the tries.

        `files` is what XNAT may still be importing after an answer that was lost; `tried` the
        answer of a first try. Raises Stop where no other request could fare better: login refused,
        server gone.
        """
        for tries in itertools.count(1):
            answer = tried if tried and tries == 1 else request()
            meaning = meaning_of(answer)
            if meaning.stops:
                raise self.stop_for(answer)
            if not meaning.heals or tries > self.settings.retries:
                break
            self.wait_to_heal(about, answer, tries, files)
        if meaning.gone and meaning_of(self.ask(
                "GET", BUILD_INFO, seconds=min(30, self.settings.timeout))).gone:
            raise self.stop_for(answer)
        return answer, meaning, tries

    def wait_to_heal(self, about: str, answer: Answer, tries: int, files: int = 0) -> None:
        """Wait, longer with each try. Of many who wait for a server that is gone one tells it."""
        self.programs.pause(0)  # after a stop nobody waits
        meaning = meaning_of(answer)
        # 1, 3, 9, 27, 81 s: a server that restarts is back within two minutes. After silence and
        # a proxy's 504 the first import may go on: XNAT needs 46 to 75 ms a file.
        least = 0.15 * files if meaning.goes_on else answer.retry_after
        pause = max(least, 3.0 ** min(tries - 1, 4)) * random.uniform(1.0, 1.3)
        with self._lock:
            tell = self.teller.log if meaning.gone and self._outage else self.teller.say
            self._outage = self._outage or meaning.gone
        tell(f"{about}: {meaning.means} ({answer.evidence}); trying again in {pause:.0f} s ({tries}"
             f" of {self.settings.retries})")
        self.programs.pause(pause)

    def stop_for(self, answer: Answer) -> Stop:
        """The end of the run: what an answer means, and what to do about it."""
        meaning = meaning_of(answer)
        return Stop(f"{self.settings.url}: {meaning.means} ({answer.evidence}): {meaning.to_do}")

    def get(self, path: str, tried: Optional[Answer] = None) -> Answer:
        """What is at `path`, 200 or 404: the answer that was `tried`, or what comes of trying on.
        Raises Trouble for others."""
        answer, meaning, _ = self.ask_until(path, lambda: self.ask_once(path)[0], tried=tried)
        if answer.status not in (200, 404) or answer.status == 200 and answer.is_html:
            raise Trouble(f"{path} cannot be read ({answer.evidence})", meaning.to_do)
        return answer

    def rows(self, path: str) -> List[Row]:
        """A listing, empty if it is not there (404). Raises Trouble for other answers."""
        return rows_of(self.get(path + "?format=json"))


def quoted(value: str) -> str:
    """A value in a curl config, which quotes as JSON does."""
    return json.dumps(value, ensure_ascii=False)


def read_answers(done: subprocess.CompletedProcess[bytes], mark: str, paths: Sequence[str]
                 ) -> List[Answer]:
    """Take curl's output apart: of each path the headers of each hop, the body, and the mark."""
    told = re.search(r"curl: \(\d+\) (.*)", done.stderr.decode("utf-8", "replace"), re.DOTALL)
    # After the bars of its progress; a proxy's address may hold a password.
    error = re.sub("[^ '\"]*@", "", " ".join(told[1].split()))[:200] if told else ""
    # Without a mark at its end (curl was killed) the search would take hours.
    marked = "".join(done.stdout.decode("utf-8", "replace").rpartition(mark + "\n")[:2])
    found = re.findall(
        r"((?:HTTP/[^\n]*\n(?:[^\r\n][^\n]*\n)*\r?\n)*)(.*?)\n(\d{3}) ([^\n]*) " + mark + "\n",
        marked, re.DOTALL)
    # It has ended at the first that failed (--fail-early); its HTTP status may still say 200.
    whole = found[:-1] if done.returncode > 0 else found
    answers = [Answer(0, int(status), body, "",
                      re.sub(re.escape(path) + "$", "", location),  # the URL that would be right
                      headers)
               for path, (headers, body, status, location) in zip(paths, whole)]
    return answers + [Answer(done.returncode, 0, "", error)] * (len(paths) - len(answers))


Row = Dict[str, str]


def table(found: Any) -> Optional[List[Row]]:
    """The rows of a listing with lower-case column names, None if it is none."""
    with suppress(KeyError, TypeError, AttributeError):
        return [{key.lower(): "" if value is None else str(value) for key, value in row.items()}
                for row in found["ResultSet"]["Result"]]
    return None


# ---- meanings ------------------------------------------------------------------------------


class Meaning(NamedTuple):
    """What an answer means, and what to do about it. The first whose `sign` is in it counts."""

    sign: str  # a regular expression on the evidence, in any case
    means: str
    to_do: str
    heals: bool = False  # waiting may
    gone: bool = False  # nothing that looks like a working XNAT answered
    goes_on: bool = False  # the server may still be at work on the request
    stops: bool = False  # no other request would fare better


NO = "the server refused it"
BUSY = "the server is busy"
LATER = "run again later"
MEANINGS = (
    # curl's exit statuses: what never came to an answer.
    Meaning(r"curl exit [56]\b", "the server's or the proxy's name cannot be found",
            "check URL, network and proxy settings", heals=True, gone=True),
    Meaning(r"curl exit 7\b", "nothing answers there", "check URL, network, and whether XNAT is up",
            heals=True, gone=True),
    Meaning(r"curl exit 28\b", "the connection went silent", "check the network, and see --timeout",
            heals=True, gone=True, goes_on=True),
    Meaning(r"curl exit 35\b", "no encrypted connection comes about",
            "check https or http, and the port", heals=True, gone=True),
    Meaning(r"curl exit 56\b.*(response|HTTP code) 4|HTTP 407", "the proxy refuses it",
            "check http_proxy, https_proxy and no_proxy"),
    Meaning(r"curl exit (16|18|52|55|56|65|92|95|96)\b", "the connection broke", LATER,
            heals=True, gone=True),
    Meaning(r"curl exit 60\b.*(expired|not yet valid|subject name)", "the server's certificate is "
            "not valid for this time or name", "check this machine's clock and the URL, then ask "
            "the XNAT admin"),
    Meaning(r"curl exit 60\b", "the server's certificate is not trusted",
            "give your site's CA with --cacert FILE"),
    Meaning(r"curl exit 77\b", "the CA file cannot be read",
            "check --cacert, CURL_CA_BUNDLE and SSL_CERT_FILE"),
    Meaning("curl exit -", "curl was killed", "run again", heals=True, gone=True),
    Meaning("curl exit", "curl failed", "run again"),
    # What lets us in nowhere.
    Meaning(r"HTTP (401|3.*/Login\.vm)", "login refused", "check USER and PASS (20 wrong ones lock "
            "the account for an hour; too many open sessions look the same)", stops=True),
    Meaning("HTTP 3.*UpdateUser", "the password has expired", "set a new one in the browser",
            stops=True),
    Meaning("HTTP 3.*InactiveAccount", "the account is not active yet", "ask the XNAT admin",
            stops=True),
    Meaning(r"HTTP 3.., to \w+://[^/]+/.*(app/template/|\b(mfa|saml2?|oauth2?|openid|"
            r"shibboleth|sso|cas|adfs|cdn-cgi|my\.policy|vpn|log-?in|sign-?in)(?=[/?.;&=]|$))",
            "a second login stands before XNAT",
            "give an alias token as USER and PASS, or ask the XNAT admin", stops=True),
    Meaning("HTTP 3.., to (?!.*/data/archive/)", "the server has another address",
            "give that one as URL", stops=True),
    Meaning("HTTP 200, a login page", "a web page came instead of an answer",
            "is this XNAT's own address?", stops=True),
    Meaning("HTTP 200, a web page", "a web page came instead of an answer",
            "is this XNAT's own address?"),
    Meaning("HTTP 404", "it is not there", "look at the session in XNAT's prearchive, and whether "
            "the URL is XNAT's own address"),
    # What waiting heals, by XNAT's own words and by a proxy's status.
    Meaning("HTTP (400|409|423|500).*(concurrent file sends|session processing (may already be )?"
            "in progress|concurrent modification is discouraged|duplicate archive attempt|"
            "destination session in use)", BUSY, LATER, heals=True, goes_on=True),
    Meaning("HTTP (504|524)", "a proxy gave up waiting", "lower --max-files, or ask the admin to "
            "raise proxy_read_timeout", heals=True, gone=True, goes_on=True),
    Meaning("HTTP (408|429)", BUSY, LATER, heals=True),
    Meaning("HTTP (502|503|52[0-3])", "XNAT does not answer behind its proxy", LATER,
            heals=True, gone=True),
    # What XNAT refuses to import.
    Meaning("HTTP 413", NO, "lower --max-files, or ask the admin to raise client_max_body_size"),
    Meaning("HTTP 403", NO, "ask the project's owner for the right to edit"),
    Meaning("unable to read dicom|contains no sop", NO, "here it reads as DICOM, so ask the "
            "XNAT admin whether the server's disk is full; if not, copy that file again from its "
            "source"),
    # What XNAT refuses to archive (PrearcSessionArchiver).
    Meaning("duplicated sop instance|non-parsable", NO, "XNAT has an image of it twice, or half a "
            "file: delete the session in XNAT's prearchive, then run again"),
    Meaning("same uid, but a different number", NO, "XNAT has this series under another number: "
            "ask the XNAT admin to delete that scan, and the session in the prearchive, then run "
            "again"),
    Meaning("matching files|same resources", NO, "XNAT has some of these images: delete the "
            "session in the prearchive, then run again; if it stays, or they are newer here, add "
            "--overwrite-files --again, and --only for this session"),
    Meaning("modality|another subject|session (subject|project|uid)", NO, "XNAT has another "
            "subject, study or modality under this label: rename the folder, and delete the "
            "session in XNAT's prearchive; if it is this one, its UIDs changed by a script, have "
            "it deleted in the archive too"),
    Meaning("event tracking for", "another user tried to archive it first",
            "see that this one does, or delete it in XNAT's prearchive, then run again"),
    Meaning("timeout interval", "XNAT is still at work on it", LATER),
    Meaning("HTTP 5", NO, "run again later; if it stays, ask the XNAT admin"),
    Meaning("", NO, "look at the session in XNAT's prearchive"),
)


def meaning_of(answer: Answer) -> Meaning:
    """What an answer means, by the first row that fits it."""
    evidence = answer.evidence
    return next(each for each in MEANINGS
                if re.search(each.sign, evidence, re.IGNORECASE | re.DOTALL))


# ---- xnat ----------------------------------------------------------------------------------

BUILD_INFO = "/xapi/siteConfig/buildInfo"
# Without a dataType: the projects that one may upload sessions to (PermissionsProjectHandler).
EDITABLE = "/data/projects?permissions=edit&format=json"
ADDRESS = re.compile(r"/data/prearchive/projects/([^/\s]+)/[^/\s]+/([^/\s]+)$")


class Scan(NamedTuple):
    """What the server holds of one series of a session."""

    uid: str  # Series Instance UID, '' if the server does not tell
    files: int  # DICOM files, counted by the server
    names_path: str  # where it lists their names


class Xnat(Curl):
    """A server, one login and one project on it."""

    version = ""  # until Contents has asked for it

    def log_in(self) -> None:
        """Open the one server session of this run. Raises Stop(3) with the reason."""
        answer = self.ask_until("login", lambda: self.ask("POST", "/data/JSESSION", seconds=60))[0]
        if answer.status in (403, 404, 405):
            raise Stop(f"{self.settings.url}: no login there ({answer.evidence}): is this XNAT's "
                       "own address? does a firewall, or XNAT, let this machine in?")
        if answer.status != 200:
            raise self.stop_for(answer)
        if not re.match(r"[0-9A-Za-z._-]{1,200}\s*$", answer.body):
            raise Stop(f"{self.settings.url}: no login came back: is this XNAT's own address?")
        self.cookie, self.project = answer.body.strip(), self.settings.project

    def check_project(self, told: Answer, editable: Answer) -> None:
        """Take the project's real ID (an alias may have been given), and see that we may add to it,
        by the project's own page and the list of EDITABLE ones. Raises Stop(3) with the reason.

        XNAT itself refuses none of this at import: a wrong project gives 200, and the data goes
        into another one or to Unassigned (GradualDicomImporter).
        """
        given, user = self.settings.project, self.settings.user
        try:
            found = self.get(self.path() + "?format=json", told)
            if found.status == 404:
                raise Trouble(f"not on this XNAT, or {user} cannot see it", "check its ID")
            self.project = str(found.json()["items"][0]["data_fields"]["ID"])
            if self.project not in [row.get("id") for row in rows_of(self.get(EDITABLE, editable))]:
                raise Trouble(f"{user} can see it but not add to it", "ask its owner to make "
                              f"{user} a member")
        except Trouble as trouble:
            raise Stop(f"project {given}: {trouble}")
        except (KeyError, IndexError, TypeError):
            raise Stop(f"project {given}: the server does not tell its ID: is this XNAT's own "
                       "address?")

    def path(self, *more: str) -> str:
        """The project's path, or that of something in it."""
        return "/data/projects/" + "/".join(quote(each, safe="") for each in (self.project, *more))

    def takes_side_by_side(self) -> bool:
        """Whether series of one session may go at the same time: since 1.8.8 (XNAT-7535)."""
        return [int(number) for number in re.findall(r"[0-9]{1,9}", self.version)[:3]] >= [1, 8, 8]

    def close(self) -> None:
        """Give the server session back: a user has a limited number of them."""
        self._outage = False  # nobody waits for its end any more
        if self.cookie:
            self.ask("DELETE", "/data/JSESSION", seconds=3)

    def scans(self, path: str) -> List[Scan]:
        """What the server holds of the session at `path`; in the prearchive, as of its last build.
        Raises Trouble if the server does not tell, or does not show an archived session."""
        urls = [path + "/scans?format=json&columns=ID,UID",
                path + "/scans/ALL/resources?format=json"]
        if "/prearchive/" in path:
            urls = [path + "?format=xml", path + "/resources?format=json"]
        first, second = self.ask_once(*urls)
        answer = self.get(urls[0], first)
        if answer.status == 404 and "/prearchive/" not in path:
            raise Trouble(f"it is archived, but XNAT does not show it to {self.settings.user} "
                          f"({answer.evidence}, {path})", "ask the project's owner (is it in "
                          "quarantine, deleted, or its subject shared from another project?)")
        uids, rows, found = scan_uids(answer), table(second.json()), []
        if any(row.get("file_count") == "" and row.get("label") == "DICOM" for row in rows or []):
            # Older versions may have no statistics until they are asked for. For newer ones this
            # would mean numbers that were stored once, not counted (CatalogUtils.populateTable).
            rows = table(self.ask_once(urls[1] + "&cache_file_stats=true")[0].json())
        if rows is None or not set(uids) <= {row.get("cat_id", "") for row in rows}:
            rows = [dict(row, cat_id=scan) for scan in uids
                    for row in self.rows(f"{path}/scans/{quote(scan, safe='')}/resources")]
        for row in rows:
            scan, label, count = (row.get(name, "") for name in ("cat_id", "label", "file_count"))
            if scan in uids and label in ("DICOM", "secondary"):
                names_path = f"{path}/scans/{quote(scan, safe='')}/resources/{label}/files"
                if not re.fullmatch("[1-9][0-9]{0,8}", count):  # a catalog without statistics
                    count = str(len(self.names(names_path)) or ("0" if count == "0" else ""))
                if not count:
                    raise Trouble(f"XNAT does not tell how many files scan {scan} has ({path})",
                                  "ask the XNAT admin to refresh its catalogs, then run again")
                found.append(Scan(uids[scan], int(count), names_path))
        return found

    def names(self, *paths: str) -> List[str]:
        """The names of the files that are listed at these paths, as they are stored."""
        return [row.get("name", "") for path in paths for row in self.rows(path)]

    def settled(self, address: str) -> Row:
        """The prearchive's row of a session once nothing works on it, empty if it is gone."""
        for pause in (1.0, 2.0, 5.0, 10.0) + (30.0,) * 60:
            row = (self.rows(address) or [{}])[0]
            status = row.get("status", "")
            # _BUILDING, ARCHIVING, QUEUED_ARCHIVING, MOVING ...: nobody may touch it (LockAndSync)
            if not status.startswith("_") and (not status.endswith("ING") or status == "RECEIVING"):
                return row if status else {}
            if pause == 2.0:
                self.teller.say(f"{address}: XNAT is at work on it ({status}): waiting")
            self.programs.pause(pause)
        raise Trouble(f"XNAT is still at work on it ({address} is {status})",
                      f"{LATER}; if it stays so, ask the XNAT admin to reset its status")

    def post_once(self, session: Session, zips: Sequence[str],
                  moved: Sequence[Callable[[float], None]]) -> List[Answer]:
        """POST zips of a session as Curl.send does."""
        query = {"import-handler": "DICOM-zip", "PROJECT_ID": self.project,
                 "SUBJECT_ID": session.subject_label, "EXPT_LABEL": session.label,
                 "overwrite": "append",
                 "prevent_auto_commit": "true"}  # else five idle minutes archive half a session
        return self.send("/data/services/import?" + urlencode(query), zips, moved)

    def post(self, session: Session, series: Series, files: int, zipped: str,
             moved: Callable[[float], None], tried: Optional[Answer] = None) -> str:
        """POST a zip of so many files until it is sent, refused or out of tries; its address.
        `tried` is the answer of a first try.

        Raises Trouble unless XNAT answers with an address in our project and session, Misplaced
        if it is another project: it says 200 too when it kept nothing (DicomZipImporter).
        """
        answer, meaning, tries = self.ask_until(
            f"{session.label} {series.name}",
            lambda: self.post_once(session, [zipped], [moved])[0], files, tried)
        series.tries, series.http = series.tries + tries, answer.status
        addresses, what = sorted(set(answer.body.split())), answer.evidence
        if answer.status in (413, 504, 524):  # a proxy's limits: how big was it?
            what += f", for a zip of {size(os.path.getsize(zipped))} with {plural(files, 'file')}"
        if answer.status != 200:
            raise Trouble(f"{meaning.means} ({what})", meaning.to_do, refused=True)
        if not addresses:
            raise Trouble("XNAT kept none of these files (empty answer)", "ask the project's owner "
                          "about import filters and anonymization scripts; if it is meant so, "
                          "leave that series out with --config", refused=True)
        for address in addresses:
            found = ADDRESS.search(address)
            if not found:
                raise Trouble(f"no address came back but {'a web page' if answer.is_html else what}"
                              , "is this XNAT's own address, and is it up? a firewall or a "
                              "maintenance page may answer in its place", refused=True)
            if found[1] != self.project:
                raise Misplaced(f"project {self.project}: XNAT put {session.label} {series.name} "
                                f"into project {found[1]} ({address}): do not run again, have it "
                                "deleted there, with what else is there of sessions that are not "
                                "finished, and ask the XNAT admin")
            if found[2] != session.label or len(addresses) > 1:
                raise Trouble(f"XNAT put it into another session ({', '.join(addresses)})",
                              "look there, and ask the XNAT admin")
        return addresses[0][addresses[0].index("/data/"):]

    def build(self, address: str) -> None:
        """Let XNAT say what a prearchive session holds; archives nothing. Raises Trouble."""
        answer, meaning, _ = self.ask_until(
            f"build of {address}", lambda: self.ask("POST", address + "?action=build"))
        if answer.status != 200:
            raise Trouble(f"{meaning.means} ({answer.evidence})", meaning.to_do, refused=True)

    def commit(self, session: Session, address: str) -> str:
        """Commit a whole session; where it lies then, or '' if it is gone from the prearchive.

        Never twice at a time: after an answer that was lost it looks what has become of the
        session before it asks again. Raises Trouble.
        """
        self._check_subject(session, address)
        query = {"action": "build" if self.settings.review else "commit",
                 "EXPT_LABEL": session.label}  # else rules of the site may give it another one
        if self.settings.overwrite_files:
            query["overwrite_files"] = "true"
        for tries in itertools.count(1):
            answer = self.ask("POST", f"{address}?{urlencode(query)}")
            meaning = meaning_of(answer)
            found = re.search(r"/data/archive(/projects/\S+)", answer.body)
            if answer.status == 301 and found:  # the subject's label may differ in case
                if not found[1].endswith("/" + session.label):
                    raise Trouble(f"XNAT archived it under another label ({found[1]})",
                                  "look there, and ask the XNAT admin")
                return "/data" + found[1]
            if answer.status == 200 and "/data/prearchive/" in answer.body:
                return address
            if meaning.stops:
                raise self.stop_for(answer)
            # Refused, or the answer was lost on the way while XNAT went on: wait and look. READY
            # may mean that archiving is queued.
            lost = meaning.heals or answer.status == 409 and "locked" in answer.evidence
            may_retry = lost and tries <= self.settings.retries
            if may_retry:
                self.wait_to_heal(f"commit of {session.label}", answer, tries)
            for pause in (0.0, 1.0, 3.0, 6.0):
                self.programs.pause(pause)
                status = self.settled(address).get("status", "")
                if not lost or status != "READY":
                    break
            if not status:
                return ""
            if not may_retry:
                break
        if meaning.heals and status in ("CONFLICT", "ERROR"):  # XNAT keeps the reason
            answer = self.ask("GET", address + "/logs/last")
        raise Trouble(f"XNAT did not archive it ({answer.evidence}; {address} is {status})",
                      meaning_of(answer).to_do, refused=True)

    def _check_subject(self, session: Session, address: str) -> None:
        """Raises Trouble if another subject has got a session under our label meanwhile."""
        subject = self.settled(address).get("subject", session.subject_label)
        if subject.lower() != session.subject_label.lower():
            raise Trouble(f"the prearchive has it under subject {subject}, here it is subject "
                          f"{session.subject_label} ({address})", "rename the folder, or delete "
                          "that in the prearchive, then run again")


class Contents:
    """What archive and prearchive of the project hold under our labels, asked for all at once.

    Not every server tells this to every user; sessions are then asked for one by one.
    """

    def __init__(self, xnat: Xnat, sessions: Sequence[Session]) -> None:
        """Meet the project, before any byte. Raises Stop(3) if nothing can be added to it."""
        self.xnat = xnat
        told, editable, *answers = xnat.ask_once(xnat.path() + "?format=json", EDITABLE,
                                                 *self._urls())
        xnat.check_project(told, editable)
        # An alias was given; or the server hiccuped, and what it said then is not what it holds.
        if xnat.project != xnat.settings.project or {told.status, editable.status} != {200}:
            answers = xnat.ask_once(*self._urls())
        code, listed, waiting, info = (answer.json() for answer in answers)
        # Without a version the series of a session go one by one.
        xnat.version = str(info.get("version", "")) if isinstance(info, dict) else ""
        # Whether XNAT replaces files that it has (PrearchiveCode.AutoArchiveOverwrite).
        self.replaces = xnat.settings.overwrite_files or code == 5
        self.manual = code == 0  # what is committed waits for a person
        labels = {session.label for session in sessions}
        rows = table(listed)
        self._told = rows is not None
        self._archive = {row["label"]: row for row in rows or [] if row.get("label") in labels}
        self._prearchive: Dict[str, List[str]] = defaultdict(list)
        for row in self._listed(table(waiting)):
            if row.get("name") in labels:
                self._prearchive[row["name"]].append(address_of(row))

    def _urls(self) -> List[str]:
        """Where XNAT tells what it does with a commit, what it holds, and its version: some
        firewalls let nobody ask for that."""
        archive = "/data/experiments?" + urlencode({
            "project": self.xnat.project, "xsiType": "xnat:imageSessionData",
            "columns": "label,subject_label,UID", "format": "json"}, safe=":,")
        return [self.xnat.path("prearchive_code"), archive,
                self._prearchive_path() + "?format=json", BUILD_INFO]

    def _prearchive_path(self) -> str:
        return self.xnat.path().replace("/data/", "/data/prearchive/")

    def _listed(self, rows: Optional[List[Row]] = None) -> List[Row]:
        """The prearchive's listing; a hiccup must not look like an empty prearchive."""
        if rows is None:
            with suppress(Trouble):  # not every user may see it
                rows = self.xnat.rows(self._prearchive_path())
        return rows or []

    def archived(self, session: Session, again: bool = False) -> Row:
        """Label, subject and Study UID of a session in the archive, empty if it is not there.
        The meeting has told, unless it is asked for `again`."""
        if again or not self._told and session.label not in self._archive:
            row = self._fields(self.xnat.path("experiments", session.label))
            if row.get("subject_id"):
                owner = self._fields(self.xnat.path("subjects", row["subject_id"]))
                row["subject_label"] = owner.get("label") or row["subject_id"]
            if row or session.label not in self._archive:  # in quarantine it is listed, not shown
                self._archive[session.label] = row
        return self._archive.get(session.label, {})

    def _fields(self, path: str) -> Row:
        """The fields of the item at `path`, empty if it is not there."""
        answer = self.xnat.get(path + "?format=json")
        found = answer.json()
        if found is None and answer.status == 200:
            raise Trouble(f"{path} cannot be read ({answer.evidence})", "is this XNAT's own "
                          "address?")
        with suppress(KeyError, IndexError, TypeError, AttributeError):
            return {key.lower(): str(value or "")
                    for key, value in found["items"][0]["data_fields"].items()}
        return {}

    def path(self, session: Session) -> str:
        """Where the archive has a session. XNAT finds subjects without regard to case; the label is
        as it has it."""
        subject = self._archive.get(session.label, {}).get("subject_label")
        return self.xnat.path("subjects", subject or session.subject_label, "experiments",
                              session.label)

    def waiting(self, session: Session, *more: str) -> Dict[str, Row]:
        """What of a session waits in the prearchive now, by address; `more` are addresses that
        the ledger knows. What has left it since the meeting may be in the archive."""
        known = dict.fromkeys([*filter(None, more), *self._prearchive.get(session.label, [])])
        found = {address: self.xnat.settled(address) for address in known}
        if not all(found.values()):
            self.archived(session, again=True)
        return {address: row for address, row in found.items() if row}

    def waits(self, session: Session, address: str) -> bool:
        """Whether a session is in the prearchive at this address."""
        return (address in self._prearchive.get(session.label, [])
                or bool(self.xnat.settled(address)))

    def check_label(self, session: Session, series: List[Series], waiting: Dict[str, Row],
                    memory: Memory) -> None:
        """Raises Trouble if XNAT has something else under this session's label.

        If an earlier run brought it there, a script of the site may have changed its Study UID.
        """
        ours = self.xnat.settings.again and bool(memory.ended) or any(
            memory.of(each).is_of(each.images, each) or memory.sent(each) for each in series)
        study = next(image.study for each in series for image in each.images)
        archived = self.archived(session)
        rows = [("archive", archived.get("subject_label", ""), archived.get("uid", ""))]
        rows += [("prearchive", row.get("subject", ""), row.get("tag", ""))
                 for row in waiting.values()]
        for where, subject, uid in rows:
            if subject.lower() not in ("", session.subject_label.lower()):
                raise Trouble(f"XNAT's {where} has {session.label} under subject {subject}, here "
                              f"it is subject {session.subject_label}", "rename the folder")
            if uid and study and uid != study and not ours:
                raise Trouble(f"XNAT's {where} has another study under the label {session.label} "
                              f"(there {uid}, here {study})", "rename the session folder" + (
                                  "; if it is this session, its UIDs changed by a script of the "
                                  "site, delete it in the prearchive" if where == "prearchive" else
                                  "; if it is a script of the site that changes UIDs, "
                                  f"{anew(session, True)}" if memory.ended else ""))

    def leftovers(self, sessions: List[Session]) -> List[str]:
        """Addresses in the prearchive beside sessions that are archived, with their status."""
        labels = {session.label for session in sessions}
        return [f"{address_of(row)} ({row.get('status', '')})"
                for row in (self._listed() if labels else []) if row.get("name") in labels]


def rows_of(answer: Answer) -> List[Row]:
    """The rows of a listing, none if it is not there. Raises Trouble if it is something else."""
    rows = table(answer.json())
    if rows is None and answer.status != 404:
        raise Trouble(f"a listing cannot be read ({answer.evidence})",
                      "check that this is XNAT's own address")
    return rows or []


def scan_uids(answer: Answer) -> Dict[str, str]:
    """Series UIDs of a session's scans by ID: of a listing, or of a prearchive session's XML."""
    if not answer.body.lstrip().startswith("<"):
        return {row.get("id", ""): row.get("uid", "") for row in rows_of(answer)}
    scans = [dict(re.findall(r'\b(ID|UID)="([^"]*)"', scan))
             for scan in re.findall(r"<(?:\w+:)?scan\s([^>]*)>", answer.body)]
    return {html.unescape(scan["ID"]): scan.get("UID", "") for scan in scans if "ID" in scan}


def project_of(answer: Optional[Answer]) -> str:
    """Where XNAT has put what was posted, '' if the answer does not tell."""
    found = ADDRESS.search(answer.body.strip()) if answer else None
    return found[1] if found else ""


def address_of(row: Row) -> str:
    """Where a row of the prearchive's listing can be asked for."""
    return "/data" + row.get("url", "").replace("/data/", "/", 1)


# ---- ledger --------------------------------------------------------------------------------


class Known(NamedTuple):
    """What the ledger keeps of one series of a session that has ended."""

    listing: str = ""  # fingerprint of its files' names, sizes and times
    images: str = ""  # of what its images are
    number: int = 0  # of them
    by_crc: bool = False  # whether `images` has their CRC-32s, which zip has computed
    uids: str = ""  # their Series UIDs
    held: int = 0  # files that XNAT counted of it

    def is_of(self, images: List[File], series: Series) -> bool:
        """Whether these images of a series are the ones that were noted."""
        if not images or len(images) != self.number:
            return False
        if self.listing == series.listing and len(series.images) == self.number:
            return True
        for image in images if self.by_crc else ():
            crc_of(series, image)
        return images_fingerprint(images, self.by_crc) == self.images


@dataclass
class Memory:
    """What earlier runs have done for one session."""

    # On its way: series, first and last name, fingerprint, UID, address of each part that is sent.
    parts: List[Dict[str, str]] = field(default_factory=list)
    ended: str = ""  # archived, prearchived, nothing to send
    path: str = ""  # where that was counted
    files: int = 0  # so many
    whole: bool = False  # nothing was wrong with it
    time_ns: int = 1 << 63  # when
    study: str = ""  # its Study UID, if XNAT had it under our UIDs
    elsewhere: bool = False  # it was sent from another ROOTDIR
    series: Dict[str, Known] = field(default_factory=dict)  # by the names of their folders

    @property
    def address(self) -> str:
        return self.parts[-1]["address"] if self.parts else ""

    def of(self, series: Series) -> Known:
        """What is known of a series, be it under another folder's name; before it is read, by
        its name."""
        known, uids = self.series.get(series.name, Known()), uids_of(series)
        its = set(known.uids.split())  # an older ledger has none
        if not uids or known.number and (not its or its & set(uids.split())):
            return known
        same = [each for each in self.series.values() if each.uids == uids]
        return next((each for each in same
                     if len(same) == 1 or each.is_of(series.images, series)), Known())

    def noted(self) -> Counter[str]:
        """How many images an earlier run has noted, by UIDs: two folders may have the same."""
        noted: Counter[str] = Counter()
        for each in self.series.values():
            noted[each.uids] += each.number
        return noted

    def gone(self, series: List[Series]) -> List[str]:
        """Series whose images were sent from here, and are in no folder any more."""
        here = {each.name for each in series
                if each.images or each.problems or each.status in ("left out", "copy")}
        images = Counter(image.series for each in series for image in each.images)
        noted = self.noted()
        sent = {part["series"]: part["uid"] for part in self.parts}
        sent.update({name: each.uids for name, each in self.series.items() if each.number})
        return [] if self.elsewhere else [
            name for name, uids in sent.items() if name not in here and not (
                uids and max(1, noted[uids]) <= sum(images[uid] for uid in uids.split()))]

    def is_same(self, series: List[Series]) -> bool:
        """Whether the folder is what an earlier run verified, by names, sizes and times."""
        return self.whole and not self.parts and not any(each.problems for each in series) and {
            each.name: each.listing for each in series if not each.status} == {
            name: known.listing for name, known in self.series.items()}

    def sent(self, series: Series) -> List[File]:
        """Images of a series, as they are now, that were sent to `address`."""
        found: List[File] = []
        for part in self.parts:
            images = images_in(part, series)
            if images and part["address"] == self.address and (
                    part["files"] == part_fingerprint(images)):
                found += images
        return found

    def touched(self, series: List[Series]) -> Set[File]:
        """Images in the place of some that were sent, and perhaps not the same."""
        return {image for each in series for part in self.parts for image in images_in(part, each)
                } - {image for each in series for image in self.sent(each)}

    def renewed(self, series: List[Series]) -> Dict[str, Known]:
        """What is to be remembered of these series from now on."""
        found = {}
        for each in series:
            by_crc = all(image.crc >= 0 for image in each.images)
            if each.damaged and self.of(each).number > len(each.images):  # it may be mended
                found[each.name] = self.of(each)._replace(held=each.held)
            elif not by_crc and self.of(each).listing == each.listing:  # its CRC-32s are still true
                found[each.name] = self.of(each)._replace(held=each.held)
            elif each.status != "left out":
                found[each.name] = Known(each.listing, images_fingerprint(each.images, by_crc),
                                         len(each.images), by_crc, uids_of(each), each.held)
        for name in self.gone(series):  # until --again
            uid = next((part["uid"] for part in self.parts if part["series"] == name), "")
            found[name] = self.series.get(name, Known(number=1, uids=uid))
        return found


def uids_of(series: Series) -> str:
    """The Series UIDs of its images: one, nearly always."""
    return " ".join(sorted({image.series for image in series.images}))


def images_in(part: Dict[str, str], series: Series) -> List[File]:
    """Images of a series whose names stand where those of a part do, if the part is of it."""
    if part["series"] != series.name:
        return []
    return [each for each in series.images if part["first"] <= each.name <= part["last"]]


def part_fingerprint(images: List[File]) -> str:
    return fingerprint(f"{each.name} {each.bytes} {each.time_ns} {each.sop}" for each in images)


def images_fingerprint(images: List[File], by_crc: bool) -> str:
    """What images are: UIDs, sizes and, where they are known, CRC-32s."""
    return fingerprint(sorted(f"{each.sop} {each.bytes} {each.crc if by_crc else ''}"
                              for each in images))


class Ledger:
    """The file that remembers: JSON, a line each, synced; a torn line loses itself only.

    Of a session that has ended only the place of its line is kept in memory.
    """

    def __init__(self, settings: Settings, project: str) -> None:
        """Raises Stop(3) if it cannot be used. A dry run only reads it, if it is there."""
        self.path = os.path.join(os.path.abspath(settings.workdir), "dicomUpload.ledger")
        self.exclusions: Set[str] = set()  # of earlier runs
        self.from_here: Dict[str, Session] = {}  # sessions of this ROOTDIR, by label
        self._root = os.path.realpath(settings.rootdir)
        self._where = {"v": 2, "server": settings.url, "project": project}
        # Where in the file; whether it is of this ROOTDIR.
        self._ended: Dict[Tuple[Tuple[str, str], bool], int] = {}
        self._parts: Dict[Tuple[str, str], List[Dict[str, str]]] = defaultdict(list)
        self._lock = threading.Lock()
        self._end, raw, flags = 0, b"\n", os.O_RDWR | os.O_CREAT | os.O_APPEND
        if settings.dry_run:
            flags = os.O_RDONLY
            self.path = self.path if os.path.exists(self.path) else os.devnull
        try:
            self._file = os.open(self.path, flags, 0o600)
            with open(self.path, "rb") as lines:
                for raw in lines:
                    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                        line = json.loads(raw)  # torn, or of another version: the server is asked
                        if all(line[key] == value for key, value in self._where.items()):
                            self._take(line, self._end)
                    self._end += len(raw)
            if not raw.endswith(b"\n") and not settings.dry_run:
                self._write(b"\n")
        except OSError as error:
            raise Stop(f"ledger {self.path}: cannot be used ({error.strerror}): fix it, or delete "
                       "it (the server is then asked what it has)")

    def _take(self, line: Dict[str, Any], at: int) -> None:
        """Remember a line that stands at this place."""
        if line["event"] == "exclude":
            self.exclusions = set(map(str, line["names"]))
            return
        key, here = (line["subject"], line["session"]), line["root"] == self._root
        if not all(isinstance(each, str) for each in key):
            raise TypeError
        if line["event"] == "gone":
            self.from_here.pop(key[1], None)
        elif line["event"] == "sent":
            names = "series", "first", "last", "files", "uid", "address", "root", "joined"
            self._parts[key].append({name: str(line[name] or "") for name in names})
        else:
            self._parts.pop(key, None)
            self._ended[key, here] = at
        if line["event"] != "gone" and here:
            self.from_here[key[1]] = Session(*map(str, line["folders"]))

    def of(self, session: Session) -> Memory:
        """What is known of a session."""
        key, memory = (session.subject_label, session.label), Memory()
        with self._lock, suppress(ValueError, KeyError, TypeError, AttributeError, OSError,
                                  OverflowError):
            memory.parts = list(self._parts.get(key, []))
            memory.elsewhere = any(part["root"] != self._root for part in memory.parts)
            at = self._ended.get((key, True), self._ended.get((key, False)))
            if at is not None:
                with open(self.path, "rb") as lines:
                    lines.seek(at)
                    line = json.loads(lines.readline())
                series = {str(name): Known(*known) for name, known in line["series"].items()}
                types = [type(value) for value in Known()]
                if any([type(value) for value in known] != types for known in series.values()):
                    raise TypeError
                memory = replace(
                    memory, series=series, path=str(line["path"]), files=int(line["files"]),
                    ended=str(line["where"]), whole=bool(line["whole"]),
                    elsewhere=memory.elsewhere or line["root"] != self._root,
                    study=str(line.get("study", "")),  # an older ledger has neither
                    time_ns=int(line.get("time_ns", memory.time_ns)))
        return memory

    def add(self, event: str, session: Optional[Session] = None, **more: Any) -> None:
        """Write an event down and sync it. Raises Stop(3) if that fails."""
        line = dict(self._where, at=now(), event=event, root=self._root, **more)
        if session:
            line.update(subject=session.subject_label, session=session.label, folders=session[:2])
        try:
            with self._lock:
                at = self._end
                self._write(json.dumps(line).encode() + b"\n")
                self._take(line, at)
        except OSError as error:
            raise Stop(f"ledger {self.path}: cannot be written ({error.strerror}): make room, then "
                       "run again")

    def _write(self, raw: bytes) -> None:
        if os.write(self._file, raw) < len(raw):  # a full disk takes the first half in silence
            os.ftruncate(self._file, self._end)  # else the next line would be lost with it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._file)
        self._end += len(raw)

    def close(self) -> None:
        os.close(self._file)


# ---- upload --------------------------------------------------------------------------------


class Comparison:
    """One session held against what the server has of it: which images are missing there."""

    def __init__(self, contents: Contents, outcome: Outcome, memory: Memory) -> None:
        self.contents = contents
        self.xnat = contents.xnat
        self.outcome = outcome
        self.session = outcome.session
        self.series = outcome.series
        self.memory = memory
        self.counts: Counter[str] = Counter()  # files that the server has, by Series UID
        self.by_uid: Dict[str, List[Tuple[Series, File]]] = defaultdict(list)
        for each in self.series:
            for image in each.images:
                self.by_uid[image.series].append((each, image))

    def compare(self, waiting: Dict[str, Row]) -> Tuple[List[str], List[Scan]]:
        """Mark the images that the server has; the prearchive addresses that wait for a commit,
        and what the archive has. Raises Trouble where sending more could only make it worse."""
        archived, study = self.contents.archived(self.session), self._study()
        held = self.xnat.scans(self.contents.path(self.session)) if archived else []
        if self.memory.study and not self._same_uids(held) and (
                archived.get("uid") not in ("", study)):
            raise Trouble(f"XNAT's archive has another study under the label {self.session.label} "
                          "than the one that an earlier run saw there", "rename the session "
                          f"folder, or have that deleted there and, {anew(self.session)}")
        there, seen = self._among(held), held
        ours = self.memory.address in waiting
        found = [self.memory.address] if ours else []
        if not ours and len(there) < sum(map(len, self.by_uid.values())):
            found = list(waiting)
        if not ours and found or any(part["joined"] for part in self.memory.parts if ours):
            self.outcome.joined = True
            scans = self._join({address: waiting[address] for address in found})
            seen, joined = held + scans, self._among(scans)
            if there & joined and not ours and not self.contents.replaces:
                raise Trouble(f"the prearchive holds a copy of what is archived ({', '.join(found)}"
                              "), and what is missing would join it",
                              "look there; if it holds nothing else, delete that copy in the "
                              "prearchive, then run again")
            there |= joined - (self.memory.touched(self.series) if ours else set())
        if self.memory.address and not ours and not archived:
            self.xnat.teller.say(f"{self.session.label}: is no longer in the prearchive: sending "
                                 "it again")
        # What is there may be of another machine alone, of whose series none is here.
        same_uids = archived.get("uid") == study or self._same_uids(seen)
        for each in self.series:
            sent = self.memory.sent(each)
            for image in [] if self.xnat.settings.dry_run else sent:
                crc_of(each, image)  # an earlier run knew what zip had computed
            if archived or waiting and seen:
                self._recall(each, there, same_uids)
            if ours or archived and not same_uids:
                there.update(sent)
            for image in each.images:
                image.missing = image not in there
            each.there = sum(not image.missing for image in each.images)
            if each.images and each.there == len(each.images):
                each.status = "already there"
        return found, held

    def _same_uids(self, scans: List[Scan]) -> bool:
        """Whether these may have our UIDs; else a script of the site has changed them, and the
        ledger counts."""
        return not scans or any(scan.uid in self.by_uid for scan in scans if scan.uid)

    def _study(self) -> str:
        """Our Study UID."""
        return next(iter(self.by_uid.values()))[0][1].study

    def _among(self, scans: List[Scan]) -> Set[File]:
        """Our images among these: by Series UID and count, and by names where these differ."""
        there, noted = set(), self.memory.noted()  # type: Set[File], Counter[str]

        def is_noted(series: Series) -> bool:
            """Whether what is there of a series is what an earlier run has noted."""
            return self.memory.of(series).is_of([each for each in series.images if each in there],
                                                series)

        for uid, pairs in self.by_uid.items():
            mine = [scan for scan in scans if uid and scan.uid == uid]
            count, images = sum(scan.files for scan in mine), [image for _, image in pairs]
            self.counts[uid] += count
            series = list(dict.fromkeys(each for each, _ in pairs))
            # Where an earlier run has noted another number, as many are no proof.
            as_many = count == len(images) and noted[uid] in (0, count)
            if as_many:
                there.update(images)
            if as_many or not count:
                continue
            names = self.xnat.names(*(scan.names_path for scan in mine))
            absent, sure = not_among(images, names)
            if len(absent) == len(images) < count and self._named_by_others(uid, names):
                absent = []  # the count tells
            # XNAT would refuse it, or put it in another image's place.
            taken = any(stored_name(image) in names for image in absent)
            there |= set(images) - set(absent)
            if taken or absent and not sure and not all(map(is_noted, series)):
                for each in series:
                    each.problems.append(Trouble(
                        (f"XNAT has {count} of its {plural(len(images), 'file')}" if
                         count < len(images) else
                         f"XNAT has {plural(count, 'file')} of it, here are {len(images)}") +
                        f", under other names (not {absent[0].name}): which are missing cannot be "
                        "told",
                        "delete that in the prearchive, then run again"
                        if "/prearchive/" in mine[0].names_path else anew(self.session, True)))
        return there

    def _named_by_others(self, uid: str, names: List[str]) -> bool:
        """Whether another program may have stored a series under these names: none looks as ours
        do, and no earlier run has sent it."""
        shapes = {name_shape(stored_name(image)) for _, image in self.by_uid[uid]}
        return shapes.isdisjoint(map(name_shape, names)) and not any(
            each.by_crc for each in self.memory.series.values() if each.uids == uid)

    def _join(self, waiting: Dict[str, Row]) -> List[Scan]:
        """What waits in the prearchive, left there by a run whose workdir is lost, or by another
        tool. Raises Trouble if its UIDs are not ours."""
        scans, study = [], self._study()
        for address, row in waiting.items():
            if row.get("status") in ("RECEIVING", "ERROR"):  # it tells nothing, or not all
                if self.xnat.settings.dry_run:
                    self.xnat.teller.say(f"{self.session.label}: waits in the prearchive ({address}"
                                         "); what of it is there shows when it is sent")
                    continue
                self.xnat.build(address)
                row = self.xnat.settled(address)
            if row.get("tag", study) != study and not self.memory.ended:
                raise Trouble("the prearchive holds some of it with UIDs that a script has changed "
                              f"({address}): what is missing cannot be told",
                              "delete that in the prearchive, then run again")
            scans += self.xnat.scans(address)
        return scans

    def _recall(self, series: Series, there: Set[File], same_uids: bool) -> None:
        """By what an earlier run has noted of a series that XNAT has: its images are there or
        not, or it fails."""
        known, trouble = self.memory.of(series), None
        if not known.number or not series.images or series.problems:
            return
        # Without what has come here from other folders; an older ledger has no UIDs.
        images = [each for each in series.images
                  if not known.uids or each.series in known.uids.split()]
        found = [image for image in images if image in there]
        same = known.is_of(found or images, series)
        more, lost = len(found) - known.number, len(images) - len(found)
        # More than can have come to the server since have taken the names of others.
        taken = known.held and more > max(0, self.counts[known.uids] - known.held)
        # Where files were removed here, nothing can be said of the others unless they are newer.
        newer = more < 0 and any(image.time_ns > self.memory.time_ns for image in found)
        if not same_uids and same:
            there.update(images)
        elif not same_uids:
            trouble = Trouble("has changed since it was sent, and XNAT has other UIDs: which "
                              "images are missing cannot be told", anew(self.session, True))
        elif lost and known.is_of(images, series):
            trouble = Trouble("an earlier run saw it archived, and " + (
                f"{plural(lost, 'file')} of it" if found else "it") + " is not there any more",
                              anew(self.session, True))
        # Times alone are no change.
        elif (not more or taken or newer) and known.listing != series.listing and not same:
            trouble = Trouble("has changed since it was sent", "with --overwrite-files it replaces "
                              "what XNAT has")
        if trouble and found and self.xnat.settings.overwrite_files:
            there.difference_update(images)
        elif trouble:
            series.problems.append(trouble)


def not_among(images: List[File], names: List[str]) -> Tuple[List[File], bool]:
    """The images that are not among a scan's files by their names, and whether that is sure."""
    left = Counter(names)
    # Other programs name files by their UID, and XNAT does so with a second file of one name.
    by_uid = {uid: name for name in names for uid in re.findall(r"\d+(?:\.\d+)+", name)}
    absent = []
    for image in images:
        name = by_uid.get(image.sop) or stored_name(image)
        if left[name] < 1:
            absent.append(image)
        left[name] -= 1
    return absent, bool(names) and max(left.values()) < 1  # what is left over may be an absent one


def stored_name(image: File) -> str:
    """The name under which XNAT stores a file (GradualDicomImporter), unless another has it."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", os.path.basename(image.name))


FIRST = 50  # files
LOAD = 16 << 20  # bytes of what goes over one connection, unless it is one part


class Part(NamedTuple):
    """Up to --max-files images of one series: one zip, one POST."""

    series: Series
    files: List[File]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


class Zip(NamedTuple):
    """A part that is packed."""

    path: str
    bytes: int
    part: Part


class Sender:
    """Packs what is missing and posts it: --procs uploads side by side, twice as many loads of
    zips."""

    def __init__(self, xnat: Xnat, workdir: Optional[Workdir], ledger: Ledger, alone: bool) -> None:
        self.xnat = xnat
        self.workdir = workdir
        self.ledger = ledger
        self.alone = alone  # whether there is one session only
        self.level = Level(xnat.settings.compression)
        # Of the run's first part: its answer tells soon what the line is.
        self.first = iter([FIRST] if xnat.settings.compression == AUTO else [])
        procs = xnat.settings.procs
        self.slots = threading.Semaphore(procs)  # uploads and commits
        self.loads = threading.Semaphore(2 * procs)  # on the disk
        self.lanes, self.packers = ThreadPoolExecutor(2 * procs), ThreadPoolExecutor(2 * procs)

    def send(self, outcome: Outcome, addresses: List[str]) -> List[str]:
        """POST what is missing, part by part; the addresses where the session lies now."""
        missing = sum(bool(each.missing) for each in outcome.series)
        first = next(self.first, 0) if missing else 0
        # While a long session is the only one, nobody works until its first answer has come: one
        # file is enough to make the session.
        if self.alone and not addresses and missing > self.xnat.settings.procs > 1 and (
                self.xnat.takes_side_by_side()):
            first = 1
        jobs = []
        for lane in self.plan(outcome, first):
            jobs.append(self.lanes.submit(self.xnat.programs.guarded, self._send_lane, outcome,
                                          lane))
            if not outcome.address:
                outcome.answered.wait()
                outcome.answered.clear()
        return list(dict.fromkeys(addresses + [each for job in jobs for each in job.result()]))

    def plan(self, outcome: Outcome, first: int = 0) -> List[List[List[Part]]]:
        """What is missing of a session, as it goes: lanes of loads; the first part of at most so
        many files, if that is told."""
        side_by_side = self.xnat.takes_side_by_side()
        scans: Dict[str, List[Part]] = defaultdict(list)  # in each, parts must not meet
        for part in self.cut(outcome.series, first):
            scans[part.files[0].series if side_by_side else ""].append(part)
        groups = list(scans.values())
        opening = 0 if outcome.address else 1  # the answer to the first part makes the session
        lanes = [*self.lanes_of(groups[:opening]), *self.lanes_of(groups[opening:])]
        if lanes and self.xnat.settings.procs == 1:
            lanes = [list(itertools.chain(*lanes))]
        return lanes

    def lanes_of(self, scans: List[List[Part]]) -> Iterator[List[List[Part]]]:
        """What may go side by side: lanes of loads. In a lane one load is answered before the next
        one goes; the parts of a load go over one connection, one after another.

        A load is one part; or several scans that are small together, as long as there are enough
        loads to go side by side.
        """
        procs, load = self.xnat.settings.procs, []  # type: int, List[Part]
        # All loads have room on the disk together. Wrong logins lock an account: 20 do.
        most = min(LOAD, free_at(self.xnat.settings.workdir) // (2 * procs))
        count = min(4, 16 // procs)
        count = min(count, len(scans) // (4 * procs)) if self.alone else count
        for parts in scans:
            joined = load + parts
            if len(parts) > 1:
                yield [[part] for part in parts]
            elif load and (len(joined) > count or sum(part.bytes for part in joined) > most
                           or sum(len(part.files) for part in joined) > 100):
                yield [load]
                load = parts
            else:
                load = joined
        if load:
            yield [load]

    def cut(self, series: List[Series], first: int = 0) -> Iterator[Part]:
        """The parts to send, in order; the first one of at most so many files, if that is told."""
        most = self.xnat.settings.max_files
        for each in series:
            files, at = each.missing, 0
            while at < len(files):
                count, first = min(most, first or most), 0
                yield Part(each, files[at:at + count])
                at += count

    def _send_lane(self, outcome: Outcome, lane: List[List[Part]]) -> List[str]:
        """Post loads one after another, the next one packed meanwhile; the addresses."""
        addresses, packed = [], None  # type: List[str], Any
        try:
            packed = self.packers.submit(self._pack, lane[0])
            for after in [*lane[1:], None]:
                zips, room = packed.result()
                packed = after and self.packers.submit(self._pack, after)
                zips = [each for each in zips if not each.part.series.problems]
                with room, self.slots:
                    # guarded: a stop comes before the next has a slot
                    addresses += self.xnat.programs.guarded(self._post, outcome, zips)
        finally:
            outcome.answered.set()
            if packed:  # after a stop nobody takes it: others wait for its room
                packed.add_done_callback(lambda job: job.exception() or job.result()[1].close())
        return addresses

    def _pack(self, load: List[Part]) -> Tuple[List[Zip], ExitStack]:
        """Zips of a load, as far as they can be made, and what holds their place on the disk."""
        assert self.workdir, "a dry run sends nothing"
        zips, problems = [], []  # type: List[Zip], List[Trouble]
        load = [part for part in load if not part.series.problems]
        with ExitStack() as stack, caught(problems):
            if load:
                stack.enter_context(self.loads)
                folder = stack.enter_context(self.workdir.room_for(
                    [file for part in load for file in part.files]))
            for number, part in enumerate(load, 1):
                with caught(part.series.problems):
                    path = f"{folder}/{os.path.basename(folder)}-{number}.zip"
                    zips.append(self._zip(part, path))
            stack.enter_context(self.level.at("waiting", sum(each.bytes for each in zips)))
            return zips, stack.pop_all()
        for part in load:
            part.series.problems += problems
        return [], ExitStack()

    def _zip(self, part: Part, path: str) -> Zip:
        """Pack a part. Raises Trouble."""
        series, level = part.series, self.level
        series.began = series.began or time.monotonic()
        chosen = level.choose(part.bytes)
        with level.at(f"packing {chosen}", part.bytes):
            pack(series.folder, part.files, path, chosen, self.xnat.programs)
        made = os.path.getsize(path)
        level.learn(f"zipped {chosen}", made, part.bytes)
        self.xnat.teller.log(f"{series.folder}: {plural(len(part.files), 'file')} packed at "
                             f"level {chosen}, {size(part.bytes)} to {size(made)}")
        return Zip(path, made, part)

    def _post(self, outcome: Outcome, zips: List[Zip]) -> List[str]:
        """POST all of a load, then go on with each that has no good answer; their addresses."""
        xnat, session, addresses = self.xnat, outcome.session, []  # type: Xnat, Session, List[str]
        if not zips:
            return addresses
        with ExitStack() as stack:
            moved = [stack.enter_context(xnat.teller.at_work(
                f"{session.label} {each.part.series.name}", each.part.files)) for each in zips]
            answers: List[Answer] = []
            with caught(zips[0].part.series.problems), self.level.at(
                    "posting", sum(each.bytes for each in zips)):
                answers = xnat.post_once(session, [each.path for each in zips], moved)
            # What has arrived is noted first; nobody is waited for if some went somewhere else.
            for each, tell, tried in sorted(
                    itertools.zip_longest(zips, moved, answers), key=lambda one: (
                        not project_of(one[2]), project_of(one[2]) != xnat.project)):
                series = each.part.series
                with caught(series.problems):
                    if tried or not series.problems:
                        address = xnat.post(session, series, len(each.part.files), each.path, tell,
                                            tried)
                        self._note(outcome, each, address)
                        addresses.append(address)
                        tell(1.0)
        return addresses

    def _note(self, outcome: Outcome, sent: Zip, address: str) -> None:
        """A part has arrived."""
        series, files = sent.part.series, sent.part.files
        self.ledger.add("sent", outcome.session, series=series.name, first=files[0].name,
                        last=files[-1].name, files=part_fingerprint(files), uid=files[0].series,
                        address=address, joined=outcome.joined)
        outcome.address = address
        outcome.answered.set()
        for file in files:
            file.missing = False
        series.sent += len(files)
        series.there += len(files)
        series.bytes += sent.part.bytes
        series.zipped += sent.bytes
        series.seconds = time.monotonic() - series.began
        series.status = "" if series.missing or series.problems else "sent"

    def close(self) -> None:
        self.lanes.shutdown()
        self.packers.shutdown()


@contextmanager
def caught(problems: List[Trouble]) -> Iterator[None]:
    """What goes wrong here is kept among the problems."""
    try:
        yield
    except Trouble as trouble:
        problems.append(trouble)
    except OSError as error:
        problems.append(unreadable(str(error.filename or "the workdir"), error))


@contextmanager
def turn(lock: threading.Lock, patience: float = 0.2) -> Iterator[None]:
    """One after another where each is quick, since threads of Python's hinder each other; side by
    side where others take longer than so many seconds, as on a slow share."""
    mine = lock.acquire(timeout=patience)
    try:
        yield
    finally:
        if mine:
            lock.release()


class Upload:
    """All sessions on their way from folder to archive, several at a time."""

    ALIKE = 20  # sessions in a row that the server refuses with the same words: none would pass

    def __init__(self, tree: Tree, contents: Contents, sender: Sender) -> None:
        self.contents = contents
        self.sender = sender
        self.xnat = contents.xnat
        self.settings = self.xnat.settings
        self.teller = self.xnat.teller
        self.waiting = iter(tree.sessions)
        self.active: Dict[str, Outcome] = {}  # sessions on their way, by path
        self.whole: List[Session] = []  # archived, now or before
        self.full = False  # the workdir was too full for something
        self.largest: List[int] = []  # bytes of the largest zips that a dry run foresees
        self._refused: List[str] = []  # the words of the last refusals, while they are alike
        self._lock = threading.Lock()
        # While as many sessions as may be posted are on the line, as many are read and packed.
        self.at_a_time = 1 if self.settings.procs == 1 else 2 * self.settings.procs
        self.reading = threading.Lock()  # one at a time: the first is sent while others are read
        self.listing = threading.Lock()

    def go(self) -> None:
        """Run until every session is over. Raises Stop; no thread is left, whatever happens."""
        with closing(self.sender), ThreadPoolExecutor(self.at_a_time) as pool:
            try:
                jobs = {pool.submit(self.xnat.programs.guarded, self._work)
                        for _ in range(self.at_a_time)}
                while jobs:
                    done, jobs = wait(jobs, timeout=0.25, return_when=FIRST_EXCEPTION)
                    for job in done:
                        job.result()
                    self.teller.check()
                    self.teller.progress()
            except BaseException as end:
                self.xnat.programs.stop()
                why = (isinstance(end, Stopping) and self.xnat.programs.reason) or end
                if isinstance(why, RuntimeError) and "new thread" in str(why):
                    raise Stop("this system starts no more threads: lower --procs")
                raise why

    def _work(self) -> None:
        """One session after another, while there are any."""
        while not self.xnat.programs.stopping.is_set():
            with self._lock:
                session = next(self.waiting, None)
                if session is None:
                    return
                outcome = self.active[session.path] = Outcome(session, [])
            with caught(outcome.problems):
                self.one_session(outcome)
            if outcome.where == "nothing to send" and outcome.failed():
                outcome.where = "failed"
            if outcome.where == "archived" and outcome.earlier:
                outcome.where = "there"
            with self._lock:
                del self.active[session.path]
                self.whole += [session] if outcome.where in ("archived", "there") else []
                self.full |= any(isinstance(each, Full)
                                 for series in outcome.series for each in series.problems)
            self.teller.session(outcome)
            self._count_refusals(outcome)

    def _count_refusals(self, outcome: Outcome) -> None:
        """Raises Stop when the server refuses one session after another with the same words."""
        passed = any(each.sent for each in outcome.series)
        found = [each for series in outcome.series for each in series.problems if not passed]
        refused = [each for each in found + outcome.problems if each.refused]
        with self._lock:
            if refused:
                # Names and numbers differ, and how a connection breaks is chance.
                words = re.sub(r"\(curl .*|\S*[\d_./]\S*", "", refused[0].what)
                self._refused = [each for each in self._refused if each == words] + [words]
            elif passed or outcome.where in ("archived", "prearchived") and not outcome.earlier:
                self._refused = []
            if len(self._refused) >= self.ALIKE:
                raise Stop(f"{self.settings.url}: the server refuses everything ({self.ALIKE} "
                           f"sessions in a row; the last: {refused[0].what}): "
                           f"{refused[0].to_do}")

    # One session

    def one_session(self, outcome: Outcome) -> None:
        """The whole way of one session, from its folder to the archive. Raises Trouble, Stop."""
        session, settings, xnat = outcome.session, self.settings, self.xnat
        with turn(self.listing):
            outcome.series = series = list_session(session, settings)
        known = self.sender.ledger.of(session)
        memory = Memory() if settings.again else known
        waits = self._still_there(session, memory)
        if not settings.dry_run and self._is_known(outcome, memory, waits):
            return
        with self.reading, self.teller.at_work(f"reading {session.label}"):
            read_session(series, self._has_read)
        for name in memory.gone(series):
            self.teller.gone(session, name)
        addresses, held = [], []  # type: List[str], List[Scan]
        if any(each.images for each in series):
            waiting = self.contents.waiting(session, known.address, known.path if waits else "")
            self.contents.check_label(session, series, waiting, known)
            if not settings.again:
                addresses, held = Comparison(self.contents, outcome, known).compare(waiting)
        outcome.address = "".join(addresses[-1:])
        self.teller.plans(series)
        if settings.dry_run:
            self._foresee(outcome, addresses, [] if addresses else held, memory)
            return
        addresses = self.sender.send(outcome, addresses)
        outcome.where = "held back" if addresses else "failed"
        if any(each.problems for each in series):
            return
        if has_changed(session, series, settings):
            raise Trouble("its folder changed while it was sent", "run again when it is still")
        outcome.where = "not archived"
        check_parts(known, series, addresses)
        for address in addresses:
            with self.sender.slots, self.teller.at_work(f"archiving {session.label}"):
                outcome.address = xnat.commit(session, address)
            if not outcome.address and not self.contents.archived(session, again=True):
                raise Trouble(f"it is gone from the prearchive ({address}), and XNAT's archive "
                              "does not have it", "run again to send it again")
        verify(self.contents, outcome, [] if addresses else held)
        self.sender.ledger.add(
            "ended", session, where=outcome.where, path=outcome.address, files=outcome.files,
            whole=not outcome.failed(), study=outcome.study, time_ns=time.time_ns(),
            series=memory.renewed([each for each in series if not each.problems]))

    def _has_read(self) -> None:
        """One file more is read. Raises Stopping: thousands may be to come."""
        self.teller.has_read()
        self.xnat.programs.pause(0)

    def _still_there(self, session: Session, memory: Memory) -> bool:
        """Whether a session that an earlier run left for review still waits for it. Raises Trouble
        if somebody has deleted it, there or from the archive: it does not come back by itself."""
        where, archived = memory.ended, self.contents.archived(session)
        waits = where == "prearchived" and self.contents.waits(session, memory.path)
        if where in ("archived", "prearchived") and not (archived or waits or memory.parts):
            raise Trouble("an earlier run saw it archived, and it is not there any more" if
                          where == "archived" else "it was left for review, and is neither in the "
                          "prearchive nor in the archive any more", anew(session))
        return waits

    def _is_known(self, outcome: Outcome, memory: Memory, waits: bool) -> bool:
        """Whether an earlier run has verified this very folder, and it is where that run saw it,
        by names, sizes and times alone: no file is opened."""
        session, where = outcome.session, memory.ended
        archived = self.contents.archived(session)
        reviewed = where == "prearchived" and not waits  # archived by a person: count it there
        other = archived and (
            archived.get("subject_label", "").lower() != session.subject_label.lower()
            or memory.study and archived.get("uid") not in ("", memory.study))
        if reviewed or other or not memory.is_same(outcome.series):
            return False
        for each in outcome.series:
            each.there = memory.of(each).number
            each.status = each.status or ("already there" if each.there else "no DICOM")
        outcome.where, outcome.earlier, outcome.files = where, True, memory.files
        outcome.address = memory.path
        return True

    def _foresee(self, outcome: Outcome, addresses: List[str], held: List[Scan], memory: Memory
                 ) -> None:
        """How a real run would go on from here."""
        series = outcome.series
        stays = self.settings.review or self.contents.manual or (
            memory.ended == "prearchived" and memory.path in addresses)
        outcome.files = sum(each.there for each in series)
        outcome.where = ("failed" if any(each.problems for each in series) else
                         "to send" if any(each.missing for each in series) else
                         "to archive" if addresses and not stays else
                         "there" if outcome.files else "nothing to send")
        if outcome.where == "there":  # by the server's own count
            verify(self.contents, outcome, held)
        with self._lock:
            self.largest = heapq.nlargest(2 * self.settings.procs, self.largest + [
                zip_room([file for part in load for file in part.files])
                for lane in self.sender.plan(outcome) for load in lane])


def check_parts(memory: Memory, series: List[Series], addresses: List[str]) -> None:
    """Raises Trouble if what was sent of a series would be archived without the rest of it."""
    here = {image.series for each in series for image in each.images}
    lost = sorted({part["series"] for part in memory.parts
                   if part["address"] in addresses and part["uid"] not in here})
    if lost:
        raise Trouble(f"some of {some(lost)} lies in the prearchive, and is gone or left out here",
                      "put it back, or delete the session in XNAT's prearchive, then run again")


def verify(contents: Contents, outcome: Outcome, held: List[Scan]) -> None:
    """Compare the server's count of each series with ours, by Series UID; by the total where a
    script has changed the UIDs. Too few fails the series, too many is worth a word. Where nothing
    was sent, `held` is what the server has just counted."""
    session, xnat = outcome.session, contents.xnat
    images = [image for each in outcome.series for image in each.images]
    if not images:
        outcome.where = "nothing to send"
        return
    path = outcome.address = outcome.address or contents.path(session)
    outcome.where = "prearchived" if "/prearchive/" in path else "archived"
    outcome.earlier, outcome.files = bool(held), len(images)
    ours, theirs = Counter(image.series for image in images), Counter()  # type: Any, Any
    scans = held or xnat.scans(path)
    if outcome.where == "prearchived" and contents.archived(session):
        scans = scans + xnat.scans(contents.path(session))  # what is new waits
    for scan in scans:
        theirs[scan.uid] += scan.files
    for each in outcome.series:
        each.held = theirs[uids_of(each)]
    if set(ours) & set(theirs) or contents.archived(session).get("uid") == images[0].study:
        outcome.study = images[0].study
        others = {uid for uid in theirs if uid} - set(ours)
        if others:
            more = plural(len(others), "series", "series")
            xnat.teller.say(f"{session.label}: XNAT also has {more} that this folder does not send")
    else:
        ours, theirs = {"": len(images)}, Counter({"": sum(theirs.values())})
    for uid, count in ours.items():
        if theirs[uid] < count:
            outcome.files -= count - theirs[uid]
            trouble = Trouble(
                f"{outcome.where}, but XNAT counts {theirs[uid]} files where {count} should be",
                "compare it in XNAT with the folder (an import filter may drop some), or run "
                "again to send what is missing")
            outcome.problems += [] if uid else [trouble]
            for each in outcome.series:
                if any(image.series == uid for image in each.images):
                    each.problems.append(trouble)
        elif theirs[uid] > count:
            xnat.teller.say(f"{session.label}: XNAT counts {theirs[uid]} files where the folder "
                            f"has {count}: the others are not in this folder, or are there twice")


def anew(session: Session, replacing: bool = False) -> str:
    """How to send all of a session again."""
    return f"to send it anew, add {again_for(session, replacing)}"


def again_for(session: Session, replacing: bool = True) -> str:
    """The options of a run that sends all of a session again."""
    return (f"{'--overwrite-files ' * replacing}--again --only "
            f"{shlex.quote(glob.escape(session.path))}")


# ---- telling -------------------------------------------------------------------------------


ENDS = {  # Outcome.where in words, unless it is one
    "prearchived": "in the prearchive, waiting for review",
    "held back": "held back in the prearchive",
    "failed": "not sent",
    "to send": "would be sent",
    "to archive": "in the prearchive, would be archived",
    "there": "already there",
}
COLOURS = {  # on a terminal, of what stands at the beginning of a line or after two spaces
    31: "not archived|not sent|damaged|packed|Failed|Gone",
    32: "archived|already there|sent|would be sent|would send|All is there",
    33: "in the prearchive|held back",
}


class Screen:
    """How lines get out: to standard output or error, and all of them to the log; rows to the
    report. Below all others one line moves on a terminal, and shows how far the run is."""

    HEARTBEAT = 60.0  # seconds without a line after which a log shows that the run is alive
    settings: Settings  # from open() on

    def __init__(self) -> None:
        clever = os.environ.get("TERM") != "dumb"
        self.moves = sys.stderr.isatty() and clever
        self.stopped: Optional[Stop] = None  # by a signal, or for want of a log
        self.report_path = ""
        self._coloured = sys.stdout.isatty() and clever and not os.environ.get("NO_COLOR")
        self._moving = ""  # what stands in the moving line
        self._heard = time.monotonic()  # the last line
        self._files: Dict[str, int] = {}  # log and report
        self._order: List[Session] = []  # whose rows are still to come, the next one last
        self._early: Dict[Session, str] = {}  # rows of sessions that have overtaken others
        self._counts: Counter[str] = Counter()  # of sessions, files and bytes so far
        self._at_work: Dict[object, Tuple[str, float]] = {}  # what goes on, bytes of it gone out
        self._total = 0  # sessions
        self._began = 0.0  # when the walk was over
        self._lock = threading.RLock()

    def open(self, settings: Settings) -> None:
        """Begin log and report in the workdir, for their owner only; a dry run has none."""
        self.settings = settings
        if settings.dry_run:
            return
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
        base = os.path.join(os.path.abspath(settings.workdir), f"{settings.logname}_{stamp}")
        self.report_path = base + ".csv"
        for kind in ("log", "csv"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            self._files[kind] = os.open(f"{base}.{kind}", flags, 0o600)
        self._write("csv", csv_line(row_of(Outcome(Session("", ""), []), Series("", ""))))
        self.log(f"dicomUpload {VERSION}: {settings.command}")

    def check(self) -> None:
        """Raises Stop if a signal came where Python drops exceptions, or the log is full."""
        if self.stopped:
            raise self.stopped

    def log(self, text: str) -> None:
        """A line for the log; with --verbose on standard error too."""
        self._tell(text, sys.stderr if self.settings.verbose else None, "  ")

    def line(self, text: str = "", important: bool = True) -> None:
        """A result, on standard output; --quiet shows only what is `important`."""
        self._tell(text, sys.stdout if important or not self.settings.quiet else None)

    def say(self, text: str) -> None:
        """A warning, an error or a wait, on standard error."""
        self._tell(text, sys.stderr, "dicomUpload: ")

    def _tell(self, text: str, stream: Optional[TextIO], before: str = "") -> None:
        """A line to the log, and to this stream; on a terminal with breaks and colours."""
        with self._lock:
            self._write("log", f"{now()} {printable(text)}\n")
            if stream:
                self._move("")
                self._heard = time.monotonic()
                text = before + printable(text)
                if stream.isatty() and not re.search("python3 |--only ", text):  # to be copied
                    text = "\n".join(wrapped(text, terminal_width(stream)))
                if self._coloured and stream is sys.stdout:
                    for code, words in COLOURS.items():
                        text = re.sub(rf"(?m)(^|  )({words})\b", f"\\1\033[{code}m\\2\033[0m", text)
                put(stream, text + "\n")

    def _move(self, text: str) -> None:
        """Put this in place of what the moving line shows."""
        if self._moving != text:
            self._moving = text
            columns = min(80, terminal_width(sys.stderr)) - 1
            put(sys.stderr, "\r\033[K" + wrapped(printable(text), columns)[0])

    def _write(self, kind: str, text: str) -> None:
        raw = text.encode("utf-8", "backslashreplace")
        try:
            if kind in self._files and os.write(self._files[kind], raw) < len(raw):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._files.clear()  # a line behind one that was cut would be lost with it
            self.stopped = Stop(f"log or report ({self.report_path}): cannot be written "
                                f"({error.strerror}): make room, then run again")

    def report(self, outcome: Outcome) -> None:
        """A session's rows, in the order of the folders."""
        rows = (row_of(outcome, series, self.settings.url) for series in outcome.series)
        self._early[outcome.session] = "".join(csv_line(row.values()) for row in rows)
        if len(self._early) > 999:  # memory has its bounds
            self._order.clear()
        while self._early and (not self._order or self._order[-1] in self._early):
            self._write("csv", self._early.pop(self._order.pop() if self._order else
                                               next(iter(self._early))))

    # How far it is

    @contextmanager
    def at_work(self, name: str, files: Sequence[File] = ()) -> Iterator[Callable[[float], None]]:
        """While something goes on: a way to tell which share of the files' bytes has gone out."""
        mine, total = object(), sum(each.bytes for each in files)

        def moved(share: float) -> None:
            with self._lock:
                self._at_work[mine] = (name, share * total)

        moved(0.0)
        try:
            yield moved
        finally:
            with self._lock:
                if self._at_work.pop(mine)[1] == total:
                    self._counts.update({"files": len(files), "bytes": total})

    def walking(self, tree: Tree) -> None:
        """The walk has come so far."""
        self._total = len(tree.sessions)
        self.progress()

    def has_read(self) -> None:
        with self._lock:
            self._counts["read"] += 1

    def plans(self, series: List[Series]) -> None:
        """A session has been read: so much of it is to be sent."""
        with self._lock:
            planned = sum(image.bytes for each in series for image in each.missing)
            self._counts.update({"planned": planned, "looked": 1})

    def progress(self) -> None:
        """On a terminal the moving line, ten times a second at most; elsewhere a line a minute."""
        with self._lock:
            pause = 0.1 if self.moves else self.HEARTBEAT
            if not self.settings.quiet and time.monotonic() > self._heard + pause:
                self._heard = time.monotonic()
                if self.moves:
                    self._move(self._standing())
                else:
                    self.say(f"still at work: {self._standing()}")

    def _standing(self) -> str:
        """How far it is, how fast, about how long it will take, and what is going on."""
        if not self._began:
            return f"[walking: {plural(self._total, 'session')} so far]"
        counts, done = self._counts, self._counts["done"]
        sent = counts["bytes"] + sum(each for _, each in self._at_work.values())
        rate = sent / max(1.0, time.monotonic() - self._began)
        words = [f"{done:,} of {plural(self._total, 'session')}"]
        words += [f"{counts['failed']:,} failed"] if counts["failed"] else []
        words += [size(sent), f"{size(rate)}/s"] if sent else [f"{counts['read']:,} files read"]
        # As if those that are not read yet were like those that are.
        left = counts["planned"] / max(1, done, counts["looked"]) * self._total - sent
        words += [f"about {duration(left / rate)} left"] if 0 < sent < 99 * left else []
        return f"[{'  '.join(words)}]  " + "".join([name for name, _ in self._at_work.values()][:1])


class Teller(Screen):
    """What a run tells: what is about to happen, how each session ended, and the end."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: Dict[str, List[Tuple[str, Trouble]]] = defaultdict(list)  # by heading
        self._ends: Counter[str] = Counter()  # of sessions
        self._statuses: Counter[str] = Counter()  # of series
        self._kinds: Counter[str] = Counter()  # of files that were not sent
        self._widths = (0, 0)  # of labels and of series' names

    def begin(self, tree: Tree, xnat: Xnat) -> None:
        """What is about to happen, in a few lines."""
        self._began = time.monotonic()
        self._order, left_out = tree.sessions[::-1], xnat.settings.left_out
        self._widths = (max((len(each.label) for each in tree.sessions), default=0),
                        min(40, max((len(name) for _, name in tree.pairs()), default=0)))
        out = Counter(left_out(name) for _, name in tree.pairs())
        series, going = sum(out.values()), out.pop("", 0)
        by = ", ".join(f'"{name}" {count:,}' for name, count in sorted(out.items()))
        subjects = plural(len({each.subject for each in tree.sessions}), "subject")
        lines = [f"XNAT {xnat.version or 'of unknown version'}, project {xnat.project}, as "
                 f"{xnat.settings.user}",
                 f"{subjects}, {plural(self._total, 'session')}, {series:,} series: "
                 f"{series - going:,} left out" + f" ({by})" * bool(by)]
        if tree.not_chosen:
            lines.append(f"{plural(tree.not_chosen, 'session')} left out by --only or --shard")
        lines += [f"{each.path} becomes session {each.label} of subject {each.subject_label}"
                  for each in tree.sessions
                  if each.label != each.path.rstrip("/").replace("/", "_")]
        for line in lines + [""]:
            self.line(line, important=False)
        if tree.strays:
            self.say(f"{tree.strays[0]}: {plural(len(tree.strays), 'file')} where folders belong: "
                     "not sent")
        for what, paths in (("where a folder belongs", tree.strays), ("no data", tree.no_data)):
            for path in paths:
                self.log(f"{what}: {path}")
        self._kinds["no data"] = len(tree.no_data)

    def fail(self, where: str, trouble: Trouble, heading: str = "Failed") -> None:
        """Keep for the summary what somebody has to look at."""
        with self._lock:
            self.failures[heading].append((where, trouble))

    def gone(self, session: Session, series: str = "") -> None:
        """Earlier runs sent images from this folder, and it is gone or empty now."""
        self.fail(f"{session.label} {series}".rstrip(), Trouble(
            "earlier runs sent images from this folder, and now there are none",
            f"put it back, or if it is meant so add {again_for(session)} once"), "Gone")

    def session(self, outcome: Outcome) -> None:
        """A session is over: its line, one for each series that needs a person, its rows."""
        failed, label = outcome.failed(), outcome.session.label
        with self._lock:
            for series in outcome.series:
                self._series(outcome, series)
            for trouble in outcome.problems:
                self.fail(label, trouble)
            self._ends[outcome.where] += 1
            self._counts.update({"done": 1, "failed": failed})
            line = f"{label:<{self._widths[0]}}  {end_of(outcome)}"
            if self.settings.verbose and outcome.address:
                line += f"  {page_of(outcome, self.settings.url)}"
            if self.moves and outcome.earlier and not (failed or self.settings.verbose):
                self._tell(line, None)  # on a terminal a rerun shows what is new
            else:
                self.line(line, failed)
            self.report(outcome)

    def _series(self, outcome: Outcome, series: Series) -> None:
        """One of its series: what became of it, and what lies in its folder and was not sent."""
        if not series.status or series.problems and series.status == "already there":
            good = self.settings.dry_run and not (series.problems or outcome.problems)
            series.status = "would send" if good else "not sent"
        self._statuses[series.status] += 1
        for trouble in troubles(series):
            self.fail(f"{outcome.session.label} {series.name}", trouble)
        for kind, names in (("damaged", series.damaged), ("packed", series.packed),
                            ("copies", series.copies), ("not DICOM", series.not_dicom),
                            ("no data", series.no_data)):
            self._kinds[kind] += len(names)
            for name in names:
                self._tell(f"{kind}: {outcome.session.path}/{series.name}/{name}", None)
        need = series.wants_a_person()
        if need or self.settings.verbose or self.settings.dry_run:
            widths, name = self._widths, printable(series.name)
            self.line(f"{outcome.session.label:<{widths[0]}}  {name:<{widths[1]}}  "
                      f"{series.status:<13}  {said_of(series)}".rstrip(), need)

    # The end

    def summary(self, upload: Upload, stop: Optional[Exception]) -> bool:
        """The end: what failed, how much is there, and what to do; whether all is there."""
        line, command, rest, halves = self.line, self.settings.command, [], []
        not_reached = (Outcome(session, [Series(name, "") for name in session.series])
                       for session in upload.waiting)
        for outcome in itertools.chain(upload.active.values(), not_reached):
            outcome.problems = [Trouble("the run was stopped before this session was whole",
                                        "run again")]
            for each in outcome.series:
                each.status = each.status or "not sent"
            self.report(outcome)
            rest.append(outcome.session.label)
            if outcome.address and outcome.where == "failed":
                halves.append(outcome.session.label)
        self._ends["not finished"] = len(rest)
        self._tell_failures()
        line(important=False)
        self._tell_counts(upload.sender.level)
        if self.settings.dry_run:
            self._tell_room(upload)
        if rest:
            line(f"Not finished: {some(rest, 5)}")
        if halves:
            line(f"Not whole in the prearchive, do not archive by hand: {some(halves)}")
        if self._ends["prearchived"]:
            line("Those in the prearchive wait for review: somebody must archive them there.")
        if self.report_path:
            line(f"Report: {self.report_path}")
        to_do = [trouble.to_do for each in self.failures.values() for _, trouble in each]
        to_do += [str(stop).rpartition(": ")[2]] if stop else []
        fix = sum(not each.startswith("run again") for each in to_do)
        whole = not (to_do or rest or self._ends["to send"] or self._ends["to archive"])
        if whole:
            line("All is there.")
        elif self.settings.dry_run:
            line(f"Nothing was sent. To send: {command}")
        elif not isinstance(stop, Misplaced):
            of_these = "" if fix == len(to_do) else f"{fix:,} of "
            line((f"First fix {of_these}the {len(to_do):,} above, then run" if fix else "Run") +
                 f" the same command again to finish: {command}")
        return whole

    def saw_only_junk(self) -> bool:
        """Whether there were files, and no DICOM among them."""
        return bool(self._kinds["not DICOM"]) and set(self._ends) == {"nothing to send"}

    def _tell_failures(self) -> None:
        """Under each heading those of one kind as one entry: what it is, below it what to do."""
        for heading, failures in sorted(self.failures.items()):
            self.line(important=False)
            self.line(f"{heading} ({len(failures):,}):")
            failures.sort(key=lambda each: each[0])
            for same in alike(failures):
                (where, trouble), *more = same
                self.line(f"  {where}: {trouble.what}")
                if more:
                    self.line(f"      and {len(more):,} more like it: "
                              f"{some([each for each, _ in more], 3)}")
                self.line(f"      {remedy(same, bool(self.settings.only))}")

    def _tell_counts(self, level: Level) -> None:
        """How many of everything."""
        for noun, nouns, counts in (("session", "sessions", self._ends),
                                    ("series", "series", self._statuses),
                                    ("file not sent", "files not sent", self._kinds)):
            parts = ", ".join(f"{count:,} {ENDS.get(word, word)}"
                              for word, count in counts.most_common() if count)
            if parts:
                self.line(f"{plural(sum(counts.values()), noun, nouns)}: {parts}.")
        if self._counts["files"]:
            seconds, sent = time.monotonic() - self._began, self._counts["bytes"]
            self.line(f"{plural(self._counts['files'], 'file')}, {size(sent)} in "
                      f"{duration(seconds)} ({size(sent / max(seconds, 0.1))}/s), mostly at "
                      f"zip's level {level.bytes.most_common(1)[0][0]}.")

    def _tell_room(self, upload: Upload) -> None:
        """What a dry run says of the workdir's disk."""
        free, need = size(free_at(self.settings.workdir)), size(sum(upload.largest))
        self.line(f"Room for zips in {self.settings.workdir}: {free} free, up to {need} needed "
                  "at once")


# Sessions and series in words


def end_of(outcome: Outcome) -> str:
    """How a session ended, with what a line says beside."""
    end = ENDS.get(outcome.where, outcome.where)
    if outcome.problems:
        what = outcome.problems[0].what
        return what if what.startswith(end) else f"{end}: {what}"
    if outcome.where not in ("archived", "prearchived", "there"):
        return end
    total = sum(len(each.images) for each in outcome.series)
    count = plural(outcome.files, "file") if outcome.files >= total else (
        f"only {outcome.files:,} of {plural(total, 'file')}")
    return f"{end}, {count}" + " verified" * (not outcome.earlier)


def said_of(series: Series) -> str:
    """What a line says of a series behind its status."""
    words = [each.what for each in troubles(series)] + [series.message]
    if series.status == "sent":
        words += [f"{plural(series.sent, 'file')}, {size(series.bytes)}", f"{series.seconds:.1f} s"]
    elif series.status == "would send":
        total = sum(image.bytes for image in series.missing)
        words.append(f"{plural(len(series.missing), 'file')}, {size(total)}")
    if series.there > series.sent:
        there = plural(series.there - series.sent, "file")
        words.append(there + " already there" * (series.status != "already there"))
    if series.copies and series.status != "copy":
        words.append(f"{plural(len(series.copies), 'copy', 'copies')}: {some(series.copies)}")
    if series.not_dicom and series.images:
        words.append(f"{len(series.not_dicom):,} not DICOM: {some(series.not_dicom, 2)}")
    return "; ".join(filter(None, words))


def row_of(outcome: Outcome, series: Series, url: str = "") -> Dict[str, Any]:
    """A series in the report."""
    session = outcome.session
    end = "" if outcome.where in ("archived", "there") else ENDS.get(outcome.where, outcome.where)
    message = "; ".join(map(str, troubles(series))) or series.message
    message = message or "; ".join(map(str, outcome.problems)) or end
    return {
        "subject": session.subject, "session": session.name, "series": series.name,
        "label": session.label, "status": series.status, "files": series.there,
        "copies": len(series.copies), "damaged files": len(series.damaged),
        "not-DICOM files": len(series.not_dicom), "bytes sent": series.zipped,
        "seconds": f"{series.seconds:.1f}", "tries": series.tries,
        "HTTP status": series.http or "", "server's address": outcome.address,
        "open in a browser": page_of(outcome, url), "message": message}


def page_of(outcome: Outcome, url: str) -> str:
    """The address under which a person finds the session."""
    if "/prearchive/" in outcome.address:
        return f"{url}/app/template/XDATScreen_prearchives.vm"
    return outcome.address and f"{url}{outcome.address}?format=html"


def troubles(series: Series) -> List[Trouble]:
    """What is wrong with a series, that of one kind as one."""
    found = [Trouble(some([each.what for _, each in same], 3, "; "), same[0][1].to_do)
             for same in alike([("", each) for each in series.problems])]
    if series.damaged:
        found.append(Trouble(f"damaged: {some(series.damaged)}", "copy from the source again, then "
                             "run again; the others are sent"))
    if series.packed:
        found.append(Trouble(f"packed: {some(series.packed)}", "unpack it, take it away, then run "
                             "again"))
    return found


ONLY = re.compile(r"--only ('[^']*'|\"[^\"]*\"|[^\s'\"])+")  # as a shell reads it
INSTEAD = " (in place of the --only that was given)"  # patterns of --only add up


def alike(failures: List[Tuple[str, Trouble]]) -> Iterable[List[Tuple[str, Trouble]]]:
    """Failures of one kind together: names and numbers do not count, what a server says does."""
    kinds: Dict[str, List[Tuple[str, Trouble]]] = defaultdict(list)
    for where, trouble in failures:
        what = re.sub(r" \((?!HTTP|curl)[^()]*\)", "", trouble.what)
        what = re.sub(r"^\S.*? (?=(is|are|has|cannot|does|changed|could) )", "", what)
        what = what if "(" in what else what.partition(": ")[0].replace("files", "file")
        to_do = ONLY.sub("", trouble.to_do)
        kinds[re.sub(r"\S*[\d_./]\S*", "*", f"{what}: {to_do}")].append((where, trouble))
    return kinds.values()


def remedy(same: List[Tuple[str, Trouble]], chosen: bool) -> str:
    """What to do about failures of one kind: the --only of each, up to fifty, in one call. Where
    --only has `chosen` sessions already, these would go too."""
    only = list(dict.fromkeys(found[0] for _, trouble in same
                              for found in ONLY.finditer(trouble.to_do)))
    words = ONLY.sub(lambda _: " ".join(only[:50]), same[0][1].to_do, count=1)
    words += " (the first 50)" * (len(only) > 50)
    return words + INSTEAD * (chosen and bool(only))


# Numbers and names in words


def some(names: Sequence[str], most: int = 20, between: str = ", ") -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def plural(count: int, noun: str, nouns: str = "") -> str:
    return f"{count:,} " + (noun if count == 1 else nouns or noun + "s")


def size(count: float) -> str:
    """Bytes, for people."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.{int(unit != 'bytes' and count < 10)}f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def duration(seconds: float) -> str:
    """Seconds, for people."""
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{hours} h {minutes % 60} min" if hours else (
        f"{minutes} min {int(seconds) % 60} s" if minutes else f"{int(seconds)} s")


def now() -> str:
    return datetime.datetime.now().isoformat(sep=" ", timespec="milliseconds")


def csv_line(row: Iterable[object]) -> str:
    """A row in which no spreadsheet takes a name for a formula."""
    text = io.StringIO()
    csv.writer(text).writerow("'" * (str(each)[:1] in tuple("=+-@")) + printable(str(each))
                              for each in row)
    return text.getvalue()


# What a stream takes


def put(stream: TextIO, text: str) -> None:
    """Write at once. A reader that has gone away (`| head`, a terminal) stops no upload; one that
    is slow for a moment loses no line."""
    raw = text.encode(stream.encoding or "ascii", "backslashreplace")
    try:
        handle = stream.fileno()
        while raw:
            try:
                raw = raw[os.write(handle, raw):]
            except BlockingIOError:
                select.select([], [handle], [], 1.0)
    except io.UnsupportedOperation:  # no file behind it
        stream.write(text)
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def terminal_width(stream: TextIO) -> int:
    with suppress(OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns or 80
    return 80


def printable(text: str) -> str:
    """`text` with control characters, line breaks and bytes that are no text made visible."""
    return text if text.isprintable() else "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def width_of(text: str) -> int:
    """Columns on a terminal: letters of some scripts are two wide, accents none."""
    return sum(1 + (unicodedata.east_asian_width(each) in "WF") for each in text
               if not unicodedata.combining(each))


def wrapped(text: str, columns: int) -> List[str]:
    """`text` in lines that fit, broken between words where it can be, with the rest indented."""
    lines, indent = [""], " " * (len(text) - len(text.lstrip()) + 4)
    for word in re.findall(r" *[^ ]+", text):
        if lines[-1].strip() and width_of(lines[-1] + word) > columns:
            lines.append(indent + word.strip())
        else:
            lines[-1] += word
    return lines


# ---- options -------------------------------------------------------------------------------


GROUPS = {"url": "what goes where", "config": "what to send", "review": "on the server",
          "workdir": "how to send", "quiet": "what to show"}  # in --help a title before these
LIMITS = {"procs": (1, 9999), "max_files": (1, 999_999_999), "retries": (0, 9999),
          "timeout": (1, 999_999)}


class Parser(argparse.ArgumentParser):
    """Options whose errors are one line, like all others here."""

    def error(self, message: str) -> NoReturn:
        # argparse repeats what it does not understand, and that may be a password.
        if "unrecognized arguments" in message or "explicit argument" in message:
            names = " ".join(re.findall(r" (--[a-z-]+|-.)(?![^ =])", message))
            message = (f"options {names}: unknown" if names else "arguments: too many") + (
                " (if PASS begins with -, set XNAT_PASS and give - instead)")
        missing = message.partition("arguments are required: ")[2].split(", ")
        if missing[0]:
            refuse("URL USER PASS PROJECT ROOTDIR", f"only {5 - len(missing)} of these given: is "
                   "PASS forgotten? give - there, and see --help")
        refuse(message, "see --help")


def read_options(argv: List[str]) -> Settings:
    """The command line as Settings. Raises Stop(2) if it is wrong."""
    parser = Parser(
        prog="dicomUpload.py", usage="dicomUpload.py [options] URL USER PASS PROJECT ROOTDIR",
        description=ABOUT, epilog=f"{EXAMPLES}\n\n{STATUSES}", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for each in fields(Settings):
        if each.name in GROUPS:
            group = parser.add_argument_group(GROUPS[each.name])
        if each.metadata:
            more = dict(each.metadata)
            group.add_argument(*more.pop("flags") or [each.name], **more)
    parser.add_argument("--version", action="version", version=f"dicomUpload {VERSION}")
    given = parser.parse_args(argv)
    check(given)
    given.url = check_url(given.url)
    given.config = tuple(name for path in given.config for name in read_config(path))
    given.shard = read_shard(given.shard)
    given.compression = AUTO if given.compression == "auto" else int(given.compression)
    given.limit_rate = bytes_per_second(given.limit_rate) if given.limit_rate is not None else 0
    given.cacert = os.path.abspath(given.cacert) if given.cacert else ""
    command = ["python3", sys.argv[0]]
    for at, word in enumerate(argv):  # the one that is PASS, and not an option's value like it
        shown = argv[:at] + ["-"] + argv[at + 1:]
        if word == given.password and parser.parse_args(shown).password == "-":
            command += [each.replace("n", "") if re.fullmatch("-n?[qv]+n?[qv]*", each) else each
                        for each in shown if each not in ("-n", "--dry-run", "--again")]
            break
    return Settings(**vars(given), command=shlex.join(command))


def check(given: argparse.Namespace) -> None:
    """Raises Stop(2) for options that no upload can work with, and makes numbers of numbers."""
    for name in ("url", "user", "password", "project"):
        if not sendable(getattr(given, name)):
            refuse(name.upper(), "is empty, or holds a character that is no text: give it again")
    if ":" in given.user:
        refuse("USER", "holds a colon: give URL USER PASS PROJECT ROOTDIR in this order")
    for name in ("config", "workdir", "cacert", "logname"):  # an unset $CONFIG must not send all
        if getattr(given, name) == "" or name == "config" and "" in given.config:
            refuse(f"--{name}", "is empty: give a name, or leave the option out")
    for name, (least, most) in LIMITS.items():
        text = str(getattr(given, name))
        if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
            refuse(f"--{name.replace('_', '-')}", f"give a whole number from {least} to {most}")
        setattr(given, name, int(text))
    given.only = [re.sub("(?<=[^/])/$", "", pattern) for pattern in given.only]
    for pattern in given.only:
        if not re.fullmatch("[^/]+(/[^/]+)?", pattern):
            refuse(f"--only {pattern}", "is neither subject nor subject/session: give one of these")
    if given.cacert is not None and not os.path.isfile(given.cacert):
        refuse(f"--cacert {given.cacert}", "is no file: give the CA's certificate in PEM form")
    if os.sep in given.logname:
        refuse(f"--logname {given.logname}", "is no plain name: give the folder as --workdir")
    try:
        os.scandir(given.rootdir).close()
    except OSError as error:
        refuse("ROOTDIR", str(unreadable(given.rootdir, error)))
    if lies_in(given.workdir, given.rootdir):
        refuse(f"--workdir {given.workdir}", "lies inside ROOTDIR: choose one outside")
    if lies_in(given.rootdir, os.path.join(given.workdir, ZIPS)):
        refuse("ROOTDIR", "lies where the workdir keeps its zips, and is emptied: choose another")


def refuse(thing: str, what: str) -> NoReturn:
    raise Stop(f"{thing}: {what}", WRONG_CALL)


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


def read_shard(text: str) -> Tuple[int, int]:
    """K/N as numbers. Raises Stop(2) unless 1 <= K <= N."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    number, shards = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= shards:
        refuse(f"--shard {text}", "give K/N, such as 2/10: number K, from 1 to N, of N machines")
    return number, shards


def bytes_per_second(text: str) -> int:
    """5M, 500k or plain bytes per second. Raises Stop(2) for anything else."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)([kmg]?)", text.lower())
    value = int(float(found[1]) * 1024 ** " kmg".index(found[2] or " ")) if found else 0
    return min(value, 1 << 40) or refuse(
        f"--limit-rate {text}", "give bytes per second, such as 500k or 5M")


def read_config(path: str) -> Tuple[str, ...]:
    """The exclusions in a config file. Raises Stop(2), naming what is wrong in it."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            config = json.load(file, object_pairs_hook=no_key_twice)
    except OSError as error:
        refuse("--config", str(unreadable(path, error)))
    except (ValueError, RecursionError) as error:
        text, at = getattr(error, "doc", ""), getattr(error, "pos", 0)
        near = text[:at].rstrip()[-1:] + text[at:].lstrip()  # where it stopped, as people see it
        usual = ("a comma before ] or } is one too many, " if re.match(r"[^,]?,\s*[]}]", near) else
                 "comments are not allowed, " if re.match(".?(#|//|/[*])", near, re.DOTALL) else "")
        line = text[text.rfind("\n", 0, at) + 1:].partition("\n")[0].strip()
        refuse(f"--config {path}", f"is not JSON in UTF-8 ({usual}{error}" +
               f", in {line[:60]}" * bool(line) + "): fix it there")
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


def find_password(settings: Settings, teller: Teller) -> Settings:
    """`settings` with the password that PASS - stands for. Raises Stop(2) if there is none."""
    if settings.password != "-":
        teller.say("PASS: others on this machine can read it in the list of processes: give - and "
                   "set XNAT_PASS, or use ~/.netrc")
        return settings
    password = os.environ.get("XNAT_PASS", "").rstrip("\r\n")
    password = password or netrc_password(settings.url, settings.user)
    if not password and sys.stdin and sys.stdin.isatty():
        with suppress(EOFError, UnicodeError):
            password = getpass.getpass(f"Password of {settings.user} at {settings.url}: ")
    if not sendable(password):
        refuse("PASS -", "no password that could be sent in XNAT_PASS, in ~/.netrc for this host "
               "and user, or from a terminal: set XNAT_PASS")
    return replace(settings, password=password)


def netrc_password(url: str, user: str) -> str:
    """What ~/.netrc has for this user on this machine, if it has it. Python's own reader knows
    one login of a machine only, and before 3.11 no letters beyond ASCII."""
    host, entry = str(urlsplit(url).hostname), {"machine": ""}
    try:
        with open(os.path.expanduser("~/.netrc"), encoding="utf-8") as file:
            private, text = not os.fstat(file.fileno()).st_mode & 0o077, file.read()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        refuse("~/.netrc", f"cannot be used ({error}): fix it, or set XNAT_PASS")
    text = re.sub(r"(?ms)^\s*(#.*?$|macdef .*?(\n\n|\Z))", "", text)
    words = iter([plain or re.sub(r"\\(.)", r"\1", quoted) for quoted, plain in re.findall(
        r'"((?:\\.|[^"\\])*)"|(\S+)', text)])
    for word in words:
        if word in ("machine", "default"):
            entry = {"machine": next(words, "") if word == "machine" else host}
        elif word in ("login", "account", "password"):
            entry[word] = next(words, "")
        else:
            refuse("~/.netrc", "a word stands where machine, login or password belongs: fix it, or "
                   "set XNAT_PASS")
        if (entry["machine"], entry.get("login")) == (host, user) and "password" in entry:
            if not private:
                refuse("~/.netrc", "others can read it: chmod 600 ~/.netrc, or set XNAT_PASS")
            return entry["password"]
    return ""


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


def run(settings: Settings, teller: Teller) -> int:
    """One run: walk, meet the server, each session, tell; the exit status.

    Raises Stop, Trouble, OSError.
    """
    settings = find_password(settings, teller)
    with ExitStack() as stack:
        workdir: Optional[Workdir] = None  # a dry run needs none
        if not settings.dry_run:
            workdir = stack.enter_context(closing(Workdir(settings.workdir)))
        teller.open(settings)
        if workdir and workdir.advice:
            teller.say(workdir.advice)
        if settings.insecure:
            teller.say(f"{settings.url}: its certificate is not checked (--insecure), whoever "
                       "answers gets login and scans: give its CA with --cacert FILE instead")
        programs = stack.enter_context(closing(Programs()))
        check_tools(programs, teller)
        tree = walk(settings, teller.walking)
        xnat = Xnat(settings, programs, teller)
        try:
            xnat.log_in()
            contents = Contents(xnat, tree.sessions)
            ledger = stack.enter_context(closing(Ledger(settings, xnat.project)))
            if not settings.nested:
                check_level(tree, settings)
            check_exclusions(tree, ledger, settings)
            find_gone(tree, ledger, settings, teller)
            teller.begin(tree, xnat)
            for folder, trouble in look_at_strays(tree):
                teller.fail(folder, trouble)
                teller.say(f"{folder}: {trouble}")
            sender = Sender(xnat, workdir, ledger, len(tree.sessions) == 1)
            return send_all(Upload(tree, contents, sender), teller)
        finally:  # a user has a limited number of server sessions
            programs.stopping.clear()
            with suppress(Stop, Trouble):
                xnat.close()


def check_exclusions(tree: Tree, ledger: Ledger, settings: Settings) -> None:
    """Raises Stop(2) if series would be sent that earlier runs left out: was --config forgotten?
    --again says that it is meant so; either is remembered."""
    earlier = replace(settings, config=tuple(sorted(ledger.exclusions)))
    found = [(session, name) for session, name in tree.pairs()
             if earlier.left_out(name) and not settings.left_out(name)]
    if found and not settings.again:
        names = sorted({json.dumps(earlier.left_out(name)) for _, name in found})
        series = [f"{session.path}/{name}" for session, name in found]
        refuse("--config", f"earlier runs left out {', '.join(names)}, this one would send "
               f"{plural(len(found), 'such series', 'such series')} ({some(series, 3)}): give "
               f"--config as before, or if it is meant so add {again_for(found[0][0])} once" +
               INSTEAD * bool(settings.only))
    exclusions = set(settings.config) | (set() if found else ledger.exclusions)
    if exclusions != ledger.exclusions and not settings.dry_run:
        ledger.add("exclude", names=sorted(exclusions))


def find_gone(tree: Tree, ledger: Ledger, settings: Settings, teller: Teller) -> None:
    """Tell of sessions that earlier runs sent from here and whose folders are gone; --again says
    that it is meant so. Raises Stop(2) for a pattern of --only that no folder has, nor had."""
    gone = [session for label, session in sorted(ledger.from_here.items())
            if label not in tree.labels
            and session.subject_label not in tree.labels  # of a folder that cannot be read
            and settings.chooses(session.subject, session.name)]
    known = {each for session in gone for each in settings.matching(session.subject, session.name)}
    for pattern in sorted(tree.idle - known):
        refuse(f"--only {pattern}", "no folder of ROOTDIR is called so: give subject or "
               "subject/session, as the folders go")
    for session in gone:
        if not settings.again:
            teller.gone(session)
        elif not settings.dry_run:
            ledger.add("gone", session)


def send_all(upload: Upload, teller: Teller) -> int:
    """Each session, and the end; the exit status."""
    stop: Optional[Exception] = None
    try:
        upload.go()
        for address in upload.contents.leftovers(upload.whole):
            teller.say(f"{address}: lies in the prearchive beside its archived session: look at it "
                       "there; if it is a copy and holds nothing newer it may be deleted")
        if teller.saw_only_junk():
            raise Stop(f"ROOTDIR {upload.settings.rootdir}: none of its files is DICOM: give the "
                       "folder that holds the subjects", WRONG_CALL)
    except (Stop, OSError) as end:
        why = upload.xnat.programs.reason
        stop = why if isinstance(why, Misplaced) else end  # no ^C that comes after it may hide it
        teller.say(str(stop))
    whole = teller.summary(upload, stop)
    if stop:
        return int(getattr(stop, "status", STOPPED))
    return ALL_THERE if whole else STOPPED if upload.full else SOME_FAILED


def stop_on_signals(teller: Teller) -> None:
    """A first signal ends the run in order, a second one at once."""

    def stop(number: int, _: object) -> None:
        if teller.stopped:
            os._exit(128 + number)
        teller.stopped = Stop(f"stopped by {signal.Signals(number).name}: run again to finish",
                              128 + number)
        raise teller.stopped

    def lost(unraisable: Any) -> None:  # Python drops what is raised within a __del__
        if unraisable.exc_value is not teller.stopped:
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = lost
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, each child would seem to end with 0
    # Batch systems send the others before they kill.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1,
                 signal.SIGUSR2):
        if signal.getsignal(each) != signal.SIG_IGN:  # nohup ignores HUP, and is right
            signal.signal(each, stop)


def main() -> int:
    """Run the program; the exit status."""
    if sys.getfilesystemencoding() != "utf-8" and sys.executable and os.path.isfile(sys.argv[0]):
        # Labels, shards and exclusions must not depend on the locale.
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.argv])
    os.umask(0o077)  # zips, ledger, log and report are nobody else's business
    # Of each thread. The usual 8 MB are too many where memory is limited; since 3.12 Python lets
    # nested JSON take more of it than 1 MB before it says RecursionError.
    threading.stack_size(1 << (20 if sys.version_info < (3, 12) else 21))
    sys.stdout = sys.stdout or open(os.devnull, "w")  # a daemon may have closed them
    sys.stderr = sys.stderr or open(os.devnull, "w")
    teller = Teller()
    try:
        stop_on_signals(teller)
        return run(read_options(sys.argv[1:]), teller)
    except Stop as end:
        teller.say(str(end))
        put(sys.stderr, end.drawing and end.drawing + "\n")
        return end.status
    except Trouble as trouble:
        teller.say(str(trouble))
        return STOPPED
    except OSError as error:
        teller.say(f"{error.filename or 'the system'}: {error.strerror}: fix it, then run again")
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
