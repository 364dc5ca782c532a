"""The contract of every entry of SOLVERS, and a new solver in a file of its own."""

import importlib.util
import inspect
import sys
from dataclasses import dataclass, fields, is_dataclass

import pytest
import torch

import diffusion
from diffusion.absorbing import AbsorbingDiffusion
from diffusion.autoregressive import Autoregression
from diffusion.edm import EDM
from diffusion.flow import RectifiedFlow
from diffusion.gaussian import GaussianDiffusion, cosine
from diffusion.process import ContinuousProcess, DiscreteProcess
from diffusion.rng import Streams
from diffusion.solvers import Solver, SolverOptions, all_solvers, solver_options_for, solvers_for
from diffusion.types import Prediction
from experiments.harness.controls import make_controls
from helpers.solving import solve_in_steps
from train.cli import parse as cli
from train.samplers import absorbing, select_solver

ENTRIES = {f"{entry.process.__name__}-{entry.name}": entry for entry in all_solvers()}
PROCESSES = [
    *(AbsorbingDiffusion(3, 4), Autoregression(3), GaussianDiffusion(cosine(6)), EDM(), RectifiedFlow()),
]
every_entry = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


def processes_for(entry):
    return [process for process in PROCESSES if isinstance(process, entry.process)]


def denoiser(process):
    """A constant denoiser, continuous or of codes."""
    if isinstance(process, ContinuousProcess):
        return lambda x, t: process.with_x0(Prediction(x, x), torch.zeros_like(x), x, t)
    if isinstance(process, Autoregression):
        return lambda x, t, rows: torch.zeros(len(x), process.codes)
    return lambda x, t, rows=None: torch.zeros(*x.shape, process.codes)


@every_entry
def test_options_of_an_entry_are_keywords_of_its_solver(entry):
    parameters = inspect.signature(entry.solve).parameters
    assert list(parameters)[:4] == ["denoise", "process", "x", "times"]
    keywords = {name for name, parameter in parameters.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    is_discrete = not issubclass(entry.process, ContinuousProcess)
    assert keywords == {"rng", "on_step", *entry.option_names} | ({"warper"} if is_discrete else set())
    assert issubclass(entry.options, SolverOptions) and is_dataclass(entry.options)
    assert all(field.default is None for field in fields(entry.options))  # None leaves the choice to the solver
    assert entry.solve.__doc__


@every_entry
def test_an_entry_runs_by_its_own_number_of_steps(entry):
    assert processes_for(entry)
    for process in processes_for(entry):
        shape = (2, 1, 2, 2) if isinstance(process, ContinuousProcess) else (2, 2, 2)
        x = process.prior(shape, Streams([0, 1]))
        samples = solve_in_steps(entry.solve, denoiser(process), process, x, rng=Streams([2, 3]))
        assert samples.shape == x.shape and samples.isfinite().all()
        if not isinstance(process, ContinuousProcess):
            assert (samples < process.codes).all()


@every_entry
def test_a_solver_that_leaves_no_choice_of_steps_says_so(entry):
    for process in processes_for(entry) if not entry.takes_any_steps else []:
        assert entry.steps(process, 12) == 12
        x = process.prior((1, 2, 2), Streams([0]))
        with pytest.raises(ValueError, match=f"{entry.name} takes 4 steps on this grid, got 3"):
            solve_in_steps(entry.solve, denoiser(process), process, x, steps=3, rng=Streams([0]))


def test_a_name_that_is_used_twice_for_one_process_is_refused(monkeypatch):
    def ancestral(denoise, process, x, times, *, rng, on_step=None):
        return x

    double = (*all_solvers(), Solver(ancestral, DiscreteProcess))
    monkeypatch.setattr("diffusion.solvers.all_solvers", lambda: iter(double))
    with pytest.raises(ValueError, match="define a solver ancestral of AbsorbingDiffusion: rename one"):
        solvers_for(AbsorbingDiffusion(2))
    assert "raster" in solvers_for(Autoregression(2))


def test_an_option_that_two_classes_have_is_refused(monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Mine(SolverOptions):
        eta: float | None = None

    def mine(denoise, process, x, times, *, rng, on_step=None, eta=1.0):
        return x

    double = (*all_solvers(), Solver(mine, ContinuousProcess, Mine))
    monkeypatch.setattr("diffusion.solvers.all_solvers", lambda: iter(double))
    with pytest.raises(ValueError, match="EtaOptions and Mine define an option eta"):
        solver_options_for(ContinuousProcess)
    assert len(solver_options_for(AbsorbingDiffusion)) == 2


CONSTANT_SOLVER = '''
from dataclasses import dataclass

import torch

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.logits_warper import NO_WARP
from diffusion.solvers import Solver, SolverOptions


@dataclass(frozen=True, kw_only=True)
class ConstantOptions(SolverOptions):
    """Of `constant`."""

    constant_code: int | None = None
    """constant: the code that is drawn everywhere (1)."""


def constant(denoise, process, x, times, *, rng, on_step=None, warper=NO_WARP, constant_code=1):
    """Draws one code everywhere."""
    return torch.where(x == process.mask, constant_code, x)


SOLVERS = (Solver(constant, AbsorbingDiffusion, ConstantOptions, schedule="square"),)
'''


@pytest.fixture
def plugin_module(tmp_path, monkeypatch):
    """Adds a file to diffusion/ and reloads the module of the sampler."""
    (tmp_path / "constant_solver.py").write_text(CONSTANT_SOLVER)
    monkeypatch.setattr(diffusion, "__path__", [*diffusion.__path__, str(tmp_path)])
    spec = importlib.util.spec_from_file_location("absorbing_reloaded", absorbing.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "absorbing_reloaded", module)
    spec.loader.exec_module(module)
    yield module
    monkeypatch.delitem(sys.modules, "diffusion.constant_solver")


def test_a_solver_with_an_option_is_one_file(plugin_module, capsys):
    small = plugin_module.Config(bert_n_emb=8, bert_n_head=2, bert_n_layers=1)
    sampler = plugin_module.build(small, codes=4, grid=(2, 3), n_classes=0)
    arguments = ["--solver", "constant", "--constant_code", "3"]
    options = cli.parse_arguments(plugin_module.Sampling, arguments, default=plugin_module.Sampling())
    assert (sampler.sample(sampler.network, Streams([0]), options=options) == 3).all()
    assert (sampler.sample(sampler.network, Streams([0]), options=plugin_module.Sampling(solver="constant")) == 1).all()
    assert cli.flatten_group(options)["constant_code"] == 3  # config.yaml
    controls = make_controls(options, ["constant"], True, True, True, True)
    (control,) = [each for each in controls if each.name == "constant_code"]
    assert (control.kind, control.value, control.optional) == ("integer", 3, True)
    assert control.help == "constant: the code that is drawn everywhere (1)."
    with pytest.raises(SystemExit):
        cli.parse_arguments(plugin_module.Sampling, ["--help"], default=plugin_module.Sampling())
    assert "the code that is drawn everywhere" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    with pytest.raises(
        ValueError, match="got constant_code 3 for solver ancestral, which has no such option: leave --const"
    ):
        select_solver(sampler.process, plugin_module.Sampling(constant_code=3))
    assert options.with_solver("ancestral").constant_code is None  # an option is dropped with its solver
    assert sampler.sampling_process(select_solver(sampler.process, options)[0], options).schedule == "square"
