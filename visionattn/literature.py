"""What the literature says of the families beyond their entries: how to cite it, its dense results, and its gaps.

Values only, which `cards.py` prints. Dense results are the authors' own with their own heads, none of them measured
here; `configs/` has the recipes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Citation(NamedTuple):
    """A paper; `venue` is "" for one that has appeared on arXiv alone."""

    key: str
    title: str
    authors: str
    venue: str
    year: int

    def bibtex(self, arxiv: str) -> str:
        """The entry for a bibliography, with the paper's number on arXiv."""
        kind = "inproceedings" if self.venue else "misc"
        fields = {"title": self.title, "author": self.authors, "booktitle": self.venue, "year": self.year}
        fields |= {"eprint": arxiv, "archivePrefix": "arXiv"}
        lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
        return "\n".join([f"@{kind}{{{self.key},", *lines, "}"])


class Result(NamedTuple):
    """What a detector or segmenter on a backbone reached."""

    model: str
    data: str
    head: str
    figures: str


CITATIONS = {
    "2103.12731": Citation(
        "vaswani2021halonet",
        "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        "Vaswani, Ashish and Ramachandran, Prajit and Srinivas, Aravind and Parmar, Niki and Hechtman, Blake and "
        "Shlens, Jonathon",
        "CVPR",
        2021,
    ),
    "2006.15102": Citation(
        "saini2020ulsam",
        "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
        "Saini, Rajat and Jha, Nandan Kumar and Das, Bedanta and Mittal, Sparsh and Mohan, C. Krishna",
        "WACV",
        2020,
    ),
    "2202.09741": Citation(
        "guo2023visual",
        "Visual Attention Network",
        "Guo, Meng-Hao and Lu, Cheng-Ze and Liu, Zheng-Ning and Cheng, Ming-Ming and Hu, Shi-Min",
        "Computational Visual Media",
        2023,
    ),
    "2204.03645": Citation(
        "ding2022davit",
        "DaViT: Dual Attention Vision Transformers",
        "Ding, Mingyu and Xiao, Bin and Codella, Noel and Luo, Ping and Wang, Jingdong and Yuan, Lu",
        "ECCV",
        2022,
    ),
    "2204.07143": Citation(
        "hassani2023neighborhood",
        "Neighborhood Attention Transformer",
        "Hassani, Ali and Walton, Steven and Li, Jiachen and Li, Shen and Shi, Humphrey",
        "CVPR",
        2023,
    ),
    "2209.15001": Citation(
        "hassani2022dilated", "Dilated Neighborhood Attention Transformer", "Hassani, Ali and Shi, Humphrey", "", 2022
    ),
    "2303.08810": Citation(
        "zhu2023biformer",
        "BiFormer: Vision Transformer with Bi-Level Routing Attention",
        "Zhu, Lei and Wang, Xinjiang and Ke, Zhanghan and Zhang, Wayne and Lau, Rynson",
        "CVPR",
        2023,
    ),
    "2312.08874": Citation(
        "han2024agent",
        "Agent Attention: On the Integration of Softmax and Linear Attention",
        "Han, Dongchen and Ye, Tianzhu and Han, Yizeng and Xia, Zhuofan and Pan, Siyuan and Wan, Pengfei and "
        "Song, Shiji and Huang, Gao",
        "ECCV",
        2024,
    ),
    "2403.01123": Citation(
        "xu2024ela",
        "ELA: Efficient Local Attention for Deep Convolutional Neural Networks",
        "Xu, Wei and Wan, Yi",
        "",
        2024,
    ),
    "2412.06590": Citation(
        "han2024inline",
        "Bridging the Divide: Reconsidering Softmax and Linear Attention",
        "Han, Dongchen and Pu, Yifan and Xia, Zhuofan and Han, Yizeng and Pan, Xuran and Li, Xiu and Lu, Jiwen and "
        "Song, Shiji and Huang, Gao",
        "NeurIPS",
        2024,
    ),
    "2501.16182": Citation(
        "zheng2025linear", "The Linear Attention Resurrection in Vision Transformer", "Zheng, Chuanyang", "", 2025
    ),
    "2507.00698": Citation(
        "fan2025rectifying",
        "Rectifying Magnitude Neglect in Linear Attention",
        "Fan, Qihang and Huang, Huaibo and Ai, Yuang and He, Ran",
        "ICCV",
        2025,
    ),
}


