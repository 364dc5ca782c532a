"""What a tar shard holds, and where: one row per sample. Members that share a name up to its first dot, one behind the
other, are one sample, as in the WebDataset format: 0007.jpg, 0007.cls, 0007.json."""

import itertools
import json
import tarfile
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np

VERSION = 1  # of the rows: a change makes older indexes unfit


@dataclass(frozen=True)
class SampleSpec:
    """Which members make a sample."""

    image_ext: tuple[str, ...]
    label_from: str  # none, cls, json
    label_field: str
    extra: tuple[str, ...] = ()  # endings of members that each has to be read with its image

    @property
    def index_key(self) -> dict[str, Any]:
        """What an index is known by; that of plain images is as it was before there were annotations."""
        return {name: value for name, value in asdict(self).items() if name != "beside" or value}


class Row(NamedTuple):
    """One sample: its image is the `size` bytes from `offset` on."""

    key: bytes
    offset: int
    size: int
    label: int  # 0 where no labels are asked for
    extra: tuple[int, ...] = ()  # offset and size of each other member that is asked for


def scan(file: BinaryIO, name: str, spec: SampleSpec) -> np.ndarray:
    """The rows of a shard as a structured array; `name` stands for it in messages.

    ValueError for what is no whole, uncompressed tar, for one without a sample, and for a sample that is not one: twice
    there, without its image or label, or with several images.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = [member for member in tar if member.isfile() and split_member_name(member.name) is not None]
            require_end_block(tar)
            groups = itertools.groupby(members, lambda member: split_member_name(member.name)[0])
            rows = [build_row(tar, f"{name} sample {key}", key, list(group), spec) for key, group in groups]
    except tarfile.TarError as error:
        raise ValueError(
            f"{name} is no whole tar ({error}): wanted one that is not compressed, get or write it again"
        ) from error
    if not rows:
        raise ValueError(f"{name} holds no sample: wanted members such as 0000.{spec.image_ext[0]}; or leave it out")
    return rows_to_array(rows, name, spec)


def split_member_name(member: str) -> tuple[str, str] | None:
    """folder/key.some.ext -> (folder/key, some.ext in lower case); None for hidden files and names without a dot."""
    folder, slash, base = member.rpartition("/")
    key, dot, extension = base.partition(".")
    return (f"{folder}{slash}{key}", extension.lower()) if key and dot else None


def require_end_block(tar: tarfile.TarFile) -> None:
    """ReadError unless the last member is followed by the empty block that ends a tar: `tarfile` takes any end."""
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"its end is missing after {tar.offset} bytes")


def build_row(tar: tarfile.TarFile, where: str, key: str, group: list[tarfile.TarInfo], spec: SampleSpec) -> Row:
    members = {split_member_name(member.name)[1]: member for member in group}
    has = ", ".join(sorted(members))
    if len(members) < len(group):
        raise ValueError(f"{where} has two members of one name ({has}): write the shard again")
    images = [extension for extension in spec.image_ext if extension in members]
    if len(images) != 1:
        raise ValueError(
            f"{where} has {len(images) or 'no'} images (its members: {has}), wanted one of "
            f"{', '.join(spec.image_ext)}: name the image's ending with --image_ext, or write the shard again"
        )
    image = members[images[0]]
    if image.issparse():
        raise ValueError(f"{where} is stored as a sparse file: write the shard again with plain ones")
    row = Row(
        key.encode(errors="surrogateescape"), image.offset_data, image.size, read_label(tar, where, members, spec)
    )
    for ending in spec.extra:
        if ending not in members or members[ending].issparse():
            flag = "--json_fields" if ending == "json" else "--mask_ext"
            raise ValueError(f"{where} has no plain .{ending} (its members: {has}): leave {flag} out, or mend it")
    places = [(members[ending].offset_data, members[ending].size) for ending in spec.extra]
    return row._replace(extra=tuple(number for place in places for number in place))


def read_label(tar: tarfile.TarFile, where: str, members: dict[str, tarfile.TarInfo], spec: SampleSpec) -> int:
    if spec.label_from == "none":
        return 0
    if spec.label_from not in members:
        raise ValueError(f"{where} has no .{spec.label_from} (its members: {', '.join(members)}): --label_from none?")
    content = tar.extractfile(members[spec.label_from]).read()
    try:
        found: Any = int(content) if spec.label_from == "cls" else json.loads(content)
        if spec.label_from == "json":
            found = found[spec.label_field] if isinstance(found, dict) else None
    except (ValueError, KeyError):
        found = None
    if type(found) is not int or not 0 <= found < 2**31:
        field = f" field {spec.label_field!r}" if spec.label_from == "json" else ""
        raise ValueError(f"{where}: its .{spec.label_from}{field} is {content[:60]!r}, wanted a class: 0, 1, 2, ...")
    return found


def rows_to_array(rows: list[Row], name: str, spec: SampleSpec) -> np.ndarray:
    """Rows as one array, with the places of other members that are wanted; ValueError for a key that comes twice."""
    width = max(len(row.key) for row in rows)
    numbers = ["offset", "size", "label", *(f"{each}_{what}" for each in spec.extra for what in ("offset", "size"))]
    kinds = [("key", f"S{width}"), *((each, np.int64) for each in numbers)]
    made = np.array([(*row[:4], *row.extra) for row in rows], dtype=kinds)
    keys, counts = np.unique(made["key"], return_counts=True)
    if len(keys) < len(rows):
        twice = keys[counts > 1][0].decode(errors="replace")
        raise ValueError(f"{name} holds sample {twice} twice, with others between: write the shard again")
    return made
