"""The embedded compositional benchmark: renderers with ground truth, and exact scorers.

Tracks: ``s12`` (plain shapes), ``g60`` (emoji sprites with GenEval's prompts), ``txt`` (words), ``emo`` (emoji names).
Each has ``scenes(split, num, seed)``, ``prompts(split)`` and ``scene(row, rng)``, and a scorer in two parts,
``look(picture, tag)`` and ``judge(seen, row)``. ``scoring`` judges many pictures; ``baselines`` makes pictures that a
score is compared with.
docs/tasks/t2i_benchmark.md says how to read the scores.
"""
