"""Codes that were encoded before, in batches: the grid at a position depends on (seed, position) alone."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from train.data.captions import choose_captions
from train.data.collate import collate
from train.data.loading import merge_fields
from train.data.shuffle import training_order
from train.loop import Batch


class CodeGrids(Protocol):
    """Codes (V, n, h, w): a tensor, or a file indexed like one; `ids[views, rows]` returns a tensor in memory."""

    shape: Sequence[int]

    def __getitem__(self, key: Any) -> Tensor: ...


class Annotations(Protocol):
    """Fields of images other than pixels and label: `annotations[view, row]`, transformed like the image's view."""

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]: ...


class TrainingCodes:
    """Shuffled code grids of all views: ids (V, n, h, w), a tensor or a memory-mapped file; labels (n,) or None.

    Batches have the annotations of each grid in its view, if there are any. `balance` draws rare classes more often;
    for `first_caption` see `TrainingImages`.
    """

    def __init__(
        self,
        ids: CodeGrids,
        labels: Tensor | None,
        seed: int,
        annotations: Annotations | None = None,
        balance: float = 0.0,
        first_caption: bool = False,
        index: Tensor | None = None,  # (n,) index of each grid in the data set; None: in order
    ):
        self.ids, self.labels, self.annotations, self.index = ids, labels, annotations, index
        self.caption_seed = None if first_caption else seed
        of_views = None if labels is None or not balance else labels.repeat(ids.shape[0])
        self.order = training_order(ids.shape[0] * ids.shape[1], seed, labels=of_views, balance=balance)

    def __len__(self) -> int:
        return self.order.n

    def item_index(self, position: int) -> int:
        """Returns the index in the data set of the image whose codes are at a position."""
        row = self.order[position] % self.ids.shape[1]
        return row if self.index is None else int(self.index[row])

    def view_index(self, position: int) -> int:
        return self.order[position] // self.ids.shape[1]

    def __getitem__(self, positions: list[int]) -> Batch:
        indices = torch.tensor([self.order[k] for k in positions])
        view, row = indices // self.ids.shape[1], indices % self.ids.shape[1]
        batch: Batch = {"codes": self.ids[view, row].long(), "position": torch.tensor(positions)}
        if self.labels is not None:
            batch["label"] = self.labels[row]
        if self.annotations is None:
            return batch
        items = [self.annotations[key] for key in zip(view.tolist(), row.tolist(), strict=True)]
        return merge_fields(collate(choose_captions(items, self.caption_seed, positions)), batch)
