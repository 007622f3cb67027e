"""Publishing a trained model on the Hub: one commit with weights, code, tokenizer, card and scores, then a tag.

Nothing from the run folder is executed, and only files of known names leave it. The published code is that of the
installed package.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    eval_result_entries_to_yaml,
    get_token,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import HFValidationError, validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import modeling_xlfa
import xlfa
from modeling_xlfa import XLFAConfig
from modeling_xlfa.configuration_xlfa import AUTO_MAP
from xlfa.card import LICENCE, TrainedRun, eval_result_entries, looks_local, render_card, score_table
from xlfa.errors import XLFAError
from xlfa.files import building_folder
from xlfa.hub_errors import naming_push_errors
from xlfa.run_file import RUN_FILE, is_finished, weights_digest
from xlfa.scores import SCHEMA_VERSION, SCORES_FILE
from xlfa.tasks import TASKS

TOKENIZER_NAME = "tokenizer.json"
# Beside tokenizer.json; none of them is a program or a pickle.
TOKENIZER_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json"),
    *("merges.txt", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model"),
)
# What transformers notes about where it loaded a config or tokenizer from.
LOCAL_FIELDS = ("_name_or_path", "name_or_path", "is_local", "local_files_only")
# Fields by which transformers finds code to run.
CODE_FIELDS = ("auto_map", "custom_pipelines")
# What a publication owns in a repo: those that the run no longer has are deleted; results that others added stay.
OWNED = {name for task in TASKS for name in (f".eval_results/{task}.yaml", f"scores/{task}/scores.json")}
DEFAULT_REVISION = "main"
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

EPILOG = """example:
  xlfa push runs/xquad org/xquad-dlfa --revision-tag v1

The token is the one of `hf auth login` or HF_TOKEN. Score the model first (`xlfa eval`): the card shows its scores.
Pushing again without a change makes no commit."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of `xlfa push`."""
    parser = argparse.ArgumentParser(
        prog="xlfa push",
        description="Publish a trained and scored model on the Hub in one commit.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder that training wrote, with scores/<task>/ in it")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="model repo; it is created where it does not exist")
    parser.add_argument("--private", action="store_true", help="create it as a private one")
    parser.add_argument("--revision-tag", "--revision_tag", metavar="TAG", help="tag of the commit, such as v1")
    parser.add_argument("--create-pr", "--create_pr", action="store_true", help="open a pull request instead")
    parser.add_argument(
        "--license",
        default=LICENCE,
        metavar="ID",
        help="licence of the weights by the Hub's name, where the encoder's or the data's is stricter (%(default)s)",
    )
    parser.add_argument(
        "--dry-run", "--dry_run", metavar="FOLDER", help="write what would be published to a new folder, push nothing"
    )
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if arguments.dry_run is not None:
        folder = Path(arguments.dry_run)
        write_publication(arguments.run_dir, arguments.repo_id, arguments.revision_tag, folder, arguments.license)
        print(f"written to {arguments.dry_run}; nothing was pushed")
        return
    url = push(
        arguments.run_dir,
        arguments.repo_id,
        private=arguments.private,
        revision_tag=arguments.revision_tag,
        create_pr=arguments.create_pr,
        licence=arguments.license,
    )
    print(f"published: {url}")


def push(
    run_dir: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision_tag: str | None = None,
    create_pr: bool = False,
    licence: str = LICENCE,
) -> str:
    """Publish a run folder as a model repo, in one commit; an unchanged run makes no commit.

    Args:
        run_dir: what training wrote, with the scores of one or more tasks in `scores/<task>/`.
        repo_id: `org/name`; the repo is created where it does not exist.
        private: create it as a private one.
        revision_tag: set on the commit, and shown in the card as `revision=`.
        create_pr: open a pull request on an existing repo instead of committing to `main`.
        licence: of the weights, by the Hub's name.

    Returns:
        The address of the commit or, with `create_pr`, of the pull request.

    Raises:
        XLFAError: for a name that is no repo id, a run folder that cannot be published, a tag that exists with other
            content, no token, no permission, or a Hub that fails.
    """
    check_names(repo_id, revision_tag, create_pr)
    trained = read_run(Path(run_dir))
    check_token()
    # Beside the run, so that the weights can be linked and need no copy.
    with staging_folder(trained.folder) as folder:
        stage(trained, folder, repo_id, revision_tag or DEFAULT_REVISION, licence)
        with naming_push_errors(repo_id):
            return upload(folder, repo_id, private, revision_tag, create_pr)


