"""Classes by registered name and by dotted path."""

import sys
import types

import pytest
from torch import nn

from models.blocks import ConditionBlock, EmbedBlock, ResBlock
from models.registry import resolve_class

KNOWN = {"basic": ResBlock}


class Mine(EmbedBlock):
    def forward(self, x, emb=None):
        return x


class Unfinished(EmbedBlock):
    pass


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """Modules `mine` and `mine.blocks`, as a user would have them."""
    for name in ("mine", "mine.blocks"):
        module = types.ModuleType(name)
        module.Mine, module.Unfinished, module.Linear, module.number = Mine, Unfinished, nn.Linear, 3
        monkeypatch.setitem(sys.modules, name, module)


def resolve(name, contract=(EmbedBlock,)):
    return resolve_class(name, KNOWN, contract, "res_block_type")


def test_a_registered_name_is_its_class():
    assert resolve("basic") is ResBlock


@pytest.mark.parametrize("name", ["mine.Mine", "mine.blocks.Mine"])
def test_a_dotted_path_is_the_class_there(name):
    assert resolve(name) is Mine
    assert resolve(name, (ConditionBlock, EmbedBlock)) is Mine


WRONG = {
    "basics": r"got res_block_type 'basics': there are basic, and any subclass of EmbedBlock as package.module.Class",
    "nowhere.Mine": "there is no module nowhere",
    "mine.nowhere.Mine": "there is no module mine.nowhere",
    "mine.Yours": "mine has no such name",
    "mine.Linear": "Linear'>, which is no subclass of EmbedBlock",
    "mine.number": "mine has 3, which is no subclass of EmbedBlock",
    "mine.Unfinished": "Unfinished does not define forward",
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_say_what_is_wrong_with_a_name(name):
    with pytest.raises(ValueError, match=WRONG[name]):
        resolve(name)


def test_a_class_with_the_wrong_base_is_rejected():
    with pytest.raises(ValueError, match="no subclass of ConditionBlock;"):
        resolve("mine.Mine", (ConditionBlock,))


def test_missing_imports_of_a_users_module_are_not_masked(tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text("import something_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_not_installed"):
        resolve("needy.Mine")
