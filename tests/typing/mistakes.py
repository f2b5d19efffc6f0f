"""Mistakes, which strict type checkers find: they complain of a comment that ignores nothing."""

import torch
from torch import nn

import mtbalance
from mtbalance import Balancer, RecordWriter, make_balancer
from mtbalance.gradient import CAGrad, Normalized, PCGrad
from mtbalance.weighting import DWA, Uncertainty

trunk = nn.Linear(4, 4)
balancer = Balancer(DWA(), PCGrad(), tasks=("a", "b"), shared=trunk)
Balancer(PCGrad(), DWA(), tasks=("a", "b"))  # type: ignore[arg-type]
Balancer(DWA(), PCGrad(), tasks=("a", "b"), nonfinite="rise")  # type: ignore[arg-type]
Balancer(DWA(), PCGrad())  # type: ignore[call-arg]
CAGrad(rescale=3)  # type: ignore[arg-type]
PCGrad(order="randm")  # type: ignore[arg-type]
Normalized(DWA())  # type: ignore[arg-type]
Uncertainty("regresion")  # type: ignore[arg-type]
balancer.backward([torch.ones(())])  # type: ignore[arg-type]
balancer.backward({"a": torch.ones(())}, retain=True)  # type: ignore[call-arg]
make_balancer("cagrad", tasks=("a",), nonfinite="rise")  # type: ignore[arg-type]
make_balancer("cagrad", tasks=("a",), rescale=3)  # type: ignore[arg-type]
make_balancer("dwa", tasks=("a",), temprature=1.0)  # type: ignore[call-arg]
make_balancer("dwa", shared=trunk)  # type: ignore[call-arg]
repr(balancer.backward({"a": torch.ones(())}).weight)  # type: ignore[attr-defined]
RecordWriter("log.csv").write({"a": 1.0})  # type: ignore[arg-type]
repr(mtbalance.CAGrad)  # type: ignore[attr-defined]
balancer.weighting.optimizer = torch.optim.SGD(trunk.parameters())  # type: ignore[assignment]
