"""Training a draft: objectives, the base LightningModule, optimizers and schedules, callbacks, the command line."""
