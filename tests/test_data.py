"""The laws of choosing samples, and the readers on files that the tests write themselves.

With ``HPC_C2G_DATA`` set to a folder of real data sets the readers are tested on these as well.
"""

from __future__ import annotations

import gzip
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from hpc_c2g.data.choose import even_shares, filled_shares, split_files, split_pool
from hpc_c2g.data.config import EMBEDDED, NAMES, ON_DISK, TOYS, DataConfig
from hpc_c2g.data.dataset import Dataset, Split
from hpc_c2g.data.load import LOADERS, load_split
from hpc_c2g.errors import UserError

REAL_ROOT = os.environ.get("HPC_C2G_DATA")
MNIST_FILES = [f"{part}-{what}" for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]


def fake_images(count: int, side: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[n, H, W, C]`` whose first pixel is their index, and labels 0, 1, .., 9, 0, .."""
    pixels = np.random.default_rng(count).integers(0, 256, (count, side, side, channels), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count)
    return pixels, (np.arange(count) % 10).astype(np.uint8)


def make_mnist(root: Path, packed: bool = True) -> tuple[np.ndarray, np.ndarray]:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (pixels, labels), (test_pixels, test_labels) = fake_images(60, 28, 1), fake_images(30, 28, 1)
    for name, array in zip(MNIST_FILES, (pixels[..., 0], labels, test_pixels[..., 0], test_labels), strict=True):
        content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
        (raw / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return pixels, labels


def make_cifar(path: Path, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels, labels), (test_pixels, test_labels) = fake_images(40, 32, 3), fake_images(20, 32, 3)
    train = {"train_images": pixels, "train_labels": labels}
    arrays = train | {"test_images": test_pixels, "test_labels": test_labels} | changes
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    return pixels, labels


def make_celeba(folder: Path, count: int = 20) -> None:
    """Every third face smiles: a red square in the middle, the others' is blue; above and below it all are green."""
    (folder / "img_align_celeba").mkdir(parents=True)
    lines = [str(count), "Bald Smiling"]
    for i in range(1, count + 1):
        smiling = i % 3 == 0
        image = Image.new("RGB", (16, 32), (0, 250, 0))
        image.paste((250, 0, 0) if smiling else (0, 0, 250), (0, 8, 16, 24))
        image.save(folder / "img_align_celeba" / f"{i:06d}.jpg", quality=95, subsampling=0)
        lines.append(f"{i:06d}.jpg -1 {' 1' if smiling else '-1'}")
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")


def load(name: str, root: Path | str = "", train_size: int | None = 10, **fields: Any) -> Split:
    return load_split(DataConfig(name=name, root=str(root), train_size=train_size, **fields))


def rows(data: Dataset) -> set[bytes]:
    return {row.numpy().tobytes() for row in data.samples}


def check_invariants(split: Split) -> None:
    for part in (split.train, split.held_out):
        assert (part.samples.dtype, part.labels.dtype) == (torch.float32, torch.int64)
        assert part.samples.shape[1:] == split.train.samples.shape[1:]
        assert len(part.samples) == len(part.labels) > 0
        assert part.classes == split.train.classes
        assert 0 <= int(part.labels.min()) <= int(part.labels.max()) < len(part.classes)
        low, high = part.value_range
        assert low <= float(part.samples.min()) < float(part.samples.max()) <= high
    counts = split.train.labels.bincount(minlength=len(split.train.classes)).tolist()
    assert counts == even_shares(len(split.train), len(split.train.classes))


class TestConfig:
    def test_is_a_structured_config(self) -> None:
        merged = OmegaConf.merge(OmegaConf.structured(DataConfig), {"train_size": None, "classes": [3, 5]})
        assert OmegaConf.to_object(merged) == DataConfig(train_size=None, classes=[3, 5])

    def test_every_name_has_a_loader(self) -> None:
        assert set(LOADERS) == set(NAMES) == {*EMBEDDED, *TOYS, *ON_DISK}

    def test_refuses_what_is_out_of_range_when_made_and_when_changed(self, subtests: pytest.Subtests) -> None:
        for fields, told in [
            ({"name": "imagenet"}, "data.name='imagenet' is unknown -- choose one of digits"),
            ({"train_size": 0}, "data.train_size=0"),
            ({"held_out_size": -1}, "data.held_out_size=-1"),
            ({"image_size": 0}, "data.image_size=0"),
            ({"seed": -1}, "data.seed=-1"),
            ({"classes": [4]}, "at least two classes"),
            ({"classes": [4, 4]}, "names a class twice"),
            ({"classes": [4, -1]}, "negative"),
            ({"name": "moons", "train_size": None}, "data.train_size=null"),
        ]:
            with subtests.test(told):
                with pytest.raises(UserError) as error:
                    DataConfig(**fields)
                assert told in str(error.value)
                config = DataConfig()
                for field, value in fields.items():
                    setattr(config, field, value)
                with pytest.raises(UserError):
                    load_split(config)


class TestChoice:
    @given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.data())
    def test_shares_are_even_as_far_as_the_classes_reach(self, available: list[int], data: st.DataObject) -> None:
        size = data.draw(st.integers(0, sum(available)))
        shares = filled_shares(size, available)
        assert sum(shares) == size
        assert all(0 <= share <= most for share, most in zip(shares, available, strict=True))
        unfilled = [share for share, most in zip(shares, available, strict=True) if share < most]
        assert all(share <= min(unfilled) + 1 for share in shares if unfilled)
        assert filled_shares(size, [size] * len(available)) == even_shares(size, len(available))

    @given(st.integers(0, 5), st.integers(2, 12), st.integers(1, 12), st.integers(1, 8))
    def test_parts_are_disjoint_and_the_train_part_does_not_depend_on_the_held_out_size(
        self, seed: int, train_size: int, more: int, held: int
    ) -> None:
        labels = np.random.default_rng(seed).permutation(np.repeat([0, 1, -1], [20, 25, 5]))
        config = DataConfig(train_size=train_size, seed=seed)
        train, rest = split_pool(labels, ["a", "b"], config)
        assert len(train) == train_size
        assert sorted([*train, *rest]) == np.flatnonzero(labels >= 0).tolist()
        train_again, few = split_pool(labels, ["a", "b"], replace(config, held_out_size=held))
        assert (train_again == train).all()
        assert len(few) == held
        assert set(few) <= set(rest)
        larger, _ = split_pool(labels, ["a", "b"], replace(config, train_size=train_size + more))
        assert set(train) <= set(larger)

    def test_null_sizes_use_everything(self) -> None:
        labels, config = np.repeat([0, 1], [20, 30]), DataConfig(train_size=None)
        assert [len(part) for part in split_pool(labels, ["a", "b"], config)] == [40, 10]
        assert [len(part) for part in split_pool(labels, ["a", "b"], replace(config, held_out_size=6))] == [44, 6]
        assert [len(part) for part in split_files(labels, labels, ["a", "b"], config)] == [50, 50]

    def test_refuses_more_than_there_is(self, subtests: pytest.Subtests) -> None:
        for fields, told in [
            ({"train_size": 60}, "data.train_size=60 needs 30 samples of class 'a'"),
            ({"train_size": 1}, "data.train_size=1 leaves some of the 2 classes"),
            ({"train_size": 40}, "nothing is held out"),
            ({"train_size": 10, "held_out_size": 31}, "data.held_out_size=31 is more than the 30 samples"),
            ({"train_size": None, "held_out_size": 40}, "class 'a' of digits has no samples left"),
        ]:
            with subtests.test(told):
                with pytest.raises(UserError) as error:
                    split_pool(np.repeat([0, 1], 20), ["a", "b"], DataConfig(**fields))
                assert told in str(error.value)


