"""Experts: the same as all experts computed everywhere, as one layer at first, and as public code."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.blocks import FEED_FORWARDS, GEGLU, FeedForward
from models.conditions import layout, objects
from models.experts import ExpertOptions, Experts, LoopProducts, add_experts, combine, experts_of, pad_rows
from models.regions import Regions
from models.router import ClassRouter, LearnedRouter, Router, sort_by_expert
from models.streams import Cells
from models.transformer import CausalTransformer, Transformer
from models.unet import UNet, UNetConfig

SPATIAL = Path(__file__).parents[1] / "fixtures" / "spatial"
GRID = (4, 6)
BOXES = {
    "boxes": torch.tensor([[[0, 0, 0.5, 0.5], [0.2, 0.2, 0.9, 1]], [[0.1, 0, 1, 1], [0, 0, 0.0, 0]]]),
    "boxes_mask": torch.tensor([[True, True], [True, False]]),
    "box_class": torch.tensor([[0, 2], [1, 0]]),
}
GROUPS = ((0,), (1, 2))


def regions(rows=slice(None)):
    return Regions.from_fields({name: value[rows] for name, value in BOXES.items()})


def make_experts(kind=GEGLU, router="nearest", width=8, dtype=torch.float64, spread=True):
    """Experts of width 8, and the layer that they are copies of, unless they are `spread`."""
    layer = kind(width)
    routers = {"top1": lambda: LearnedRouter(width, 3), "top2": lambda: LearnedRouter(width, 3, 2)}
    router = routers[router]() if router in routers else ClassRouter(GROUPS, 3, router)
    experts = Experts(layer.expand, kind.activate, layer.contract, router).to(dtype)
    for p in [*experts.expand.parameters(), *experts.contract.parameters()] if spread else []:
        p.data += 0.3 * torch.randn_like(p)
    return experts, layer.to(dtype)


def compute_everywhere(experts, x, routing):
    """Every expert at every row, added up by weights: the form of public code, (N, D)."""
    rows, (n, k) = x.flatten(0, -2), routing.slots.shape
    weights = rows.new_ones(n, k) if routing.weights is None else routing.weights.to(rows.dtype)
    chosen = torch.cat([routing.experts, torch.tensor([3])])[routing.slots]
    combined = rows.new_zeros(n, 4).scatter_add(1, chosen, weights)[:, :3]
    hidden = torch.einsum("nd,ehd->neh", rows, experts.expand.weight) + experts.expand.bias
    out = torch.einsum("neh,edh->ned", experts.activate(hidden), experts.contract.weight) + experts.contract.bias
    return torch.einsum("ne,ned->nd", combined, out)


ROUTERS = ("nearest", "share", "top1", "top2")


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kind", FEED_FORWARDS.values(), ids=FEED_FORWARDS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_experts_are_the_dense_form_with_its_gradients(router, kind, dtype, error):
    experts, _ = make_experts(kind, router, dtype=dtype)
    x, cells = torch.randn(2, *GRID, 8, dtype=dtype, requires_grad=True), Cells(regions(), GRID)
    out = experts(x, cells)
    expected = compute_everywhere(experts, x, experts.router(x, cells)).view_as(x)
    assert (out - expected).abs().max() < error and out.dtype == dtype
    inputs, weight = [x, *experts.parameters()], torch.randn_like(out)
    grads, wanted = (torch.autograd.grad((each * weight).sum(), inputs) for each in (out, expected))
    for got, want in zip(grads, wanted, strict=True):
        assert (got - want).abs().max() < 100 * error and want.any()


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_copies_compute_the_layer_that_they_are_copies_of(router, dtype, error):
    experts, layer = make_experts(router=router, dtype=dtype, spread=False)
    for own, one in ((experts.expand, layer.expand), (experts.contract, layer.contract)):
        assert all(torch.equal(weight, one.weight) for weight in own.weight) and len(own.weight) == 3
        assert all(torch.equal(bias, one.bias) for bias in own.bias)
    x = torch.randn(2, *GRID, 8, dtype=dtype)
    for known in (regions(), None):
        assert (experts(x, Cells(known, GRID)) - layer(x)).abs().max() < error


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_products_are_those_of_the_loop(router, dtype):
    experts, _ = make_experts(router=router, dtype=torch.float32)
    experts.to(dtype)
    x = torch.randn(2, *GRID, 8).to(dtype)
    routing, results = experts.router(x, Cells(regions(), GRID)), []
    padded = routing._replace(  # as compiled graphs have it
        rows=F.pad(routing.rows, (0, 5)), experts=F.pad(routing.experts, (0, 5), value=3), padded=True,
        slots=routing.slots.where(routing.slots < len(routing.rows), len(routing.rows) + 5),
    )  # fmt: skip
    for compute, plan in (
        (experts.compute_in_loop, routing),
        (experts.compute_grouped, routing),
        (experts.compute_grouped, padded),
        (experts.compute_in_loop, padded),
    ):
        rows = x.flatten(0, 2).clone().requires_grad_()
        out = combine(compute(rows.index_select(0, plan.rows), plan), plan)
        grads = torch.autograd.grad(out.float().square().sum(), [rows, *experts.expand.parameters()])
        results.append([out, *grads])
    error = 1e-5 if dtype == torch.float32 else 0.05
    for first, *others in zip(*results, strict=True):
        assert all((each - first).abs().max() <= error * (1 + first.abs().max()) for each in others)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("router", ROUTERS)
def test_grouped_products_on_cuda_are_those_of_the_loop(router, monkeypatch):
    """Outputs and gradients, also of experts without rows: all cells have a region of the first group."""
    experts, _ = make_experts(router=router, dtype=torch.float32, width=64)
    experts.cuda()
    fields = {"boxes": torch.tensor([[[0, 0, 1.0, 1]]]), "box_class": torch.tensor([[0]])}
    fields = {name: value.expand(2, *value.shape[1:]).cuda() for name, value in fields.items()}
    x, results = torch.randn(2, *GRID, 64, device="cuda"), []
    for way in ("grouped", "loop"):
        monkeypatch.setattr(Experts, "products", lambda self, x, way=way: way)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = experts(leaf, Cells(Regions.from_fields(fields), GRID))
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [leaf, *experts.expand.parameters()])])
    for got, wanted in zip(*results, strict=True):
        assert got.isfinite().all() and (got - wanted).abs().max() <= 0.05 * (1 + wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("learns", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
def test_products_in_a_loop_have_the_gradients_of_autograd(dtype, learns, monkeypatch):
    """Also of experts without rows, in memory that holds anything at first, and of a part of what may learn."""
    weight, bias = torch.randn(4, 24, 8).double(), torch.randn(4, 24).double()
    inputs, wanted = [torch.randn(30, 8).to(dtype), weight, bias], torch.randn(30, 24).to(dtype)
    ends = [3, 3, 21, 27]  # the last three rows are padding
    for name in ("new_empty", "empty_like"):
        owner = torch.Tensor if name == "new_empty" else torch
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, make=make, **options: make(*args, **options).fill_(torch.nan))

    leaves = [each.clone().requires_grad_(own) for each, own in zip(inputs, learns, strict=True)]
    out = LoopProducts.apply(*leaves, ends)
    out.backward(wanted)
    others = [each.detach().clone().requires_grad_() for each in inputs]
    parts = [
        F.linear(others[0][start:end], others[1][i].to(dtype), others[2][i].to(dtype))
        for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    expected = F.pad(torch.cat(parts), (0, 0, 0, 3))
    expected.backward(wanted)
    error = 1e-12 if dtype == torch.float64 else 0.05
    assert (out - expected).abs().max() <= error * expected.abs().max() and not out[27:].any()
    for leaf, other, own in zip(leaves, others, learns, strict=True):
        assert (leaf.grad is not None) == own
        assert not own or (leaf.grad - other.grad).abs().max() <= error * other.grad.abs().max()
    if learns[1]:
        assert not leaves[1].grad[1].any()


class Fixed(Router):
    """The same expert for all rows."""

    count = 3

    def __init__(self, expert):
        super().__init__()
        self.expert = expert

    def forward(self, x, cells):
        return sort_by_expert(torch.full((x[..., 0].numel(), 1), self.expert), self.count)


@pytest.mark.parametrize("expert", range(3))
@pytest.mark.parametrize("compute", ["loop", "grouped"])
def test_all_rows_may_have_one_expert(expert, compute, monkeypatch):
    monkeypatch.setattr(Experts, "products", lambda self, x: compute)
    experts, _ = make_experts(dtype=torch.float32)
    experts.router, x = Fixed(expert), torch.randn(2, *GRID, 8)
    out = experts(x, Cells(None, GRID))
    (w1, b1), (w2, b2) = ((each.weight[expert], each.bias[expert]) for each in (experts.expand, experts.contract))
    assert torch.allclose(out, F.linear(GEGLU.activate(F.linear(x, w1, b1)), w2, b2), atol=1e-6)
    out.square().sum().backward()
    for p in experts.parameters():  # all of them have a gradient, that of the others is 0
        assert p.grad is not None and [each.any().item() for each in p.grad] == [i == expert for i in range(3)]


@pytest.fixture
def one_thread():
    """Products of one thread: several would share rows or columns by their number, with sums in other orders."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("router", ROUTERS)
