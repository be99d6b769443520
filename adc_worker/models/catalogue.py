"""Antenna's ten pipelines as data: slugs, algorithms, where weights and labels are, and how crops are prepared.

Slugs, names and keys are those that projects have registered already: a result with another key is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from adc_worker.models.pipeline import Algorithm

STORE = "https://object-arbutus.cloud.computecanada.ca/ami-models/"
POSITIVE_LABEL = "moth"  # what the binary filter lets through

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CENTRED: Statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True, slots=True)
class ClassifierCard:
    """A crop classifier before it is loaded, and the pipeline that is called like it.

    Attributes:
        architecture: a name that `classifiers.ARCHITECTURES` knows.
        weights: URL of the state dict.
        labels: URL of a JSON object from name to index, whose order is the class order.
        crop_px: side of the square that every crop is resized to.
        statistics: mean and standard deviation per channel, of pixels in 0..1.
        taxon_rank: what its labels are.
        filtered: whether it gets only what the binary filter lets through.
    """

    name: str
    key: str
    architecture: str
    weights: str
    labels: str
    crop_px: int = 128
    statistics: Statistics = IMAGENET
    taxon_rank: str = "SPECIES"
    filtered: bool = True

    def algorithm(self, labels: tuple[str, ...] = ()) -> Algorithm:
        made = Algorithm(self.name, self.key, "classification", uri=self.weights, labels=labels)
        return replace(made, labels_uri=self.labels, taxon_rank=self.taxon_rank)


DETECTOR_WEIGHTS = f"{STORE}moths/localization/fasterrcnn_resnet50_fpn_tz53qv9v.pt"
DETECTOR = Algorithm(
    "FasterRCNN for AMI Moth Traps 2023", "fasterrcnn_for_ami_moth_traps_2023", "localization", uri=DETECTOR_WEIGHTS
)
SCORE_THRESHOLD = 0.8  # boxes that score above it count,
BOXES_PER_IMAGE = 500  # the best of them first


def _moths(name: str, key: str, architecture: str, weights: str, labels: str) -> ClassifierCard:
    folder = f"{STORE}moths/classification/"
    return ClassifierCard(name, key, architecture, folder + weights, f"{folder}{labels}.json")


def _turing(name: str, key: str, weights: str, labels: str) -> ClassifierCard:
    weights, labels = f"turing-{weights}_state.pt", f"{labels}_data_category_map"
    card = _moths(f"Turing {name} Species Classifier", f"turing_{key}_species_classifier", "turing", weights, labels)
    return replace(card, crop_px=300, statistics=CENTRED)


# fmt: off
MOTH_FILTER = replace(_moths(
    "Moth / Non-Moth Classifier", "moth_nonmoth_classifier", "torchvision_resnet50",
    "moth-nonmoth_resnet50_20240417_b4fe3efe.pth", "05-moth-nonmoth_category_map",
), taxon_rank="SUPERFAMILY", filtered=False)

PIPELINES = {
    "panama_moths_2023": _moths(
        "Panama Species Classifier 2023", "panama_species_classifier_2023", "torchvision_resnet50",
        "panama_resetnet50_best_5aeb515a.pth", "03_moths_centralAmerica_category_map-202311110-with-names",
    ),
    "panama_moths_2024": _moths(
        "Panama Species Classifier - Apr 2024", "panama_species_classifier_apr_2024", "timm_resnet50",
        "panama_resnet50_baseline_20240417_edbb46dd.pth", "03_ami-gbif_fine-grained_c-america_category_map-with_names",
    ),
    "quebec_vermont_moths_2023": _moths(
        "Quebec & Vermont Species Classifier - Apr 2024", "quebec_vermont_species_classifier_apr_2024", "timm_resnet50",
        "quebec-vermont_resnet50_baseline_20240417_950de764.pth",
        "01_ami-gbif_fine-grained_ne-america_category_map-with_names",
    ),
    "uk_denmark_moths_2023": _moths(
        "UK & Denmark Species Classifier - Apr 2024", "uk_denmark_species_classifier_apr_2024", "timm_resnet50",
        "uk-denmark_resnet50_baseline_20240417_55250a8b.pth",
        "02_ami-gbif_fine-grained_w-europe_category_map-with_names",
    ),
    "costa_rica_moths_turing_2024": _turing(
        "Costa Rica", "costa_rica", "costarica_v03_resnet50_2024-06-04-16-17", "03_costarica",
    ),
    "anguilla_moths_turing_2024": _turing(
        "Anguilla", "anguilla", "anguilla_v01_resnet50_2024-06-28-17-01", "01_anguilla",
    ),
    "kenya-uganda_moths_turing_2024": _turing(
        "Kenya and Uganda", "kenya_and_uganda", "kenya-uganda_v01_resnet50_2024-11-19-18-44", "01_kenya-uganda",
    ),
    "global_moths_2024": _moths(
        "Global Species Classifier - Aug 2024", "global_species_classifier_aug_2024", "timm_resnet50",
        "global_resnet50_20240828_b06d3b3a.pth", "global_category_map_with_names_20240828",
    ),
    "moth_binary": MOTH_FILTER,
    "insect_orders_2025": ClassifierCard(
        "Insect Order Classifier", "insect_order_classifier", "timm_convnext_tiny",
        f"{STORE}insect_orders/convnext_tiny_in22k_worder0.5_wbinary0.5_run2_checkpoint.pt",
        f"{STORE}insect_orders/insect_order_category_map.json",
        taxon_rank="ORDER",
        filtered=False,
    ),
}
# fmt: on
