"""The sentence on top of the report: no control is called a filter, no invalid attack credits one."""

from pipeline.report.summary import verdict


def arm(name: str, asr: float | None, when: str | None = "epoch 4") -> dict:
    return {
        "attack": "patch(target='banana')",
        "dose": 354,
        "dose_ppm": 29_997.0,
        "arm": name,
        "when": when,
        "asr_text": asr,
        "targeted_success": None,
        "zeroshot_top1": 0.2,
    }


def test_the_best_filter_is_no_control():
    said = verdict([arm("undefended", 0.9, None), arm("random", 0.88), arm("oracle", 0.0), arm("slof", 0.7)])
    assert "best filter here, slof, leaves 70.0%; random removal leaves 88.0%" in said


def test_below_the_floor_nobody_is_credited():
    said = verdict([arm("undefended", 0.3, None), arm("slof", 0.0)])
    assert "not valid" in said
    assert "best filter" not in said


def test_who_was_not_asked_did_not_fail():
    said = verdict([arm("undefended", None, None), arm("slof", None)])
    assert "asked of no image" in said and "0.0%" not in said and "not valid" not in said
    half = verdict([arm("undefended", 0.9, None), arm("undefended", None, None), arm("slof", None), arm("strip", 0.5)])
    assert "90.0%" in half and "The best filter here, strip, leaves 50.0%" in half


def test_one_detector_at_two_budgets_is_two_filters():
    budgets = [
        arm("slof", asr) | {"policy": f"budget(detector='slof', drop={drop})"} for drop, asr in ((0.1, 0.8), (0.5, 0.2))
    ]
    assert "slof, 50% removed, leaves 20.0%" in verdict([arm("undefended", 0.9, None), *budgets])