def test_outputs_do_not_depend_on_batch_mates(router, one_thread):
    """Bit for bit, of images of one shape, whatever the others hold: an expert has 4 rows of the first image, and none
    or all of those of the others. Wide, since sums of few numbers have one order."""
    experts, _ = make_experts(router=router, dtype=torch.float32, width=320)
    x, others = torch.randn(1, 8, 8, 320), torch.randn(3, 8, 8, 320)
    corner, whole = torch.tensor([[0, 0, 0.25, 0.25]]), torch.tensor([[0, 0, 1.0, 1.0]])

    def first_of(others, scale):
        boxes = torch.cat([corner, *(scale * whole for _ in others)]).unsqueeze(1)
        regions = Regions.from_fields({"boxes": boxes, "box_class": torch.zeros(4, 1).long()})
        return experts(torch.cat([x, others]), Cells(regions, (8, 8)))[0]

    expected = first_of(others, 0.01)
    assert torch.equal(first_of(others, 1), expected)
    assert torch.equal(first_of(x.expand(3, -1, -1, -1), 0.5), expected)  # learned: the same experts as its own


def test_products_of_16_bits_have_few_shapes():
    """On a CPU, where each shape is compiled. Rows are filled up with zeros, by less than an eighth from 128 on."""
    rows = range(1, 4097)
    counts = [len(pad_rows(torch.zeros(count, 1, dtype=torch.bfloat16))) for count in rows]
    assert len({*counts}) == 48 and all(n <= count for n, count in zip(rows, counts, strict=True))
    assert all(count < n * 9 / 8 for n, count in zip(rows, counts, strict=True) if n > 127)
    x = torch.randn(130, 3).bfloat16()
    assert torch.equal(pad_rows(x)[:130], x) and not pad_rows(x)[130:].any()
    assert pad_rows(torch.zeros(130, 1)).shape == (130, 1)


