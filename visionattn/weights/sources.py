"""Where the weights of a variant lie, whether a program can fetch them, and where they are kept.

timm's `PretrainedCfg` has fields for an address and for a repository of the Hugging Face hub. What it cannot say, that
only a person can fetch a file or that nobody can any more, stands in the entry's notes, written by `registry.cfg`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlparse

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.utils import EntryNotFoundError
from timm.models import PretrainedCfg
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME, download_cached_file

STATES = ("direct", "manual", "dead", "none")


@dataclass(frozen=True)
class Source:
    """Where the weights of one entry lie.

    Attributes:
        state: "direct": a program can fetch them; "manual": a person must; "dead": the address no longer answers, as
            far as is known; "none": no weights are published.
        address: Address of the file, or of the page on which a person finds it; "" for none.
        cache: File name in the cache, which no other entry has; for the hub, the repository and file. "" unless direct.
        verified: Date (YYYY-MM-DD) on which somebody fetched the file and it gave the published answer; None for never.
    """

    state: str
    address: str
    cache: str
    verified: str | None


def source_of(entry: PretrainedCfg) -> Source:
    """The source of an entry that `registry.cfg` made."""
    notes = dict(note.split(": ", 1) for note in entry.notes or ())
    verified = notes.get("verified")
    if entry.hf_hub_id:
        file = entry.hf_hub_filename or HF_SAFE_WEIGHTS_NAME
        address = f"https://huggingface.co/{entry.hf_hub_id}"
        return Source("direct", address, f"{entry.hf_hub_id}/{file}", verified)
    if entry.url:
        return Source("direct", entry.url, _cache_name(entry), verified)
    state, _, address = notes.get("weights", "none ").partition(" ")
    return Source(state, address, "", verified)


def _cache_name(entry: PretrainedCfg) -> str:
    """Variant and tag, which timm keeps unique, and what of the address tells the format and the hash."""
    ending = re.search(r"(-[0-9a-f]{8,})?(\.pth\.tar|\.pth|\.safetensors|\.bin)$", urlparse(entry.url).path)
    return f"{entry.architecture}.{entry.tag}{ending[0] if ending else '.pth'}"


def fetch(entry: PretrainedCfg, cache_dir: str | Path | None = None) -> Path:
    """The entry's file of weights on this machine, downloaded unless it is there already.

    Args:
        entry: With `architecture` and `tag`, as `timm.get_pretrained_cfg` returns it. A local `file` comes first.
        cache_dir: Where downloads are kept; None for timm's place.

    Raises:
        ValueError: There are no weights, or only a person can fetch them; the message tells from where, and what to do
            with the file.
    """
    if entry.file:
        return Path(entry.file)
    source, name = source_of(entry), f"{entry.architecture}.{entry.tag}"
    if source.state != "direct":
        raise ValueError(_explain(name, source))
    if entry.hf_hub_id:
        return _fetch_from_hub(entry, cache_dir)
    # The address of a file of OpenMMLab ends in the beginning of its hash.
    hashed = re.search(r"-[0-9a-f]{8,}\.", source.cache) is not None
    return Path(download_cached_file((source.address, source.cache), check_hash=hashed, cache_dir=cache_dir))


def _fetch_from_hub(entry: PretrainedCfg, cache_dir: str | Path | None) -> Path:
    """Download from the hub, safetensors rather than pickles where the entry does not say which file.

    A file's name with `*` is a pattern, for repositories whose names are not known: the one that it fits is meant.
    """
    repository, _, revision = entry.hf_hub_id.partition("@")
    names = [entry.hf_hub_filename] if entry.hf_hub_filename else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    if "*" in names[0]:
        present = HfApi().list_repo_files(repository, revision=revision or None)
        names = [name for name in present if fnmatch(name.lower(), names[0])]
        if len(names) != 1:
            raise ValueError(
                f"https://huggingface.co/{repository} must have one file like {entry.hf_hub_filename!r}, got {names} "
                f"of {present}; {_by_hand(entry.architecture)}"
            )
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None, cache_dir=cache_dir))
        except EntryNotFoundError:
            continue
    raise ValueError(f"https://huggingface.co/{repository} has none of the files {names}")


def _explain(name: str, source: Source) -> str:
    """Why there is nothing to download, and what to do with a file fetched by hand."""
    if source.state == "none":
        return f"no weights of {name} are published; wanted pretrained=False, or a file in pretrained_cfg_overlay"
    why = {
        "manual": f"a person must fetch the weights of {name} from {source.address}",
        "dead": f"the weights of {name} were published at {source.address}, which no longer answers as far as is known",
    }[source.state]
    return f"{why}; {_by_hand(name.partition('.')[0])}"


def _by_hand(variant: str) -> str:
    return (
        f"a file that you have loads with timm.create_model({variant!r}, pretrained=True, "
        f"pretrained_cfg_overlay={{'file': FILE}})"
    )
