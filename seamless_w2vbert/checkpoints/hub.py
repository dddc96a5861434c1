"""The published checkpoint -> a file in Hugging Face's usual cache.

Comes in: nothing. Goes out: the path of ``conformer_shaw.pt``, downloaded once, with
Hugging Face's progress bar and its rules for cache and offline mode.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from seamless_w2vbert.errors import CheckpointError

REPO_ID = "facebook/w2v-bert-2.0"
FILE_NAME = "conformer_shaw.pt"


def download() -> Path:
    """Return the published fairseq checkpoint of W2v-BERT 2.0 (2.3 GB).

    :raises CheckpointError: if it is not in the cache and cannot be fetched.
    """
    try:
        return Path(hf_hub_download(REPO_ID, FILE_NAME))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as ex:
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set"
        elif isinstance(ex, HfHubHTTPError) and ex.response is not None:
            reason = f"Hugging Face answered {ex.response.status_code}"
        else:
            reason = "Hugging Face cannot be reached"

        raise CheckpointError(
            f"{FILE_NAME} of {REPO_ID} is not in the cache "
            f"({constants.HF_HUB_CACHE}), and {reason}. On a machine with network, "
            f"`hf download {REPO_ID} {FILE_NAME}` fetches it; copy the cache over, or "
            "pass the file's path as the model."
        ) from None
