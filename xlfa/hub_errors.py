"""What the Hub refuses, and connections to it that break, as one `XLFAError` with cause and remedy; never the token.

Addresses are left out as well: those of a storage behind the Hub may be signed.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import HFValidationError, validate_repo_id

from xlfa.errors import XLFAError

PUSH_AGAIN = "push again: what has arrived is not sent twice, and all of it ends in one commit"
RUN_AGAIN = "run it again: files that have arrived whole are not fetched twice"
LOG_IN = "log in with `hf auth login`, or check HF_TOKEN"

# Of this machine's files, not of a connection.
LOCAL_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)

# What is read of a model: how a message calls it → the names of its files.
MODEL_PARTS = {
    "config.json": re.compile(r"(adapter_)?config\.json"),
    "weights such as model.safetensors (pickles are not read)": re.compile(r".+\.safetensors(\.index\.json)?"),
    "tokenizer files such as tokenizer.json": re.compile(r"tokenizer.*\.json|vocab\..+|.+\.model"),
}
PARTS = {"model": MODEL_PARTS, "dataset": {"README.md": re.compile(r"README\.md")}}


@contextmanager
def naming_push_errors(repo_id: str) -> Iterator[None]:
    """Turn what huggingface_hub raises while it writes to a repo into an `XLFAError`."""
    try:
        yield
    except XLFAError:
        raise
    except OfflineModeIsEnabled:
        raise XLFAError("cannot push: HF_HUB_OFFLINE is set; unset it") from None
    except HfHubHTTPError as error:
        raise XLFAError(_refused_push(error, repo_id)) from None
    except (HTTPError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in LOCAL_FAULTS:
            place = f" ({error.filename})" if error.filename else ""
            raise XLFAError(f"cannot push: {error.strerror}{place}, on this machine; then push again") from None
        # What hf_xet raises while weights are sent is of built-in classes; its messages may hold signed addresses.
        raise XLFAError(_broken(error, PUSH_AGAIN)) from None
    except ValueError as error:
        raise XLFAError(f"the Hub does not take the card of {repo_id}: {error}") from None


@contextmanager
def naming_read_errors(place: str, repo_id: str, missing: str, repo_type: str = "model") -> Iterator[None]:
    """Turn what a library raises because the Hub failed into an `XLFAError`; other errors pass.

    Args:
        place: where the name came from, such as `--model org/name`; messages begin with it.
        repo_id: what is loaded. A folder may be meant: then nothing is asked of the Hub.
        missing: what to say where there is no such repo.
        repo_type: `model` or `dataset`.
    """
    try:
        yield
    except XLFAError:
        raise
    except Exception as error:
        cause = _cause(error, repo_id, missing)
        if cause is None and _lacks_files(error) and _is_hub_id(repo_id):
            cause = _cause_of_absence(repo_id, missing, repo_type)
        if cause is None:
            raise
        raise XLFAError(f"{place}: {cause}") from None


def _cause(error: Exception, repo_id: str, missing: str) -> str | None:
    """What went wrong at the Hub or on the way to it, and what to do; None where nothing did.

    transformers and datasets raise their own errors with the Hub's as the cause, or within its handling.
    """
    found: BaseException | None = error
    seen, wrapped = set(), True
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        if isinstance(found, HFValidationError) and not os.path.exists(repo_id):
            return f"{missing}: check the name"
        if isinstance(found, OfflineModeIsEnabled) or OfflineModeIsEnabled.__name__ in str(found):
            # The name alone is in what datasets raises.
            return _offline()
        if isinstance(found, HfHubHTTPError):
            if isinstance(found, EntryNotFoundError) and not wrapped:
                # Files that may be there or not are asked for; an error in what is done without them has this context.
                return None
            return _refused_read(found, repo_id, missing)
        if _is_broken(found):
            return _broken(found, RUN_AGAIN)
        wrapped = wrapped and found.__cause__ is not None
        found = found.__cause__ or found.__context__
    return None


def _is_broken(error: BaseException) -> bool:
    """Whether it tells of a broken connection; weights come by hf_xet, which raises built-in classes too."""
    if isinstance(error, RuntimeError):
        return _raised_in(error).startswith("huggingface_hub.")
    lost = isinstance(error, (HTTPError, ConnectionError)) and not isinstance(error, BrokenPipeError)
    return lost or type(error).__module__ == "hf_xet"


def _raised_in(error: BaseException) -> str:
    """The name of the module that raised it, or called the extension that did."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return "" if traceback is None else traceback.tb_frame.f_globals.get("__name__", "")


