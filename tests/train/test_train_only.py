"""--train_only trains the selected parts and nothing else; --load_partial loads the weights that fit."""

import pytest
import torch
import yaml
from torch import nn

from helpers.labels import label_encoders
from helpers.process_pool import ProcessPool
from helpers.run_asserts import weights
from helpers.tiny_runs import DDPM, GAN, VQGAN, call
from models.conditions import image, layout, objects, text
from models.conditions.label import LabelEncoder
from models.conditions.metadata import MetadataEncoder
from models.conditions.objects import ObjectsEncoder
from models.embeddings import GrowingEmbedding
from models.experts import ExpertOptions, add_experts
from models.transformer import Transformer
from models.unet import UNet, UNetConfig
from train.checkpoint import checkpoint_path
from train.optim import freeze_all_but, is_selected, scale_learning_rates
from train.partial_load import load_matching
from vq.quantizers.nearest import NearestQuantizer

RUN = (
    f"{DDPM} --dataset digits --no_amp --weight_decay 0.1 --lr 1e-2 --steps_per_eval 0 --keep_last 0 --steps_per_log 1"
)
FIRST_STAGE = (
    f"{VQGAN} {GAN} --no_amp --steps_per_eval 0 --keep_last 0 --disc_start_step 1 --lr 1e-2 --weight_decay 0.1"
)
BRIGHT = "--condition_channels 1 --adapt my_bright.bright"
SELECTED = "up_blocks encoders.label conv_out"


def train(logs, name, flags, script="train_sampler.py", run=RUN):
    call(script, f"--logs_root {logs} --log_dir {name} {run} {flags}")
    return logs / name


def changed(run, first, last, file="model.safetensors"):
    """The tensors that differ between two steps of a run."""
    earlier, later = (weights(run, step, file) for step in (first, last))
    return {key for key in earlier if not torch.equal(earlier[key], later[key])}


