"""What a user sees who types something wrong: one line, an exit code, and nothing lost."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from raev2 import __version__, pipeline
from raev2.batch import MetricResult
from raev2.command import actions
from raev2.command.actions import print_table
from raev2.command.cli import COMMANDS, main, parser
from raev2.errors import CheckpointError, DataError, FileError, RaeError, SpecError, TaskError
from raev2.files import plugins
from raev2.files.plugins import installed
from raev2.task import Command, get_command

TRAIN = ["train", "--task", "imagenet"]


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Runs a command in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def refused(cli):
    """Checks that a command prints one line and exits with this code; the line."""

    def run(code: int, *argv: object) -> str:
        before = sorted(Path().rglob("*"))
        found, out, err = cli(*argv)
        assert (found, out) == (code, ""), err
        assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
        assert sorted(Path().rglob("*")) == before, "a refused command writes nothing"
        return err.removeprefix("error: ").strip()

    return run


@pytest.fixture
def run_copy(trained_run, tmp_path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "runs" / "imagenet" / "tiny"))


def test_each_class_of_error_has_its_exit_code():
    codes = {error: error.exit_code for error in (SpecError, DataError, CheckpointError, TaskError, FileError)}
    assert list(codes.values()) == [2, 3, 4, 5, 6]


# 5: tasks and plugins.


def test_an_unknown_task(refused):
    assert refused(5, "train", "--task", "imagenett") == (
        "--task: unknown task; got 'imagenett'; expected one of imagenet, nwm, t2i. Did you mean 'imagenet'?"
    )
    assert refused(5, "eval", "--task", "imagenett").startswith("--task: unknown task")
    assert refused(5, "recipes", "--task", "imagenett").startswith("--task: unknown task")


def test_an_unknown_data_recipe(refused):
    message = refused(5, "data", "build", "emojy")
    assert "unknown data recipe; got 'emojy'; expected one of " in message and "Did you mean 'emoji'?" in message


# 2: specs and options.


def test_an_unknown_recipe(refused):
    message = refused(2, *TRAIN, "--recipe", "quikstart")
    assert message.startswith("--recipe: unknown recipe of task imagenet; got 'quikstart'; expected one of quickstart,")
    assert message.endswith("Did you mean 'quickstart'?")
    assert refused(2, "show", "quikstart") == (
        "raev2 show: unknown recipe; got 'quikstart'. Did you mean 'quickstart'?"
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("generator.widht=3", "spec.generator.widht: unknown field. Did you mean 'width'?"),
        ("generator.width=wide", "spec.generator.width: not valid; got 'wide'; expected input should be a valid int"),
        ("sampling.steps=0", "spec.sampling.steps: not valid; got 0; expected input should be greater than 0"),
        ("generator.width=250", "spec.generator: generator.width must be divisible by num_heads; got width=250, num"),
        ("seed", "--set: cannot be read; got 'seed'; expected path.to.field=value"),
        ("seed=[", "--set: the value is not YAML; got 'seed=['"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be(refused, setting, message):
    assert refused(2, *TRAIN, "--set", setting).startswith(message)
    assert refused(2, "show", "quickstart", "--task", "imagenet", "--set", setting).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance", "none", "--scale", "2"], "--scale: has no effect with guidance none"),
        (["--guidance", "none", "--interval", "0", "1"], "--interval: has no effect with guidance none"),
        (["--guidance", "cfg", "--scale", "2", "--weak", "x"], "--weak: has no effect with guidance cfg"),
        (["--guidance", "cfg"], "--scale: guidance cfg: field required"),
        (["--guidance", "auto"], "--weak: guidance auto: field required"),
        (["--interval", "0", "2"], "--interval: guidance internal: input should be less than or equal to 1; got [0."),
        (["--interval", "0.5", "0.5"], "--interval: guidance internal: empty interval; got [0.5, 0.5]; expected low"),
        (["--steps", "0"], "--steps: not usable; got 0; expected a number >= 1"),
        (["--n", "0"], "--n: not usable; got 0; expected a number >= 1"),
        (["--prompt", "a cat"], "--prompt: no option of `raev2 sample` for task imagenet; expected one of --label"),
        (["--label", "sqare"], "--label: unknown class; got 'sqare'; expected a class name or an index below 4. Did"),
        (["--label", "4"], "--label: unknown class; got '4'; expected a class name or an index below 4"),
    ],
)  # fmt: skip
def test_options_of_sample_that_cannot_be(refused, run_copy, options, message):
    assert refused(2, "sample", "--run", run_copy, *options).startswith(message)


def test_a_folder_that_exists_is_not_written_to(refused, run_copy, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.png").touch()
    for command in (["sample", "--run", run_copy], ["reconstruct", "--run", run_copy, "picture.png"]):
        message = refused(2, *command, "--out", "out")
        assert message == "--out: exists already; got out. Choose another folder, or add --overwrite."


def test_a_command_needs_to_know_which_run(refused):
    assert refused(2, "eval") == "--run: which run?; expected --run DIR, or --task T for its newest run"


def test_an_unknown_protocol(refused, run_copy):
    message = refused(2, "eval", "--run", run_copy, "--protocol", "generation-mikro")
    assert message.startswith("--protocol: unknown protocol of task imagenet; got 'generation-mikro'; expected one of")
    assert message.endswith("Did you mean 'generation-micro'?")


def test_what_stage_2_cannot_do_is_found_before_stage_1(refused, tiny_recipe):
    command = [*TRAIN, "--recipe", "tiny", "--run", "new", "--set"]
    message = refused(2, *command, "generator_training.repa.encoder.name=micro")
    assert message.startswith("spec: the alignment loss and the network's projector belong together")
    for field in ("protocols", "in_training"):
        message = refused(2, *command, f"evaluation.{field}=[generation-mikro]")
        assert message.startswith("--protocol: unknown protocol of task imagenet; got 'generation-mikro'")


# 3: data.


def test_missing_data(refused, tiny_recipe):
    messages = [
        refused(3, *TRAIN, "--recipe", "tiny", "--set", "data.dir=nowhere", "--set", "data.recipe=null"),
        refused(3, *TRAIN, "--recipe", "tiny", "--data", "nowhere"),
    ]
    assert set(messages) == {
        "data nowhere: no dataset folder here; expected a folder with manifest.json. "
        "Build it with `raev2 data build RECIPE --out DIR`; `raev2 data list` shows the recipes."
    }


def test_damaged_data(refused, synthetic_data, tmp_path):
    shutil.copytree(synthetic_data, tmp_path / "data")
    (tmp_path / "data" / "train" / "000003.png").write_bytes(b"")
    assert refused(3, "data", "verify", "data").startswith("data data/train/000003.png: SHA-256 differs; got ")


def test_missing_pictures(refused, run_copy, tmp_path):
    assert refused(3, "reconstruct", "--run", run_copy, "nowhere.png") == "nowhere.png: no such file or folder"
    (tmp_path / "notes.txt").write_text("x")
    message = refused(3, "reconstruct", "--run", run_copy, "notes.txt")
    reason = "notes.txt: cannot be read as an image; got UnidentifiedImageError"
    assert message == f"notes.txt: none of 1 pictures can be read; got {reason}"
    (tmp_path / "empty").mkdir()
    expected = "empty: no images here; expected files of a format that Pillow reads"
    assert refused(3, "reconstruct", "--run", run_copy, "empty") == expected
    (tmp_path / "empty" / "notes.txt").write_text("x")
    message = refused(3, "reconstruct", "--run", run_copy, "empty")
    assert message.startswith("empty: no images here; got no picture (.txt): 1; expected files")


# 4: checkpoints and runs.


def test_a_folder_that_is_not_a_run(refused, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for command in ("sample", "eval", "report"):
        for folder in ("elsewhere", "nowhere"):
            message = refused(4, command, "--run", folder)
            expected = "a run folder with spec.yaml, or a pipeline with pipeline.json"
            assert message == f"{folder}: neither a run folder nor a pipeline; expected {expected}"


def test_no_run_of_a_task_yet(refused):
    assert refused(4, "report", "--task", "imagenet") == (
        "runs/imagenet: no run of this task yet. Start one with `raev2 train --task imagenet`."
    )


def test_a_checkpoint_of_another_program(refused, run_copy, tiny_recipe, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "foreign" / "model.safetensors").touch()
    for command in (
        ["reconstruct", "--run", "foreign", "picture.png"],
        [*TRAIN, "--recipe", "tiny", "--set", "tokenizer_from=foreign"],
    ):
        message = refused(4, *command)
        assert message == "foreign: wrong kind of artefact; got a config.json of another program; expected tokenizer"
    message = refused(4, "reconstruct", "--run", run_copy / "generator", "picture.png")
    assert message.endswith("generator: wrong kind of artefact; got generator; expected tokenizer")
    message = refused(4, "sample", "--run", run_copy, "--guidance", "auto", "--weak", run_copy / "tokenizer")
    assert message.endswith("tokenizer: wrong kind of artefact; got tokenizer; expected generator")


def test_a_run_that_is_not_trained_yet(refused, run_copy):
    shutil.rmtree(run_copy / "generator")
    shutil.rmtree(run_copy / "checkpoints")
    assert refused(4, "sample", "--run", run_copy).endswith(
        "has no trained generator yet. Run `raev2 train --task imagenet` with this --run."
    )
    shutil.rmtree(run_copy / "tokenizer")
    for command in (["sample"], ["eval"], ["reconstruct", "picture.png"]):
        message = refused(4, *command, "--run", run_copy)
        assert message.endswith("tokenizer is not trained yet. Continue the run with the same `raev2 train` command.")


def test_a_run_folder_of_another_spec(refused, run_copy, tiny_recipe):
    command = [*TRAIN, "--recipe", "tiny", "--run", run_copy]
    message = refused(4, *command, "--set", "generator.depth=3")
    assert "written for spec fingerprint " in message and "(generator.depth 2 -> 3)" in message
    assert refused(4, *command, "--resume", "never").endswith("or --overwrite to delete it, or --resume auto.")
    (run_copy.parent / "other").mkdir()
    (run_copy.parent / "other" / "mine.txt").touch()
    message = refused(6, *TRAIN, "--recipe", "tiny", "--run", run_copy.parent / "other", "--overwrite")
    assert "other: exists and is not replaced; got mine.txt in it; expected only what raev2 wrote." in message


# Defects of ours, tracebacks, signals.


def test_debug_shows_the_traceback():
    for argv in (["--debug", "show", "nope"], ["show", "nope", "--debug"]):
        with pytest.raises(SpecError, match="unknown recipe"):
            main(argv)


def test_a_defect_of_ours_is_not_hidden(monkeypatch):
    def broken(_):
        raise ZeroDivisionError

    monkeypatch.setitem(actions.COMMANDS, "eval", broken)
    with pytest.raises(ZeroDivisionError):
        main(["eval"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_training_that_is_asked_to_stop_is_exit_code_75(cli, tiny_recipe, monkeypatch, number):
    """Here outside of the loops, in an evaluation or the preparation of data."""
    monkeypatch.setattr(pipeline, "train", lambda *_, **__: os.kill(os.getpid(), number))
    code, out, err = cli(*TRAIN, "--recipe", "tiny")
    assert (code, out) == (75, "") and err == f"stopped by {number.name}; saved. The same command continues.\n"


def test_a_training_stops_after_its_time_and_goes_on(cli, tiny_recipe, trained_run):
    """The clock may strike while accelerate has emptied the environment for a moment; other tests get it back."""
    command = [*TRAIN, "--recipe", "tiny", "--run", "run", "--stage", "tokenizer"]
    command += ["--set", f"tokenizer_from={trained_run / 'tokenizer'}"]
    with mock.patch.dict(os.environ):
        code, _, err = cli(*command, "--max-time", "0.0001")
    assert code == 75 and err.splitlines()[-1] == "stopped by SIGALRM; saved. The same command continues."
    code, _, err = cli(*command, "--max-time", "9")
    assert code == 0 and signal.getitimer(signal.ITIMER_REAL) == (0, 0), err


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_a_time_that_cannot_be(refused, tiny_recipe, minutes):
    message = refused(2, *TRAIN, "--recipe", "tiny", "--max-time", minutes)
    assert message == f"--max-time: not usable; got {float(minutes)}; expected minutes above 0"


# 6: files and disks.


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError(13, "Permission denied", "/data/x"),
            "/data/x: cannot be read or written; got Permission denied",
        ),
        (OSError(30, "Read-only file system", "a"), "a: cannot be read or written; got Read-only file system"),
        (
            OSError(28, "No space left on device"),
            "a file or standard output: cannot be read or written; got No space left on device",
        ),
        (OSError("odd"), "a file or standard output: cannot be read or written; got odd"),
    ],
)
def test_an_error_of_the_system_is_one_line(refused, monkeypatch, error, message):
    def fail(_):
        raise error

    monkeypatch.setitem(actions.COMMANDS, "eval", fail)
    assert refused(6, "eval") == message


@pytest.fixture(params=["closed pipe", "full disk"])
def nobody(request: pytest.FixtureRequest) -> Iterator[tuple[int, str]]:
    """A place for output that takes nothing, and the reason of the system."""
    if request.param == "full disk":
        place, reason = os.open("/dev/full", os.O_WRONLY), "No space left on device"
    else:
        (read, place), reason = os.pipe(), "Broken pipe"
        os.close(read)
    yield place, reason
    os.close(place)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("argv", ["--version", "show quickstart --task imagenet", "tasks"])
def test_output_that_nobody_takes_is_one_line(nobody, argv, unbuffered):
    """The interpreter's own complaint at its end would be exit code 120; rich would leave with 1 and say nothing."""
    place, reason = nobody
    command, env = [sys.executable, "-m", "raev2", *argv.split()], {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(command, stdout=place, stderr=subprocess.PIPE, text=True, check=False, env=env)
    message = f"error: a file or standard output: cannot be read or written; got {reason}"
    assert (result.stderr.splitlines(), result.returncode) == ([message], 6)


def test_a_terminal_that_lacks_a_character_gets_a_question_mark(monkeypatch):
    """Such as one in Latin-1 at the end of a long evaluation."""
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setitem(actions.COMMANDS, "eval", lambda _: print("1.5 ± 0.1") or 0)
    assert main(["eval"]) == 0
    assert terminal.buffer.getvalue() == b"1.5 ? 0.1\n"


def test_ctrl_c_is_quiet(cli, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(actions.COMMANDS, "eval", interrupted)
    assert cli("eval") == (130, "", "")


@pytest.mark.parametrize("argv", [["trian"], ["train"], ["sample", "--guidance", "free"], ["data", "burn"]])
def test_a_command_that_cannot_be_parsed_is_exit_code_2(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2 and "usage: raev2" in capsys.readouterr().err


def test_the_module_is_the_command(tmp_path):
    command = [sys.executable, "-m", "raev2", "train", "--task", "nope"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stdout) == (5, "")
    assert result.stderr.startswith("error: --task: unknown task; got 'nope'") and result.stderr.count("\n") == 1


# Commands that only print.


def test_every_command_of_the_parser_has_its_function():
    commands = parser()._subparsers._group_actions[0].choices
    assert set(commands) - set(installed(plugins.COMMANDS)) == set(COMMANDS) == {*actions.COMMANDS, "train"}


def _shout(options) -> int:
    print(options.word.upper())
    return 3


SHOUT = Command("say a word loudly", lambda parser: parser.add_argument("word"), _shout)


def test_a_package_adds_a_command(install, capsys):
    install(plugins.COMMANDS, "shout", f"{__name__}:SHOUT")
    install(plugins.COMMANDS, "broken", "nowhere:main")
    install(plugins.COMMANDS, "other", "builtins:print")
    assert main(["shout", "yes"]) == 3
    assert capsys.readouterr().out == "YES\n"
    help = " ".join(parser().format_help().split())
    assert "shout say a word loudly" in help and "broken added by nowhere: `raev2 broken --help`" in help
    with pytest.raises(SystemExit):
        main(["shout"])
    assert "raev2 shout: error: the following arguments are required: word" in capsys.readouterr().err
    for name, message in [("broken", "nowhere:main cannot be loaded"), ("other", "its entry point is not a Command")]:
        assert main([name]) == 5
        assert f"command {name}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "texts"),
    [
        (["--version"], [__version__]),
        ([], ["usage: raev2", "train", "doctor"]),
        (["tasks"], ["imagenet", "raev2 0.1.0", "quickstart"]),
        (["recipes"], ["quickstart", "laptop", "raev2-dinov3l-k7"]),
        (["recipes", "--task", "imagenet"], ["quickstart"]),
        (["encoders"], ["licence", "access", "micro", "dinov2-b", "Apache-2.0", "gated"]),
        (["data", "list"], ["emoji", "image-folder", "synthetic", "CC-BY-4.0"]),
        (["data", "plan", "synthetic", "--set", "num_train=5"], ["Draw 5 training and 32 validation pictures"]),
        (["show", "tiny"], ["recipe: tiny", "generator parameters", "GFLOPs", "image tokens", "fingerprint"]),
        (["show", "tiny", "--set", "seed=5"], ["seed: 5"]),
        (["train", "--task", "imagenet", "--recipe", "tiny", "--dry-run"],
         ["tokenizer steps", "run folder runs/imagenet/tiny", "nothing was started"]),
        (["doctor"], ["python", "torch", "extra quickstart", "encoder micro", "bf16"]),
    ],
)  # fmt: skip
def test_commands_that_print(cli, tiny_recipe, argv, texts):
    code, out, err = cli(*argv)
    assert (code, err) == (0, "")
    for text in texts:
        assert text in out
    assert list(Path().iterdir()) == [], "writes nothing"


@pytest.mark.parametrize(
    ("argv", "row"),
    [
        (["tasks"], {"task": "imagenet", "from": "raev2 0.1.0"}),
        (["recipes", "--task", "imagenet"], {"hardware and time": "2 CPU cores without AMX, 9 min: measured"}),
        (["encoders"], {"name": "micro", "width": 192, "access": ""}),
        (["doctor"], {"what": "encoder micro", "state": "ok"}),
    ],
)  # fmt: skip
def test_listings_are_printed_as_json_too(cli, argv, row):
    code, out, err = cli(*argv, "--json")
    assert (code, err) == (0, "")
    assert any(row.items() <= found.items() for found in json.loads(out))


def test_show_prints_json_too(cli, tiny_recipe):
    shown = json.loads(cli("show", "tiny", "--set", "seed=5", "--json")[1])
    assert shown["spec"]["seed"] == 5 and shown["fingerprint"] and "generator parameters" in shown["sizes"]


def test_recipes_show_the_number_to_expect_and_who_reports_it(cli):
    lines = [line.split("  ") for line in cli("recipes", "--task", "imagenet")[1].splitlines()]
    row = next(line for line in lines if "raev2-dinov3l-k7" in line)
    assert row[-1].lstrip().startswith("fid 1.06, psnr 22.57 (quoted: RAEv2, arXiv 2605.18324")


def test_tables_wrap_to_the_terminal_and_lose_nothing(monkeypatch, capsys):
    rows = [("a", "[bold] " + "word " * 40), ("b", "short")]
    print_table(("name", "text"), rows)
    assert len(capsys.readouterr().out.splitlines()) == 3
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "50")
    print_table(("name", "text"), rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 50 and " ".join(lines).split().count("word") == 40 and "[bold]" in lines[1]


def test_help_has_the_sentence_of_every_added_command_without_importing_it():
    help = " ".join(parser().format_help().split())
    assert all(get_command(name).summary in help for name in installed(plugins.COMMANDS))


def test_data_is_built_verified_and_not_overwritten(cli, tmp_path):
    build = ["data", "build", "synthetic", "--out", "shapes", "--set", "num_train=3", "--set", "num_val=2"]
    code, out, _ = cli(*build)
    assert code == 0 and "shapes: train 3, val 2, 4 classes, 0 rejected" in out
    code, out, _ = cli("data", "verify", "shapes")
    assert code == 0 and out.startswith("shapes: intact (train 3, val 2; fingerprint ")
    code, _, err = cli(*build)
    assert code == 3 and "exists already. Choose another folder or pass --overwrite." in err
    assert cli(*build, "--overwrite")[0] == 0
    assert json.loads((tmp_path / "shapes" / "manifest.json").read_text())["options"]["num_train"] == "3"


def test_one_option_trains_on_a_dataset_folder(cli, tiny_recipe, monkeypatch):
    cli("data", "build", "synthetic", "--out", "my shapes", "--set", "num_train=3", "--set", "num_val=2")
    train = [*TRAIN, "--recipe", "tiny", "--data", "my shapes"]
    code, out, _ = cli(*train, "--dry-run")
    assert code == 0 and re.search(r"data my shapes +ok +train 3, val 2, 4 classes\n", out)
    given = []
    monkeypatch.setattr("raev2.pipeline.train", lambda spec, *_, **__: given.append(spec) or sys.exit(0))
    with pytest.raises(SystemExit):
        cli(*train, "--set", "data.num_workers=1")
    (data,) = [spec.data for spec in given]
    assert (data.dir, data.recipe, data.options, data.num_workers) == ("my shapes", None, {}, 1)


def test_data_commands_need_a_name(refused):
    assert refused(2, "data", "build").startswith("raev2 data build: which one?; expected a recipe, or for verify a ")
    assert refused(2, "encoders", "check").startswith("raev2 encoders check: which encoder?; expected a name, timm:ID,")


def test_no_error_class_is_without_a_message():
    """Where, what, got, expected and what to do, in one line."""
    error = SpecError("a.b", "wrong", got=3, expected="4", hint="Set\n 4.")
    assert str(error) == "a.b: wrong; got 3; expected 4. Set 4."
    assert str(RaeError("a", "b")) == "a: b"


def test_results_are_printed_with_what_they_mean(capsys):
    headline = MetricResult("woe", 3.5, 8, 0.25, "of 8", better="lower", role="headline", about="How sad.")
    known = MetricResult("woe_real", 1.0, 8, better="lower", role="scale", of="woe", about="Real pictures.")
    before = {"name": "fid", "value": 9.0, "num_samples": 8, "stderr": None, "note": "old"}
    actions._print_metrics("moods", [vars(headline), vars(known), before])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["woe", "3.5", "0.25", "8", "lower", "of", "8"] in lines
    assert ["woe_real", "1", "8", "scale", "of", "woe"] in lines and ["fid", "9", "8", "old"] in lines
    assert ["woe:", "How", "sad.", "Lower", "is", "better."] in lines
    assert ["woe_real:", "Real", "pictures.", "A", "scale", "row."] in lines
