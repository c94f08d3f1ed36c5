"""The TFDS builder of the embedded corpus. TFDS names the dataset after this folder and reads README.md beside it."""

from __future__ import annotations

from collections.abc import Iterator

import tensorflow_datasets as tfds

from tiedjax.data.embedded_corpus import standard_library

Examples = Iterator[tuple[str, dict[str, str]]]  # (key, features) of each


class Builder(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
    """Documentation topics and standard-library sources of the running Python: {name, text}, one split `train`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=standard_library.version_name())]

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"name": text, "text": text}))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Examples:
        for name, text in standard_library.documents():
            yield name, {"name": name, "text": text}
