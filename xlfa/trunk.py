"""States of frozen layers on disk (`--cache_trunk`): computed once, then read by every run and every scoring.

A cache belongs to one trunk (the embeddings and the first K layers: their config, weights and arithmetic) and to the
layers that are stored, K and the fused ones below it. In it a sequence is found by its input ids, so the same text,
whatever data set it is in, is stored once for each tokenizer. States are bfloat16.

Files are written under a temporary name, moved into place and never changed: any number of processes may read while
others write, and what a killed writer had finished is kept. Runs that need the same sequences share the work: each part
of them is computed by one, and the others go on with the next part, or wait for it at the end.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import gather_object
from datasets import Dataset
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from modeling_xlfa.encoder_xlfa import encoder_layers, run_layers
from modeling_xlfa.modeling_xlfa import XLFAModel
from xlfa.backbones import writable_cache
from xlfa.errors import XLFAError
from xlfa.files import replacing
from xlfa.inference import InferenceOptions, infer, on_main_process

logger = logging.getLogger(__name__)

# Bytes of states a file, about: the piece of work that runs share out among them.
FILE_SIZE = 2**26
# Age at which an unfinished file is a killed writer's: a living one is at it for seconds.
LEFTOVER_SECONDS = 3600
KEY_SIZE = 16
BYTES_A_VALUE = 2


class TrunkCache:
    """Stored states of a model's trunk; set as its `stored_trunk`.

    Args:
        model: with `freeze_layers` > 0.
        tokenizer: pads the sequences that `fill` computes.
        options: of the computation; states that were computed in bfloat16 are not those of float32.
        root: the folder of all caches, by default in the user's cache.

    Raises:
        XLFAError: for a model without frozen layers.
    """

    def __init__(
        self,
        model: XLFAModel,
        tokenizer: PreTrainedTokenizerBase,
        options: InferenceOptions,
        root: Path | None = None,
    ):
        if not model.config.freeze_layers:
            raise XLFAError(
                "--cache_trunk stores the states of frozen layers, and this model has none: train it with "
                "--freeze_layers, or leave --cache_trunk out"
            )
        self.model, self.tokenizer, self.options = model, tokenizer, options
        frozen = model.config.freeze_layers
        self.layers = sorted({*(layer for layer in model.fused_layers if layer < frozen), frozen})
        self.folder = (root or writable_cache("trunks")) / self._identity()
        self._files: list[torch.Tensor] = []
        # Key → file, first row, rows.
        self._places: dict[bytes, tuple[int, int, int]] = {}
        self._names: set[str] = set()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._read_files()

    def _identity(self) -> str:
        """Changes with all that the stored states depend on beside the sequence."""
        encoder = self.model.encoder
        config = encoder.config.to_dict()
        for name in ("_name_or_path", "dtype", "transformers_version"):
            config.pop(name, None)
        settings = [config, self.layers, self.options.bf16, transformers.__version__, self.model.device.type]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        trained = {id(weight) for weight in encoder_layers(encoder)[self.layers[-1] :].parameters()}
        for name, weight in encoder.named_parameters():
            if id(weight) not in trained:
                digest.update(name.encode())
                digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def fill(self, sequences: Dataset, description: str) -> None:
        """Compute and store what is not there yet; every process of a launch takes part.

        Args:
            sequences: the column `input_ids`, and `token_type_ids` where the model takes them.
            description: stands before the progress bar.

        Raises:
            XLFAError: if the disk is full or the folder cannot be written to.
        """
        self._read_files()
        columns = _columns(sequences)
        positions = _positions(columns)
        lengths = {key: len(columns["input_ids"][position]) for key, position in positions.items()}
        on_main_process(lambda: self._prepare(lengths, description))
        # By key: the same parts in every run with these sequences, in whatever order, and whatever is there already.
        parts = _by_size(dict(sorted(lengths.items())), FILE_SIZE // self._bytes_a_token)
        left = [part for part in parts if not self._fill_part(part, positions, columns, description, wait=False)]
        if left:
            logger.info("trunk cache: waiting for %d parts that other runs compute (%s)", len(left), description)
        for part in left:
            self._fill_part(part, positions, columns, description, wait=True)

    def _prepare(self, lengths: dict[bytes, int], description: str) -> None:
        """Remove what killed writers left, and log what will be stored.

        Raises:
            XLFAError: if the disk has no room for it.
        """
        missing = self._missing(lengths)
        if not missing:
            return
        for unfinished in self.folder.glob(".states-*"):
            with suppress(FileNotFoundError):
                if time.time() - unfinished.stat().st_mtime > LEFTOVER_SECONDS:
                    unfinished.unlink()
        size = sum(lengths[key] for key in missing) * self._bytes_a_token
        if size > shutil.disk_usage(self.folder).free:
            raise XLFAError(
                f"--cache_trunk: {size / 2**30:.1f} GiB of states do not fit on the disk of {self.folder}: free some "
                "space (old caches beside it can be removed), or set XLFA_CACHE"
            )
        logger.info(
            "trunk cache: storing layers %s of %d sequences (%s), %.0f MiB, in %s",
            ", ".join(map(str, self.layers)),
            len(missing),
            description,
            size / 2**20,
            self.folder,
        )

    def _fill_part(
        self,
        keys: list[bytes],
        positions: dict[bytes, int],
        columns: dict[str, list[list[int]]],
        description: str,
        wait: bool,
    ) -> bool:
        """Store what is missing of a part; False if another run is at it and `wait` is not set."""
        if not self._missing_anywhere(keys):
            # Without the lock, which another run may hold for a minute.
            return True
        lock = FileLock(self.folder / "locks" / _name(keys))
        try:
            if not on_main_process(lambda: self._acquire(lock, wait)):
                return False
            self._read_files()
            # Other runs, with other parts, may store some of it between two processes' looks.
            missing = on_main_process(lambda: self._missing(keys))
            if missing:
                states = self._compute([positions[key] for key in missing], columns, f"trunk, {description}")
                on_main_process(lambda: self._write(missing, states))
            self._read_files()
            if self._missing_anywhere(keys):
                raise XLFAError(
                    f"--cache_trunk: the processes see different states in {self.folder}: on several machines "
                    "XLFA_CACHE must be a folder that all of them share"
                )
        finally:
            lock.release()
        return True

    def _acquire(self, lock: FileLock, wait: bool) -> bool:
        try:
            Path(lock.lock_file).parent.mkdir(exist_ok=True)
            lock.acquire(blocking=wait)
        except Timeout:
            return False
        except OSError as error:
            raise XLFAError(f"--cache_trunk: cannot write to {self.folder}: {error}") from None
        return True

    def _missing_anywhere(self, keys: list[bytes]) -> bool:
        """Whether some process of the launch has not found the states of one of them."""
        return any(gather_object([bool(self._missing(keys))]))

    def _missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """Those that are not stored, as far as files were read."""
        return [key for key in keys if key not in self._places]

    @property
    def _bytes_a_token(self) -> int:
        return len(self.layers) * self.model.config.hidden_size * BYTES_A_VALUE

    def _compute(self, positions: list[int], columns: dict[str, list[list[int]]], description: str) -> list[np.ndarray]:
        """The states of the sequences at `positions`, each rows x layers x E, as the bits of bfloat16."""
        picked = {name: [column[position] for position in positions] for name, column in columns.items()}
        inputs = Dataset.from_dict(picked | {"length": list(map(len, picked["input_ids"]))})

        def read(states: dict[int, torch.Tensor], padded: Any, _: Any) -> list[torch.Tensor]:
            stacked = torch.stack([states[layer] for layer in self.layers], dim=2).bfloat16().view(torch.int16)
            return [row[: int(length)] for row, length in zip(stacked, padded["attention_mask"].sum(dim=1))]

        return infer(
            _Trunk(self.model, self.layers), self.tokenizer, inputs, read, self.options, description=description
        )

    def _write(self, keys: list[bytes], states: list[np.ndarray]) -> None:
        content = {
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_SIZE),
            "lengths": torch.tensor([len(rows) for rows in states]),
            "states": torch.from_numpy(np.concatenate(states)).view(torch.bfloat16),
        }
        try:
            with replacing(self.folder / f"states-{_name(keys)}.safetensors") as temporary:
                save_file(content, temporary)
        except (OSError, SafetensorError) as error:
            raise XLFAError(f"--cache_trunk: cannot write to {self.folder}: {error}") from None

    def _read_files(self) -> None:
        """Take in files that are there and were not read yet; the states stay on disk, mapped into memory."""
        for path in sorted(self.folder.glob("states-*.safetensors")):
            if path.name in self._names:
                continue
            try:
                with safe_open(path, framework="pt") as content:
                    keys, lengths, states = (content.get_tensor(name) for name in ("keys", "lengths", "states"))
            except SafetensorError as error:
                raise XLFAError(f"--cache_trunk: {path} is damaged ({error}): remove it, it is computed anew") from None
            starts = lengths.cumsum(0) - lengths
            places = zip(map(bytes, keys.numpy()), starts.tolist(), lengths.tolist())
            self._places |= {key: (len(self._files), start, length) for key, start, length in places}
            self._files.append(states)
            self._names.add(path.name)

    def __call__(self, inputs: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Layer → states of a padded batch, each B x T x E; zeros at padding.

        Raises:
            XLFAError: for a sequence that was not stored, or inputs that are no ids.
        """
        if inputs.get("input_ids") is None or inputs.get("position_ids") is not None:
            raise XLFAError("--cache_trunk: states are stored by input_ids; inputs_embeds and position_ids have none")
        mask = inputs["attention_mask"].bool().cpu()
        columns = [inputs[name].cpu().numpy() for name in ("input_ids", "token_type_ids") if name in inputs]
        found = []
        for row, kept in enumerate(mask.numpy()):
            if not kept.any():
                # A stand-in of a process that has no example.
                continue
            place = self._places.get(_key(*(column[row][kept] for column in columns)))
            if place is None:
                raise XLFAError(
                    f"--cache_trunk: no states of a sequence of {int(kept.sum())} tokens, the ids "
                    f"{columns[0][row][kept][:8].tolist()} …, in {self.folder}: fill the cache with it first"
                )
            file, start, length = place
            found.append(self._files[file][start : start + length])
        stored = torch.zeros(*mask.shape, len(self.layers), self.model.config.hidden_size)
        if found:
            stored[mask] = torch.cat(found).float()
        stored = stored.to(self.model.device, self.model.dtype)
        return {layer: stored[:, :, index] for index, layer in enumerate(self.layers)}


