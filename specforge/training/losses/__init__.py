"""Training losses: objectives, comparison of draft and target, distillation by rows."""
