"""The registry of tasks. A new task is one entry here."""

from xlfa.errors import XLFAError
from xlfa.tasks.question_answering import QuestionAnsweringTask
from xlfa.tasks.sequence_classification import SequenceClassificationTask
from xlfa.tasks.task import Defaults, Prediction, Source, Task

_REGISTERED = [
    SequenceClassificationTask(
        name="xnli",
        train=Source("facebook/xnli", "en", "train"),
        validation=Source("facebook/xnli", "en", "validation"),
        test_dataset="facebook/xnli",
        test_split="test",
        test_configs={code: code for code in "ar bg de el en es fr hi ru sw th tr ur vi zh".split()},
        xtreme_languages=tuple("ar bg de el en es fr hi ru sw th tr ur vi zh".split()),
        defaults=Defaults(learning_rate=2e-5, batch_size=32, epochs=5, max_length=128),
        columns=("premise", "hypothesis", "label"),
        group_column="premise",
        sentence_columns=("premise", "hypothesis"),
        label_names=("entailment", "neutral", "contradiction"),
    ),
    QuestionAnsweringTask(
        name="xquad",
        train=Source("rajpurkar/squad", None, "train"),
        validation=None,
        test_dataset="google/xquad",
        test_split="validation",
        test_configs={code: f"xquad.{code}" for code in "ar de el en es hi ro ru th tr vi zh".split()},
        xtreme_languages=tuple("ar de el en es hi ru th tr vi zh".split()),
        defaults=Defaults(learning_rate=3e-5, batch_size=32, epochs=3, max_length=384, doc_stride=128),
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
