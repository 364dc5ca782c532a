"""Indexes a tar shard: one row per sample, with the offsets of its members.

As in the WebDataset format, consecutive members whose names agree up to the first dot form a sample: 0007.jpg,
0007.cls, 0007.json.
"""

import itertools
import json
import tarfile
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np

VERSION = 1  # of the rows; raise it when they change


@dataclass(frozen=True)
class SampleSpec:
    """The members that make up a sample."""

    image_ext: tuple[str, ...]
    label_from: str  # none, cls, json
    label_field: str
    extra: tuple[str, ...] = ()  # extensions of further members to read with the image

    @property
    def index_key(self) -> dict[str, Any]:
        """The part of an index's key that depends on the members read; "beside" is the key's old name of `extra`."""
        key: dict[str, Any] = {name: value for name, value in asdict(self).items() if name != "extra"}
        return key | ({"beside": self.extra} if self.extra else {})


class Row(NamedTuple):
    """One sample: its image is the `size` bytes at `offset`."""

    key: bytes
    offset: int
    size: int
    label: int  # 0 without labels
    extra: tuple[int, ...] = ()  # offset and size of each further member


def scan(file: BinaryIO, name: str, spec: SampleSpec) -> np.ndarray:
    """Scans a shard and returns its rows as a structured array; `name` names it in error messages.

    ValueError unless it is a complete, uncompressed tar with at least one sample, and each sample occurs once, with
    exactly one image and, if wanted, a label.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = [member for member in tar if member.isfile() and split_member_name(member.name) is not None]
            require_end_block(tar)
            groups = itertools.groupby(members, lambda member: split_member_name(member.name)[0])
            rows = [build_row(tar, f"{name} sample {key}", key, list(group), spec) for key, group in groups]
    except tarfile.TarError as error:
        raise ValueError(f"{name} is not a complete, uncompressed tar ({error}): download or write it again") from error
    if not rows:
        raise ValueError(f"{name} has no sample, wanted members such as 0000.{spec.image_ext[0]}: or leave it out")
    return rows_to_array(rows, name, spec)


def split_member_name(member: str) -> tuple[str, str] | None:
    """Splits folder/key.Some.ext into (folder/key, some.ext), the extension lowercase; None without a key or dot."""
    folder, slash, base = member.rpartition("/")
    key, dot, extension = base.partition(".")
    return (f"{folder}{slash}{key}", extension.lower()) if key and dot else None


def require_end_block(tar: tarfile.TarFile) -> None:
    """Raises ReadError unless the last member is followed by the end-of-archive block, which `tarfile` does not
    check."""
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it is truncated after {tar.offset} bytes")


def build_row(tar: tarfile.TarFile, where: str, key: str, group: list[tarfile.TarInfo], spec: SampleSpec) -> Row:
    """Returns the row of a sample from its members; ValueError unless it has one image and all wanted members."""
    members = {split_member_name(member.name)[1]: member for member in group}
    names = ", ".join(sorted(members))
    if len(members) < len(group):
        raise ValueError(f"{where} has two members with the same name ({names}): write the shard again")
    images = [extension for extension in spec.image_ext if extension in members]
    if len(images) != 1:
        raise ValueError(
            f"{where} has {len(images) or 'no'} images (its members: {names}), wanted one of "
            f"{', '.join(spec.image_ext)}: pass the image's extension as --image_ext, or write the shard again"
        )
    image = members[images[0]]
    if image.issparse():
        raise ValueError(f"{where} is stored as a sparse file: write the shard again with regular files")
    row = Row(
        key.encode(errors="surrogateescape"), image.offset_data, image.size, read_label(tar, where, members, spec)
    )
    for ending in spec.extra:
        if ending not in members or members[ending].issparse():
            flag = "--json_fields" if ending == "json" else "--mask_ext"
            raise ValueError(f"{where} has no regular .{ending} (its members: {names}): leave {flag} out, or repair it")
    spans = [(members[ending].offset_data, members[ending].size) for ending in spec.extra]
    return row._replace(extra=tuple(number for span in spans for number in span))


def read_label(tar: tarfile.TarFile, where: str, members: dict[str, tarfile.TarInfo], spec: SampleSpec) -> int:
    """Returns the class id of a sample, 0 without labels; ValueError if it is missing or malformed."""
    if spec.label_from == "none":
        return 0
    if spec.label_from not in members:
        names = ", ".join(members)
        raise ValueError(
            f"{where} has no .{spec.label_from} (its members: {names}): write it, or use --label_from none"
        )
    content = tar.extractfile(members[spec.label_from]).read()
    try:
        label: Any = int(content) if spec.label_from == "cls" else json.loads(content)
        if spec.label_from == "json":
            label = label[spec.label_field] if isinstance(label, dict) else None
    except (ValueError, KeyError):
        label = None
    if type(label) is not int or not 0 <= label < 2**31:
        field = f" field {spec.label_field!r}" if spec.label_from == "json" else ""
        raise ValueError(f"{where}: its .{spec.label_from}{field} is {content[:60]!r}, wanted a class id: 0, 1, 2, ...")
    return label


def rows_to_array(rows: list[Row], name: str, spec: SampleSpec) -> np.ndarray:
    """Returns rows as a structured array, with offset and size of further members; ValueError for a duplicate key."""
    width = max(len(row.key) for row in rows)
    numbers = ["offset", "size", "label", *(f"{each}_{what}" for each in spec.extra for what in ("offset", "size"))]
    dtype = [("key", f"S{width}"), *((number, np.int64) for number in numbers)]
    array = np.array([(*row[:4], *row.extra) for row in rows], dtype=dtype)
    keys, counts = np.unique(array["key"], return_counts=True)
    if len(keys) < len(rows):
        duplicate = keys[counts > 1][0].decode(errors="replace")
        raise ValueError(f"{name} has sample {duplicate} twice, not consecutively: write the shard again")
    return array
