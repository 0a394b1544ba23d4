"""`raev2 import` and `raev2 export`: weights of other implementations to artefact folders, and back."""

from __future__ import annotations

import io
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from raev2.command.actions import print_table, refuse_existing, source_of
from raev2.command.cli import source_options
from raev2.errors import CheckpointError, SpecError
from raev2.files.artefact import load_artefact, save_artefact, write_json
from raev2.files.damage import read_json
from raev2.files.replace import ARTEFACT, EXPORT, PIPELINES, new_folder
from raev2.interop.generators import convert_generator, export_generator, generator_config, nearest_multiples
from raev2.interop.tokenizers import (
    HEADS,
    decoder_spec,
    decoder_tensors,
    export_decoder,
    export_stats,
    import_decoder,
    import_stats,
)
from raev2.model.opened import STAGES, load_generator
from raev2.model.opened import Source as Model
from raev2.model.repository import Pipeline
from raev2.spec import EncoderSpec, TokenizerSpec
from raev2.spec_io import override_values, validated
from raev2.task import Command
from raev2.tokenizer.encoders import FrozenEncoder, build_encoder
from raev2.tokenizer.rae import RAE, read_parts
from raev2_tasks.convert.autoencoders import export_autoencoder, import_autoencoder
from raev2_tasks.convert.encoders import is_reference_name, reference_encoder, v1_encoder
from raev2_tasks.convert.files import Source, generator_part, read_config, read_source, tokenizer_part

Rows = list[tuple[str, str]]
NOISE_FIELDS = "noise_tau", "noise_unit", "noise_distribution"
NOTE = "note"  # name of a row whose text is no file
ORIGINS = {"rae": "RAE (v1)", "raev2": "RAEv2"}
LICENCES = {
    "RAE (v1)": "Weights published with RAE come with code under the MIT licence.",
    "RAEv2": "Weights published with RAEv2 come with code under CC BY-NC 4.0: not for commercial use.",
    "AutoencoderRAE of diffusers": "The code of diffusers is under Apache-2.0; the encoder has its own licence.",
}
TERMS = "The terms of these weights are those of the place they were published at."


# Import


def import_weights(options: Namespace) -> Rows:
    """Write the artefact folder `options.out` from `options.src`; what was found and done, as rows to print."""
    out = Path(options.out)
    source = read_source(options.src)
    if source.kind == "statistics":
        raise CheckpointError(
            str(source.path), "latent statistics alone are no tokenizer", got=", ".join(source.tensors),
            hint=f"Import the decoder they belong to: raev2 import DECODER --stats {source.path} --out {out}",
        )  # fmt: skip
    given = {"config": options.config, "set": options.overrides, "encoder": options.encoder,
             "encoder-dir": options.encoder_dir, "stats": options.stats, "from": options.origin}  # fmt: skip
    used = {"decoder": set(given), "generator": {"config", "set"}, "autoencoder": set()}[source.kind]
    for name, value in given.items():
        if value and name not in used:
            raise SpecError(f"--{name}", f"has no effect with {source.layout}")
    if source.kind == "generator":
        return _import_generator(source, options, out)
    with _scratch(out) as folder:
        if source.kind == "autoencoder":
            rae = import_autoencoder(source.tensors, source.config, Path(folder) / "encoder")
            rae.extra = _extra(source, source.layout)
            rows = [("found", source.layout), *_tokenizer_rows(rae)]
        else:
            rae, rows = _import_tokenizer(source, options)
        rae.save_pretrained(out)
    return rows + [("tokenizer", str(out))]


def _import_generator(source: Source, options: Namespace, out: Path) -> Rows:
    config = override_values(generator_part(read_config(options.config)) if options.config else {}, options.overrides)
    generator, conversion = convert_generator(source.tensors, config)
    generator.extra = _extra(source, source.layout.partition(" DiT")[0].partition(" Lightning")[0])
    save_artefact(out, kind="generator", config=generator.config(), tensors=conversion.write)
    channels, rows, columns = generator.latent_shape
    given = "" if "prediction" in config else " (not in the weights; --set prediction=... changes it)"
    return [
        ("found", _found(source, source.layout)),
        ("latents", f"{channels} x {rows} x {columns}"),
        ("condition", generator.condition_spec.kind),
        ("prediction", generator.flow.prediction + given),
        ("parameters", _millions(generator)),
        ("generator", str(out)),
    ]


