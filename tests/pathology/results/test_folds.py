import pytest

from examples.pathology.common.errors import UserError
from examples.pathology.results.folds import read_fold


def test_an_unfinished_fold_is_not_read(tmp_path):
    with pytest.raises(UserError, match="must be a finished fold, but is not"):
        read_fold(tmp_path)
