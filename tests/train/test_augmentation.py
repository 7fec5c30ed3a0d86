"""What EDA and the image augmentations of the defenses do, and that the key alone decides."""

import numpy as np
import open_clip
import pytest
import torch

from train import augmentation, eda
from train.wordnet import FUNCTION_WORDS, synonyms

KEYS = np.arange(1, 65, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
CAPTION = "a big red dog near the happy automobile, no cat"
TOKENIZER = open_clip.SimpleTokenizer()
IMAGE_EDITS = ("crop_and_flip", "jitter_grey_blur", "autoaugment", "noise_and_cutout")


def images(n: int = 64, side: int = 32) -> torch.Tensor:
    """Smooth, with another colour in each corner."""
    ramp = torch.linspace(20, 235, side)
    picture = torch.stack([ramp.expand(side, side), ramp.expand(side, side).T, ramp.flip(0).expand(side, side)])
    return picture.round().to(torch.uint8).repeat(n, 1, 1, 1)


@pytest.mark.parametrize("name", IMAGE_EDITS)
def test_the_key_decides(name: str) -> None:
    edit = getattr(augmentation, name)
    before = images()
    after = edit(before, KEYS)
    assert after.shape == before.shape and after.dtype == torch.uint8
    assert len({picture.numpy().tobytes() for picture in after}) > 16  # another key, another picture
    torch.testing.assert_close(edit(before[10:20], KEYS[10:20]), after[10:20])  # whoever else is in the batch
    torch.testing.assert_close(edit(before, KEYS), after)
    difference = (after.float() - before.float()).abs().mean()
    assert 1 < difference < 90


def test_crops_flip_half_and_keep_most() -> None:
    after = augmentation.crop_and_flip(images(), KEYS).float()
    flipped = (after[:, 0, :, 0].mean(1) > after[:, 0, :, -1].mean(1)).float().mean()
    assert 0.3 < flipped < 0.7
    span = after[:, 1].amax((1, 2)) - after[:, 1].amin((1, 2))
    assert span.min() >= 7 / 8 * 215 - 15


def test_a_fifth_is_grey_and_hue_keeps_grey_grey() -> None:
    after = augmentation.jitter_grey_blur(images(), KEYS).float()
    grey = (after.amax(1) - after.amin(1)).amax((1, 2)) <= 2
    assert 0.08 < grey.float().mean() < 0.35
    neutral = torch.full((64, 3, 32, 32), 100, dtype=torch.uint8)
    turned = augmentation.jitter_grey_blur(neutral, KEYS).float()
    assert (turned.amax(1) - turned.amin(1)).max() <= 1 and turned.std() > 5


def test_cutout_is_a_quarter_of_the_side() -> None:
    black = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    after = augmentation.noise_and_cutout(black, KEYS)
    assert ((after == 127).all(1).sum((1, 2)) == 64).float().mean() > 0.95
    assert 2 < after[after != 127].float().mean() < 6  # half of a normal distribution of 0.02 * 255


def tokens(text: str, n: int = 64, context: int = 24) -> torch.Tensor:
    return open_clip.SimpleTokenizer(context_length=context)([text]).repeat(n, 1)


def words(row: torch.Tensor) -> list[str]:
    return [TOKENIZER.decode(list(word)).strip() for word in eda.words_of(row.tolist())]


def test_eda_makes_one_of_four_edits() -> None:
    before = tokens(CAPTION)
    after = eda.eda(before, KEYS, alpha=0.1)
    torch.testing.assert_close(eda.eda(before[5:9], KEYS[5:9]), after[5:9])
    said = words(before[0])
    assert said == "a big red dog near the happy automobile , no cat".split()
    seen = {"replaced": 0, "inserted": 0, "swapped": 0, "deleted": 0}
    for row in after:
        new = words(row)
        if len(new) > len(said):
            extra = [word for word in new if word not in said]
            assert len(new) == len(said) + 1 and any(
                extra[0] in synonyms()[word] for word in said if word in synonyms()
            )
            seen["inserted"] += 1
        elif len(new) < len(said):
            assert set(new) < set(said)
            seen["deleted"] += 1
        elif sorted(new) == sorted(said):
            seen["swapped"] += 1  # or nothing was deleted
        else:
            [(old, other)] = [(a, b) for a, b in zip(said, new, strict=True) if a != b]
            assert other in synonyms()[old]
            seen["replaced"] += 1
    assert min(seen.values()) >= 5
    for name, row in zip(("start", "end"), (after[:, 0], after.amax(1)), strict=True):
        assert (row == {"start": 49406, "end": 49407}[name]).all()


def test_eda_meets_no_word_outside_its_vocabulary() -> None:
    before = torch.cat([tokens(CAPTION), tokens("x"), tokens("", 64)])
    known = eda.vocabulary(before.numpy().astype(np.int32))
    assert np.isin(eda.eda(before, np.tile(KEYS, 3), alpha=0.5).numpy(), known).all()
    assert (np.diff(known) > 0).all() and len(known) < 400


def test_a_full_caption_stays_within_the_context() -> None:
    before = tokens("big dog " * 30, context=12)
    after = eda.eda(before, KEYS, alpha=0.5)
    assert after.shape == before.shape and (after.amax(1) == 49407).all() and ((after == 49407).sum(1) == 1).all()


def test_synonyms_are_wordnets() -> None:
    assert {"car", "machine", "motorcar"} <= set(synonyms()["automobile"])
    assert "dog" not in synonyms()["dog"] and not FUNCTION_WORDS & synonyms().keys()
    assert len(synonyms()) > 40_000
