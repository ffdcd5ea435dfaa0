"""`cai push DIR REPO`: uploads an exported dataset or a finished model, with its card, to the Hugging Face Hub."""

from pathlib import Path
from typing import Any

from cai_cli.cards.export import is_dataset
from cai_cli.common.errors import CaiError
from cai_cli.models.fetch import check_model_dir, first_line


def push(directory: Path, repo: str, *, public: bool, api: Any) -> str:
    """Upload a directory and return the URL of the commit.

    Args:
        directory: An exported dataset or a finished model.
        repo: OWNER/NAME on the Hub.
        public: Whether a new repository is public.
        api: An HfApi.

    Raises:
        CaiError: The directory cannot be published, or the upload fails.
    """
    kind = kind_of(directory)
    try:
        # An existing repository keeps its visibility.
        name = api.create_repo(repo, repo_type=kind, private=not public, exist_ok=True).repo_id
        if not public and not api.repo_info(name, repo_type=kind).private:
            raise CaiError(
                f"{name} is public already", hint="add --public if everybody may read it", code="option-conflict"
            )
        commit = api.upload_folder(
            repo_id=name, folder_path=directory, repo_type=kind, commit_message=f"cai push of a {kind}"
        )
    except CaiError:
        raise
    except Exception as error:  # the Hub's client lets through the errors of its HTTP library
        hint = "log in with `hf auth login` or set HF_TOKEN; REPO is OWNER/NAME"
        raise CaiError(f"cannot push to {repo}: {first_line(error)}", hint, code="request-failed") from error
    return str(commit.commit_url)


def kind_of(directory: Path) -> str:
    """ "dataset" or "model". Raises CaiError when it is neither, or has no card."""
    if is_dataset(directory):
        return "dataset"
    if not (directory / "config.json").is_file():
        raise CaiError(
            f"{directory} is neither an exported dataset nor a model",
            hint="`cai export FILE -o DIR` writes a dataset; sft, train-pm, rl and dpo write models",
            code="not-made-by-cai",
        )
    check_model_dir(directory)
    if not (directory / "README.md").is_file():
        raise CaiError(
            f"{directory} has no card (README.md)", hint="add a README.md that describes it", code="invalid-model"
        )
    return "model"