def _coco(head: str, figures: Mapping[str, Sequence[float]]) -> list[Result]:
    """Box AP, and mask AP where there are masks."""
    kinds = ("box", "mask")
    return [
        Result(model, "COCO", head, ", ".join(f"{x:g} {kind} AP" for x, kind in zip(values, kinds, strict=False)))
        for model, values in figures.items()
    ]


def _ade(head: str, figures: Mapping[str, Sequence[float]], kinds: Sequence[str] = ("", " (multi-scale)")):
    """Mean intersection over union, at one scale and at several."""
    return [
        Result(model, "ADE20K", head, ", ".join(f"{x:g} mIoU{kind}" for x, kind in zip(values, kinds, strict=False)))
        for model, values in figures.items()
    ]


DENSE: dict[str, list[Result]] = {
    "nat": [
        *_coco(
            "Mask R-CNN 3x",
            {
                "nat_mini": (46.5, 41.7),
                "nat_tiny": (47.7, 42.6),
                "nat_small": (48.4, 43.2),
                "dinat_mini": (47.2, 42.5),
                "dinat_tiny": (48.6, 43.5),
                "dinat_small": (49.3, 44.0),
            },
        ),
        *_coco(
            "Cascade Mask R-CNN 3x",
            {
                "nat_mini": (50.3, 43.6),
                "nat_tiny": (51.4, 44.5),
                "nat_small": (52.0, 44.9),
                "nat_base": (52.3, 45.1),
                "dinat_mini": (51.2, 44.4),
                "dinat_tiny": (52.2, 45.1),
                "dinat_small": (52.9, 45.8),
                "dinat_base": (53.4, 46.2),
                "dinat_large": (55.3, 47.8),
            },
        ),
        *_ade(
            "UPerNet 160k",
            {
                "nat_mini": (45.1, 46.4),
                "nat_tiny": (47.1, 48.4),
                "nat_small": (48.0, 49.5),
                "nat_base": (48.5, 49.7),
                "dinat_mini": (45.8, 47.2),
                "dinat_tiny": (47.8, 48.8),
                "dinat_small": (48.9, 49.9),
                "dinat_base": (49.6, 50.4),
                "dinat_large": (54.0, 54.9),
            },
        ),
    ],
    "dinat_s": [
        *_coco("Mask R-CNN 3x", {"dinat_s_tiny": (46.6, 42.1), "dinat_s_small": (48.6, 43.5)}),
        *_coco(
            "Cascade Mask R-CNN 3x",
            {
                "dinat_s_tiny": (51.0, 44.1),
                "dinat_s_small": (52.3, 45.2),
                "dinat_s_base": (52.6, 45.3),
                "dinat_s_large": (54.8, 47.2),
            },
        ),
        *_ade(
            "UPerNet 160k",
            {
                "dinat_s_tiny": (46.0, 47.4),
                "dinat_s_small": (48.6, 49.9),
                "dinat_s_base": (49.4, 50.2),
                "dinat_s_large": (53.4, 54.6),
            },
        ),
    ],
    "biformer": [
        *_coco("Mask R-CNN 1x", {"biformer_small": (47.8, 43.2), "biformer_base": (48.6, 43.7)}),
        *_coco("RetinaNet 1x", {"biformer_small": (45.9,), "biformer_base": (47.1,)}),
        *_ade("Semantic FPN 80k", {"biformer_small": (48.9,), "biformer_base": (49.9,)}),
        *_ade("UPerNet 160k", {"biformer_small": (49.8, 50.8), "biformer_base": (51.0, 51.7)}),
    ],
    "van": [
        *_ade("Semantic FPN 40k", {"van_b0": (38.5,), "van_b1": (42.9,), "van_b2": (46.7,), "van_b3": (48.1,)}),
        *_ade(
            "UPerNet 160k",
            {"van_b0": (41.1,), "van_b1": (44.9,), "van_b2": (50.1,), "van_b3": (50.6,), "van_b4": (52.2,)},
            kinds=(" (multi-scale)",),
        ),
        *_ade(
            "UPerNet 160k from ImageNet-22k",
            {"van_b4": (53.5,), "van_b5": (53.9,), "van_b6": (54.7,)},
            kinds=(" (multi-scale)",),
        ),
    ],
    "davit_va": [
        *_coco(
            "Mask R-CNN 1x",
            {"davit_tiny_va": (45.0, 41.1), "davit_small_va": (47.7, 42.9), "davit_base_va": (48.2, 43.3)},
        ),
        *_coco(
            "Mask R-CNN 3x",
            {"davit_tiny_va": (47.4, 42.9), "davit_small_va": (49.5, 44.3), "davit_base_va": (49.9, 44.6)},
        ),
        *_coco("RetinaNet 1x", {"davit_tiny_va": (44.0,), "davit_small_va": (46.0,), "davit_base_va": (46.7,)}),
        *_coco("RetinaNet 3x", {"davit_tiny_va": (46.5,), "davit_small_va": (48.2,), "davit_base_va": (48.7,)}),
        *_ade("UPerNet 160k", {"davit_tiny_va": (46.3,), "davit_small_va": (48.8,), "davit_base_va": (49.4,)}),
    ],
    "agent": [
        *_coco(
            "Mask R-CNN 1x",
            {
                "agent_pvt_tiny": (41.4, 38.7),
                "agent_pvt_small": (44.5, 41.2),
                "agent_pvt_medium": (45.9, 42.0),
                "agent_pvt_large": (46.9, 42.8),
                "agent_swin_tiny": (44.6, 40.7),
                "agent_swin_small": (47.2, 42.7),
            },
        ),
        *_coco("Mask R-CNN 3x", {"agent_swin_tiny": (47.3, 42.7), "agent_swin_small": (48.9, 43.8)}),
        *_coco("Cascade Mask R-CNN 1x", {"agent_swin_tiny": (49.2, 42.7)}),
        *_coco(
            "Cascade Mask R-CNN 3x",
            {"agent_swin_tiny": (51.4, 44.5), "agent_swin_small": (52.6, 45.5), "agent_swin_base": (52.6, 45.3)},
        ),
        *_coco(
            "RetinaNet 1x",
            {
                "agent_pvt_tiny": (40.3,),
                "agent_pvt_small": (44.1,),
                "agent_pvt_medium": (45.8,),
                "agent_pvt_large": (46.8,),
            },
        ),
        *_ade("UPerNet 160k", {"agent_swin_tiny": (46.68,), "agent_swin_small": (48.08,), "agent_swin_base": (48.73,)}),
        *_ade(
            "Semantic FPN 40k",
            {
                "agent_pvt_tiny": (40.18,),
                "agent_pvt_small": (44.18,),
                "agent_pvt_medium": (44.3,),
                "agent_pvt_large": (46.52,),
            },
        ),
    ],
    "mala": _coco("Cascade Mask R-CNN 3x", {"mala_base": (55.5, 48.0)}),
}

