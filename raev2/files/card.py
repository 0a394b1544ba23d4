"""The model card of whatever is shared, tokenizer, generator or pipeline: a function of what its JSON files say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment


def card_text(
    config: Mapping[str, Any], results: Sequence[Mapping[str, Any]] = (), *, licence: str = "", picture: str = ""
) -> str:
    """A card in Markdown with the metadata of the hub; its text is assets/model_card.md.j2.

    config    config.json of an artefact; of a pipeline its pipeline.json with both of these in it
    results   contents of result files, whose numbers are quoted with their protocol
    licence   as the hub names it, such as 'apache-2.0'; by default the card refers to its own terms
    picture   name of a file beside the card
    """
    from huggingface_hub import ModelCard, ModelCardData  # slow to import

    tokenizer = config if config["kind"] == "tokenizer" else config.get("tokenizer", {})
    base = tokenizer.get("encoder") and tokenizer["encoder"]["hub_id"]
    data = ModelCardData(
        license=licence or "other", license_name=None if licence else "see-model-card", library_name="raev2",
        tags=["representation-autoencoder", config["kind"]], base_model=base,
        model_name=f"raev2 {config['kind']}", eval_results=[*_numbers(results)] or None,
    )  # fmt: skip
    frame = (resources.files("raev2") / "assets" / "model_card.md.j2").read_text(encoding="utf-8")
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(frame)
    body = template.render(config=config, results=results, picture=picture)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}\n"))


def _numbers(results: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    from huggingface_hub import EvalResult

    for result in results:
        name = Path(result["spec"]["data"]["dir"]).name
        task = "image-generation" if result["needs_generator"] else "image-reconstruction"
        for row in result["results"]:
            about = f"{row['name']} ({result['protocol']}, n = {row['num_samples']})"
            if not row.get("of"):  # the others are scales
                yield EvalResult(task, name, name, row["name"], row["value"], metric_name=about)
