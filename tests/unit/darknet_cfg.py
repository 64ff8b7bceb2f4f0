"""YOLOv3's and YOLOv3-tiny's networks as `.cfg` text, after Redmon and Farhadi's description."""

NET = "[net]\nwidth={size}\nheight={size}\nchannels=3\n"
ANCHORS = "10,13, 16,30, 33,23, 30,61, 62,45, 59,119, 116,90, 156,198, 373,326"
TINY_ANCHORS = "10,14, 23,27, 37,58, 81,82, 135,169, 344,319"


def convolution(filters: int, size: int, stride: int = 1, **options) -> str:
    options = {"batch_normalize": 1, "activation": "leaky"} | options
    lines = "".join(f"{name}={value}\n" for name, value in options.items())
    return f"[convolutional]\nfilters={filters}\nsize={size}\nstride={stride}\npad=1\n{lines}"


def residual(filters: int) -> str:
    return convolution(filters, 1) + convolution(2 * filters, 3) + "[shortcut]\nfrom=-3\nactivation=linear\n"


def head(mask: str, anchors: str, filters: int = 255) -> str:
    number = len(anchors.split(",")) // 2
    return (
        convolution(filters, 1, batch_normalize=0, activation="linear")
        + f"[yolo]\nmask={mask}\nanchors={anchors}\nclasses=80\nnum={number}\njitter=.3\nignore_thresh=.7\n"
    )


def yolov3(size: int = 416) -> str:
    text = NET.format(size=size) + convolution(32, 3)
    for filters, repeats in ((32, 1), (64, 2), (128, 8), (256, 8), (512, 4)):
        text += convolution(2 * filters, 3, 2) + residual(filters) * repeats

    def neck(filters: int) -> str:
        return (convolution(filters, 1) + convolution(2 * filters, 3)) * 3

    def up(filters: int, layer: int) -> str:
        return f"[route]\nlayers=-4\n{convolution(filters, 1)}[upsample]\nstride=2\n[route]\nlayers=-1,{layer}\n"

    text += neck(512) + head("6,7,8", ANCHORS)
    text += up(256, 61) + neck(256) + head("3,4,5", ANCHORS)
    return text + up(128, 36) + neck(128) + head("0,1,2", ANCHORS)


def yolov3_tiny(size: int = 416) -> str:
    text = NET.format(size=size)
    for filters in (16, 32, 64, 128, 256):
        text += convolution(filters, 3) + "[maxpool]\nsize=2\nstride=2\n"
    text += convolution(512, 3) + "[maxpool]\nsize=2\nstride=1\n" + convolution(1024, 3)
    text += convolution(256, 1) + convolution(512, 3) + head("3,4,5", TINY_ANCHORS)
    text += "[route]\nlayers=-4\n" + convolution(128, 1) + "[upsample]\nstride=2\n[route]\nlayers=-1,8\n"
    return text + convolution(256, 3) + head("0,1,2", TINY_ANCHORS)
