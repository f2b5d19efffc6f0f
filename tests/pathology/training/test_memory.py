"""Bags that are too large to train on are refused before the run, and no others."""

import subprocess
import sys
from pathlib import Path

import pytest

from examples.pathology.cohort.patients import Patient
from examples.pathology.common.errors import UserError
from examples.pathology.training.memory import memory_bytes, refuse_bags_too_large
from tests.pathology.tiny import training

ROOT = Path(__file__).parents[3]
PATIENTS = [Patient(f"P{n}", "a", {}, (), n) for n in (3, 60_000, 500)]
GB = 10**9

PEAK = """
import sys, torch
from examples.pathology.training.model import JointTransformer

def peak():  # not that of `resource`, which begins at the parent's
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))

tiles, layers = map(int, sys.argv[1:])
model = JointTransformer([2], in_features=8, layers=layers, d_model=12, feedforward=24).train()
before = peak()
model(torch.randn(tiles, 8)).outputs[0].sum().backward()
print(peak() - before)
"""


def test_the_patient_and_the_remedy_are_named():
    words = r"patient P60000 has 60000 tiles: .* needs 605 GB, .* has 25 GB\. Give --max-tiles 8625"
    with pytest.raises(UserError, match=words):
        refuse_bags_too_large(PATIENTS, training(layers=2), "cpu", memory=25 * GB)


def test_what_it_advises_passes():
    with pytest.raises(UserError) as caught:
        refuse_bags_too_large(PATIENTS, training(layers=1), "cpu", memory=8 * GB)
    advised = int(str(caught.value).partition("--max-tiles ")[2].split()[0])
    refuse_bags_too_large(PATIENTS, training(max_tiles=advised), "cpu", memory=8 * GB)


def test_a_gpu_and_small_bags_are_let_pass():
    refuse_bags_too_large(PATIENTS, training(), "cuda:1", memory=GB)
    refuse_bags_too_large(PATIENTS[::2], training(), "cpu", memory=GB)
    refuse_bags_too_large(PATIENTS, training(max_tiles=500), "cpu", memory=GB)
    assert memory_bytes() is None or memory_bytes() > GB


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is asked of /proc")
@pytest.mark.parametrize("layers", [1, 2])
def test_nothing_is_refused_that_fits(layers):
    """The memory that a step really takes would be refused if it were a byte less, or nearly."""
    line = [sys.executable, "-c", PEAK, "1500", str(layers)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    peak = int(done.stdout) * 1024
    patients = [Patient("P", "a", {}, (), 1500)]
    refuse_bags_too_large(patients, training(layers=layers), "cpu", memory=peak)
    with pytest.raises(UserError):
        refuse_bags_too_large(patients, training(layers=layers), "cpu", memory=int(0.7 * peak))
