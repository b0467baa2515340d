#!/usr/bin/env python3
"""Send a tree of DICOM folders (ROOTDIR/subject/session/series) to XNAT: whole,
verified, nothing twice. Run it again, from anywhere, until it says all is there.

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
            login refused, no right to the project, workdir in use or full, the
            server refuses everything)
  130, 143  stopped by a signal

Needs Python 3.8, curl 7.61, zip 3.0; no packages. Reads in the order of a run:
  words      the nouns of the program
  tree       walk ROOTDIR by names; read one session: what its files are
  packing    the one door to other programs, the workdir, one part to one zip
  curl       one request to one answer; cookie and retries
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
import math
import netrc
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
                    Sequence, Set, TextIO, Tuple)
from urllib.parse import quote, urlencode

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
        "contains one of these, in any case")
    only: List[str] = option("--only PATTERN", "glob on subject or subject/session: send only "
                             "these (repeatable)", [], action="append")
    shard: Tuple[int, int] = option("--shard K/N", "of N machines that share the tree this is "
                                    "number K: whole subjects, always the same", "1/1")
    nested: bool = switch("--nested", "series folders hold several series each, and that is meant "
                          "so")
    dry_run: bool = switch("-n --dry-run", "log in, look and show what would be sent; write nothing")
    again: bool = switch("--again", "send the chosen sessions again, whatever ledger and server say")
    review: bool = switch("--review", "leave whole, verified sessions in the prearchive for a "
                          "person to archive")
    overwrite_files: bool = switch(
        "--overwrite-files", "on commit, replace images that the archive already holds; what has "
        "changed here since it was sent goes again")
    workdir: str = option("--workdir DIR", "zips, ledger, log, report", "./work")
    procs: int = option("--procs N", "uploads side by side", 4)
    max_files: int = option("--max-files N", "files per zip", 500)
    compression: int = option("--compression auto|0-9", "zip's level; auto takes 0 or 1, whichever "
                              "is faster here", "auto")
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

    def chooses(self, subject: str, name: str) -> bool:
        """Whether --only and --shard choose this session."""
        number, shards = self.shard
        # One form of each letter: macOS and Linux may store the same name in two.
        raw = unicodedata.normalize("NFC", subject).encode("utf-8", "surrogateescape")
        if int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") % shards != number - 1:
            return False
        globs = (each if "/" in each else each + "/*" for each in self.only or ["*"])
        return any(fnmatch.fnmatchcase(f"{subject}/{name}", each) for each in globs)

    def left_out(self, series: str) -> str:
        """The exclusion that this series' name contains, or ''."""
        return next((each for each in self.config if each.lower() in series.lower()), "")


class Session(NamedTuple):
    """One session folder, by names alone: ten thousand of them stay small in memory."""

    subject: str  # the folders' names
    name: str
    joined: str = ""  # the names of the series folders, as the walk saw them

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


class File(NamedTuple):
    """A file as its folder shows it: name below the series folder, bytes, time in ns."""

    name: str
    bytes: int
    time_ns: int


class Image(NamedTuple):
    """A DICOM file and its UIDs. What it is, is (series, sop): XNAT keeps one of each."""

    file: File
    sop: str
    study: str
    series: str

    @property
    def key(self) -> Tuple[str, str]:
        return self.series, self.sop


@dataclass
class Series:
    """One series folder as read, and what has become of it."""

    name: str
    folder: str
    status: str = ""  # sent, not sent, already there, left out, no DICOM, copy; '' on its way
    message: str = ""  # why it was left out, or what else is worth a word
    listing: str = ""  # fingerprint of its files' names, sizes and times
    files: List[File] = field(default_factory=list)
    images: List[Image] = field(default_factory=list)  # those that belong on the server
    not_dicom: List[str] = field(default_factory=list)
    damaged: List[str] = field(default_factory=list)  # name and what is wrong with it
    packed: List[str] = field(default_factory=list)
    copies: List[str] = field(default_factory=list)  # name and of what
    problems: List[Trouble] = field(default_factory=list)  # nothing more of it may be sent
    missing: List[Image] = field(default_factory=list)  # what the server does not have yet
    crcs: Dict[str, int] = field(default_factory=dict)  # by name, where they are known
    there: int = 0  # images of it that are on the server
    sent: int = 0  # files of them that this run has sent
    bytes: int = 0  # of these files
    zipped: int = 0  # bytes that went over the line
    tries: int = 0
    http: int = 0  # status of the last answer
    began: float = 0.0
    seconds: float = 0.0
    address: str = ""

    @property
    def total(self) -> int:
        """Bytes of its images."""
        return sum(image.file.bytes for image in self.images)

    def wants_a_person(self) -> bool:
        return bool(self.problems or self.damaged or self.packed)

    def fingerprint(self, absent: Set[Tuple[str, str]], crcs: bool) -> str:
        """What its images are, without those in `absent`: UIDs, sizes and, if asked, CRC-32s."""
        return fingerprint(f"{image.sop} {image.file.bytes} " + (
            str(self.crcs.get(image.file.name)) if crcs else "") for image in sorted(
                self.images, key=lambda image: image.sop) if image.key not in absent)


@dataclass
class Outcome:
    """How a session ended."""

    session: Session
    series: List[Series]
    where: str = "failed"  # see ENDS
    files: int = 0  # of ours on the server, counted by it
    address: str = ""  # where it lies
    earlier: bool = False  # an earlier run, or somebody else, had brought all of it there
    trouble: Optional[Trouble] = None  # of the session as a whole

    def failed(self) -> bool:
        return bool(self.trouble) or any(each.wants_a_person() for each in self.series)


def fingerprint(lines: Iterable[str]) -> str:
    """A short digest of these lines."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(os.fsencode(line) + b"\0")
    return digest.hexdigest()[:20]


# ---- tree ----------------------------------------------------------------------------------

# Trash, snapshots and system folders of file servers and desktops; they hold what was withdrawn.
NO_DATA = frozenset(("#recycle", "@recycle", "@eadir", "$recycle.bin", "recycler", "lost+found",
                     "system volume information", "__macosx", "#snapshot", "~snapshot",
                     "@recently-snapshot"))
UNFINISHED = re.compile(r"\.(part|filepart|partial|crdownload)$", re.IGNORECASE)
# rsync's .NAME.XXXXXX, and names that other programs give to halves: only if the bytes agree.
PERHAPS_UNFINISHED = re.compile(r"^\..+\.[A-Za-z0-9]{6}$|\.(tmp|temp|download|aria2)$")
XNAT_UNPACKS = re.compile(r"\.(zip|tar|tgz|gz|zar|xar)$", re.IGNORECASE)
SAMPLE = 6  # sessions, and series folders of each, that tell whether ROOTDIR is a level too high


@dataclass
class Tree:
    """What ROOTDIR holds, by names."""

    sessions: List[Session] = field(default_factory=list)  # those that were chosen
    sample: List[Session] = field(default_factory=list)  # the first ones, chosen or not
    strays: List[str] = field(default_factory=list)  # files where folders belong
    no_data: int = 0  # names that are none
    not_chosen: int = 0  # sessions

    def pairs(self) -> Iterator[Tuple[Session, str]]:
        return ((session, series) for session in self.sessions for series in session.series)


def walk(settings: Settings, note: Callable[[str], None], tick: Callable[[Tree], None]) -> Tree:
    """Walk ROOTDIR/subject/session/series by names; no file is opened.

    `note` gets each name that is no data. Raises Stop(2) if two folders meet in one label, a
    label is too long, or the tree has another shape.
    """
    tree, owners = Tree(), {}  # type: Tree, Dict[Tuple[str, str], str]

    def look(folder: str, strays: List[str]) -> List[str]:
        names, files, no_data = folders_in(folder)
        strays += files
        tree.no_data += len(no_data)
        for each in no_data:
            note(f"no data: {each}")
        tick(tree)
        return names

    above: List[str] = []
    for subject in look(settings.rootdir, above):
        # XNAT finds subjects without regard to case (retrieveMatchingSubject).
        folder = os.path.join(settings.rootdir, subject)
        claim(owners, "subject", clean_label(subject).lower(), folder)
        try:
            names = look(folder, above)
        except OSError:
            names = [""]  # a session without a name stands for it, and fails
        for name in names:
            claim(owners, "session", Session(subject, name).label, os.path.join(folder, name))
            chosen = settings.chooses(subject, name)
            tree.not_chosen += not chosen
            if chosen or len(tree.sample) < SAMPLE:
                session = walk_session(settings, subject, name, look, tree.strays if chosen else [])
                tree.sample += [session] if len(tree.sample) < SAMPLE and session.joined else []
                tree.sessions += [session] if chosen else []
    if not (settings.only or settings.shard[1] > 1):  # else each slice tells only of its own
        tree.strays += above
    check_shape(tree, settings, above)
    return tree


def walk_session(settings: Settings, subject: str, name: str,
                 look: Callable[[str, List[str]], List[str]], strays: List[str]) -> Session:
    try:
        series = look(os.path.join(settings.rootdir, subject, name), strays) if name else []
    except OSError:
        series = []  # reading it will say why
    return Session(subject, name, "\0".join(series))


def is_no_data(name: str) -> bool:
    """Whether this name says that what it stands for is no data, at any level of the tree."""
    return name.startswith(".") or name.lower() in NO_DATA


def folders_in(folder: str) -> Tuple[List[str], List[str], List[str]]:
    """Names of the folders in `folder`, in order; paths of the files; paths that are no data."""
    names, files, no_data = [], [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            # A link to nothing counts as a folder: a share that is not mounted must not go unnoticed.
            lost = entry.is_symlink() and not os.path.exists(entry.path)
            if is_no_data(entry.name):
                no_data.append(entry.path)
            elif not lost and (not entry.is_dir() or leads_back(entry)):
                files.append(entry.path)
            else:
                names.append(entry.name)
    return sorted(names), sorted(files), no_data


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
    beside = [path for path in tree.strays if path not in above]
    deeper = [path for path in above if os.path.dirname(path) != settings.rootdir.rstrip("/")]
    if beside:
        wrong = (f"the session level is missing ({beside[0]} is a file where series folders "
                 "belong)")
    elif deeper:
        wrong = (f"the session and series levels are missing ({deeper[0]} is a file where session "
                 "folders belong)")
    elif tree.not_chosen:
        return
    else:
        wrong = "no series found"
    raise Stop(f"ROOTDIR {settings.rootdir}: {wrong}: put the series into folders of this layout, or "
               "give the folder that has it", WRONG_CALL, LAYOUT)


# One session's files


def list_session(session: Session, settings: Settings) -> List[Series]:
    """All series folders of a session with their files by names, sizes and times; opens none.

    Raises Trouble if the folder cannot be read.
    """
    folder = os.path.join(settings.rootdir, session.subject, session.name)
    try:
        return [list_series(name, os.path.join(folder, name), settings)
                for name in folders_in(folder)[0]]
    except OSError as error:
        raise unreadable("the folder", error)


def list_series(name: str, folder: str, settings: Settings) -> Series:
    """One series folder with its files, at any depth, or the exclusion that leaves it out."""
    series = Series(name, folder)
    pattern = settings.left_out(name)
    if pattern:
        series.status, series.message = "left out", f'name contains "{pattern}"'
        return series
    try:
        list_files(series)
    except OSError as error:
        series.problems.append(unreadable("the folder", error))
    series.files.sort()
    series.listing = fingerprint(f"{each.name} {each.bytes} {each.time_ns}" for each in series.files)
    series.listing += str(len(series.problems) or "")
    return series


def list_files(series: Series) -> None:
    """One pass over the folders below a series folder. Links are followed, each folder once."""
    folder = series.folder
    entries = list(os.scandir(folder))
    links: List[Tuple[str, os.DirEntry[str]]] = []  # to folders: after all real ones, by path
    read = {os.path.realpath(folder)}  # folders that link to each other have paths without end
    while entries or links:
        linked = not entries
        entry = heapq.heappop(links)[1] if linked else entries.pop()
        name = entry.path[len(folder) + 1:]
        try:
            if is_no_data(entry.name) and not PERHAPS_UNFINISHED.search(entry.name):
                series.not_dicom.append(f"{name} (no data, by its name)")
            elif not entry.is_dir():
                list_file(entry, name, series)
            elif not entry.is_symlink():
                entries += os.scandir(entry.path)
            elif not linked:
                heapq.heappush(links, (entry.path, entry))
            elif leads_back(entry) or not read.isdisjoint(and_above(entry.path)):
                series.not_dicom.append(
                    f"{name} (a link to a folder above it, or one that is read already)")
            else:
                read.add(os.path.realpath(entry.path))
                entries += os.scandir(entry.path)
        except OSError as error:
            series.problems.append(unreadable(name, error))


def list_file(entry: os.DirEntry[str], name: str, series: Series) -> None:
    if entry.is_symlink() and not os.path.exists(entry.path):
        series.problems.append(Trouble(f"{name} is a link to nothing",
                                       "mend or remove it, then run again"))
    elif entry.is_file():
        info = entry.stat()
        series.files.append(File(name, info.st_size, info.st_mtime_ns))
    else:  # a FIFO would make us wait for ever
        series.not_dicom.append(f"{name} (no regular file)")


def unreadable(thing: str, error: OSError) -> Trouble:
    """The same words for every file or folder that the system refuses to show."""
    known = {errno.EACCES: (f"cannot be read ({error.strerror})", "give yourself read permission"),
             errno.ENOENT: ("does not exist", "check the name or link"),
             errno.ELOOP: ("is a link that goes round in circles", "mend it"),
             errno.ENOTDIR: ("is a file", "give a folder"),
             errno.EISDIR: ("is a folder", "give a file")}
    what, to_do = known.get(error.errno or 0, (f"cannot be read ({error.strerror})",
                                               "check the disk or share"))
    return Trouble(f"{thing} {what}", f"{to_do}, then run again")


def read_session(series: List[Series], tick: Callable[[int], None]) -> None:
    """Read the headers of a session's files, and say of each file what it is.

    `tick` is told how many files have been read. Raises Trouble for two studies in one session.
    """
    blank: List[Tuple[Series, str, str]] = []  # named in the end: as DICOM, or as junk?
    shapes: Set[str] = set()
    for each in series:
        for file in each.files:
            blank += look_at(each, file)
        shapes |= {name_shape(image.file.name) for image in each.images}
        tick(len(each.files))
    for each, name, why in blank:
        broken = name_shape(name) in shapes or re.search(r"\.(dcm|ima|dicom)$", name.lower())
        (each.damaged if broken else each.not_dicom).append(f"{name} {why}" if broken else
                                                            f"{name} ({why})")
    find_copies(series)
    check_studies(series)
    for each in series:
        if not (each.status or each.problems or each.images):
            each.status = "copy" if each.copies else "no DICOM"
            each.message = (f"all its images are copies: {each.copies[0]}" if each.copies else
                            f"none of its {plural(len(each.files), 'file')} is DICOM"
                            if each.files else "is empty")


def look_at(series: Series, file: File) -> List[Tuple[Series, str, str]]:
    """Put one file where it belongs in its series; what is blank is returned, with the reason."""
    name, path = file.name, os.path.join(series.folder, file.name)
    base = os.path.basename(name)
    try:
        header = read_header(path, file.bytes)
        packed = header.kind == "other" and is_packed(path)
    except OSError as error:
        series.problems.append(unreadable(name, error))
        return []
    if UNFINISHED.search(base) or PERHAPS_UNFINISHED.search(base) and header.kind != "other":
        series.problems.append(Trouble(f"{name} is unfinished, by its name",
                                       "wait until it is whole, or remove it, then run again"))
    elif packed:
        series.packed.append(name)
    elif header.kind == "damaged":
        series.damaged.append(f"{name} {header.why}")
    elif is_no_data(base) or header.kind == "other":
        series.not_dicom.append(name)
    elif header.kind == "blank":
        return [(series, name, header.why)]
    elif why_unsendable(name):
        series.problems.append(Trouble(f"{name} {why_unsendable(name)}",
                                       "rename it, then run again"))
    else:
        series.images.append(Image(file, header.sop, header.study, header.series))
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
    return "is DICOM named as an archive, which XNAT would unpack" if XNAT_UNPACKS.search(
        name) else ""


def is_utf8(name: str) -> bool:
    raw = os.fsencode(name)
    return raw.decode("utf-8", "ignore").encode("utf-8") == raw


def find_copies(series: List[Series]) -> None:
    """Take images out that stand there already; where one UID stands for two, fail both series."""
    owners: Dict[Tuple[str, str], List[Tuple[Series, Image]]] = defaultdict(list)
    for each in series:
        for image in each.images:
            owners[image.key].append((each, image))
    for found in owners.values():
        if len(found) < 2:
            continue
        found.sort(key=lambda pair: (len(pair[1].file.name), pair[1].file.name, pair[0].name))
        first, kept = found[0]
        for each, image in found[1:]:
            # With the series' name: it may be another folder's.
            names = [f"{each.name}/{image.file.name}", f"{first.name}/{kept.file.name}"]
            try:
                same = is_same(each, image.file, first, kept.file)
            except OSError as error:
                each.problems.append(unreadable(image.file.name, error))
                continue
            if same:
                each.images.remove(image)
                each.copies.append(f"{names[0]} is a copy of {names[1]}")
                continue
            trouble = Trouble(f"{names[1]} and {names[0]} are two images with one SOP Instance UID "
                              f"({image.sop}), of which XNAT would keep one",
                              "move one of them out, or have its UIDs corrected, then run again")
            for one in {id(first): first, id(each): each}.values():
                one.problems.append(trouble)


def is_same(one: Series, file: File, other: Series, twin: File) -> bool:
    """Whether two files have the same bytes."""
    return file.bytes == twin.bytes and crc_of(one, file) == crc_of(other, twin)


def crc_of(series: Series, file: File) -> int:
    """The CRC-32 of a file's bytes, read once."""
    if file.name not in series.crcs:
        crc = 0
        with open(os.path.join(series.folder, file.name), "rb") as stream:
            for piece in iter(lambda: stream.read(1 << 20), b""):
                crc = zlib.crc32(piece, crc)
        series.crcs[file.name] = crc
    return series.crcs[file.name]