@pytest.mark.parametrize("name", [*EMBEDDED, *TOYS])
class TestWithoutFiles:
    def test_parts_are_balanced_disjoint_and_chosen_by_the_seed_alone(self, name: str) -> None:
        split, again, other = (load(name, train_size=50, seed=seed) for seed in (0, 0, 1))
        check_invariants(split)
        assert len(split.train) == 50
        assert not rows(split.train) & rows(split.held_out)
        for part, twin in ((split.train, again.train), (split.held_out, again.held_out)):
            assert torch.equal(part.samples, twin.samples)
            assert torch.equal(part.labels, twin.labels)
        assert rows(split.train) != rows(other.train)

    def test_classes_are_relabeled_in_the_order_given(self, name: str) -> None:
        whole = load(name, train_size=60).train
        part = load(name, train_size=20, classes=[1, 0]).train
        assert part.classes == [whole.classes[1], whole.classes[0]]
        with pytest.raises(UserError, match=r"data\.classes=\[0, 10\]"):
            load(name, classes=[0, 10])


def test_digits_are_the_whole_data_set_in_17_grey_levels() -> None:
    split = load("digits", train_size=100)
    assert split.train.samples.shape == (100, 1, 8, 8)
    assert len(split.held_out) == 1697
    assert torch.unique(split.train.samples * 16).tolist() == list(range(17))


