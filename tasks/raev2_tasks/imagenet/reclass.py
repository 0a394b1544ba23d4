"""`raev2 imagenet reclass`: a trained generator for other classes, as what a fine-tuning starts from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from raev2.command.actions import print_table, source_of
from raev2.command.cli import source_options
from raev2.errors import SpecError
from raev2.files.manifest import read_manifest
from raev2.files.replace import ARTEFACT, check_replaceable
from raev2.model.condition import LabelCondition
from raev2.model.generator import Generator
from raev2.model.opened import open_trained


def reclass(argv: Sequence[str]) -> None:
    """Give a generator the classes of a dataset: those of the same name are kept, others begin anew."""
    parser = argparse.ArgumentParser("raev2 imagenet reclass", description=reclass.__doc__)
    source_options(parser, own=("--task",))
    parser.add_argument("--classes", required=True, metavar="DIR", help="dataset folder with the classes to be")
    parser.add_argument("--out", required=True, metavar="DIR", help="generator artefact to write")
    parser.add_argument("--seed", type=int, default=0, help="of the new classes")
    options = parser.parse_args(argv)
    check_replaceable(Path(options.out), ARTEFACT, overwrite=False)
    wanted = read_manifest(options.classes)["classes"]
    trained = open_trained(source_of(options, "imagenet"))
    known = trained.names().classes
    with_classes(trained.need_generator(), known, wanted, options.seed).save_pretrained(options.out)
    rows = [(name, "kept" if name in known else "new") for name in wanted]
    rows += [(name, "dropped") for name in known if name not in wanted]
    print_table(("class", "what becomes of it"), rows)
    print(f"\n{options.out}: train on with --set generator_from={options.out} and tokenizer_from of the same model")


def with_classes(generator: Generator, known: Sequence[str], wanted: Sequence[str], seed: int = 0) -> Generator:
    """The generator with a label table for `wanted`: rows of `known` names and the null row kept, others N(0, 0.02)."""
    condition = generator.condition_spec
    if not isinstance(condition, LabelCondition) or not wanted:
        raise SpecError("raev2 imagenet reclass", "needs class labels, in the generator and in the data")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = Generator(
            generator.network_spec, condition.replace(num_classes=len(wanted)), generator.flow,
            generator.latent_shape, generator.extra,
        )  # fmt: skip
    state, table = generator.state_dict(), "conditioner.table.weight"
    rows = new.state_dict()[table].clone()
    for label, name in enumerate(wanted):
        if name in known:
            rows[label] = state[table][list(known).index(name)]
    rows[-1] = state[table][-1]
    new.load_state_dict({**state, table: rows})
    return new.eval()
