import pytest
import torch

from examples.pathology.training.bags import BagStore
from examples.pathology.training.losses import Scaler
from examples.pathology.training.model import JointTransformer
from examples.pathology.training.prediction import Fitted, matrix_precision, predict
from tests.pathology.tiny import make_tables


def fitted_for(cohort, scalers):
    torch.manual_seed(0)
    model = JointTransformer(
        [target.width for target in cohort.targets],
        in_features=cohort.kind.in_features,
        layers=1,
        d_model=16,
        heads=2,
        feedforward=16,
    )
    return Fitted(model.eval(), cohort.targets, scalers, (), 1)


def test_predictions_are_probabilities_and_numbers_in_the_targets_unit(tmp_path):
    cohort = make_tables(tmp_path).load()
    fitted = fitted_for(cohort, {"LF": Scaler(10.0, 50.0)})
    one = cohort.patients[0]
    with torch.inference_mode():
        logits, raw = fitted.model(torch.from_numpy(BagStore().load(one))).outputs
    (said,) = predict(fitted, [one])
    assert said.numbers["LF"] == pytest.approx(10.0 + 40.0 * float(raw), rel=1e-5)
    odds = torch.exp(logits[0].double())
    assert said.probabilities["isMSIH"] == pytest.approx((odds / odds.sum()).numpy(), rel=1e-5)


def test_tf32_is_a_setting_of_the_run_alone():
    before = torch.get_float32_matmul_precision()
    with matrix_precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
