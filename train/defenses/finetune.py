"""Plain fine-tuning on trusted pairs at a low rate: what every repair has to beat.

Trade-off: no idea at all, and in three paradigms of Super-FT's authors enough; how much it removes is a question of the
rate, and so is what it costs.

Source: the FT arm of CleanCLIP (Bansal et al. 2023, section 5), at CleanCLIP's own setting: 10 epochs at a fiftieth of
the pretraining's rate, batches of 64. Changed: no warm-up (50 of 15,600 steps there).
"""

from dataclasses import dataclass

from train.defenses._trusted import Trusted


@dataclass(frozen=True)
class finetune(Trusted):
    """CLIP on trusted pairs at a low rate."""
