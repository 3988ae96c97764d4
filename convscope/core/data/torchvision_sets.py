"""torchvision's classification data sets as a source of shards."""

import inspect
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convscope.core.data.sources import EncodedImage, Item, Listing, read_file
from convscope.core.errors import UserError
from convscope.core.files import cache_dir

USUAL_SPLITS = ("train", "val", "test")
LABEL_ATTRIBUTES = ("targets", "labels", "_labels")


class TorchvisionSource:
    """A torchvision class with (image, label) items and a `train` or `split` argument, downloaded where needed.

    Classes that accept a `loader` give their files byte for byte; those that hold arrays are encoded as PNG.
    """

    def __init__(self, name: str, *, split: str | None = None, root: Path | None = None) -> None:
        from torchvision import datasets

        self.name = name
        self.root = root or cache_dir() / "torchvision"
        self.factory: Any = getattr(datasets, name, None)
        if not (inspect.isclass(self.factory) and issubclass(self.factory, datasets.VisionDataset)):
            raise UserError(f"torchvision has no data set {name!r}; names are spelt as in its documentation: CIFAR10")
        self.arguments = inspect.signature(self.factory.__init__).parameters
        self.splits = dict(self._open_splits(split))

    def listing(self) -> Listing:  # noqa: D102
        labels = {split: self._labels(dataset) for split, dataset in self.splits.items()}
        count = 1 + max(max(values, default=0) for values in labels.values())
        classes = self._class_names(count)
        splits = {
            split: [Item(f"{split}/{i}", -1, classes[label] if label >= 0 else None) for i, label in enumerate(values)]
            for split, values in labels.items()
        }
        return Listing(splits, classes)

    def read(self, item: Item) -> EncodedImage:  # noqa: D102
        split, _, index = item.name.rpartition("/")
        try:
            image = self.splits[split][int(index)][0]
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot read image {index} of {self.name} {split}: {error}") from error
        if isinstance(image, EncodedImage):
            return image
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        return EncodedImage("png", encoded.getvalue())

    def _open_splits(self, split: str | None) -> Iterator[tuple[str, Any]]:
        if "train" in self.arguments:
            wanted = [split] if split else ["train", "test"]
            if split not in (None, "train", "test"):
                raise UserError(f"{self.name} has the splits train and test, not {split!r}")
            for name in wanted:
                yield name, self._open(train=name == "train")
        elif "split" in self.arguments:
            yield from self._open_named([split] if split else list(USUAL_SPLITS))
        else:
            yield "", self._open()

    def _open_named(self, names: list[str]) -> Iterator[tuple[str, Any]]:
        refused = None
        opened = 0
        for name in names:
            try:
                yield name, self._open(split=name)
                opened += 1
            except ValueError as error:  # torchvision's answer to a split that the set does not have
                refused = error
        if not opened:
            raise UserError(f"torchvision's {self.name}: {refused}; choose one with --split")

    def _open(self, **chosen: Any) -> Any:
        if "download" in self.arguments:
            chosen["download"] = True
        if "loader" in self.arguments:
            chosen["loader"] = lambda path: read_file(Path(path))
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            return self.factory(root=self.root, **chosen)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            hint = "--data-root names a folder that has it already"
            raise UserError(f"cannot get torchvision's {self.name} in {self.root}: {reason} ({hint})") from error
        except TypeError as error:
            raise UserError(f"torchvision's {self.name} needs more than a split to be opened: {error}") from error

    def _labels(self, dataset: Any) -> list[int]:
        """Labels without decoding images, where the data set keeps a list of them; -1 means none (STL10 unlabeled)."""
        found = next((getattr(dataset, name) for name in LABEL_ATTRIBUTES if hasattr(dataset, name)), None)
        if found is None or len(found) != len(dataset):
            found = [dataset[i][1] for i in range(len(dataset))]
        try:
            return [int(label) for label in found]
        except (TypeError, ValueError) as error:
            raise UserError(f"torchvision's {self.name} is no classification data set: {error}") from error

    def _class_names(self, count: int) -> list[str]:
        """Names in torchvision's label order, made unique by their index where two are alike."""
        dataset = next(iter(self.splits.values()))
        names = list(getattr(dataset, "classes", None) or [])
        words = [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
        if len(words) < count:
            return [str(i) for i in range(count)]
        return [word if words.count(word) == 1 else f"{word} {i}" for i, word in enumerate(words)]
