"""What `xlfa vocab augment` does to text: writes the training text, counts pieces, prints the tables of README.md."""

import argparse
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from xlfa.backbones import resolve_encoder
from xlfa.data import load_rows
from xlfa.files import write_text
from xlfa.parallel import load_parallel
from xlfa.retrieval import COLUMNS, CONFIGS, DATASET

XNLI_LANGUAGES = "ar bg de el en es fr hi ru sw th tr ur vi zh".split()
UDPOS_CONFIGS = {"el": "udpos.Greek", "tr": "udpos.Turkish"}
DIRECTIONS = ("to_english", "from_english")
FOLDER = Path(__file__).parent


def write_training_text(language: str, data_root: str, path: Path) -> None:
    """The sides of a language in the training pairs of local/parallel, a line each."""
    pairs = load_parallel("local/parallel", [language], data_root)[language]
    write_text(path, "".join(" ".join(foreign.split()) + "\n" for _, foreign in pairs))


def held_out_texts(language: str, data_root: str) -> dict[str, list[str]]:
    """Text that no piece was trained on: XNLI's in 15 languages, Tatoeba's and UD's in the language of the pieces."""
    texts = {
        f"xnli {code}": sorted(set(load_rows("facebook/xnli", code, "test", data_root)["premise"]))
        for code in XNLI_LANGUAGES
    }
    texts[f"tatoeba {language}"] = load_rows(DATASET, CONFIGS[language], "test", data_root, COLUMNS)["sentence1"][:]
    words = load_rows("google/xtreme", UDPOS_CONFIGS[language], "test", data_root)["tokens"]
    texts[f"udpos {language}"] = [" ".join(sentence) for sentence in words]
    return texts


def split(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of the pieces of each sentence."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def statistics(ids: list[list[int]], texts: list[str], unknown_id: int) -> dict[str, float]:
    """Pieces for each word between blanks, and the unknown token's share of the pieces in per cent."""
    pieces = sum(map(len, ids))
    words = sum(len(text.split()) for text in texts)
    unknown = sum(sentence.count(unknown_id) for sentence in ids)
    return {"pieces_per_word": pieces / words, "unknown_percent": 100 * unknown / pieces}


def compare(before: str, after: str, texts: dict[str, list[str]]) -> dict[str, dict]:
    """Both tokenizers on every text, with the share of sentences that they split differently."""
    old, new = (AutoTokenizer.from_pretrained(resolve_encoder(name)) for name in (before, after))
    found = {}
    for name, sentences in texts.items():
        old_ids, new_ids = split(old, sentences), split(new, sentences)
        changed = sum(one != other for one, other in zip(old_ids, new_ids))
        found[name] = {
            "sentences": len(sentences),
            "before": statistics(old_ids, sentences, old.unk_token_id),
            "after": statistics(new_ids, sentences, new.unk_token_id),
            "changed_percent": 100 * changed / len(sentences),
        }
    return found


def print_tables() -> None:
    """From the JSON files beside this one."""
    for path in sorted(FOLDER.glob("pieces-*.json")):
        print(f"| {path.stem.removeprefix('pieces-')}: text | before | after | sentences changed |")
        print("| --- | --- | --- | --- |")
        for name, found in json.loads(path.read_text()).items():
            before, after = (found[side]["pieces_per_word"] for side in ("before", "after"))
            print(f"| {name} | {before:.3f} | {after:.3f} | {found['changed_percent']:.2f} % |")
        print()
    scores = {name: json.loads((FOLDER / name / "retrieval.json").read_text()) for name in ("before", "el")}
    print("| P@1, layer 12, to / from English | before | with Greek pieces |")
    print("| --- | --- | --- |")
    for language in scores["before"]["languages"]:
        cells = []
        for found in scores.values():
            layer = found["languages"][language]["layers"]["12"]
            sides = [f"{layer[s]:.1f} [{', '.join(f'{x:.1f}' for x in layer[s + '_interval'])}]" for s in DIRECTIONS]
            cells.append(" / ".join(sides))
        print(f"| {language} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["text", "pieces", "tables"])
    parser.add_argument("--language", choices=list(UDPOS_CONFIGS))
    parser.add_argument("--data_root")
    parser.add_argument("--before")
    parser.add_argument("--after")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.action == "text":
        write_training_text(arguments.language, arguments.data_root, arguments.output)
    elif arguments.action == "pieces":
        texts = held_out_texts(arguments.language, arguments.data_root)
        found = compare(arguments.before, arguments.after, texts)
        write_text(arguments.output, json.dumps(found, indent=1) + "\n")
    else:
        print_tables()


if __name__ == "__main__":
    main()
