"""Fixtures of several files of tests of experiments."""

import pytest

from experiments.metrics.layout import crop_classifier, judges, obedience, scene_network
from experiments.metrics.layout.bench import Bench
from train.trained_sampler import TrainedSampler


@pytest.fixture
def conditions(monkeypatch):
    """The raw conditions of every sampled batch."""
    batches, draw = [], TrainedSampler.draw

    def record(model, indices, seed, options, conditions, **kwargs):
        batches.append(conditions)
        return draw(model, indices, seed, options, conditions, **kwargs)

    monkeypatch.setattr(TrainedSampler, "draw", record)
    return batches


@pytest.fixture
def tiny_judges(monkeypatch):
    """Judges of layouts train for a few steps."""
    monkeypatch.setattr(crop_classifier, "RECIPE", crop_classifier.RECIPE._replace(steps=3, batch_size=16))
    monkeypatch.setattr(scene_network, "RECIPE", scene_network.RECIPE._replace(steps=3, batch_size=8))
    monkeypatch.setattr(obedience, "CAS_RECIPE", obedience.CAS_RECIPE._replace(steps=2, batch_size=16))
    monkeypatch.setattr(judges, "SCENES", 40)


@pytest.fixture
def trained_names(monkeypatch):
    """The names of the runs that are trained, in order."""
    names, train = [], Bench.train

    def record(bench, run, weights):
        names.append(run.name)
        return train(bench, run, weights)

    monkeypatch.setattr(Bench, "train", record)
    return names
