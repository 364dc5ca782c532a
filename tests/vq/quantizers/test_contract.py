"""The contract of every quantizer in vq/quantizers."""

import ast
import copy
import dataclasses
import inspect
import itertools
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diffusion.rng import Streams
from train.cli.plugins import flags_of
from train.config import VQGANRunConfig
from train.registry import load_plugin, plugin_names
from vq.config import VQGANConfig
from vq.quantizer import make_quantizer
from vq.quantizers import Quantized, Quantizer, QuantizerConfig, StepContext

NAMES = plugin_names("vq.quantizers")
BATCH_DEPENDENT = {"lfq", "ibq"}  # their loss contains the entropy of the codes of a batch
GRIDS = [(4, 4), (2, 5), (1, 1)]


def build(name, codebook_size=16, emb_dim=4, seed=0):
    torch.manual_seed(seed)
    return make_quantizer(VQGANConfig(quantizer=name, codebook_size=codebook_size, emb_dim=emb_dim))


def vectors_for(quantizer, batch=3, grid=(4, 3), seed=1):
    """Random encoder outputs (B, D, h, w)."""
    return torch.randn(batch, quantizer.dim, *grid, generator=torch.Generator().manual_seed(seed))


def context(batch=3, step=5, first=0):
    return StepContext(step, seed=step, rng=Streams(list(range(first, first + batch))))


def equal_outputs(actual, expected):
    return all(torch.equal(a, b) for a, b in zip(actual[:3], expected[:3], strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("codebook_size, emb_dim", [(16, 4), (64, 8)])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("trains", [False, True])
def test_shapes_and_types(name, codebook_size, emb_dim, grid, trains):
    quantizer = build(name, codebook_size, emb_dim)
    config = VQGANConfig(quantizer=name, codebook_size=codebook_size, emb_dim=emb_dim)
    assert isinstance(quantizer, Quantizer)
    assert (quantizer.codebook_size, quantizer.dim) == (codebook_size, config.code_dim)
    z = vectors_for(quantizer, 3, grid)
    codes = quantizer(z, context() if trains else None)
    assert isinstance(codes, Quantized)
    assert codes.ids.shape == (3, *grid) and codes.ids.dtype == torch.int64
    assert 0 <= codes.ids.min() <= codes.ids.max() < codebook_size
    assert codes.vectors.shape == z.shape and codes.vectors.dtype == torch.float32
    assert codes.loss.shape == (3,) and codes.loss.dtype == torch.float32 and codes.loss.isfinite().all()
    assert all(metric.shape == () and not metric.requires_grad for metric in codes.metrics.values())
    assert quantizer.vectors(codes.ids).shape == z.shape and quantizer.vectors(codes.ids).dtype == torch.float32
    assert codes.vectors.is_contiguous() and quantizer.vectors(codes.ids).is_contiguous()  # see `lookup`
    assert quantizer.ids_of(z).shape == quantizer.assign(z).shape == codes.ids.shape
    assert not quantizer.assign(z.requires_grad_()).requires_grad


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", GRIDS)
def test_without_training_forward_assigns_and_decodes_codes(name, grid):
    quantizer = build(name)
    z = vectors_for(quantizer, 40, grid)
    codes = quantizer(z)
    assert torch.equal(codes.ids, quantizer.assign(z)) and len(codes.ids.unique()) > 4
    assert torch.allclose(codes.vectors, quantizer.vectors(codes.ids), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_codes_are_recognised_by_their_vectors(name, data):
    codebook_size = data.draw(st.sampled_from([16, 64]))
    quantizer = build(name, codebook_size, emb_dim=8, seed=data.draw(st.integers(0, 2**16)))
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)))
    ids = torch.from_numpy(data.draw(arrays("int64", shape, elements=st.integers(0, codebook_size - 1))))
    vectors = quantizer.vectors(ids)
    assert torch.equal(quantizer.ids_of(vectors), ids)
    single = quantizer.vectors(ids[:1, :1, :1])
    assert torch.equal(vectors[:1, :, :1, :1], single), "a code's vector depends on its neighbours"


@pytest.mark.parametrize("name", NAMES)
def test_codes_have_vectors_of_their_own(name):
    quantizer = build(name, 64, 8)
    vectors = quantizer.vectors(torch.arange(64).view(1, 8, 8)).movedim(1, -1).flatten(0, 2)
    assert len(vectors.unique(dim=0)) == 64


@pytest.mark.parametrize("name", NAMES)
def test_slightly_perturbed_codes_are_recognised(name):
    quantizer, ids = build(name, 64, 8), torch.arange(64).view(1, 8, 8)
    vectors = quantizer.vectors(ids).detach()
    min_distance = torch.pdist(vectors.movedim(1, -1).flatten(0, 2)).min()
    offset = torch.nn.functional.normalize(torch.randn_like(vectors), dim=1) * 0.2 * min_distance
    assert torch.equal(quantizer.ids_of(vectors + offset), ids)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trains", [False, True])
