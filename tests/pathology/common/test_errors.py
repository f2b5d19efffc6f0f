from examples.pathology.common.errors import listing, nearest


def test_errors_help():
    assert nearest("crosval", ["crossval", "demo"]) == " Did you mean `crossval`?"
    assert nearest("xyz", ["crossval"]) == ""
    assert listing("abc", 2) == "a, b and 1 more"
    assert listing([]) == ""
