"""The tests' own DICOM: small, valid, entirely synthetic MR files, and trees of them.

Nothing here comes from a person: names say SYNTHETIC, UIDs are hashes of the words that made them,
and the same words always give the same bytes.
"""
import hashlib
import struct
import zlib
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

MR_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.4"
MEDIA_STORAGE_DIRECTORY = "1.2.840.10008.1.3.10"
EXPLICIT_LE = "1.2.840.10008.1.2.1"
IMPLICIT_LE = "1.2.840.10008.1.2"
EXPLICIT_BE = "1.2.840.10008.1.2.2"
DEFLATED_LE = "1.2.840.10008.1.2.1.99"
IMPLEMENTATION = "2.25.48059204130172830495826130571203"  # ours, any constant will do

# The tree of the README: each series folder, and its series number.
README_TREE: Dict[str, int] = {
    "007/post/AAHEAD_SCOUT_MPR_SAG_0002": 2,
    "007/post/JJWANGS_PCASL_0006": 6,
    "007/post/T1-MPRAGE_0011": 11,
    "007/pre/T1-MPRAGE_ND_0010": 10,
    "007/pre/T2_FLAIR_0012": 12,
    "008/post/AAHEAD_SCOUT_MPR_SAG_0002": 2,
    "008/post/JJWANGS_PCASL_0006": 6,
    "008/post/T1-MPRAGE_0011": 11,
    "008/pre/T1-MPRAGE_ND_0010": 10,
    "008/pre/T2_FLAIR_0012": 12,
}

Value = Union[str, int, float, bytes]
Element = Tuple[int, str, Value]  # tag as 0xGGGGEEEE, value representation, value
SIX_BITS = bytes(byte & 0x3F for byte in range(256))
LONG_FORM = ("OB", "OW", "SQ", "UN", "UT")  # these have a 32-bit length in explicit files