class _Trunk(nn.Module):
    """The states of some layers, and no layer above them run."""

    def __init__(self, model: XLFAModel, layers: list[int]):
        super().__init__()
        self.encoder, self.layers = model.encoder, layers
        self.device = model.device

    def forward(self, **inputs: torch.Tensor) -> dict[int, torch.Tensor]:
        return run_layers(self.encoder, inputs, self.layers, last=self.layers[-1])[0]


def _columns(sequences: Dataset) -> dict[str, list[list[int]]]:
    """What states depend on, by name."""
    return {name: sequences[name][:] for name in ("input_ids", "token_type_ids") if name in sequences.column_names}


def _key(*columns: np.ndarray) -> bytes:
    """Of a sequence: its ids and, where the model takes them, its token types."""
    digest = hashlib.blake2b(digest_size=KEY_SIZE)
    for column in columns:
        digest.update(column.astype(np.int64).tobytes())
    return digest.digest()


def _positions(columns: dict[str, list[list[int]]]) -> dict[bytes, int]:
    """Key → first position, of all sequences."""
    positions: dict[bytes, int] = {}
    for position, row in enumerate(zip(*columns.values())):
        positions.setdefault(_key(*(np.asarray(values, dtype=np.int64) for values in row)), position)
    return positions


def _name(keys: list[bytes]) -> str:
    return hashlib.sha256(b"".join(keys)).hexdigest()[:16]


def _by_size(lengths: dict[bytes, int], limit: int) -> Iterable[list[bytes]]:
    """The keys in groups of at most `limit` tokens, or of one sequence."""
    group: list[bytes] = []
    total = 0
    for key, length in lengths.items():
        if group and total + length > limit:
            yield group
            group, total = [], 0
        group.append(key)
        total += length
    yield group
