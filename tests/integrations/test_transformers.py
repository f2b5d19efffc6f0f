"""Transformers, the package itself: a Trainer equals the plain loop."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason='needs `pip install "mtbalance[transformers]"`')
import transformers

from mtbalance import make_balancer
from mtbalance.integrations.transformers import BalancedTrainer
from tests.distributed.harness import ALONE, Here, Pool
from tests.integrations.parts import (
    BATCHES,
    Parts,
    assert_same,
    data,
    forget_accelerators,
    plain,
    tell_as_torchrun,
)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning")
transformers.utils.logging.set_verbosity_error()


class Model(nn.Module):
    """Returns losses by task, as models for the Trainer do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> dict[str, Any]:
        losses = self.network(x)
        return {"losses": losses, "logits": x[:, :1]}


class InOrder(BalancedTrainer):
    """Batches in the order of the plain loop."""

    def get_train_dataloader(self) -> Any:
        size = self.args.per_device_train_batch_size
        loader = torch.utils.data.DataLoader(self.train_dataset, batch_size=size)
        return self.accelerator.prepare(loader)


class Kept(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "num_train_epochs": 2,
        "per_device_train_batch_size": data().shape[1],
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(**(defaults | options))


def trainer(
    method: str,
    folder: Path,
    *,
    here: Here = ALONE,
    given: bool = True,
    kind: type[BalancedTrainer] = InOrder,
    **options: Any,
) -> tuple[BalancedTrainer, Parts]:
    parts = Parts(method, given=given)
    optimizer = parts.optimizer()
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    rows = data().shape[1] // here.size
    made = kind(
        model=Model(parts.network),
        balancer=parts.balancer,
        args=arguments(folder, per_device_train_batch_size=rows, **options),
        train_dataset=[{"x": x} for x in data().flatten(0, 1)],
        eval_dataset=[{"x": x} for x in data()[0]],
        optimizers=(optimizer, constant),
        callbacks=[Kept()],
    )
    return made, parts


@pytest.mark.parametrize("method", ["pcgrad", "dwa+cagrad", "uncert+sum"])
def test_a_trainer_equals_the_plain_loop(method: str, tmp_path: Path) -> None:
    made, parts = trainer(method, tmp_path)
    made.train()
    assert_same(parts, plain(method))


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_accumulation_with_batches_left_over_and_clipping(clip: float, tmp_path: Path) -> None:
    made, parts = trainer("dwa+pcgrad", tmp_path, gradient_accumulation_steps=4, max_grad_norm=clip)
    made.train()
    wanted = plain("dwa+pcgrad", clip=clip, every=4, fewer=True)
    for found, value in zip(parts.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)


def test_a_batch_without_any_loss(tmp_path: Path) -> None:
    class Unlabelled(InOrder):
        def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
            losses, outputs = super().compute_losses(model, inputs)
            return ({} if self.state.global_step % BATCHES == 2 else losses), outputs

    made, parts = trainer("uncert+cagrad", tmp_path, kind=Unlabelled)
    made.train()
    assert_same(parts, plain("uncert+cagrad", unlabelled=3))


def test_bfloat16(tmp_path: Path) -> None:
    made, parts = trainer("uncert+cagrad", tmp_path, bf16=True)
    made.train()
    assert_same(parts, plain("uncert+cagrad", dtype=torch.bfloat16))


def test_a_compiled_model(tmp_path: Path) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    made, parts = trainer("uncert+pcgrad", tmp_path, **options)
    made.train()
    assert_same(parts, plain("uncert+pcgrad"))


@pytest.mark.parametrize(
    "saving",
    [
        {"save_strategy": "epoch"},
        {"save_strategy": "steps", "save_steps": BATCHES},
        {"save_strategy": "steps", "save_steps": 4},
    ],
    ids=["after its end", "before its end", "within"],
)
def test_training_goes_on_from_a_checkpoint(saving: dict[str, Any], tmp_path: Path) -> None:
    """Whether the epoch had been closed before it was saved or not; DWA counts epochs."""
    made, _ = trainer("dwa+graddrop", tmp_path, num_train_epochs=4, **saving)
    made.train()
    step = saving.get("save_steps", BATCHES) * 2
    made, parts = trainer("dwa+graddrop", tmp_path, num_train_epochs=4)
    made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert_same(parts, plain("dwa+graddrop", epochs=4))


def test_a_checkpoint_of_another_trainer_has_no_state(tmp_path: Path) -> None:
    made, _ = trainer("pcgrad", tmp_path, save_strategy="epoch", num_train_epochs=1)
    made.train()
    (tmp_path / "checkpoint-6" / "balancer.pt").unlink()
    made, _ = trainer("pcgrad", tmp_path)
    with pytest.warns(UserWarning, match="holds no state of a Balancer"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_records_are_logged(tmp_path: Path) -> None:
    class WithoutB(InOrder):
        def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
            losses, outputs = super().compute_losses(model, inputs)
            if self.state.global_step == 3:
                del losses["b"]
            return losses, outputs

    made, _ = trainer("pcgrad", tmp_path, kind=WithoutB, logging_steps=2, num_train_epochs=1)
    made.train()
    (kept,) = (each for each in made.callback_handler.callbacks if isinstance(each, Kept))
    rows = [row for row in kept.logs if "loss" in row]
    assert len(rows) == 3
    assert ["balance/weight/b" in row for row in rows] == [True, False, True]
    assert rows[1]["balance/absent"] == 1
    losses = sum(value for name, value in rows[0].items() if name.startswith("balance/loss/"))
    assert losses == pytest.approx(rows[0]["loss"], rel=0.5)


def test_the_loss_that_is_logged_is_the_mean_over_what_is_accumulated(tmp_path: Path) -> None:
    """Also where the Trainer counts labels, and models may divide by their number."""

    class Counting(Model):
        def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Any]:
            assert not kwargs
            return super().forward(x)

    parts = Parts("sum")
    made = InOrder(
        model=Counting(parts.network),
        balancer=parts.balancer,
        args=arguments(tmp_path, gradient_accumulation_steps=2, logging_steps=1),
        train_dataset=[{"x": x, "labels": 1} for x in data().flatten(0, 1)],
        callbacks=[Kept()],
    )
    made.train()
    (kept,) = (each for each in made.callback_handler.callbacks if isinstance(each, Kept))
    for row in kept.logs[:-1]:
        losses = sum(value for name, value in row.items() if name.startswith("balance/loss/"))
        assert row["loss"] == pytest.approx(losses)


@pytest.mark.parametrize("steps", [1, 2])
def test_float16_has_the_scaler_of_the_trainer(steps: int, tmp_path: Path) -> None:
    class Half(InOrder):
        def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
            with torch.autocast("cpu", torch.float16):
                return super().compute_losses(model, inputs)

    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    made, parts = trainer("uncert+cagrad", tmp_path, kind=Half, gradient_accumulation_steps=steps)
    made.accelerator.scaler = scalers[0]  # the Trainer itself refuses float16 on a CPU
    made.train()
    wanted = plain("uncert+cagrad", every=steps, dtype=torch.float16, scaler=scalers[1])
    assert_same(parts, wanted)
    assert parts.balancer.weighting.get_parameter("log_var").abs().max() > 0.01


def test_evaluation_balances_nothing(tmp_path: Path) -> None:
    made, parts = trainer("pcgrad", tmp_path, label_names=["x"])
    found = made.evaluate()
    with torch.no_grad():
        wanted = sum(float(loss) for loss in parts.losses(data()[0]).values())
    assert made.record is None
    assert all(parameter.grad is None for parameter in parts.parameters())
    assert found["eval_loss"] == pytest.approx(wanted)


def test_losses_may_have_an_axis_of_one(tmp_path: Path) -> None:
    class Kept(InOrder):
        def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
            losses, outputs = super().compute_losses(model, inputs)
            return {task: loss[None] for task, loss in losses.items()}, outputs

    made, parts = trainer("pcgrad", tmp_path, kind=Kept)
    made.train()
    assert_same(parts, plain("pcgrad"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compute_loss_func": lambda *args, **kwargs: 0}, "`compute_loss_func` has no effect"),
        ({"args": {"label_smoothing_factor": 0.1}}, "`label_smoothing_factor` has no effect"),
    ],
)
def test_options_without_effect(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    options = options | {"args": arguments(tmp_path, **options.get("args", {}))}
    with pytest.raises(ValueError, match=words):
        BalancedTrainer(model=bert(lora=False), balancer=Parts("sum").balancer, **options)


def test_several_gpus_in_one_process(tmp_path: Path) -> None:
    parts, args = Parts("sum"), arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="must hold one GPU, but holds 2"):
        BalancedTrainer(model=Model(parts.network), balancer=parts.balancer, args=args)


def test_a_model_without_losses(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": x.sum()}

    made, _ = trainer("sum", tmp_path)
    with pytest.raises(ValueError, match='dictionary that holds "losses" by task'):
        made.compute_loss(Plain(), {"x": data()[0]})


def test_an_optimizer_that_lacks_what_is_learned(tmp_path: Path) -> None:
    parts = Parts("uncert+sum")
    optimizer = torch.optim.SGD(parts.network.parameters(), lr=0.1)
    made = BalancedTrainer(
        model=Model(parts.network),
        balancer=parts.balancer,
        args=arguments(tmp_path),
        train_dataset=[{"x": x} for x in data()[0]],
        optimizers=(optimizer, None),
    )
    with pytest.raises(ValueError, match="must hold what the weighting learns"):
        made.train()


class TwoHeads(transformers.BertPreTrainedModel):
    """A small Bert, and two heads."""

    def __init__(self, config: transformers.BertConfig) -> None:
        super().__init__(config)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.head_a, self.head_b = (nn.Linear(config.hidden_size, 1) for _ in "ab")
        self.post_init()

    def forward(self, input_ids: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> dict[str, Any]:
        h = self.bert(input_ids).last_hidden_state.mean(1)
        found = {"a": self.head_a(h)[:, 0], "b": self.head_b(h)[:, 0]}
        losses = {t: nn.functional.mse_loss(found[t], y) for t, y in (("a", a), ("b", b))}
        return {"losses": losses, **found}


def bert(*, lora: bool) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: nn.Module = TwoHeads(config)
    if lora:
        peft = pytest.importorskip("peft", reason='needs `pip install "mtbalance[transformers]"`')
        adapters = peft.LoraConfig(
            r=2, target_modules=["query", "value"], modules_to_save=["head_a", "head_b"]
        )
        model = peft.get_peft_model(model, adapters)
    return model


def trunk_of(model: nn.Module) -> nn.Module:
    (found,) = (each for each in model.modules() if type(each) is transformers.BertModel)
    return found


def sentences() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    words = torch.randint(20, (24, 6), generator=draw)
    y = words.float().mean(1) / 10
    return {"input_ids": words, "a": y, "b": 3 - 4 * y}


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_a_bert_with_two_heads(lora: bool, tmp_path: Path) -> None:
    """Its trunk is what is balanced, adapters included; what is learned is not decayed."""
    model, again = bert(lora=lora), bert(lora=lora)
    balancers = [
        make_balancer("uncert+pcgrad", tasks=("a", "b"), shared=trunk_of(each))
        for each in (model, again)
    ]
    rows = sentences()
    made = InOrder(
        model=model,
        balancer=balancers[0],
        args=arguments(
            tmp_path, learning_rate=0.01, weight_decay=0.1, lr_scheduler_type="constant"
        ),
        train_dataset=[{name: value[i] for name, value in rows.items()} for i in range(24)],
    )
    made.train()

    decayed = set(made.get_decay_parameter_names(again))
    named = {n: p for n, p in again.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for n, p in named.items() if n in decayed], "weight_decay": 0.1},
        {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
        {"params": balancers[1].parameters(), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for _ in range(2):
        for start in range(0, 24, 8):
            part = {name: value[start : start + 8] for name, value in rows.items()}
            optimizer.zero_grad()
            record = balancers[1].backward(again(**part)["losses"])
            optimizer.step()
        balancers[1].end_epoch()
    assert record.gramian is not None
    assert (record.gramian.diagonal() > 0).all()
    assert any("lora" in name for name in named) == lora
    for name, value in named.items():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-4, atol=1e-5, msg=name)
    assert_same(balancers[0].weighting, balancers[1].weighting, rtol=1e-6, atol=1e-7)
    before = bert(lora=lora)
    trained = [n for n, p in named.items() if not torch.equal(p, before.get_parameter(n))]
    assert trained == list(named)


def trainer_in_rank(here: Here, folder: str, options: dict[str, Any]) -> dict[str, Tensor]:
    tell_as_torchrun(here)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forget_accelerators()
        try:
            made, parts = trainer("dwa+cagrad", Path(folder), here=here, **options)
            assert made.args.world_size == here.size
            made.train()
            return dict(parts.named_parameters())
        finally:
            forget_accelerators()


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 4},
        {"given": False, "ddp_find_unused_parameters": True, "max_grad_norm": 0.5},
    ],
    ids=["accumulation", "unused"],
)
def test_two_processes_equal_one(options: dict[str, Any], two: Pool, tmp_path: Path) -> None:
    wanted = plain(
        "dwa+cagrad",
        clip=options.get("max_grad_norm", 0.0),
        every=options.get("gradient_accumulation_steps", 1),
        fewer=True,
    )
    for found in two.run(trainer_in_rank, str(tmp_path), options):
        for name, value in wanted.named_parameters():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
