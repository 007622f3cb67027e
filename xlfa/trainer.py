"""The Trainer of transformers with parallel pairs in every step, losses weighted by real examples, and their parts in
the log."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from modeling_xlfa.modeling_xlfa import fork_generator
from xlfa.adapters import ADAPTER_FOLDER, plain_model
from xlfa.arguments import InferenceArguments
from xlfa.batching import GlobalBatches, label_counts, split_batch
from xlfa.checkpoints import complete, remove_old, run_identity
from xlfa.errors import XLFAError
from xlfa.inference import TOKENS_ON_CPU, InferenceOptions
from xlfa.parallel import SOURCE_LANGUAGE, PairSampler
from xlfa.portable_tokenizer import make_portable
from xlfa.prediction import predict
from xlfa.tasks import Task
from xlfa.vocabulary.rates import scale_row_steps

logger = logging.getLogger(__name__)

# What a parameter group of an optimizer has from the training arguments.
GROUP_SETTINGS = ("lr", "initial_lr", "weight_decay", "betas", "eps")

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
        new_pieces: rows of the word embeddings and their learning rate, where they have one of their own.
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
        new_pieces: tuple[slice, float] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, eval_dataset=validation_rows, **kwargs)
        self.task = task
        self.new_pieces = new_pieces
        self.pair_sampler = pair_sampler
        self.validation_rows, self.validation_windows = validation_rows, validation_windows
        self._check_parts()
        if self.is_fsdp_enabled:
            self._name_sharded_layers()
        self.batches = self._global_batches()
        self._part_sums: dict[str, torch.Tensor] = {}
        self._steps_summed = 0
        # Step, task_loss and ot_loss of the first batch whose loss was not finite. It stays on the device: to read it
        # would wait for the batch.
        self._first_broken = torch.full((3,), torch.inf, device=self.args.device)

    def _check_parts(self) -> None:
        """Raise `XLFAError` where a batch is to be run in parts, or gradients are to be compared, and cannot be."""
        if self.args.n_gpu > 1:
            raise XLFAError(
                f"one process and {self.args.n_gpu} GPUs, which torch's DataParallel would not weigh by their labels: "
                "start a process for each with `accelerate launch`, or name one GPU in CUDA_VISIBLE_DEVICES"
            )
        if self.args.ot_gradient_steps is not None:
            flag = f"--ot_gradient_steps {self.args.ot_gradient_steps}: "
            if self.pair_sampler is None:
                raise XLFAError(flag + "there is no transport term to look at; give --ot_weight")
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise XLFAError(flag + "FSDP and DeepSpeed hold parts of the gradients only: leave it out")
        if isinstance(self.model, PeftModel) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise XLFAError("--peft lora: FSDP and DeepSpeed split what adapters are merged into: take DDP")
        if self.args.max_tokens_per_batch is None:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise XLFAError(
                f"--max_tokens_per_batch {self.args.max_tokens_per_batch}: FSDP and DeepSpeed need as many parts in "
                "every process: leave it out"
            )

    def _name_sharded_layers(self) -> None:
        """Tell FSDP to shard each layer of the encoder, and the fusion, on its own.

        By default accelerate takes all that a model does not split. Of most encoders that is the module around the word
        embeddings too, which accelerate shards by themselves: the second time fails.
        """
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is None:
            model = plain_model(self.model)
            embeddings = model.get_input_embeddings()
            whole = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
            plugin.transformer_cls_names_to_wrap = sorted(
                {type(module).__name__ for module in whole if embeddings not in module.modules()}
            )

    def _most_tokens(self) -> tuple[int | None, int | None]:
        """Tokens of a part of the examples and of the pairs of a batch; None where they stay whole."""
        most = self.args.max_tokens_per_batch
        if most is None and self.args.device.type == "cpu" and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            most = TOKENS_ON_CPU
        return None if self._has_batch_norm() else most, None if plain_model(self.model).config.ot_center else most

    def _has_batch_norm(self) -> bool:
        config = plain_model(self.model).config
        return config.fusion in ("dlfa", "aff") and config.fusion_norm == "batch"

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

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer, in which new pieces of the vocabulary have a learning rate of their own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.new_pieces is not None:
            rows, rate = self.new_pieces
            weight = self.accelerator.unwrap_model(self.model).get_input_embeddings().weight
            scale_row_steps(optimizer, weight, rows, rate / self.args.learning_rate)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in Trainer, but rates and penalties are those of the arguments, not those of the checkpoint's run.

        Going on with a lower learning rate is how a run that diverged is mended.
        """
        if checkpoint is None:
            return
        groups = self.optimizer.param_groups
        given = [{name: group[name] for name in GROUP_SETTINGS if name in group} for group in groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        changed = {}
        for group, own in zip(self.optimizer.param_groups, given):
            before, rate, start = group.get("initial_lr"), own.get("initial_lr"), own.pop("lr")
            if before is None and group["lr"] > start:
                # A rate that follows the scores (reduce_lr_on_plateau) has no first one: it is only ever lowered.
                changed[group["lr"]] = start
                group["lr"] = start
            elif before and rate is not None and before != rate:
                changed[before] = rate
                # Every schedule of transformers is a factor of the first rate.
                group["lr"] *= rate / before
            group |= own
        for before, rate in changed.items():
            logger.warning("going on with --learning_rate %g instead of %g", rate, before)
        rates = [group["initial_lr"] for group in self.optimizer.param_groups if "initial_lr" in group]
        if self.lr_scheduler is not None and hasattr(self.lr_scheduler, "base_lrs") and rates:
            self.lr_scheduler.base_lrs[:] = rates

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
            if not positions[index] and self._has_batch_norm():
                # Its tokens must not enter the statistics of all processes.
                batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
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
        every = self.args.ot_gradient_steps
        if every is not None and self.state.global_step % every == 0 and self.accelerator.sync_gradients:
            self._log_gradient_norms(inputs)
        of_labels, of_pairs = inputs.pop(SHARES)
        *parts, last = (
            {**part, SHARES: (of_labels * label_share, of_pairs * pair_share)}
            for part, label_share, pair_share in split_batch(inputs, *self._most_tokens())
        )
        loss = torch.zeros((), device=self.args.device)
        for has_examples, group in groupby(parts, lambda part: "input_ids" in part):
            # Where pairs stand beside examples the model forks the generator itself.
            forked = nullcontext() if has_examples else fork_generator(self.args.device)
            with self.accelerator.no_sync(model), forked:
                for part in group:
                    loss += super().training_step(model, part, num_items_in_batch)
        return loss + super().training_step(model, last, num_items_in_batch)

    def _log_gradient_norms(self, inputs: dict[str, Any]) -> None:
        """Norms of the two gradients by all trained weights on a batch, and `ot_weight` times their ratio.

        Without dropout and with running statistics: training goes on as if this had not been.
        """
        model = self.accelerator.unwrap_model(self.model)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        batch = self._prepare_inputs({name: values for name, values in inputs.items() if name != SHARES})
        model.eval()
        with self.compute_loss_context_manager():
            outputs = model(**batch)
        norms = []
        for loss in (outputs.task_loss, outputs.ot_loss):
            gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            parts = [torch.linalg.vector_norm(gradient) for gradient in gradients if gradient is not None]
            norms.append(torch.linalg.vector_norm(torch.stack(parts)).item())
        task, transport = norms
        self.log(
            {
                "task_gradient_norm": task,
                "ot_gradient_norm": transport,
                "ot_gradient_ratio": model.config.ot_weight * transport / task,
            }
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The batch's share of the step's loss: means over labels and over pairs, each weighted by its share."""
        of_labels, of_pairs = inputs.pop(SHARES)
        try:
            outputs = model(**inputs)
        except ValueError as error:
            # The transport term refuses states that are not finite, which broken weights give it.
            self._check_losses(self._first_broken)
            raise XLFAError(f"step {self.state.global_step + 1}: {error}") from error
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
        self._note_broken(loss, outputs)
        return (loss, outputs) if return_outputs else loss

    def _note_broken(self, loss: torch.Tensor, outputs: Any) -> None:
        parts = [loss.new_zeros(()) if part is None else part.mean() for part in (outputs.task_loss, outputs.ot_loss)]
        present = torch.stack([loss.new_full((), self.state.global_step + 1), *parts]).detach().float()
        sound = torch.isfinite(loss.detach()).all() | torch.isfinite(self._first_broken[0])
        self._first_broken = torch.where(sound, self._first_broken, present)

    def _check_losses(self, first_broken: torch.Tensor) -> None:
        """Raise `XLFAError` if the loss of some step so far was not finite, in one of the given processes."""
        step, task_loss, ot_loss = min(first_broken.view(-1, 3).tolist())
        if step < torch.inf:
            alignment = "" if self.pair_sampler is None else f", ot_loss {ot_loss:g}"
            raise XLFAError(
                f"step {step:.0f}: the loss is not finite (task_loss {task_loss:g}{alignment}). Go on from the last "
                "checkpoint with a lower --learning_rate or --max_grad_norm"
            )

    def _add_part(self, name: str, share: float, value: torch.Tensor) -> None:
        # Of the transport's statistics there is one a pair.
        self._part_sums[name] = self._part_sums.get(name, 0) + share * value.detach().float().mean()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the loss parts since the last line of the training log."""
        self._check_losses(self.accelerator.gather(self._first_broken))
        if "loss" in logs:
            logs |= self._mean_parts()
            if logs.get("ot_not_converged", 0) > 0 and self.is_world_process_zero():
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
            # In the same order in every process: one whose first part has no examples adds ot_loss first.
            for name, total in sorted(self._part_sums.items())
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

    @cached_property
    def run_identity(self) -> dict[str, Any]:
        """What stands in each checkpoint, and must be the same in a run that goes on from it."""
        names = (
            "train_sampling_strategy",
            "dataloader_drop_last",
            "early_stopping_patience",
            "early_stopping_threshold",
        )
        settings = {name: getattr(self.args, name) for name in names}
        settings["seed"] = self.batches.seed
        model = self.accelerator.unwrap_model(self.model)
        settings["freeze_word_embeddings"] = not model.get_input_embeddings().weight.requires_grad
        settings["examples_a_step"] = self.batches.batch_size * self.args.gradient_accumulation_steps
        piece_weights = plain_model(model).base_model.ot_idf
        return run_identity(self.train_dataset, self.validation_windows, self.pair_sampler, piece_weights, settings)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing where the run that is resumed had come to its end: Trainer would take one step too many."""
        stoppers = [each for each in self.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]
        if self.state.global_step >= self.state.max_steps or any(
            each.early_stopping_patience_counter >= each.early_stopping_patience for each in stoppers
        ):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint counts once it is complete; only then are older ones removed."""
        self._check_losses(self.accelerator.gather(self._first_broken))
        checkpoint = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and checkpoint.exists():
            # Of a sitting that was interrupted.
            shutil.rmtree(checkpoint)
        self.accelerator.wait_for_everyone()
        try:
            # Trainer would remove the older ones first.
            with self._without_limit():
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                complete(checkpoint, self.run_identity)
        except Exception:
            # On a full disk what was written takes the space that it lacks.
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise
        if self.args.should_save:
            remove_old(checkpoint, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in Trainer, but the last checkpoint stays, to go on from, unless the best model was asked for.

        Trainer would remove it with a limit of 1 wherever another one has better scores.
        """
        with nullcontext() if self.args.load_best_model_at_end else self._without_limit():
            return super()._finalize_training(*args, **kwargs)

    @contextmanager
    def _without_limit(self) -> Iterator[None]:
        """Within it Trainer keeps all checkpoints."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Raise `XLFAError` instead, if training has gone wrong: what is saved can be trained on from, and scored."""
        # A sharded model comes as the state that was gathered.
        weights = self.model.named_parameters() if state_dict is None else state_dict.items()
        broken = [name for name, weight in weights if not torch.isfinite(weight).all()]
        if broken:
            raise XLFAError(
                f"step {self.state.global_step}: the weights of {broken[0]} are not finite; they were not saved. Go on "
                "from the last checkpoint with a lower --learning_rate or --max_grad_norm"
            )
        if isinstance(self.model, FSDPModule):
            # torch derived its class from the model's: save_pretrained would name it and copy torch's code.
            derived, _, own, *_ = type(self.model).__mro__
            derived.__name__, derived.__module__ = own.__name__, own.__module__
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        # A pickle of the arguments, with local paths in it, that nothing reads: run.json holds them.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        make_portable(self.processing_class, folder)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):
            # PEFT's own files do not say what the adapters are of.
            model.config.save_pretrained(folder)

    def merge_adapters(self) -> None:
        """Save the adapters to their own folder, then merge them: the model goes on as a plain one."""
        self._save(str(Path(self.args.output_dir) / ADAPTER_FOLDER))
        self.model = self.accelerator.unwrap_model(self.model).merge_and_unload()
