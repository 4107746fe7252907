"""What a classifier of texts has to beat: the majority class, naive Bayes, and logistic regression on TF-IDF."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.classification.docstrings import Docstrings

PENALTIES = (1.0, 10.0, 100.0)  # C of the logistic regression, chosen by cross-validation on training texts


@dataclass(frozen=True)
class Score:
    """Of predictions: both from 0 to 1. Macro-F1 is the unweighted mean of the classes' F1."""

    accuracy: float
    macro_f1: float


def score(predicted: Sequence[int], expected: Sequence[int], num_labels: int) -> Score:
    """Accuracy and macro-F1 over all `num_labels` classes; the F1 of a class that is never predicted is 0."""
    predicted, expected = np.asarray(predicted), np.asarray(expected)
    right = predicted == expected
    true_positives = np.bincount(expected[right], minlength=num_labels)
    both = np.bincount(predicted, minlength=num_labels) + np.bincount(expected, minlength=num_labels)
    f1 = 2 * true_positives / both.clip(min=1)  # of each class; 0 where a class is in neither
    return Score(float(right.mean()), float(f1.mean()))


def difference_interval(
    ours: Sequence[int], theirs: Sequence[int], expected: Sequence[int], num_labels: int, resamples: int = 1000
) -> tuple[float, float]:
    """Bootstrap the 95 % interval of our macro-F1 minus theirs over the test texts, drawn with replacement.

    Both predictions are scored on the same draw. The seed is fixed.
    """
    columns, generator = np.array([ours, theirs, expected]), np.random.default_rng(0)
    differences = []
    for _ in range(resamples):
        mine, other, true = columns[:, generator.integers(columns.shape[1], size=columns.shape[1])]
        differences.append(score(mine, true, num_labels).macro_f1 - score(other, true, num_labels).macro_f1)
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)


def baselines(data: Docstrings, predicted: Mapping[str, Sequence[int]] | None = None) -> dict[str, Score]:
    """Score `predicted` on `data.test`, by default that of `predictions`."""
    expected = [one.label for one in data.test]
    predicted = predictions(data) if predicted is None else predicted
    return {name: score(labels, expected, len(data.labels)) for name, labels in predicted.items()}


def predictions(data: Docstrings) -> dict[str, list[int]]:
    """Train on `data.train`, predict the labels of `data.test`.

    Returns:
        By name: "majority", "naive Bayes" on counts of words, "TF-IDF logistic regression" on words and pairs of words,
        balanced classes.
    """
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline
    from threadpoolctl import threadpool_limits

    texts, labels = [one.text for one in data.train], [one.label for one in data.train]
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    regression = make_pipeline(words, LogisticRegression(max_iter=2000, class_weight="balanced"))
    models = {
        "naive Bayes": make_pipeline(CountVectorizer(), MultinomialNB(alpha=0.1)),
        "TF-IDF logistic regression": GridSearchCV(
            regression, {"logisticregression__C": PENALTIES}, cv=3, scoring="f1_macro"
        ),
    }
    most = Counter(labels).most_common(1)[0][0]
    found = {"majority": [most] * len(data.test)}
    with threadpool_limits(1):  # products so small take many times as long on all cores of a large machine
        for name, model in models.items():
            model.fit(texts, labels)
            found[name] = model.predict([one.text for one in data.test]).tolist()
    return found
