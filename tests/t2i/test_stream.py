"""Streams of shards: every process gets its batches, orders are seeded, and what cannot work is said."""

from __future__ import annotations

import gc
import json
import os
import shlex
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from threading import Thread

import pytest
from shard_examples import SIZE, file_of, no_more_files, pair, picture, stream, texts, tokenize, write_source, write_tar

from raev2.data import ordered_batches, train_batches
from raev2.errors import DataError, FileError, SpecError
from raev2.task import get_task
from raev2_tasks.t2i.shards.stream import StreamedDataset

B = 8
pytestmark = [  # webdataset leaves closing files to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def collect():
    yield
    gc.collect()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """50 samples in shards of 7 and one of 1."""
    out = tmp_path_factory.mktemp("shards") / "s"
    write_source(out, "s", 50)
    return out


def open_stream(urls, **options):
    options = {"num_samples": 50, "batch_size": B, "licence": "CC0-1.0", "shuffle_buffer": 10, **options}
    return StreamedDataset(urls, SIZE, tokenize=tokenize, **options)


def local(source):
    return str(source / "s-train-{000000..000007}.tar")


def captions(dataset, num_batches=13, **options):
    return [caption for _, caption in stream(dataset, num_batches, batch_size=B, **options)]


def test_the_order_is_a_function_of_seed_and_start(source):
    first, again = captions(open_stream(local(source))), captions(open_stream(local(source)))
    assert first == again and len(first) == 104
    assert Counter(first).keys() == {f"s {n}" for n in range(50)}
    resumed = captions(open_stream(local(source)), 5, start_images=80)
    assert resumed != first[:40] and resumed[:24] != first[80:]


def test_processes_and_workers_share_each_pass_and_none_runs_dry(source):
    """Two processes x two workers over 8 uneven shards: equal numbers of batches, no sample twice in a pass."""
    parts = [
        captions(open_stream(local(source), rank=rank, world_size=2), 8, rank=rank, world_size=2, num_workers=2)
        for rank in range(2)
    ]
    assert [len(part) for part in parts] == [32, 32]
    first_pass = [set(part[:8]) for part in parts]
    assert not first_pass[0] & first_pass[1]
    again = captions(open_stream(local(source), rank=1, world_size=2), 8, rank=1, world_size=2, num_workers=2)
    assert again == parts[1]
    assert len(set(parts[0]) | set(parts[1])) > 36  # shards change hands between passes


def test_pipes_are_read_and_s3_becomes_one(source):
    urls = [f"pipe:cat {shlex.quote(str(source / f's-train-{n:06d}.tar'))}" for n in range(3)]
    with pytest.raises(
        DataError, match="an address that is a command of the shell; got pipe:cat .*task.stream.allow_pipe"
    ):
        open_stream(urls)
    assert len(captions(open_stream(urls, allow_pipe=True), 2)) == 16
    assert open_stream(["s3://bucket/a b.tar"]).urls == ["pipe:aws s3 cp 's3://bucket/a b.tar' -"]
    assert open_stream("https://host/{00..02}.tar").urls == [f"https://host/0{n}.tar" for n in range(3)]


def test_s3_is_read_by_the_command_aws_and_resumes_by_shard(tmp_path, monkeypatch, caplog):
    """A stand-in for `aws` shows what is asked of it; one object is missing in the store."""
    store = tmp_path / "store" / "my bucket"
    for number in range(6):
        write_tar(store / f"{number}.tar", [m for n in range(8) for m in pair(f"{n}", 8 * number + n)])
    command = tmp_path / "bin" / "aws"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\ncat "{tmp_path}/store/${{3#s3://}}"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    options = {"num_samples": 48, "shuffle_buffer": 1}
    urls = "s3://my bucket/{0..5}.tar"
    whole = captions(open_stream(urls, **options), 6)
    assert Counter(whole) == Counter(f"picture {n}" for n in range(48))
    assert "s3 cp s3://my bucket/0.tar -" in (tmp_path / "calls").read_text().splitlines()
    assert captions(open_stream(urls, **options), 3, start_images=16) == whole[16:40]
    (store / "3.tar").unlink()
    dataset = open_stream(urls, **options)
    assert Counter(captions(dataset, 5)) == Counter(f"picture {n}" for n in range(48) if not 24 <= n < 32)
    assert dataset.bad.counts == {"bad_tar": 1} and "a shard cannot be read to its end" in caplog.text


def test_addresses_that_cannot_be_read_are_refused(monkeypatch):
    for url, message in (
        (
            "gs://bucket/0.tar",
            "unknown kind of address; got gs://bucket/0.tar; expected http, https, s3 or a path. Other",
        ),
        ("https://host/it's.tar", "an address with spaces or quotes; got https://host/it's.tar. Write them as %20"),
        (
            "https://host/test-0.tar",
            "no shard is left for training; got https://host/test-0.tar; expected names without",
        ),
    ):
        with pytest.raises(DataError, match=message):
            open_stream(url)
    monkeypatch.setattr("shutil.which", lambda name: None)
    dataset = open_stream("s3://bucket/0.tar")
    with pytest.raises(DataError, match="s3 addresses are read by the command aws, which is not installed"):
        captions(dataset, 1)


def test_shards_named_for_validation_are_left_out(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        urls = open_stream(["https://test.host/x-{train,validation,test}-{0..1}.tar"]).urls
    assert urls == ["https://test.host/x-train-0.tar", "https://test.host/x-train-1.tar"]
    assert "4 shards named for validation or test are left out" in caplog.text


def test_a_resumed_run_goes_on_at_the_shard_that_was_reached(tmp_path):
    for number in range(6):
        write_tar(tmp_path / f"{number}.tar", [m for n in range(8) for m in pair(f"{n}", 8 * number + n)])
    options = {"num_samples": 48, "shuffle_buffer": 1}
    whole = captions(open_stream(str(tmp_path / "{0..5}.tar"), **options), 12)
    assert (
        Counter(whole[:48]) == Counter(f"picture {n}" for n in range(48)) == Counter(whole[48:])
        and whole[:48] != whole[48:]
    )
    for seen in (16, 40, 56):
        resumed = captions(open_stream(str(tmp_path / "{0..5}.tar"), **options), 4, start_images=seen)
        assert resumed == whole[seen : seen + 32]
    assert [open_stream(str(tmp_path / "{0..5}.tar"), **options).first_shard(n) for n in (0, 7, 8, 100)] == [
        0,
        0,
        1,
        12,
    ]


@pytest.fixture
def server(tmp_path):
    """A web server for the files in tmp_path."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as http:
        thread = Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_a_stream_from_a_web_server_resumes_by_shard_and_counts_what_is_not_there(tmp_path, server):
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", [m for n in range(8) for m in pair(f"{n}", 8 * number + n)])
    options = {"num_samples": 32, "shuffle_buffer": 1}
    whole = captions(open_stream(f"{server}/{{0..3}}.tar", **options), 4)
    assert Counter(whole) == Counter(f"picture {n}" for n in range(32))
    assert captions(open_stream(f"{server}/{{0..3}}.tar", **options), 2, start_images=16) == whole[16:]
    (tmp_path / "2.tar").unlink()
    dataset = open_stream(f"{server}/{{0..3}}.tar", **options)
    assert Counter(captions(dataset, 3)) == Counter(f"picture {n}" for n in range(32) if not 16 <= n < 24)
    assert dataset.bad.counts["bad_tar"] == 1


def test_a_run_trains_on_shards_from_a_web_server(t2i_spec, t2i_run, tmp_path, server):
    from raev2 import pipeline
    from raev2.spec_io import apply_overrides

    write_source(tmp_path / "s", "s", 50, size=(64, 64))
    spec = apply_overrides(t2i_spec, [
        f"task.stream.urls=['{server}/s/s-train-{{000000..000007}}.tar']", "task.stream.num_samples=50",
        "task.stream.licence=CC0-1.0", "task.stream.captions=captions", "generator_training.latent_cache=false",
        f"tokenizer_from={t2i_run / 'tokenizer'}",
    ])  # fmt: skip
    run = pipeline.train(spec, tmp_path / "run")
    assert (run / "generator").is_dir() and "127.0.0.1" in (run / "spec.yaml").read_text()
    for wrong, message in (
        (
            "tokenizer_from=null",
            "tokenizer_from: does not go with task.stream, which cannot be read by number. Train the",
        ),
        ("generator_training.latent_cache=true", "latent_cache: does not go with task.stream.*Set it to false"),
        ("task.weights={s12: 1}", "weights has no effect with a stream"),
    ):
        with pytest.raises(SpecError, match=message):
            get_task("t2i").dataset(apply_overrides(spec, [wrong]), "train")


def test_batches_carry_pictures_captions_and_numbers(source):
    batch, skipped = next(train_batches(open_stream(local(source), caption_mix={"long": 1}), batch_size=B, seed=0))
    assert batch.images.shape == (B, 3, 16, 16) and batch.key.tolist() == list(range(B)) and skipped == 0
    for image, caption in zip(batch.images, texts(batch.cond), strict=True):
        assert caption.endswith("at length. It has noise.")
        expected = picture(int(caption.split()[1]))
        assert (image.permute(1, 2, 0).numpy() == expected).all()


def test_bad_samples_are_counted_and_a_cut_shard_is_left(tmp_path):
    members = [m for n in range(30) for m in pair(f"{n:02d}", n)]
    whole = write_tar(tmp_path / "0.tar", members)
    cut = write_tar(tmp_path / "1.tar", members)
    cut.write_bytes(whole.read_bytes()[:41_700])  # inside a member
    json_bytes = json.dumps({"captions": []}).encode()
    extra = [
        ("a.png", file_of(picture(1))),
        ("b.png", b"no image"),
        ("b.txt", b"x"),
        ("c.d.png", b""),
        ("c.d.txt", b""),
    ]
    extra += [("e.json", json_bytes), ("e.png", file_of(picture(2))), ("f.txt", b"alone")]
    write_tar(tmp_path / "2.tar", [*members, *extra])
    dataset = open_stream(str(tmp_path / "{0..2}.tar"), num_samples=90, shuffle_buffer=1, max_bad_share=0.5)
    found = captions(dataset, 12)
    assert len(found) == 96 and "" not in found
    assert dataset.bad.counts["bad_tar"] >= 1 and dataset.bad.counts["dotted_key"] >= 1
    assert dataset.bad.counts["bad_caption"] >= 2 and dataset.bad.counts["bad_image"] >= 2


def test_too_many_open_files_end_the_training_and_spoil_no_shard(source):
    captions(open_stream(local(source)), 1)  # everything is imported
    dataset = open_stream(local(source))
    with no_more_files(), pytest.raises(FileError, match=r"cannot be read or written; got Too many open files"):
        captions(dataset)
    assert dataset.bad.counts == {}


def test_fewer_shards_than_readers_is_an_error(source):
    with pytest.raises(DataError, match=r"fewer shards than readers; got 8 shards; expected at least 9 processes x 1"):
        open_stream(local(source), rank=0, world_size=9)
    dataset = open_stream(local(source), rank=0, world_size=4)
    with pytest.raises(DataError, match=r"expected at least 4 processes x 3 workers = 12\. Use fewer workers"):
        next(train_batches(dataset, batch_size=B, seed=0, world_size=4, num_workers=3))


def test_addresses_without_any_sample_end_in_an_error(tmp_path):
    dataset = open_stream([str(tmp_path / "nothing.tar")])
    with pytest.raises(DataError, match=r"no sample in a whole pass over the shards; got first: .*nothing\.tar"):
        next(islice(train_batches(dataset, batch_size=B, seed=0, num_workers=1), 1))


def test_a_stream_cannot_be_read_by_number(source):
    dataset = open_stream(local(source))
    assert len(dataset) == 50 and dataset.classes == []
    with pytest.raises(DataError, match="a stream cannot be read by number. Download the shards"):
        next(ordered_batches(dataset, 4))
