"""What a program reports in one line, not with a traceback: what is wrong, and what would be right."""


class ConfigError(ValueError):
    """A setting, a flag or an installation that cannot work."""


class CheckpointError(RuntimeError):
    """No checkpoint can be restored."""


class TrainingFailed(RuntimeError):
    """Training cannot go on. The last checkpoint is intact."""


class Diverged(TrainingFailed):
    """Too many steps in a row whose loss or gradient was not finite."""


class AnotherProcessFailed(RuntimeError):
    """One of the processes that train as one has failed, so this one cannot go on. code: what all exit with."""

    def __init__(self, line: str, code: int):
        super().__init__(line)
        self.code = code
