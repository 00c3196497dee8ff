"""From a folder to a repository of the Hub: a model (safetensors alone) or a slot dataset, in one commit.

What is uploaded is a short list of known files; everything else in the folder stays. A folder that holds weights as a
pickle is refused, and a model is loaded before anything is sent, so that what is published loads.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..data.slots import METADATA_FILE, check_local_files
from ..models.checks import checked_model
from ..models.cjepa.modeling_cjepa import is_broken_connection
from ..slot_probe import SlotProbe
from .cards import card

__all__ = ["publish"]

_MODEL_FILES = (
    "config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "slot_probe.safetensors", "preprocessor_config.json", "processor_config.json", "source.json", "training_args.json", "training_results.json",
    "README.md", "LICENSE",
)  # fmt: skip
_DATASET_FILES = (
    METADATA_FILE,
    "data/*.parquet",
    "preview/*.gif",
    "preview/*.png",
    "source.json",
    "README.md",
    "LICENSE",
)
# files of an earlier upload that would be read beside the new ones, or instead of them
_STALE = {
    "model": ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.py"),
    "dataset": ("data/*.parquet",),
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
# the predictor's code, and the classes that AutoConfig and AutoModel find in it
_CODE = {"configuration_cjepa.py": "CJepaConfig", "modeling_cjepa.py": "CJepaModel"}


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    with_code: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
) -> dict:
    """Uploads a model or a slot dataset. One commit: a failed upload changes nothing in the repository.

    Args:
        folder: a folder of `save_pretrained`, of `cjepa-hf convert`, of a training, or a finished slot dataset. Without a
            README.md its card is written by [`card`] (and uploaded; the folder itself is never changed).
        repo_id: `owner/name`; made if it does not exist. Weights, shards and code of an earlier upload that are not in
            this one are deleted by the same commit.
        revision: branch to commit to, made if it does not exist (from the default branch).
        private: whether a repository that is made is private (`None`: the owner's default).
        create_pr: propose the commit as a pull request instead.
        with_code: upload the predictor alone (no slot encoder) with its code, which `AutoModel.from_pretrained(...,
            trust_remote_code=True)` runs where this package is not installed.
        dry_run: check the folder and list what would go; nothing is sent, no token is needed.
        token: of the Hub (default: the one of `hf auth login` or `HF_TOKEN`).
        commit_message: default: "Publish <kind>".

    Returns:
        `{"repo_id", "repo_type", "revision", "files": {name: bytes}, "left_out": [names], "url"}`; `url` is that of the
        commit or the pull request, None after a dry run.

    Raises:
        ValueError: the folder is no model or slot dataset, is damaged, or holds pickles; repo_id is none.
        PermissionError: the token is missing or wrong, or may not write there.
        ConnectionError: the upload failed; the repository holds what it held before.
    """
    folder = Path(folder)
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"repo_id {repo_id!r} has no owner: give owner/name, such as your-name/{repo_id}")
    with _operations(folder, repo_id, with_code) as (repo_type, contents, left_out):
        additions = [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
        sizes = {addition.path_in_repo: addition.upload_info.size for addition in additions}
        report = {"repo_id": repo_id, "repo_type": repo_type, "revision": revision, "files": sizes}
        report |= {"left_out": left_out, "url": None}
        if not dry_run:
            with _explained(repo_id):
                api = HfApi(token=token)
                where = {"repo_id": repo_id, "repo_type": repo_type}
                api.create_repo(**where, private=private, exist_ok=True)
                if revision is not None:
                    api.create_branch(**where, branch=revision, exist_ok=True)
                present = set(api.list_repo_files(**where, revision=revision)) - set(contents)
                stale = sorted(name for name in present if _matches(name, _STALE[repo_type]))
                commit = api.create_commit(
                    **where,
                    operations=[*additions, *map(CommitOperationDelete, stale)],
                    commit_message=commit_message or f"Publish {repo_type}",
                    revision=revision,
                    create_pr=create_pr,
                )
                report["url"] = commit.pr_url or commit.commit_url
    return report


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Errors of the Hub as the errors of [`publish`]."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PermissionError("no token of the Hub: run `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        reason = (error.server_message or str(error).splitlines()[0]).strip()
        if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
            raise PermissionError(
                f"the Hub refuses to write to {repo_id} with this token ({status}: {reason}). Log in with a token that may "
                "write there (`hf auth login`, or HF_TOKEN), or publish under a name of your own"
            ) from error
        raise ConnectionError(
            f"the upload to {repo_id} failed ({status}: {reason}); nothing in the repository has changed. The same command "
            "tries again"
        ) from error
    except OSError:
        raise
    except Exception as error:
        if not is_broken_connection(error):
            raise
        raise ConnectionError(
            f"the upload to {repo_id} broke off ({type(error).__name__}: {error}); nothing in the repository has changed. "
            "The same command tries again"
        ) from error


@contextmanager
def _operations(folder: Path, repo_id: str, with_code: bool) -> Iterator[tuple[str, dict, list[str]]]:
    """Kind of repository, {name in it: file or content}, and the files of the folder that stay."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give one with a model or a slot dataset")
    if (folder / METADATA_FILE).is_file():
        if with_code:
            raise ValueError(f"{folder} is a slot dataset, which has no code: leave with_code out")
        check_local_files(folder)
        yield "dataset", *_contents(folder, _DATASET_FILES, repo_id)
        return
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is neither a model (config.json) nor a finished slot dataset ({METADATA_FILE}): give a folder of "
            "save_pretrained, `cjepa-hf convert` or `cjepa-hf extract`"
        )
    _refuse_pickles(folder)
    model = checked_model(folder)
    _check_probe(folder, model)
    if not with_code:
        if "auto_map" in json.loads((folder / "config.json").read_text()):
            raise ValueError(f"{folder}/config.json has an auto_map, for code: pass with_code (--with-code)")
        yield "model", *_contents(folder, _MODEL_FILES, repo_id)
        return
    with tempfile.TemporaryDirectory() as temporary:
        _export_with_code(model, folder, Path(temporary))
        contents, _ = _contents(Path(temporary), (*_MODEL_FILES, *_CODE), repo_id)
        names = {path.name for path in folder.iterdir()}
        yield "model", contents, sorted(names - set(contents))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern fits; its * stands for part of a file's name, never for folders."""
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _contents(folder: Path, patterns: tuple[str, ...], repo_id: str) -> tuple[dict, list[str]]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    contents: dict = {name: path for name, path in files.items() if _matches(name, patterns)}
    left_out = sorted(set(files) - set(contents))
    own = contents.get("README.md")
    if own and "source.json" in contents and own.read_text(encoding="utf-8") == card(folder):
        del contents["README.md"]  # written by `convert`, which does not know the name on the Hub
    if "README.md" not in contents:
        contents["README.md"] = card(folder, repo_id).encode()
    return contents, left_out


