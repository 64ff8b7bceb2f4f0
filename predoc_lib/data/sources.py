"""What data sets there are: of embedded ones their bytes, of real ones the files, sizes, checksums and addresses."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import pooch


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One data set: embedded if ``content`` gives its bytes, else real, with ``files`` that ``download`` fetches."""

    what: str
    licence: str
    content: Callable[[], bytes] | None = None
    files: Mapping[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    """Path below ``root()`` -> (bytes, sha256)."""
    download: Callable[[Path], object] | None = None
    """Puts the files below the folder it is given, in any order: ``fetch`` moves them in when all are verified. None:
    they can only be put there by hand."""
    instead: str = ""
    """The embedded data set to use where this one is absent."""
    where: str = ""
    """The library that an embedded data set comes with."""
    yours: str = ""
    """How to get and use data that nobody can fetch for you: it is named by its path, not found below ``root()``."""
    size: str = ""
    """Of such data."""


def _digits() -> bytes:
    import sklearn.datasets  # half a second: only where the data itself is wanted

    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    return images.astype("uint8").tobytes() + labels.astype("uint8").tobytes()


def _photos() -> bytes:
    from predoc_lib.data.photos import content  # a module that imports this one

    return content()


def _driving() -> bytes:
    return Path(__file__).with_name("driving.py").read_bytes()  # it is drawn: what draws it is the data


def _motorcycle() -> bytes:
    from predoc_lib.data.flow_pairs import content  # a module that imports this one

    return content()


def _sprites() -> bytes:
    return Path(__file__).with_name("factors.py").read_bytes()  # likewise


def _download_mnist(folder: Path) -> None:
    import torchvision

    torchvision.datasets.MNIST(folder, download=True)


def _download_cifar10(folder: Path) -> None:
    import torchvision

    torchvision.datasets.CIFAR10(folder, download=True)


def _download(urls: Mapping[str, str]) -> Callable[[Path], None]:
    """What downloads these files: path -> address."""

    def download(folder: Path) -> None:
        for file, url in urls.items():
            path = folder / file
            pooch.retrieve(url, known_hash=None, fname=path.name, path=path.parent, progressbar=True)

    return download


def _detector(name: str, what: str, where: tuple[str, str], cfg: tuple[int, str], weights: tuple[int, str]) -> DataSet:
    """A network of Darknet's: what its two files are called, where each lies, bytes and sha256 of each."""
    files = {f"yolo/{name}.cfg": cfg, f"yolo/{name}.weights": weights}
    return DataSet(
        what,
        "public domain",
        files=files,
        download=_download({file: f"{at}/{Path(file).name}" for file, at in zip(files, where, strict=True)}),
        instead="yolo_detector/road",
    )


FASTEST = ("https://raw.githubusercontent.com/dog-qiuqiu/Yolo-Fastest/master/ModelZoo/yolo-fastest-1.1_coco",) * 2
REDMON = ("https://raw.githubusercontent.com/pjreddie/darknet/master/cfg", "https://data.pjreddie.com/files")
UDACITY = "https://raw.githubusercontent.com/udacity"

DATASETS: dict[str, DataSet] = {
    "digits": DataSet(
        "1,797 handwritten digits, 8 x 8 (scikit-learn's load_digits)", "CC BY 4.0", _digits, where="scikit-learn"
    ),
    "mnist": DataSet(
        "MNIST, 70,000 handwritten digits, 28 x 28",
        "CC BY-SA 3.0",
        files={
            "MNIST/raw/train-images-idx3-ubyte": (
                47_040_016,
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            ),
            "MNIST/raw/train-labels-idx1-ubyte": (
                60_008,
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            ),
            "MNIST/raw/t10k-images-idx3-ubyte": (
                7_840_016,
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            ),
            "MNIST/raw/t10k-labels-idx1-ubyte": (
                10_008,
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
        },
        download=_download_mnist,
        instead="digits",
    ),
    "photos": DataSet(
        "7 photographs that come with scikit-image and scikit-learn",
        "public domain, CC0, CC BY 2.0; motorcycle: Middlebury Stereo 2014",
        _photos,
        where="scikit-image, scikit-learn",
    ),
    "driving": DataSet(
        "a drawn road with cars, trucks and people; boxes, masks and flow at any time",
        "MIT",
        _driving,
        where="predoc_lib",
    ),
    "motorcycle": DataSet(
        "two photographs of a motorcycle from two places, 741 x 500, with their true disparity",
        "Middlebury Stereo 2014",
        _motorcycle,
        where="scikit-image",
    ),
    "rubber_whale": DataSet(
        "RubberWhale, two photographs, 584 x 388, with their true optical flow (Middlebury)",
        "not stated",
        files={
            "flow/RubberWhale/frame10.png": (
                360_913,
                "eb312435369dac9efcc92f7e098edbd9ed8d7e6dfede8b3b4d8e3702cd80b796",
            ),
            "flow/RubberWhale/frame11.png": (
                361_085,
                "ee309a00d47b837b322ea5d9128775e0c46869b8014376286ba316a073d293ac",
            ),
            "flow/RubberWhale/flow10.flo": (
                1_812_748,
                "f57359dd1a35907322f7a890a5e61bd0dd421aac89fd51ba0c71bf3a7e0a8890",
            ),
        },
        instead="motorcycle",
    ),
    "sprites": DataSet("3,072 drawn sprites, 32 x 32, whose factors are known", "MIT", _sprites, where="predoc_lib"),
    "cifar10": DataSet(
        "CIFAR-10, 60,000 colour images, 32 x 32",
        "not stated",
        files={
            "cifar-10-python.tar.gz": (
                170_498_071,
                "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            ),
        },
        download=_download_cifar10,
        instead="photos",
    ),
    "cifar10_subset": DataSet(
        "35,000 of CIFAR-10's images, with a split of its own",
        "not stated",
        files={
            "cifar10/cifar10_train_30000.npz": (
                84_781_400,
                "92c69f5047d8ed4e879c3d0c5a4381e7340f13956d61d588e364b5529a87fd74",
            ),
            "cifar10/cifar10_val_5000.npz": (
                14_137_556,
                "61399ef7e1372f949c18f4397e2423854d16a1c5fc42a0c32aec130bfe195b6d",
            ),
        },
        instead="photos",
    ),
    "udacity": DataSet(
        "two drives on real highways, 221 and 38 frames",
        "MIT",
        files={
            "driving/solidWhiteRight.mp4": (
                2_641_803,
                "2d8e14b46fe89afbc8ad1f718685cf09b83e85a324095031c38186a9f0535417",
            ),
            "driving/vehicle_detection_test_video.mp4": (
                801_181,
                "6d809d2bc58d837b2a7c53e6da5c75f4476dac64370c0adc245107b592853aa8",
            ),
        },
        download=_download(
            {
                "driving/solidWhiteRight.mp4": f"{UDACITY}/CarND-LaneLines-P1/master/test_videos/solidWhiteRight.mp4",
                "driving/vehicle_detection_test_video.mp4": f"{UDACITY}/CarND-Vehicle-Detection/master/test_video.mp4",
            }
        ),
        instead="driving",
    ),
    "bdd100k": DataSet(
        "BDD100K, 100,000 drives of 40 s, 1280 x 720 (the report's)",
        "BDD100K licence",
        yours="register at bdd-data.berkeley.edu, unpack bdd100k_videos_train_00.zip or another part, and give the "
        "path of one of its videos, bdd100k/videos/train/*.mov, where a video is asked for.",
        size="1.8 TB",
    ),
    "yolo_fastest": _detector(
        "yolo-fastest-1.1",
        "YOLO-Fastest 1.1, a detector of COCO's 80 classes",
        FASTEST,
        (9_685, "f6df5775c1e862998cf69046eba9265be3ae84dfe8b2caab7529823f0795bf70"),
        (1_384_268, "1c445c42bbd6df63edea2cc69f99667b5650d663ca11e34b116240740cd42890"),
    ),
    "yolo_fastest_xl": _detector(
        "yolo-fastest-1.1-xl",
        "YOLO-Fastest 1.1-xl, a larger one",
        FASTEST,
        (9_696, "c458427acc4fbeabceff4528ef7b65b066c0308ce599460f8ba299eba63abad3"),
        (3_693_964, "fac5fb41786c1f38f04972a658443b189f48720d7d117f9a044100e98a35b0c5"),
    ),
    "yolov3_tiny": _detector(
        "yolov3-tiny",
        "YOLOv3-tiny, the report's detector in small",
        REDMON,
        (1_915, "84eb7a675ef87c906019ff5a6e0effe275d175adb75100dcb47f0727917dc2c7"),
        (35_434_956, "dccea06f59b781ec1234ddf8d1e94b9519a97f4245748a7d4db75d5b7080a42c"),
    ),
    "yolov3": _detector(
        "yolov3",
        "YOLOv3, the report's detector",
        REDMON,
        (8_342, "22489ea38575dfa36c67a90048e8759576416a79d32dc11e15d2217777b9a953"),
        (248_007_048, "523e4e69e1d015393a1b0a441cef1d9c7659e3eb2d7e15f793f060a21b32f297"),
    ),
}
