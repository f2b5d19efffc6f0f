"""Areas of tiles against counting tiles, shoelaces and rays; never against the library used."""

import itertools
import json

import numpy as np
import pytest

from examples.pathology.runs.geojson import annotations, boxes_px


def doubled_area(ring) -> float:
    """Return twice the area within a ring; positive if it turns counter-clockwise (y up)."""
    x, y = np.array(ring, dtype=float).T
    return float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]))


def inside(point, rings) -> bool:
    """Say whether a ray to the right crosses the rings an odd number of times."""
    x, y = point
    crossed = 0
    for ring in rings:
        for (x0, y0), (x1, y1) in itertools.pairwise(ring):
            if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
                crossed += 1
    return crossed % 2 == 1


def grid(rows, columns, edge=100):
    """Return boxes ``(n, 4)`` of a grid, row by row."""
    y, x = np.divmod(np.arange(rows * columns), columns)
    return np.stack([x, y, x + 1, y + 1], axis=1) * edge


def areas_of(mask):
    """Return the features of areas of a mask; scores are 1 in it and 0 elsewhere."""
    values = mask.ravel().astype(float)
    quantile = 1 - 0.9 * values.mean()  # above all zeros, below some ones
    found = annotations(grid(*mask.shape), {"a": values}, values, top=1, quantile=quantile)
    return found["features"]


def rings_of(feature):
    assert feature["type"] == "Feature"
    assert feature["geometry"]["type"] == "Polygon"
    return feature["geometry"]["coordinates"]


def test_an_area_around_a_hole_by_hand():
    mask = np.ones((3, 4), dtype=bool)
    mask[1, 1] = False
    (feature,) = areas_of(mask)
    outer, hole = rings_of(feature)
    assert {tuple(point) for point in outer} == {(0, 0), (400, 0), (400, 300), (0, 300)}
    assert {tuple(point) for point in hole} == {(100, 100), (200, 100), (200, 200), (100, 200)}
    assert (len(outer), len(hole)) == (5, 5)  # closed, and no corner along straight edges
    assert (doubled_area(outer), doubled_area(hole)) == (2 * 120_000, -2 * 10_000)
    assert feature["properties"]["measurements"]["tiles"] == 11


def test_tiles_that_meet_at_a_corner_are_two_areas_and_a_ring_that_meets_itself_is_one():
    mask = np.array([[1, 0], [0, 1]], dtype=bool)
    assert len(areas_of(mask)) == 2
    mask = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]], dtype=bool)  # the hole meets the outside
    (feature,) = areas_of(mask)
    outer, hole = rings_of(feature)
    assert (doubled_area(outer), doubled_area(hole)) == (2 * 80_000, -2 * 10_000)


@pytest.mark.parametrize("seed", range(12))
def test_areas_hold_their_tiles_and_no_others(seed):
    random = np.random.default_rng(seed)
    share = random.uniform(0.3, 0.9)
    mask = random.random((9, 11)) < share
    mask[:2] = True
    boxes, features = grid(9, 11), areas_of(mask)
    covered = 0.0
    for feature in features:
        outer, *holes = rings_of(feature)
        for ring in (outer, *holes):
            assert ring[0] == ring[-1]
            assert len({tuple(point) for point in ring}) == len(ring) - 1  # does not meet itself
            assert all(float(number).is_integer() for point in ring for number in point)
        assert doubled_area(outer) > 0
        assert all(doubled_area(hole) < 0 for hole in holes)
        covered += sum(map(doubled_area, (outer, *holes))) / 2
    assert covered == mask.sum() * 100 * 100
    held = np.zeros(len(boxes), dtype=int)
    for feature in features:
        tiles = [inside((box[:2] + box[2:]) / 2, rings_of(feature)) for box in boxes]
        assert feature["properties"]["measurements"]["tiles"] == sum(tiles)
        held += tiles
    np.testing.assert_array_equal(held, mask.ravel().astype(int))


def test_areas_are_measured_by_the_tiles_in_them():
    values = np.array([0.9, 0.8, 0.1, 0.7, 0.2, 0.3])  # a row
    attention = np.array([1.0, 3.0, 9.0, 5.0, 9.0, 9.0])
    found = annotations(grid(1, 6), {"LF": values}, attention, top=1, quantile=0.5)["features"]
    measured = {f["properties"]["measurements"]["tiles"]: f["properties"] for f in found}
    assert measured[2]["measurements"] == {
        "score": pytest.approx(0.85),
        "highest score": 0.9,
        "attention": 2.0,
        "tiles": 2,
    }
    assert measured[1]["name"] == "LF 0.7"


def test_overlapping_tiles_are_one_area():
    boxes = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [40, 0, 50, 10]])
    values = np.array([1.0, 1.0, 0.0])
    (feature,) = annotations(boxes, {"a": values}, values, top=1, quantile=0.5)["features"]
    assert [doubled_area(ring) for ring in rings_of(feature)] == [2 * 150]
    assert feature["properties"]["measurements"]["tiles"] == 2


def test_the_top_tiles_of_every_class_have_what_qupath_reads():
    random = np.random.default_rng(0)
    scores = {"isMSIH = MSIH": random.random(20), "LF": random.random(20) * 30}
    collection = annotations(grid(4, 5), scores, np.ones(20), top=3, quantile=None)
    features = json.loads(json.dumps(collection, allow_nan=False))["features"]
    assert collection["type"] == "FeatureCollection"
    assert len(features) == 6
    colours = set()
    for number, feature in enumerate(features):
        name, values = list(scores.items())[number // 3]
        tile = sorted(range(20), key=lambda i: -values[i])[number % 3]
        properties = feature["properties"]
        assert properties["objectType"] == "annotation"
        assert properties["classification"]["name"] == name
        assert properties["measurements"]["score"] == values[tile]
        assert all(isinstance(value, (int, float)) for value in properties["measurements"].values())
        (ring,) = rings_of(feature)
        left, top, right, bottom = grid(4, 5)[tile].tolist()
        assert {tuple(point) for point in ring} == {
            (left, top), (right, top), (right, bottom), (left, bottom),
        }  # fmt: skip
        assert doubled_area(ring) == 2 * 100 * 100
        red, green, blue = properties["classification"]["color"]
        assert all(0 <= number <= 255 for number in (red, green, blue))
        colours.add((red, green, blue))
    assert len(colours) == 2


def test_tiles_in_um_become_whole_pixels_from_the_bounds_and_share_their_edges():
    corners = np.stack([np.arange(5) * 256.0, np.arange(5) * 256.0 + 512.0], axis=1)
    boxes = boxes_px(corners.astype(np.float32), 256.0, (0.499, 0.2501), (1000, 300))
    for box, (x, y) in zip(boxes, corners, strict=True):
        edges = (
            x / 0.499 - 1000,
            y / 0.2501 - 300,
            (x + 256) / 0.499 - 1000,
            (y + 256) / 0.2501 - 300,
        )
        assert all(abs(a - b) <= 0.5 for a, b in zip(box, edges, strict=True))
    np.testing.assert_array_equal(boxes[:-1, 2:], boxes[1:, :2])
