"""How the arguments that many verbs share look on the command line."""

from typing import Annotated

import tyro

Shards = Annotated[str, tyro.conf.arg(metavar="SHARDS")]
Out = Annotated[str, tyro.conf.arg(metavar="OUT")]
Checkpoint = Annotated[str, tyro.conf.arg(metavar="CKPT")]
