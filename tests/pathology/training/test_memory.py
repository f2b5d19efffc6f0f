"""Bags that are too large to train on are refused before the run, and no others."""

import subprocess
import sys
from pathlib import Path

import pytest

from examples.pathology.cohort.patients import Patient
from examples.pathology.common.errors import UserError
from examples.pathology.training import attention
from examples.pathology.training.memory import memory_bytes, refuse_bags_too_large
from tests.pathology.tiny import training

ROOT = Path(__file__).parents[3]
PATIENTS = [Patient(f"P{n}", "a", {}, (), n) for n in (3, 60_000, 500)]
GB = 10**9

PEAK = """
import sys, torch
from examples.pathology.training import attention
from examples.pathology.training.model import JointTransformer

def peak():  # not that of `resource`, which begins at the parent's
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))

tiles, layers, width, attention.MATRIX_GB = map(int, sys.argv[1:])
model = JointTransformer([2], in_features=8, layers=layers, d_model=width, feedforward=2 * width)
before = peak()
model.train()(torch.randn(tiles, 8)).outputs[0].sum().backward()
print(peak() - before)
"""


def test_the_patient_and_the_remedy_are_named():
    """6,400 tiles: 24 bytes a pair, in seven matrices; 60,000: 384 x 4 bytes, 43 times a tile."""
    people = [*PATIENTS, Patient("P6400", "a", {}, (), 6400)]
    words = r"patient P6400 has 6400 tiles: .* needs 7 GB, .* has 6 GB\. Give --max-tiles 4225"
    with pytest.raises(UserError, match=words):
        refuse_bags_too_large(people, training(layers=2), "cpu", memory=6 * GB)
    words = r"patient P60000 has 60000 tiles: .* needs 4 GB, .* has 3 GB\. Give --max-tiles 22710"
    with pytest.raises(UserError, match=words):
        refuse_bags_too_large(PATIENTS, training(layers=2), "cpu", memory=3 * GB)
    refuse_bags_too_large(PATIENTS, training(layers=2), "cpu", memory=4 * GB)


def test_a_limit_that_is_too_high_is_to_be_lower():
    words = r"`max-tiles` must be lower .* has 60000 tiles: a step on 50000 needs 3 GB"
    with pytest.raises(UserError, match=words):
        refuse_bags_too_large(PATIENTS, training(max_tiles=50_000), "cpu", memory=2 * GB)


@pytest.mark.parametrize("gigabytes", [0.1, 1, 2, 3, 6])
def test_what_it_advises_passes(gigabytes):
    """Whoever has fewer tiles may need more memory, and must not be refused in turn."""
    people = [Patient(f"P{n}", "a", {}, (), n) for n in (6000, 6454, 6455, 200_000)]
    memory = int(gigabytes * GB)
    with pytest.raises(UserError) as caught:
        refuse_bags_too_large(people, training(), "cpu", memory=memory)
    advised = int(str(caught.value).partition("--max-tiles ")[2].split()[0])
    assert advised > 100
    refuse_bags_too_large(people, training(max_tiles=advised), "cpu", memory=memory)


def test_a_gpu_and_small_bags_are_let_pass():
    refuse_bags_too_large(PATIENTS, training(), "cuda:1", memory=GB)
    refuse_bags_too_large(PATIENTS[::2], training(), "cpu", memory=GB)
    refuse_bags_too_large(PATIENTS, training(max_tiles=500), "cpu", memory=GB)
    assert memory_bytes() > GB


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is asked of /proc")
@pytest.mark.parametrize(
    ("layers", "tiles", "width", "blocks"),
    [(1, 1500, 12, False), (2, 1500, 12, False), (2, 2000, 384, True)],
)
def test_nothing_is_refused_that_fits(monkeypatch, layers, tiles, width, blocks):
    """The memory that a step really takes would be refused if it were a byte less, or nearly."""
    matrix_gb = 0 if blocks else 1
    monkeypatch.setattr(attention, "MATRIX_GB", matrix_gb)
    line = [sys.executable, "-c", PEAK, *map(str, (tiles, layers, width, matrix_gb))]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    peak = int(done.stdout) * 1024
    patients = [Patient("P", "a", {}, (), tiles)]
    settings = training(layers=layers, width=width)
    refuse_bags_too_large(patients, settings, "cpu", memory=peak)
    with pytest.raises(UserError):
        refuse_bags_too_large(patients, settings, "cpu", memory=int(0.7 * peak))