def _import_tokenizer(source: Source, options: Namespace) -> tuple[RAE, Rows]:
    config, encoder_spec, decoder_fields, noise = _given_tokenizer(options)
    origin = _origin(options, config)
    decoder, _, grid = decoder_spec(decoder_tensors(source.tensors), decoder_fields)
    encoder = build_encoder(encoder_spec, grid, source=options.encoder_dir)
    _check_image_size(config, encoder, grid)
    spec = validated(
        TokenizerSpec,
        {"encoder": encoder_spec, "decoder": decoder, "grid": grid, "noise_unit": "tokens", **noise},
        "--set ",
    )
    pixels = (encoder.info.mean, encoder.info.std) if origin == ORIGINS["rae"] else (None, None)
    trained = import_decoder(source.tensors, {**decoder_fields, "grid": grid}, *pixels)
    rae = RAE(spec, encoder, decoder=trained)

    files = dict(source.files)
    notes: Rows = [("statistics", "none: give them with --stats, or compute them; without them nothing is encoded")]
    if options.stats:
        found = read_source(options.stats)
        if found.kind != "statistics":
            raise CheckpointError(options.stats, "not latent statistics", got=found.layout, expected="'mean' and 'var'")
        files |= found.files
        name, digest = next(iter(found.files.items()))
        data = f"imported from {name}, SHA-256 {digest[:12]}"
        rae.set_stats(import_stats(found.tensors, rae.latent_shape, encoder=encoder.fingerprint(), data=data))
        absent = [
            f"no {name}: taken as {value}" for name, value in (("mean", 0), ("var", 1)) if name not in found.tensors
        ]
        notes = [("statistics", ", ".join([data, *absent]))]
    rae.extra = _extra(source, origin, files)
    return rae, [("found", _found(source, f"{source.layout} of {origin}")), *_tokenizer_rows(rae), *notes]


def _given_tokenizer(options: Namespace) -> tuple[Mapping[str, Any], EncoderSpec, Mapping[str, Any], Mapping[str, Any]]:
    """What options and configuration say: the reference's configuration, and our encoder, decoder and noise fields."""
    config = tokenizer_part(read_config(options.config)) if options.config else {}
    decoder: dict[str, Any] = {"heads": config[HEADS]} if HEADS in config else {}
    encoder: EncoderSpec | None = None
    if "encoder" in config and "decoder" in config:  # ours
        spec = validated(TokenizerSpec, config, f"{options.config} tokenizer.")
        encoder, decoder = spec.encoder, {"heads": spec.decoder.num_heads, "grid": spec.grid}
    elif "encoder_name" in config:
        encoder = reference_encoder(str(config["encoder_name"]))
    elif "encoder_cls" in config:
        encoder = v1_encoder(config)
    if options.encoder:
        name = options.encoder
        encoder = reference_encoder(name) if is_reference_name(name) else EncoderSpec(name=name, antialias=False)
    if encoder is None:
        raise SpecError(
            "--encoder", "a decoder does not say which encoder it belongs to",
            expected="a name from `raev2 encoders`, a name of RAEv2 such as "
            "'dinov3mls-vit-l16[layers=11.13.15.17.19.21.23]', 'hf:ID' or a folder; or --config FILE",
        )  # fmt: skip
    values = override_values({"encoder": encoder.model_dump()}, options.overrides)
    encoder = validated(EncoderSpec, values.pop("encoder"), "--set encoder.")
    noise: dict[str, Any] = {name: values.pop(name) for name in NOISE_FIELDS if name in values}
    known = {"latent_dim", "width", "depth", "heads", "mlp_width", "patch_size", "num_patches", "grid"}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise SpecError(
            f"--set {unknown[0]}", "unknown field", expected=f"encoder.FIELD, noise_tau, {', '.join(sorted(known))}"
        )
    return config, encoder, decoder | values, noise


