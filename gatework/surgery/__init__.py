"""The parts put into an existing pretrained model."""