@pytest.mark.parametrize("name", ["breast_cancer", "wine"])
def test_tables_are_standardised_by_the_train_part_alone(name: str) -> None:
    split = load(name, train_size=60)
    within = (split.train.samples.abs() < 5).all(dim=0)
    assert int(within.sum()) > 3
    assert torch.allclose(split.train.samples.mean(0)[within], torch.zeros(()), atol=1e-5)
    assert torch.allclose(split.train.samples.std(0, correction=0)[within], torch.ones(()), atol=1e-5)
    fewer = load(name, train_size=60, held_out_size=10)
    assert torch.equal(split.train.samples, fewer.train.samples)
    assert rows(fewer.held_out) <= rows(split.held_out)


@pytest.mark.parametrize("name", TOYS)
def test_toys_have_a_thousand_held_out_points_and_grow_by_adding(name: str) -> None:
    split = load(name, train_size=50)
    assert len(split.held_out) == 1000
    assert rows(split.train) < rows(load(name, train_size=70).train)
    with pytest.raises(UserError, match=r"data\.held_out_size=1"):
        load(name, held_out_size=1)


class TestMnist:
    @pytest.mark.parametrize("packed", [True, False])
    def test_reads_the_images_and_leaves_the_folder_alone(self, tmp_path: Path, packed: bool) -> None:
        pixels, labels = make_mnist(tmp_path, packed)
        before = sorted(tmp_path.rglob("*"))
        split = load("mnist", tmp_path, 20)
        check_invariants(split)
        assert len(split.held_out) == 30
        for sample, label in zip(split.train.samples, split.train.labels, strict=True):
            index = round(float(sample[0, 0, 0]) * 255)
            assert int(label) == labels[index]
            assert np.allclose(sample[0].numpy() * 255, pixels[index, ..., 0], atol=1e-4)
        assert sorted(tmp_path.rglob("*")) == before

    def test_a_missing_or_damaged_file_is_named(self, subtests: pytest.Subtests, tmp_path: Path) -> None:
        for damage in ["missing", "truncated", "not gzip", "empty", "magic", "short", "fewer labels"]:
            folder = tmp_path / damage
            with subtests.test(damage):
                make_mnist(folder)
                name = MNIST_FILES[1 if damage == "fewer labels" else 0]
                path = folder / "MNIST" / "raw" / f"{name}.gz"
                content = path.read_bytes()
                plain = gzip.decompress(content)
                damaged = {
                    "truncated": content[:-100],
                    "not gzip": b"<html>404</html>",
                    "empty": gzip.compress(b""),
                    "magic": gzip.compress(b"\0\0\x08\x01" + plain[4:]),
                    "short": gzip.compress(plain[:-1]),
                    "fewer labels": gzip.compress(b"\0\0\x08\x01\0\0\0\x3b" + plain[8:-1]),
                }
                path.unlink()
                if damage in damaged:
                    path.write_bytes(damaged[damage])
                with pytest.raises(UserError, match=name):
                    load("mnist", folder)


