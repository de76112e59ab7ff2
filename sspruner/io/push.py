"""Put a folder on the Hugging Face hub: the checkpoint, its card, plan, report and recipe, in one commit."""

from __future__ import annotations

from pathlib import Path

from sspruner.errors import InputError, ModelError
from sspruner.io.source import brief

STALE = ["*.safetensors", "*.safetensors.index.json", "*.gguf"]  # of a model that was there before


def push_to_hub(folder: str | Path, repository: str, *, private: bool = False, message: str = "") -> str:
    """Upload the folder of a model to a repository of the hub, which is made if it is not there; return its address.

    repository: `owner/name`. private: only its owner sees a repository that is made here. Weights that the repository
    has and the folder lacks go, for they belong to another model; other files stay.

    Raises InputError for a folder without a model, and where the hub refuses, or is not reached.
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file() and not any(folder.glob("*.gguf")):
        raise InputError(f"push {folder}: holds no model; give a folder that prune, export or train wrote")

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message=message or "Upload a model pruned with sspruner",
            ignore_patterns=[".*", "**/.*"],
            delete_patterns=STALE,
        )
    except HFValidationError as error:
        raise InputError(f"push: {repository!r} is no name of a repository (owner/name)") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise InputError(f"push {repository}: the hub refuses it ({status}); log in: hf auth login") from error
        raise ModelError(f"push {repository}: {brief(error)}") from error
    except (OSError, RuntimeError) as error:
        raise ModelError(f"push {repository}: the hub is not reached ({brief(error)})") from error
    return str(made)
