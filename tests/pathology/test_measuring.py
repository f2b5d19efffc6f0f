import math

import numpy as np
import pandas as pd

from examples.pathology.cohort import Target
from examples.pathology.measuring import measure_fold
from examples.pathology.results import FoldResult

LABEL = Target("isMSIH", "classification", ("MSIH", "MSS"), "MSIH")


def test_a_fold_of_one_class_has_no_auroc_and_says_why():
    table = pd.DataFrame(
        {"PATIENT": ["a", "b"], "isMSIH": ["MSS"] * 2, "isMSIH_MSIH": ["0.2", "0.4"]}
    )
    measured = measure_fold(FoldResult(table, np.eye(2, dtype=np.float32), 1, 1, 0.0), [LABEL])
    for name in ("auroc", "auprc", "silhouette"):
        assert math.isnan(measured[name].score.value)
        assert measured[name].score.reason == "one class only"