def write_publication(
    run_dir: str | os.PathLike, repo_id: str, revision_tag: str | None, folder: Path, licence: str = LICENCE
) -> None:
    """Write what `push` would publish to a folder that does not exist yet.

    Raises:
        XLFAError: as `push`, but for the Hub; if the folder exists.
    """
    check_names(repo_id, revision_tag, create_pr=False)
    if folder.exists():
        raise XLFAError(f"--dry-run {folder} exists: name a new folder")
    trained = read_run(Path(run_dir))
    try:
        with building_folder(folder) as temporary:
            stage(trained, temporary, repo_id, revision_tag or DEFAULT_REVISION, licence)
    except OSError as error:
        raise XLFAError(f"--dry-run {folder}: cannot write it ({error.strerror or error})") from None


def check_token() -> None:
    """Raise `XLFAError` where huggingface_hub finds no token."""
    if get_token() is None:
        raise XLFAError("no token for the Hub: log in with `hf auth login`, or set HF_TOKEN")


def check_names(repo_id: str, tag: str | None, create_pr: bool) -> None:
    """Raise `XLFAError` for a name that is no repo id, a tag that is none, or a tag on a pull request."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise XLFAError(f"{repo_id!r} is no repo id such as org/name: {error}") from None
    if "/" not in repo_id:
        raise XLFAError(f"{repo_id!r} is no repo id such as org/name: put your user name or organisation in front")
    if tag is None:
        return
    if create_pr:
        raise XLFAError(f"--revision-tag {tag}: a pull request has no tag; merge it, then push again with the tag")
    if not TAG.fullmatch(tag) or ".." in tag or tag.endswith((".", ".lock")) or tag == DEFAULT_REVISION:
        raise XLFAError(
            f"--revision-tag {tag!r} is no tag such as v1.0: letters, digits, and . _ - between them, and not main"
        )


# What a run folder holds


def read_run(run_dir: Path) -> TrainedRun:
    """The run in a folder, after a check that it can be published.

    Raises:
        XLFAError: if the folder does not exist, lacks weights, tokenizer, `run.json` or scores, links out of itself,
            names code of others, or its parts are of different models.
    """
    folder = run_dir.resolve()
    if not folder.is_dir():
        raise XLFAError(f"no run folder {run_dir}: give the --output_dir of a training run")
    run = read_json(folder, RUN_FILE)
    if not is_finished(run):
        raise XLFAError(
            f"{run_dir} holds a run that was not finished ({RUN_FILE} has no validation scores): go on with the "
            "command that began it and --resume_from_checkpoint true"
        )
    for name in weight_files(folder):
        if name != SAFE_WEIGHTS_INDEX_NAME:
            check_safetensors(own_file(folder, name))
    if not (folder / TOKENIZER_NAME).is_file():
        raise XLFAError(f"{run_dir} holds no tokenizer ({TOKENIZER_NAME}): give the --output_dir of a training run")
    config = read_config(folder)
    if run.get("task") not in TASKS:
        raise XLFAError(f"{folder / RUN_FILE} is of the task {run.get('task')!r}; there are: {', '.join(TASKS)}")
    check_head(config, run["task"], folder / RUN_FILE)
    files = sorted(folder.glob(f"scores/*/{SCORES_FILE}"))
    if not files:
        raise XLFAError(f"{run_dir} has no scores/<task>/{SCORES_FILE}: score the model with `xlfa eval` first")
    scores = {path.parent.name: read_scores(folder, path.parent.name, config) for path in files}
    trained = TrainedRun(folder, config, run, scores)
    try:
        render_card(trained, "org/name", DEFAULT_REVISION)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise XLFAError(f"{folder / RUN_FILE} is no {RUN_FILE} as training writes it ({error!r})") from None
    return trained


def own_file(folder: Path, name: str) -> Path:
    """The path of a file in the run folder.

    Raises:
        XLFAError: if it lies, by a link or its name, somewhere else.
    """
    path = (folder / name).resolve()
    if not path.is_relative_to(folder):
        raise XLFAError(f"{folder / name} leads out of the run folder, to {path}: put the file itself there")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the run folder.

    Raises:
        XLFAError: if the file is missing, lies elsewhere or holds something else.
    """
    path = own_file(folder, name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise XLFAError(f"cannot read {folder / name}: {error.strerror}") from None
    except ValueError as error:
        raise XLFAError(f"{folder / name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise XLFAError(f"{folder / name} holds no JSON object")
    return content


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files, after their index where there is more than one.

    Raises:
        XLFAError: without any, or for an index that names other files.
    """
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        names = set(read_json(folder, SAFE_WEIGHTS_INDEX_NAME).get("weight_map", {}).values())
        for name in sorted(names, key=str):
            if not re.fullmatch(r"[\w-]+(\.[\w-]+)*\.safetensors", str(name)) or not (folder / name).is_file():
                raise XLFAError(f"{folder / SAFE_WEIGHTS_INDEX_NAME} names {name!r}, which is no weight file beside it")
        return [SAFE_WEIGHTS_INDEX_NAME, *sorted(names)]
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [SAFE_WEIGHTS_NAME]
    if (folder / "adapter_config.json").is_file():
        raise XLFAError(f"{folder} holds an adapter: publish it with `hf upload`, or merge it into the model first")
    raise XLFAError(f"{folder} has no weights ({SAFE_WEIGHTS_NAME}; pickles are not published): train the model first")


def check_safetensors(path: Path) -> None:
    """Raise `XLFAError` for a file that is not in the format that its name promises."""
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise XLFAError(
            f"{path} is no safetensors file ({error}): train the model again, or save it with xlfa"
        ) from None


def read_config(folder: Path) -> XLFAConfig:
    """The model's config, without any code that the folder may name.

    Raises:
        XLFAError: for another model type, a bad field, or code of others.
    """
    content = read_json(folder, CONFIG_NAME)
    if content.get("model_type") != XLFAConfig.model_type:
        raise XLFAError(f"{folder / CONFIG_NAME} is of a {content.get('model_type')!r} model, not of an XLFA one")
    named = content.pop("auto_map", {})
    for key, value in named.items() if isinstance(named, dict) else [("auto_map", named)]:
        if value != AUTO_MAP.get(key):
            raise XLFAError(
                f"{folder / CONFIG_NAME}: auto_map points {key} at {value!r}, not at XLFA's own code: this is not "
                "published; save the model again with the package xlfa"
            )
    check_names_no_code(content, folder / CONFIG_NAME)
    try:
        return XLFAConfig(**content)
    except (TypeError, ValueError) as error:
        raise XLFAError(f"{folder / CONFIG_NAME}: {error}") from None


def check_names_no_code(content: Any, path: Path) -> None:
    """Raise `XLFAError` if some part of a JSON file names code for transformers to run."""
    if isinstance(content, dict):
        for name in CODE_FIELDS:
            if name in content:
                raise XLFAError(f"{path}: {name} names code ({content[name]!r}): this is not published, remove it")
    for each in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        check_names_no_code(each, path)


def check_head(config: XLFAConfig, task: str, place: Path) -> None:
    """Raise `XLFAError` if the model has not the head of the task."""
    head = TASKS[task].model_class.__name__
    if config.architectures != [head]:
        found = ", ".join(config.architectures or ["none"])
        raise XLFAError(f"{place} is of the task {task!r}, which needs {head}; the model's head is {found}")


def read_scores(folder: Path, task: str, config: XLFAConfig) -> dict[str, Any]:
    """The scores of a task in the run folder.

    Raises:
        XLFAError: for an unknown task, another format, or scores of another model.
    """
    name = f"scores/{task}/{SCORES_FILE}"
    scores, path = read_json(folder, name), folder / name
    if task not in TASKS or scores.get("task") != task:
        raise XLFAError(f"{path} is of the task {scores.get('task')!r}: the folder must have the name of a known task")
    if scores.get("schema_version") != SCHEMA_VERSION:
        raise XLFAError(
            f"{path} has schema_version {scores.get('schema_version')!r}, not {SCHEMA_VERSION}: score the model again"
        )
    check_head(config, task, path)
    try:
        scored = dict(scores["model"])
        # What the card needs of the file must be there.
        score_table(scores)
        eval_result_entries(task, scores)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise XLFAError(f"{path} is no {SCORES_FILE} as `xlfa eval` writes it ({error!r}): score again") from None
    ours = {"encoder": config.text_config.model_type, **config.to_dict()}
    if "weights" in scored:
        ours["weights"] = weights_digest(folder)
    for field, value in scored.items():
        if field not in ours or ours[field] != value:
            raise XLFAError(
                f"{path} is of another model: it was scored with {field}={value!r}, this one has "
                f"{ours.get(field)!r}; score this model with `xlfa eval`"
            )
    return scores


# What is published


@contextmanager
def staging_folder(run_dir: Path) -> Iterator[Path]:
    """A temporary folder, beside the run folder where that can be written to."""
    parent = run_dir.parent if os.access(run_dir.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".xlfa-push-", dir=parent) as folder:
        yield Path(folder)


def stage(trained: TrainedRun, folder: Path, repo_id: str, revision: str, licence: str = LICENCE) -> None:
    """Write what is published into an empty folder.

    Args:
        trained: from `read_run`.
        folder: exists and is empty; weights are linked into it where the file system can.
        repo_id, revision: what the card's example loads.
        licence: of the weights.

    Raises:
        XLFAError: if a file holds a path of this machine, leads out of the run folder, or names code.
    """
    for name in weight_files(trained.folder):
        link_or_copy(own_file(trained.folder, name), folder / name)
    config = {**read_json(trained.folder, CONFIG_NAME), "auto_map": AUTO_MAP}
    write_json(folder / CONFIG_NAME, config)
    shutil.copyfile(own_file(trained.folder, TOKENIZER_NAME), folder / TOKENIZER_NAME)
    for name in TOKENIZER_FILES:
        if (trained.folder / name).is_file():
            source = own_file(trained.folder, name)
            if source.suffix == ".json" and name != "vocab.json":
                content = read_json(trained.folder, name)
                check_names_no_code(content, source)
                write_json(folder / name, content)
            else:
                shutil.copyfile(source, folder / name)
    for source in sorted(Path(modeling_xlfa.__file__).parent.glob("*_xlfa.py")):
        shutil.copyfile(source, folder / source.name)
    for task, scores in trained.scores.items():
        write_json(folder / "scores" / task / SCORES_FILE, scores)
        entries = eval_result_entries_to_yaml(eval_result_entries(task, scores))
        write(folder / ".eval_results" / f"{task}.yaml", yaml.safe_dump(entries, sort_keys=False, allow_unicode=True))
    write(folder / "LICENSE", metadata.distribution("xlfa").read_text("licenses/LICENSE"))
    write(folder / "README.md", str(render_card(trained, repo_id, revision, licence)))
    check_no_local_path(folder, trained)


def link_or_copy(source: Path, target: Path) -> None:
    """The file under a second name, without a copy where both are on one file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object without the fields that say where it was loaded from.

    Raises:
        XLFAError: if another field has a local path.
    """
    content = without_local_fields(content, path.name)
    write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def without_local_fields(value: Any, place: str) -> Any:
    """A JSON value without `LOCAL_FIELDS`, however deep; `place` names it in the error for a local path."""
    if isinstance(value, dict):
        return {
            name: without_local_fields(each, f"{place}: {name}")
            for name, each in value.items()
            if name not in LOCAL_FIELDS
        }
    if isinstance(value, list):
        return [without_local_fields(each, place) for each in value]
    if isinstance(value, str) and looks_local(value) and len(re.findall(r"[/\\]", value)) > 1:
        raise XLFAError(f"{place} would publish the local path {value!r}: remove it from the run folder's file")
    return value


def check_no_local_path(folder: Path, trained: TrainedRun) -> None:
    """Raise `XLFAError` if a text file in the staged folder has a path of this machine or of the training run in it."""
    arguments = [trained.run[f"{kind}_arguments"].values() for kind in ("model", "data", "training")]
    recorded = [value for values in arguments for value in values if isinstance(value, str) and looks_local(value)]
    local = {str(trained.folder), str(Path.home()), str(Path.cwd()), *recorded}
    # A name as short as /root may stand in a vocabulary.
    needles = sorted(path for path in local if len(re.findall(r"[/\\]", path)) > 1)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".safetensors":
            content = path.read_bytes()
            for needle in needles:
                if needle.encode() in content:
                    raise XLFAError(
                        f"{path.relative_to(folder)} would publish the local path {needle!r}: remove it from the run "
                        "folder's files"
                    )


# The Hub


def upload(folder: Path, repo_id: str, private: bool, tag: str | None, create_pr: bool) -> str:
    """Commit the staged folder and set the tag; the address of the commit or pull request.

    The commit is made by one call of `create_commit`: with Xet, `upload_folder` would split it into several.
    """
    api = HfApi(library_name="xlfa", library_version=xlfa.__version__)
    if not create_pr:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise XLFAError(f"--private: {repo_id} exists and is public; make it private in its settings on the Hub first")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if tag is not None:
        commit = next((ref.target_commit for ref in api.list_repo_refs(repo_id).tags if ref.name == tag), None)
        if commit is not None and has_files(api, repo_id, tag, files):
            return f"{api.endpoint}/{repo_id}/commit/{commit}"
        if commit is not None:
            raise XLFAError(f"--revision-tag {tag}: {repo_id} has this tag on other files; choose another one")
    present = api.list_repo_files(repo_id)
    additions = [CommitOperationAdd(name, path) for name, path in files.items()]
    deletions = [CommitOperationDelete(name) for name in present if name in OWNED and name not in files]
    message = f"Publish with xlfa {xlfa.__version__}"
    commit = api.create_commit(repo_id, [*deletions, *additions], commit_message=message, create_pr=create_pr)
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit.pr_url or commit.commit_url


def has_files(api: HfApi, repo_id: str, revision: str, files: dict[str, Path]) -> bool:
    """Whether the repo has these files, with this content, at a revision."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    present = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    for name, path in files.items():
        entry = present.get(name)
        if entry is None:
            return False
        with path.open("rb") as file:
            same = sha_fileobj(file).hex() == entry.lfs.sha256 if entry.lfs else git_hash(file.read()) == entry.blob_id
        if not same:
            return False
    return True
