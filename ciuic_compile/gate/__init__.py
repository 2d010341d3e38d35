"""The gate: a training step's planned memory against what was accepted (docs/ci-gate.md).

``settings`` reads ``ciuic.toml``, ``plan_entry`` plans, ``record`` sums the plans up, ``baseline`` keeps what
was accepted, ``compare`` judges, ``culprits`` finds the lines, ``formats`` writes it down.
"""
