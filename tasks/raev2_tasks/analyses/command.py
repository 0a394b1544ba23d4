"""`raev2 analyse NAME`: which analyses there are, and how the options of the command line reach them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from raev2.data import to_float
from raev2.errors import DataError, SpecError
from raev2.files.damage import damaged, read_json
from raev2.model.opened import GENERATOR, STAGES, find_source, open_trained
from raev2.spec import RunSpec
from raev2.spec_io import apply_overrides
from raev2.task import Command, check_known, get_data_recipe, get_recipe, get_task
from raev2.tokenizer.rae import RAE
from raev2.train_generator import latent_encoder
from raev2.training.run import make_accelerator
from raev2_tasks.analyses.blocks import block_table
from raev2_tasks.analyses.compare import plan_table
from raev2_tasks.analyses.correlation import PROPERTIES, correlation_table
from raev2_tasks.analyses.grid import finished_run
from raev2_tasks.analyses.guidance import Budget, guidance_table
from raev2_tasks.analyses.plans import PLANS
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
    parser.add_argument("--layers", type=int, nargs="+", metavar="K", help="probe, insight-1: numbers of last layers")
    parser.add_argument("--widths", type=int, nargs="+", metavar="D", help="width: widths of the network")
    parser.add_argument("--steps", type=int, default=300, help="width: training steps")
    parser.add_argument("--n", type=int, help="pictures; blocks: default 64; insight-3: those of the runs' evaluations")
    parser.add_argument(
        "--runs", nargs="+", metavar="DIR", help="insight-3: trained runs, one a seed (default: trains)"
    )
    parser.add_argument("--stage", choices=STAGES, default=GENERATOR, help="what trains: the last stage")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="what trains: seeds 0 to N - 1 (default: 3)")
    parser.add_argument(
        "--sampler-steps", type=int, nargs="+", default=(5, 10, 20), metavar="N", help="insight-3: what is measured"
    )
    parser.add_argument(
        "--choice",
        type=int,
        nargs=2,
        default=(10, 354),
        metavar=("STEPS", "N"),
        help="insight-3: sampler steps and pictures that scale and interval are chosen with",
    )
    parser.add_argument(
        "--points",
        metavar="FILE",
        help='correlation: JSON {"points": [{name, LP, LDS, outcome, ...}]} (default: published)',
    )
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
    """Pearson correlations of LP and LDS with generation, over the published encoders or those of --points."""
    if options.points:
        with damaged(options.points, DataError):
            points = read_json(Path(options.points), DataError)["points"]
            outcomes = [name for name in points[0] if name not in ("name", *PROPERTIES)]
            return correlation_table(points, outcomes, f"Points: {options.points}.")
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
    indices = range(min(options.n or 64, len(val)))
    images = torch.stack([val.image(i) for i in indices])
    latents = encode(images, torch.tensor(list(indices)))
    raw = {name: value.to(device) for name, value in task.eval_cond(spec, val, indices).items()}
    return block_table(generator, latents, task.cond_encoder(spec, encode, device)(raw), (0.2, 0.5, 0.8))


def _width(options: Namespace) -> Table:
    """Over-fit one image at several widths; --run (a run with an RAE tokenizer), --widths, --steps, --seeds."""
    trained = open_trained(find_source(options.run, options.task))
    if not isinstance(trained.rae, RAE):
        raise SpecError("raev2 analyse width", "needs a run with an RAE tokenizer", got=str(trained.run.dir))
    val = trained.task.dataset(trained.run.spec, "val")
    latents = trained.rae.encode(to_float(val.image(0)[None].to(trained.run.device)))[0]
    channels = latents.shape[0]
    widths = options.widths or [channels // 4, channels // 2, channels, 2 * channels]
    return width_table(latents, widths, options.seeds, steps=options.steps, depth=4, batch_size=16, lr=1e-3)


def _plan(options: Namespace) -> Table:
    """Variants of a recipe, trained with several seeds; --task, --recipe, --set, --seeds; insight-1: --layers."""
    more = [options.layers] if options.layers and options.name == "insight-1" else []
    plan = PLANS[options.name](_recipe(options), *more)
    return plan_table(options.name, plan, options.seeds, Path(options.out), options.stage)


def _recipe(options: Namespace) -> RunSpec:
    if options.task is None:
        raise SpecError("--task", "which task?", expected="--task T, and --recipe R for another than quickstart")
    return apply_overrides(get_recipe(get_task(options.task), options.recipe), options.overrides)


def _guidance(options: Namespace) -> Table:
    """Kinds of guidance at equal cost; --runs, or --task and --seeds to train them."""
    budget, out = Budget(tuple(options.sampler_steps), *options.choice), Path(options.out)
    runs = [Path(run) for run in options.runs or ()]
    if not runs:
        runs = [finished_run(_recipe(options).replace(seed=seed), out) for seed in range(options.seeds)]
    return guidance_table(runs, budget, out, options.n)


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
    "insight-3": _guidance,
    **dict.fromkeys(PLANS, _plan),
}

ANALYSE = Command("an analysis of the papers: writes a table (JSON, Markdown) and a plot (SVG)", _options, _analyse)