@pytest.fixture(scope="module", autouse=True)
def user_module(tmp_path_factory):
    """A user module that adds a condition."""
    folder = tmp_path_factory.mktemp("own")
    code = "def bright(item):\n    return item | {'condition_image': item['image'] // 2}\n"
    (folder / "my_bright.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Logs with `part`, 3 steps of training a part of the UNet, and `whole`, 3 steps of training all of it."""
    logs = tmp_path_factory.mktemp("train_only")
    train(logs, "part", f"--steps_per_checkpoint 1 --train_steps 3 --train_only {SELECTED}")
    train(logs, "whole", "--train_steps 2")
    return logs


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors"])
def test_only_the_selected_parts_are_trained(logs, file):
    names = weights(logs / "part", 1, file)
    selected = {key for key in names if is_selected(key.removeprefix("network."), SELECTED.split())}
    learned = changed(logs / "part", 1, 3, file)
    assert learned <= selected and 0 < len(selected) < len(names)
    assert len(learned) > len(selected) / 2  # layers before a zero-initialised one have no gradient yet


def test_frozen_parts_have_no_optimizer_state(logs):
    state = torch.load(checkpoint_path(logs / "part", 3) / "state.pt", weights_only=True)["optimizers"]["network"]
    names = [key.removeprefix("network.") for key in weights(logs / "part", 3)]
    selected = [name for name in names if is_selected(name, SELECTED.split())]
    assert len(state["state"]) == len(state["param_groups"][0]["params"]) == len(selected)


def test_train_only_is_part_of_the_run_identity(logs, capfd):
    with pytest.raises(SystemExit):
        train(logs, "part", "--train_steps 4 --train_only up_blocks")
    assert "--train_only up_blocks encoders.label conv_out -> up_blocks" in capfd.readouterr().err
    train(logs, "part", f"--train_steps 4 --train_only {SELECTED}")
    assert "resuming from step 3 of 4" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_freeze_the_same_parts(logs, parallel):
    pool = ProcessPool(2)
    flags = (
        f"--logs_root {logs} --log_dir {parallel} {RUN} --train_steps 3 --steps_per_checkpoint 1 --parallel {parallel}"
    )
    try:
        pool.run("train_sampler.py", f"{flags} --train_only {SELECTED}")
    finally:
        pool.close()
    assert changed(logs / parallel, 1, 3) == changed(logs / "part", 1, 3)
    for key, expected in weights(logs / "part", 3).items():
        torch.testing.assert_close(weights(logs / parallel, 3)[key], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_of_a_vqgan_can_be_trained(tmp_path, part):
    flags = f"--train_steps 3 --steps_per_checkpoint 1 --train_only {part} --no_adaptive_weight"
    run = train(tmp_path, part, flags, "train_vqgan.py", FIRST_STAGE)
    learned = {key for key in changed(run, 1, 3) if key.startswith("autoencoder.")}
    assert learned and all(key.startswith(f"autoencoder.{part}.") for key in learned)
    assert any(key.startswith("discriminator.") for key in changed(run, 1, 3))


def test_ema_codebooks_are_frozen_too(tmp_path):
    flags = "--quantizer ema --train_steps 3 --steps_per_checkpoint 1 --train_only decoder"
    run = train(tmp_path, "ema", flags, "train_vqgan.py", FIRST_STAGE)
    assert not any(key.startswith("autoencoder.quantizer") for key in changed(run, 1, 3))


def test_a_codebook_without_parameters_can_be_selected(tmp_path):
    flags = "--quantizer ema --train_steps 3 --steps_per_checkpoint 1 --train_only quantizer.codebook decoder"
    run = train(tmp_path, "ema", flags, "train_vqgan.py", FIRST_STAGE)
    assert "autoencoder.quantizer.codebook" in changed(run, 1, 3)


def test_parameters_frozen_by_the_module_stay_frozen():
    module = net()
    module["embed"].requires_grad_(False)
    freeze_all_but(module, ["embed", "out.bias"])
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["out.bias"]


def test_an_adaptive_weight_needs_the_last_layer(tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "odd", "--train_steps 1 --train_only encoder", "train_vqgan.py", FIRST_STAGE)
    assert stop.value.code == 2 and "pass --no_adaptive_weight" in capfd.readouterr().err


def net(classes=3, width=4):
    torch.manual_seed(classes)
    return nn.ModuleDict({"embed": GrowingEmbedding(classes, width, null_last=True), "out": nn.Linear(width, 2)})


WRONG = {
    "got --train_only ou, which matches no parameter, did you mean 'out'.; its parts are: embed, out": ["ou"],
    "got --train_only embed.weight.x, which matches no parameter": ["embed.weight.x"],
}


@pytest.mark.parametrize("message", WRONG)
def test_a_prefix_that_matches_nothing_is_refused(message):
    with pytest.raises(ValueError, match=message):
        freeze_all_but(net(), WRONG[message])


def test_a_part_without_parameters_leaves_nothing_to_train():
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze_all_but(nn.ModuleDict({"norm": nn.BatchNorm1d(2, affine=False), "out": nn.Linear(2, 2)}), ["norm"])


def test_a_star_stands_for_any_one_part():
    names = ["blocks.0.gated.gate", "blocks.11.gated.cross.q.bias", "blocks.0.cross.q.bias", "blocks.0", "gated.gate"]
    assert [is_selected(name, ["blocks.*.gated"]) for name in names] == [True, True, False, False, False]
    assert not is_selected("blocks", ["blocks.*"]) and is_selected("blocks.0.cross", ["embed", "*.0"])


def test_experts_are_a_part_of_a_network():
    """By name alone, in --train_only and --lr_scale; not the feed-forward layers of its text encoder."""
    torch.manual_seed(0)
    captions = text.build(text.Config(text_width=8, text_layers=1, text_heads=1), 16, 0)
    network = Transformer(codes=5, grid=(2, 2), width=16, heads=2, layers=2, encoders={"text": captions})
    with pytest.raises(ValueError, match="got --train_only experts, which matches no parameter"):
        freeze_all_but(network, ["experts"])
    add_experts(network, ExpertOptions(groups=(), learned=2))
    freeze_all_but(network, ["experts", "norm"])
    learned = {name for name, p in network.named_parameters() if p.requires_grad}
    experts = {name for name in learned if name.startswith("blocks.") and ".feed_forward." in name}
    assert {name.split(".")[3] for name in experts} == {"expand", "contract", "router"}
    assert learned - experts == {"norm.weight", "norm.bias"}
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    scale_learning_rates(optimizer, network, {"experts": 0.5})
    factors = {group["lr_scale"]: len(group["params"]) for group in optimizer.param_groups}
    assert factors == {0.5: len(experts), 1.0: 2}


def test_prefixes_end_at_dots():
    module = net()
    freeze_all_but(module, ["embed", "out.bias"])
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"embed.weight", "out.bias"}


def test_matching_weights_are_loaded_and_every_key_reported():
    network, source = net(classes=5), net(classes=3)
    network["out"] = nn.Linear(6, 2)
    file = {f"net.{key}": value for key, value in source.state_dict().items()}
    file |= {"net.gone": torch.zeros(1), "other.out.bias": torch.zeros(2), "net.out.bias": torch.zeros(2, 1)}
    before = {key: value.clone() for key, value in network.state_dict().items()}
    report = load_matching(network, file, "net")
    assert report.taken == [] and report.missing == [] and report.unexpected == ["net.gone"]
    assert report.grown == ["net.embed.weight: (3, 4) -> (5, 4)", "net.out.weight: (2, 4) -> (2, 6)"]
    assert report.misshapen == ["net.out.bias: (2, 1) in the file, (2,) here"]
    after, old = network.state_dict(), source["embed"].weight
    assert torch.equal(after["embed.weight"][:2], old[:2])
    assert torch.equal(after["embed.weight"][4], old[2])  # the null class
    assert torch.equal(after["embed.weight"][2:4], before["embed.weight"][2:4])
    assert torch.equal(after["out.bias"], before["out.bias"])
    x = torch.randn(7, 6)  # new input channels change nothing
    assert torch.allclose(x @ after["out.weight"].T, x[:, :4] @ source["out"].weight.T, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "rows"),
    [
        (lambda n: LabelEncoder(n, 8), {"embedding": [0, 1, 2, 3, None, None, 4]}),
        (
            lambda n: ObjectsEncoder(n, 8, colors=n - 1),
            {"embedding": [0, 1, 2, 3, None, None], "color": [0, 1, 2, *[None] * 2]},
        ),
        (lambda n: MetadataEncoder({"camera": "abcdef"[:n], "light": "ab"}, 8), {"embedding": [None] * 10}),
        (lambda n: NearestQuantizer(n, 8), {"codebook": [0, 1, 2, 3, None, None]}),
    ],
    ids=["label", "objects", "metadata", "codebook"],
)
def test_numbers_keep_their_vectors_when_there_are_more(build, rows):
    """Growing from 4 to 6: the saved row in each of the new ones, None for an initial one."""
    old, new = build(4), build(6)
    before = {key: value.clone() for key, value in new.state_dict().items()}
    report = load_matching(new, {f"net.{key}": value for key, value in old.state_dict().items()}, "net")
    for name, sources in rows.items():
        key, loaded = f"{name}.weight", any(row is not None for row in sources)
        saved = old.state_dict()[key]
        expected = [before[key][i] if row is None else saved[row] for i, row in enumerate(sources)]
        assert torch.equal(new.state_dict()[key], torch.stack(expected))
        assert any(line.startswith(f"net.{key}: ") for line in (report.grown if loaded else report.misshapen))