def check_studies(series: List[Series]) -> None:
    """Raises Trouble if a session holds two studies: XNAT would make two sessions of it."""
    studies: Dict[str, str] = {}
    for each in series:
        for image in each.images:
            studies.setdefault(image.study, f"{each.name} ({image.file.name}) is of study "
                               f"{image.study or 'none'}")
    if len(studies) > 1:
        raise Trouble(f"two studies in one session folder: {'; '.join(studies.values())}",
                      "move the series or files of one study to a session folder of their own, "
                      "then run again")


def is_packed(path: str) -> bool:
    """Whether an archive or compressed file holds DICOM, by its first members' first bytes."""
    with suppress(OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zlib.error,
                  lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile):
        return any(header_of(Source(head, len(head))).kind in ("DICOM", "damaged")
                   for head in itertools.islice(heads_in(path), 20))
    return False


def heads_in(path: str) -> Iterator[bytes]:
    """The first bytes of what an archive or compressed file holds."""
    with open(path, "rb") as file:
        magic = file.read(6)
    for sign, opener in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open)):
        if magic.startswith(sign):
            with opener(path) as stream:  # type: ignore[operator]
                yield stream.read(FIRST_READ)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    with archive.open(entry) as stream:
                        yield stream.read(FIRST_READ)
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                if content:
                    yield content.read(FIRST_READ)


def looks_too_high(tree: Tree, settings: Settings) -> str:
    """A series folder whose subfolders hold different series, if that is so in most of a sample."""
    deep, flat = [], 0
    for session in tree.sample:
        for name in session.series[:SAMPLE]:
            folder = os.path.join(settings.rootdir, session.subject, session.name, name)
            firsts = [first_image(each.path) for each in subfolders(folder)[:SAMPLE]]
            # XNAT's own download is meant so: scans/5-T1/resources/DICOM/files/
            if len({uid for uid, path in firsts if uid and "/resources/" not in path}) > 1:
                deep.append(folder)
            else:
                flat += 1
    return deep[0] if len(deep) > flat else ""


def subfolders(folder: str) -> List[os.DirEntry[str]]:
    with suppress(OSError), os.scandir(folder) as entries:
        return sorted((each for each in entries if each.is_dir() and not is_no_data(each.name)),
                      key=lambda each: each.name)
    return []


def first_image(folder: str) -> Tuple[str, str]:
    """Series UID and path of a DICOM file below a folder, among the first that are found there."""
    tried = 0
    for path, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if not is_no_data(each))
        for name in sorted(names):
            with suppress(OSError):
                full = os.path.join(path, name)
                header = read_header(full, os.path.getsize(full))
                if header.kind == "DICOM":
                    return header.series, full
            tried += 1
            if tried > 20:
                return "", ""
    return "", ""


def look_at_strays(tree: Tree) -> List[Tuple[str, Trouble]]:
    """What is wrong with files that lie where folders belong: images there would be lost."""
    found: Dict[Tuple[str, str], List[str]] = defaultdict(list)
    for path in tree.strays:
        with suppress(OSError):
            if os.path.isfile(path):
                kind = read_header(path, os.path.getsize(path)).kind
                kind = "packed" if kind == "other" and is_packed(path) else kind
                found[kind, os.path.dirname(path)].append(os.path.basename(path))
    kinds = (("DICOM", "DICOM file", "where folders belong", "put them into a series folder"),
             ("damaged", "damaged file", "where folders belong", "copy them again from the source "
              "into a series folder"),
             ("packed", "packed file", "where a folder belongs", "unpack it"))
    return [(folder, Trouble(f"{plural(len(names), noun)} {where} ({some(names)})",
                             f"{to_do}, then run again"))
            for each, noun, where, to_do in kinds
            for (kind, folder), names in found.items() if kind == each]


# One file's header


class Header(NamedTuple):
    """What the first bytes of a file say of it."""
    kind: str          # "DICOM", "damaged", "blank" or "other"
    sop: str = ""      # SOP Instance UID
    study: str = ""    # Study Instance UID
    series: str = ""   # Series Instance UID
    why: str = ""      # what is damaged or blank: it follows the name of the file in a sentence


SOP_CLASS, SOP, STUDY, SERIES = UIDS = (0x00080016, 0x00080018, 0x0020000D, 0x0020000E)
PIXELS = 0x7FE00000  # the group: integers, floats and doubles lie in it
ITEM_END, SEQUENCE_END, UNDEFINED = 0xFFFEE00D, 0xFFFEE0DD, 0xFFFFFFFF
SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # 4 bytes of length, at 8
DEFLATED, DICOMDIR = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.3.10"
UNPACK = {order: struct.Struct(order + "HH2sH").unpack_from for order in "<>"}
FIRST_READ, NEXT_READ, MOST_INFLATED = 8192, 32768, 1 << 22
MOST_READS = 256  # more before the series UID are no header, and would take for ever
CUT = "ends within its header"
POINTERS = ((b"version https://git-lfs.github.com/spec/", "is a Git LFS pointer"),
            (b"/annex/objects/", "is a git-annex pointer"),
            (b"<!doctype", "is a web page"), (b"<html", "is a web page"), (b"<?xml", "is XML"))


class Source:
    """A file of which `head` is in memory; or what its deflated part inflates to, all in memory."""

    def __init__(self, head: bytes, size: int, handle: int = -1) -> None:
        self.head, self.size, self.handle = head, size, handle
        self.more = True  # whether it is worth reading on
        self.reads = 0

    def read(self, offset: int, count: int) -> bytes:
        if offset + count <= len(self.head) or self.handle < 0:
            return self.head[offset:offset + count]
        self.reads += 1
        if self.reads > MOST_READS:
            return b""
        return os.pread(self.handle, count, offset)

    def text(self, start: int, end: int) -> str:
        """A UID: the first value, without its padding."""
        raw = self.read(start, min(end - start, 1024))
        return raw.partition(b"\\")[0].strip(b"\0 ").decode("latin-1")


