"""Where the repository lies: the one constant that every badge and link derives from."""

REPOSITORY = "https://github.com/RohitNagraj/UnslothPuzzles"
BRANCH = "main"
NOTEBOOK = "Rohit_Unsloth_Puzzles.ipynb"


def badges() -> str:
    """The badge row in Markdown: open in Colab, open in Kaggle, the source on GitHub."""
    slug = REPOSITORY.removeprefix("https://github.com/")
    blob = f"{REPOSITORY}/blob/{BRANCH}/{NOTEBOOK}"
    return " ".join(
        (
            _badge(
                "Open in Colab",
                "https://colab.research.google.com/assets/colab-badge.svg",
                f"https://colab.research.google.com/github/{slug}/blob/{BRANCH}/{NOTEBOOK}",
            ),
            _badge(
                "Open in Kaggle",
                "https://kaggle.com/static/images/open-in-kaggle.svg",
                f"https://kaggle.com/kernels/welcome?src={blob}",
            ),
            _badge("Source on GitHub", "https://img.shields.io/badge/GitHub-source-181717?logo=github", REPOSITORY),
        )
    )


def _badge(text: str, image: str, link: str) -> str:
    return f"[![{text}]({image})]({link})"