def _lacks_files(error: Exception) -> bool:
    """Whether it may come of files that were not there. What the system says of a file of ours has a number."""
    if isinstance(error, OSError):
        return error.errno is None
    return isinstance(error, ValueError) and ("tokenizer" in str(error) or "config.json" in str(error))


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def _cause_of_absence(repo_id: str, missing: str, repo_type: str) -> str | None:
    """Why files of a repo seemed not to be there; the Hub is asked for them again.

    Where it answers with 503, transformers takes weights and tokenizer.json for absent (seen with 5.23), and datasets
    all data files (5.2).
    """
    parts = PARTS[repo_type]
    try:
        files = HfApi(library_name="xlfa").list_repo_files(repo_id, repo_type=repo_type)
        for name in files:
            if any(part.fullmatch(name) for part in parts.values()):
                get_hf_file_metadata(hf_hub_url(repo_id, name, repo_type=repo_type))
    except (HTTPError, OSError) as error:
        return _cause(error, repo_id, missing)
    if repo_type == "model":
        for part, names in parts.items():
            if not any(names.fullmatch(name) for name in files):
                return f"the repo {repo_id} on the Hub has no {part}: name one that has, or add what it lacks"
    return None


def _refused_push(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    if status == 401:
        return (
            f"the Hub does not accept the token for {repo_id} (401): log in again with `hf auth login`, or set "
            "HF_TOKEN to one with write access"
        )
    if status == 403:
        return (
            f"this token may not write to {repo_id} (403): take one with write access to that namespace, push to "
            "another one, or open a pull request with --create-pr"
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"no repo {repo_id} on the Hub that this token may see ({status}): check the name"
    if status in (409, 412):
        return f"another commit is being made to {repo_id} ({status}): wait for it, then {PUSH_AGAIN}"
    return _refused(error, repo_id, PUSH_AGAIN)


def _refused_read(error: HfHubHTTPError, repo_id: str, missing: str) -> str:
    status = error.response.status_code
    # That of an adapter's encoder may be the one that is refused.
    refused = getattr(error, "repo_id", None) or repo_id
    if isinstance(error, GatedRepoError):
        return f"{refused} is gated ({status}): ask for access on its page on the Hub, and {LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        what = missing if refused == repo_id else f"no repo {refused} on the Hub"
        return f"{what} ({status}): check the name; if it is private, {LOG_IN}"
    if isinstance(error, EntryNotFoundError):
        file = re.search(r"/resolve/[^/]+/(.+)", error.response.url.path)
        name = f"the file {unquote(file[1])}" if file else "a file that it should have"
        return f"{refused} on the Hub lacks {name} ({status}): name one that is whole, or add what it lacks"
    if status == 401:
        return f"the Hub does not accept the token for {refused} (401): {LOG_IN}"
    if status == 403:
        return f"this token may not read {refused} (403): {LOG_IN}"
    return _refused(error, refused, RUN_AGAIN)


def _refused(error: HfHubHTTPError, repo_id: str, retry: str) -> str:
    """Causes that pushing and reading have in common."""
    status = error.response.status_code
    if status == 429 or status >= 500:
        return f"the Hub is not available ({status}): wait a while, then {retry}"
    reason = " ".join((error.server_message or "no reason given").split())
    return f"the Hub refused the request for {repo_id} ({status}): {reason}"


def _broken(error: BaseException, retry: str) -> str:
    return f"the connection to the Hub broke ({type(error).__name__}): {retry}"


def _offline() -> str:
    variable = "HF_HUB_OFFLINE" if is_offline_mode() else "HF_DATASETS_OFFLINE"
    return f"{variable} is set, and this is neither a folder nor whole in the cache: check the name, or unset it"
