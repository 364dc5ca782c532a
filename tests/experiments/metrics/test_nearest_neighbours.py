"""The search for nearest training images: each image once, in its nearest view, for any chunk size."""

import pytest
import torch
from torchvision import tv_tensors

from experiments.calc_nearest_neighbours import evenly_spaced, summarize_distances
from experiments.harness.batches import ResumableBatches
from experiments.metrics import nearest_neighbours
from experiments.metrics.features import Features
from experiments.metrics.image_pairs import ImageDistance
from experiments.metrics.nearest_neighbours import (
    Candidates,
    find_candidates,
    merge_candidates,
    rank_candidates,
    rerank_candidates,
    training_view,
)
from train.config import DataConfig
from train.data.loading import ImageSource
from train.data.transforms import to_float, to_uint8, training_views
from train.datasets import ArrayDataset, UnreadableImage
from train.distributed import DistContext

ALONE = DistContext(torch.device("cpu"))
FEATURES = Features("raw", None, lambda images: images[:, 0].flatten(1).float())


def make_candidates(*rows):
    """Candidates of one query from (distance, image, view)."""
    distances, images, views = (torch.tensor([each]) for each in zip(*rows, strict=True))
    return Candidates(distances.double(), images, views)


def test_each_image_appears_once_in_its_nearest_view():
    one, two = make_candidates((3.0, 7, 0), (4.0, 5, 0)), make_candidates((1.0, 5, 1), (9.0, 7, 1))
    merged = merge_candidates([one, two], 2)
    assert (merged.images.tolist(), merged.views.tolist(), merged.distances.tolist()) == ([[5, 7]], [[1, 0]], [[1, 3]])
    assert merge_candidates([one, two], 1).images.tolist() == [[5]]
    assert merge_candidates([one, two], 9).images.tolist() == [[5, 7]]  # all of them
    assert merge_candidates([merge_candidates([one], 1), make_candidates((3.5, 8, 0))], 5).images.tolist() == [[7, 8]]


class Images(ArrayDataset):
    """Random images, some of them unreadable."""

    broken = ()

    def __getitem__(self, index):
        if index in self.broken:
            raise UnreadableImage(f"image {index}")
        return super().__getitem__(index)


def source_of(count, broken=(), **data):
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 4, 4), generator=rng, dtype=torch.uint8).numpy()
    images = Images(pixels, torch.zeros(count).long().numpy(), 1)
    object.__setattr__(images, "broken", broken)
    config = DataConfig(img_size=4, n_channels=1, **data)
    return ImageSource(images, config, margin=config.crop_margin)


def brute_force(queries, source, count):
    """Distances, images and views of the nearest images by brute force."""
    nearest = []
    for query in queries:
        rows = []
        for image in set(range(len(source))) - set(source.dataset.broken):
            views = [view(source[image]["image"].as_subclass(torch.Tensor)) for view in training_views(source.config)]
            distances = [(query.double() - view[0].flatten().double()).norm().item() for view in views]
            rows.append((min(distances), image, distances.index(min(distances))))
        nearest.append(sorted(rows)[:count])
    return nearest


@pytest.mark.parametrize("data", [{}, {"horizontal_flip": True}, {"shift": 1}, {"crop_margin": 2}])
@pytest.mark.parametrize("count", [1, 4, 100])
def test_matches_a_brute_force_search_in_all_views(tmp_path, monkeypatch, data, count):
    monkeypatch.setattr(nearest_neighbours, "CHUNK", 5)
    source = source_of(13, **data)
    queries = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(1)).float()
    candidates = find_candidates(queries, source, FEATURES, count, ResumableBatches(ALONE, tmp_path, 3), "c")
    expected = brute_force(queries, source, count)
    assert candidates.images.tolist() == [[image for _, image, _ in rows] for rows in expected]
    assert candidates.views.tolist() == [[view for _, _, view in rows] for rows in expected]
    assert candidates.distances.flatten().tolist() == pytest.approx([d for rows in expected for d, _, _ in rows])
    assert candidates.images.shape == (3, min(count, 13))


@pytest.mark.filterwarnings("ignore:skipped")
def test_unreadable_images_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(nearest_neighbours, "CHUNK", 3)
    source = source_of(10, broken=(1, 3, 4, 5))  # including a whole chunk
    queries = torch.zeros(2, 16)
    candidates = find_candidates(queries, source, FEATURES, 100, ResumableBatches(ALONE, tmp_path, 2), "c")
    assert candidates.images.tolist() == [[image for _, image, _ in rows] for rows in brute_force(queries, source, 100)]
    assert sorted(candidates.images[0].tolist()) == [0, 2, 6, 7, 8, 9]


