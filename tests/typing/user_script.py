"""A training script that uses every public name of the package, for strict type checkers."""

import torch
from torch import Tensor, nn

import mtbalance as mt
from mtbalance.gradient import CAGrad
from mtbalance.weighting import AutoLambda, Uncertainty


class Doubling(mt.GradientStrategy):
    def forward(self, gradients: Tensor) -> Tensor:
        return 2 * gradients.sum(0)


class Unit(mt.GramianStrategy):
    def weights(self, gramian: Tensor) -> Tensor:
        return gramian.diagonal().rsqrt()


class Halves(mt.Weighting):
    def forward(self, losses: Tensor) -> Tensor:
        return losses / 2


def train(path: str, trunk: nn.Module, heads: dict[str, nn.Module]) -> mt.Log:
    weighting = Uncertainty("classification", regularizer="log1p")
    own: list[mt.GradientStrategy] = [Doubling(), Unit(), CAGrad(c=0.4, rescale=1)]
    balancers = [mt.Balancer(weighting, own[2], tasks=[*heads], shared=trunk, nonfinite="skip")]
    balancers += [mt.Balancer(Halves(), each, tasks=[*heads], shared=trunk) for each in own[:2]]
    balancers += [mt.make_balancer(name, tasks=[*heads]) for name in mt.PAPER_COMBINATIONS[:1]]
    balancers[0].load_state_dict(mt.with_tasks(balancers[0].state_dict(), balancers[0]))
    with mt.RecordWriter(path, every=10) as writer:
        for balancer in balancers:
            h: Tensor = trunk(torch.ones(8, 4))
            losses = {task: torch.square(head(h)).mean() for task, head in heads.items()}
            explanation: mt.Explanation = balancer.explain(losses, model=trunk)
            record: mt.Record = balancer.backward(losses, features=h, retain_graph=True)
            summary: mt.EpochSummary = balancer.end_epoch()
            writer.write(record, steps=summary.steps, rows=len(explanation.rows))
            assert record.conflicts is None or record.as_dict()["loss/a"] > 0
    return mt.read_log(path)


def look_ahead(trunk: nn.Module, heads: dict[str, nn.Module]) -> list[mt.Record]:
    """Assign the optimizer later, as where Lightning makes it."""

    def losses() -> dict[str, Tensor]:
        h: Tensor = trunk(torch.ones(8, 4))
        return {task: torch.square(head(h)).mean() for task, head in heads.items()}

    weighting = AutoLambda(None)
    held = mt.Balancer(weighting, CAGrad(), tasks=[*heads], shared=trunk)
    named = mt.make_balancer("autol", tasks=[*heads], shared=trunk, optimizer=None)
    optimizer = torch.optim.SGD(trunk.parameters(), lr=0.1)
    weighting.optimizer = optimizer
    assert isinstance(named.weighting, AutoLambda)
    named.weighting.optimizer = [optimizer]
    return [each.backward(losses(), validation=losses) for each in (held, named)]
