from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as multiprocessing

from raev2.eval.distances import Moments
from raev2.eval.generate import collect, local_chunks


def rows(indices):
    """Rows that depend on the sample's number alone, as noise and conditions do."""
    vectors = [torch.randn(3, generator=torch.Generator().manual_seed(index)) for index in indices]
    return {"features": torch.stack(vectors), "number": torch.tensor(list(indices))}


def share(monkeypatch, num: int, rank: int, world: int, chunk: int) -> list[int]:
    """Numbers of the samples of one of several processes."""
    monkeypatch.setattr("raev2.training.dist.rank", lambda: rank)
    monkeypatch.setattr("raev2.training.dist.world_size", lambda: world)
    return sum(local_chunks(num, chunk), [])


@pytest.mark.parametrize(("num", "world", "chunk"), [(10, 3, 1), (10, 3, 4), (7, 4, 2), (2, 3, 5), (64, 1, 10)])
def test_every_sample_belongs_to_exactly_one_process(num, world, chunk, monkeypatch):
    shares = [share(monkeypatch, num, rank, world, chunk) for rank in range(world)]
    assert sorted(sum(shares, [])) == list(range(num))


def test_ten_samples_on_three_processes_are_shared_evenly(monkeypatch):
    assert [len(share(monkeypatch, 10, rank, 3, 1)) for rank in range(3)] == [4, 3, 3]


def test_rows_do_not_depend_on_the_chunk_size():
    expected = collect(10, 1, rows)
    assert expected["number"].tolist() == list(range(10))
    for chunk in (3, 7, 64):
        assert torch.equal(collect(10, chunk, rows)["features"], expected["features"])


def test_long_work_says_how_far_it_is(monkeypatch, caplog):
    monkeypatch.setattr("raev2.eval.generate.PROGRESS_SECONDS", -1.0)
    with caplog.at_level(logging.INFO):
        collect(6, 2, rows, "toys")
    assert "evaluation: 4 of 6 toys" in caplog.text


def worker(rank: int, folder: str) -> None:
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    found = collect(10, 2, rows)
    moments = Moments.of(rows(sum(local_chunks(10, 1), []))["features"]).over_processes()
    torch.save((found, moments.cov), f"{folder}/{rank}.pt")
    torch_dist.destroy_process_group()


def test_three_processes_give_ids_zero_to_nine_once_and_the_numbers_of_one(tmp_path):
    multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=3)
    expected = collect(10, 2, rows)
    cov = Moments.of(expected["features"]).cov
    for rank in range(3):
        found, found_cov = torch.load(tmp_path / f"{rank}.pt")
        assert found["number"].tolist() == list(range(10))
        assert torch.equal(found["features"], expected["features"])
        torch.testing.assert_close(found_cov, cov, rtol=1e-12, atol=1e-12)
