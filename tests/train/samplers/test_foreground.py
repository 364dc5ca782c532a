"""Foreground-weighted losses: recorded weights, small boxes in front, no box lost, a mean of 1, every sampler."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusion.types import Loss
from experiments.metrics.cost import count_launches
from helpers.fake_device import DEVICE, FakeDeviceMode
from models.regions import Regions
from train.data.streams import TrainingStreams
from train.distributed import DistContext
from train.registry import load_plugin
from train.sampler import validation_losses
from train.samplers._foreground import ForegroundConfig, loss_weight, paint_weights, touched_cells

RECORDED = np.load(Path(__file__).parents[2] / "fixtures" / "spatial" / "foreground_loss.npz")
HEIGHT, WIDTH = RECORDED["image_hw"].tolist()
GRID = (HEIGHT // 8, WIDTH // 8)
BOXES = torch.from_numpy(RECORDED["boxes_xyxy_px"]) / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
RARE = (1, 5, 6)  # labels of which the recorded weights are doubled: truck, bicycle, motorcycle
CODES = {"bert_n_emb": 8, "bert_n_head": 2, "bert_n_layers": 1}, {"codes": 4, "grid": (2, 4)}
UNET = {"channels": 8, "channel_mults": (1,), "res_blocks": 1, "attn_factors": (), "heads": 1}
SAMPLERS = {"absorbing": CODES, "autoregressive": CODES, "ddpm": (UNET, {"shape": (1, 4, 8), "pixels": True})}


def weights_of(boxes, grid=GRID, foreground="constant", weight=None, norm=True, **fields):
    """The weights of boxes (B, R, 4) in a batch."""
    config = ForegroundConfig(foreground=foreground, foreground_weight=weight, foreground_norm=norm)
    return loss_weight(config, {"boxes": boxes} | fields, grid)


@pytest.mark.parametrize("kind, weight", [("constant", 2), ("constant", 1), ("area", 0.2), ("area", 1)])
@pytest.mark.parametrize("norm", [False, True])
def test_the_rule_equals_the_recorded_weights(kind, weight, norm):
    """Of boxes with rounded corners, painted one over the other in a recorded order."""
    boxes = torch.from_numpy(RECORDED["boxes_xyxy_px"][RECORDED["order.large_first"]])
    x0, y0, x1, y1 = (boxes / 8).round().long().unbind(1)
    rows, columns = torch.arange(GRID[0]), torch.arange(GRID[1])
    inside = (y0[:, None] <= rows) & (rows < y1[:, None]), (x0[:, None] <= columns) & (columns < x1[:, None])
    cells, areas = inside[0].unsqueeze(2) & inside[1].unsqueeze(1), (x1 - x0 + 1) * (y1 - y0 + 1)
    later = cells.flip(0).cumsum(0).flip(0) - cells.int()
    weights = paint_weights((cells & (later == 0))[None], areas[None], kind, weight, norm)[0]
    recorded = RECORDED[f"coco.large_first.{kind}_{weight}" + "_norm" * norm]
    np.testing.assert_allclose(weights.numpy(), recorded, rtol=1e-5)


@pytest.mark.parametrize("kind", ["constant", "area"])
def test_boxes_weigh_as_suggested(kind):
    weights = weights_of(BOXES[None], foreground=kind)[0].double().numpy()
    if kind == "constant":  # recorded with double weights of some classes
        scaled = RECORDED["boxes_xyxy_px"].astype(float) / 8
        x0, y0, x1, y1 = *np.floor(scaled[:, :2]).T.astype(int), *np.ceil(scaled[:, 2:]).T.astype(int)
        double = np.zeros(GRID)
        for i in np.argsort(-(x1 - x0) * (y1 - y0), kind="stable"):
            double[y0[i] : y1[i], x0[i] : x1[i]] = RECORDED["labels"][i] in RARE
        weights = weights * (1 + double)
        weights /= weights.mean()
    name = {"constant": "constant_2", "area": "area_0.2"}[kind]
    np.testing.assert_allclose(weights, RECORDED[f"suggested.{name}_norm"], rtol=1e-5)


def test_small_boxes_are_in_front_in_any_order():
    orders = [torch.arange(8), torch.arange(8).flip(0), torch.tensor([3, 1, 6, 0, 2, 7, 5, 4])]
    weights = weights_of(torch.stack([BOXES[order] for order in orders]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert len(weights[0].unique()) == 8  # all boxes are seen, of which one covers everything


def test_no_box_is_lost_and_cells_outside_boxes_weigh_less():
    boxes = torch.tensor([[[0.5, 0.5, 0.5001, 0.5001], [0.99, 0, 1, 0.01], [0.1, 0.1, 0.3, 0.4]]])
    cells, areas = touched_cells(Regions.from_fields({"boxes": boxes}), (8, 8))
    assert areas.tolist() == [[1, 1, 12]] and cells.sum((2, 3)).tolist() == areas.tolist()
    for kind in ("constant", "area"):
        weights = weights_of(boxes, (8, 8), kind)[0]
        assert weights[4, 4] == weights[0, 7] == weights.max() and weights[1, 1] > weights[7, 7] == weights.min()


@pytest.mark.parametrize("kind", ["constant", "area"])
@pytest.mark.parametrize("grid", [(4, 8), (6, 5)])
def test_the_mean_is_one_and_without_boxes_all_weigh_one(kind, grid):
    boxes = torch.stack([BOXES, BOXES, BOXES * 0 + torch.tensor([1.2, 0, 1.4, 1])])  # of the last, all are outside
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 1:] = False
    weights = weights_of(boxes, grid, kind, boxes_mask=mask)
    torch.testing.assert_close(weights.mean((1, 2)), torch.ones(3))
    assert weights[0].std() > 0.05 and torch.allclose(weights[2], torch.ones(grid))
    torch.testing.assert_close(weights[1:2], weights_of(BOXES[None, :1], grid, kind))
    torch.testing.assert_close(weights_of(torch.zeros(2, 0, 4), grid, kind), torch.ones(2, *grid))


def test_without_norm_weights_are_powers_of_areas():
    boxes = torch.tensor([[[0, 0, 0.5, 0.25]]])
    constant = weights_of(boxes, (4, 4), weight=3, norm=False)[0]
    area = weights_of(boxes, (4, 4), "area", weight=0.5, norm=False)[0]
    assert constant[0, 0] == pytest.approx(3 * 2**-0.2) and constant[3, 3] == pytest.approx(16**-0.2)
    assert area[0, 0] == pytest.approx(2**-0.5) and area[3, 3] == pytest.approx(1 / 4)


def test_a_weight_of_the_batch_multiplies_it():
    plain, given = weights_of(BOXES[None]), torch.rand(1, *GRID)
    assert torch.equal(weights_of(BOXES[None], loss_weight=given), given * plain)
    assert torch.equal(weights_of(BOXES[None], loss_weight=torch.tensor([3.0])), 3 * plain)
    assert torch.equal(weights_of(BOXES[None], loss_weight=given[:, None])[:, 0], given * plain)
    none = ForegroundConfig()
    assert loss_weight(none, {"loss_weight": given}, GRID) is given and loss_weight(none, {}, GRID) is None


@pytest.fixture(params=SAMPLERS)
def case(request):
    """A function that returns the loss of a sampler with random weights, and a batch of it with a box in each image."""
    module, (options, space) = load_plugin("train.samplers", request.param, "sampler"), SAMPLERS[request.param]

    def loss(batch, training=True, **more):
        torch.manual_seed(0)
        sampler = module.build(module.Config(**options, **more), **space, n_classes=0)
        for parameter in sampler.network.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        network = sampler.network.train(training)
        return sampler.loss(network, batch, TrainingStreams(0, batch, 6, torch.device("cpu")))

    x0 = {"codes": torch.arange(48).view(6, 2, 4) % 4} if "codes" in space else {"x0": torch.rand(6, 1, 4, 8)}
    return loss, x0 | {"boxes": BOXES[:6].unsqueeze(1), "position": torch.arange(6)}


def grid_of(batch):
    return batch["codes" if "codes" in batch else "x0"].shape[-2:]


def test_every_sampler_weighs_its_loss(case):
    loss, batch = case
    plain, weighted = loss(batch), loss(batch, foreground="constant")
    weights = weights_of(batch["boxes"], grid_of(batch))
    assert torch.equal(weighted.per_example, loss(batch | {"loss_weight": weights}).per_example)
    assert not torch.allclose(weighted.per_example, plain.per_example, rtol=1e-3)
    assert weighted.metrics.keys() == plain.metrics.keys()
    assert all(torch.equal(weighted.metrics[key], value) for key, value in plain.metrics.items())


def test_validation_tells_the_loss_by_size_of_box(case):
    """Of boxes that cover the left half, a corner, and everything, and an image without any."""
    loss, batch = case
    half, corner, all_of_it = [0, 0, 0.5, 1], [0.75, 0.5, 1, 1], [0, 0, 1, 1]
    batch["boxes"] = torch.tensor([[half, corner], [half, half], [all_of_it, corner], *[[half, half]] * 3])
    batch["boxes_mask"] = torch.ones(6, 2, dtype=torch.bool)
    batch["boxes_mask"][3:] = False
    rows, columns = grid_of(batch)
    medium, large = torch.zeros(2, 6, rows, columns)
    medium[[0, 2], rows // 2 :, 3 * columns // 4 :] = 1  # an eighth of the image
    large[:2, :, : columns // 2], large[2] = 1, 1
    large = large * (1 - medium)
    metrics = loss(batch, training=False, foreground="area").metrics
    for name, mask in {"medium": medium, "large": large}.items():
        mean = loss(batch | {"loss_weight": mask}, training=False).per_example / mask.mean((1, 2))  # else 0 / 0
        torch.testing.assert_close(metrics[f"loss_of_{name}_boxes"], mean, equal_nan=True)
    assert metrics["loss_of_small_boxes"].isnan().all()
    assert not any("boxes" in name for name in loss(batch).metrics)


WRONG = {
    r"got foreground 'Constant', wanted one of none, constant, area: pass --foreground": {"foreground": "Constant"},
    "got foreground_weight 2.0 for foreground none: pass --foreground": {"foreground_weight": 2.0},
    "got no_foreground_norm for foreground none: pass --foreground .*, or --foreground_norm": {
        "foreground_norm": False
    },
    "got foreground_weight 0, wanted": {"foreground": "area", "foreground_weight": 0},
}


@pytest.mark.parametrize("message", WRONG)
def test_other_words_and_weights_are_refused(message):
    with pytest.raises(ValueError, match=message):
        ForegroundConfig(**WRONG[message])


def test_a_batch_without_boxes_is_refused():
    with pytest.raises(ValueError, match="got foreground area and a batch without boxes: .* or pass --foreground none"):
        loss_weight(ForegroundConfig(foreground="area"), {"label": torch.zeros(2)}, GRID)


def test_weights_never_wait_for_the_device():
    expected = weights_of(BOXES[None])
    with FakeDeviceMode():
        boxes = BOXES[None].to(DEVICE)
        with count_launches(DEVICE) as launches:
            weights = weights_of(boxes)
        assert torch.allclose(weights.cpu(), expected)
    assert launches.waits == 0, launches.waiting


def test_images_without_such_boxes_are_left_out_of_a_mean():
    """However they fall into batches."""
    values = torch.tensor([1.0, float("nan"), float("nan"), 2.0, 6.0, float("nan")])

    def loss(network, batch, validation_size):
        losses = values[batch["position"]]
        return Loss(losses.nan_to_num(), {"loss_of_small_boxes": losses, "loss_of_large_boxes": losses * float("nan")})

    class Positions:
        def __getitem__(self, positions):
            return {"position": torch.tensor(positions)}

    for size in (1, 2, 6):
        world = DistContext(device=torch.device("cpu"))
        step = SimpleNamespace(training=SimpleNamespace(batch_size=size), world=world, loss=loss)
        means = validation_losses(step, None, Positions(), 6)
        assert means["loss"] == pytest.approx(1.5) and means["loss_of_small_boxes"] == pytest.approx(3)
        assert math.isnan(means["loss_of_large_boxes"])
