"""`cai push DIR REPO`: an exported dataset or a finished model, with its card, to the Hugging Face Hub."""

from pathlib import Path
from typing import Any

from cai_cli.cards.export import is_dataset
from cai_cli.common.errors import CaiError
from cai_cli.models.fetch import check_model_dir, first_line


def push(directory: Path, repo: str, *, public: bool, api: Any) -> str:
    """Upload a directory; returns the address of the commit. `api`: an HfApi. Raises CaiError."""
    kind = kind_of(directory)
    try:
        # An existing repository keeps its visibility, whatever is asked for.
        name = api.create_repo(repo, repo_type=kind, private=not public, exist_ok=True).repo_id
        if not public and not api.repo_info(name, repo_type=kind).private:
            raise CaiError(f"{name} is public already", hint="--public says that everybody may read it")
        commit = api.upload_folder(
            repo_id=name, folder_path=directory, repo_type=kind, commit_message=f"cai push of a {kind}"
        )
    except CaiError:
        raise
    except Exception as error:  # the Hub's client lets through whatever its HTTP library raises
        hint = "`hf auth login` or HF_TOKEN says who you are; REPO is OWNER/NAME"
        raise CaiError(f"cannot push to {repo}: {first_line(error)}", hint) from error
    return str(commit.commit_url)


def kind_of(directory: Path) -> str:
    """ "dataset" or "model". Raises CaiError when it is neither, or has no card."""
    if is_dataset(directory):
        return "dataset"
    if not (directory / "config.json").is_file():
        raise CaiError(
            f"{directory} is neither an exported dataset nor a model",
            hint="`cai export FILE -o DIR` makes a dataset; sft, train-pm and rl make models",
        )
    check_model_dir(directory)
    if not (directory / "README.md").is_file():
        raise CaiError(f"{directory} has no card (README.md)", hint="write one: a model without it helps nobody")
    return "model"