@pytest.mark.parametrize("layer", ["deeper.conv", "norm"])
def test_layers_with_concatenated_inputs_do_not_grow(layer):
    def build(width):
        deeper = nn.ModuleDict({"conv": nn.Conv2d(width, 2, 1)})
        return nn.ModuleDict({"deeper": deeper, "norm": nn.GroupNorm(1, width)})

    file = {f"net.{key}": value for key, value in build(3).state_dict().items()}
    report = load_matching(build(4), file, "net")
    assert report.grown == [] and any(key.startswith(f"net.{layer}.weight") for key in report.misshapen)


@pytest.mark.parametrize("names", [("layout", "image"), ("image", "layout"), ("layout",)], ids=" ".join)
def test_old_networks_start_the_same_with_regions(names):
    """A joined layout and region attention change nothing at first, wherever the layout is joined."""

    def build(names, **changes):
        made = {
            "image": image.build(image.Config(condition_channels=2), 32, 0),
            "layout": layout.build(layout.Config(layout_classes=3), 32, 0),
            "objects": objects.build(objects.Config(objects_classes=3), 32, 0),
        }
        config = UNetConfig(channels=8, channel_mults=(1, 2), res_blocks=1, attn_factors=(2,), heads=2, **changes)
        return UNet(config, {name: made[name] for name in names}).eval()

    others = tuple(name for name in names if name == "image")
    old, new = build(others), build((*names, "objects"), region_attention="v2")
    for p in old.parameters():
        p.data += 0.1 * torch.randn_like(p)
    report = load_matching(new, {f"net.{key}": value for key, value in old.state_dict().items()}, "net")
    channels = 3 + 2 * len(others)
    assert report.grown == [f"net.conv_in.weight: (8, {channels}, 3, 3) -> (8, {channels + 5}, 3, 3)"]
    assert report.unexpected == report.misshapen == [] and len(report.taken) == len(old.state_dict()) - 1
    added = ("net.encoders.layout.null", "net.encoders.objects.embedding.weight")
    assert set(added) <= set(report.missing)
    assert all(key in added or key.startswith("net.region_blocks.") for key in report.missing)
    boxes = {"boxes": torch.tensor([[[0.1, 0, 0.6, 1]]] * 2), "box_class": torch.tensor([[1], [2]])}
    fields = {"image": torch.randn(2, 2, 4, 6), "layout": boxes, "objects": boxes}
    x, t = torch.randn(2, 3, 4, 6), torch.tensor([3.0, 700.0])
    expected = old(x, t, {name: fields[name] for name in others})
    out = new(x, t, {name: fields[name] for name in (*names, "objects")})
    assert torch.allclose(out, expected, rtol=0, atol=1e-5) and expected.any()


