"""Every error fewbits raises on bad input: one base class, and for each the builtin it also is.

An error says what was wrong, where (file, parameter), what was expected and what to do; the same facts are attributes.
"""

from __future__ import annotations

import os


class FewbitsError(Exception):
    """Base of all fewbits errors.

    Args:
        message: what was wrong, in one sentence.
        file: the file or folder it was found in.
        parameter: the dotted name of the parameter or module concerned.
        expected: what would have been right.
        hint: what the caller can do about it.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | os.PathLike[str] | None = None,
        parameter: str | None = None,
        expected: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.file = message, None if file is None else os.fspath(file)
        self.parameter, self.expected, self.hint = parameter, expected, hint

    def __str__(self) -> str:
        # made when it is read, so that a caller who knows more (which file it was reading) can add that on the way up
        facts = {"file": self.file, "parameter": self.parameter, "expected": self.expected, "what to do": self.hint}
        return "\n".join([self.message, *(f"  {key}: {value}" for key, value in facts.items() if value)])

    def locate(self, file: str | os.PathLike[str]) -> None:
        """Name ``file`` as where it was found, unless the error names one already."""
        self.file = self.file or os.fspath(file)


class ConfigError(FewbitsError, ValueError):
    """An argument or a configuration that cannot be meant."""


class CheckpointError(FewbitsError, ValueError):
    """A checkpoint that is damaged, incomplete, ambiguous, or does not belong to the model."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A checkpoint, or a file that it names, does not exist."""


class ShapeError(FewbitsError, RuntimeError):
    """A tensor that does not fit the weight it meets; torch raises a RuntimeError there."""


class SaveError(FewbitsError, OSError):
    """A checkpoint could not be written; what was there before is untouched."""


class UnsupportedError(FewbitsError, NotImplementedError):
    """Something fewbits does not do; the message names the tool that does."""


class MissingDependencyError(FewbitsError, ImportError):
    """An optional package is needed and not installed."""


class FewbitsWarning(UserWarning):
    """Something worth knowing that is not wrong: a prefix that was matched, a weight that had to be dequantized."""
