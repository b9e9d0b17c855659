"""The procedural world that the miniature learns: scenes, dialogues, words, the checker, the pretraining."""


def __getattr__(name: str):
    """`record`, by which --data finds this world: imported when it is asked for, so that one module needs no other."""
    if name != "record":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sketchbook.dialogues import dialogue

    return dialogue