class TestCifar:
    @pytest.mark.parametrize("file", ["cifar10_subset.npz", "cifar10_subset/any.npz"])
    def test_reads_a_subset(self, tmp_path: Path, file: str) -> None:
        pixels, labels = make_cifar(tmp_path / file)
        split = load("cifar10", tmp_path, 11, classes=[7, 2, 9])
        check_invariants(split)
        assert split.train.classes == ["horse", "bird", "truck"]
        assert len(split.held_out) == 6
        for sample, label in zip(split.train.samples, split.train.labels, strict=True):
            index = round(float(sample[0, 0, 0]) * 255)
            assert labels[index] == [7, 2, 9][int(label)]
            assert np.allclose(sample.numpy().transpose(1, 2, 0) * 255, pixels[index], atol=1e-4)

    def test_joins_several_files(self, tmp_path: Path) -> None:
        for name in ("a.npz", "b.npz"):
            make_cifar(tmp_path / "cifar10_subset" / name)
        split = load("cifar10", tmp_path, None)
        assert (len(split.train), len(split.held_out)) == (80, 40)

    def test_a_wrong_npz_is_refused(self, subtests: pytest.Subtests, tmp_path: Path) -> None:
        for changes, told in [
            ({"test_labels": None}, "lacks test_labels"),
            ({"train_images": np.zeros((40, 3, 32, 32), np.uint8)}, "train_images is uint8"),
            ({"train_images": np.zeros((40, 32, 32, 3))}, "train_images is float64"),
            ({"train_labels": np.full(40, 10)}, "one class of 0..9"),
            ({"train_labels": np.zeros(39, int)}, "one class of 0..9"),
            ({"train_labels": np.array([object()] * 40)}, "allow_pickle"),
        ]:
            with subtests.test(told):
                make_cifar(tmp_path / "cifar10_subset.npz", **changes)
                with pytest.raises(UserError, match=r"cifar10_subset\.npz") as error:
                    load("cifar10", tmp_path)
                assert told in str(error.value)

    def test_a_damaged_npz_is_named(self, subtests: pytest.Subtests, tmp_path: Path) -> None:
        for content in [b"", b"not a zip", b"PK\x03\x04 broken"]:
            with subtests.test(repr(content)):
                (tmp_path / "cifar10_subset.npz").write_bytes(content)
                with pytest.raises(UserError, match=r"cifar10_subset\.npz"):
                    load("cifar10", tmp_path)

    def test_a_changed_torchvision_folder_is_refused_before_unpickling(self, tmp_path: Path) -> None:
        (tmp_path / "cifar-10-batches-py").mkdir()
        (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cos\nabort\n(tR.")
        with pytest.raises(UserError, match="cifar-10-batches-py"):
            load("cifar10", tmp_path)


class TestCelebA:
    @pytest.mark.parametrize("folder", ["celeba", "."])
    def test_labels_follow_the_attribute_and_the_square_in_the_middle_is_kept(
        self, tmp_path: Path, folder: str
    ) -> None:
        make_celeba(tmp_path / folder)
        split = load("celeba", tmp_path, 8, attribute="Smiling", image_size=4)
        check_invariants(split)
        assert split.train.samples.shape == (8, 3, 4, 4)
        assert split.train.classes == ["not Smiling", "Smiling"]
        for part in (split.train, split.held_out):
            red, green, blue = part.samples.mean(dim=(2, 3)).T
            assert torch.equal((red > blue).long(), part.labels)
            assert float(green.max()) < 0.1

    def test_only_chosen_images_are_opened_and_the_last_fifth_is_held_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_celeba(tmp_path)
        opened: list[int] = []
        original = Image.open
        monkeypatch.setattr(Image, "open", lambda path: (opened.append(int(path.stem)), original(path))[1])
        load("celeba", tmp_path, 8, attribute="Smiling")
        assert len(opened) == 8 + 4
        assert sorted(opened)[-4:] == [17, 18, 19, 20]

    def test_a_wrong_list_is_refused(self, subtests: pytest.Subtests, tmp_path: Path) -> None:
        make_celeba(tmp_path)
        path = tmp_path / "list_attr_celeba.txt"
        intact = path.read_text()
        for old, new, told in [
            ("Smiling", "Male", "data.attribute='Smiling' is not in"),
            ("20\n", "21\n", "promises '21' images in line 1 and lists 20"),
            ("000003.jpg -1  1", "000003.jpg -1", "line 5"),
            ("000003.jpg -1  1", "000003.jpg -1 yes", "line 5"),
            ("000020.jpg", "000021.jpg", "000021.jpg cannot be read"),
        ]:
            with subtests.test(told):
                path.write_text(intact.replace(old, new, 1))
                with pytest.raises(UserError) as error:
                    load("celeba", tmp_path, attribute="Smiling")
                assert told in str(error.value)
                assert "'Smiling'" not in told or "Bald, Male" in error.value.hint


@pytest.mark.parametrize(("name", "told"), [("mnist", "MNIST/raw"), ("cifar10", "cifar-10"), ("celeba", "img_align")])
def test_a_root_without_the_data_tells_the_layout(tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(UserError, match=r"data\.root") as error:
        load(name, tmp_path)
    assert told in error.value.hint


@pytest.mark.skipif(REAL_ROOT is None, reason="HPC_C2G_DATA is not set to a folder of real data sets")
@pytest.mark.parametrize(("name", "shape"), [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32)), ("celeba", (3, 24, 24))])
def test_real_data_sets_load(name: str, shape: tuple[int, ...]) -> None:
    split = load(name, str(REAL_ROOT), 50, held_out_size=200, image_size=24)
    check_invariants(split)
    assert split.train.samples.shape == (50, *shape)
    assert len(split.held_out) == 200
    assert not rows(split.train) & rows(split.held_out)
    assert 0.05 < float(split.train.samples.mean()) < 0.7
