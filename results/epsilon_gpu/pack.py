"""What `configs/study/epsilon_gpu.yaml` reads, small enough to carry to a machine without a network.

    python results/epsilon_gpu/pack.py ../shared/hub/datasets .gpu/pack.tar.xz    # here: write the archive
    python results/epsilon_gpu/pack.py --unpack /tmp/x                            # there: build the encoder's folder

The archive has the data sets, of the files that the study does not read four rows each (the sets' READMEs name them),
the vocabulary that its texts keep, the packaged encoder's 4-bit file with zeros in the rows of all other pieces, and
the tokenizer.
"""

import json
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xlfa import backbones
from xlfa.study.encoders import VOCABULARY_FOLDER, Encoders
from xlfa.study.grid import load_plan

STUDY = Path(__file__).parents[2] / "configs/study/epsilon_gpu.yaml"
DATA_SETS = (
    *("facebook/xnli", "google/xquad", "local/nli-en", "local/qa-en", "local/parallel"),
    "mteb/tatoeba-bitext-mining",
)
WEIGHTS_FILE, TOKENIZER_FILE = "weights.bin", "tokenizer.json"


def pack(data_root: Path, archive: Path) -> None:
    """Write the archive."""
    with tempfile.TemporaryDirectory() as folder:
        plan = load_plan(STUDY, str(data_root), str(Path(folder) / "study"))
        pack_data(data_root, Path(folder) / "data", plan.cells[0].settings["train"]["parallel_languages"])
        Encoders(plan).encoder(plan.cells[0])
        (kept,) = (plan.output_dir / VOCABULARY_FOLDER).iterdir()
        weights = backbones.verified_file(*backbones.WEIGHTS)
        without_rows(weights, json.loads(kept.read_text())).tofile(Path(folder) / WEIGHTS_FILE)
        shutil.copy(backbones.verified_file(*backbones.TOKENIZER), Path(folder) / TOKENIZER_FILE)
        archive.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["tar", "cJf", archive, "-C", folder, "."], check=True)


def pack_data(root: Path, target: Path, languages: list[str]) -> None:
    """Copy the data sets, uncompressed: of text xz makes less than of compressed columns."""
    for path in (path for name in DATA_SETS for path in sorted((root / name).rglob("*")) if path.is_file()):
        copy = target / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".parquet":
            shutil.copy(path, copy)
            continue
        table = pq.read_table(path)
        if "parallel" in path.parts:
            table = table.filter(pc.equal(table["source"], "ntrex"))
        if not is_read(path, languages):
            table = table.slice(0, 4)
        pq.write_table(table, copy, compression="none", use_dictionary=False)


def is_read(path: Path, languages: list[str]) -> bool:
    """Whether the study, whose parallel text is of these languages, reads a file of its data sets."""
    config, split = path.parent.name, path.name.split("-")[0]
    if "xnli" in path.parts:
        return split == "test" or (config, split) == ("en", "validation")
    return "parallel" not in path.parts or (config.removeprefix("en-") in languages and split == "train")


def without_rows(weights: Path, kept: list[int]) -> np.ndarray:
    """The bytes of the 4-bit file with the word embeddings' other rows set to zero; its layout: `read_q4_file`."""
    data = np.fromfile(weights, dtype=np.uint8)
    entry = b"emb.word"
    # In the table of tensors: length of the name, name, data type, number of values, start and size of the bytes.
    at = data.tobytes().index(struct.pack("<H", len(entry)) + entry) + 2 + len(entry)
    _, _, start, size = struct.unpack_from("<BIQQ", data, at)
    config, _ = backbones.read_q4_file(data)
    rows = data[start : start + size].reshape(config.vocab_size, -1)
    dropped = np.ones(len(rows), dtype=bool)
    dropped[kept] = False
    rows[dropped] = 0
    return data


def unpack(folder: Path) -> None:
    """Build the folder of `packaged:multilingual-e5-small` in `$XLFA_CACHE` from the unpacked archive."""
    backbones.build_encoder(folder / WEIGHTS_FILE, folder / TOKENIZER_FILE)


if __name__ == "__main__":
    first, second = sys.argv[1:]
    if first == "--unpack":
        unpack(Path(second))
    else:
        pack(Path(first), Path(second))