@pytest.mark.parametrize("rule", ["nearest", "avg_pool"])
def test_experts_are_those_of_public_code(rule, agrees):
    """With their weights, and the dispatch and weights that they recorded."""
    public = {name: torch.from_numpy(value) for name, value in np.load(SPATIAL / "mamoe_experts.npz").items()}
    weights = {
        name: public[f"weights.experts.linear_{name}"] for name in ("in_weight", "in_bias", "out_weight", "out_bias")
    }
    router = ClassRouter([[0], [1], [2], [3]], 4)
    experts = Experts(nn.Linear(16, 64), GEGLU.activate, nn.Linear(32, 16), router)
    experts.expand.weight.data, experts.expand.bias.data = weights["in_weight"], weights["in_bias"]
    experts.contract.weight.data, experts.contract.bias.data = weights["out_weight"], weights["out_bias"]
    dispatch, shares = (public[f"{part}_{rule}"].repeat(2, 1) for part in ("dispatch", "combine"))
    numbers = torch.arange(5).where(dispatch > 0, 5)
    routing = sort_by_expert(numbers, 5, shares)
    routing = routing._replace(slots=routing.slots.clamp(max=int(routing.ends[-1])))
    real = int(routing.ends[-1])
    routing = routing._replace(rows=routing.rows[:real], experts=routing.experts[:real])
    x = public["x"].flatten(0, 1)
    for compute in (experts.compute_in_loop, experts.compute_grouped):
        out = combine(compute(x.index_select(0, routing.rows), routing), routing)
        assert agrees(out.view(2, 128, 16), public[f"out_{rule}"], f"mamoe experts, {rule}, {compute.__name__}")


