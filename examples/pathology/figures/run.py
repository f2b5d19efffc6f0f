"""What a run says, drawn: its ranking, its embedding, its measurements and its training."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from examples.pathology.cohort.targets import Target
from examples.pathology.figures.embedding import tsne
from examples.pathology.figures.history import balance, training
from examples.pathology.figures.scores import precision_recall, regression, roc
from examples.pathology.figures.sheet import Sheet
from examples.pathology.results.folds import FoldResult
from examples.pathology.results.measuring import numbers_of, scores_of
from examples.pathology.results.summary import RunSummary


def draw_figures(
    figures: Path, summary: RunSummary, results: Sequence[FoldResult], *, seed: int
) -> list[tuple[str, Path]]:
    """Draw what a run says to a folder; the seed is that of the t-SNE.

    Returns:
        A title and the file of every figure.
    """
    primary, method, caption = summary.targets[0], summary.method, summary.caption
    drawn = draw_scores(figures, summary, results)
    dtype: type = str if primary.classes else float
    points = [(r.embeddings, r.predictions[primary.name].to_numpy(dtype=dtype)) for r in results]
    path, title = figures / "tsne.png", f"{method}: [cls] embedding by {primary.name}"
    tsne(points, primary.classes, Sheet(path, title, caption), seed=seed)
    drawn.append(("t-SNE", path))
    trained = [result for result in results if len(result.history)]
    if trained:
        tasks = [target.name for target in summary.targets]
        histories = [result.history for result in trained]
        best = [result.best_epoch for result in trained]
        path = figures / "training.png"
        training(histories, best, tasks, Sheet(path, method, caption))
        drawn.append(("training", path))
        path = figures / "balance.png"
        if balance(histories, tasks, Sheet(path, method, caption)):
            drawn.append(("task weights and gradient conflict", path))
    return drawn


def draw_scores(
    figures: Path, summary: RunSummary, results: Sequence[FoldResult]
) -> list[tuple[str, Path]]:
    """Draw ROC and PR curves of a primary class, and measured against predicted values.

    Patients without a label are left out.

    Returns:
        A title and the file of every figure.
    """
    primary, drawn = summary.targets[0], []
    if primary.kind == "classification":
        known = _known(results, primary)
        scored = [scores_of(table, primary, primary.positive) for table in known]
        title = f"{summary.method}: {primary.name} = {primary.positive}"
        drawn = [("ROC", figures / "roc.png"), ("precision-recall", figures / "pr.png")]
        for draw, (_, path) in zip((roc, precision_recall), drawn, strict=True):
            draw(scored, Sheet(path, title, summary.caption))
    for number, target in enumerate(summary.targets):
        if target.kind != "regression":
            continue
        points = [numbers_of(table, target) for table in _known(results, target)]
        if any(len(measured) for measured, _ in points):  # an external cohort need not know it
            # A target's name may hold any character.
            path = figures / (f"regression-{number}.png" if number else "regression.png")
            title = f"{summary.method}: {target.name}"
            regression(points, Sheet(path, title, summary.caption))
            drawn.append((f"measured and predicted {target.name}", path))
    return drawn


def _known(results: Sequence[FoldResult], target: Target) -> list[pd.DataFrame]:
    """Return each fold's predictions for the patients who have a label."""
    tables = [result.predictions for result in results]
    return [table[table[target.name] != ""] for table in tables]
