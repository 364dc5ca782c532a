"""Indexes a tar shard: one row per sample, with the offsets of its members.

As in the WebDataset format, members whose names agree up to the first dot form a sample: 0007.jpg, 0007.cls, 0007.json.
They need not be adjacent.
"""

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
    skip_incomplete: bool = False
    dots_in_names: bool = False

    @property
    def index_key(self) -> dict[str, Any]:
        """The part of an index's key that depends on the members read; "beside" is the key's old name of `extra`."""
        newer = {"beside": self.extra, "skip_incomplete": self.skip_incomplete, "dots_in_names": self.dots_in_names}
        key: dict[str, Any] = {name: value for name, value in asdict(self).items() if name not in ("extra", *newer)}
        return key | {name: value for name, value in newer.items() if value}

    @property
    def endings(self) -> set[str]:
        """The extensions of all members that are read."""
        return {*self.image_ext, self.label_from, *self.extra} - {"none"}


class IncompleteSample(ValueError):
    """A sample lacks its image, its label or an annotation."""


class Row(NamedTuple):
    """One sample: its image is the `size` bytes at `offset`."""

    key: bytes
    offset: int
    size: int
    label: int  # 0 without labels
    extra: tuple[int, ...] = ()  # offset and size of each further member


class ShardContent(NamedTuple):
    """The samples of a shard."""

    rows: np.ndarray  # structured array, one row per sample
    n_skipped: int = 0  # incomplete samples left out, with `skip_incomplete`
    first_skipped: str = ""  # why the first of them is incomplete


def scan(file: BinaryIO, name: str, spec: SampleSpec) -> ShardContent:
    """Scans a shard; `name` names it in error messages.

    ValueError unless it is a complete, uncompressed tar with at least one sample, and each sample has exactly one image
    and all wanted members. With `skip_incomplete`, samples without one of them are left out instead.
    """
    rows: list[Row] = []
    n_skipped, first_skipped = 0, ""
    with open_complete_tar(file, name) as tar:
        for key, members in group_members(tar, name, spec).items():
            try:
                rows.append(build_row(tar, f"{name} sample {key}", key, members, spec))
            except IncompleteSample as error:
                if not spec.skip_incomplete:
                    raise ValueError(f"{error}, or pass --skip_incomplete") from error
                n_skipped, first_skipped = n_skipped + 1, first_skipped or str(error)
    if not rows:
        problem = f"has no sample, wanted members such as 0000.{spec.image_ext[0]}"
        if n_skipped:
            problem = f"has no complete sample ({n_skipped} incomplete, such as: {first_skipped})"
        raise ValueError(f"{name} {problem}: write it again, or leave it out")
    return ShardContent(rows_to_array(rows, spec), n_skipped, first_skipped)


def open_complete_tar(file: BinaryIO, name: str) -> tarfile.TarFile:
    """Opens a tar and reads the headers of its members; ValueError unless it is complete and uncompressed."""
    try:
        tar = tarfile.open(fileobj=file, mode="r:")
        tar.getmembers()
        require_end_block(tar)
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the last two: a seek that is out of range
        raise ValueError(f"{name} is not a complete, uncompressed tar ({error}): download or write it again") from error
    return tar


def group_members(tar: tarfile.TarFile, name: str, spec: SampleSpec) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Returns the files of each sample by extension; ValueError for two of the same name."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        key, extension = split_member_name(member.name, spec) or ("", "")
        if key and (member.isfile() or (extension in spec.endings and (member.islnk() or member.issym()))):
            if samples.setdefault(key, {}).setdefault(extension, member) is not member:
                raise ValueError(
                    f"{name} sample {key} has two members .{extension}: write the shard again, or pass --dots_in_names "
                    "if sample names contain dots"
                )
    return samples


