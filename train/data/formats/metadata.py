"""Metadata in the names of files, `info__camera__time[__weather__light__location].jpg` (GeoDiffusion's nuImages).

The file on disk has only the first three parts: the others were added to the name in the annotations.
"""

import posixpath
from typing import NamedTuple

UNKNOWN = "unknown"  # the weather, light and location of a name of three parts; to networks, the null
SEPARATOR = "__"


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
