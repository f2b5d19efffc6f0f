"""What a run says, drawn: its ranking, its embedding, its measurements and its training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from examples.pathology.cohort.targets import Target
from examples.pathology.figures import history as history_plots
from examples.pathology.figures import plots
from examples.pathology.results.folds import FoldResult
from examples.pathology.results.summary import RunSummary


def draw_figures(
    figures: Path,
    summary: RunSummary,
    results: Sequence[FoldResult],
    *,
    seed: int,
) -> list[tuple[str, Path]]:
    """Draw what a run says: its ranking, its embedding, its measurements and its training.

    Args:
        figures: The folder to write to.
        summary: What ``metrics.json`` says.
        results: Of all folds.
        seed: Of the t-SNE.

    Returns:
        A title and the file of every figure.
    """
    drawn = draw_scores(figures, summary, results, summary.targets)
    path = figures / "tsne.png"
    primary = summary.targets[0]
    labels = [result.predictions[primary.name].to_numpy(dtype=str) for result in results]
    plots.tsne(
        [
            (result.embeddings, each if primary.classes else each.astype(float))
            for result, each in zip(results, labels, strict=True)
        ],
        primary.classes,
        path,
        title=f"{summary.method}: [cls] embedding by {primary.name}",
        caption=summary.caption,
        seed=seed,
    )
    drawn.append(("t-SNE", path))
    histories = [result.history for result in results if len(result.history)]
    if histories:
        tasks = [target.name for target in summary.targets]
        method, caption = summary.method, summary.caption
        best = [result.best_epoch for result in results if len(result.history)]
        path = figures / "training.png"
        history_plots.training(histories, best, tasks, path, title=method, caption=caption)
        drawn.append(("training", path))
        path = figures / "balance.png"
        if history_plots.balance(histories, tasks, path, title=method, caption=caption):
            drawn.append(("task weights and gradient conflict", path))
    return drawn


def draw_scores(
    figures: Path,
    summary: RunSummary,
    results: Sequence[FoldResult],
    targets: Sequence[Target],
) -> list[tuple[str, Path]]:
    """Draw ROC and PR curves of a primary class, and measured against predicted values.

    Args:
        figures: The folder to write to.
        summary: What ``metrics.json`` says.
        results: Of all folds; patients without a label are left out.
        targets: What was predicted, the primary target first.

    Returns:
        A title and the file of every figure.
    """
    primary = targets[0]
    caption = summary.caption
    drawn = []
    if primary.kind == "classification":
        drawn += _draw_ranking(figures, summary, results, primary)
    for number, target in enumerate(targets):
        if target.kind == "regression":
            # A target's name may hold any character.
            path = figures / (f"regression-{number}.png" if number else "regression.png")
            points = []
            for result in results:
                known = result.predictions[result.predictions[target.name] != ""]
                measured = known[target.name].to_numpy(dtype=float)
                points.append((measured, known[f"{target.name}_pred"].to_numpy(dtype=float)))
            if not any(len(measured) for measured, _ in points):
                continue  # an external cohort need not know it
            heading = f"{summary.method}: {target.name}"
            plots.regression(points, path, title=heading, caption=caption)
            drawn.append((f"measured and predicted {target.name}", path))
    return drawn


def _draw_ranking(
    figures: Path, summary: RunSummary, results: Sequence[FoldResult], primary: Target
) -> list[tuple[str, Path]]:
    caption = summary.caption
    title = f"{summary.method}: {primary.name} = {primary.positive}"
    scored = []
    for result in results:
        known = result.predictions[result.predictions[primary.name] != ""]
        truth = (known[primary.name] == primary.positive).to_numpy()
        scored.append((truth, known[f"{primary.name}_{primary.positive}"].to_numpy(dtype=float)))
    drawn = [("ROC", figures / "roc.png"), ("precision-recall", figures / "pr.png")]
    plots.roc(scored, drawn[0][1], title=title, caption=caption)
    plots.precision_recall(scored, drawn[1][1], title=title, caption=caption)
    return drawn