def _origin(options: Namespace, config: Mapping[str, Any]) -> str:
    """Which implementation trained a decoder; the files look alike, and pixels differ."""
    told = "rae" if "encoder_cls" in config else "raev2" if config.keys() & {"encoder_name", "encoder"} else None
    if options.origin is None and told is None:
        raise SpecError(
            "--from",
            "decoders of RAE and RAEv2 look alike, but RAE predicts normalised pixels",
            expected="--from rae or --from raev2, or --config FILE",
        )
    return ORIGINS[options.origin or told or ""]


def _check_image_size(config: Mapping[str, Any], encoder: FrozenEncoder, grid: tuple[int, int]) -> None:
    """The pixels that a configuration of the reference states must give the decoder's tokens."""
    for name, unit in (("resolution", 16), ("encoder_input_size", encoder.patch_size)):
        size = config.get(name)
        if size is None:
            continue
        if size % unit:
            expected = f"a multiple of {unit}: {nearest_multiples(size, unit)}"
            raise SpecError(f"config {name}", "no image size for this encoder", got=size, expected=expected)
        if (size // unit) ** 2 != grid[0] * grid[1]:
            raise SpecError(
                f"config {name}", "does not fit the decoder", got=f"{size} px, {(size // unit) ** 2} tokens",
                expected=f"{grid[0] * unit} px, {grid[0] * grid[1]} tokens",
            )  # fmt: skip


def _tokenizer_rows(rae: RAE) -> Rows:
    spec, (channels, rows, columns) = rae.spec, rae.latent_shape
    result = [
        ("encoder", f"{rae.encoder.info.name}, licence {rae.encoder.info.licence}"),
        ("layers", f"{list(rae.encoder.layers)}, {spec.encoder.aggregate}" + ", pooled" * spec.encoder.pooled_term),
        ("latents", f"{channels} x {rows} x {columns}"),
        ("images", f"{spec.image_size[0]} x {spec.image_size[1]} px"),
        ("decoder parameters", _millions(rae.decoder)),
    ]
    if rae.encoder.info.name.startswith("siglip2") and rae.encoder.info.mean[0] == 0.5:
        result.append(
            ("pixels", "normalised with 0.5, as SigLIP-2 was trained; the code of RAEv2 uses ImageNet values")
        )
    return result


def _millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M"


def _found(source: Source, layout: str) -> str:
    kinds = {"ema": ", averaged weights", "model": ", weights without averaging"}
    return layout + kinds.get(source.weights, "")


def _extra(source: Source, origin: str, files: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The entry of config.json that says where weights come from."""
    licence = f"{LICENCES.get(origin, '')} {TERMS}".strip()
    if source.licence:
        licence += f"\n\nThe licence file beside them:\n\n```\n{source.licence}\n```"
    where = {"layout": source.layout, "origin": origin, "path": str(source.path), "weights": source.weights}
    return {"source": where | {"sha256": dict(files or source.files)}, "licence": licence}


# Export


def export_weights(options: Namespace) -> Rows:
    """Write `options.out` from a run or artefact folder; what was written, as rows to print."""
    out = Path(options.out)
    if options.format == "pipeline":
        Pipeline(source_of(options)).save_pretrained(out, licence=options.licence)
        return [("pipeline", str(out)), ("card", str(out / "README.md"))]
    if not options.run:
        raise SpecError("--run", f"needed with --format {options.format}", expected="a run or artefact folder")
    artefacts = _artefacts(Path(options.run))
    write = {"reference": _export_reference, "diffusers": _export_diffusers}[options.format]
    with new_folder(out, EXPORT) as folder:
        rows = write(artefacts, folder)
        write_json(folder / "export.json", {"format_version": 1, "format": options.format, "run": str(options.run)})
    return [(name, text if name == NOTE else str(out / text)) for name, text in rows]


def _scratch(out: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder for partial output on the disk of `out`, gone in the end."""
    parent = next(folder for folder in out.resolve().parents if folder.is_dir())
    return tempfile.TemporaryDirectory(dir=parent, prefix=".raev2-")


def _artefacts(path: Path) -> dict[str, Path]:
    """The tokenizer and generator of a run folder, or the one artefact that a folder is."""
    if (path / "config.json").is_file():
        kind = read_json(path / "config.json").get("kind")
        if kind in STAGES:
            return {kind: path}
    if (path / "spec.yaml").is_file():
        return {kind: Path(folder) for kind, folder in Model.of(path).parts.items()}
    found = {kind: path / kind for kind in STAGES if (path / kind / "config.json").is_file()}
    if not found:
        raise CheckpointError(
            str(path), "nothing to export", got="no artefact in it" if path.is_dir() else "no such folder",
            expected="a run folder, or a tokenizer or generator folder",
        )  # fmt: skip
    return found


def _export_reference(artefacts: Mapping[str, Path], out: Path) -> Rows:
    """decoder.pt, stats.pt and generator.pt as RAEv2 reads them, and config.yaml."""
    config: dict[str, Any] = {}
    files: dict[str, Mapping[str, Tensor]] = {}
    if "tokenizer" in artefacts:
        values, tensors, path = load_artefact(artefacts["tokenizer"], kind="tokenizer")
        spec, decoder, stats = read_parts(values, tensors, str(path))
        config["stage_1"] = spec.model_dump(mode="json")
        files["decoder"] = export_decoder(decoder)
        if stats is not None:
            files["stats"] = export_stats(stats)
    if "generator" in artefacts:
        generator = load_generator(artefacts["generator"])
        config["stage_2"], files["generator"] = generator_config(generator), export_generator(generator)
    for name, content in files.items():
        _save_pickle(content, out / f"{name}.pt")
    (out / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    names = {"stats": "statistics"}
    return [(names.get(name, name), f"{name}.pt") for name in files] + [("config", "config.yaml")]


def _save_pickle(tensors: Mapping[str, Any], file: Path) -> None:
    """`torch.save`, whose own error of a full disk is none of files."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    file.write_bytes(buffer.getvalue())


def _export_diffusers(artefacts: Mapping[str, Path], out: Path) -> Rows:
    """The tokenizer as an AutoencoderRAE; diffusers has no class for the generators."""
    if "tokenizer" not in artefacts:
        raise CheckpointError(
            "--format diffusers", "diffusers has a class for tokenizers only", got="a generator",
            hint="Export it with --format reference or pipeline.",
        )  # fmt: skip
    rae = RAE.from_pretrained(artefacts["tokenizer"])
    export_autoencoder(rae).save_pretrained(out)
    rows: Rows = [("AutoencoderRAE", "config.json")]
    if rae.spec.encoder.antialias:
        rows.append((NOTE, "diffusers never antialiases: outputs are equal for images of the encoder's input size"))
    if "generator" in artefacts:
        rows.append((NOTE, "the generator was left out: diffusers has no class for it"))
    return rows


# The commands


def _import_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("src", metavar="SRC", help="checkpoint or decoder file (.pt, .safetensors), or diffusers folder")
    add("--out", required=True, metavar="DIR", help="artefact folder to write")
    add("--config", metavar="FILE", help="configuration that belongs to the weights, YAML or JSON")
    entry = "entry of that configuration; encoder.FIELD for the encoder"
    add("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE", help=entry)
    add("--encoder", metavar="NAME", help="encoder of a decoder: our name, RAEv2's name, or a folder")
    add("--encoder-dir", metavar="DIR", help="local folder with the weights of that encoder")
    add("--stats", metavar="FILE", help="latent statistics that belong to a decoder")
    add("--from", dest="origin", choices=("rae", "raev2"), help="who trained a decoder")
    add("--overwrite", action="store_true", help="replace an artefact folder")


def _export_options(parser: ArgumentParser) -> None:
    source_options(parser)
    parser.add_argument("--format", required=True, choices=("pipeline", "reference", "diffusers"))
    parser.add_argument("--licence", default="", help="of a pipeline's weights, as the hub names it: apache-2.0, ...")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true")


def _import(options: Namespace) -> None:
    refuse_existing(options, Path(options.out), ARTEFACT)
    print_table(("what", "value"), import_weights(options))


def _export(options: Namespace) -> None:
    refuse_existing(options, Path(options.out), PIPELINES if options.format == "pipeline" else EXPORT)
    print_table(("what", "where"), export_weights(options))


IMPORT = Command("weights of RAE, RAEv2 or diffusers -> artefact folder", _import_options, _import)
EXPORT_COMMAND = Command(
    "a run as one folder for the hub, or weights in the layout of RAEv2 or diffusers", _export_options, _export
)
