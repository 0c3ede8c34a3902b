"""Counts as people write them, and options that are declared once."""

import inspect
import subprocess
import sys
from typing import Any

import pytest
import typer.main

from potstill.cli.app import app
from potstill.cli.commands.arena import arena, parse_seeds
from potstill.cli.options import read_options
from potstill.core.counts import format_count, parse_count
from potstill.core.errors import UsageError
from potstill.core.options import SEED, list_options
from potstill.stages.arena.arena import Arena
from potstill.stages.cache_teacher import CacheTeacherConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.ensemble import AVERAGE
from potstill.stages.doctor import Doctor
from potstill.stages.generate_dataset import GenerateDatasetConfig
from potstill.stages.generate_options import GenerateDatasetOptions
from potstill.stages.measure import MeasureConfig
from potstill.stages.options import (
    ArenaOptions,
    CacheTeacherOptions,
    DistillOptions,
    DoctorOptions,
    MeasureOptions,
    PlanOptions,
    PruneOptions,
)
from potstill.stages.plan.plan import Plan
from potstill.stages.prune import PruneConfig
from potstill.teachers.served import TOP_K
from potstill.train.rollouts.config import RolloutConfig
from potstill.transforms.fit import AUTO

GROUP: Any = typer.main.get_command(app)


@pytest.mark.parametrize(
    ("text", "number"),
    [("200", 200), ("200k", 200_000), ("60M", 60_000_000), ("1.5G", 1_500_000_000), ("1_000", 1000), ("7b", 7 * 10**9)],
)
def test_a_count_has_a_unit(text: str, number: int) -> None:
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["", "0", "-3", "k", "2T", "1e3", "two", "1.2.3", "0.0004k"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(UsageError, match="is not a count"):
        parse_count(text)


def test_a_number_is_a_count_already() -> None:
    assert (parse_count(5), parse_count(None)) == (5, None)


@pytest.mark.parametrize(("number", "text"), [(200_000, "200k"), (2_000_000, "2M"), (1500, "1500"), (None, None)])
def test_a_count_is_written_in_its_largest_unit(number: int | None, text: str | None) -> None:
    assert format_count(number) == text
    assert parse_count(text) == number


DECLARED: dict[str, tuple[type, type]] = {  # the options and the config of each verb
    "distill": (DistillOptions, DistillConfig),
    "plan": (PlanOptions, Plan),
    "arena": (ArenaOptions, Arena),
    "doctor": (DoctorOptions, Doctor),
    "prune": (PruneOptions, PruneConfig),
    "cache": (CacheTeacherOptions, CacheTeacherConfig),
    "generate": (GenerateDatasetOptions, GenerateDatasetConfig),
    "measure": (MeasureOptions, MeasureConfig),
}
ARGUMENTS = {"prune": ["m"], "generate": ["m"], "measure": ["m"]}


@pytest.mark.parametrize("verb", DECLARED)
def test_a_verb_has_the_defaults_and_help_of_its_config(verb: str) -> None:
    options_class, config_class = DECLARED[verb]
    declared = {option.name: option.option for option in list_options(options_class)}
    assert {option.name: option.option for option in list_options(config_class)} == declared
    command = GROUP.commands[verb]
    needed = ["--out", "o"] if any(p.name == "out" and p.required for p in command.params) else []
    values = command.make_context(verb, [*ARGUMENTS.get(verb, []), *needed]).params
    shared = set(values) & set(declared) - {"teacher"}
    assert {"data", "columns", "device", "dtype", "allow_pickle", "trust_remote_code"} <= shared | {"data"}
    read = read_options(options_class, values)
    fields = {option.name: option.field for option in list_options(options_class)}
    for name in shared - {"report_to", *({"data"} - set(read))}:
        value = parse_count(values[name]) if declared[name].is_count else read.get(fields[name], values[name])
        assert value == declared[name].default, name
    texts = {p.name: (p.help or "").replace(r"\[", "[") for p in command.params if p.name in shared}
    different = {name for name, text in texts.items() if text != declared[name].help}
    assert different <= {"student", "data"}


def test_every_default_of_distill_is_that_of_its_config() -> None:
    values = GROUP.commands["distill"].make_context("distill", ["--out", "o", "--teacher", "t", "--keep", "0.5"]).params
    for name in ("tokens", "params"):
        values[name] = parse_count(values[name])
    assert DistillConfig.from_options(values) == DistillConfig(teacher="t", keep=0.5)


def test_the_defaults_of_distill_are_those_of_the_parts_it_uses() -> None:
    assert DistillConfig.top_k == TOP_K
    assert DistillConfig.combine == AVERAGE
    assert DistillConfig.rollout == RolloutConfig.name
    assert DistillConfig.strategy == AUTO
    assert Arena.seeds == parse_seeds(inspect.signature(arena).parameters["seeds"].default, SEED.default)


def test_the_options_that_the_command_line_reads_bring_no_torch() -> None:
    code = "import sys, potstill.cli.app, potstill.stages.options; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "transformers", "numpy"} & set(done.stdout.split())
