"""Laws of the plane's picture: who carries multipliers is the certificate's word, and distances are those to the nearest of one's class."""

from __future__ import annotations

import io
import math

import pytest
import torch
from PIL import Image

from hpc_c2g.classifiers.bundle import load_bundle
from hpc_c2g.classifiers.rates import find_rates
from hpc_c2g.data.config import DataConfig
from hpc_c2g.data.load import load_split
from hpc_c2g.evaluation.landscape import CARRIES, picture, support
from hpc_c2g.fitting.certificate import certify
from hpc_c2g.fitting.config import ClassifierConfig, InitConfig, MarginFitConfig
from hpc_c2g.fitting.make import make_classifier

DATA = DataConfig(name="blobs", train_size=20)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plane") / "classifier"
    model, fit = {"_target_": "mlp", "width": 40}, MarginFitConfig(target_margin=5.0)
    init = InitConfig(first=0.3)
    make_classifier(ClassifierConfig(out=str(folder), data=DATA, model=model, fit=fit, init=init))
    return load_bundle(str(folder)), load_split(DATA).train


def test_support_samples_are_those_with_a_multiplier_in_the_certificate(fitted):
    bundle, train = fitted
    found = support(bundle, train, train.samples, train.labels)
    x = bundle.normalization.normalize(train.samples.double())
    mass = certify(bundle, x, train.labels, find_rates(bundle.model).parameters).multipliers.sum(1)
    assert found.carries.tolist() == (mass > CARRIES * mass.max()).tolist()
    assert 2 <= int(found.carries.sum()) < len(train)


def test_distances_are_medians_to_the_nearest_of_ones_own_class(fitted):
    bundle, train = fitted
    carries = support(bundle, train, train.samples, train.labels).carries
    own = train.samples[carries] + torch.tensor([0.003, 0.004])
    found = support(bundle, train, own, train.labels[carries])
    assert found.to_support == pytest.approx(0.005, abs=1e-4)
    for kind, value in ((True, found.to_support), (False, found.to_others)):
        brute = []
        for point, label in zip(own, train.labels[carries], strict=True):
            there = [
                math.dist(point, p)
                for p, y, c in zip(train.samples, train.labels, carries, strict=True)
                if y == label and c == kind
            ]
            brute += [min(there)] if there else []
        assert value == pytest.approx(float(torch.tensor(brute).median()), rel=1e-5)


def test_the_picture_is_one(fitted):
    bundle, train = fitted
    carries = torch.arange(len(train)) % 2 == 0
    with Image.open(io.BytesIO(picture(bundle, train, train.samples, train.labels, carries))) as image:
        assert min(image.size) > 300
