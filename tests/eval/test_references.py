"""Reference files as ADM, JiT, clean-fid and torch-fidelity write them, and files that are none."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from raev2.errors import DataError
from raev2.eval.distances import Moments, moments_distance
from raev2.eval.references import check_originals, read_reference

DIM = 6
FEATURES = np.random.RandomState(0).randn(50, DIM)
MU, SIGMA = FEATURES.mean(0), np.cov(FEATURES, rowvar=False)


@pytest.fixture
def written(tmp_path):
    def write(name, **arrays):
        file = tmp_path / name
        np.savez(file, **arrays)
        return file

    return write


def pictures(num=3, size=8):
    return np.zeros((num, size, size, 3), np.uint8)


@pytest.mark.parametrize("names", [("mu", "sigma"), ("ref_mu", "ref_sigma")])
def test_statistics_under_either_name_give_the_distance_of_the_features(written, names):
    reference = read_reference(written("jit.npz", **dict(zip(names, (MU, SIGMA), strict=True))))
    other = Moments.of(torch.from_numpy(FEATURES) + torch.tensor([3.0, 4, 0, 0, 0, 0]))
    assert moments_distance(other, reference.of_space("toy", DIM)) == pytest.approx(25)
    assert not reference.has_pictures and reference.of_space("toy", DIM, "spatial") is None


def test_the_file_of_adm_has_pictures_and_the_statistics_of_two_outputs(written):
    file = written("adm.npz", arr_0=pictures(), mu=MU, sigma=SIGMA, mu_s=MU[:4], sigma_s=SIGMA[:4, :4])
    reference = read_reference(file)
    assert reference.has_pictures and set(reference.statistics) == {"", "spatial"}
    assert reference.of_space("inception", 4, "spatial").cov.tolist() == SIGMA[:4, :4].tolist()
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert reference.identity() == {"file": "adm.npz", "sha256": sha256, "num_images": None}


def test_what_torch_fidelity_keeps_of_a_set_is_read_without_running_it(tmp_path):
    torch_fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    statistics = torch_fidelity.fid_features_to_statistics(torch.from_numpy(FEATURES))
    torch.save(statistics, tmp_path / "stat.pt")
    found = read_reference(tmp_path / "stat.pt").of_space("toy", DIM)
    assert np.array_equal(found.mean, MU) and np.array_equal(found.cov, SIGMA)


def test_a_file_of_numpy_one_inside_torch_is_read_too(tmp_path):
    torch.save({"mu": MU, "sigma": SIGMA}, tmp_path / "new.pt")
    old = (tmp_path / "new.pt").read_bytes()
    assert b"numpy._core" in old or b"numpy.core" in old
    renamed = {"mu": MU.tolist(), "sigma": SIGMA}

    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            if getattr(obj, "__name__", "") == "_reconstruct":
                self.write(b"cnumpy.core.multiarray\n_reconstruct\n")
            else:
                super().save_global(obj, name)

    module = type("numpy_1", (), {"Pickler": Pickler, "__name__": "pickle", "dump": pickle.dump})
    torch.save(renamed | {"mu": MU}, tmp_path / "old.pt", pickle_module=module)
    assert b"numpy.core.multiarray" in (tmp_path / "old.pt").read_bytes()
    assert np.array_equal(read_reference(tmp_path / "old.pt").of_space("toy", DIM).cov, SIGMA)


def test_features_of_ours_know_their_number(tmp_path):
    rows = torch.from_numpy(FEATURES)
    save_file({**Moments.of(rows).tensors(), "rows": rows}, tmp_path / "own.safetensors")
    reference = read_reference(tmp_path / "own.safetensors")
    assert reference.identity()["num_images"] == 50 and torch.equal(reference.rows, rows)
    assert np.allclose(reference.of_space("toy", DIM).cov, SIGMA)


def test_a_pickle_is_refused_with_a_way_out_and_nothing_in_it_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    (tmp_path / "reference.pkl").write_bytes(pickle.dumps({"mu": Evil()}))
    with pytest.raises(DataError, match=r"formats that run nothing.*got '.pkl'; expected .npz, .*load it and np.savez"):
        read_reference(tmp_path / "reference.pkl")
    torch.save({"mu": Evil(), "sigma": SIGMA}, tmp_path / "reference.pt")
    np.savez(tmp_path / "reference.npz", mu=np.array([Evil()], dtype=object), sigma=SIGMA)
    for name in ("reference.pt", "reference.npz"):
        with pytest.raises(DataError, match=f"{name}: cannot be read; got .*"):
            read_reference(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"sigma": SIGMA}, "half of the statistics are missing; got sigma; expected mu"),
        (
            {"mu": MU, "sigma": SIGMA[:3]},
            r"not a mean and a covariance; got shapes \(6,\) and \(3, 6\); expected \(D,\)",
        ),
        ({"mu": MU, "sigma": SIGMA.astype(int)}, "not a mean and a covariance"),
        ({"mu": MU * np.nan, "sigma": SIGMA}, "mu or sigma is not finite. The file is broken"),
        ({"feats": FEATURES}, "holds no statistics; got feats; expected mu and sigma"),
        ({"arr_0": pictures()}, "holds no statistics: pictures alone are a reference of reconstruction; got arr_0"),
    ],
)
def test_a_file_with_the_wrong_arrays_says_what_it_has(written, arrays, message):
    with pytest.raises(DataError, match=message):
        read_reference(written("wrong.npz", **arrays))


def test_statistics_of_another_space_a_damaged_and_a_missing_file_are_errors(written, tmp_path):
    file = written("right.npz", mu=MU, sigma=SIGMA)
    with pytest.raises(
        DataError, match="made in another feature space; got 6 features; expected 2,048, as 'inception'"
    ):
        read_reference(file).of_space("inception", 2048)
    (tmp_path / "cut.npz").write_bytes(file.read_bytes()[:200])
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 9)
    (tmp_path / "cut.pt").write_bytes(file.read_bytes()[:200])
    for name in ("cut.npz", "cut.safetensors", "cut.pt"):
        with pytest.raises(DataError, match=f"{name}: cannot be read"):
            read_reference(tmp_path / name)
    with pytest.raises(DataError, match="none.npz: cannot be read; got .*No such file"):
        read_reference(tmp_path / "none.npz")


def test_a_reconstruction_refuses_a_reference_of_generation(written, tmp_path):
    for arrays in ({"mu": MU, "sigma": SIGMA}, {"arr_0": pictures(), "mu": MU, "sigma": SIGMA}):
        with pytest.raises(
            DataError, match="a reference of generation, not of reconstruction; got mu, sigma; expected"
        ):
            check_originals(written("generation.npz", **arrays))
    check_originals(written("val.npz", arr_0=pictures()))
    check_originals(tmp_path)
