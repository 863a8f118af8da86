"""The TFDS builder of the standard library's text, written as array_record and read without TensorFlow."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from default_moe.data.corpus import Split
from default_moe.data.tfds_text import open_prepared, quiet_tfds, read_text

Documents = dict[Split, list[tuple[str, str]]]


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """Sources of the Python standard library, one document per file, given by name and text in each split."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, documents: Documents | None = None, **kwargs: object) -> None:
        self._documents: Documents = documents or {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(named) for split, named in self._documents.items() if named}

    def _generate_examples(self, named: list[tuple[str, str]]) -> Iterator[tuple[str, dict[str, str]]]:
        for name, text in named:
            yield name, {"name": name, "text": text}


def write(documents: Documents, directory: Path) -> Path:
    """Prepares the data set under `directory` and returns the folder that holds it. Raises OSError."""
    try:
        with quiet_tfds():
            builder = PythonStdlib(documents=documents, data_dir=str(directory), file_format="array_record")
            builder.download_and_prepare()
    except Exception as error:  # array_record raises RuntimeErrors that hold the system's words
        reasons = (os.strerror(code) for code in errno.errorcode)
        raise OSError(next((reason for reason in reasons if reason in str(error)), str(error))) from error
    return Path(builder.data_dir)


def read(directory: Path, split: Split) -> Iterator[str]:
    """The documents of a prepared split. Raises ConfigError if the files are damaged."""
    builder = open_prepared(directory)
    if split in builder.info.splits:
        for text in read_text(builder, split, "text"):
            yield text.decode()