def _check_probe(folder: Path, model) -> None:
    """ValueError for a probe that would be of no use beside the model."""
    try:
        probe = SlotProbe.from_pretrained(folder)
    except FileNotFoundError:  # most have none
        return
    if len(probe.weight) - 1 != model.config.slot_size:
        raise ValueError(
            f"{folder}/slot_probe.safetensors reads slots of size {len(probe.weight) - 1}, the model's have "
            f"{model.config.slot_size}: fit one on slots of the model's encoder (`cjepa-hf probe`), or move it out of the folder"
        )
    if not all(part.isfinite().all() for part in (probe.weight, probe.kind_weight)):
        raise ValueError(
            f"{folder}/slot_probe.safetensors holds NaN or infinite values: fit it again (`cjepa-hf probe`)"
        )


def _refuse_pickles(folder: Path) -> None:
    """Known endings, and a zip or a pickle under any other name, at the top of the folder."""
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            start = file.read(2)
        if path.suffix in _PICKLES or start == b"PK" or (start[:1] == b"\x80" and start[1:] <= b"\x05"):
            raise ValueError(
                f"{path} is a pickle, or a container of one, which runs code where it is loaded: only safetensors are "
                "published. Convert it (`cjepa-hf convert`), or move it out of the folder"
            )


def _export_with_code(model, folder: Path, target: Path) -> None:
    """The predictor alone as a folder that loads without this package."""
    from .. import models

    if model.config.model_type != "cjepa":
        raise ValueError(
            f"with_code exports C-JEPA's predictor alone, {folder} holds a model of the kind {model.config.model_type!r}: "
            "leave it out; that model needs the package where it is loaded"
        )
    config = type(model.config).from_dict(model.config.to_dict() | {"slot_encoder_config": None})
    predictor = type(model)(config)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("slot_encoder.")}
    predictor.load_state_dict(state)
    predictor.to(model.dtype).save_pretrained(target)
    for name in _CODE:
        shutil.copyfile(Path(models.__path__[0]) / "cjepa" / name, target / name)
    values = json.loads((target / "config.json").read_text())
    classes = [f"{Path(name).stem}.{cls}" for name, cls in _CODE.items()]
    values["auto_map"] = dict(zip(("AutoConfig", "AutoModel"), classes))
    (target / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    for name in ("slot_probe.safetensors", "source.json", "LICENSE"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
