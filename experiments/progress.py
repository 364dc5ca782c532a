"""A progress bar that counts images."""

from collections.abc import Iterable, Iterator

from torch import Tensor
from tqdm import tqdm


def progress(
    batches: Iterable[dict[str, Tensor]], total: int, name: str, shown: bool = True
) -> Iterator[dict[str, Tensor]]:
    """Batches as they are, while a bar counts their images with rate and time left."""
    with tqdm(total=total, desc=name, unit="img", dynamic_ncols=True, mininterval=1.0, disable=not shown) as bar:
        for batch in batches:
            yield batch
            bar.update(len(next(iter(batch.values()))))  # each of its tensors has the images first
