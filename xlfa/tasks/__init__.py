"""The registry of tasks. A new task is one entry here."""

from xlfa.errors import XLFAError
from xlfa.tasks.question_answering import QuestionAnsweringTask
from xlfa.tasks.sequence_classification import SequenceClassificationTask
from xlfa.tasks.task import Defaults, Prediction, Source, Task
from xlfa.tasks.token_classification import TokenClassificationTask

XNLI_LANGUAGES = tuple("ar bg de el en es fr hi ru sw th tr ur vi zh".split())
PAWSX_LANGUAGES = tuple("de en es fr ja ko zh".split())
XQUAD_LANGUAGES = tuple("ar de el en es hi ru th tr vi zh".split())
MLQA_LANGUAGES = tuple("ar de en es hi vi zh".split())
PANX_LANGUAGES = tuple(
    "af ar bg bn de el en es et eu fa fi fr he hi hu id it ja jv "
    "ka kk ko ml mr ms my nl pt ru sw ta te th tl tr ur vi yo zh".split()
)
UDPOS_LANGUAGES = {
    **{"af": "Afrikaans", "ar": "Arabic", "bg": "Bulgarian", "de": "German", "el": "Greek", "en": "English"},
    **{"es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish", "fr": "French"},
    **{"he": "Hebrew", "hi": "Hindi", "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese"},
    **{"kk": "Kazakh", "ko": "Korean", "mr": "Marathi", "nl": "Dutch", "pt": "Portuguese", "ru": "Russian"},
    **{"ta": "Tamil", "te": "Telugu", "th": "Thai", "tl": "Tagalog", "tr": "Turkish", "ur": "Urdu"},
    **{"vi": "Vietnamese", "yo": "Yoruba", "zh": "Chinese"},
}
TYDIQA_LANGUAGES = {
    **{"ar": "arabic", "bn": "bengali", "en": "english", "fi": "finnish", "id": "indonesian"},
    **{"ko": "korean", "ru": "russian", "sw": "swahili", "te": "telugu"},
}

_REGISTERED = [
    SequenceClassificationTask(
        name="xnli",
        train=Source("facebook/xnli", "en", "train"),
        validation=Source("facebook/xnli", "en", "validation"),
        test_dataset="facebook/xnli",
        test_split="test",
        test_configs={code: code for code in XNLI_LANGUAGES},
        xtreme_languages=XNLI_LANGUAGES,
        defaults=Defaults(learning_rate=2e-5, batch_size=32, epochs=5, max_length=128),
        columns=("premise", "hypothesis", "label"),
        group_columns=("premise",),
        sentence_columns=("premise", "hypothesis"),
        label_names=("entailment", "neutral", "contradiction"),
    ),
    SequenceClassificationTask(
        name="pawsx",
        train=Source("google-research-datasets/paws-x", "en", "train"),
        validation=Source("google-research-datasets/paws-x", "en", "validation"),
        test_dataset="google-research-datasets/paws-x",
        test_split="test",
        fallback_splits=("validation",),
        test_configs={code: code for code in PAWSX_LANGUAGES},
        xtreme_languages=PAWSX_LANGUAGES,
        defaults=Defaults(learning_rate=2e-5, batch_size=32, epochs=5, max_length=128),
        metrics=("accuracy", "majority_rate"),
        columns=("id", "sentence1", "sentence2", "label"),
        group_columns=("sentence1", "sentence2"),
        sentence_columns=("sentence1", "sentence2"),
        label_names=("different", "paraphrase"),
    ),
    TokenClassificationTask(
        name="wikiann",
        train=Source("unimelb-nlp/wikiann", "en", "train"),
        validation=Source("unimelb-nlp/wikiann", "en", "validation"),
        test_dataset="unimelb-nlp/wikiann",
        test_split="test",
        fallback_splits=("validation",),
        test_configs={code: code for code in sorted((*PANX_LANGUAGES, "ro"))},
        xtreme_languages=PANX_LANGUAGES,
        defaults=Defaults(learning_rate=2e-5, batch_size=32, epochs=10, max_length=128),
        metrics=("f1", "precision", "recall", "missed_words"),
        columns=("tokens", "ner_tags"),
        tag_column="ner_tags",
        label_names=("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"),
    ),
    TokenClassificationTask(
        name="udpos",
        train=Source("google/xtreme", "udpos.English", "train"),
        validation=Source("google/xtreme", "udpos.English", "validation"),
        test_dataset="google/xtreme",
        test_split="test",
        fallback_splits=("validation",),
        test_configs={code: f"udpos.{name}" for code, name in UDPOS_LANGUAGES.items()},
        xtreme_languages=tuple(UDPOS_LANGUAGES),
        defaults=Defaults(learning_rate=2e-5, batch_size=32, epochs=10, max_length=128),
        metrics=("f1", "accuracy", "missed_words"),
        columns=("tokens", "pos_tags"),
        tag_column="pos_tags",
        label_names=tuple("ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X".split()),
    ),
    QuestionAnsweringTask(
        name="xquad",
        train=Source("rajpurkar/squad", None, "train"),
        validation=None,
        test_dataset="google/xquad",
        test_split="validation",
        test_configs={code: f"xquad.{code}" for code in sorted((*XQUAD_LANGUAGES, "ro"))},
        xtreme_languages=XQUAD_LANGUAGES,
        defaults=Defaults(learning_rate=3e-5, batch_size=32, epochs=3, max_length=384, doc_stride=128),
    ),
    QuestionAnsweringTask(
        name="mlqa",
        train=Source("rajpurkar/squad", None, "train"),
        validation=None,
        test_dataset="facebook/mlqa",
        test_split="test",
        # Context and question in the same language: XTREME's choice, MLQA's "XLT".
        test_configs={code: f"mlqa.{code}.{code}" for code in MLQA_LANGUAGES},
        xtreme_languages=MLQA_LANGUAGES,
        defaults=Defaults(learning_rate=3e-5, batch_size=32, epochs=3, max_length=384, doc_stride=128),
        metrics=("f1_mlqa", "exact_match_mlqa", "f1", "exact_match"),
        parallel=False,
    ),
    QuestionAnsweringTask(
        name="tydiqa",
        # GoldP in English, as in XTREME's table; its other setting is `--train_dataset rajpurkar/squad`.
        train=Source("google-research-datasets/tydiqa", "secondary_task", "train"),
        validation=None,
        test_dataset="google-research-datasets/tydiqa",
        test_split="validation",
        test_configs={code: "secondary_task" for code in TYDIQA_LANGUAGES},
        id_prefixes={code: f"{name}-" for code, name in TYDIQA_LANGUAGES.items()},
        xtreme_languages=tuple(TYDIQA_LANGUAGES),
        defaults=Defaults(learning_rate=3e-5, batch_size=32, epochs=3, max_length=384, doc_stride=128),
        metrics=("f1", "exact_match"),
        parallel=False,
    ),
]

TASKS: dict[str, Task] = {task.name: task for task in _REGISTERED}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        XLFAError: for an unknown name.
    """
    if name not in TASKS:
        raise XLFAError(f"unknown task {name!r}; there are: {', '.join(TASKS)}")
    return TASKS[name]


__all__ = ["TASKS", "Defaults", "Prediction", "Source", "Task", "get_task"]
