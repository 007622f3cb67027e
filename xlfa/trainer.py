"""The Trainer of transformers with parallel pairs in every step, losses weighted by real examples, and their parts in
the log."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from xlfa.adapters import ADAPTER_FOLDER, plain_model
from xlfa.arguments import InferenceArguments
from xlfa.batching import GlobalBatches, label_counts, split_batch
from xlfa.errors import XLFAError
from xlfa.inference import InferenceOptions
from xlfa.parallel import SOURCE_LANGUAGE, PairSampler
from xlfa.portable_tokenizer import make_portable
from xlfa.prediction import predict
from xlfa.tasks import Task

logger = logging.getLogger(__name__)

# Among a batch's tensors: its shares of the labels and of the pairs of the optimizer step, times the processes.
SHARES = "shares"


class XLFATrainer(Trainer):
    """Trainer that adds parallel pairs to every batch, logs the parts of the loss and validates on English.

    The loss of an optimizer step is the mean over its labels and over its pairs, however they are cut: into processes,
    accumulation steps or parts of `--max_tokens_per_batch`.

    Args:
        task: gives predictions and scores of the validation rows.
        pair_sampler: None without the alignment term.
        validation_rows: English examples, scored by `evaluate`.
        validation_windows: of these rows.
    """

    # `compute_loss` weighs each batch by its share of the step; Trainer would divide by the accumulation steps.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        task: Task,
        pair_sampler: PairSampler | None,
        validation_rows: Dataset,
        validation_windows: Dataset,
        **kwargs: Any,
    ):
        super().__init__(*args, eval_dataset=validation_rows, **kwargs)
        self.task = task
        self.pair_sampler = pair_sampler
        self.validation_rows, self.validation_windows = validation_rows, validation_windows
        self._check_parts()
        self.batches = self._global_batches()
        self._part_sums: dict[str, torch.Tensor] = {}
        self._steps_summed = 0

    def _check_parts(self) -> None:
        """Raise `XLFAError` where a batch is to be run in parts and cannot."""
        if self.args.max_tokens_per_batch is None:
            return
        flag = f"--max_tokens_per_batch {self.args.max_tokens_per_batch}: "
        config = plain_model(self.model).config
        if config.fusion in ("dlfa", "aff") and config.fusion_norm == "batch":
            raise XLFAError(
                flag + "batch norm needs the whole batch at once: leave it out, or take --fusion_norm layer or none"
            )
        if self.pair_sampler is not None and config.ot_center:
            raise XLFAError(flag + "--ot_center takes means over the whole batch: leave one of the two out")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise XLFAError(flag + "FSDP and DeepSpeed need as many parts in every process: leave it out")

    def _global_batches(self) -> GlobalBatches:
        args = self.args
        return GlobalBatches(
            lengths=[len(ids) for ids in self.train_dataset["input_ids"]],
            batch_size=args.train_batch_size * args.world_size,
            strategy=args.train_sampling_strategy,
            seed=args.seed if args.data_seed is None else args.data_seed,
            processes=args.world_size,
            rank=args.process_index,
            grouped=args.gradient_accumulation_steps,
            drop_last=args.dataloader_drop_last,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Batches of `GlobalBatches`, which are this process's already: accelerate must not deal them out again."""
        return DataLoaderShard(
            self._remove_unused_columns(self.train_dataset, description="training"),
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            # Without one of its own, each epoch would draw from the generator of the dropout.
            generator=torch.Generator(),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The batches of one optimizer step, each with as many parallel pairs as it has task examples.

        The pairs are positions of the step's draw, laid out so that the same global batch holds the same pairs at any
        number of processes.
        """
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        accumulated = self.args.gradient_accumulation_steps
        steps_an_epoch = -(-len(self.batches) // accumulated)
        first = self.state.global_step % steps_an_epoch * accumulated
        positions = [self.batches.share(first + index) for index in range(len(batches))]
        # Stand-ins have no share.
        labels = [int(label_counts(batch).sum()) if share else 0 for batch, share in zip(batches, positions)]
        pairs = [len(share) for share in positions]
        totals = torch.tensor([[sum(labels), sum(pairs)]], device=device)
        labels_of_all, pairs_of_all = self.accelerator.gather(totals).sum(dim=0).tolist()
        for index, batch in enumerate(batches):
            if self.pair_sampler is not None:
                offset = index * self.batches.batch_size
                drawn = [offset + position for position in positions[index] or [0]]
                batch.update(self.pair_sampler.batch(self.state.global_step, drawn))
            # Processes' gradients are averaged.
            processes = self.args.world_size
            batch[SHARES] = (processes * labels[index] / labels_of_all, processes * pairs[index] / pairs_of_all)
        if self.pair_sampler is not None:
            encoder = plain_model(self.accelerator.unwrap_model(self.model)).base_model
            encoder.ot_progress = self.state.global_step / max(1, self.state.max_steps - 1)
        self._steps_summed += 1
        return batches, count

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Gradients of one batch, in parts of at most `--max_tokens_per_batch`."""
        max_tokens = self.args.max_tokens_per_batch
        if max_tokens is None:
            return super().training_step(model, inputs, num_items_in_batch)
        of_labels, of_pairs = inputs.pop(SHARES)
        *parts, last = (
            {**part, SHARES: (of_labels * label_share, of_pairs * pair_share)}
            for part, label_share, pair_share in split_batch(inputs, max_tokens)
        )
        loss = torch.zeros((), device=self.args.device)
        for part in parts:
            with self.accelerator.no_sync(model):
                loss += super().training_step(model, part, num_items_in_batch)
        return loss + super().training_step(model, last, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The batch's share of the step's loss: means over labels and over pairs, each weighted by its share."""
        of_labels, of_pairs = inputs.pop(SHARES)
        outputs = model(**inputs)
        terms = []
        if outputs.task_loss is not None:
            terms.append(of_labels * outputs.task_loss)
            self._add_part("task_loss", of_labels, outputs.task_loss)
        if outputs.ot_loss is not None:
            terms.append(self.accelerator.unwrap_model(model).config.ot_weight * of_pairs * outputs.ot_loss)
            self._add_part("ot_loss", of_pairs, outputs.ot_loss)
            for name, values in outputs.ot_statistics.items():
                self._add_part(f"ot_{name}", of_pairs, values)
        loss = sum(terms)
        return (loss, outputs) if return_outputs else loss

    def _add_part(self, name: str, share: float, value: torch.Tensor) -> None:
        # One value a device where torch's DataParallel runs the model.
        self._part_sums[name] = self._part_sums.get(name, 0) + share * value.detach().float().mean()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the loss parts since the last line of the training log."""
        if "loss" in logs:
            logs |= self._mean_parts()
            if logs.get("ot_not_converged", 0) > 0:
                logger.warning(
                    "step %d: %.2g of the pairs since the last line of the log did not converge within %d sweeps (mean "
                    "marginal error %.2g): raise --ot_max_iter, --ot_tol or --ot_epsilon",
                    self.state.global_step,
                    logs["ot_not_converged"],
                    self.accelerator.unwrap_model(self.model).config.ot_max_iter,
                    logs["ot_marginal_error"],
                )
        super().log(logs, start_time)

    def _mean_parts(self) -> dict[str, float]:
        """The means of the loss parts over the steps since the last call."""
        means = {
            name: self.accelerator.reduce(total / self._steps_summed, reduction="mean").item()
            for name, total in self._part_sums.items()
        }
        self._part_sums, self._steps_summed = {}, 0
        return means

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Scores of the English validation rows, by the code that scores every language."""
        rows = self.validation_rows
        predictions = predict(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            self.task,
            rows,
            self.task.example_ids(rows),
            self.validation_windows,
            InferenceOptions.of(InferenceArguments(bf16=self.args.bf16), self.args.device),
            description="validation",
        )
        scores = self.task.score(predictions, SOURCE_LANGUAGE)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items() if value is not None}
        metrics["epoch"] = self.state.epoch
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def latest_validation(self) -> dict[str, float] | None:
        """The validation scores of the present step, None if it was not validated or another checkpoint is loaded."""
        if self.args.load_best_model_at_end:
            return None
        entries = [entry for entry in self.state.log_history if entry["step"] == self.state.global_step]
        return next((entry for entry in entries if any(name.startswith("eval_") for name in entry)), None)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Raise `XLFAError` instead, if training has gone wrong: a checkpoint can always be trained on from."""
        broken = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
        if broken:
            raise XLFAError(
                f"step {self.state.global_step}: the weights of {broken[0]} are not finite; no checkpoint was written. "
                "Go on from the last one with a lower --learning_rate or --max_grad_norm"
            )
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        # A pickle of the arguments, with local paths in it, that nothing reads: run.json holds them.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        make_portable(self.processing_class, folder)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel) and self.args.should_save:
            # PEFT's own files do not say what the adapters are of.
            model.config.save_pretrained(folder)

    def merge_adapters(self) -> None:
        """Save the adapters to their own folder, then merge them: the model goes on as a plain one."""
        self._save(str(Path(self.args.output_dir) / ADAPTER_FOLDER))
        self.model = self.accelerator.unwrap_model(self.model).merge_and_unload()