# What nobody here knows of a family, beyond what holds for all.
UNKNOWN: dict[str, list[str]] = {
    "biformer": ["The weights of the paper's models with token labelling, which were never published."],
    "davit_va": ["Weights of the large, huge and giant models, which were never published."],
    "ela": [
        "The authors' code, which does not exist: the module follows public copies that agree with each other, with one"
        " convolution for both axes.",
        "Where in a block the authors put it, and the accuracy of these models.",
    ],
    "halonet": [
        "The authors' code and weights of H0 to H7, whose table is quoted second-hand.",
        "GMACs of the paper's models as the authors count them.",
    ],
    "inline": [
        "Why the authors' page says 50.2 million parameters for PVT-L, where their code has 51.2, and 25, 43 and"
        " 96 million for CSwin, where their paper and their code have 21, 33 and 73.",
        "Dense results, which stand in the paper alone.",
    ],
    "l2vit": [
        "Whether the released files keep averaged weights under `model` or `model_ema`, which is taken if present.",
        "Dense results, which stand in the paper alone.",
        "The names of the 21,841 classes, which are in an order of the authors' own.",
    ],
    "mala": [
        "The names of the files in the authors' repository on the hub: the one with the size's letter is taken if it is"
        " the only one. Accuracies and dense results are quoted second-hand.",
    ],
    "ulsam": [
        "Which of several equal blocks the authors replaced: they published the module, neither nets nor weights.",
    ],
    "van": [
        "Whether mmpretrain's file of B6 fits: its table has a width of 480 channels where the authors' code has 384.",
        "Figures of B4 to B6, quoted second-hand.",
    ],
}
