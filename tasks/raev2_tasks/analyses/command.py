"""`raev2 analyse NAME`: which analyses there are, and how the options of the command line reach them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from raev2.data import to_float
from raev2.errors import DataError, SpecError
from raev2.model.opened import find_source, open_trained
from raev2.spec_io import apply_overrides
from raev2.task import Command, check_known, get_data_recipe, get_recipe, get_task
from raev2.tokenizer.rae import RAE
from raev2.train_generator import latent_encoder
from raev2.training.run import make_accelerator
from raev2_tasks.analyses.ablations import run_ablation
from raev2_tasks.analyses.blocks import block_table
from raev2_tasks.analyses.correlation import correlation_table
from raev2_tasks.analyses.probe import probe_encoders
from raev2_tasks.analyses.table import Table
from raev2_tasks.analyses.width import width_table
from raev2_tasks.report.published import published_encoders


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help=", ".join(ANALYSES))
    parser.add_argument("--task", help="use the newest run of this task")
    parser.add_argument("--run", metavar="DIR", help="run folder")
    parser.add_argument("--recipe", default="quickstart", help="recipe that is varied (default: quickstart)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--data", default="emoji", metavar="DIR", help="labelled dataset folder or data recipe")
    parser.add_argument("--encoder", nargs="+", metavar="NAME", help="probe: encoders (default: micro)")
    parser.add_argument("--grid", type=int, nargs=2, default=(8, 8), metavar=("ROWS", "COLS"), help="probe: tokens")
    parser.add_argument("--layers", type=int, nargs="+", metavar="K", help="probe: numbers of last layers")
    parser.add_argument("--widths", type=int, nargs="+", metavar="D", help="width: widths of the network")
    parser.add_argument("--steps", type=int, default=300, help="width: training steps")
    parser.add_argument("--n", type=int, default=64, help="blocks: number of images")
    parser.add_argument("--out", metavar="DIR", default="analysis")


def _analyse(options: Namespace) -> None:
    check_known("raev2 analyse", "unknown analysis", options.name, ANALYSES)
    table = ANALYSES[options.name](options)
    table.write(Path(options.out))
    print(f"{table.markdown()}\nwritten to {options.out}/{table.name}.*")


def _probe(options: Namespace) -> Table:
    """LP and LDS of encoders by number of layers; --encoder, --data, --grid, --layers."""
    data = _labelled_data(options)
    counts = options.layers or list(range(1, 100))
    device = make_accelerator("fp32").device
    return probe_encoders(data, options.encoder or ["micro"], tuple(options.grid), counts, device)


def _correlation(options: Namespace) -> Table:
    """Pearson correlations over the published encoders: LP, LDS and gFID of RAE and RAEv2."""
    return correlation_table(
        published_encoders(), ("gFID RAE", "gFID RAEv2"), "Published values of the RAEv2 study, quoted."
    )


def _blocks(options: Namespace) -> Table:
    """CKA and spatial self-similarity of the blocks of a trained run; --run, --n."""
    trained = open_trained(find_source(options.run, options.task))
    generator = trained.need_generator()
    spec, task, device = trained.run.spec, trained.task, trained.run.device
    val = task.dataset(spec, "val")
    encode = latent_encoder(trained.rae, device)
    indices = range(min(options.n, len(val)))
    images = torch.stack([val.image(i) for i in indices])
    latents = encode(images, torch.tensor(list(indices)))
    raw = {name: value.to(device) for name, value in task.eval_cond(spec, val, indices).items()}
    return block_table(generator, latents, task.cond_encoder(spec, encode, device)(raw), (0.2, 0.5, 0.8))


def _width(options: Namespace) -> Table:
    """Over-fit one image at several widths; --run (a run with an RAE tokenizer), --data, --widths, --steps."""
    trained = open_trained(find_source(options.run, options.task))
    if not isinstance(trained.rae, RAE):
        raise SpecError("raev2 analyse width", "needs a run with an RAE tokenizer", got=str(trained.run.dir))
    val = trained.task.dataset(trained.run.spec, "val")
    latents = trained.rae.encode(to_float(val.image(0)[None].to(trained.run.device)))[0]
    channels = latents.shape[0]
    widths = options.widths or [channels // 4, channels // 2, channels, 2 * channels]
    return width_table(latents, widths, steps=options.steps, depth=4, batch_size=16, lr=1e-3)


def _ablation(options: Namespace) -> Table:
    """Variants of a recipe, trained; --task, --recipe."""
    if options.task is None:
        raise SpecError("--task", "which task?", expected="--task T, and --recipe R for another than quickstart")
    spec = apply_overrides(get_recipe(get_task(options.task), options.recipe), options.overrides)
    return run_ablation(options.name, spec, Path(options.out))


def _labelled_data(options: Namespace) -> Path:
    """The dataset folder of --data; with a data recipe's name in place of a folder, it is built."""
    folder = Path(options.data)
    if not (folder / "manifest.json").is_file():
        if folder.exists() or len(folder.parts) > 1:
            raise DataError(
                f"data {folder}", "no dataset folder here", expected="a folder with manifest.json, or a data recipe"
            )
        recipe, folder = get_data_recipe(options.data), Path("data") / options.data
        if not (folder / "manifest.json").is_file():
            recipe.build(folder, {})
    return folder


ANALYSES: dict[str, Callable[[Namespace], Table]] = {
    "probe": _probe,
    "correlation": _correlation,
    "blocks": _blocks,
    "width": _width,
    **dict.fromkeys(("layers", "time-shift", "decoder-noise"), _ablation),
}

ANALYSE = Command("an analysis of the papers: writes a table (JSON, Markdown) and a plot (SVG)", _options, _analyse)
