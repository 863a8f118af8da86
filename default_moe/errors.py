"""What a program reports in one line, not with a traceback: what is wrong, and what would be right."""


class ConfigError(ValueError):
    """A setting, a flag or an installation that cannot work."""


class CheckpointError(RuntimeError):
    """No checkpoint can be restored."""


class TrainingFailed(RuntimeError):
    """Training cannot go on. The last checkpoint is intact."""