def uid(*words: object) -> str:
    """A valid UID that is always the same for the same words."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode()).digest()
    return "2.25.%d" % int.from_bytes(digest[:16], "big")


def _value_bytes(vr: str, value: Value, order: str) -> bytes:
    """The value as it lies in a file, padded to an even length."""
    if isinstance(value, bytes):
        raw = value
    elif vr == "US":
        raw = struct.pack(order + "H", value)
    elif vr == "UL":
        raw = struct.pack(order + "I", value)
    else:
        raw = str(value).encode("utf-8")
    return raw + (b"\0" if vr in ("UI", "OB", "OW") else b" ") * (len(raw) % 2)


def element(tag: int, vr: str, value: Value, explicit: bool = True, order: str = "<") -> bytes:
    """One data element, little-endian with the order "<" and big-endian with ">"."""
    raw = _value_bytes(vr, value, order)
    head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
    if not explicit:
        return head + struct.pack(order + "I", len(raw)) + raw
    if vr in LONG_FORM:
        return head + vr.encode() + struct.pack(order + "HI", 0, len(raw)) + raw
    return head + vr.encode() + struct.pack(order + "H", len(raw)) + raw


def _data_set(elements: List[Element], explicit: bool, order: str = "<") -> bytes:
    """The elements in ascending order of their tags."""
    return b"".join(element(*each, explicit=explicit, order=order) for each in sorted(elements))


def _meta(sop_class: str, sop_instance: str, transfer_syntax: str) -> bytes:
    """Preamble, DICM and the group 0002, with its length."""
    group = _data_set([
        (0x00020001, "OB", b"\0\1"),
        (0x00020002, "UI", sop_class),
        (0x00020003, "UI", sop_instance),
        (0x00020010, "UI", transfer_syntax),
        (0x00020012, "UI", IMPLEMENTATION),
        (0x00020013, "SH", "SYNTHETIC"),
    ], explicit=True)
    return b"\0" * 128 + b"DICM" + element(0x00020000, "UL", len(group)) + group


def _pixels(seed: str, rows: int, columns: int) -> bytes:
    """12-bit pixels in 16: a smooth high byte and a noisy low one, so they deflate as MR does."""
    count = rows * columns
    pixels = bytearray(2 * count)
    pixels[0::2] = hashlib.shake_256(seed.encode()).digest(count).translate(SIX_BITS)
    pixels[1::2] = b"".join(bytes([1 + 14 * row // rows]) * columns for row in range(rows))
    return bytes(pixels)


def dicom_file(*, study: str, series: str, number: int = 1, instance: int = 1,
               description: str = "", patient: str = "", sop_class: str = MR_IMAGE_STORAGE,
               sop_instance: Optional[str] = None, rows: int = 16, columns: int = 16,
               preamble: bool = True, explicit: bool = True,
               pixels: Optional[bytes] = None, first: bytes = b"", without: Tuple[int, ...] = (),
               order: str = "<", syntax: str = "") -> bytes:
    """One MR image as a DICOM file; without `preamble` a bare data set, as in old exports.

    The data set begins with the elements `first`, and has none of the tags in `without`. With a
    transfer syntax that is not what it comes to by itself, the file lies, or is deflated.
    """
    sop_instance = sop_instance or uid(series, instance)
    if pixels is None:
        pixels = _pixels(sop_instance, rows, columns)
    elements: List[Element] = [
        (0x00080005, "CS", "ISO_IR 192"),
        (0x00080008, "CS", "ORIGINAL\\PRIMARY\\M"),
        (0x00080016, "UI", sop_class),
        (0x00080018, "UI", sop_instance),
        (0x00080020, "DA", "20200102"),
        (0x00080021, "DA", "20200102"),
        (0x00080030, "TM", "101500"),
        (0x00080031, "TM", "101500"),
        (0x00080050, "SH", ""),
        (0x00080060, "CS", "MR"),
        (0x00080070, "LO", "SYNTHETIC"),
        (0x00080090, "PN", ""),
        (0x00081030, "LO", "SYNTHETIC STUDY"),
        (0x0008103E, "LO", description),
        (0x00100010, "PN", "SYNTHETIC^" + patient if patient else "SYNTHETIC"),
        (0x00100020, "LO", patient),
        (0x00100030, "DA", ""),
        (0x00100040, "CS", "O"),
        (0x00180020, "CS", "GR"),
        (0x00180021, "CS", "NONE"),
        (0x00180022, "CS", ""),
        (0x00180023, "CS", "2D"),
        (0x00180050, "DS", "1"),
        (0x00180080, "DS", "2000"),
        (0x00180081, "DS", "30"),
        (0x00180091, "IS", "1"),
        (0x00185100, "CS", "HFS"),
        (0x0020000D, "UI", study),
        (0x0020000E, "UI", series),
        (0x00200010, "SH", "1"),
        (0x00200011, "IS", number),
        (0x00200013, "IS", instance),
        (0x00200032, "DS", "0\\0\\%d" % instance),
        (0x00200037, "DS", "1\\0\\0\\0\\1\\0"),
        (0x00200052, "UI", uid(study, "frame of reference")),
        (0x00201040, "LO", ""),
        (0x00280002, "US", 1),
        (0x00280004, "CS", "MONOCHROME2"),
        (0x00280010, "US", rows),
        (0x00280011, "US", columns),
        (0x00280030, "DS", "1\\1"),
        (0x00280100, "US", 16),
        (0x00280101, "US", 12),
        (0x00280102, "US", 11),
        (0x00280103, "US", 0),
        (0x7FE00010, "OW", pixels),
    ]
    elements = [each for each in elements if each[0] not in without]
    data_set = first + _data_set(elements, explicit, order)
    if not preamble:
        return data_set
    syntax = syntax or (IMPLICIT_LE if not explicit else EXPLICIT_LE if order == "<" else
                        EXPLICIT_BE)
    if syntax == DEFLATED_LE:
        deflater = zlib.compressobj(wbits=-15)
        data_set = deflater.compress(data_set) + deflater.flush()
    return _meta(sop_class, sop_instance, syntax) + data_set


def dicomdir_file() -> bytes:
    """A DICOMDIR: DICOM all right, but its data set has no SOP class."""
    return _meta(MEDIA_STORAGE_DIRECTORY, uid("dicomdir"), EXPLICIT_LE) + _data_set([
        (0x00041130, "CS", "SYNTHETIC"),
        (0x00041200, "UL", 0),
        (0x00041202, "UL", 0),
        (0x00041212, "US", 0),
        (0x00041220, "SQ", b""),
    ], explicit=True)


def write_series(folder: Path, *, study: str, number: int = 1, files: int = 3,
                 name: str = "IM{:04d}.dcm", description: Optional[str] = None,
                 series: Optional[str] = None, **more: Any) -> None:
    """Make the folder with `files` images in it; `more` goes to dicom_file."""
    folder.mkdir(parents=True, exist_ok=True)
    series = series or uid(study, number)
    description = folder.name if description is None else description
    for instance in range(1, files + 1):
        (folder / name.format(instance)).write_bytes(dicom_file(
            study=study, series=series, number=number, instance=instance,
            description=description, **more))


def readme_tree(root: Path, files: int = 4, **more: Any) -> None:
    """Make the README's tree under `root`: one study for each session."""
    for path, number in README_TREE.items():
        subject, session, _ = path.split("/")
        write_series(root / path, study=uid(subject, session), number=number, files=files,
                     patient=subject, **more)


def digests(root: Path) -> Dict[str, str]:
    """The sha256 of every file under `root`, by its path."""
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*")) if path.is_file()}
