"""Where a checkpoint lies: the names of its files. Light, for who must not load torch to ask."""

from pathlib import Path

REMOTE = "open_clip:"
CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"


def files(checkpoint: str) -> tuple[str, ...]:
    """The local files of a checkpoint as `train.model.load` names it, as far as they exist."""
    name = checkpoint.removeprefix(REMOTE).removeprefix("local-dir:")
    paths = [Path(name) / file for file in (CONFIG, WEIGHTS)]
    if checkpoint.startswith(REMOTE):
        paths.append(Path(name.partition("/")[2]))  # open_clip:MODEL/FILE
    return tuple(str(path) for path in paths if path.is_file())
