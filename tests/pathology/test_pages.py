import re

from PIL import Image

from examples.pathology import pages


def test_figures_are_shown_on_one_scale_so_that_their_letters_are_of_one_size(tmp_path):
    files = []
    for width in (600, 2400):
        files.append((f"<{width}>", tmp_path / f"{width}.png"))
        Image.new("RGB", (width, 9)).save(files[-1][1])
    text = pages.figures_html(files)
    narrow, broad = (int(width) for width in re.findall(r"width='(\d+)'", text))
    assert broad == 4 * narrow
    assert "alt='&lt;600&gt;'" in text
    assert pages.figures_html(files, wide=True).count("class='wide'") == 2


def test_a_number_its_spread_and_its_interval_are_not_torn_apart():
    text = pages.table_html(["", "r, a b"], [["a b", "0.5 ± 0.1 [0.3, 0.7] (4 of 5 folds)"]])
    assert "0.5\xa0±\xa00.1 [0.3,\xa00.7] (4 of 5 folds)" in text
    assert "a b</th>" in text
