"""A model by its name: a folder, or an id of the Hugging Face hub, fetched once into its cache.

huggingface_hub does the fetching, and HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what
they mean to it. What is ours: which files, how long to wait, and one line for whatever fails.
"""

import contextlib
import difflib
import os
import re
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

from .errors import InputError
from .storage import INDEX, PICKLE, SAFE, read_index, weights_name

CONFIG = "config.json"
TOKENIZER = ("tokenizer.json", "vocab.txt", "vocab.json")  # one of them is enough
BESIDE = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
ID = re.compile(r"([\w.-]+/)?[\w.-]+", re.ASCII)


def locate(name: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a model, fetched from the hub if `name` is no folder here.

    Args:
        name: of a folder; or NAME or ORGANIZATION/NAME on the hub. A Path is always a folder's.
        revision: branch, tag or commit on the hub; default, its main branch.
        token: for models that are not public; default, as `hf auth login` or HF_TOKEN say.

    Raises:
        InputError: it is neither a folder nor an id, or the hub cannot give it.
    """
    path, revision, token = os.path.expanduser(name), revision or None, (token or "").strip()
    if os.path.isdir(path):
        if revision:
            raise InputError(f"{name}: a folder has no revision {revision!r}: leave it out")
        return Path(path)
    if os.path.isfile(path):
        raise InputError(
            f"{name}: expected a model folder or a hub id, got a file: give its folder"
        )
    if isinstance(name, Path) or not ID.fullmatch(name) or name.startswith((".", "~")):
        raise InputError(_neither(name, path))
    if not re.fullmatch(r"[!-~]*", token):
        raise InputError("token: expected letters and digits, got others: copy it again")
    with _quiet():
        return _fetch(name, revision, token or None)


def _near(path):
    """The folder here that was perhaps meant, or nothing."""
    parent, name = os.path.split(path.rstrip("/"))
    with contextlib.suppress(OSError, ValueError):
        names = [entry.name for entry in os.scandir(parent or ".") if entry.is_dir()]
        if close := difflib.get_close_matches(name, names, n=1):
            return f"did you mean {os.path.join(parent, close[0])}?"
    return ""


def _neither(name, path):
    near = _near(path) or "check the path"
    return f"{name}: expected a model folder or a hub id, found neither: {near}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """huggingface_hub without warnings on stderr, and without what it tells of this machine;
    looking the latter up costs a request of its own. All is as it was afterwards."""
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    level, silent = logging.get_verbosity(), constants.HF_HUB_DISABLE_TELEMETRY
    with warnings.catch_warnings(action="ignore"):
        logging.set_verbosity_error()
        constants.HF_HUB_DISABLE_TELEMETRY = True
        try:
            yield
        finally:
            logging.set_verbosity(level)
            constants.HF_HUB_DISABLE_TELEMETRY = silent


def _fetch(name: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """None disables it where stderr is no terminal."""

        def __init__(self, *args, **settings):
            super().__init__(*args, **{"disable": None} | settings)

    wait = constants.HF_HUB_ETAG_TIMEOUT  # in seconds; 10 if nobody says otherwise
    try:
        info = HfApi().model_info(name, revision=revision, timeout=wait, token=token)
        files = [file.rfilename for file in info.siblings or ()]
    except Exception as error:  # requests or httpx is beneath: their errors have no common base
        if _is_away(error) and (folder := _cached(name, revision)):
            return folder
        raise InputError(_line(name, revision, error)) from None
    wanted = wanted_files(files, name)
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            token=token,
            etag_timeout=wait,
            allow_patterns=wanted,
            tqdm_class=Bar,
        )
    except Exception as error:
        if not _is_away(error):  # a gated model lets everyone see what it has
            raise InputError(_line(name, revision, error)) from None
        raise InputError(
            f"{name}: the download broke off ({_reason(error)}): give the command again, which "
            "keeps what is whole"
        ) from None
    return Path(folder)


def wanted_files(names: Collection[str], where: object) -> list[str]:
    """Those of a repository's files that minift reads: one kind of weights, and what they need; or
    an adapter, whose base is elsewhere.

    Raises:
        InputError: there is no configuration or no weights.
    """
    if set(ADAPTER) <= set(names) and not {SAFE, SAFE + INDEX, PICKLE} & set(names):
        return sorted({CONFIG, *ADAPTER, *TOKENIZER, *BESIDE} & set(names))
    if CONFIG not in names:
        raise InputError(f"{where}: expected a model with {CONFIG}, found none: is it a model?")
    weights = weights_name(names, where)
    start, end = os.path.splitext(weights.removesuffix(INDEX))
    shards = [n for n in names if n.startswith(start + "-") and n.endswith(end) and "/" not in n]
    wanted = {CONFIG, *TOKENIZER, *BESIDE, weights, *(shards if weights.endswith(INDEX) else ())}
    return sorted(wanted & set(names))


def _cached(name: str, revision: str | None) -> Path | None:
    """The model as it was fetched before, by whatever program, if all kinds of files are there."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name, revision=revision, local_files_only=True, allow_patterns=[CONFIG, *ADAPTER]
        )
        names = wanted_files(os.listdir(found), found)
        for index in [name for name in names if name.endswith(INDEX)]:
            read_index(Path(found) / index)
    except (OSError, InputError):
        return None
    return Path(found) if {*TOKENIZER, *ADAPTER} & set(names) else None


