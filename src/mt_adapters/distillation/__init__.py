"""A large backbone's features taught to a small one: no labels, any folder of images."""

from mt_adapters.distillation.images import Images, open_images
from mt_adapters.distillation.matching import FeatureMatching, feature_maps
from mt_adapters.distillation.views import TeacherViews, ViewSettings, teacher_channels

__all__ = [
    "FeatureMatching",
    "Images",
    "TeacherViews",
    "ViewSettings",
    "feature_maps",
    "open_images",
    "teacher_channels",
]
