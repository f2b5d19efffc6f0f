"""Tile features as a network might give them, for simulated slides: low-rank, with batch effects.

A tile of a tissue lies around the tissue's centroid; within a tissue, tiles vary along few
directions, and a little along all. Per feature the variance of an average tile is about 1, so that
the mean absolute value is near 0.8, as that of CTransPath's features is. The directions depend on
the seed alone: bags of one seed belong to one "network", whatever was simulated with it.
"""

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from examples.pathology.settings.extract import TILE_UM
from examples.pathology.settings.simulate import SimulateConfig
from examples.pathology.simulation.composition import TISSUES, Tissue

Array = npt.NDArray[np.float64]

FEATURES_PER_TILE = 768
RANK = 16  # directions in which the tiles of a tissue vary
BATCH_RANK = 8  # directions in which slides differ from each other
# Shares of the variance of one feature over all tiles.
OFFSET, BETWEEN, WITHIN, ISOTROPIC = 0.30, 0.20, 0.35, 0.15
SMOOTHING_TILES = 2.5  # how far tissue is coherent
DOMAIN_GAIN = 0.2  # change of a feature's scale by a domain shift of 1, standard deviation


class FeatureSpace:
    """The directions of one simulated network, drawn from a seed of at least 0."""

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng([seed, FEATURES_PER_TILE])
        normal = generator.standard_normal
        self.offset = np.sqrt(OFFSET) * normal(FEATURES_PER_TILE)
        self.centroids = np.sqrt(BETWEEN) * normal((len(TISSUES), FEATURES_PER_TILE))
        decay = 1 / np.sqrt(np.arange(1, RANK + 1))
        decay *= np.sqrt(WITHIN / np.square(decay).sum())
        self.factors = decay[:, None] * normal((len(TISSUES), RANK, FEATURES_PER_TILE))
        # Directions among the factors of tumour tiles: where tiles vary anyway, nothing stands out.
        self.biomarker, self.clone, self.growth = np.linalg.qr(normal((RANK, 3)))[0].T
        self.batch = normal((BATCH_RANK, FEATURES_PER_TILE)) / np.sqrt(BATCH_RANK)
        self.domain = normal(FEATURES_PER_TILE)
        self.domain_gain = normal(FEATURES_PER_TILE)

    def tiles(
        self,
        tissue: Tissue,
        count: int,
        config: SimulateConfig,
        generator: np.random.Generator,
        *,
        external: bool = False,
    ) -> tuple[Array, Array]:
        """Draw the tiles of one slide, at least 1.

        The tumour shift shows in altered tumour tiles; the signature shift in all tumour tiles by a
        growth of 1, and in tiles of the second clone by four times that. Both are in standard
        deviations of tumour tiles along their direction.

        Returns:
            Features ``(count, 768)``, and x and y of the tiles in um ``(count, 2)``, row by row.
        """
        kinds = np.sort(generator.choice(len(TISSUES), count, p=tissue.shares))
        is_tumour = kinds == TISSUES.index("TUM")
        altered = is_tumour & (generator.random(count) < tissue.altered)
        clone = is_tumour & (generator.random(count) < tissue.clone)
        scores = generator.standard_normal((count, RANK))
        scores += config.strength("tumour_shift") * np.outer(altered, self.biomarker)
        scores += 4 * config.signature_shift * np.outer(clone, self.clone)
        scores += config.signature_shift * tissue.growth * np.outer(is_tumour, self.growth)
        feats = np.sqrt(ISOTROPIC) * generator.standard_normal((count, FEATURES_PER_TILE))
        for kind in np.unique(kinds):
            rows = kinds == kind
            feats[rows] += self.centroids[kind] + scores[rows] @ self.factors[kind]
        feats += self.offset
        feats += config.batch_effect * (generator.standard_normal(BATCH_RANK) @ self.batch)
        if external:
            feats *= 1 + DOMAIN_GAIN * config.domain_shift * self.domain_gain
            feats += config.domain_shift * self.domain
        # Neighbours in a smooth field are of one tissue, and of one clone.
        order = np.lexsort((clone, generator.permutation(len(TISSUES))[kinds]))
        cells, rank = _layout(count, generator)
        tile_of_cell = order[rank]
        return feats[tile_of_cell], cells * TILE_UM


def _layout(count: int, generator: np.random.Generator) -> tuple[Array, npt.NDArray[np.intp]]:
    """Return ``count`` cells (column, row) of a coherent shape, and their rank in a smooth field.

    The field has no preferred direction: cells of similar rank lie in bands around its hills.
    """
    side = int(np.ceil(np.sqrt(1.6 * count)))
    outline, field = (
        gaussian_filter(generator.standard_normal((side, side)), SMOOTHING_TILES) for _ in range(2)
    )
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    outline = np.hypot(x, y) / side - outline
    inside = np.zeros(side * side, dtype=bool)
    inside[np.argsort(outline, axis=None, kind="stable")[:count]] = True
    rows, columns = np.nonzero(inside.reshape(side, side))
    rank = np.argsort(np.argsort(field[rows, columns], kind="stable"), kind="stable")
    return np.stack([columns, rows], axis=1).astype(float), rank
