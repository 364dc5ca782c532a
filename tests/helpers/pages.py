"""The README and the pages of docs/ as tests read them: code blocks, commands, code spans, links, anchors."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from helpers.tiny_runs import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```([\w-]*)\n(.*?)^```", re.M | re.S)
SHELL = ("", "sh", "bash", "shell", "console")
THEIRS = "| theirs |"  # begins a table that compares another system with ours, whose rows are theirs | ours | note


class Command(NamedTuple):
    """A script and its flags."""

    script: str
    flags: str

    def __str__(self) -> str:
        return f"{self.script} {self.flags}".strip()


class ComparisonRow(NamedTuple):
    """A row of a table that compares another system with ours."""

    id: str  # section-number-script
    theirs: str
    ours: str
    commands: tuple[str, ...]  # the code spans of `ours` that run a script


def comparison_rows(text: str) -> list[ComparisonRow]:
    """The rows of all tables of the columns theirs, ours and note; a cell has no vertical bar."""
    rows, section, number, inside = [], "", 0, False
    for line in text.splitlines():
        if line.startswith("## "):
            section, number = line[3:].removeprefix("The ").split()[0].lower(), 0
        inside = line.startswith(THEIRS) or inside and line.startswith("|")
        if not inside or line.startswith((THEIRS, "|---")):
            continue
        theirs, ours, _ = (cell.strip() for cell in line.strip().strip("|").split("|"))
        number += 1
        commands = tuple(span for span in spans(ours) if re.match(r"(python|torchrun) .*\.py\b", span))
        script = re.search(r"(\w+)\.py", commands[0])[1] if commands else ""
        id_ = "-".join(filter(None, (section, str(number), script)))
        rows.append(ComparisonRow(id_, theirs, ours, commands))
    return rows


def own_text(text: str) -> str:
    """The text without what names things of other systems in tables that compare."""
    lines, inside = [], False
    for line in text.splitlines():
        inside = line.startswith(THEIRS) or inside and line.startswith("|")
        if inside:
            line = "|" + line.split("|", 2)[2]
        lines.append(line)
    return "\n".join(lines) + "\n"


def blocks(text: str, *languages: str) -> list[str]:
    """The code blocks in these languages; "" is a block without one."""
    return [code for language, code in FENCE.findall(text) if language in languages]


def prose(text: str) -> str:
    """The text without code blocks."""
    return FENCE.sub("", text)


def words(text: str) -> int:
    """The number of words outside code blocks and tables."""
    lines = [line for line in prose(text).splitlines() if not line.lstrip().startswith("|")]
    return len(" ".join(lines).split())


def shell_lines(text: str) -> list[str]:
    """The lines of shell blocks, continued lines joined, comments left out."""
    lines = "\n".join(blocks(text, *SHELL)).replace("\\\n", " ").splitlines()
    return [
        " ".join(shlex.split(line, comments=True)) for line in lines if re.match(r"(python|torchrun|make|pip) ", line)
    ]


def commands(text: str) -> list[Command]:
    """The scripts that `python` and `torchrun` run, in the order of the page, without `python -m`."""
    result = []
    for line in shell_lines(text):
        program, *rest = line.split()
        index = next((i for i, word in enumerate(rest) if word.endswith(".py")), None)
        if program in ("python", "torchrun") and index is not None:
            result.append(Command(rest[index], " ".join(rest[index + 1 :])))
    return result


def files_written(text: str) -> set[Path]:
    """The files that a page writes out: Python blocks whose first line has the comment `# path/to/file.py`."""
    first_lines = [code.partition("\n")[0] for code in blocks(text, "python")]
    return {Path(match[1]) for line in first_lines if (match := re.search(r"# ([\w/.]+\.py)\b", line))}


def spans(text: str) -> list[str]:
    """The code spans of the prose, tables included."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text))


def links(text: str) -> list[str]:
    """The targets of links and pictures within the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(text)))
    return [target for target in targets if not re.match(r"\w+:", target)]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    slugs: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(path.read_text()), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 1
        while slug in slugs:
            slug, number = f"{slug.removesuffix(f'-{number - 1}')}-{number}", number + 1
        slugs.add(slug)
    return slugs


def flags_named(text: str) -> set[str]:
    """The flags in code spans and in commands, without dashes and a leading no_.

    Our flags have underscores; flags with a hyphen belong to other programs.
    """
    texts = [span for span in spans(text) if not re.match(r"(pip|git|sbatch|srun|torchrun|docker) ", span)]
    texts += [command.flags for command in commands(text)]
    names = {flag for each in texts for flag in re.findall(r"(?:^|\s)--([A-Za-z_]\w*)(?![\w-])", each)}
    return {flag.removeprefix("no_") for flag in names}
