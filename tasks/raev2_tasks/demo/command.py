"""The options of `raev2 demo`; the page itself is in page.py, which needs gradio."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from raev2.command.actions import source_of
from raev2.command.cli import source_options
from raev2.errors import TaskError
from raev2.task import Command

ADDRESS = "127.0.0.1"  # this machine alone; from elsewhere: ssh -L PORT:127.0.0.1:PORT HOST


def _options(parser: ArgumentParser) -> None:
    source_options(parser)
    parser.add_argument("--port", type=int, default=7860, help="of the page on this machine (default: 7860)")


def _demo(options: Namespace) -> None:
    try:
        import gradio
    except ImportError as error:
        raise TaskError("raev2 demo", "needs gradio", got=str(error), hint="pip install 'raev2[demo]'") from error
    from raev2.model.opened import open_trained
    from raev2_tasks.demo.page import Demo, make_page

    page = make_page(Demo(open_trained(source_of(options))))
    theme = gradio.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["monospace"]
    )  # loads none from elsewhere
    print(f"http://{ADDRESS}:{options.port}  (Ctrl-C ends it)", flush=True)
    page.launch(server_name=ADDRESS, server_port=options.port, theme=theme, share=False, quiet=True)


DEMO = Command("a local page: pictures for a class or prompt, with guidance, steps and seed by hand", _options, _demo)