def read_header(path: str, size: int) -> Header:
    """What a file of `size` bytes is, by its bytes, and whose. Raises OSError if unreadable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        head = os.read(handle, FIRST_READ)
        return header_of(Source(head, max(size, len(head)), handle))
    finally:
        os.close(handle)


def header_of(source: Source) -> Header:
    if source.head[128:132] == b"DICM":
        return read_data_set(source, 132)
    return read_data_set(source, 0) if begins_bare(source) else no_dicom(source.head, source.size)


def no_dicom(head: bytes, size: int) -> Header:
    """Tells a blank file, and one that is cut before `DICM` ends, from what is something else."""
    if not head:
        return Header("blank", why="is empty")
    if head.count(head[0]) == len(head):
        byte = f"0x{head[0]:02X}" if head[0] else "zeros"
        return Header("blank", why=f"{'begins with' if size > len(head) else 'holds'} only {byte}")
    if 128 < len(head) < 132 and head == bytes(128) + b"DICM"[:len(head) - 128]:
        return Header("damaged", why=CUT)
    begin = head[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower()  # without a byte order mark
    for mark, why in POINTERS:
        if begin.startswith(mark):
            return Header("blank", why=why)
    return Header("other")


def coded(first: bytes) -> Tuple[str, bool]:
    """Byte order, and whether explicit, of a data set: its first element knows it better than the
    transfer syntax, which some writers get wrong."""
    big = first[:1] == b"\0" and first[1:2] > b"\0"  # a group from 0001 to 00FF
    return ">" if big else "<", first[4:6] in SHORT or first[4:6] in LONG


def begins_bare(source: Source) -> bool:
    """Whether it is a data set without preamble: a first tag in group 0002 or 0008, which has a
    value representation or, as numbers may look so too, two more elements in order after it."""
    first = source.head[:8]
    if len(first) < 8 or first[:2] not in (b"\2\0", b"\10\0", b"\0\2", b"\0\10"):
        return False
    order, explicit = coded(first)
    element, length = struct.unpack(order + "HI", first[2:])
    if element > 0x90 or not explicit and (length > 1024 or element == 0 and length != 4):
        return False
    if explicit:
        return True
    found = list(itertools.islice(elements(source, 0, order, explicit), 3))
    tags = [tag for tag, _, end in found if end <= source.size and tag < 0x00300000]
    return len(tags) == 3 and tags[0] < tags[1] < tags[2]


def read_data_set(source: Source, offset: int) -> Header:
    """The header of a DICOM file whose first element, of group 0002 or not, is at `offset`."""
    meta: Dict[int, str] = {}
    for tag, start, end in elements(source, offset, *coded(source.read(offset, 6))):
        if tag >> 16 != 0x0002 or end > source.size:
            break
        if tag == 0x00020002 or tag == 0x00020010:
            meta[tag] = source.text(start, end)
        offset = end
    if meta.get(0x00020010) == DEFLATED:
        source, offset = inflate(source, offset), 0
    uids, why = find_uids(source, offset)
    if not why:
        why = ("" if uids.get(SOP_CLASS) and uids.get(SOP) else
               "has no SOP Instance UID" if uids.get(SOP_CLASS) else "has no SOP Class UID")
    if why and SOP_CLASS not in uids and meta.get(0x00020002) == DICOMDIR:
        return Header("other")  # an index of other files
    return Header("damaged" if why else "DICOM", uids.get(SOP, ""), uids.get(STUDY, ""),
                  uids.get(SERIES, ""), why)


def find_uids(source: Source, offset: int) -> Tuple[Dict[int, str], str]:
    """The UIDs of a data set, and where it is cut. What is in memory anyway is looked through up
    to the pixels, which a copy that broke has most often lost."""
    uids: Dict[int, str] = {}
    last = 0
    for tag, start, end in elements(source, offset, *coded(source.read(offset, 6))):
        if end > source.size and (tag or last < SERIES):
            return uids, "ends within its pixels" if tag >= PIXELS else CUT
        if last < SERIES:
            if not tag:  # zeros: a hole
                return uids, "holds zeros where its header should go on"
            if tag in UIDS:
                uids[tag] = source.text(start, end)
        elif tag <= last:  # behind the data set, or not understood
            break
        if tag >= SERIES:
            source.more = False
            if tag >= PIXELS and end > start:
                break
            last = tag
    return uids, ""


def elements(source: Source, offset: int, order: str, explicit: bool
             ) -> Iterator[Tuple[int, int, int]]:
    """The elements of a data set, not those in its sequences: tag, start and end of the value.

    One of undefined length comes with its start as end, and again if it proves to be cut. The end
    lies behind the end of the source if that is cut; the tag is 0 if that is so within a tag.
    """
    data, base, at, have, size = source.head, 0, offset, len(source.head), source.size
    depth, outer, foreign = 0, 0, 0  # an odd depth is in a sequence, an even one in an item of it
    unpack, known = UNPACK[order], order
    while True:
        if at + 12 > have:
            if base + have < size:
                if not source.more:
                    return
                data, base, at = source.read(base + at, NEXT_READ), base + at, 0
                have = len(data)
            if at + 8 > have:
                if base + at != size or (depth and source.more):
                    yield outer if depth else 0, base + at, size + 1
                return
        group, element, vr, length = unpack(data, at)
        tag = group << 16 | element
        at += 8
        if vr not in SHORT or not explicit or group == 0xFFFE:
            length, more = long_length(data, at, order, vr if explicit and group < 0xFFFE else b"")
            at += more
        end = base + at + (length if length != UNDEFINED else 0)
        if depth == 0 and group != 0xFFFE:
            outer = tag
            yield tag, base + at, end
        elif end > size:
            yield outer, base + at, end
        if length == UNDEFINED:
            depth += 1
            if vr == b"UN" and explicit:  # what is in it is implicit, and little-endian
                foreign, order, unpack, explicit = depth, "<", UNPACK["<"], False
        elif tag == ITEM_END:
            depth -= depth and 1 - depth % 2
        elif tag == SEQUENCE_END:
            depth -= depth and 2 - depth % 2
        at = end - base
        if depth < foreign:
            foreign, order, unpack, explicit = 0, known, UNPACK[known], True


def long_length(data: bytes, at: int, order: str, vr: bytes) -> Tuple[int, int]:
    """The length of an element whose first 8 bytes end at `at`, and how many more it takes."""
    letters = vr.isalpha() and vr.isupper()  # else it is implicit, as some writers mix them
    (short,) = struct.unpack_from(order + "H", data, at - 2)
    if letters and short and vr not in LONG:  # unknown: what comes new should have zeros here
        return int(short), 0
    at += 4 * letters
    return int(struct.unpack(order + "I", data[at - 4:at].ljust(4, b"\0"))[0]), 4 * letters


def inflate(source: Source, offset: int) -> Source:
    """What the rest of a file inflates to, or the beginning of it."""
    raw = source.read(offset, MOST_INFLATED)
    inflater = zlib.decompressobj(15 if raw[:1] == b"\x78" else -15)  # some have a zlib header
    parts, room = [], MOST_INFLATED
    try:
        for begin in range(0, len(raw), NEXT_READ):
            parts.append(inflater.decompress(raw[begin:begin + NEXT_READ], room))
            room -= len(parts[-1])
            if room <= 0 or inflater.eof:
                break
    except zlib.error:
        pass  # what came before the damage may hold the header
    data = b"".join(parts)
    whole = inflater.eof or (room > 0 and offset + len(raw) >= source.size)
    return Source(data, len(data) if whole else 1 << 62)


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

        `watch` gets the end of what it has said on its error output so far, as it speaks.
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
            out, err = self._talk(process, given, watch)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                pipe.close()  # type: ignore[union-attr]
            with self._lock:
                del self._running[process.pid]
                self._tell_guard()
        if self.stopping.is_set() and process.returncode < 0:
            raise Stopping("stopping")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    @staticmethod
    def _talk(process: subprocess.Popen[bytes], given: bytes,
              watch: Callable[[bytes], None]) -> Tuple[bytes, bytes]:
        # zip and curl read all of their input before they say much.
        with suppress(BrokenPipeError), process.stdin as into:  # type: ignore[union-attr]
            into.write(given)
        said = {process.stdout: bytearray(), process.stderr: bytearray()}
        with selectors.DefaultSelector() as waiting:
            for stream in said:
                waiting.register(stream, selectors.EVENT_READ)  # type: ignore[arg-type]
            while waiting.get_map():
                for key, _ in waiting.select():
                    piece = os.read(key.fd, 1 << 16)
                    said[key.fileobj] += piece  # type: ignore[index]
                    if not piece:
                        waiting.unregister(key.fileobj)
                del said[process.stderr][:-10000]  # hours of curl's progress
                watch(bytes(said[process.stderr][-200:]))
        process.wait()
        return bytes(said[process.stdout]), bytes(said[process.stderr])

    def _tell_guard(self) -> None:
        with suppress(BrokenPipeError):  # somebody killed the guard: the uploads do not need it
            os.write(self._guard.stdin.fileno(),  # type: ignore[union-attr]
                     " ".join(map(str, self._running)).encode() + b"\n")

    def pause(self, seconds: float) -> None:
        """Wait, unless the run is being stopped."""
        if self.stopping.wait(seconds):
            raise Stopping("stopping")

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
        self.advice = ""  # what its user should know
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
        for left in glob.glob(glob.escape(here) + "[0-9]*"):  # by a run of this machine...
            try:
                os.kill(int(left[len(here):]), 0)
            except (ProcessLookupError, ValueError):  # ...that is gone
                shutil.rmtree(left, ignore_errors=True)
            except OSError:
                pass
        self.zips = f"{here}{os.getpid()}"

    def close(self) -> None:
        shutil.rmtree(self.zips, ignore_errors=True)
        self._lock.close()

    @contextmanager
    def room_for(self, files: List[File]) -> Iterator[str]:
        """A name for a zip of these files, once there is room. The zip is removed at the end.

        Waits while other zips are in the way; raises Trouble if it would not fit even alone.
        """
        need = zip_room(files)
        with self._room:
            while shutil.disk_usage(self.zips).free - self._promised < need:
                if not self._promised:
                    free = size(shutil.disk_usage(self.zips).free)
                    raise Trouble(f"workdir {self.path} is too full (needs {size(need)}, has "
                                  f"{free})", "make room, lower --max-files, or choose another "
                                  "--workdir")
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


def zip_room(files: List[File]) -> int:
    """Bytes that a zip of these files never exceeds."""
    return sum(each.bytes for each in files) + 1024 * len(files) + 65536


def pack(series: Series, files: List[File], target: str, level: int, programs: Programs) -> None:
    """Zip `files` of a series into `target`. Raises Trouble unless it holds exactly them."""
    for each in files:
        try:
            info = os.stat(os.path.join(series.folder, each.name))
        except OSError as error:
            raise unreadable(each.name, error)
        if (info.st_size, info.st_mtime_ns) != (each.bytes, each.time_ns):
            raise Trouble(f"{each.name} changed during this run", "run again when it is still")
    # -q quiet; -X no owners and times; -D no folder entries; -@ names, a line each, as input. `./`
    # keeps a name with - from being taken for an option. zip makes the file itself (one that is
    # there would be updated); written to a pipe, Java would refuse it (data descriptors).
    names = b"".join(b"./" + os.fsencode(each.name) + b"\n" for each in files)
    done = programs.run(["zip", "-q", "-X", "-D", f"-{level}", target, "-@"], names, series.folder)
    if done.returncode not in (0, 12, 18):  # 12, 18: a file could not be read; check_zip names it
        text = " ".join((done.stdout + done.stderr).decode("utf-8", "replace").split())
        raise Trouble(f"zip failed (exit {done.returncode}{', ' + text if text else ''})",
                      "make room in the workdir" if done.returncode == 14 else "run again")
    series.crcs.update(check_zip(target, files))


def check_zip(target: str, files: List[File]) -> Dict[str, int]:
    """The CRC-32 of each file. Raises Trouble unless the zip holds these in full and nothing else.

    zip's exit 0 is no proof: a file that shrank or vanished while it was read gives 0.
    """
    wanted = {os.fsencode(each.name): each for each in files}
    crcs: Dict[str, int] = {}
    try:
        with suppress(FileNotFoundError), zipfile.ZipFile(target) as archive:
            for entry in archive.infolist():
                # The bytes as they stand in the zip: Python decodes those without flag as cp437.
                coding = "utf-8" if entry.flag_bits & 0x800 else "cp437"
                name = entry.orig_filename.encode(coding)
                file = wanted.get(name)
                if not file or file.bytes != entry.file_size or file.name in crcs:
                    crcs = {}  # cut short, grown, or somebody else's
                    wanted = {name: file} if file else wanted
                    break
                crcs[file.name] = entry.CRC
    except (OSError, zipfile.BadZipFile) as error:
        raise Trouble(f"zip made no readable archive ({error})", "run again")
    for each in wanted.values():
        if each.name not in crcs:
            raise Trouble(f"{each.name} could not be read in full, or changed while it was read",
                          "check it, then run again")
    return crcs


class Level:
    """zip's level for the next part: 0 or 1, whichever gets its bytes there sooner by what this run
    has measured.

    Costs are seconds for a byte of the images. A POST takes the line's time, which shrinks with
    the zip, and XNAT's, which does not. curl cannot tell them apart (3 MB vanish in the system's
    buffers at once, its bar then says 100 %), but two levels side by side do.
    """

    NEWEST = 0.3  # weight of the newest part: a line that changes is followed within a few
    BETTER = 1.1  # no change for less: it shall not flutter

    def __init__(self, fixed: int) -> None:
        self.fixed = fixed
        self.used: Counter[int] = Counter()  # parts by level
        self._level = 0  # of all but the first parts, and looks at the other one
        self._line = 1.0  # the line's share of a POST at level 0
        self._looked = (0, 0.0)  # when, in parts, and at what cost
        self._sums: Dict[Tuple[str, int], Tuple[float, float]] = {}
        self._jobs = {"packing": (0, 0.0, 0.0), "posting": (0, 0.0, 0.0)}  # see `timed`
        self._lock = threading.Lock()

    def choose(self) -> int:
        """The level for the next part."""
        with self._lock:
            level = self.fixed if self.fixed != AUTO else self._next()
            self.used[level] += 1
            return level

    def _next(self) -> int:
        if not any(kind == "posting" for kind, _ in self._sums):
            return min(1, self.used[0])  # the first one leaves at once; smaller is the safer guess
        other, cost = 1 - self._level, self._cost(self._level, self._line)
        if self._cost(other, self._line) * self.BETTER < cost:
            self._sums["posting", other] = self._posting(other, self._line), 1.0
            self._level = other
        elif self._cost(other, float(other)) * self.BETTER < cost:  # if all goes well for it: look
            parts, (at, before) = sum(self.used.values()), self._looked
            if parts >= (2 * at if before / 1.5 < cost < before * 1.5 else at) + 4:
                self._looked = parts, cost
                return other
        return self._level

    def _cost(self, level: int, line: float) -> float:
        """A byte at this level, if this is the line's share: the two overlap, but not wholly."""
        other = self._mean("packing", 1 - level, 0.0) * (10.0 if level else 0.1)  # a guess
        return math.hypot(self._mean("packing", level, other), self._posting(level, line))

    def _posting(self, level: int, line: float) -> float:
        known = self._level if ("posting", self._level) in self._sums else 1 - self._level
        shrinks = [1.0, 1.0 - line * (1.0 - self._mean("making", 1, 0.5))]
        return self._mean("posting", known, 0.0) * shrinks[level] / shrinks[known]

    def _mean(self, kind: str, level: int, unknown: float) -> float:
        top, count = self._sums.get((kind, level), (unknown, 1.0))
        return top / count

    def learn(self, kind: str, level: int, value: float, count: int) -> None:
        """Packing or posting took so many seconds, or making as many bytes, for `count` bytes."""
        with self._lock:
            top, before = self._sums.get((kind, level), (0.0, 0.0))
            old = 0.0 if kind == "posting" and level != self._level else 1.0 - self.NEWEST
            self._sums[kind, level] = old * top + value, old * before + max(1, count)
            shrunk = 1.0 - self._mean("making", 1, 0.5)
            if kind == "posting" and level != self._level and shrunk > 0.1 and (
                    kind, self._level) in self._sums:
                ratio = self._mean(kind, 1, 0.0) / max(1e-12, self._mean(kind, 0, 0.0))
                share = min(1.0, max(0.0, (1.0 - ratio) / shrunk))
                self._line += (share - self._line) / 2

    @contextmanager
    def timed(self, kind: str, level: int, count: int) -> Iterator[None]:
        """Learn how long this takes. Jobs of one kind share the time while they go side by side."""
        began = self._shared(kind, 1)
        try:
            yield
        except BaseException:
            self._shared(kind, -1)
            raise
        self.learn(kind, level, self._shared(kind, -1) - began, count)

    def _shared(self, kind: str, change: int) -> float:
        with self._lock:
            jobs, share, before = self._jobs[kind]
            moment = time.monotonic()
            share += (moment - before) / jobs if jobs else 0.0
            self._jobs[kind] = jobs + change, share, moment
            return share


# ---- curl ----------------------------------------------------------------------------------


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

    @property
    def evidence(self) -> str:
        """curl's exit status and words, or the HTTP status and the server's own sentence."""
        if self.code:
            return ", ".join(filter(None, (f"curl exit {self.code}", self.error)))
        return ", ".join(filter(None, (f"HTTP {self.status}", sentence(self.body))))

    def json(self) -> Any:
        """The body as JSON, None if it is none."""
        try:
            return json.loads(self.body) if self.status == 200 else None
        except (ValueError, RecursionError):
            return None


# What stands in error pages beside the reason: headings, and the names of the statuses.
NO_REASON = re.compile(r"Status page$|You can get technical details|Please continue your visit|"
                       r"([A-Z][a-z]+ ?){1,3}$")


def sentence(body: str) -> str:
    """The reason in an error page: XNAT's stands in <h3>, in newer ones in the first <p>."""
    text = re.sub(r"(?is)<(script|style)\b.*?</\1>", " ", body)
    for pattern in (r"<h3[^>]*>(.*?)</h3>", r"<p[^>]*>(.*?)</p>", r"<title>(.*?)</title>",
                    r"<h[1-6][^>]*>(.*?)</h[1-6]>", r"(.*)"):
        for found in re.findall(f"(?is){pattern}", text):
            words = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", found)).split())
            if words and not NO_REASON.match(words):
                return words[:300]
    return ""


