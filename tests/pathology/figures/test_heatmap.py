import numpy as np

from examples.pathology.figures.heatmap import top_tiles
from examples.pathology.figures.sheet import Sheet


def test_a_long_name_stands_above_its_row_and_moves_nothing(tmp_path, drawn):
    tile = np.zeros((8, 8, 3), dtype=np.uint8)
    for name in ("g1", "Lymphocyte Infiltration Signature Score"):
        rows = [(name, [tile] * 4, np.linspace(1, 0, 4)), ("g2", [tile] * 4, np.linspace(1, 0, 4))]
        top_tiles(rows, Sheet(tmp_path / "x.png", "t"), small=True)
    short, long = ([axes.get_position().bounds for axes in figure.axes] for figure in drawn)
    np.testing.assert_allclose(long, short)
    figure = drawn[1]
    boxes = [axes.texts[0].get_window_extent() for axes in figure.axes if axes.texts]
    titles = [axes.title.get_window_extent() for axes in figure.axes]
    pictures = [axes.get_window_extent() for axes in figure.axes]
    assert len(boxes) == 2
    assert boxes[0].ymax <= figure.bbox.ymax
    for box in boxes:
        assert not any(box.overlaps(picture) for picture in pictures)
    for title in titles:  # the first of its two lines is empty
        line = title.frozen()
        line.y1 -= title.height / 2
        assert not any(box.overlaps(line) for box in boxes)
