"""Cite the papers of the losses."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper on arXiv."""

    key: str
    authors: str
    title: str
    arxiv: str

    @property
    def bibtex(self) -> str:
        """The entry for BibTeX. arXiv numbers begin with year and month."""
        return (
            f"@misc{{{self.key},\n"
            f"  author = {{{self.authors}}},\n"
            f"  title = {{{self.title}}},\n"
            f"  year = {{20{self.arxiv[:2]}}},\n"
            f"  eprint = {{{self.arxiv}}},\n"
            "  archivePrefix = {arXiv}\n"
            "}"
        )


_KTO = Paper(
    "ethayarajh2024kto",
    "Ethayarajh, Kawin and Xu, Winnie and Muennighoff, Niklas and Jurafsky, Dan and Kiela, Douwe",
    "{KTO}: Model Alignment as Prospect Theoretic Optimization",
    "2402.01306",
)
PAPERS = {
    "kto": _KTO,
    "humanline": Paper(
        "liu2025humanline",
        "Liu, Sijia and Muennighoff, Niklas and Ethayarajh, Kawin",
        "Humanline: Online Alignment as Perceptual Loss",
        "2509.24207",
    ),
    "apo_zero": Paper(
        "doosterlinck2024anchored",
        "D'Oosterlinck, Karel and others",
        "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
        "2408.06266",
    ),
    "bco": Paper(
        "jung2024binary",
        "Jung, Seungjae and others",
        "Binary Classifier Optimization for Large Language Model Alignment",
        "2404.04656",
    ),
    "ppo_clip": Paper(
        "schulman2017proximal", "Schulman, John and others", "Proximal Policy Optimization Algorithms", "1707.06347"
    ),
    "dpo": Paper(
        "rafailov2023direct",
        "Rafailov, Rafael and others",
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "2305.18290",
    ),
    "robust": Paper(
        "chowdhury2024provably",
        "Chowdhury, Sayak Ray and Kini, Anush and Natarajan, Nagarajan",
        "Provably Robust {DPO}: Aligning Language Models with Noisy Feedback",
        "2403.00409",
    ),
    "ipo": Paper(
        "azar2023general",
        "Azar, Mohammad Gheshlaghi and others",
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        "2310.12036",
    ),
    "slic": Paper(
        "zhao2023slic",
        "Zhao, Yao and others",
        "{SLiC-HF}: Sequence Likelihood Calibration with Human Feedback",
        "2305.10425",
    ),
    "nca": Paper(
        "chen2024noise",
        "Chen, Huayu and others",
        "Noise Contrastive Alignment of Language Models with Explicit Rewards",
        "2402.05369",
    ),
    "cpo": Paper(
        "xu2024contrastive",
        "Xu, Haoran and others",
        "Contrastive Preference Optimization: Pushing the Boundaries of {LLM} Performance in Machine Translation",
        "2401.08417",
    ),
    "simpo": Paper(
        "meng2024simpo",
        "Meng, Yu and Xia, Mengzhou and Chen, Danqi",
        "{SimPO}: Simple Preference Optimization with a Reference-Free Reward",
        "2405.14734",
    ),
    "orpo": Paper(
        "hong2024orpo",
        "Hong, Jiwoo and Lee, Noah and Thorne, James",
        "{ORPO}: Monolithic Preference Optimization without Reference Model",
        "2403.07691",
    ),
}


def paper_of(loss: str) -> str:
    """Return where the paper of a loss is found."""
    return f"arXiv {PAPERS[loss].arxiv}"


def citations_of(loss: str) -> Iterator[str]:
    """Yield the BibTeX entries of KTO and, if it is another one, of the loss."""
    yield _KTO.bibtex
    if PAPERS[loss] is not _KTO:
        yield PAPERS[loss].bibtex
