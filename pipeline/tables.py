"""The columns that others write: aliases for image, caption, uid, key and label in LAION, DataComp, img2dataset, COYO.

Names are matched in this order; the first that exists is used. Types are checked where the column is read.
"""

IMAGE = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes")
CAPTION = ("txt", "caption", "text", "TEXT", "top_caption")
UID = ("uid",)
KEY = ("key", "__key__", "SAMPLE_ID", "id", "image_path")
LABEL = ("label", "class", "cls")


def column(names: list[str], aliases: tuple[str, ...]) -> str | None:
    """The first alias that is among `names`."""
    return next((a for a in aliases if a in names), None)
