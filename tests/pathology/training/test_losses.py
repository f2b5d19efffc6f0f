import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.pathology.cohort.patients import Patient
from examples.pathology.cohort.targets import Target
from examples.pathology.common.errors import UserError
from examples.pathology.training.losses import Scaler, fit_scalers, task_losses

LABEL = Target("isMSIH", "classification", ("MSIH", "MSS"), "MSIH")
LF = Target("LF", "regression")


def patient(label="MSIH", **known):
    return Patient("P", label, known, (), 1)


def test_losses_worked_by_hand():
    outputs = (torch.tensor([[2.0, 0.0]]), torch.tensor([[0.75]]))
    losses = task_losses(outputs, patient(LF=30.0), [LABEL, LF], {"LF": Scaler(10.0, 50.0)})
    assert float(losses["isMSIH"]) == pytest.approx(math.log(1 + math.exp(-2)))
    assert float(losses["LF"]) == pytest.approx((0.75 - 0.5) ** 2)


def test_a_regression_as_the_primary_target_worked_by_hand():
    outputs = (torch.tensor([[0.75]]), torch.tensor([[2.0, 0.0]]))
    one = patient(label="30", isMSIH="MSIH")
    losses = task_losses(outputs, one, [LF, LABEL], {"LF": Scaler(10.0, 50.0)})
    assert float(losses["LF"]) == pytest.approx((0.75 - 0.5) ** 2)
    assert float(losses["isMSIH"]) == pytest.approx(math.log(1 + math.exp(-2)))
    alone = task_losses(outputs, patient(label="", isMSIH="MSIH"), [LF, LABEL], {})
    assert set(alone) == {"isMSIH"}


def test_a_task_without_a_value_is_absent():
    outputs = (torch.zeros(1, 2), torch.zeros(1, 1))
    assert set(task_losses(outputs, patient(), [LABEL, LF], {"LF": Scaler(0, 1)})) == {"isMSIH"}


def test_a_patient_without_the_primary_label_is_trained_on_for_the_others():
    outputs = (torch.zeros(1, 2), torch.zeros(1, 1))
    one = patient(label="", LF=0.5)
    assert set(task_losses(outputs, one, [LABEL, LF], {"LF": Scaler(0, 1)})) == {"LF"}


def test_an_auxiliary_class_has_a_cross_entropy():
    grade = Target("grade", "classification", ("1", "2", "3"), "3")
    outputs = (torch.zeros(1, 2), torch.zeros(1, 3))
    losses = task_losses(outputs, patient(grade="2"), [LABEL, grade], {})
    assert float(losses["grade"]) == pytest.approx(math.log(3))


@given(st.floats(-1e6, 1e6), st.floats(0.001, 1e6), st.floats(-1e6, 1e6))
def test_a_scaler_goes_there_and_back(low, spread, value):
    scaler = Scaler(low, low + spread)
    assert scaler.unscale(scaler.scale(value)) == pytest.approx(value, rel=1e-6, abs=1e-4)
    assert scaler.scale(scaler.low) == 0.0
    assert scaler.scale(scaler.high) == 1.0


def test_scalers_see_the_training_part_alone():
    patients = [patient(LF=value) for value in (3.0, 1.0, 2.0)] + [patient()]
    assert fit_scalers([LABEL, LF], patients) == {"LF": Scaler(1.0, 3.0)}
    labelled = [patient(label=text) for text in ("-1.5", "0", "", "4e1")]
    assert fit_scalers([LF, LABEL], labelled) == {"LF": Scaler(-1.5, 40.0)}
    with pytest.raises(UserError, match="`LF` must have at least 2 values in every training part"):
        fit_scalers([LABEL, LF], patients[:1])