def test_autocast_changes_nothing(name, dtype, trains):
    quantizer = build(name)
    z = vectors_for(quantizer).to(dtype)
    plain = quantizer(z.float(), context() if trains else None)
    with torch.autocast("cpu", dtype):
        codes = quantizer(z.requires_grad_(), context() if trains else None)
        assert torch.equal(quantizer.assign(z), quantizer.assign(z.float()))
    assert codes.vectors.dtype == codes.loss.dtype == torch.float32
    assert equal_outputs(codes, plain)
    (codes.vectors.sum() + codes.loss.sum()).backward()
    if trains:
        assert z.grad.dtype == dtype and z.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_float64_stays(name):
    quantizer = build(name).double()
    codes = quantizer(vectors_for(quantizer).double(), context())
    assert codes.vectors.dtype == codes.loss.dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_vector_and_every_weight(name):
    """Distributed training would hang on a weight without a gradient."""
    quantizer = build(name)
    z = vectors_for(quantizer, 3).requires_grad_()
    codes = quantizer(z, context())
    (grad_z,) = torch.autograd.grad((codes.vectors * torch.randn(z.shape)).sum(), z, retain_graph=True)
    assert grad_z.isfinite().all() and (grad_z != 0).any(1).all()
    (codes.vectors.square().sum() + codes.loss.sum()).backward()
    for key, parameter in quantizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trains", [False, True])
def test_an_example_does_not_depend_on_the_others(name, trains):
    quantizer = build(name)
    z = vectors_for(quantizer, 4)
    batched = quantizer(z, context(4) if trains else None)
    for i in range(4):
        single = quantizer(z[i : i + 1], context(1, first=i) if trains else None)
        assert torch.equal(single.ids, batched.ids[i : i + 1])
        assert torch.allclose(single.vectors, batched.vectors[i : i + 1], atol=1e-6)
        if name not in BATCH_DEPENDENT:
            assert torch.allclose(single.loss, batched.loss[i : i + 1], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trains", [False, True])
def test_randomness_comes_only_from_the_step_context(name, trains):
    quantizer = build(name)
    z, before = vectors_for(quantizer), torch.get_rng_state()
    first, second = (copy.deepcopy(quantizer), copy.deepcopy(quantizer))
    contexts = [context() if trains else None for _ in range(2)]
    assert equal_outputs(first(z, contexts[0]), second(z, contexts[1]))
    for instance, step_context in zip((first, second), contexts, strict=True):
        instance.update_codebook(step_context)
    assert equal_outputs(first(z), second(z)) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_that_loads_the_state_is_the_same(name):
    quantizer, other = build(name), build(name, seed=7)
    z = vectors_for(quantizer)
    quantizer(z, context())
    quantizer.update_codebook(context())
    other.load_state_dict(quantizer.state_dict())
    assert equal_outputs(quantizer(z), other(z)) and equal_outputs(quantizer(z, context()), other(z, context()))
    for instance in (quantizer, other):
        instance.update_codebook(context())
    assert equal_outputs(quantizer(z), other(z))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step_context", [None, StepContext(5, seed=5)])
def test_only_training_batches_update_the_codebook(name, step_context):
    """A skipped step (None), or one without training batches, changes nothing."""
    quantizer = build(name)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(vectors_for(quantizer), context() if step_context is None else None)
    quantizer.update_codebook(step_context)
    quantizer.update_codebook(context())
    after = quantizer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(tensor, before[key]) for key, tensor in after.items())


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_built_without_memory(name):
    with torch.device("meta"):
        quantizer = make_quantizer(VQGANConfig(quantizer=name, codebook_size=64))
    assert all(tensor.is_meta for tensor in quantizer.state_dict().values())


@pytest.mark.parametrize("name", NAMES)
def test_its_options_are_a_frozen_config_of_documented_fields(name):
    file = load_plugin("vq.quantizers", name, "quantizer")
    fields = dataclasses.fields(file.Config)
    assert issubclass(file.Config, QuantizerConfig) and file.Config.__dataclass_params__.frozen
    assert file.Config.__doc__ and all(field.kw_only for field in fields)
    documented = {note for cls in file.Config.__mro__[:-1] for note in documented_fields(cls)}
    assert {field.name for field in fields} <= documented
    assert isinstance(file.build(file.Config(), 16, file.Config().code_dim(16, 4)), Quantizer)


def documented_fields(cls):
    """The fields that a docstring follows in the source of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    return [
        field.target.id
        for field, note in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_options_of_another_quantizer_are_refused(name):
    other = next(load_plugin("vq.quantizers", each, "quantizer").Config() for each in NAMES if each != name)
    with pytest.raises(ValueError, match=f"got options of .* for quantizer {name}: pass vq.quantizers.{name}.Config"):
        VQGANConfig(quantizer=name, quantizer_config=other)


def test_fields_of_one_name_are_one_flag():
    """Equal names have one type and default, so that a flag serves several quantizers; none is a network's flag."""
    flags = {}
    for name in NAMES:
        for key, flag in flags_of(load_plugin("vq.quantizers", name, "quantizer").Config).items():
            assert flags.setdefault(key, flag) == flag, f"--{key} of {name}"
    groups = [field.type for field in dataclasses.fields(VQGANRunConfig) if field.name != "reader"]
    assert not flags.keys() & {flag for group in groups for flag in flags_of(group)}