def _causes(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _answer(error):
    """What the hub answered, where that is the cause."""
    found = (getattr(cause, "response", None) for cause in _causes(error))
    return next((answer for answer in found if answer is not None), None)


def _is_away(error):
    """The hub did not answer, or only that it is busy or broken; a refusal is an answer."""
    from huggingface_hub.errors import HFValidationError

    answer = _answer(error)
    refused = answer is not None and 400 <= answer.status_code < 429
    return not refused and not isinstance(error, HFValidationError)


def _line(name: str, revision: str | None, error: Exception) -> str:
    """What went wrong in asking for a model. Never the words of the error: they may hold the
    token."""
    from huggingface_hub import constants, errors

    hub, kinds, answer = constants.ENDPOINT, [type(e) for e in _causes(error)], _answer(error)
    status = 0 if answer is None else answer.status_code
    here = f"{name}: no folder here" + (f" ({near})" if (near := _near(name)) else "")
    cache = f"whole in the cache {constants.HF_HUB_CACHE}"
    if errors.HFValidationError in kinds:
        return _neither(name, name)
    if errors.OfflineModeIsEnabled in kinds:
        return (
            f"{here}, and no model {cache}: check the name, or fetch it once without HF_HUB_OFFLINE"
        )
    if errors.RevisionNotFoundError in kinds:
        return f"{name}: {hub} has no revision {revision!r} of it: give a branch, tag or commit"
    if errors.GatedRepoError in kinds or status == 403:
        return (
            f"{name}: {hub} gives it only to those it has let in: ask on {hub}/{name}, then "
            "give --token or run `hf auth login`"
        )
    if status == 401 and "authorization" in answer.request.headers:
        return f"{name}: {hub} refuses the token: give another --token or run `hf auth login`"
    if status in (401, 404):
        return (
            f"{here}, and {hub} has no such model, or it is private: check "
            "the name, or give --token or run `hf auth login`"
        )
    if status:
        return f"{name}: {hub} fails ({status}), and it is not {cache}: try again later"
    return (
        f"{here}, not {cache}, and {hub} cannot be reached "
        f"({_reason(error)}): give a folder; or fetch it where there is a network, copy the cache "
        "and set HF_HUB_OFFLINE=1"
    )


def _reason(error: Exception) -> str:
    """The system's word for the deepest cause that has one; else the answer, or the error's
    kind."""
    causes, answer = list(_causes(error)), _answer(error)
    for cause in reversed(causes):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror + (f": {cause.filename}" if cause.filename else "")
    if type(error) is OSError and error.args:  # a file of another size than was promised
        return str(error).splitlines()[0]
    if answer is not None:
        return f"it answers {answer.status_code}"
    late = any("Timeout" in type(cause).__name__ for cause in causes)
    return "no answer in time" if late else type(error).__name__
