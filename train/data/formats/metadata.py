"""Metadata in the names of files: by a pattern, and `info__camera__time[__weather__light__location].jpg`.

The latter are names of GeoDiffusion's nuImages. The file on disk has only the first three parts: the others were added
to the name in the annotations.
"""

import posixpath
import re
from typing import NamedTuple

UNKNOWN = "unknown"  # the weather, light and location of a name of three parts; to networks, the null
SEPARATOR = "__"
FIELD = re.compile(r"{(\w+)(:[df])?}")  # of a pattern
RESERVED = ("image", "label", "caption", "captions")  # fields of items that have other sources
EXPRESSIONS = {"": r".+?", ":d": r"[+-]?\d+", ":f": r"[+-]?\d+(?:\.\d+)?"}


class Metadata(NamedTuple):
    """What a file's name says of its image; weather, light and location in lower case."""

    info: str  # of the recording
    camera: str  # such as CAM_FRONT_LEFT
    time: str  # a time stamp
    weather: str = UNKNOWN
    light: str = UNKNOWN  # such as daytime or night
    location: str = UNKNOWN


def decode_name(file_name: str) -> Metadata:
    """Reads the metadata in the stem of a file's name; ValueError unless it has three or six parts."""
    parts = split_name(file_name)
    return Metadata(*parts[:3], *(part.lower() for part in parts[3:]))


def encode_name(metadata: Metadata, folder: str = "", suffix: str = ".jpg") -> str:
    """Returns the file name of metadata, of six parts unless weather, light and location are all unknown."""
    parts = metadata[:3] if set(metadata[3:]) == {UNKNOWN} else metadata
    return posixpath.join(folder, SEPARATOR.join(parts) + suffix)


def name_on_disk(file_name: str) -> str:
    """Returns the name of the file that has the pixels: its first three parts, in the same folder."""
    folder, name = posixpath.split(file_name)
    return posixpath.join(folder, SEPARATOR.join(split_name(file_name)[:3]) + split_suffix(name)[1])


def split_name(file_name: str) -> list[str]:
    """Splits the stem of a file's name, whatever its folder, into its three or six parts."""
    stem = split_suffix(posixpath.basename(file_name))[0]
    parts = stem.split(SEPARATOR)
    if len(parts) not in (3, 6) or not all(parts):
        raise ValueError(
            f"the name {file_name} has {len(parts)} parts, wanted info__camera__time or "
            "info__camera__time__weather__light__location: rename the file"
        )
    return parts


def split_suffix(name: str) -> tuple[str, str]:
    """Splits a name into stem and suffix; only letters make a suffix, for a time stamp may have a dot (1.5e9)."""
    stem, suffix = posixpath.splitext(name)
    return (stem, suffix) if suffix[1:].isalpha() else (name, "")


class NamePattern:
    """Reads fields from the stems of file names by a pattern such as "{disaster}_{number:d}_{gsd:f}".

    A field is a word, or with :d or :f a number, which is returned as a float; what stands between them is literal.
    ValueError for a pattern without fields, and one whose fields occur twice or are RESERVED.
    """

    def __init__(self, pattern: str):
        literals_and_fields = FIELD.split(pattern)
        literals, self.names = literals_and_fields[::3], literals_and_fields[1::3]
        self.kinds = [kind or "" for kind in literals_and_fields[2::3]]
        if not self.names or len({*self.names}) < len(self.names) or any({*"{}"} & {*each} for each in literals):
            wanted = "wanted names in braces, each once, such as {place}_{year:d}"
            raise ValueError(f"got name_pattern {pattern!r}, {wanted}: change --name_pattern")
        if taken := [name for name in self.names if name in RESERVED]:
            raise ValueError(f"got name_pattern {pattern!r}, whose {taken[0]} has another source: rename it")
        groups = [f"({EXPRESSIONS[kind]})" for kind in self.kinds]
        parts = [*map(re.escape, literals)]
        self.pattern = pattern
        self.expression = re.compile("".join(part + group for part, group in zip(parts, [*groups, ""], strict=True)))

    def decode(self, file_name: str) -> dict[str, str | float]:
        """Returns the fields of a name, whatever its folder; ValueError if it does not have the form of the pattern."""
        stem = posixpath.splitext(posixpath.basename(file_name))[0]
        match = self.expression.fullmatch(stem)
        if match is None:
            raise ValueError(
                f"the name {file_name} does not have the form {self.pattern}: rename it, or change --name_pattern"
            )
        fields = zip(self.names, self.kinds, match.groups(), strict=True)
        return {name: float(text) if kind else text for name, kind, text in fields}
