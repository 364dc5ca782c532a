"""Messages that docs/troubleshooting.md quotes are those that the code prints."""

import re

import pytest

from helpers.tiny_runs import ROOT

TEXT = (ROOT / "docs" / "troubleshooting.md").read_text()
ELSEWHERE = {"RuntimeError: operator torchvision::nms does not exist"}  # from torchvision
LEAST = 4  # words from which a code span counts as a message


def source() -> str:
    """All code, with adjacent strings joined."""
    folders = ("models", "diffusion", "vq", "train", "experiments")
    text = "\n".join(path.read_text() for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return re.sub(r"""["']\s*\n?\s*(\+ )?\(?f?["']""", "", text)


def messages() -> list[str]:
    """Lines of text blocks, and code spans of tables and lists of at least LEAST words."""
    lines = [line for block in re.findall(r"^```text\n(.*?)^```", TEXT, re.M | re.S) for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S))
    spans = [span for span in spans if len(span.split()) >= LEAST and not span.startswith(("--", "pip ", "images/"))]
    return [*lines, *spans]


CODE = source()


def fragments(message: str) -> list[str]:
    """The parts of a message between its values."""
    parts = re.split(r"\.\.\.|\(--lr [^)]*\)", message)
    return [part for part in (part.strip(" ,;:`()'\"") for part in parts) if len(part) > 3]


@pytest.mark.parametrize("message", sorted(set(messages()) - ELSEWHERE))
def test_a_quoted_message_is_in_the_code(message):
    parts = fragments(message)
    assert parts, message
    for fragment in parts:
        assert fragment in CODE, f"{fragment!r} of {message!r}"


def test_there_are_messages_to_look_for():
    assert len(set(messages())) > 25
