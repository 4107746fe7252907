"""What a classifier of texts has to beat: the majority class, naive Bayes, and logistic regression on TF-IDF."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.classification.docstrings import Docstrings

PENALTIES = (1.0, 10.0, 100.0)  # C of the logistic regression, chosen by cross-validation on training texts


@dataclass(frozen=True)
class Score:
    """Of predictions: both from 0 to 1. Macro-F1 is the unweighted mean of the classes' F1."""

    accuracy: float
    macro_f1: float


def score(predicted: Sequence[int], expected: Sequence[int], num_labels: int) -> Score:
    """Accuracy and macro-F1 over all `num_labels` classes; the F1 of a class that is never predicted is 0."""
    from sklearn.metrics import accuracy_score, f1_score

    classes = list(range(num_labels))
    f1 = f1_score(expected, predicted, labels=classes, average="macro", zero_division=0.0)
    return Score(float(accuracy_score(expected, predicted)), float(f1))


def baselines(data: Docstrings) -> dict[str, Score]:
    """Train on `data.train`, score on `data.test`.

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
    expected = [one.label for one in data.test]
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    regression = make_pipeline(words, LogisticRegression(max_iter=2000, class_weight="balanced"))
    models = {
        "naive Bayes": make_pipeline(CountVectorizer(), MultinomialNB(alpha=0.1)),
        "TF-IDF logistic regression": GridSearchCV(
            regression, {"logisticregression__C": PENALTIES}, cv=3, scoring="f1_macro"
        ),
    }
    most = Counter(labels).most_common(1)[0][0]
    found = {"majority": score([most] * len(expected), expected, len(data.labels))}
    with threadpool_limits(1):  # products so small take many times as long on all cores of a large machine
        for name, model in models.items():
            model.fit(texts, labels)
            found[name] = score(model.predict([one.text for one in data.test]), expected, len(data.labels))
    return found