def test_rows_are_counted_in_training_alone():
    experts, _ = make_experts()
    x, cells = torch.randn(2, *GRID, 8).double(), Cells(regions(), GRID)
    counts = experts.router(x, cells).counts
    assert counts.sum() == 48 and (counts > 0).all()
    for _ in range(2):
        experts.train()(x, cells)
    experts.eval()(x, cells)
    assert experts.rows.tolist() == [*(2 * counts).tolist(), 96]
    assert "rows" not in experts.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
def test_grouped_products_have_no_graph_breaks(router):
    experts, _ = make_experts(router=router, dtype=torch.float32)
    x = torch.randn(2, *GRID, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = experts.eval()(x, Cells(regions(), GRID))
        experts.train()
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        out = compiled(x, Cells(regions(), GRID))
    assert (out - expected).abs().max() < 0.05 * expected.abs().max() and out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in experts.parameters())
    assert experts.rows[-1] == 48


# Networks


def unet(kind="transformer", regions=True, **options):
    sizes = {"channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (2,), "heads": 2}
    encoders = {"layout": layout.build(layout.Config(layout_classes=3), 32, 0)} if regions else {}
    network = UNet(UNetConfig(**sizes, attn_block_type=kind, **options), encoders).double().eval()
    for p in network.parameters():  # zeros would hide errors
        p.data += 0.1 * torch.randn_like(p)
    return network


def transformer(kind=Transformer, **options):
    encoders = {"objects": objects.build(objects.Config(objects_classes=3), 16, 0)}
    network = kind(codes=5, grid=GRID, width=16, heads=2, layers=2, encoders=encoders, **options).double().eval()
    for p in network.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return network


def spread(network):
    """Makes the experts different."""
    for layer in experts_of(network).values():
        for p in layer.parameters():
            p.data += 0.3 * torch.randn_like(p)
    return network


def call(network):
    """Returns the outputs with regions and without."""
    g = torch.Generator().manual_seed(1)
    if isinstance(network, UNet):
        inputs = torch.randn(2, 3, 8, 12, generator=g).double(), torch.tensor([3.0, 700.0]).double()
    else:
        inputs = (torch.randint(0, 5, (2, *GRID), generator=g),)
    fields = {name: BOXES for name in network.encoders}
    return network(*inputs, fields), network(*inputs)


OPTIONS = [
    ExpertOptions(groups=GROUPS),
    ExpertOptions(groups=GROUPS, rule="share"),
    ExpertOptions(groups=((0, 1, 2),)),
    ExpertOptions(groups=(), learned=3),
    ExpertOptions(groups=(), learned=3, top=2),
]
NETWORKS = [unet, transformer, lambda: transformer(CausalTransformer), lambda: transformer(feed_forward="geglu")]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("make", NETWORKS)
def test_a_network_is_unchanged_at_first_and_learns_everywhere(make, options):
    network = make()
    plain = copy.deepcopy(network)
    names = add_experts(network, options)
    assert names and [*experts_of(network)] == names and all(name.endswith("feed_forward") for name in names)
    for got, want in zip(call(network), call(plain), strict=True):
        assert (got - want).abs().max() < 1e-12 * want.abs().max().clamp(min=1)
    spread(network)
    (with_regions, without), (old, _) = call(network), call(plain)
    assert (with_regions - old).abs().max() > 1e-3
    (with_regions.square().sum() + without.square().sum()).backward()
    for name in names:
        grads = {key: p.grad for key, p in network.get_submodule(name).named_parameters()}
        assert all(grad is not None and grad.any() for grad in grads.values())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("make", NETWORKS)
def test_a_network_with_experts_keeps_images_apart(make, options):
    network = make()
    add_experts(network, options)
    spread(network)
    (name,), g = network.encoders, torch.Generator().manual_seed(1)
    if isinstance(network, UNet):
        inputs = torch.randn(2, 3, 8, 12, generator=g).double(), torch.tensor([3.0, 700.0]).double()
    else:
        inputs = (torch.randint(0, 5, (2, *GRID), generator=g),)
    both = network(*inputs, {name: BOXES})
    for row in (slice(0, 1), slice(1, 2)):
        alone = network(*(each[row] for each in inputs), {name: {key: value[row] for key, value in BOXES.items()}})
        assert (alone - both[row]).abs().max() < 1e-12 * both.abs().max()


@pytest.mark.parametrize("make", [unet, transformer])
def test_experts_are_dropped_with_the_regions(make):
    network = make()
    add_experts(network, ExpertOptions(groups=GROUPS))
    spread(network)
    seen = []
    for layer in experts_of(network).values():
        layer.router.register_forward_hook(lambda router, inputs, routing: seen.append(routing.counts))
    call(network)
    n = len(seen) // 2
    assert all((counts > 0).all() for counts in seen[:n])
    assert all(not counts[:-1].any() and counts[-1] > 0 for counts in seen[n:])
    seen.clear()
    (name,) = network.encoders
    x = torch.zeros(2, 1, 8, 12) if make is transformer else torch.zeros(2, 3, 8, 12)
    dropped = network.encoders({name: BOXES}, x, {"regions": torch.tensor([True, True])})
    layer = next(iter(experts_of(network).values()))
    width = layer.contract.weight.shape[1]
    routing = layer.router(torch.zeros(2, *GRID, width), Cells(dropped.regions, GRID))
    assert routing.counts.tolist() == [0, 0, 48]


def test_a_cache_of_keys_reads_the_experts_of_its_positions():
    from models.kv_cache import KVCache

    network = transformer(CausalTransformer)
    add_experts(network, ExpertOptions(groups=GROUPS, rule="share"))
    spread(network)
    ids = torch.randint(0, 5, (2, *GRID))
    condition = network.encode({"objects": BOXES}, ids)
    whole, cache = network(ids, condition).flatten(1, 2), KVCache(GRID)
    for m in (0, 1, 7, 23):
        assert torch.allclose(network(ids.flatten(1)[:, :m], condition, cache), whole[:, m])


def test_networks_without_regions_or_layers_are_refused():
    before = unet(regions=False)
    old = {name: value.clone() for name, value in before.state_dict().items()}
    with pytest.raises(ValueError, match="without a condition of regions: pass --conditions layout"):
        add_experts(before, ExpertOptions(groups=GROUPS))
    assert before.state_dict().keys() == old.keys()
    unnamed = transformer()
    unnamed.encoders["objects"].limits = {}
    with pytest.raises(ValueError, match="for regions whose classes have no names: pass --region_words_names"):
        add_experts(unnamed, ExpertOptions(groups=GROUPS))
    add_experts(before, ExpertOptions(groups=(), learned=2))  # needs none
    with pytest.raises(ValueError, match="got experts for a UNet without transformer blocks: pass --attn_block_type"):
        add_experts(unet("softmax"), ExpertOptions(groups=(), learned=2))
    with pytest.raises(ValueError, match="got experts for .* with a Experts, wanted one of gelu, geglu"):
        add_experts(before, ExpertOptions(groups=(), learned=2))
    with pytest.raises(ValueError, match="of groups and learned ones, or neither"):
        ExpertOptions(groups=())
    assert issubclass(GEGLU, FeedForward)
