"""A picture as an encoder was trained to see it, but for normalising, which is the device's. Used by clip.py.

Picklable: pictures are brought to this form by processes that have no encoder.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

if TYPE_CHECKING:
    from PIL import Image


class Preprocessing:
    """size: (width, height) of what comes out; text: everything that decides it, as parts record it."""

    def __init__(self, config: PreprocessCfg) -> None:
        width, height = (config.size, config.size) if isinstance(config.size, int) else config.size[::-1]
        self.size = (width, height)
        self.text = json.dumps(asdict(config), sort_keys=True, separators=(",", ":"))
        self._plain = config.mode == "RGB" and config.resize_mode == "shortest" and height == width
        self._plain = self._plain and config.interpolation == "bicubic"
        transform: Any = image_transform_v2(config, is_train=False)
        *self._to_rgb, _, _ = transform.transforms  # all but to-tensor and normalise, which encode_images does

    def __call__(self, image: Image.Image) -> np.ndarray:
        """RGB picture → (H, W, 3) uint8."""
        if image.mode == "RGB" and image.size == self.size:
            return np.array(image)  # what the transforms would give, without their cost
        if self._plain and image.mode == "RGB":
            # The same bicubic resize with antialiasing as Pillow's, on uint8 throughout, in two thirds to one third of
            # its time: a value in 250 differs by one level of 256. At a GPU's rates the resize is what the processors
            # spend most on, more than on decoding JPEG.
            side = [self.size[0]]
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            pixels = resize(pixels, side, InterpolationMode.BICUBIC, antialias=True)
            return center_crop(pixels, side).permute(1, 2, 0).contiguous().numpy()
        for transform in self._to_rgb:
            image = transform(image)
        return np.array(image)
