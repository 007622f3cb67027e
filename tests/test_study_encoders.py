"""What cells share: one trimmed encoder for all seeds and tasks, and its retrieval before training, each made once."""

import json
import shutil

import pytest
import yaml
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vocabulary_encoders import BERT_TOKENS, save_encoder

from xlfa.data import SAMPLE_ROOT
from xlfa.parallel import load_parallel
from xlfa.retrieval import CONFIGS
from xlfa.study import encoders
from xlfa.study.encoders import Encoders
from xlfa.study.grid import load_plan
from xlfa.tasks import get_task

FOREIGN, ENGLISH = ["der ölige Quark", "zwölf Boxkämpfer"], ["the oily quark", "twelve boxers"]


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("XLFA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data_root(tmp_path):
    """The sample, and sentences for the retrieval."""
    root = tmp_path / "data"
    shutil.copytree(SAMPLE_ROOT, root, ignore=shutil.ignore_patterns("__pycache__"))
    folder = root / "mteb" / "tatoeba-bitext-mining"
    Dataset.from_dict({"sentence1": FOREIGN, "sentence2": ENGLISH}).to_parquet(folder / "test.parquet")
    card = (
        f"---\nconfigs:\n- config_name: {CONFIGS['de']}\n  data_files:\n  - split: test\n    path: test.parquet\n---\n"
    )
    (folder / "README.md").write_text(card)
    return str(root)


def texts_of(data_root):
    """All that the cells of the study below may read."""
    found = [*FOREIGN, *ENGLISH]
    for name in ("xnli", "xquad"):
        task = get_task(name)
        found += task.texts(task.load_training(None, data_root, None, seed=0))
        found += task.texts(task.load_validation(None, data_root))
        for language in task.check_languages(None, data_root):
            found += task.texts(task.load_test(language, data_root))
    return found + [side for pair in load_parallel("local/parallel", ["de"], data_root)["de"] for side in pair]


@pytest.fixture
def encoder(tmp_path, data_root):
    """Knows all pieces of the sample and the letters of other scripts."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=9000, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    backend.train_from_iterator([*texts_of(data_root), "քանի որ գետը խորն է"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **BERT_TOKENS)
    return save_encoder(tmp_path / "encoder", tokenizer)


@pytest.fixture
def plan(tmp_path, data_root, encoder):
    content = {
        "name": "shared",
        "output_dir": str(tmp_path / "study"),
        "data_root": data_root,
        "seeds": [0, 1],
        "train": {
            "model": encoder,
            "trim_vocab": True,
            "max_train_examples": 8,
            "ot_weight": 0.1,
            "parallel_dataset": "local/parallel",
            "parallel_languages": ["de"],
            "parallel_pairs_per_language": 5,
        },
        "tasks": {"xnli": {}, "xquad": {}},
        "retrieval": {"languages": ["de"]},
        "grid": {"ot_epsilon": [0.1]},
        "controls": {"no_ot": {"ot_weight": 0}, "whole": {"trim_vocab": False}},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_plan(path)


def test_cells_of_all_tasks_and_seeds_start_from_one_encoder_that_knows_all_their_texts(plan, data_root, encoder):
    shared = Encoders(plan)
    folders = {shared.encoder(cell) for cell in plan.cells if cell.control != "whole"}
    assert len(folders) == 1
    assert {shared.encoder(cell) for cell in plan.cells if cell.control == "whole"} == {encoder}
    whole, trimmed = (AutoTokenizer.from_pretrained(folder) for folder in (encoder, folders.pop()))
    assert len(trimmed) < len(whole)
    texts = texts_of(data_root)
    assert [trimmed.tokenize(text) for text in texts] == [whole.tokenize(text) for text in texts]
    assert trimmed.tokenize("գետը") != whole.tokenize("գետը")


def test_texts_are_read_once_a_study(plan, monkeypatch):
    first = Encoders(plan).encoder(plan.cells[0])
    monkeypatch.setattr(encoders, "vocabulary_texts", lambda *_: pytest.fail("read again"))
    assert Encoders(plan).encoder(plan.cells[-1 if plan.cells[-1].control != "whole" else 0]) == first


def test_texts_are_read_again_for_other_retrieval_languages(plan):
    first = Encoders(plan)
    first.encoder(plan.cells[0])
    for cell in plan.cells:
        cell.settings["retrieval"] = None
    without = Encoders(plan)
    without.encoder(plan.cells[0])
    assert len(list((plan.output_dir / "vocabulary").iterdir())) == 2


def test_retrieval_before_training_is_measured_once_a_study(plan, monkeypatch):
    Encoders(plan).prepare()
    (path,) = (plan.output_dir / "retrieval_before").iterdir()
    monkeypatch.setattr(encoders, "score_retrieval", lambda *_: pytest.fail("measured again"))
    found = [Encoders(plan).retrieval_before(cell) for cell in plan.cells]
    assert found == [json.loads(path.read_text())] * len(plan.cells)
    assert found[0]["languages"]["de"]["pairs"] == 2 and found[0]["fusion"] == "none"
