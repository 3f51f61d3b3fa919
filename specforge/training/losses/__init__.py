"""Training losses: objectives, what they cost a pair of draft and target, distillation by rows."""