def test_a_map_of_more_classes_takes_no_channels_of_fewer():
    def build(classes):
        config = UNetConfig(channels=8, channel_mults=(1,), res_blocks=1, attn_factors=(), heads=1)
        return UNet(config, {"layout": layout.build(layout.Config(layout_classes=classes), 32, 0)})

    old, new = build(4), build(6)
    report = load_matching(new, {f"net.{key}": value for key, value in old.state_dict().items()}, "net")
    changed = [
        "encoders.layout.null: (6, 1, 1) in the file, (8, 1, 1)",
        "conv_in.weight: (8, 9, 3, 3) in the file, (8, 11, 3, 3)",
    ]
    assert report.grown == [] and report.misshapen == [f"net.{line} here" for line in changed]


def test_a_renamed_weight_is_loaded_by_its_new_name():
    encoders = label_encoders(3, 8)
    network = Transformer(codes=4, grid=(2, 2), width=8, heads=2, layers=1, encoders=encoders)
    file = {f"network.{key}": torch.full_like(value, 0.5) for key, value in network.state_dict().items()}
    file["network.label.weight"] = file.pop("network.encoders.label.embedding.weight")
    report = load_matching(network, file, "network")
    assert report.missing == report.unexpected == [] and (encoders["label"].embedding.weight == 0.5).all()


def test_a_run_starts_from_a_partial_load(logs, capfd):
    """A network with a wider last level and a concatenated image; it resumes like any run."""
    flags = f"--train_steps 1 --channel_mults 1 3 --conditions image {BRIGHT} --load_dir whole --load_partial"
    run = train(logs, "wider", flags)
    output = capfd.readouterr().out
    report = yaml.safe_load((run / "config.yaml").read_text())["origin"]["load_report"]
    assert report["taken"] and report["misshapen"] and report["unexpected"] == []
    assert report["missing"] == ["network.encoders.image.null"]
    (grown,) = report["grown"]
    assert grown.startswith("network.conv_in.weight: (8, 1, 3, 3) -> ")
    assert all(f"{kind}: {key}" in output for kind in report for key in report[kind])
    train(logs, "wider", flags.replace("--train_steps 1", "--train_steps 2"))
    assert "resuming from step 1 of 2" in capfd.readouterr().out


def test_a_partial_load_of_the_same_network_is_complete(logs):
    """One step from the loaded weights and averages is the same step."""
    for name, flag in (("strict", ""), ("partial", "--load_partial")):
        train(logs, name, f"--train_steps 1 --load_dir whole {flag}")
    for file in ("model.safetensors", "ema.safetensors"):
        strict, partial = (weights(logs / name, 1, file) for name in ("strict", "partial"))
        assert strict.keys() == partial.keys() and all(torch.equal(strict[key], partial[key]) for key in strict)


@pytest.mark.parametrize(
    "flags, message",
    [("", "needs --load_dir"), ("--load_dir whole --load_optim", "leave --load_optim out")],
)
def test_a_partial_load_with_wrong_flags_is_refused(logs, flags, message, capfd):
    with pytest.raises(SystemExit) as stop:
        train(logs, "refused", f"--train_steps 1 --load_partial {flags}")
    assert stop.value.code == 2 and message in capfd.readouterr().err and not (logs / "refused").exists()


def test_a_partial_load_that_matches_nothing_is_refused(logs, capfd):
    train(logs, "vqgan", "--train_steps 1", "train_vqgan.py", FIRST_STAGE)
    with pytest.raises(SystemExit):
        train(logs, "odd", "--train_steps 1 --load_dir vqgan --load_partial")
    assert "found nothing in" in capfd.readouterr().err and not (logs / "odd").exists()
