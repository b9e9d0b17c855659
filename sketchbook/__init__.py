"""The procedural world that the miniature learns: scenes, dialogues, words, the checker, the pretraining."""
