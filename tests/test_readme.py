"""README.md and config.example.yaml say what the program does."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

import teckochecker as tc

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = (
    (ROOT / "config.example.yaml")
    .read_text(encoding="utf-8")
    .replace("batch_YOUR_ID", "batch_abc123")
)
# What the README's parts of a config refer to.
AROUND = """
secrets:
  openai-prod: {type: openai, value: x}
  keboola-prod: {type: keboola, value: x, stack_url: https://connection.keboola.com}
  alerts: {type: webhook, value: x}
defaults: {openai_secret: openai-prod, keboola_secret: keboola-prod, component_id: a}
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def problems(text: str) -> list[str]:
    return [str(problem) for problem in tc.parse_config(text, Path("config.yaml"))[1]]


def uncommented(text: str) -> str:
    """The example with all that is optional, but for what excludes something that is there."""
    excluded = r"env|file|group_size"
    lines = re.sub(rf"(?m)^ *#   # ({excluded}):.*\n|^ *# ({excluded}):.*\n", "", text)
    return re.sub(r"(?m)^( *)# ( *(?:[a-z_-]+:|- \{))", r"\1\2", lines)


def test_the_readme_is_short() -> None:
    """A stranger reads it to its end."""
    assert len(README.encode()) <= 16_384


def test_the_first_config_has_twelve_lines() -> None:
    """It is a whole one."""
    first = blocks("yaml")[0]
    assert (len(first.splitlines()), problems(first)) == (12, [])


@pytest.mark.parametrize("block", [b for b in blocks("yaml")[1:] if not b.startswith("- alert")])
def test_each_part_of_a_config_is_one(block: str) -> None:
    """Pasted into a config, the program takes it."""
    jobs = "" if "jobs:" in block else "jobs: {}\n"
    assert problems(f"{AROUND}{block}{jobs}") == []


def test_json_and_python_can_be_read() -> None:
    """What is there to be pasted has no mistake of form."""
    for text in blocks("json"):
        json.loads(text)
    for text in blocks("python"):
        ast.parse(text)
    variables = re.search("configuration='(.*?)'", README, re.DOTALL)
    assert variables
    assert json.loads(variables[1])["variables"]


def test_every_command_is_named() -> None:
    """Commands and exit codes are all there, and no file that it links to is missing."""
    table = README.partition("\n## Commands\n")[2]
    assert [name for name in tc.COMMANDS if f"`{name}" not in table] == []
    told = re.findall(r"Exit codes: (.*?)\.\n(?:\n|\Z)", f"{tc.__doc__}{table}", re.DOTALL)
    assert [text.split() for text in told] == [told[0].split()] * 2
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_example_has_every_key_and_its_default() -> None:
    """Also what is commented out is right; without "e.g." it is what counts without it."""
    text = uncommented(EXAMPLE)
    assert problems(EXAMPLE) == problems(text) == []
    below = [known for known in tc.TOP_KEYS.values() if isinstance(known, Mapping)]
    groups = [tc.TOP_KEYS, tc.JOB_KEYS, *below, *tc.SECRET_KEYS.values()]
    keys = {key for known in groups for key in known}
    keys |= {"type", "value", "env", "file", "secret", "events"}
    assert [key for key in keys if not re.search(rf"\b{key}: ?", EXAMPLE)] == []
    config = tc.parse_config(text, Path("config.yaml"))[0]
    places: list[Any] = [config, *config.jobs.values(), config.secrets["openai-prod"]]
    shown = {*re.findall(r"(?m)^ *# +([a-z_]+): (?!.*e\.g\.)", EXAMPLE)} - {"match", "since"}
    for place in places:
        for field in fields(place):
            if field.name.removeprefix("log_") in shown and field.default is not MISSING:
                assert getattr(place, field.name) == field.default, field.name
