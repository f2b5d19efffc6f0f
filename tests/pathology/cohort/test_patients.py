from examples.pathology.cohort.patients import Patient, values_of
from examples.pathology.cohort.targets import Target

PEOPLE = [
    Patient("A", "1.50", {"grade": "high"}, (), 1),
    Patient("B", "", {"grade": "low", "age": 61.0}, (), 1),
    Patient("C", "-2", {}, (), 1),
]


def test_values_are_those_known_of_each_target_in_the_order_of_patients():
    targets = [
        Target("score", "regression"),
        Target("grade", "classification", ("high", "low"), "high"),
        Target("none", "regression"),
    ]
    values = values_of(PEOPLE, targets)
    assert values == {"score": [1.5, -2.0], "grade": ["high", "low"], "none": []}