def split_member_name(member: str, spec: SampleSpec) -> tuple[str, str] | None:
    """Splits folder/key.Some.ext into (folder/key, some.ext), the extension lowercase; None without a key or dot.

    With `dots_in_names` the extension is the longest of `spec.endings` that fits, or what follows the last dot.
    """
    folder, slash, base = member.rpartition("/")
    key, dot, extension = base.partition(".")
    if not key or not dot:
        return None
    if spec.dots_in_names:
        known = [ending for ending in spec.endings if base.lower().endswith(f".{ending}")]
        extension = max(known, key=len, default=base.rpartition(".")[2])
        key = base[: -len(extension) - 1]
    return f"{folder}{slash}{key}", extension.lower()


def require_end_block(tar: tarfile.TarFile) -> None:
    """Raises ReadError unless the last member is followed by the end-of-archive block, which `tarfile` does not
    check."""
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it is truncated after {tar.offset} bytes")


def build_row(tar: tarfile.TarFile, where: str, key: str, members: dict[str, tarfile.TarInfo], spec: SampleSpec) -> Row:
    """Returns the row of a sample from its members by extension; ValueError unless it has one image and all wanted
    members."""
    names = ", ".join(sorted(members))
    images = [extension for extension in spec.image_ext if extension in members]
    if len(images) != 1:
        raise (ValueError if images else IncompleteSample)(
            f"{where} has {len(images) or 'no'} images (its members: {names}), wanted one of "
            f"{', '.join(spec.image_ext)}: pass the image's extension as --image_ext, or --dots_in_names if sample "
            "names contain dots"
        )
    image = members[images[0]]
    if not is_regular(image):
        raise ValueError(f"{where} is stored as a link or sparse file: write the shard again with regular files")
    row = Row(
        key.encode(errors="surrogateescape"), image.offset_data, image.size, read_label(tar, where, members, spec)
    )
    for ending in spec.extra:
        if ending not in members or not is_regular(members[ending]):
            flag = "--json_fields" if ending == "json" else "--mask_ext or --caption_ext"
            raise IncompleteSample(f"{where} has no regular .{ending} (its members: {names}): leave {flag} out")
    spans = [(members[ending].offset_data, members[ending].size) for ending in spec.extra]
    return row._replace(extra=tuple(number for span in spans for number in span))


def is_regular(member: tarfile.TarInfo) -> bool:
    """Returns whether the content of a member stands in the tar as it is."""
    return member.isfile() and not member.issparse()


def read_label(tar: tarfile.TarFile, where: str, members: dict[str, tarfile.TarInfo], spec: SampleSpec) -> int:
    """Returns the class id of a sample, 0 without labels; ValueError if it is missing or malformed."""
    if spec.label_from == "none":
        return 0
    if spec.label_from not in members or not is_regular(members[spec.label_from]):
        names = ", ".join(members)
        raise IncompleteSample(
            f"{where} has no regular .{spec.label_from} (its members: {names}): use --label_from none"
        )
    content = tar.extractfile(members[spec.label_from]).read()
    try:
        label: Any = int(content) if spec.label_from == "cls" else json.loads(content)
        if spec.label_from == "json":
            label = label[spec.label_field] if isinstance(label, dict) else None
    except (ValueError, KeyError, RecursionError):
        label = None
    if type(label) is not int or not 0 <= label < 2**31:
        field = f" field {spec.label_field!r}" if spec.label_from == "json" else ""
        raise ValueError(f"{where}: its .{spec.label_from}{field} is {content[:60]!r}, wanted a class id: 0, 1, 2, ...")
    return label


def rows_to_array(rows: list[Row], spec: SampleSpec) -> np.ndarray:
    """Returns rows as a structured array, with offset and size of further members."""
    width = max(len(row.key) for row in rows)
    numbers = ["offset", "size", "label", *(f"{each}_{what}" for each in spec.extra for what in ("offset", "size"))]
    dtype = [("key", f"S{width}"), *((number, np.int64) for number in numbers)]
    return np.array([(*row[:4], *row.extra) for row in rows], dtype=dtype)