def test_an_interrupted_search_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(nearest_neighbours, "CHUNK", 4)
    source, calls = source_of(12), []

    def failing(images):
        calls.append(len(images))
        if len(calls) == 2:
            raise RuntimeError("cut off")
        return FEATURES.extract(images)

    queries, batches = torch.zeros(2, 16), ResumableBatches(ALONE, tmp_path, 9)
    with pytest.raises(RuntimeError, match="cut off"):
        find_candidates(queries, source, FEATURES._replace(extract=failing), 3, batches, "c")
    candidates = find_candidates(queries, source, FEATURES._replace(extract=failing), 3, batches, "c")
    assert calls == [4, 4, 4, 4]  # the first chunk is not searched again
    assert torch.equal(candidates.images, find_candidates(queries, source, FEATURES, 3, batches, "other").images)


def test_candidates_are_reranked():
    query = torch.zeros(1, 2, 2, dtype=torch.uint8)
    candidate_images = torch.tensor([4, 0, 9])[:, None, None, None].expand(-1, 1, 2, 2).byte()
    candidates = make_candidates((1.0, 11, 0), (2.0, 12, 1), (3.0, 13, 0))
    by_mean = ImageDistance("mean", lambda image, others: others.double().mean((1, 2, 3)))
    ranking = rank_candidates(query, candidate_images, candidates, by_mean, 2)
    assert ranking.images.tolist() == [[12, 11]] and ranking.views.tolist() == [[1, 0]]
    assert ranking.distances.tolist() == [[0, 4]] and ranking.feature_distances.tolist() == [[2, 1]]
    assert ranking.equal.tolist() == [True]
    assert rank_candidates(query + 1, candidate_images, candidates, by_mean, 2).equal.tolist() == [False]
    near_copy = query.clone()
    near_copy[0, 0, 0] = 1
    assert rank_candidates(near_copy, candidate_images, candidates, by_mean, 2).equal.tolist() == [False]


def test_a_flipped_training_image_counts_as_a_copy(tmp_path):
    source = source_of(9, horizontal_flip=True)
    image = source[4]["image"].as_subclass(torch.Tensor)
    queries = torch.stack([image.flip(2), 255 - image])
    candidates = find_candidates(
        FEATURES.extract(queries), source, FEATURES, 5, ResumableBatches(ALONE, tmp_path, 3), "c"
    )
    by_pixels = ImageDistance("l1", lambda one, others: (others.double() - one.double()).abs().sum((1, 2, 3)))
    (ranking,) = rerank_candidates(queries, candidates, source, by_pixels, 3, ResumableBatches(ALONE, tmp_path, 8), "r")
    assert ranking["images"][0, 0] == 4 and ranking["views"][0, 0] == 1 and ranking["distances"][0, 0] == 0
    assert ranking["equal"].tolist() == [True, False]
    assert ranking["distances"].shape == (2, 3) and ranking["distances"].diff(dim=1).ge(0).all()
    nearest_view = training_view(source, training_views(source.config), ranking["images"][0, 0], ranking["views"][0, 0])
    assert torch.equal(nearest_view, image.flip(2))


def test_float_training_images_are_converted_to_8_bits():
    source = source_of(3, shift=1)
    floats = to_float(source[1]["image"].as_subclass(torch.Tensor))
    source.memory_cache[1] = {"image": tv_tensors.Image(floats)}
    for view, transform in enumerate(training_views(source.config)):
        converted = training_view(source, training_views(source.config), torch.tensor(1), torch.tensor(view))
        assert converted.dtype == torch.uint8 and torch.equal(converted, transform(to_uint8(floats)))


def test_figures_by_hand():
    nearest = torch.tensor([0.0, 3.0, 5.0, 2.0, 4.0, 6.0])  # three samples, three held-out images
    blank = torch.zeros(6, 1)
    equal = torch.tensor([True, False, False, False, False, False])
    ranking = nearest_neighbours.RankedNeighbours(nearest[:, None].double(), blank.long(), blank.long(), blank, equal)
    summary = summarize_distances(ranking, 3)
    assert (summary["median"], summary["median_held_out"], summary["ratio"]) == (3, 4, 0.75)
    assert summary["nearer_than_usual"] == pytest.approx(2 / 3) and summary["closer_than_held_out"] == pytest.approx(
        1 / 3
    )
    assert summary["equal_pixels"] == pytest.approx(1 / 3) and summary["equal_pixels_held_out"] == 0
    ranking.distances[3:] = 0  # held-out images that are training images
    assert summarize_distances(ranking, 3)["ratio"] is None


def test_evenly_spaced_by_hand():
    assert evenly_spaced([], 3) == [] and evenly_spaced([1, 2], 3) == [1, 2]
    assert evenly_spaced(list(range(9)), 3) == [0, 4, 8] and evenly_spaced(list(range(9)), 1) == [0]
