"""Tasks: what a model can do, beside how well it predicts text; run by lm_eval (the extra ``eval``), offline."""