class Curl:
    """Requests to one server with one login, each through one curl."""

    def __init__(self, settings: Settings, programs: Programs, teller: Teller) -> None:
        self.settings = settings
        self.programs = programs
        self.teller = teller
        self.cookie = ""
        self._numbers = itertools.count(1)

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
            percent = re.findall(rb"(\d+\.\d)%", said)
            moved(min(0.99, float(percent[-1]) / 100) if percent else 0.0)

        return self._run([url], options, folder, watch)[0]

    def ask_once(self, *paths: str) -> List[Answer]:
        """The answer at each of `paths`, all over one connection, each tried once."""
        return self._run([self.settings.url + path for path in paths],
                         ["--silent", "--show-error", "--max-time", "300"])

    def _run(self, urls: List[str], options: List[str], folder: str = "/",
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
        if self.cookie:  # with both, a server session that expired heals itself
            secrets += f'cookie = "JSESSIONID={self.cookie}"\n'
        number = next(self._numbers)
        self.teller.log(f"curl {number}: {shlex.join(command[1:] + urls)}")
        done = self.programs.run(command, os.fsencode(secrets), folder, watch)
        answers = read_answers(done, mark, len(urls))
        for url, answer in zip(urls, answers):
            self.cookie = answer.cookie or self.cookie
            body = " ".join(answer.body.split())[:500]
            body = "" if "JSESSION" in url + body else body  # that is a secret
            self.teller.log(f"curl {number}: exit {answer.code} {answer.error} HTTP "
                            f"{answer.status} {body}")
        return answers

    def ask_until(self, about: str, request: Callable[[], Answer], files: int = 0
                  ) -> Tuple[Answer, Meaning, int]:
        """Repeat a request while its answer may heal; the last answer, its meaning, the tries.

        `files` is what XNAT may still be importing after an answer that was lost. Raises Stop
        where no other request could fare better: login refused, server gone.
        """
        retries = self.settings.retries
        for tries in range(1, retries + 2):
            answer = request()
            meaning = meaning_of(answer)
            self.check_login(answer)
            if not meaning.heals or tries > retries:
                break
            self.wait_to_heal(about, answer, meaning, tries, files)
        if meaning.gone and not self.is_there():
            raise Stop(f"{self.settings.url}: the server is gone ({meaning.words(answer)}): run "
                       "again later, it goes on where it stopped")
        return answer, meaning, tries

    def wait_to_heal(self, about: str, answer: Answer, meaning: Meaning, tries: int, files: int = 0
                     ) -> None:
        """Announce a wait that grows with the tries, and wait."""
        # 1, 3, 9, 27, 81 s: a server that restarts is back within two minutes. After silence and
        # a proxy's 504 the first import may go on: XNAT needs 46 to 75 ms a file.
        importing = 0.15 * files if meaning.goes_on else answer.retry_after
        pause = max(importing, 3.0 ** min(tries - 1, 4)) * random.uniform(1.0, 1.3)
        self.teller.say(f"{about}: {meaning.words(answer)}; trying again in {pause:.0f} s ({tries} "
                        f"of {self.settings.retries})")
        self.programs.pause(pause)

    def check_login(self, answer: Answer) -> None:
        """Raises Stop if an answer says that we are not let in any more."""
        page = answer.status == 200 and answer.is_html and "login" in answer.body.lower()
        archived = answer.status == 301 and "/data/archive/" in answer.body  # what a commit says
        if answer.status == 401 or page or 300 <= answer.status < 400 and not archived:
            raise Stop(refusal(self.settings, answer))

    def is_there(self) -> bool:
        """Whether anything that could be a working XNAT answers."""
        answer = self.ask("GET", BUILD_INFO, seconds=min(30, self.settings.timeout))
        return not meaning_of(answer).gone

    def get(self, path: str, query: Optional[Dict[str, str]] = None) -> Any:
        """The JSON at `path`, None if there is none (404). Raises Trouble for other answers."""
        query = dict(query or {}, format="json")
        answer, meaning, _ = self.ask_until(path, lambda: self.ask("GET", path, query))
        found = answer.json()
        if found is None and answer.status != 404:
            raise Trouble(f"{path} cannot be read: {meaning.words(answer)}", meaning.to_do)
        return found

    def rows(self, path: str, query: Optional[Dict[str, str]] = None) -> Optional[List[Row]]:
        """A listing, None if there is none (404). Raises Trouble for other answers."""
        found = self.get(path, query)
        rows = table(found)
        if rows is None and found is not None:
            raise Trouble(f"{path} is no listing", "check that this is XNAT's own address")
        return rows


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


Row = Dict[str, str]


def table(found: Any) -> Optional[List[Row]]:
    """The rows of a listing with lower-case column names, None if it is none."""
    try:
        return [{key.lower(): "" if value is None else str(value) for key, value in row.items()}
                for row in found["ResultSet"]["Result"]]
    except (KeyError, TypeError, AttributeError):
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

    def words(self, answer: Answer) -> str:
        return f"{self.means} ({answer.evidence})"


REFUSED = "the server refused it"
BUSY = "the server is busy"
MEANINGS = (
    # curl's exit statuses: what never came to an answer.
    Meaning("curl exit 5\\b", "the proxy's name cannot be found", "check the proxy settings",
            True, True),
    Meaning("curl exit 6\\b", "the server's name cannot be found", "check URL and network",
            True, True),
    Meaning("curl exit 7\\b", "nothing answers there", "check URL, network, and whether XNAT is up",
            True, True),
    Meaning("curl exit 28\\b", "the connection went silent", "check the network, and see --timeout",
            True, True, True),
    Meaning("curl exit 35\\b", "no encrypted connection comes about",
            "check https or http, and the port", True, True),
    Meaning("curl exit 52\\b", "the server closed the connection without an answer",
            "run again later", True, True),
    Meaning("curl exit 55\\b", "the connection broke while sending", "run again later", True, True),
    Meaning("curl exit (16|18|56|92|95|96)\\b", "the connection broke", "run again later",
            True, True),
    Meaning("curl exit 60\\b.*expired", "the server's certificate has expired",
            "ask the XNAT admin to renew it"),
    Meaning("curl exit 60\\b.*not yet valid", "the server's certificate is not valid yet",
            "check this machine's clock"),
    Meaning("curl exit 60\\b.*subject name", "the server's certificate is for another name",
            "give the URL by that name"),
    Meaning("curl exit 60\\b", "the server's certificate is not trusted",
            "give your site's CA with --cacert FILE"),
    Meaning("curl exit 77\\b", "the CA file cannot be read", "check --cacert"),
    Meaning("curl exit -", "curl was killed", "run again", True, True),
    Meaning("curl exit", "curl failed", "run again"),
    # What waiting heals, by XNAT's own words and by a proxy's status.
    Meaning("HTTP (400|409|423|500).*(concurrent file sends|session processing (may already be )?"
            "in progress|concurrent modification is discouraged|duplicate archive attempt|"
            "destination session in use)", BUSY, "run again later", True, goes_on=True),
    Meaning("HTTP 504", "a proxy gave up waiting", "lower --max-files, or ask the admin to raise "
            "proxy_read_timeout", True, True, True),
    Meaning("HTTP (408|429)", BUSY, "run again later", True),
    Meaning("HTTP (502|503)", "XNAT does not answer behind its proxy", "run again later", True, True),
    # What XNAT refuses to import.
    Meaning("HTTP 413", REFUSED, "lower --max-files, or ask the admin to raise "
            "client_max_body_size"),
    Meaning("HTTP 403", REFUSED, "ask the project's owner for the right to edit"),
    Meaning("unable to read dicom", REFUSED, "here it reads as DICOM, so ask the XNAT admin whether "
            "the server's disk is full; if not, copy that file again from its source"),
    Meaning("contains no sop", REFUSED, "copy that file again from its source, then run again"),
    # What XNAT refuses to archive (PrearcSessionArchiver).
    Meaning("duplicated sop instance", REFUSED, "XNAT has an image of it twice: delete the session "
            "in XNAT's prearchive, then run again"),
    Meaning("non-parsable", REFUSED, "an import that broke off left a half file there: delete the "
            "session in XNAT's prearchive, then run again"),
    Meaning("same uid, but a different number", REFUSED, "XNAT has this series under another "
            "number: ask the XNAT admin to delete that scan, and the session in the prearchive, "
            "then run again"),
    Meaning("modality", REFUSED, "XNAT has a session of another modality under this label: rename "
            "the folder"),
    Meaning("matching files|same resources", REFUSED, "XNAT has some of these images: delete the "
            "session in the prearchive, then run again; if they are newer here, --overwrite-files "
            "replaces XNAT's"),
    Meaning("another subject|session subject", REFUSED,
            "the label belongs to another subject: rename the folder"),
    Meaning("session uid", REFUSED, "XNAT has another study under this label: rename the folder"),
    Meaning("timeout interval", "XNAT is still at work on it", "run again later"),
    Meaning("HTTP 5", REFUSED, "run again later; if it stays, ask the XNAT admin"),
    Meaning("", REFUSED, "look at the session in XNAT's prearchive"),
)


def meaning_of(answer: Answer) -> Meaning:
    """What an answer means, by the first row that fits it."""
    return next(each for each in MEANINGS
                if re.search(each.sign, answer.evidence, re.IGNORECASE | re.DOTALL))


def refusal(settings: Settings, answer: Answer) -> str:
    """Why the server does not let us in: one sentence with the remedy."""
    user, target = settings.user, answer.location
    if answer.code:
        why = f"{meaning_of(answer).words(answer)}: {meaning_of(answer).to_do}"
    elif answer.status == 401 or "Login" in target:
        why = (f"login refused for {user} (HTTP {answer.status}): check USER and PASS (20 wrong "
               "ones lock the account for an hour; too many open sessions look the same)")
    elif "UpdateUser" in target:
        why = f"the password of {user} has expired: set a new one in the browser"
    elif "InactiveAccount" in target:
        why = f"the account {user} is not active yet: ask the XNAT admin"
    elif target.startswith("https:") and settings.url.startswith("http:"):
        site = target[8:].partition("/")[0]
        path = "".join(settings.url[7:].partition("/")[1:])  # XNAT may have one of its own
        why = f"the server wants https: give https://{site}{path} as URL"
    elif target:
        why = f"the server redirects to {target}: give the address that XNAT itself has"
    elif answer.is_html and answer.status == 200:
        why = "a web page came instead of an answer (login?): is this XNAT's own address?"
    else:
        why = f"unexpected answer ({answer.evidence}): is this XNAT's own address?"
    return f"{settings.url}: {why}"


# ---- xnat ----------------------------------------------------------------------------------

BUILD_INFO = "/xapi/siteConfig/buildInfo"
ADDRESS = re.compile(r"/data/prearchive/projects/([^/\s]+)/[^/\s]+/([^/\s]+)$")


class Scan(NamedTuple):
    """A scan that the server holds."""

    path: str  # of its session
    id: str
    uid: str  # Series Instance UID, '' if the server does not tell
    files: int  # DICOM files, counted by the server


class Place(NamedTuple):
    """Where the server has a session before this run adds to it."""

    archived: str = ""  # its path in the archive
    waiting: Tuple[Row, ...] = ()  # its rows in the prearchive


class Xnat(Curl):
    """A server, one login and one project on it."""

    def __init__(self, settings: Settings, programs: Programs, teller: Teller) -> None:
        super().__init__(settings, programs, teller)
        self.project = settings.project
        self.project_path = f"/data/projects/{quote(settings.project, safe='')}"
        self.version = ""
        self.replaces = settings.overwrite_files  # whether XNAT replaces files it has
        # By label; None where the server does not tell this user.
        self._archive: Optional[Dict[str, Row]] = None
        self._prearchive: Optional[Dict[str, List[Row]]] = None
        self._subjects: Dict[str, str] = {}  # labels as XNAT has them, by those in lower case

    # The server, once

    def meet(self) -> None:
        """Log in once and check the project, before any byte. Raises Stop(3) with the reason.

        XNAT itself refuses none of this at import: a wrong project gives 200, and the data goes
        into another one or to Unassigned (GradualDicomImporter).
        """
        answer = self.ask("POST", "/data/JSESSION", seconds=60)
        if answer.status != 200 or not re.match(r"[0-9A-Za-z._-]{1,200}\s*$", answer.body):
            raise Stop(refusal(self.settings, answer))
        self.cookie = answer.body.strip()
        try:
            self.project = self._find_project()
        except Trouble as trouble:
            raise Stop(f"project {self.settings.project}: {trouble}")
        self.project_path = f"/data/projects/{quote(self.project, safe='')}"

    def _find_project(self) -> str:
        """The project's own ID (an alias may have been given), if this user may add to it."""
        wanted, user = self.settings.project, self.settings.user
        found = self.get(self.project_path)
        if found is None:
            raise Stop(f"project {wanted}: not on this XNAT, or {user} cannot see it: check its ID")
        try:
            project = str(found["items"][0]["data_fields"]["ID"])
        except (KeyError, IndexError, TypeError):
            raise Trouble("the server does not tell its ID", "check that this is XNAT's own address")
        query = {"permissions": "edit", "dataType": "xnat:subjectData"}
        if project not in [row.get("id") for row in self.rows("/data/projects", query) or []]:
            raise Stop(f"project {wanted}: {user} can see it but not add to it: ask its owner to "
                       f"make {user} a member")
        return project

    def look_around(self, sessions: Iterable[Session]) -> None:
        """What archive and prearchive hold under our labels, once for the whole project.

        Not every server tells this to every user; sessions are then asked for one by one.
        """
        labels = {session.label for session in sessions}
        ours = {session.subject_label.lower() for session in sessions}
        info, code, archive, prearchive = (answer.json() for answer in self.ask_once(
            BUILD_INFO, f"{self.project_path}/prearchive_code", self._archive_listing(),
            f"/data/prearchive/projects/{quote(self.project, safe='')}?format=json"))
        # Without a version the series of a session go one by one.
        self.version = str(info.get("version", "")) if isinstance(info, dict) else ""
        self.replaces |= code == 5  # PrearchiveCode.AutoArchiveOverwrite
        self._take_archive(table(archive), labels, ours)
        rows = table(prearchive)
        if rows is not None:
            self._prearchive = defaultdict(list)
            for row in rows:
                if row.get("name") in labels:
                    self._prearchive[row["name"]].append(row)

    def _archive_listing(self) -> str:
        return "/data/experiments?" + urlencode({
            "project": self.project, "xsiType": "xnat:imageSessionData",
            "columns": "label,subject_label,UID", "format": "json"}, safe=":,")

    def _take_archive(self, rows: Optional[List[Row]], labels: Set[str], ours: Set[str]) -> None:
        self._archive = None if rows is None else {}
        for row in rows or []:
            subject, label = row.get("subject_label", ""), row.get("label", "")
            if subject.lower() in ours:  # XNAT finds subjects without regard to case
                self._subjects[subject.lower()] = subject
            if label in labels and self._archive is not None:
                self._archive[label] = row

    def takes_side_by_side(self) -> bool:
        """Whether series of one session may go at the same time: since 1.8.8 (XNAT-7535)."""
        return [int(number) for number in re.findall(r"[0-9]{1,9}", self.version)[:3]] >= [1, 8, 8]

    def close(self) -> None:
        """Give the server session back: a user has a limited number of them."""
        if self.cookie:
            self.ask("DELETE", "/data/JSESSION", seconds=3)

    # What it holds

    def archived(self, session: Session) -> Optional[Row]:
        """Label, subject and Study UID of a session in the archive, None if it is not there."""
        if self._archive is not None:
            return self._archive.get(session.label)
        found = self.get(self.archive_path(session))  # no listing: ask for this one
        try:
            fields_ = found["items"][0]["data_fields"]
            return {"uid": str(fields_.get("UID") or "")}
        except (KeyError, IndexError, TypeError, AttributeError):
            return None if found is None else {}

    def archive_path(self, session: Session) -> str:
        row = (self._archive or {}).get(session.label, {})
        subject = row.get("subject_label") or self._subjects.get(
            session.subject_label.lower(), session.subject_label)
        return f"{self.project_path}/subjects/{quote(subject, safe='')}/experiments/{session.label}"

    def waiting(self, session: Session) -> List[Row]:
        """What the prearchive holds under a session's label."""
        return list((self._prearchive or {}).get(session.label, []))

    def find(self, session: Session, study: str, known: bool) -> Place:
        """Where the server has a session. Raises Trouble if the label holds something else.

        `known` says that an earlier run brought it there: scripts of the site may have changed
        its Study UID since.
        """
        row = self.archived(session)
        waiting = self.waiting(session)
        for where, found, subject, uid in [("archive", row or {}, "subject_label", "uid")] + [
                ("prearchive", each, "subject", "tag") for each in waiting]:
            other, theirs = found.get(subject, ""), found.get(uid, "")
            if other and other.lower() != session.subject_label.lower():
                raise Trouble(f"XNAT's {where} has {session.label} under subject {other}, here it "
                              f"is subject {session.subject_label}", "rename the folder")
            if theirs and study and theirs != study and not known:
                raise Trouble(f"XNAT's {where} has another study under the label {session.label} "
                              f"(there {theirs}, here {study})", "rename the session folder")
        return Place("" if row is None else self.archive_path(session), tuple(waiting))

    def holds(self, path: str) -> Optional[List[Scan]]:
        """The scans of a session at `path`, None if it is not there.

        In the prearchive this is what the last build saw.
        """
        urls = [path + "/scans?format=json&columns=ID,UID,series_description",
                path + "/scans/ALL/resources?format=json&cache_file_stats=true"]
        if "/prearchive/" in path:
            urls = [path + "?format=xml", path + "/resources?format=json"]
        first, second = self.ask_once(*urls)
        if first.status not in (200, 404):
            first, meaning, _ = self.ask_until(path, lambda: self.ask_once(urls[0])[0])
            if first.status not in (200, 404):
                raise Trouble(f"{path} cannot be read: {meaning.words(first)}", meaning.to_do)
        uids = scan_uids(first)
        if uids is None:
            return None
        rows = table(second.json())
        if rows is None or not set(uids) <= {row.get("cat_id", "") for row in rows}:
            rows = [dict(row, cat_id=scan) for scan in uids
                    for row in self.rows(f"{path}/scans/{quote(scan, safe='')}/resources") or []]
        counts: Counter[str] = Counter()
        for row in rows:
            scan, label, count = (row.get(name, "") for name in ("cat_id", "label", "file_count"))
            if scan in uids and label in ("DICOM", "secondary"):
                if not re.fullmatch("[0-9]{1,9}", count):  # a catalog without statistics
                    count = str(len(self.names(Scan(path, scan, "", 0), label)))
                counts[scan] += int(count)
        return [Scan(path, scan, uid, counts[scan]) for scan, uid in uids.items()]

    def names(self, scan: Scan, label: str = "DICOM") -> List[str]:
        """The names of a scan's files, as they are stored."""
        rows = self.rows(f"{scan.path}/scans/{quote(scan.id, safe='')}/resources/{label}/files")
        return [row.get("name", "") for row in rows or []]

    def status(self, address: str) -> str:
        """Status of a prearchive session once nothing works on it; '' if it is not there."""
        for wait_ in (1.0, 2.0, 5.0, 10.0) + (30.0,) * 60:
            rows = self.rows(address)
            status = rows[0].get("status", "") if rows else ""
            # _BUILDING, ARCHIVING, QUEUED_ARCHIVING, MOVING ...: nobody may touch it (LockAndSync)
            if not status.startswith("_") and (not status.endswith("ING") or status == "RECEIVING"):
                return status
            if wait_ == 2.0:
                self.teller.say(f"{address}: XNAT is at work on it ({status}): waiting")
            self.programs.pause(wait_)
        raise Trouble(f"XNAT is still at work on it ({address} is {status})", "run again later")

    def leftovers(self, sessions: List[Session]) -> List[str]:
        """Addresses in the prearchive beside sessions that are archived, with their status."""
        labels = {session.label for session in sessions}
        rows = table(self.ask_once(
            f"/data/prearchive/projects/{quote(self.project, safe='')}?format=json")[0].json())
        return [f"{address_of(row)} ({row.get('status', '')})" for row in rows or []
                if row.get("name") in labels]

    # One part

    def post(self, session: Session, series: Series, files: int, zipped: str,
             moved: Callable[[float], None]) -> str:
        """POST a zip of so many files until it is sent, refused or out of tries; its address.

        Raises Trouble unless XNAT answers with an address in our project and session: it says 200
        too when it kept nothing, or put it elsewhere (DicomZipImporter).
        """
        query = {"import-handler": "DICOM-zip", "PROJECT_ID": self.project,
                 "SUBJECT_ID": session.subject_label, "EXPT_LABEL": session.label,
                 "overwrite": "append",
                 "prevent_auto_commit": "true"}  # else five idle minutes archive half a session
        answer, meaning, tries = self.ask_until(
            f"{session.label} {series.name}", lambda: self.ask(
                "POST", "/data/services/import", query, zipped, moved=moved), files)
        series.tries, series.http = series.tries + tries, answer.status
        if answer.status != 200:
            what = answer.evidence
            if answer.status in (413, 504):  # a proxy's limits: how big was it?
                what += f", for a zip of {size(os.path.getsize(zipped))} with {plural(files, 'file')}"
            raise Trouble(f"{meaning.means} ({what})", meaning.to_do, refused=True)
        if answer.is_html:
            raise Trouble("a web page came instead of an answer", "check that this is XNAT's own "
                          "address")
        return self._address(answer, session, series)

    def _address(self, answer: Answer, session: Session, series: Series) -> str:
        """Where XNAT put a part. Raises Trouble unless that is our session, Misplaced if it is
        another project."""
        addresses = sorted(set(answer.body.split()))
        for address in addresses:
            found = ADDRESS.search(address)
            if not found:
                raise Trouble(f"no address came back ({address[:200]})", "look in the log")
            if found[1] != self.project:
                raise Misplaced(f"project {self.project}: XNAT put {session.label} {series.name} "
                                f"into project {found[1]} ({address}): do not run again, have it "
                                "deleted there, and ask the XNAT admin")
            if found[2] != session.label:
                raise Trouble(f"XNAT put it into another session ({address})", "look there")
        if not addresses:
            raise Trouble("XNAT kept none of these files (empty answer)", "ask the project's owner "
                          "about import filters and anonymization scripts", refused=True)
        if len(addresses) > 1:
            raise Trouble(f"XNAT made several sessions of it ({', '.join(addresses)})",
                          "look at them in the prearchive, and ask the XNAT admin")
        return addresses[0][addresses[0].index("/data/"):]

    # A whole session

    def build(self, address: str) -> None:
        """Let XNAT say what a prearchive session holds; archives nothing. Raises Trouble."""
        answer, meaning, _ = self.ask_until(
            f"build of {address}", lambda: self.ask("POST", address, {"action": "build"}))
        if answer.status != 200:
            raise Trouble(f"{meaning.means} ({answer.evidence})", meaning.to_do, refused=True)

    def commit(self, session: Session, address: str) -> str:
        """Commit a whole session; where it lies then, in the archive or in the prearchive.

        Once: after an answer that was lost it looks what has become of it. Raises Trouble.
        """
        query = {"action": "build" if self.settings.review else "commit"}
        if self.settings.overwrite_files and not self.settings.review:
            query["overwrite_files"] = "true"
        for tries in itertools.count(1):
            answer = self.ask("POST", address, query)
            found = re.search(r"/data/archive(/projects/\S+)", answer.body)
            if answer.status == 301 and found:  # the subject's label may differ in case
                return "/data" + found[1]
            if answer.status == 200 and "/data/prearchive/" in answer.body:
                return address
            if answer.status != 301:
                self.check_login(answer)
            # Refused, or the answer was lost on the way while XNAT went on: look.
            meaning = meaning_of(answer)
            lost = meaning.heals or answer.status == 409 and "locked" in answer.evidence
            status = self._after(address, lost)
            if not status:
                return self._gone(session, address)
            again = lost and status in ("RECEIVING", "READY", "CONFLICT", "ERROR")
            if not again or tries > self.settings.retries:
                break
            self.wait_to_heal(f"commit of {session.label}", answer, meaning, tries)
        if meaning.heals:  # XNAT keeps the reason
            answer = self.ask("GET", address + "/logs/last")
            meaning = meaning_of(answer)
        raise Trouble(f"XNAT did not archive it ({answer.evidence}; {address} is {status})",
                      meaning.to_do, refused=True)

    def _after(self, address: str, lost: bool) -> str:
        """Status after a commit. READY may mean that archiving is queued: it is looked at again
        for a while."""
        status = self.status(address)
        for wait_ in (1.0, 3.0, 6.0) if lost else ():
            if status != "READY":
                break
            self.programs.pause(wait_)
            status = self.status(address)
        return status

    def _gone(self, session: Session, address: str) -> str:
        """Where a session is that left the prearchive by a commit whose answer was lost."""
        if self._archive is not None:
            rows = table(self.ask_once(self._archive_listing())[0].json())
            self._archive.update({row.get("label", ""): row for row in rows or []
                                  if row.get("label") == session.label})
        path = self.archive_path(session)
        if self.holds(path) is None:
            raise Trouble(f"it is gone from the prearchive ({address}), and XNAT's archive does not "
                          "have it", "run again to send it again")
        return path


def scan_uids(answer: Answer) -> Optional[Dict[str, str]]:
    """IDs and Series UIDs of a session's scans: a listing, or the XML of a prearchive session."""
    if answer.status != 200:
        return None
    rows = table(answer.json())
    if rows is not None:
        return {row.get("id", ""): row.get("uid", "") for row in rows}
    uids = {}
    for scan in re.findall(r"<(?:\w+:)?scan\s([^>]*)>", answer.body):
        found = dict(re.findall(r'\b(ID|UID)="([^"]*)"', scan))
        if "ID" in found:
            uids[html.unescape(found["ID"])] = found.get("UID", "")
    return uids


def address_of(row: Row) -> str:
    """Where a row of the prearchive's listing can be asked for."""
    return "/data" + row.get("url", "").replace("/data/", "/", 1)


def stored_name(name: str) -> str:
    """The name under which XNAT stores a file (GradualDicomImporter)."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", os.path.basename(name))


# ---- ledger --------------------------------------------------------------------------------


@dataclass
class Memory:
    """What earlier runs have done for one session."""

    # On its way: series, first and last name, fingerprint and address of each part that is sent.
    parts: List[Dict[str, str]] = field(default_factory=list)
    ended: str = ""  # archived or prearchived
    path: str = ""  # where that was counted
    files: int = 0  # so many
    whole: bool = False  # nothing was wrong with it
    # By name: listing, fingerprint of the images, their number, whether by CRC-32.
    series: Dict[str, Tuple[str, str, int, bool]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return self.parts[-1]["address"] if self.parts else ""

    def is_same(self, series: List[Series]) -> bool:
        """Whether the folder is what an earlier run verified, by names, sizes and times."""
        return self.whole and not self.parts and not any(each.problems for each in series) and {
            each.name: each.listing for each in series if not each.status} == {
            name: known[0] for name, known in self.series.items()}

    def sent(self, series: Series, address: str = "") -> Set[Tuple[str, str]]:
        """Which images of a series, as they are now, were sent, at all or to `address`."""
        found: Set[Tuple[str, str]] = set()
        for part in self.parts:
            if part["series"] == series.name and address in ("", part["address"]):
                images = [each for each in series.images
                          if part["first"] <= each.file.name <= part["last"]]
                if part_fingerprint(images) == part["files"]:
                    found |= {each.key for each in images}
        return found


def part_fingerprint(images: List[Image]) -> str:
    return fingerprint(f"{each.file.name} {each.file.bytes} {each.file.time_ns} {each.sop}"
                       for each in images)


class Ledger:
    """The file that remembers: JSON, a line each, synced; a torn line loses itself only.

    Of a session that has ended only the place of its line is kept in memory.
    """

    def __init__(self, settings: Settings, project: str) -> None:
        """Raises Stop(3) if it cannot be used. In a dry run nothing of it counts but exclusions."""
        self.path = os.path.join(os.path.abspath(settings.workdir), "dicomUpload.ledger")
        self.exclusions: Set[str] = set()  # of earlier runs
        self._where = {"v": 2, "server": settings.url, "project": project}
        self._ended: Dict[Tuple[str, str], int] = {}  # where in the file
        self._parts: Dict[Tuple[str, str], List[Dict[str, str]]] = {}
        self._lock = threading.Lock()
        self._end = 0
        if settings.dry_run and not os.path.exists(self.path):
            self._file = os.open(os.devnull, os.O_RDONLY)
            return
        try:
            flags = os.O_RDONLY if settings.dry_run else os.O_RDWR | os.O_CREAT | os.O_APPEND
            self._file = os.open(self.path, flags, 0o600)
            with open(self.path, "rb") as lines:
                raw = b"\n"
                for raw in lines:
                    self._read(raw)
                    self._end += len(raw)
            if not raw.endswith(b"\n") and not settings.dry_run:
                self._write(b"\n")
        except OSError as error:
            raise Stop(f"ledger {self.path}: cannot be used ({error.strerror}): mend it, or delete "
                       "it (the server is then asked what it has)")

    def _read(self, raw: bytes) -> None:
        with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            line = json.loads(raw)  # torn, or of another version: the server is asked
            if all(line[key] == value for key, value in self._where.items()):
                self._take(line, self._end)

    def _take(self, line: Dict[str, Any], at: int) -> None:
        if line["event"] == "exclude":
            self.exclusions |= set(line["names"])
            return
        key = line["subject"], line["session"]
        if line["event"] == "sent":
            part = {name: str(line[name])
                    for name in ("series", "first", "last", "files", "address")}
            self._parts.setdefault(key, []).append(part)
        else:
            self._parts.pop(key, None)
            if line["event"] == "ended":
                self._ended[key] = at

    def of(self, session: Session) -> Memory:
        """What is known of a session."""
        key = session.subject_label, session.label
        memory = Memory()
        with self._lock:
            if key in self._ended:
                with suppress(ValueError, KeyError, TypeError, OSError):
                    memory = self._recall(self._ended[key])
            memory.parts = list(self._parts.get(key, []))
        return memory

    def _recall(self, at: int) -> Memory:
        with open(self.path, "rb") as lines:
            lines.seek(at)
            line = json.loads(lines.readline())
        series = {str(name): (str(known[0]), str(known[1]), int(known[2]), bool(known[3]))
                  for name, known in line["series"].items()}
        return Memory([], line["where"], line["path"], int(line["files"]), bool(line["whole"]),
                      series)

    def add(self, session: Session, event: str, **more: Any) -> None:
        """Write an event down and sync it. Raises Stop(3) if that fails."""
        self._add(dict(self._where, at=now(), subject=session.subject_label, session=session.label,
                       event=event, **more))

    def exclude(self, names: Iterable[str]) -> None:
        """Remember the exclusions of this run."""
        if set(names) - self.exclusions:
            self._add(dict(self._where, at=now(), event="exclude", names=sorted(names)))

    def _add(self, line: Dict[str, Any]) -> None:
        raw = json.dumps(line).encode() + b"\n"
        try:
            with self._lock:
                at = self._end
                self._write(raw)
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


class Part:
    """Up to --max-files images of one series: one zip, one POST.

    It takes room on the disk after the part before it, and is posted after that one is sent.
    (Else one that waits could keep the room from the one that it waits for.)
    """

    def __init__(self, series: Series, images: List[Image], before: Optional[Part]) -> None:
        self.series = series
        self.files = [image.file for image in images]
        self.fingerprint = part_fingerprint(images)
        self.before = before
        self.has_room = threading.Event()
        self.over = threading.Event()
        self.address = ""  # where it was sent

    def end(self) -> None:
        self.before = None
        self.has_room.set()
        self.over.set()


class Sent:
    """Where one session's parts go."""

    def __init__(self, session: Session, address: str) -> None:
        self.session = session
        self.address = address  # '' until the answer to the first part has made the session
        self._opening = threading.Lock()

    @contextmanager
    def turn(self, side_by_side: bool) -> Iterator[None]:
        """One part alone until the session is made, then all that come."""
        self._opening.acquire()
        alone = not (side_by_side and self.address)
        if not alone:
            self._opening.release()
        try:
            yield
        finally:
            if alone:
                self._opening.release()


class Upload:
    """All sessions on their way from folder to archive, several at a time."""

    ALIKE = 20  # sessions in a row that the server refuses with the same words: no other would pass

    def __init__(self, tree: Tree, xnat: Xnat, workdir: Optional[Workdir], ledger: Ledger) -> None:
        self.xnat = xnat
        self.settings = settings = xnat.settings
        self.teller = xnat.teller
        self.workdir = workdir
        self.ledger = ledger
        self.level = Level(settings.compression)
        self.waiting = iter(tree.sessions)
        self.alone = len(tree.sessions) == 1
        self.active: Dict[str, Outcome] = {}  # sessions on their way, by path
        self.whole: List[Session] = []  # archived, now or before
        self.largest: List[int] = []  # bytes of the largest zips that a dry run foresees
        self._refused: List[str] = []  # the words of the last refusals, while they are alike
        self._lock = threading.Lock()
        # While as many sessions as may be posted are on the line, as many are read and packed.
        self.sessions_at_a_time = 1 if settings.procs == 1 else 2 * settings.procs
        self.parts = ThreadPoolExecutor(2 * settings.procs)  # each has one zip at most
        self.slots = threading.Semaphore(settings.procs)  # uploads and commits side by side

    def go(self) -> None:
        """Run until every session is over. Raises Stop; no thread is left, whatever happens."""
        pool = ThreadPoolExecutor(self.sessions_at_a_time)
        try:
            jobs = {pool.submit(self._work) for _ in range(self.sessions_at_a_time)}
            while jobs:
                done, jobs = wait(jobs, timeout=0.25, return_when=FIRST_EXCEPTION)
                for job in sorted(done, key=lambda job: isinstance(job.exception(), Stopping)):
                    job.result()
                self.teller.check()
                self.teller.progress()
        except BaseException:
            self.xnat.programs.stop()
            raise
        finally:
            pool.shutdown()
            self.parts.shutdown()

    def _work(self) -> None:
        """One session after another, while there are any."""
        while not self.xnat.programs.stopping.is_set():
            with self._lock:
                session = next(self.waiting, None)
                if session is None:
                    return
                outcome = self.active[session.path] = Outcome(session, [])
            try:
                self.one_session(outcome)
            except Trouble as trouble:
                outcome.trouble = trouble
            except OSError as error:
                outcome.trouble = unreadable(str(error.filename or "the system"), error)
            self._over(outcome)

    def _over(self, outcome: Outcome) -> None:
        with self._lock:
            del self.active[outcome.session.path]
            if outcome.where == "archived":
                self.whole.append(outcome.session)
        self.teller.session(outcome)
        self._count_refusals(outcome)

    def _count_refusals(self, outcome: Outcome) -> None:
        """Raises Stop when the server refuses one session after another with the same words."""
        troubles = [outcome.trouble] + [each for series in outcome.series
                                        for each in series.problems]
        refused = [each for each in troubles if each and each.refused]
        with self._lock:
            if refused:
                words = re.sub(r"\S*[\d_./]\S*", "", refused[0].what)
                self._refused = [each for each in self._refused if each == words] + [words]
            elif outcome.where in ("archived", "prearchived") and not outcome.earlier:
                self._refused = []
            if len(self._refused) >= self.ALIKE:
                raise Stop(f"{self.settings.url}: the server refuses everything "
                           f"({len(self._refused)} sessions in a row; the last: "
                           f"{refused[0].what if refused else ''}): ask the XNAT admin (is its disk "
                           "full?), then run again")

    # One session

    def one_session(self, outcome: Outcome) -> None:
        """The whole way of one session, from its folder to the archive. Raises Trouble, Stop."""
        session, xnat = outcome.session, self.xnat
        outcome.series = series = list_session(session, self.settings)
        remembered = self.ledger.of(session)
        if not self.settings.dry_run and not self.settings.again and self._is_known(
                outcome, remembered):
            return
        with self.teller.at_work(f"reading {session.label}"):
            read_session(series, self.teller.has_read)
        if not any(each.images for each in series):
            outcome.where = "nothing to send"
            if not self.settings.dry_run:
                self._note(outcome)
            return
        study = next((image.study for each in series for image in each.images), "")
        place = xnat.find(session, study, bool(remembered.ended or remembered.parts))
        memory = Memory() if self.settings.again else remembered
        addresses = self._compare(outcome, memory, place)
        self.teller.plans(series)
        if self.settings.dry_run:
            self._foresee(outcome, bool(addresses))
            return
        addresses += self._send(session, series, addresses)
        outcome.address = addresses[-1] if addresses else ""
        if any(each.problems for each in series):
            outcome.where = "held back" if addresses else "failed"
            return
        if self._has_changed(outcome):
            outcome.where = "held back" if addresses else "failed"
            raise Trouble("its folder changed while it was sent", "run again when it is still")
        for address in dict.fromkeys(addresses):
            outcome.where = "not archived"
            with self.slots, self.teller.at_work(f"archiving {session.label}"):
                outcome.address = xnat.commit(session, address)
        self._verify(outcome, place, bool(addresses))
        self._note(outcome)

    def _foresee(self, outcome: Outcome, waiting: bool) -> None:
        """How a real run would go on from here."""
        missing = any(each.missing for each in outcome.series)
        failed = any(each.problems for each in outcome.series)
        outcome.where = ("failed" if failed else "to send" if missing or waiting else "there")
        outcome.files = sum(each.there for each in outcome.series)
        with self._lock:
            self.largest = heapq.nlargest(2 * self.settings.procs, self.largest + [
                zip_room([image.file for image in images])
                for _, images in self._cut(outcome.series, False)])

    def _is_known(self, outcome: Outcome, memory: Memory) -> bool:
        """Whether an earlier run has verified this very folder, and XNAT still has it.

        By names, sizes and times alone; no file is opened, and nobody is asked where the meeting
        has told. Raises Trouble if somebody has deleted it since.
        """
        session, xnat = outcome.session, self.xnat
        if not memory.is_same(outcome.series):
            return False
        archived = xnat.archived(session) is not None
        if memory.ended == "prearchived" and memory.path not in map(address_of,
                                                                    xnat.waiting(session)):
            if not archived and not xnat.status(memory.path):
                raise Trouble("it was left for review, and is neither in the prearchive nor in the "
                              "archive any more", anew(session))
            return not archived  # its reviewer has archived it: count it there
        if memory.ended == "archived" and not archived:
            raise Trouble("an earlier run saw it archived, and it is not there any more",
                          anew(session))
        for each in outcome.series:
            each.there = memory.series[each.name][2] if each.name in memory.series else 0
            each.status = each.status or ("already there" if each.there else "no DICOM")
        outcome.where, outcome.earlier, outcome.files = memory.ended, True, memory.files
        outcome.address = memory.path
        return True

    def _has_changed(self, outcome: Outcome) -> bool:
        """Whether names, sizes or times in the session's folder are other than when it was read."""
        again = list_session(outcome.session, self.settings)
        return {each.name: each.listing for each in again} != {
            each.name: each.listing for each in outcome.series}

    # Compare

    def _compare(self, outcome: Outcome, memory: Memory, place: Place) -> List[str]:
        """Set what is missing of each series; the prearchive addresses that wait to be committed.

        Raises Trouble where sending more could only make it worse.
        """
        session, series = outcome.session, outcome.series
        if self.settings.again:
            self._set_missing(series, {image.key for each in series for image in each.images})
            return []
        held = (self.xnat.holds(place.archived) or []) if place.archived else []
        uids = {image.series for each in series for image in each.images}
        told = any(scan.uid in uids for scan in held)  # else a script may have changed the UIDs
        missing = self._lacking(series, held)
        self._check_deleted(outcome, memory, missing, told)
        if not told and held and memory.ended:
            for each in series:
                if each.name in memory.series:
                    missing -= {image.key for image in each.images}
        missing |= self._changed(series, memory, missing)
        addresses = []
        here = [address_of(row) for row in place.waiting]
        if memory.address:
            at = memory.address
            if at in here or self.xnat.status(at):
                missing = {key for key in missing if key not in self._sent(series, memory, at)}
                addresses = [at]
            elif held and not told:  # a commit that was not noted, and UIDs that a script changed
                missing -= self._sent(series, memory, at)
            elif not held:
                self.teller.say(f"{session.label}: is no longer in the prearchive: sending it again")
        elif here and (missing or not held):
            missing = self._join(outcome, held, here, missing)
            addresses = here
        self._set_missing(series, missing)
        return addresses

    def _sent(self, series: List[Series], memory: Memory, address: str) -> Set[Tuple[str, str]]:
        return {key for each in series for key in memory.sent(each, address)}

    @staticmethod
    def _set_missing(series: List[Series], missing: Set[Tuple[str, str]]) -> None:
        for each in series:
            each.missing = [image for image in each.images if image.key in missing]
            each.there = len(each.images) - len(each.missing)
            if each.images and not each.missing and not each.problems:
                each.status = each.status or "already there"

    def _lacking(self, series: List[Series], held: List[Scan]) -> Set[Tuple[str, str]]:
        """What `held` lacks: by Series UID and count, and by names where it has a part."""
        scans: Dict[str, List[Scan]] = defaultdict(list)
        for scan in held:
            scans[scan.uid].append(scan)
        ours: Dict[str, List[Tuple[Series, Image]]] = defaultdict(list)
        for each in series:
            for image in each.images:
                ours[image.series].append((each, image))
        lacking: Set[Tuple[str, str]] = set()
        for uid, pairs in ours.items():
            there = scans[uid] if uid else []
            count = sum(scan.files for scan in there)
            if not count:
                lacking |= {image.key for _, image in pairs}
            elif count < len(pairs):
                absent = not_among([image for _, image in pairs],
                                   [name for scan in there for name in self.xnat.names(scan)])
                if absent is None:
                    for each in {id(each): each for each, _ in pairs}.values():
                        each.problems.append(Trouble(
                            f"XNAT has {count} of its {plural(len(pairs), 'file')}, under other "
                            "names: which are missing cannot be told", "add --overwrite-files "
                            "--again, and --only with this session, to send all of it again"))
                lacking |= {image.key for image in absent or ()}
        return lacking

    def _check_deleted(self, outcome: Outcome, memory: Memory, missing: Set[Tuple[str, str]],
                       told: bool) -> None:
        """A series that an earlier run saw archived and that is gone does not come back by itself."""
        for each in outcome.series:
            known = memory.series.get(each.name)
            if (told and known and memory.ended == "archived" and each.images
                    and all(image.key in missing for image in each.images)
                    and known[1] == self._images(each, set(), known[3])):
                each.problems.append(Trouble("an earlier run saw it archived, and it is not there "
                                             "any more", anew(outcome.session)))

    def _images(self, series: Series, absent: Set[Tuple[str, str]], by_crc: bool) -> str:
        if by_crc:
            for image in series.images:
                if image.key not in absent:
                    crc_of(series, image.file)
        return series.fingerprint(absent, by_crc)

    def _changed(self, series: List[Series], memory: Memory, missing: Set[Tuple[str, str]]
                 ) -> Set[Tuple[str, str]]:
        """Images that are not what an earlier run sent under their UIDs: by size and CRC-32, for
        times alone are no change. Without --overwrite-files their series fails."""
        changed: Set[Tuple[str, str]] = set()
        for each in series:
            listing, images, count, by_crc = memory.series.get(each.name, ("", "", 0, False))
            there = [image for image in each.images if image.key not in missing]
            # Where files were removed here, nothing can be said of the others.
            if listing in ("", each.listing) or len(there) != count or not there:
                continue
            if self._images(each, missing, by_crc) != images:
                if self.settings.overwrite_files:
                    changed |= {image.key for image in each.images}
                else:
                    each.problems.append(Trouble(
                        "has changed since it was sent", "with --overwrite-files it replaces what "
                        "XNAT has"))
        return changed

    def _join(self, outcome: Outcome, held: List[Scan], here: List[str],
              missing: Set[Tuple[str, str]]) -> Set[Tuple[str, str]]:
        """What is still missing beside what waits in the prearchive, left there by a run whose
        workdir is lost. Raises Trouble if a commit of that could only conflict."""
        for address in here:
            status = self.xnat.status(address)
            if status == "RECEIVING" and self.settings.dry_run:
                self.teller.say(f"{outcome.session.label}: waits in the prearchive ({address}); what "
                                "of it is there shows when it is sent")
                continue
            if status == "RECEIVING":  # it tells what it has only once it is built
                self.xnat.build(address)
            waiting = self.xnat.holds(address) or []
            if not self.xnat.replaces and self._overlap(held, waiting):
                raise Trouble(f"the prearchive holds a copy of what is archived ({address}, "
                              f"{status}), and what is missing would join it",
                              "delete that copy in the prearchive, then run again")
            missing = missing & self._lacking(outcome.series, held + waiting)
        return missing

    def _overlap(self, held: List[Scan], waiting: List[Scan]) -> bool:
        return any(set(self.xnat.names(one)) & set(self.xnat.names(other))
                   for one in held for other in waiting if one.uid and one.uid == other.uid)

    # Send

    def _send(self, session: Session, series: List[Series], addresses: List[str]) -> List[str]:
        """POST what is missing, part by part; the addresses where that lies now."""
        sent = Sent(session, addresses[-1] if addresses else "")
        # One after another, or series side by side: once the first answer has made the session.
        side_by_side = self.xnat.takes_side_by_side() and self.settings.procs > 1
        jobs: List[Tuple[Part, Any]] = []
        for each, images in self._cut(series, side_by_side and not addresses):
            before = next((part for part, _ in reversed(jobs)
                           if part.series is each or not side_by_side), None)
            part = Part(each, images, before)
            jobs.append((part, self.parts.submit(self._send_part, sent, part, side_by_side)))
        for _, job in jobs:
            job.result()
        for each in series:
            if each.missing and not each.problems:
                each.status = "sent"
        return [part.address for part, _ in jobs if part.address]

    def _cut(self, series: List[Series], opener: bool) -> Iterator[Tuple[Series, List[Image]]]:
        """The parts to send, in order."""
        to_send = [each for each in series if each.missing and not each.problems]
        most = self.settings.max_files
        # While a long session is the only one, nobody works until its first answer has come:
        # one file is enough to make the session.
        opener = opener and self.alone and len(to_send) > self.settings.procs
        for each in to_send:
            images = sorted(each.missing, key=lambda image: image.file.name)
            if opener and len(images) > 1:
                yield each, images[:1]
                images = images[1:]
            opener = False
            for at in range(0, len(images), most):
                yield each, images[at:at + most]

    def _send_part(self, sent: Sent, part: Part, side_by_side: bool) -> None:
        """Pack one part and post it, in its turn."""
        session, series = sent.session, part.series
        try:
            if part.before:
                part.before.has_room.wait()
            assert self.workdir, "a dry run sends nothing"
            with self.workdir.room_for(part.files) as zipped, self.teller.at_work(
                    f"{session.label} {series.name}", part.files) as moved:
                part.has_room.set()
                if series.problems:
                    return
                series.began = series.began or time.monotonic()
                level = self._pack(part, zipped)
                if part.before:
                    part.before.over.wait()
                    if not part.before.address and part.before.series is series:
                        return  # the one before says why
                with sent.turn(side_by_side), self.slots:
                    self._post(sent, part, zipped, level, moved)
        except Trouble as trouble:
            series.problems.append(trouble)
        except OSError as error:
            series.problems.append(unreadable(str(error.filename or "the workdir"), error))
        finally:
            part.end()

    def _pack(self, part: Part, zipped: str) -> int:
        """The level at which it was packed."""
        level, series = self.level.choose(), part.series
        given = sum(each.bytes for each in part.files)
        with self.level.timed("packing", level, given):
            pack(series, part.files, zipped, level, self.xnat.programs)
        made = os.path.getsize(zipped)
        self.level.learn("making", level, made, given)
        self.teller.log(f"{series.folder}: {plural(len(part.files), 'file')} packed at level "
                        f"{level}, {size(given)} to {size(made)}")
        return level

    def _post(self, sent: Sent, part: Part, zipped: str, level: int,
              moved: Callable[[float], None]) -> None:
        made, series = os.path.getsize(zipped), part.series
        given = sum(each.bytes for each in part.files)
        with self.level.timed("posting", level, given):
            address = self.xnat.post(sent.session, series, len(part.files), zipped, moved)
        self.ledger.add(sent.session, "sent", series=series.name, first=part.files[0].name,
                        last=part.files[-1].name, files=part.fingerprint, address=address)
        moved(1.0)
        sent.address = part.address = series.address = address
        series.sent += len(part.files)
        series.bytes += given
        series.zipped += made
        series.there += len(part.files)
        series.seconds = time.monotonic() - series.began

    # Verify and note

    def _verify(self, outcome: Outcome, place: Place, sent: bool) -> None:
        """Compare the server's count of each series with ours, by Series UID; by the total where
        a script has changed the UIDs. Too few fails the series, too many is worth a word."""
        path, series = outcome.address or place.archived, outcome.series
        outcome.where = "prearchived" if "/prearchive/" in path else "archived"
        outcome.address, outcome.earlier = path, not sent
        held = self.xnat.holds(path) or []
        ours: Counter[str] = Counter(image.series for each in series for image in each.images)
        theirs: Counter[str] = Counter()
        for scan in held:
            theirs[scan.uid] += scan.files
        outcome.files = sum(ours.values())
        if not set(ours) & set(theirs):
            ours = Counter({"": outcome.files})
            theirs = Counter({"": sum(scan.files for scan in held)})
        for uid, count in ours.items():
            if theirs[uid] < count:
                named = [each for each in series if each.images and uid in ("", each.images[0].series)]
                trouble = Trouble(f"{outcome.where}, but XNAT counts {theirs[uid]} files where {count} "
                                  "should be", "compare it in XNAT with the folder (an import filter "
                                  "may drop some), or run again to send what is missing")
                outcome.files -= count - theirs[uid]
                if uid and named:
                    named[0].problems.append(trouble)
                else:
                    outcome.trouble = trouble
            elif theirs[uid] > count:
                self.teller.say(f"{outcome.session.label}: XNAT counts {theirs[uid]} files where the "
                                f"folder has {count}: they were there before, or came from elsewhere")

    def _note(self, outcome: Outcome) -> None:
        """Write down how a session ended, so that the next run knows it by stat alone."""
        known = {each.name: (each.listing, each.fingerprint(set(), by_crc), len(each.images), by_crc)
                 for each in outcome.series if each.status != "left out"
                 for by_crc in [all(image.file.name in each.crcs for image in each.images)]}
        self.ledger.add(outcome.session, "ended", where=outcome.where, path=outcome.address,
                        files=outcome.files, whole=not outcome.failed(), series=known)

    def rest(self) -> List[Outcome]:
        """What a stop left undone: the sessions on their way, and those that it did not reach."""
        return list(self.active.values()) + [Outcome(session, [
            Series(name, "") for name in session.series]) for session in self.waiting]


def not_among(images: List[Image], names: List[str]) -> Optional[List[Image]]:
    """The images that are not among the names of a scan's files; None if that cannot be told."""
    left = Counter(names)
    absent: List[Image] = []
    twins: List[Image] = []
    for image in images:
        stored = stored_name(image.file.name)
        if left[stored]:
            left[stored] -= 1
        else:  # a second file of one name lies there under another
            (twins if stored in left else absent).append(image)
    foreign = list(left.elements())
    for image in list(absent):  # other programs name files by their UID
        by_uid = next((name for name in foreign if image.sop in name), None)
        if by_uid:
            foreign.remove(by_uid)
            absent.remove(image)
    if not foreign and names:
        return absent + twins
    return absent if len(foreign) == len(twins) and twins else None


def anew(session: Session) -> str:
    """How to send all of a session again."""
    return f"to send it anew, add --again --only {shlex.quote(glob.escape(session.path))}"


# ---- telling -------------------------------------------------------------------------------


REPORT = ("subject", "session", "series", "label", "status", "files", "copies", "damaged files",
          "not-DICOM files", "bytes sent", "seconds", "tries", "HTTP status", "server's address",
          "open in a browser", "message")
# How a session ended, in words.
ENDS = {
    "archived": "archived",
    "prearchived": "in the prearchive, waiting for review",
    "not archived": "not archived",
    "held back": "held back in the prearchive until every series is sent",
    "failed": "not there",
    "nothing to send": "nothing to send",
    "to send": "would be sent",
    "there": "already there",
}
COLOURS = {"archived": 32, "already there": 32, "in the prearchive": 33, "held back": 33,
           "would be sent": 32, "not": 31, "damaged": 31, "packed": 31}


class Failure(NamedTuple):
    """What somebody has to look at: where, what, and what to do."""

    where: str
    what: str
    to_do: str

    @property
    def kind(self) -> Tuple[str, str]:
        """The same for all failures of one kind: names and numbers do not count."""
        return re.sub(r"\S*[\d_.]\S*", "*", self.what), self.to_do


class Teller:
    """The one place that prints: results to stdout, the rest to stderr, all of it to the log."""

    HEARTBEAT = 60.0  # seconds without a line after which a log shows that the run is alive

    def __init__(self) -> None:
        self.failures: List[Failure] = []
        self.report_path = ""
        self.settings: Optional[Settings] = None
        self.stopped: Optional[Stop] = None  # by a signal
        self._broken: Optional[Stop] = None  # log or report cannot be written
        self._sessions: Counter[str] = Counter()
        self._series: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()  # files and bytes of all kinds
        self._at_work: Dict[object, Tuple[str, float]] = {}  # what goes on, bytes of it gone out
        self._total = 0  # sessions
        self._widths = (0, 0)  # of labels and of series names
        self._began = self._heard = self._drawn = time.monotonic()
        self._lock = threading.RLock()
        self._handles: Dict[str, int] = {}  # of log and report, once they are open
        self._moves = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._coloured = (sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
                          and not os.environ.get("NO_COLOR"))
        self._shown = False  # whether the moving line is on the screen

    def is_quiet(self) -> bool:
        return bool(self.settings and self.settings.quiet)

    def is_verbose(self) -> bool:
        return bool(self.settings and self.settings.verbose)

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

    def check(self) -> None:
        """Raises Stop if a signal came where Python drops exceptions, or the log is full."""
        if self.stopped or self._broken:
            raise self.stopped or self._broken  # type: ignore[misc]

    # One line

    def log(self, text: str) -> None:
        """A line for the log only; with --verbose on stderr too."""
        self._keep(text)
        if self.is_verbose():
            self._show(sys.stderr, f"  {text}")

    def line(self, text: str = "", important: bool = True) -> None:
        """A result: a line on stdout and in the log. --quiet shows only what is `important`."""
        self._keep(text)
        if important or not self.is_quiet():
            self._show(sys.stdout, text)

    def say(self, text: str, drawing: str = "") -> None:
        """A warning, an error or a wait: a line on stderr and in the log, maybe with a drawing."""
        self._keep(text)
        for line in (f"dicomUpload: {text}", *drawing.splitlines()):
            self._show(sys.stderr, line)

    def fail(self, where: str, trouble: Trouble) -> None:
        """Keep a failure for the summary."""
        with self._lock:
            self.failures.append(Failure(where, trouble.what, trouble.to_do))

    def _keep(self, text: str) -> None:
        self._write("log", f"{now()} {printable(text)}\n")

    def _write(self, kind: str, text: str) -> None:
        with self._lock:
            if kind in self._handles:
                try:
                    raw = text.encode("utf-8", "backslashreplace")
                    if os.write(self._handles[kind], raw) < len(raw):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError as error:
                    self._handles.clear()  # what ends the run must not keep its summary back
                    self._broken = Stop(f"{kind} beside {self.report_path}: cannot be written "
                                        f"({error.strerror}): make room, then run again")

    def _show(self, stream: TextIO, text: str) -> None:
        """Print a line; on a terminal broken between words, and with a colour for its status."""
        with self._lock:
            self._erase()
            self._heard = time.monotonic()
            lines = [printable(text)]
            if stream.isatty():
                lines = wrapped(lines[0], terminal_width(stream))
            if stream is sys.stdout and self._coloured:
                lines[0] = coloured(lines[0])
            put(stream, "".join(line + "\n" for line in lines))

    # While it goes on

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
        with self._lock:
            self._at_work[self] = (f"walking: {plural(len(tree.sessions), 'session')} so far", 0.0)
        self.progress()

    def has_read(self, files: int) -> None:
        with self._lock:
            self._counts["read"] += files

    def plans(self, series: List[Series]) -> None:
        """A session has been read: so much of it is to be sent."""
        with self._lock:
            self._counts["planned sessions"] += 1
            self._counts["planned"] += sum(image.file.bytes for each in series
                                           for image in each.missing if not each.problems)

    def progress(self) -> None:
        """On a terminal the one moving line; elsewhere a line now and then."""
        with self._lock:
            moment = time.monotonic()
            if self._moves and not self.is_quiet() and moment > self._drawn + 0.1:
                self._drawn = moment
                self._erase()
                columns = min(80, terminal_width(sys.stderr))
                put(sys.stderr, fitting(self._standing(), columns - 1))
                self._shown = True
            elif not (self._moves or self.is_quiet()) and moment > self._heard + self.HEARTBEAT:
                self.say(f"still at work: {self._standing()}")

    def _standing(self) -> str:
        """How far it is, how fast, about how long it will take, and what is going on."""
        names = [name for name, _ in self._at_work.values()][:1]
        if not self._total:
            return f"[{''.join(names)}]"
        counts, done = self._counts, sum(self._sessions.values())
        sent = counts["bytes"] + sum(each for _, each in self._at_work.values())
        rate = sent / max(1.0, time.monotonic() - self._began)
        # As if those that are not read yet were like those that are.
        known = max(1, counts["planned sessions"] + self._sessions["known"])
        total = counts["planned"] * max(1.0, (self._total - self._sessions["known"]) / known)
        left = "  waiting for XNAT" if sent else f"  {counts['read']:,} files read"
        if 0 < sent < 0.99 * total:
            left = f"  about {duration((total - sent) / rate)} left"
        return (f"[{done:,} of {plural(self._total, 'session')}  {size(sent)}  {size(rate)}/s{left}]"
                f"  {''.join(names)}")

    def _erase(self) -> None:
        if self._shown:
            put(sys.stderr, "\r\033[K")
            self._shown = False

    # Before

    def begin(self, tree: Tree, xnat: Xnat) -> None:
        """What is about to happen, in a few lines."""
        settings = xnat.settings
        pairs = [(session, name) for session, name in tree.pairs()]
        self._at_work.pop(self, None)
        self._total = len(tree.sessions)
        self._widths = (max((len(session.label) for session in tree.sessions), default=0),
                        min(40, max((len(printable(name)) for _, name in pairs), default=0)))
        self._began = time.monotonic()
        subjects = len({session.subject for session in tree.sessions})
        left_out = sum(1 for _, name in pairs if settings.left_out(name))
        self.line(f"XNAT {xnat.version or 'of unknown version'}, project {xnat.project}, as "
                  f"{settings.user}", important=False)
        self.line(f"{plural(subjects, 'subject')}, {plural(len(tree.sessions), 'session')}, "
                  f"{len(pairs):,} series: {left_out:,} left out", important=False)
        if tree.not_chosen:
            self.line(f"{plural(tree.not_chosen, 'session')} left out by --only or --shard",
                      important=False)
        if tree.no_data:
            self.line(f"{plural(tree.no_data, 'name')} left out that stand for no data (trash and "
                      "the like)", important=False)
        if tree.strays:
            self.say(f"{tree.strays[0]}: {plural(len(tree.strays), 'file')} where folders belong: "
                     "not sent")
        for stray in tree.strays:
            self.log(f"where a folder belongs: {stray}")
        for session in tree.sessions:
            if session.label != session.path.rstrip("/").replace("/", "_"):
                self.line(f"{session.path} becomes session {session.label} of subject "
                          f"{session.subject_label}", important=False)
        self.line(important=False)

    # One session

    def session(self, outcome: Outcome) -> None:
        """A session is over: a line, one for each series that needs a person, rows in the report."""
        with self._lock:
            for series in outcome.series:
                self._one_series(outcome, series)
            label, trouble = outcome.session.label, outcome.trouble
            self._sessions[outcome.where] += 1
            self._sessions["earlier"] += outcome.earlier
            text = self._session_text(outcome)
            if trouble:
                self.fail(label, trouble)
            self.line(f"{label:<{self._widths[0]}}  {text}", important=outcome.failed())

    def _session_text(self, outcome: Outcome) -> str:
        end, trouble = ENDS[outcome.where], outcome.trouble
        if trouble:
            return f"{end}: {trouble}" if outcome.where not in str(trouble) else str(trouble)
        if outcome.where in ("archived", "prearchived"):
            files = plural(outcome.files, "file")
            if outcome.earlier:
                return f"already there, {files}" + (f", {end}" if end != "archived" else "")
            return f"{end}, {files} verified"
        if outcome.where == "to send":
            images = [image for each in outcome.series for image in each.missing]
            return (f"{end}: {plural(len(images), 'file')}, "
                    f"{size(sum(image.file.bytes for image in images))}")
        return end

    def _one_series(self, outcome: Outcome, series: Series) -> None:
        label, dry = outcome.session.label, bool(self.settings and self.settings.dry_run)
        name = f"{label} {series.name}"
        for each in series.problems:
            self.fail(name, each)
        if series.damaged:
            self.fail(name, Trouble(
                f"{plural(len(series.damaged), 'file')} damaged ({some(series.damaged)})",
                "copy from the source again, then run again; the others are sent"))
        if series.packed:
            self.fail(name, Trouble(f"{plural(len(series.packed), 'file')} packed "
                                    f"({some(series.packed)})", "unpack it, then run again"))
        for kind in ("damaged", "packed", "copies", "not_dicom"):
            names = getattr(series, kind)
            self._counts[kind] += len(names)
            for each in names:
                self._keep(f"{kind.replace('_dicom', ' DICOM')}: {name}: {each}")
        if series.problems and series.status in ("", "already there", "sent"):
            series.status = "not sent" if series.status != "sent" else "sent"
        elif not series.status:
            series.status = "would send" if dry and not outcome.trouble else "not sent"
        self._series[series.status] += 1
        self._series["wrong"] += bool(series.wants_a_person())
        if dry or self.is_verbose() or series.wants_a_person():
            self.line(f"{label:<{self._widths[0]}}  {printable(series.name):<{self._widths[1]}}  "
                      f"{series.status:<13} {detail(series)}".rstrip(),
                      important=series.wants_a_person())
        self.report(outcome, series)

    def report(self, outcome: Outcome, series: Series) -> None:
        """One row in the report."""
        session = outcome.session
        message = "; ".join(filter(None, [
            *map(str, series.problems), *series.damaged, *(f"{each} is packed" for each in
                                                           series.packed), series.message]))
        if not message and series.status not in ("left out", "no DICOM", "copy"):
            message = str(outcome.trouble or "") or (
                ENDS[outcome.where] if outcome.where not in ("archived", "there") else "")
        row = (session.subject, session.name, series.name, session.label, series.status,
               series.there, len(series.copies), len(series.damaged), len(series.not_dicom),
               series.zipped, f"{series.seconds:.1f}", series.tries, series.http or "",
               outcome.address or series.address, self._page(outcome), message)
        self._write("report", csv_line([cell(each) for each in row]))

    def _page(self, outcome: Outcome) -> str:
        """The address under which a person finds the session."""
        url, address = self.settings.url if self.settings else "", outcome.address
        if not address:
            return ""
        return url + ("/app/template/XDATScreen_prearchives.vm" if "/prearchive/" in address
                      else f"{address}?format=html")

    # After

    def summary(self, upload: Upload, again: bool) -> None:
        """The end: how much is there, each failure again, what a stop left, and what to do."""
        settings, ends = upload.settings, self._sessions
        rest = upload.rest()
        for outcome in rest:
            for each in outcome.series:
                each.status = each.status or "not sent"
                each.message = each.message or ("the run was stopped before its session was whole: "
                                                "run again")
                self.report(outcome, each)
        done = sum(ends[end] for end in ENDS)
        total = done + len(rest)
        there = ends["archived"] + ends["prearchived"]
        self.line(important=False)
        if settings.dry_run:
            self._dry_end(upload)
        else:
            words = [f"{there} of {plural(total, 'session')} archived and verified"]
            if ends["prearchived"]:
                words = [f"{there} of {plural(total, 'session')} verified, {ends['prearchived']} of "
                         "them in the prearchive"]
            if ends["earlier"]:
                words[0] += f" ({ends['earlier']} of them already there)"
            words += [f"{ends[end]} {end}" for end in ("not archived", "held back", "failed",
                                                       "nothing to send") if ends[end]]
            words += [f"{len(rest)} not finished"] if rest else []
            self.line("; ".join(words) + ".")
        self._count_line(upload)
        halves = [outcome.session.label for outcome in rest if outcome.address or any(
            each.address for each in outcome.series)]
        if halves:
            self.line(f"Not whole in the prearchive, do not archive by hand: {', '.join(halves)}")
        self._tell_failures(rest)
        if settings.dry_run:
            self.line(f"Nothing was sent. To send: {settings.command}")
        elif (self.failures or rest) and again:
            self.line(f"Run the same command again to finish: {settings.command}")
        elif not (self.failures or rest):
            self.line("All is there.")
        if ends["prearchived"]:
            self.line("Those in the prearchive wait for review: somebody must archive them there.")
        if self.report_path:
            self.line(f"Report: {self.report_path}")

    def _count_line(self, upload: Upload) -> None:
        counts = [f"{self._series[status]:,} {word}" for status, word in (
            ("sent", "sent"), ("would send", "to send"), ("already there", "already there"),
            ("left out", "left out"), ("copy", "copies of others"), ("no DICOM", "without DICOM"),
            ("not sent", "failed")) if self._series[status]]
        self.line(f"Series: {', '.join(counts) or 'none finished'}.")
        kinds = [f"{self._counts[kind]:,} {word}" for kind, word in (
            ("not_dicom", "not DICOM"), ("copies", "copies"), ("damaged", "damaged"),
            ("packed", "packed")) if self._counts[kind]]
        if kinds:
            self.line(f"Files not sent: {', '.join(kinds)} (named in the log)."
                      if self.report_path else f"Files not sent: {', '.join(kinds)}.")
        seconds = time.monotonic() - self._began
        if self._counts["files"]:
            level = upload.level.used.most_common(1)[0][0] if upload.level.used else 1
            self.line(f"{plural(self._counts['files'], 'file')}, {size(self._counts['bytes'])} in "
                      f"{duration(seconds)} ({size(self._counts['bytes'] / max(seconds, 0.1))}/s), "
                      f"mostly zipped at level {level}.")

    def _dry_end(self, upload: Upload) -> None:
        settings, ends = upload.settings, self._sessions
        words = [f"{ends[end]} {word}" for end, word in (
            ("to send", "would be sent"), ("there", "already there"), ("failed", "failed"),
            ("nothing to send", "nothing to send")) if ends[end]]
        self.line(f"{plural(sum(ends[end] for end in ENDS), 'session')}: {', '.join(words)}.")
        folder = os.path.abspath(settings.workdir)
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        free = shutil.disk_usage(folder).free
        self.line(f"Room for zips in {settings.workdir}: {size(free)} free, up to "
                  f"{size(sum(upload.largest))} needed at once")
        if upload.largest and upload.largest[0] > free:
            self.fail(f"workdir {settings.workdir}", Trouble(
                f"is too full for the largest zip ({size(upload.largest[0])})",
                "make room, or lower --max-files"))

    def _tell_failures(self, rest: List[Outcome]) -> None:
        """Under one heading, those of one kind as one entry: what it is, and below it what to do."""
        kinds: Dict[Tuple[str, str], List[Failure]] = defaultdict(list)
        for failure in self.failures:
            kinds[failure.kind].append(failure)
        if self.failures or rest:
            self.line(f"Not there ({len(self.failures) + len(rest)}):")
        for alike in kinds.values():
            for failure in alike[:3]:
                self.line(f"  {failure.where}: {failure.what}")
            if alike[3:]:
                self.line(f"  and {len(alike) - 3:,} more of this kind: "
                          f"{some([each.where for each in alike[3:]], 5)}")
            self.line(f"      {alike[0].to_do}")
        if rest:
            self.line(f"  {plural(len(rest), 'session')} not reached, the run was stopped: "
                      f"{some([outcome.session.label for outcome in rest], 5)}")


def detail(series: Series) -> str:
    """What a line says of a series beyond its status."""
    words = [str(each) for each in series.problems] or [series.message]
    if series.damaged:
        words.append(f"{len(series.damaged)} damaged: {some(series.damaged)}")
    if series.packed:
        words.append(f"{len(series.packed)} packed: {some(series.packed)}")
    if series.status == "sent":
        words.append(f"{plural(series.sent, 'file'):>11}  {size(series.bytes):>8}  "
                     f"{series.seconds:.1f} s")
    elif series.status == "would send":
        total = sum(image.file.bytes for image in series.missing)
        words.append(f"{plural(len(series.missing), 'file'):>11}  {size(total):>8}")
    if series.copies and series.status != "copy":
        words.append(f"({plural(len(series.copies), 'copy', 'copies')}: {some(series.copies)})")
    if series.not_dicom and series.images:
        words.append(f"({len(series.not_dicom)} not DICOM: {some(series.not_dicom)})")
    return "  ".join(filter(None, words))


def some(names: Sequence[str], most: int = 20) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def put(stream: TextIO, text: str) -> None:
    """Write at once. A reader that has gone away (`| head`, a terminal) stops no upload; one that
    is slow for a moment loses no line."""
    coding = stream.encoding or "ascii"
    raw = text.encode(coding, "backslashreplace")
    try:
        stream.flush()
        handle = stream.fileno()
        while raw:
            try:
                raw = raw[os.write(handle, raw):]
            except BlockingIOError:
                select.select([], [handle], [], 1.0)
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def terminal_width(stream: TextIO) -> int:
    with suppress(OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns or 80
    return 80


def csv_line(row: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text).writerow(row)
    return text.getvalue()


def width_of(text: str) -> int:
    """Columns on a terminal: letters of some scripts are two wide, accents none."""
    return sum(0 if unicodedata.combining(each) else 1 + (unicodedata.east_asian_width(each) in "WF")
               for each in text)


def fitting(text: str, columns: int) -> str:
    """As much of `text` as fits."""
    text = printable(text)
    while width_of(text) > columns:
        text = text[:-1]
    return text


def wrapped(text: str, columns: int) -> List[str]:
    """`text` in lines that fit, broken between words where it can be, with the rest indented."""
    if width_of(text) <= columns:
        return [text]
    lines, indent = [""], " " * (len(text) - len(text.lstrip()) + 4)
    for word in re.findall(r" *[^ ]+", text):
        if lines[-1].strip() and width_of(lines[-1] + word) > columns:
            lines.append(indent + word.strip())
        else:
            lines[-1] += word
    return lines


def coloured(line: str) -> str:
    """A line with its status word in a colour."""
    found = re.search(r"(?<=  )(" + "|".join(map(re.escape, COLOURS)) + r")\b", line)
    if not found:
        return line
    return f"{line[:found.start()]}\033[{COLOURS[found[1]]}m{found[1]}\033[0m{line[found.end():]}"


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


def plural(count: int, noun: str, nouns: str = "") -> str:
    return f"{count:,} " + (noun if count == 1 else nouns or noun + "s")

# ---- options -------------------------------------------------------------------------------


GROUPS = {"url": "what goes where", "config": "what to send", "review": "on the server",
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
    given.shard = read_shard(given.shard)
    given.compression = AUTO if given.compression == "auto" else given.compression
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
        if name == "compression" and text == "auto":
            continue
        if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
            auto = "auto, or " if name == "compression" else ""
            refuse(f"--{name.replace('_', '-')}", f"give {auto}a whole number from {least} to {most}")
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
        refuse_unreadable("ROOTDIR", given.rootdir, error)
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


def refuse_unreadable(thing: str, path: str, error: OSError) -> NoReturn:
    trouble = unreadable("", error)
    refuse(f"{thing} {path}", str(trouble).strip())


def read_shard(text: str) -> Tuple[int, int]:
    """K/N as numbers. Raises Stop(2) unless 1 <= K <= N."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    number, shards = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= shards:
        refuse(f"--shard {text}", "give K/N, such as 2/10: number K, from 1 to N, of N machines")
    return number, shards


def read_config(path: str) -> Tuple[str, ...]:
    """The exclusions in a config file. Raises Stop(2), naming what is wrong in it."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            config = json.load(file, object_pairs_hook=no_key_twice)
    except OSError as error:
        refuse_unreadable("--config", path, error)
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


def run(settings: Settings, teller: Teller) -> int:
    """One run from walk to summary; the exit status. Raises Stop, Trouble, OSError."""
    teller.settings = settings
    readable, settings = settings.password != "-", find_password(settings)
    with ExitStack() as stack:
        workdir: Optional[Workdir] = None  # a dry run needs none
        if not settings.dry_run:
            workdir = stack.enter_context(closing(Workdir(settings.workdir)))
            teller.open_files(settings)
        programs = stack.enter_context(closing(Programs()))
        check_tools(programs, teller)
        tree = walk(settings, teller.log, teller.walking)
        warn(settings, teller, readable, workdir)
        xnat = Xnat(settings, programs, teller)
        try:
            xnat.meet()
            xnat.look_around(tree.sessions)
            ledger = stack.enter_context(closing(Ledger(settings, xnat.project)))
            return send_all(tree, Upload(tree, xnat, workdir, ledger))
        finally:  # a user has a limited number of server sessions
            programs.stopping.clear()
            with suppress(Stop, Trouble):
                xnat.close()


def warn(settings: Settings, teller: Teller, readable: bool, workdir: Optional[Workdir]) -> None:
    """What its user should know before anything is sent."""
    if settings.insecure:
        teller.say(f"{settings.url}: its certificate is not checked (--insecure), whoever answers "
                   "gets login and scans: give its CA with --cacert FILE instead")
    if readable:
        teller.say("PASS: others on this machine can read it in the list of processes: give - and "
                   "set XNAT_PASS, or use ~/.netrc")
    if workdir and workdir.advice:
        teller.say(workdir.advice)


def send_all(tree: Tree, upload: Upload) -> int:
    """Send what is not there yet, tell how it went; the exit status."""
    settings, teller, xnat, ledger = upload.settings, upload.teller, upload.xnat, upload.ledger
    check_exclusions(tree, ledger, settings)
    too_high = "" if settings.nested else looks_too_high(tree, settings)
    if too_high:
        raise Stop(f"ROOTDIR {settings.rootdir}: it looks one level too high (different series in "
                   f"the folders of {too_high}): give the folder that holds the subjects, or add "
                   "--nested if series folders hold several series each. The layout is",
                   WRONG_CALL, LAYOUT)
    teller.begin(tree, xnat)
    if not settings.dry_run:
        ledger.exclude(settings.config)
    for folder, trouble in look_at_strays(tree):
        teller.fail(folder, trouble)
    status, again = ALL_THERE, True
    try:
        upload.go()
        for address in xnat.leftovers(upload.whole) if upload.whole else ():
            teller.say(f"{address}: lies in the prearchive beside its archived session: look at it "
                       "there; if it is a copy it may be deleted, nothing of it is needed")
    except (Stop, OSError) as stop:
        again = not isinstance(stop, Misplaced)
        teller.say(str(stop))
        status = getattr(stop, "status", STOPPED)
    teller.summary(upload, again)
    return status or (SOME_FAILED if teller.failures else ALL_THERE)


def check_exclusions(tree: Tree, ledger: Ledger, settings: Settings) -> None:
    """Raises Stop(2) if series would be sent that earlier runs left out: was --config forgotten?"""
    earlier = replace(settings, config=tuple(sorted(ledger.exclusions)))
    found = [f"{session.path}/{name}" for session, name in tree.pairs()
             if earlier.left_out(name) and not settings.left_out(name)]
    if found:
        names = sorted({earlier.left_out(each.rpartition("/")[2]) for each in found})
        refuse("--config", f"earlier runs left out {', '.join(map(json.dumps, names))}, this one "
               f"would send {plural(len(found), 'such series', 'such series')} ({some(found, 3)}): "
               f"give --config as before, or delete {ledger.path} if it is meant so (the server "
               "is then asked what it has)")


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
        return run(read_options(sys.argv[1:]), teller)
    except (Stop, Trouble) as end:
        teller.say(str(end), getattr(end, "drawing", ""))
        return int(getattr(end, "status", STOPPED))
    except OSError as error:
        teller.say(f"{error.filename or 'the system'}: {error.strerror}: mend it, then run again")
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
